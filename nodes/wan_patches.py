"""Hooks on ComfyUI's native Wan model: the style branch and the gray-tile ControlNet's states.

A conditioning carries what belongs to it (`conditionings`). The MODEL gets one APPLY_MODEL wrapper
of plain functions for each of the two. For the time of one call of the model the wrapper sets a
`forward` and tensors on the modules themselves. That leaves clones, LoRA, fp8 and other packs'
patches alone, and torch.compile sees it: ComfyUI's compile node ignores changes of
`transformer_options`, but not those of a module.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ldm.wan.model
import comfy.model_base
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..stylemaster_core.errors import ConfigError, LayoutError, UnsupportedHostError, WeightsError
from ..stylemaster_core.models.decoupled_attention import StyleAttention, style_residual
from .block_styles import TokenGrid, block_styles, in_range, window_frames
from .conditionings import CONTROL_KEY, STYLE_KEY, Row

PREVIOUS = "stylemaster_previous"

Hook = tuple[nn.Module, Callable[..., Tensor], dict[str, Any]]  # module, `forward`, attributes
_ABSENT = object()


@dataclass(eq=False)
class ModelCall:
    """One call of a model, as hooks are made for it."""

    model: Any  # ComfyUI's BaseModel
    x: Tensor  # noisy latents
    t: Tensor  # sigmas [B]
    rows: Sequence[Row] | None  # what the conditionings carry for these hooks
    options: dict[str, Any]  # transformer_options; others may be put in their place

    @property
    def window(self) -> Any:
        """The context window, if there is one."""
        return self.options.get("context_window")

    def in_range(self, start: float, end: float) -> bool:
        """Whether the sampling is in this part of its way."""
        return in_range(self.model.model_sampling, float(self.t.max()), start, end)


def with_hooks(
    model: ModelPatcher, key: str, make_hooks: Callable[[ModelCall], Sequence[Hook]]
) -> ModelPatcher:
    """A clone of a MODEL, each call of which runs under the hooks that are made for it.

    Args:
        model: a MODEL.
        key: of the wrapper, and of what conditionings carry for it.
        make_hooks: gives the hooks for one call, and may exchange its options.
    """

    def apply_with_hooks(
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """APPLY_MODEL wrapper."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        rows = kwargs.pop(key, None)
        call = ModelCall(executor.class_obj, x, t, rows, transformer_options or {})
        with hooked(make_hooks(call)):
            return executor(x, t, c_concat, c_crossattn, control, call.options, **kwargs)

    return with_wrapper(model, WrappersMP.APPLY_MODEL, key, apply_with_hooks)


@contextlib.contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """Give modules a `forward` and attributes; afterwards they are as before, whatever happened."""
    undo = []
    try:
        for module, forward, attributes in hooks:
            own = vars(module)
            previous = own.get("forward")
            if getattr(previous, "__func__", None) is type(module).forward:
                previous = None  # ComfyUI leaves this when it takes an object patch off
            new = {"forward": types.MethodType(forward, module), PREVIOUS: previous, **attributes}
            undo.append((own, {name: own.get(name, _ABSENT) for name in new}))
            own.update(new)
        yield
    finally:
        for own, before in reversed(undo):
            for name, value in before.items():
                if value is _ABSENT:
                    own.pop(name, None)
                else:
                    own[name] = value


def raw(module: Any) -> Any:
    """The module inside torch.compile's."""
    return getattr(module, "_orig_mod", module)


def raw_blocks(model: Any) -> list[nn.Module]:
    return [raw(block) for block in raw(model.diffusion_model).blocks]


def compute_dtype(model: Any) -> torch.dtype:
    return model.manual_cast_dtype or model.get_dtype()


def check_model(model: ModelPatcher, width: int, num_blocks: int | None, what: str) -> Any:
    """The Wan transformer in a MODEL.

    Raises:
        UnsupportedHostError: if it is no Wan 2.1 text-to-video model.
        WeightsError: if `what` belongs to another size of it.
    """
    base, native = model.model, comfy.ldm.wan.model
    transformer = raw(base.diffusion_model)
    if not isinstance(base, comfy.model_base.WAN21) or type(transformer) is not native.WanModel:
        raise UnsupportedHostError(
            f"this MODEL is {type(base).__name__} ({type(transformer).__name__}); StyleMaster "
            "works on Wan 2.1 text-to-video models: load wan2.1_t2v_1.3B"
        )
    if transformer.model_type != "t2v" or base.image_to_video or transformer.in_dim != 16:
        raise UnsupportedHostError(
            f"this MODEL is a Wan {transformer.model_type} model with {transformer.in_dim} input "
            "channels; StyleMaster needs text-to-video with 16: load wan2.1_t2v_1.3B"
        )
    found = (transformer.dim, len(transformer.blocks))
    if found != (width, num_blocks or found[1]):
        raise WeightsError(
            f"{what} is made for a Wan model of width {width}"
            + (f" with {num_blocks} blocks" if num_blocks else "")
            + f", this MODEL has width {found[0]} and {found[1]} blocks; load the Wan model that "
            "it was trained with (wan2.1_t2v_1.3B: width 1536, 30 blocks)"
        )
    return transformer


