"""A style that can be kept, shared and mixed: tokens with their provenance, without the picture."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError, WeightsError
from ..weights.files import read_state_dict, write_state_dict
from ..weights.numbers import check_floating
from .decoupled_attention import StyleRegion

FORMAT = "stylemaster-style-1"
# Of the ModelSpec standard, as ComfyUI's model library and others show them.
TAGS_KEY, THUMBNAIL_KEY = "modelspec.tags", "modelspec.thumbnail"
JPEG_URL = "data:image/jpeg;base64,"
MAX_TAGS, MAX_TAG = 20, 50  # how many, and characters of each
TIME_STEPS = 840  # resolution of masks over time; divisible by most small numbers of frames
BlendMode = Literal["mean", "concatenate"]


@dataclass(frozen=True, eq=False)
class Style:
    """Style tokens and where they come from.

    Attributes:
        tokens: [1, S, D].
        provenance: plain JSON values: picture names and hashes, prompt, selection, seeds, adapter.
    """

    tokens: Tensor
    provenance: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.tokens.shape[0] != 1 or 0 in self.tokens.shape:
            raise LayoutError(f"a style is [1, S, D] tokens, got {list(self.tokens.shape)}")
        if not torch.isfinite(self.tokens).all():
            raise LayoutError("the style tokens hold NaN or infinity; encode the style image again")


def provenance_of(
    pictures: Sequence[np.ndarray],
    *,
    method: str,
    adapter: str,
    crop: str,
    names: Sequence[str] = (),
    **more: object,
) -> dict[str, object]:
    """What a style says of its origin, whichever host and adapter made it.

    Args:
        pictures: uint8 [H, W, 3] each.
        method: of the adapter.
        adapter: name of its file.
        crop: how the image encoder's square was cut.
        names: of the pictures, where they are known.
        more: plain JSON values that only some methods have.
    """
    hashes = [hashlib.sha256(np.ascontiguousarray(p).tobytes()).hexdigest() for p in pictures]
    record: dict[str, object] = {"method": method, "adapter": adapter, "images": list(names)}
    return record | {"images_sha256": hashes, "crop": crop} | more


def blend_styles(
    styles: Sequence[Style], weights: Sequence[float] | None = None, mode: BlendMode = "mean"
) -> Style:
    """Mix several styles into one.

    Args:
        styles: at least one, of one width; for `mean` of one number of tokens, too.
        weights: one per style, not negative, not all 0; None for equal weights. Only for `mean`.
        mode: `mean` is the weighted mean of the tokens; `concatenate` lets the video attend to the
            tokens of all.

    Raises:
        ConfigError: for weights that cannot work.
        LayoutError: for styles that do not fit together.
    """
    if mode not in get_args(BlendMode):
        raise ConfigError(f"the blend {mode!r} is unknown; use one of {get_args(BlendMode)}")
    if not styles:
        raise ConfigError("nothing to blend: give at least one style")
    weights = list(weights) if weights is not None else [1.0] * len(styles)
    if len(weights) != len(styles):
        raise ConfigError(f"got {len(weights)} weights for {len(styles)} styles; give one for each")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ConfigError(f"weights must not be negative and not all 0, got {weights}")
    shapes = {tuple(style.tokens.shape[1:]) for style in styles}
    if len({shape[-1] for shape in shapes}) > 1 or (mode == "mean" and len(shapes) > 1):
        raise LayoutError(
            f"styles of shapes {sorted(shapes)} cannot be blended; encode them with one adapter"
        )
    if mode == "concatenate" and len(set(weights)) > 1:
        raise ConfigError("concatenated styles have no weights; use the mean, or equal weights")
    provenance: dict[str, object] = {
        "blend": mode,
        "weights": weights,
        "styles": [style.provenance for style in styles],
    }
    if mode == "concatenate":
        return Style(torch.cat([style.tokens for style in styles], dim=1), provenance)
    total = sum(weights)
    tokens = sum(s.tokens.float() * (w / total) for s, w in zip(styles, weights, strict=True))
    assert isinstance(tokens, Tensor)
    return Style(tokens.to(styles[0].tokens.dtype), provenance)


def styles_over_time(
    styles: Sequence[Style], shares: Sequence[float] | None = None, *, fade: float = 0.1
) -> list[StyleRegion]:
    """One style after another over the length of a video, with cross-fades.

    Args:
        styles: in their order in time.
        shares: how much of the video each has; None for equal shares.
        fade: length of a cross-fade, as a share of the video.

    Raises:
        ConfigError: for shares that are not positive, or a fade outside 0..1.
    """
    shares = list(shares) if shares is not None else [1.0] * len(styles)
    if len(shares) != len(styles) or min(shares, default=0.0) <= 0:
        raise ConfigError(f"{len(styles)} styles need as many positive shares, got {shares}")
    if not 0 <= fade <= 1:
        raise ConfigError(f"the fade must lie in 0..1 of the video, got {fade}")
    time = (torch.arange(TIME_STEPS) + 0.5) / TIME_STEPS
    ends = torch.tensor(shares).cumsum(0) / sum(shares)
    # How far each moment lies past each change of style: 0 before the fade, 1 after it.
    past = [((time - end) / max(fade, 1e-6) + 0.5).clamp(0, 1) for end in ends[:-1].tolist()]
    past = [torch.ones(TIME_STEPS), *past, torch.zeros(TIME_STEPS)]
    return [
        StyleRegion(style.tokens, mask=(past[i] * (1 - past[i + 1])).reshape(-1, 1, 1))
        for i, style in enumerate(styles)
    ]


class SavedStyle(NamedTuple):
    """A style as its file has it."""

    style: Style
    tags: tuple[str, ...]
    thumbnail: bytes | None  # JPEG, of anybody's making


def parse_tags(text: str) -> tuple[str, ...]:
    """Tags that are separated by commas or line ends, each once.

    Raises:
        ConfigError: for more than 20, one longer than 50 characters, or control characters.
    """
    tags = tuple(dict.fromkeys(filter(None, map(str.strip, text.replace("\n", ",").split(",")))))
    if len(tags) > MAX_TAGS:
        raise ConfigError(f"{len(tags)} tags; give at most {MAX_TAGS}, separated by commas")
    for tag in tags:
        if len(tag) > MAX_TAG or not tag.isprintable():
            raise ConfigError(
                f"the tag {tag!r:.60} is refused; give words of at most {MAX_TAG} printable "
                "characters each, separated by commas"
            )
    return tags


def save_style(
    path: str | Path,
    style: Style,
    *,
    tags: Sequence[str] = (),
    thumbnail: bytes | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a style as safetensors; what belongs to it goes into the header.

    Args:
        path: where to write.
        style: the style.
        tags: from `parse_tags`.
        thumbnail: from `thumbnail_jpeg`; None for none.
        overwrite: replace an existing file.

    Raises:
        WeightsError: if the file exists and `overwrite` is False, or cannot be written.
    """
    metadata = {"format": FORMAT, "provenance": json.dumps(style.provenance)}
    if tags:
        metadata[TAGS_KEY] = ",".join(tags)
    if thumbnail is not None:
        metadata[THUMBNAIL_KEY] = JPEG_URL + base64.b64encode(thumbnail).decode()
    return write_state_dict(path, {"style_tokens": style.tokens}, metadata, overwrite=overwrite)


