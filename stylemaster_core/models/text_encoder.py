"""Text encoders: prompts to the tokens that the transformer attends to."""

from __future__ import annotations

import html
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError, UnsupportedHostError, WeightsError
from ..reading import reading
from ..weights.files import read_state_dict
from ..weights.shapes import Shape
from ..weights.state_dict import (
    check_keys,
    describe_kind,
    detect_kind,
    shapes_of,
    umt5_native_to_hf,
)

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

MAX_LENGTH = 512
# What ComfyUI's fp8 files hold beside the weights.
_FP8_SCALE = ".scale_weight"
_FP8_EXTRAS = ("scaled_fp8",)
_EMBEDDED_TOKENIZER = "spiece_model"


class TextEncoder(Protocol):
    """Anything that turns prompts into text features."""

    def encode(self, prompts: list[str], max_length: int = MAX_LENGTH) -> Tensor:
        """Return [B, max_length, D]; positions after the prompt's end are zero."""
        ...


class Tokenizer(Protocol):
    """Anything that turns one prompt into token ids, the end token included."""

    def __call__(self, prompt: str, max_length: int) -> list[int]: ...


def clean_prompt(prompt: str) -> str:
    """Mend broken Unicode, undo HTML escapes and join whitespace, as Wan does.

    Raises:
        UnsupportedHostError: if ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise UnsupportedHostError(
            "cleaning prompts needs ftfy; run: pip install 'stylemaster[cli]'"
        ) from error
    # Twice, because scraped captions are often escaped twice.
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class UMT5TextEncoder:
    """Wan's text encoder."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: Tokenizer) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Width of the text features."""
        return self.model.config.d_model

    def to(self, device: torch.device | str) -> UMT5TextEncoder:
        """Move the weights, and return this encoder."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str], max_length: int = MAX_LENGTH) -> Tensor:
        """Encode prompts.

        Args:
            prompts: any language; longer ones are cut, the end token is kept.
            max_length: number of tokens; the released weights know 512.

        Returns:
            [B, max_length, 4096] in the encoder's dtype, on its device; zero after each prompt.

        Raises:
            LayoutError: if there is no prompt.
            ConfigError: if `max_length` is below 1.

        Source: Wan 2.1; deviation: padding, which changes nothing, is not computed.
        """
        _check(prompts, max_length)
        ids = [self.tokenizer(clean_prompt(prompt), max_length) for prompt in prompts]
        longest = max(map(len, ids))
        tokens = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, prompt_ids in enumerate(ids):
            tokens[row, : len(prompt_ids)] = torch.tensor(prompt_ids)
            mask[row, : len(prompt_ids)] = 1
        tokens, mask = tokens.to(self.model.device), mask.to(self.model.device)
        features = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        result = features.new_zeros(len(ids), max_length, features.shape[-1])
        result[:, :longest] = features.where(mask[..., None].bool(), 0)
        return result


class HashedWordsTextEncoder:
    """Words hashed to fixed random vectors: the text encoder of the small models, without weights.

    Order and meaning of words are lost; equal words have equal vectors on every machine.
    """

    def __init__(self, width: int = 4096, max_length: int = 64, seed: int = 0) -> None:
        if width < 1:
            raise ConfigError(f"text width {width}; expected 1 or more")
        self.width = width
        self.max_length = max_length
        self.seed = seed

    def to(self, device: torch.device | str) -> HashedWordsTextEncoder:
        """Do nothing: there are no weights; results are on the CPU."""
        return self

    def encode(self, prompts: list[str], max_length: int | None = None) -> Tensor:
        """Return float32 [B, max_length, width] on the CPU: a vector a word, an end, then zeros.

        Raises:
            LayoutError: if there is no prompt.
            ConfigError: if `max_length` is below 1.
        """
        max_length = self.max_length if max_length is None else max_length
        _check(prompts, max_length)
        result = torch.zeros(len(prompts), max_length, self.width)
        for row, prompt in enumerate(prompts):
            words = re.findall(r"\w+|[^\w\s]", html.unescape(prompt).lower())
            # The end token keeps an empty prompt apart from no prompt.
            for position, word in enumerate([*words[: max_length - 1], "</s>"]):
                result[row, position] = self._vector(word)
        return result

    def _vector(self, word: str) -> Tensor:
        # Python's own hash() differs from run to run.
        seed = zlib.crc32(f"{self.seed} {word}".encode())
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(self.width, generator=generator)


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> UMT5TextEncoder | HashedWordsTextEncoder:
    """Load a text encoder.

    Args:
        path: a folder in Hugging Face format (or one with the sub-folders `text_encoder` and
            `tokenizer`); one weight file in ComfyUI's naming (fp16, bf16 or scaled fp8) or Wan's
            own; or a .json file that describes a `HashedWordsTextEncoder`.
        tokenizer: `spiece.model`, or a folder that holds it or a tokenizer.json. By default the one
            inside the weight file, beside it, or where Wan's repositories put it.
        device: where to put it.
        dtype: of weights and results; UMT5 overflows in float16.

    Raises:
        WeightsError: if weights or tokenizer are missing, damaged or of another kind.
        ConfigError: for float16.
        UnsupportedHostError: if sentencepiece or transformers is missing.
    """
    path = Path(path)
    is_words = path.suffix.lower() == ".json" and path.is_file()
    if dtype == torch.float16 and not is_words:
        raise ConfigError("UMT5 overflows in float16; use bfloat16 or float32")
    with reading(path, "a text encoder"):
        return _hashed_words(path) if is_words else _umt5(path, tokenizer, device, dtype)


def _umt5(
    path: Path, tokenizer: str | Path | None, device: torch.device | str, dtype: torch.dtype
) -> UMT5TextEncoder:
    if path.is_dir():
        folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
        model, embedded = _from_folder(folder), None
    else:
        folder = path.parent
        model, embedded = _from_file(path, dtype)
    if tokenizer is None and embedded is not None:
        tokens: Tokenizer = _SentencePiece(embedded)
    else:
        tokens = _open_tokenizer(_find_tokenizer(folder, tokenizer))
    return UMT5TextEncoder(model.to(device=device, dtype=dtype), tokens)  # type: ignore[arg-type]


def _check(prompts: list[str], max_length: int) -> None:
    if isinstance(prompts, str) or not prompts:
        raise LayoutError(f"prompts are {prompts!r}; expected a list of at least one text")
    if max_length < 1:
        raise ConfigError(f"max_length {max_length}; expected 1 or more")


def _hashed_words(path: Path) -> HashedWordsTextEncoder:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["kind"] != "hashed_words":
            raise WeightsError(
                f"{path} is of kind {settings['kind']!r:.80}; expected 'hashed_words'"
            )
        return HashedWordsTextEncoder(
            width=int(settings["width"]),
            max_length=int(settings.get("max_length", 64)),
            seed=int(settings["seed"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise WeightsError(
            f"{path} does not describe a text encoder ({error!r}); expected "
            '{"kind": "hashed_words", "width": 64, "seed": 0}'
        ) from error


def _from_folder(folder: Path) -> UMT5EncoderModel:
    from transformers import UMT5EncoderModel

    try:
        loaded: Any = UMT5EncoderModel.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{folder} cannot be loaded as a UMT5 text encoder ({error}); expected config.json and "
            "weights of a UMT5EncoderModel"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        raise WeightsError(
            f"{folder} lacks {len(report['missing_keys'])} weights of a UMT5 text encoder "
            f"({sorted(report['missing_keys'])[0]}, ...); download it again"
        )
    return model


def _from_file(path: Path, dtype: torch.dtype) -> tuple[UMT5EncoderModel, bytes | None]:
    """Read a single file: the model, and the tokenizer inside it."""
    from transformers import UMT5EncoderModel

    tensors = read_state_dict(path).tensors
    embedded = tensors.pop(_EMBEDDED_TOKENIZER, None)
    kind = detect_kind(shapes_of(tensors))
    if kind == "umt5_native":
        tensors = umt5_native_to_hf(tensors)
    elif kind != "umt5_hf":
        raise WeightsError(
            f"{path} is {describe_kind(kind)}; expected a UMT5 text encoder such as "
            "umt5_xxl_fp16.safetensors"
        )
    weights = _in_dtype(tensors, dtype)
    weights.setdefault("encoder.embed_tokens.weight", weights["shared.weight"])
    with torch.device("meta"):
        model = UMT5EncoderModel(_config(shapes_of(weights)))
    check_keys(shapes_of(weights), shapes_of(model.state_dict()), f"the text encoder {path}")
    model.load_state_dict(weights, assign=True)
    return model, None if embedded is None else embedded.numpy().tobytes()


def _in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert weights, and multiply scaled fp8 ones by their scale."""
    result = {}
    for key, value in tensors.items():
        if key in _FP8_EXTRAS or key.endswith((_FP8_SCALE, ".scale_input")):
            continue
        scale = tensors.get(key.removesuffix(".weight") + _FP8_SCALE)
        result[key] = value.to(dtype) if scale is None else (value.float() * scale).to(dtype)
    return result


