"""The models of a generation: where their files are, and how each is borrowed and given back."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from ..dtypes import choose_dtype
from ..errors import ConfigError, UnsupportedHostError, WeightsError
from ..reading import reading
from ..weights.files import StateDictFile, read_state_dict, shards_of
from ..weights.numbers import check_floating, check_weights, not_finite

if TYPE_CHECKING:
    from ..models.clip_text import ClipText
    from ..models.decoupled_attention import StyleRegion
    from ..models.gray_tile_controlnet import GrayTileControlNet
    from ..models.image_encoder import ImageEncoder
    from ..models.patch_vae import PatchVAE
    from ..models.style_projector import StyleProjector
    from ..models.stylecrafter import StyleCrafterEncoder
    from ..models.text_encoder import TextEncoder
    from ..models.vae import WanVAE
    from ..models.wan_transformer import StyledWanTransformer

logger = logging.getLogger("stylemaster")

Offload = Literal["none", "layers"]
Storage = Literal["compute", "float8"]
# What a model is made of, where it is more than the file of its name; the main one last.
_FILES_OF = {
    "transformer": ("motion_adapter", "adapter", "transformer"),
    "style_projector": ("transformer", "adapter"),
    "stylecrafter": ("adapter",),
}


@dataclass(frozen=True)
class ModelFiles:
    """Paths of weight files or folders; what a task does not need may be None.

    Attributes:
        transformer: the whole release (`stylemaster.ckpt`), or a Wan 2.1 T2V base in ComfyUI's,
            Wan's own or diffusers' format (file or folder).
        vae: Wan VAE, file or folder.
        text_encoder: UMT5-XXL, file or folder.
        image_encoder: CLIP ViT-H/14 vision tower, file or folder.
        adapter: StyleMaster adapter, unless `transformer` is the whole release; or a StyleCrafter
            adapter for Wan.
        controlnet: gray-tile ControlNet.
        motion_adapter: motion LoRA.
        clip_text: CLIP ViT-H/14 text tower; only texture mode `paper` needs it.
        tokenizer: of the text encoder, unless it lies in or beside its file.
    """

    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    image_encoder: Path | None = None
    adapter: Path | None = None
    controlnet: Path | None = None
    motion_adapter: Path | None = None
    clip_text: Path | None = None
    tokenizer: Path | None = None

    def need(self, name: str, purpose: str) -> Path:
        """Path of a file that a task cannot do without.

        Raises:
            WeightsError: if it was not given.
        """
        self.require([name], purpose)
        return Path(getattr(self, name))

    def require(self, names: Sequence[str], purpose: str) -> None:
        """Check that files were given, all at once and before anything is loaded.

        Raises:
            WeightsError: naming each that was not.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            options = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise WeightsError(
                f"{purpose} needs the {', the '.join(missing).replace('_', ' ')}, and no file was "
                f"given or found; pass {options} (in Python: ModelFiles({missing[0]}=...)), name "
                "the folder with --models-dir, or get them with `stylemaster weights download`"
            )


# Hooks make cycles, which only the collector frees; it takes a second, so a small model waits.
GARBAGE_BYTES = 256 * 2**20


def _num_bytes(model: Any) -> int:
    module = model if isinstance(model, torch.nn.Module) else getattr(model, "model", None)
    if not isinstance(module, torch.nn.Module):
        return 2**63  # not known: take it for a large one
    return sum(p.numel() * p.element_size() for p in module.parameters())


def choose_device(device: str = "auto") -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU.

    Raises:
        UnsupportedHostError: for a device that is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedHostError(
            f"the device {device!r} cannot be used here: {error}; use auto, cuda, mps or cpu"
        ) from error
    return chosen