def load_style(path: str | Path) -> Style:
    """The style of a file; see `read_style`."""
    return read_style(path).style


def read_style(path: str | Path) -> SavedStyle:
    """Read a style written by `save_style`, of any version.

    Raises:
        WeightsError: if the file is missing, damaged or something else.
    """
    file = read_state_dict(path)
    if set(file.tensors) != {"style_tokens"}:
        from ..weights.state_dict import describe_kind, detect_kind, shapes_of

        kind = describe_kind(detect_kind(shapes_of(file.tensors)))
        raise WeightsError(f"{path} is no saved style, but {kind}; save one with encode-style")
    if file.metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path} is a style of the format {file.metadata.get('format')}, this version reads "
            f"{FORMAT}; update the pack, or encode the style again"
        )
    check_floating(file.tensors, path)
    try:
        provenance = json.loads(file.metadata.get("provenance", "{}"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: the provenance in its header is damaged: {error}") from error
    if not isinstance(provenance, dict):
        raise WeightsError(f"{path}: the provenance in its header is no JSON object")
    try:
        style = Style(file.tensors["style_tokens"], provenance)
    except LayoutError as error:
        raise WeightsError(f"{path} is no usable style: {error}") from error
    tags = map(str.strip, file.metadata.get(TAGS_KEY, "").split(","))
    return SavedStyle(style, tuple(filter(None, tags)), _thumbnail(file.metadata))


def _thumbnail(metadata: Mapping[str, str]) -> bytes | None:
    """The picture in a header; other programs may have put one of another kind there."""
    url = metadata.get(THUMBNAIL_KEY, "")
    if not url.startswith(JPEG_URL):
        return None
    try:
        return base64.b64decode(url.removeprefix(JPEG_URL), validate=True)
    except (binascii.Error, ValueError):  # not ASCII
        return None
