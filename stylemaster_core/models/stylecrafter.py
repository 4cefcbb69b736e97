"""StyleCrafter (arXiv 2312.00330): style tokens, and how strongly each layer takes them.

The style tokens act through a cross-attention of their own in every layer, as StyleMaster's do
(`decoupled_attention`), but the result passes a LayerNorm and is weighed by 1 + s, with one s per
layer that is predicted from the prompt and the style, once for a whole generation. No style means
no style branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import LayoutError, WeightsError
from ..weights.shapes import (
    StyleCrafterSizes,
    expected_stylecrafter_encoder_shapes,
    stylecrafter_sizes,
)
from .query_transformer import QueryTransformer

TOKENS = "image_context_model"  # names of the release
SCALES = "scale_predictor"
HEAD_WIDTH = 64  # of both query transformers of the released SDXL adapter
HIDDEN_WIDTH = 32  # between the scale predictor's tokens and its numbers


class ScalePredictor(nn.Module):
    """From a prompt and a style to one number for each layer, above -1 and below 1."""

    def __init__(
        self,
        text_width: int,
        style_width: int,
        num_scales: int,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.text_proj = nn.Linear(text_width, width)
        self.style_proj = nn.Linear(style_width, width)
        self.scale_predictor = QueryTransformer(num_scales, width, num_layers, num_heads, width)
        self.out_proj = nn.Sequential(
            nn.Linear(width, HIDDEN_WIDTH), nn.GELU(), nn.Linear(HIDDEN_WIDTH, 1)
        )

    def forward(self, text: Tensor, style_tokens: Tensor) -> Tensor:
        """Predict the numbers.

        Args:
            text: [B or 1, L, Dt] text features of the prompt; rows of zeros at the end are padding
                and are not looked at, so that the result does not depend on its length.
            style_tokens: [B or 1, S, Ds].

        Returns:
            [B, num_scales].

        Raises:
            LayoutError: for features of other widths.

        Source: StyleCrafter, sec. 3.3, and its SDXL code; deviation: padding is left out. That the
        video code has text and style in the other order makes no difference, as there are no
        positions.
        """
        self._check(text, style_tokens)
        weight = self.text_proj.weight
        length = (torch.arange(text.shape[1], device=text.device) + 1) * text.ne(0).any(-1)
        longest = int(length.max()) if text.shape[1] else 0
        ends = length.amax(-1, keepdim=True) if longest else length.new_zeros(text.shape[0], 1)
        text = text[:, :longest].to(weight)
        batch = max(text.shape[0], style_tokens.shape[0])
        tokens = [self.text_proj(text), self.style_proj(style_tokens.to(weight))]
        features = torch.cat([part.expand(batch, -1, -1) for part in tokens], dim=1)
        padding = None
        if (ends < longest).any():
            place = torch.arange(features.shape[1], device=text.device)
            padding = ((place >= ends) & (place < longest)).expand(batch, -1)
        return self.out_proj(self.scale_predictor(features, padding)).tanh().squeeze(-1)

    def gains(self, text: Tensor, style_tokens: Tensor) -> Tensor:
        """1 + the numbers: the gains of the layers."""
        return 1 + self(text, style_tokens)

    def _check(self, text: Tensor, style_tokens: Tensor) -> None:
        for name, value, linear in (
            ("text features", text, self.text_proj),
            ("style tokens", style_tokens, self.style_proj),
        ):
            if value.ndim != 3 or value.shape[-1] != linear.in_features:
                raise LayoutError(
                    f"the {name} must be [B, L, {linear.in_features}] for this StyleCrafter "
                    f"adapter, got {list(value.shape)}; use the base model and the style that "
                    "belong to it"
                )


class StyleCrafterEncoder(nn.Module):
    """The parts of an adapter that run once per style, and once per style and prompt."""

    def __init__(self, tokens: QueryTransformer, scales: ScalePredictor) -> None:
        super().__init__()
        self.image_context_model = tokens
        self.scale_predictor = scales

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """Style tokens.

        Args:
            features: [B, N, C] all tokens of CLIP; several of them are references of one style,
                which the queries read together.

        Returns:
            [B, S, Ds].

        Raises:
            LayoutError: for features of another width, or NaN or infinity in them.

        Source: StyleCrafter, sec. 3.2 and its video code. Its SDXL code takes one picture; several
        work as in the video code.
        """
        pictures = [features] if isinstance(features, Tensor) else list(features)
        if not pictures:
            raise LayoutError("a style needs the features of at least one picture, got none")
        width = self.image_context_model.queries.shape[-1]
        for picture in pictures:
            if picture.ndim != 3 or picture.shape[-1] != width:
                raise LayoutError(
                    f"this StyleCrafter adapter takes image features [B, N, {width}], got "
                    f"{list(picture.shape)}; use the image encoder it was trained with (CLIP "
                    "ViT-H/14 for the released weights)"
                )
            if not torch.isfinite(picture).all():
                raise LayoutError("the image features hold NaN or infinity; check the picture")
        return self.image_context_model(
            torch.cat(pictures, dim=1).to(self.image_context_model.queries)
        )

    def gains(self, text: Tensor, style_tokens: Tensor) -> Tensor:
        """How strongly each layer takes the style: [B, layers] in 0..2, for `StyleRegion.gains`.

        Args:
            text: [B or 1, L, Dt] features of the positive prompt, whichever branch is computed.
            style_tokens: [B or 1, S, Ds].
        """
        return self.scale_predictor.gains(text, style_tokens)

    @property
    def num_scales(self) -> int:
        return self.scale_predictor.scale_predictor.queries.shape[1]

    def release_state_dict(self) -> dict[str, Tensor]:
        """Weights under the names of the release."""
        return {_release_name(key): value for key, value in self.state_dict().items()}


def _release_name(key: str) -> str:
    head, _, leaf = key.rpartition(".")
    return f"{head}.{ {'queries': 'query_emb', 'projection': 'proj'}.get(leaf, leaf) }"


def _module_name(key: str) -> str:
    head, _, leaf = key.rpartition(".")
    return f"{head}.{ {'query_emb': 'queries', 'proj': 'projection'}.get(leaf, leaf) }"


def is_encoder_key(key: str) -> bool:
    """Whether a tensor of an adapter belongs to its encoder."""
    return key.startswith((f"{TOKENS}.", f"{SCALES}."))


def load_stylecrafter_encoder(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    scale_num_heads: int | None = None,
) -> StyleCrafterEncoder:
    """Build the encoder from an adapter's weights; all other sizes are read off them.

    Args:
        state_dict: an adapter under the names of the SDXL release; other keys are left alone.
            Tensors are not copied. For the video release see `stylecrafter_video_to_sdxl`.
        num_heads: of the query transformer; None for width / 64.
        scale_num_heads: of the scale predictor; None for width / 64.

    Returns:
        a frozen module; call it with CLIP's features, and its `gains` with text and tokens.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys, or heads that do not divide.
    """
    from ..weights.state_dict import check_keys, shapes_of

    weights = {key: value for key, value in state_dict.items() if is_encoder_key(key)}
    shapes = shapes_of(weights)
    sizes = stylecrafter_sizes(shapes)
    check_keys(shapes, expected_stylecrafter_encoder_shapes(sizes), "StyleCrafter's encoder")
    with torch.device("meta"):
        module = create_stylecrafter_encoder(
            sizes, num_heads=num_heads, scale_num_heads=scale_num_heads
        )
    module.load_state_dict({_module_name(k): v for k, v in weights.items()}, assign=True)
    return module.requires_grad_(False).eval()


def create_stylecrafter_encoder(
    sizes: StyleCrafterSizes,
    *,
    num_heads: int | None = None,
    scale_num_heads: int | None = None,
) -> StyleCrafterEncoder:
    """A new encoder; for the arguments see `load_stylecrafter_encoder`.

    Raises:
        WeightsError: if the heads do not divide a width.
    """
    heads = _heads(num_heads, sizes.feature_width, "query transformer")
    scale_heads = _heads(scale_num_heads, sizes.scale_width, "scale predictor")
    return StyleCrafterEncoder(
        QueryTransformer(
            sizes.num_tokens, sizes.feature_width, sizes.num_layers, heads, sizes.style_width
        ),
        ScalePredictor(
            sizes.text_width,
            sizes.style_width,
            sizes.num_scales,
            width=sizes.scale_width,
            num_layers=sizes.scale_num_layers,
            num_heads=scale_heads,
        ),
    )


def _heads(given: int | None, width: int, what: str) -> int:
    heads = max(1, width // HEAD_WIDTH) if given is None else given
    if heads < 1 or width % heads:
        raise WeightsError(f"the width {width} of the {what} is no multiple of {heads} heads")
    return heads


def stylecrafter_heads(metadata: Mapping[str, str]) -> dict[str, int | None]:
    """Heads as a file's header tells, named as arguments of `load_stylecrafter_encoder`."""
    names = {"num_heads": "style_num_heads", "scale_num_heads": "scale_num_heads"}
    return {
        option: int(metadata[name]) if name in metadata else None for option, name in names.items()
    }