class Models:
    """Loads each model when it is borrowed and frees it when it is given back.

    A generation uses its models one after another, so only one of them need be in memory at a time;
    `keep_loaded` trades that for speed when several generations follow.
    """

    def __init__(
        self,
        files: ModelFiles,
        *,
        device: str = "auto",
        dtype: str = "auto",
        keep_loaded: bool = False,
        offload: Offload = "none",
        storage: Storage = "compute",
        compile_blocks: bool = False,
        loras: Sequence[tuple[Path, float]] = (),
        check_weights: bool = True,
    ) -> None:
        """Remember the files; nothing is loaded yet.

        Args:
            files: where the weights are.
            device: auto, cuda, mps or cpu.
            dtype: auto, float32, float16 or bfloat16.
            keep_loaded: keep models in memory between uses.
            offload: `layers` keeps the transformer in main memory and moves layers as needed.
            storage: `float8` keeps the transformer's weights in 8 bits and computes in `dtype`.
            compile_blocks: compile the transformer's blocks.
            loras: files for Wan with strengths, merged into the transformer's weights.
            check_weights: look for NaN and infinity once a model is loaded.
        """
        if offload not in get_args(Offload) or storage not in get_args(Storage):
            raise ConfigError(
                f"offload must be one of {get_args(Offload)} and storage one of "
                f"{get_args(Storage)}, got {offload!r} and {storage!r}"
            )
        if compile_blocks and (offload != "none" or storage != "compute"):
            raise ConfigError(
                "compiled blocks do not go together with offloaded layers or float8 storage: what "
                "moves and casts the weights cannot be compiled; choose one of them"
            )
        self.files = files
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.keep_loaded = keep_loaded
        self.offload = offload
        self.storage = storage
        self.compile_blocks = compile_blocks
        self.loras = list(loras)
        self.check_weights = check_weights
        self._kept: dict[str, Any] = {}
        self._text: dict[str, Tensor] = {}

    @contextmanager
    def _borrow(self, name: str, load: Callable[[], Any]) -> Iterator[Any]:
        if name not in self._kept:
            logger.debug("loading the %s", name.replace("_", " "))
            files = [p for p in (getattr(self.files, f) for f in _FILES_OF.get(name, (name,))) if p]
            if name == "transformer":
                files = [*(path for path, _ in self.loras), *files]
            with reading(files[-1], name.replace("_", " ")) if files else nullcontext():
                model = load()
                self._check(model, files)
            self._kept[name] = model
        try:
            yield self._kept[name]
        finally:
            if not self.keep_loaded:
                size = _num_bytes(self._kept.pop(name, None))
                if size > GARBAGE_BYTES:
                    gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _check(self, model: Any, files: Sequence[Path]) -> None:
        """Find NaN and infinity where the weights are now, which is fast; then name the file."""
        module = model if isinstance(model, torch.nn.Module) else getattr(model, "model", None)
        if not self.check_weights or not isinstance(module, torch.nn.Module):
            return
        bad = not_finite(module.state_dict())
        if not bad:
            return
        for path in files:
            for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
                check_weights(read_state_dict(file).tensors, file)
        raise WeightsError(
            f"{files[-1]}: weights such as {bad[0]} are NaN or infinite in {self.dtype}; if the "
            "file is whole, use --dtype bfloat16 or float32"
        )

    @contextmanager
    def text_encoder(self) -> Iterator[TextEncoder]:
        from ..models.text_encoder import load_text_encoder

        path = self.files.need("text_encoder", "A prompt")
        # UMT5 overflows in float16.
        dtype = torch.bfloat16 if self.dtype == torch.float16 else self.dtype
        with self._borrow(
            "text_encoder",
            lambda: load_text_encoder(path, self.files.tokenizer, device=self.device, dtype=dtype),
        ) as model:
            yield model

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Text features [B, L, Dt]; each prompt is encoded once, as the encoder is slow to load."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text]
        if missing:
            with self.text_encoder() as text_encoder:
                features = text_encoder.encode(missing).cpu()
            self._text |= dict(zip(missing, features, strict=True))
        return torch.stack([self._text[prompt] for prompt in prompts]).to(self.device)

    @contextmanager
    def image_encoder(self) -> Iterator[ImageEncoder]:
        from ..models.image_encoder import load_image_encoder

        path = self.files.need("image_encoder", "A style image")
        with self._borrow(
            "image_encoder",
            lambda: load_image_encoder(path, device=self.device, dtype=torch.float32),
        ) as model:
            yield model

    @contextmanager
    def clip_text(self) -> Iterator[ClipText]:
        from ..models.clip_text import load_clip_text

        path = self.files.need("clip_text", "Texture selection 'paper'")
        with self._borrow(
            "clip_text",
            lambda: load_clip_text(
                path, device=self.device, dtype=torch.float32, skip_check=not self.check_weights
            ),
        ) as model:
            yield model

    @contextmanager
    def vae(self) -> Iterator[WanVAE | PatchVAE]:
        from ..models.vae import load_vae

        path = self.files.need("vae", "A video")
        with self._borrow(
            "vae", lambda: load_vae(path, device=self.device, dtype=self.dtype)
        ) as model:
            yield model

    @contextmanager
    def style_projector(self) -> Iterator[StyleProjector]:
        with self._borrow("style_projector", self._load_projector) as model:
            yield model

    @contextmanager
    def stylecrafter(self) -> Iterator[StyleCrafterEncoder]:
        with self._borrow("stylecrafter", self._load_stylecrafter) as model:
            yield model

    @property
    def has_stylecrafter(self) -> bool:
        """Whether the adapter is StyleCrafter's; otherwise it is StyleMaster's."""
        from ..weights.files import read_keys
        from ..weights.state_dict import detect_kind

        if self.files.adapter is None or not Path(self.files.adapter).is_file():
            return False
        shapes = {key: shape for key, (shape, _) in read_keys(self.files.adapter).items()}
        return detect_kind(shapes) == "stylecrafter_wan"

    def with_gains(
        self, regions: Sequence[StyleRegion] | None, text: Tensor
    ) -> Sequence[StyleRegion] | None:
        """Styles with the gains that a StyleCrafter adapter predicts; others as they are.

        Args:
            regions: styles; those that have gains keep them.
            text: [1, L, Dt] features of the positive prompt.
        """
        if not regions or not self.has_stylecrafter:
            return regions
        with self.stylecrafter() as encoder, torch.no_grad():
            return [
                replace(region, gains=encoder.gains(text, region.tokens.to(self.device)))
                if region.gains is None
                else region
                for region in regions
            ]

    @contextmanager
    def transformer(self) -> Iterator[StyledWanTransformer]:
        with self._borrow("transformer", self._load_transformer) as model:
            yield model

    @contextmanager
    def controlnet(self) -> Iterator[GrayTileControlNet]:
        from ..models.gray_tile_controlnet import load_gray_tile_controlnet

        path = self.files.need("controlnet", "Gray-tile control")

        def load() -> GrayTileControlNet:
            file = _read(path, {"gray_tile_controlnet"}, "a gray-tile ControlNet")
            return load_gray_tile_controlnet(self._cast(file.tensors)).to(self.device)

        with self._borrow("controlnet", load) as model:
            yield model

    def _load_projector(self) -> StyleProjector:
        from ..models.style_adapter import STYLE_MODEL, read_projector
        from ..weights.state_dict import strip_prefix

        path = self.files.adapter or self.files.need("transformer", "A style")
        weights, metadata = _read(path, {"stylemaster", "style_adapter"}, "a StyleMaster adapter")
        weights = {k: v for k, v in strip_prefix(weights).items() if k.startswith(STYLE_MODEL)}
        return read_projector(weights, metadata).float().to(self.device)

    def _load_stylecrafter(self) -> StyleCrafterEncoder:
        from ..models.stylecrafter import load_stylecrafter_encoder, stylecrafter_heads

        path = self.files.need("adapter", "A style")
        weights, metadata = _read(path, {"stylecrafter_wan"}, "a StyleCrafter adapter for Wan")
        weights = {key: value.float() for key, value in weights.items()}
        heads = stylecrafter_heads(metadata)
        return load_stylecrafter_encoder(weights, **heads).to(self.device)

    def _load_transformer(self) -> StyledWanTransformer:
        from ..models.decoupled_attention import is_branch_key
        from ..models.motion_adapter import VIDEO_LORA_FORMAT, load_motion_adapter
        from ..models.wan_transformer import load_transformer
        from ..weights.lora import merge_wan_loras
        from ..weights.state_dict import split_release, strip_prefix, style_path_report

        path = self.files.need("transformer", "Every task")
        kinds = {"stylemaster", "wan_native", "wan_diffusers"}
        weights = strip_prefix(_read(path, kinds, "a Wan 2.1 text-to-video transformer").tensors)
        weights = merge_wan_loras(weights, self.loras, self.dtype)
        if self.files.adapter is not None:
            kinds = {"style_adapter", "stylemaster", "stylecrafter_wan"}
            what = "a StyleMaster adapter, or a StyleCrafter adapter for Wan"
            adapter = _read(self.files.adapter, kinds, what).tensors
            weights = split_release(weights)[0] | split_release(strip_prefix(adapter))[1]
        if any(is_branch_key(key) for key in weights):
            report = style_path_report(weights)
            if report.is_uniform:
                logger.warning(report.message)
        model = load_transformer(self._cast(weights))
        if self.storage == "float8":  # whose largest number stands for infinity
            self._check(model, [*filter(None, [self.files.adapter]), path])
        if self.storage == "float8":
            model.enable_layerwise_casting(torch.float8_e4m3fn, self.dtype)
        if self.offload == "layers" and self.device.type != "cpu":
            model.enable_group_offload(
                onload_device=self.device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
            )
        else:
            cast(torch.nn.Module, model).to(self.device)
        if self.files.motion_adapter is not None:
            file = _read(self.files.motion_adapter, {"motion_adapter"}, "a motion adapter")
            motion = load_motion_adapter(self._cast(file.tensors)).to(self.device)
            motion.for_videos = file.metadata.get("format") == VIDEO_LORA_FORMAT
            model.motion_adapter = motion
        if self.compile_blocks:
            model.compile_repeated_blocks(fullgraph=True)
        return model

    def _cast(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.dtype) for key, value in weights.items()}


def _read(path: Path, kinds: set[str], wanted: str) -> StateDictFile:
    """A file, or all safetensors of a folder, of one of the given kinds."""
    from ..weights.state_dict import describe_kind, detect_kind, shapes_of, strip_prefix

    weights: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in shards_of(path, wanted):
        part = read_state_dict(file)
        check_floating(part.tensors, file)
        weights |= part.tensors
        metadata |= part.metadata
    kind = detect_kind(shapes_of(strip_prefix(weights)))
    if kind not in kinds:
        raise WeightsError(f"{path} is {describe_kind(kind)}; expected {wanted}")
    return StateDictFile(weights, metadata)