def patch_style(model: ModelPatcher, adapter: StyleAttention) -> ModelPatcher:
    """A clone of a MODEL that heeds the styles of its conditionings.

    A conditioning that carries none runs as on the unpatched model.

    Raises:
        UnsupportedHostError, WeightsError: if the model cannot take this adapter's styles.
    """
    check_model(model, adapter.width, len(adapter.blocks), "this style adapter")
    return with_hooks(model, STYLE_KEY, style_hooks)


def with_wrapper(
    model: ModelPatcher, kind: str, key: str, wrapper: Callable[..., Any]
) -> ModelPatcher:
    clone = model.clone()
    clone.remove_wrappers_with_key(kind, key)
    clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def style_hooks(call: ModelCall) -> list[Hook]:
    """For each cross-attention what the styles of the batch add to it in this call."""
    if call.rows is None:
        return []
    blocks = raw_blocks(call.model)
    made_for = call.rows[0][0].num_blocks
    if made_for != len(blocks):
        raise WeightsError(
            f"this conditioning's style is made for {made_for} blocks, the MODEL has "
            f"{len(blocks)}; use the model that the style was applied to"
        )
    patch = raw(call.model.diffusion_model).patch_size
    size = tuple(-(-n // p) for n, p in zip(call.x.shape[2:], patch, strict=True))
    grid = TokenGrid(size, call.window)
    like = call.x.new_empty(0, dtype=compute_dtype(call.model))
    sampling = call.model.model_sampling
    styles = block_styles(call.rows, grid, sampling, float(call.t.max()), like)
    tokens = {"stylemaster_tokens": math.prod(size)}
    return [
        (raw(block.cross_attn), _styled_cross_attention, {"stylemaster_style": style, **tokens})
        for block, style in zip(blocks, styles, strict=True)
    ]


def _add_to_video(tokens: Tensor, more: Tensor, count: int) -> Tensor:
    """Add to the first `count` tokens [B, L, D], those of the video that is sampled.

    Behind them there may be others, which are left alone: a source video and pictures that the
    model looks at (`context_latents` of Bernini, `time_dim_concat` of Phantom).
    """
    if tokens.shape[1] == count:
        return tokens + more
    return torch.cat([tokens[:, :count] + more, tokens[:, count:]], dim=1)


def _styled_cross_attention(
    self: Any, x: Tensor, context: Tensor, transformer_options: Any = None, **kwargs: Any
) -> Tensor:
    """`forward` of a cross-attention: ComfyUI's attention to the text, plus ours to the style."""
    native, options = comfy.ldm.wan.model, transformer_options or {}
    query = self.norm_q(self.q(x))
    count = self.stylemaster_tokens
    style = style_residual(query[:, :count], self.stylemaster_style, self.num_heads)
    if self.stylemaster_previous is None and type(self) is native.WanT2VCrossAttention:
        text = native.optimized_attention(
            query,
            self.norm_k(self.k(context)),
            self.v(context),
            heads=self.num_heads,
            transformer_options=options,
        )
        return self.o(_add_to_video(text, style, count))
    previous = self.stylemaster_previous or types.MethodType(type(self).forward, self)
    text = previous(x, context, transformer_options=options, **kwargs)
    # Somebody else's forward ends with `o`, which is affine: o(a + b) = o(a) + o(b) - o(0).
    style = self.o(style) - self.o(torch.zeros_like(style[:, :1]))
    return _add_to_video(text, style, count)


def patch_control(
    model: ModelPatcher,
    net_patcher: ModelPatcher,
    *,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
) -> ModelPatcher:
    """A clone of a MODEL that heeds the control of its conditionings.

    Args:
        model: a Wan 2.1 text-to-video model.
        net_patcher: from `load_native_controlnet`; ComfyUI loads it together with the model.
        strength: of the control states; 0 runs nothing.
        start: first part of the sampling, 0..1, in which it acts (release: 0.0).
        end: last part, inclusive (release: 0.7).

    Raises:
        ConfigError: for a range that cannot be, or a model that has a control already.
        UnsupportedHostError, WeightsError: if network and model do not belong together.
    """
    if not 0 <= start <= end <= 1:
        raise ConfigError(
            f"the control's range must satisfy 0 <= start <= end <= 1, got {start} to {end}"
        )
    if model.get_additional_models_with_key(CONTROL_KEY):
        raise ConfigError(
            "this MODEL has a gray-tile control already; apply it to the model before"
        )
    net = net_patcher.model
    width = net.zero_convs[0].weight.shape[0]
    transformer = check_model(model, width, None, "this gray-tile ControlNet")
    if len(net.control_blocks) > len(transformer.blocks):
        raise WeightsError(
            f"this gray-tile ControlNet has {len(net.control_blocks)} blocks, more than the "
            f"MODEL's {len(transformer.blocks)}; load the Wan model that it was trained with"
        )

    def control_hooks(call: ModelCall) -> list[Hook]:
        if call.rows is None or not strength or not call.in_range(start, end):
            return []
        hooks = _control_hooks(call, strength)
        comfy.model_management.throw_exception_if_processing_interrupted()
        return hooks

    clone = with_hooks(model, CONTROL_KEY, control_hooks)
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, CONTROL_KEY, _reserve_memory)
    clone.set_additional_models(CONTROL_KEY, [net_patcher])
    return clone


def _control_hooks(call: ModelCall, strength: float) -> list[Hook]:
    """Run the network, once for each different sample, and hand its states to the blocks."""
    assert call.rows is not None
    model, rows, x = call.model, call.rows, call.x
    # Through the patcher at work, as clones may hold the network on another device.
    net = model.current_patcher.get_additional_models_with_key(CONTROL_KEY)[0].model
    samples: dict[tuple[int, int], int] = {}  # in the order of the network's batch
    first: list[int] = []
    numbers = []
    for number, (condition, index) in enumerate(rows):
        key = (id(condition), min(index, condition.batch - 1))
        if key not in samples:
            samples[key] = len(samples)
            first.append(number)
        numbers.append(samples[key])
    latents, text = (
        torch.cat(parts).to(x.device)
        for parts in zip(*(rows[i][0].sample(rows[i][1]) for i in first), strict=True)
    )
    latents = _cut(latents, x, call.window)
    dtype = compute_dtype(model)
    states = net(
        model.process_latent_in(latents).to(dtype),
        model.model_sampling.timestep(call.t[first]).float(),
        text.to(dtype),
        dtype=dtype,
    )
    blocks = raw_blocks(model)
    stride = math.ceil(len(blocks) / len(states))
    index = None if len(samples) == 1 else torch.tensor(numbers, device=x.device)
    return [
        (
            blocks[i * stride],
            _block_with_control,
            {"stylemaster_state": state * strength, "stylemaster_rows": index},
        )
        for i, state in enumerate(states)
    ]


def _cut(latents: Tensor, x: Tensor, window: Any) -> Tensor:
    """Control latents of the video or window at hand."""
    given = list(latents.shape[2:])
    if window is not None and latents.shape[window.dim] > max(frames := window_frames(window)):
        index = torch.tensor(frames, device=latents.device)
        latents = latents.index_select(window.dim, index)
    if latents.shape[2:] != x.shape[2:]:
        raise LayoutError(
            f"the control latents are {given} (t, h, w), those that are sampled {list(x.shape[2:])}"
            + (" (a context window)" if window is not None else "")
            + "; make the gray tile with the width, height and length of the empty latent video"
        )
    return latents


def _block_with_control(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`forward` of a block that has a control state."""
    previous = self.stylemaster_previous or types.MethodType(type(self).forward, self)
    hidden = previous(*args, **kwargs)
    state, rows = self.stylemaster_state, self.stylemaster_rows
    return _add_to_video(hidden, state if rows is None else state[rows], state.shape[1])


def _reserve_memory(
    executor: Any, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Any:
    """PREPARE_SAMPLING wrapper: nobody else counts the states, which live while the model runs."""
    net = model.get_additional_models_with_key(CONTROL_KEY)[0].model
    batch, channels, t, h, w = noise_shape
    width = net.zero_convs[0].weight.shape[0]
    numbers = len(net.zero_convs) * t * math.ceil(h / 2) * math.ceil(w / 2) * width
    needed = numbers * compute_dtype(model.model).itemsize
    per_item = model.memory_required([1, channels, t, h, w])
    more = math.ceil(needed / per_item)
    return executor(model, [batch + more, channels, t, h, w], *args, **kwargs)