def _config(shapes: Mapping[str, Shape]) -> Any:
    from transformers import UMT5Config

    attention = "encoder.block.0.layer.0.SelfAttention."
    vocabulary, width = shapes["shared.weight"]
    buckets, num_heads = shapes[attention + "relative_attention_bias.weight"]
    layers = {key.split(".")[2] for key in shapes if key.startswith("encoder.block.")}
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes[attention + "q.weight"][0] // num_heads,
        d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        num_layers=len(layers),
        num_heads=num_heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )


def _find_tokenizer(folder: Path, given: str | Path | None) -> Path:
    """Find the tokenizer: as given, in `folder`, or where Wan's repositories put it."""
    if given is not None:
        candidates = [Path(given)]
    else:
        candidates = [
            folder,
            folder / "tokenizer",
            folder.parent / "tokenizer",
            folder / "google" / "umt5-xxl",
        ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
        for name in ("spiece.model", "tokenizer.json"):
            if (candidate / name).is_file():
                return candidate / name
    raise WeightsError(
        "no tokenizer for UMT5 in "
        + ", ".join(map(str, candidates))
        + "; expected spiece.model or tokenizer.json, e.g. of google/umt5-xxl: give its path"
    )


def _open_tokenizer(path: Path) -> Tokenizer:
    return _FastTokenizer(path) if path.suffix == ".json" else _SentencePiece(path.read_bytes())


class _SentencePiece:
    """The tokenizer that comes as a sentencepiece model."""

    def __init__(self, model: bytes) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise UnsupportedHostError(
                "the UMT5 tokenizer needs sentencepiece; run: pip install 'stylemaster[cli]'"
            ) from error
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)  # type: ignore[call-arg]
        except RuntimeError as error:
            raise WeightsError(
                f"the sentencepiece tokenizer cannot be read ({error}); download it again"
            ) from error

    def __call__(self, prompt: str, max_length: int) -> list[int]:
        ids = list(self.pieces.encode(prompt))  # type: ignore[attr-defined]
        return [*ids[: max_length - 1], self.pieces.eos_id()]  # type: ignore[attr-defined]


class _FastTokenizer:
    """The tokenizer that comes as a tokenizer.json."""

    def __init__(self, path: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        self.tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))

    def __call__(self, prompt: str, max_length: int) -> list[int]:
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        end = self.tokenizer.convert_tokens_to_ids("</s>")
        return [*ids[: max_length - 1], end]
