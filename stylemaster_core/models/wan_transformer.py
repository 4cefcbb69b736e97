"""diffusers' Wan transformer with the style branch, control states and work that branches share.

`StyledWanTransformer` is `WanTransformer3DModel` (same weights, loaders, offloading, LoRA) with a
forward pass of its own: text and style keys and values are made once per generation, block 0 does
what the guidance branches share only once, and style and control are ordinary arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from einops import rearrange
from torch import Tensor, nn

from ..errors import LayoutError, WeightsError
from ..weights.state_dict import check_keys, native_to_diffusers, strip_prefix
from .decoupled_attention import (
    BlockStyle,
    StyleAttention,
    StyleKV,
    StyleRegion,
    check_overlap,
    create_style_attention,
    is_branch_key,
    region_masks,
    style_residual,
)
from .motion_adapter import MotionAdapter
from .stylecrafter import is_encoder_key
from .timestep import Kept, sinusoidal_embedding, wave_frequencies
from .wan_block import KeysValues, Rotary, StyledWanBlock, WideLayerNorm, expand_rows, widen

TextKV = list[KeysValues]  # per block


@dataclass(frozen=True, eq=False)
class Branch:
    """One condition of the guidance, ready for all blocks: a prompt and perhaps a style."""

    text: TextKV
    style: list[BlockStyle] | None

    @property
    def num_styled(self) -> int:
        return self.style[0].keys[0].shape[0] if self.style and self.style[0].keys else 0


class BranchGroup(NamedTuple):
    """Branches that run as one batch."""

    numbers: tuple[int, ...]  # which of the branches these are
    first: tuple[tuple[KeysValues, BlockStyle | None], ...]  # of each branch, in block 0
    merged: Branch  # all of them, stacked along the batch


class BranchGroups(tuple[BranchGroup, ...]):
    """What `group_branches` gives; its length is the number of branches."""

    def __len__(self) -> int:
        return sum(len(group.numbers) for group in self)


class Stem(NamedTuple):
    """What depends only on latents and timestep, hence is the same for all branches."""

    hidden: Tensor  # [B, L, D]
    time: Tensor  # [B or 1, D]
    modulation: Tensor  # [B or 1, 6, D]
    rotary: Rotary
    grid: tuple[int, int, int]


class StyledWanTransformer(WanTransformer3DModel):
    """Predicts the velocity of Wan latents, with style and control, several branches at once."""

    _no_split_modules = ["StyledWanBlock"]
    _repeated_blocks = ["StyledWanBlock"]
    _skip_layerwise_casting_patterns = [
        "patch_embedding",
        "condition_embedder",
        "norm",
        "style_attention",
        "motion_adapter",
    ]

    config: Any  # diffusers gives it attributes that its type does not show
    rope: nn.Module

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=0,
            eps=eps,
            rope_max_seq_len=rope_max_seq_len,
        )
        self.register_to_config(num_layers=num_layers)
        width = num_attention_heads * attention_head_dim
        self.blocks = nn.ModuleList(
            StyledWanBlock(
                width, ffn_dim, num_attention_heads, "rms_norm_across_heads", cross_attn_norm, eps
            )
            for _ in range(num_layers)
        )
        self.norm_out = WideLayerNorm(width, eps, elementwise_affine=False)
        self.style_attention: StyleAttention | None = None
        self.motion_adapter: MotionAdapter | None = None
        self._frequencies: Kept[Tensor] = Kept()
        self._rotary: Kept[Rotary] = Kept()

    # ---- once per generation ---------------------------------------------------------------------

    def embed_text(self, text: Tensor, batch: int, padding: int = 1) -> TextKV:
        """Keys and values of every block from text features.

        Args:
            text: [B or 1, L, Dt], padding included.
            batch: videos that the text is for.
            padding: how many rows the last one stands for; see `merge_padding`.
        """
        width = self.config.text_dim
        if text.ndim != 3 or text.shape[-1] != width:
            raise LayoutError(
                f"text features must be [B, L, {width}], got {list(text.shape)}; use the text "
                "encoder that belongs to this transformer (UMT5-XXL for Wan)"
            )
        tokens = self.condition_embedder.text_embedder(text.to(self.device, self.compute_dtype))
        return [
            cast(StyledWanBlock, block).text_keys_values(tokens, padding).expand(batch)
            for block in self.blocks
        ]

    def style_keys_values(self, regions: Sequence[StyleRegion]) -> list[StyleKV]:
        """Keys and values of styles, made once per generation."""
        if self.style_attention is None:
            raise WeightsError(
                "a style was given, but this transformer was loaded without style weights "
                "(blocks.N.cross_attn.k_img, v_img, norm_k_img); load a StyleMaster adapter, or a "
                "StyleCrafter adapter for Wan"
            )
        return [self.style_attention(region) for region in regions]

    def prepare_style(
        self,
        regions: Sequence[StyleRegion],
        keys_values: Sequence[StyleKV],
        masks: Sequence[Tensor],
        no_style: bool,
    ) -> list[BlockStyle]:
        """Style of every block.

        Args:
            regions: styles.
            keys_values: from `style_keys_values`, one per region.
            masks: from `region_masks`.
            no_style: whether rows and places without style attend to zero tokens (as the release
                does) or skip the branch, as they always do with StyleCrafter.
        """
        assert self.style_attention is not None
        like = keys_values[0].keys
        zero = None
        if no_style and not self.style_attention.bypass:
            zero = self.style_attention.no_style(regions).to(like)
        masks = tuple(mask.to(like) for mask in masks)
        return [
            BlockStyle(
                tuple(kv.keys[i] for kv in keys_values),
                tuple(kv.values[i] for kv in keys_values),
                masks,
                None if zero is None else zero[i],
                tuple((kv.norm[0][i], kv.norm[1][i]) for kv in keys_values if kv.norm is not None),
            )
            for i in range(len(self.blocks))
        ]

    def prepare_branch(
        self, text: TextKV, style: list[BlockStyle] | None, *, styled: bool
    ) -> Branch:
        """A guidance branch; `styled=False` gives the "no style" branch that belongs to `style`."""
        if style is not None and not styled:
            without = [BlockStyle((), (), (), block.no_style) for block in style]
            style = without if style[0].no_style is not None else None
        if style is not None:
            style = [_expand_rows(block, text[0].keys.shape[0]) for block in style]
        return Branch(text, style)

    def group_branches(self, branches: Sequence[Branch], *, batched: bool) -> BranchGroups:
        """Decide which branches run as one batch, once for all steps.

        Args:
            branches: from `prepare_branch`.
            batched: as one batch (faster for short clips) or one by one (less memory).

        Raises:
            LayoutError: for several styled branches in one batch.
        """
        return BranchGroups(
            BranchGroup(
                tuple(number for number, _ in group),
                tuple((b.text[0], None if b.style is None else b.style[0]) for _, b in group),
                _merge([branch for _, branch in group]),
            )
            for group in _groups(branches, batched)
        )

    # ---- every step ------------------------------------------------------------------------------

    @property
    def compute_dtype(self) -> torch.dtype:
        # 8-bit storage leaves the patch embedding as it is.
        return self.patch_embedding.weight.dtype

    def token_grid(self, latents: Tensor) -> tuple[int, int, int]:
        """(t, h, w) tokens of latents [B, 16, t, h, w].

        Raises:
            LayoutError: for another number of dimensions, channels, or odd sides.
        """
        channels, (_, ph, pw) = self.config.in_channels, self.config.patch_size
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise LayoutError(
                f"latents must be [B, {channels}, t, h, w], got {list(latents.shape)}"
            )
        t, h, w = latents.shape[2:]
        if h % ph or w % pw:
            raise LayoutError(
                f"latents of {h} x {w} do not divide into patches of {ph} x {pw}; "
                "use frames whose sides are multiples of 16"
            )
        return t, h // ph, w // pw

    def embed(self, latents: Tensor, timestep: Tensor) -> Stem:
        grid = self.token_grid(latents)
        if timestep.ndim != 1 or timestep.shape[0] not in (1, latents.shape[0]):
            raise LayoutError(
                f"timestep must be [1] or [{latents.shape[0]}], got {list(timestep.shape)}"
            )
        x = self.patch_embedding(latents.to(self.compute_dtype))
        hidden = rearrange(x, "b d t h w -> b (t h w) d").contiguous()
        embedder = self.condition_embedder
        frequencies = self._frequencies.get(
            latents.device, lambda: wave_frequencies(self.config.freq_dim, latents.device)
        )
        wave = sinusoidal_embedding(timestep.to(latents.device), frequencies)
        time = embedder.time_embedder(wave.to(embedder.time_embedder.linear_1.weight.dtype))
        modulation = embedder.time_proj(F.silu(time).to(embedder.time_proj.weight.dtype))
        rotary = self._rotary.get(
            (grid, hidden.device, hidden.dtype),
            lambda: Rotary.of(self.rope(latents), hidden.dtype),
        )
        return Stem(
            hidden, time, rearrange(modulation, "b (six d) -> b six d", six=6), rotary, grid
        )

    def project_out(self, hidden: Tensor, stem: Stem) -> Tensor:
        table = self.scale_shift_table.to(hidden.device)  # see `StyledWanBlock._modulate`
        shift, scale = (table + widen(stem.time)[:, None]).chunk(2, dim=1)
        x = (self.norm_out(widen(hidden)) * (1 + scale) + shift).to(hidden)
        t, h, w = stem.grid
        pt, ph, pw = self.config.patch_size
        return rearrange(
            self.proj_out(x),
            "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
            t=t,
            h=h,
            w=w,
            pt=pt,
            ph=ph,
            pw=pw,
        )

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextKV,
        *,
        style: Tensor | Sequence[StyleRegion] | None = None,
        control: Sequence[Tensor] | None = None,
        control_scale: float = 1.0,
    ) -> Tensor:
        """Velocity of one branch, block by block; the plain path that training uses.

        Args:
            latents: [B, 16, t, h, w] normalised noisy latents.
            timestep: [1] or [B] in 0..1000.
            text: [B, L, Dt] text features, or what `embed_text` made of them.
            style: [B, S, Ds] style tokens, styles with regions, or None, which skips the style
                branch. All-zero tokens are the release's "no style" and not the same as None.
            control: control states; state i is added after block i * stride, where the stride
                follows from the number of states.
            control_scale: strength of the control.

        Returns:
            [B, 16, t, h, w] velocity (noise - clean), in the dtype of the weights.

        Raises:
            LayoutError: for tensors that do not fit together or the model.
            WeightsError: if a style is given and there are no style weights.

        Source: StyleMaster, sec. 3.2 and 3.4, and its released code; deviation: the time embedding
        of a batch with different timesteps is right here.
        """
        stem = self.embed(latents, timestep)
        batch = latents.shape[0]
        text_kv = self.embed_text(text, batch) if isinstance(text, Tensor) else text
        regions = [StyleRegion(style)] if isinstance(style, Tensor) else style
        prepared = None
        if regions:
            check_overlap(regions)
            keys_values = self.style_keys_values(regions)
            masks = region_masks(regions, stem.grid)
            prepared = self.prepare_style(regions, keys_values, masks, no_style=True)
        residuals = self._control_residuals(control, control_scale, stem.hidden)
        hidden = stem.hidden
        for i, block in enumerate(self.blocks):
            block_style = None if prepared is None else _expand_rows(prepared[i], batch)
            arguments = (hidden, stem.modulation, stem.rotary, text_kv[i], block_style)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = cast(Any, self)._gradient_checkpointing_func(block, *arguments)
            else:
                hidden = block(*arguments)
            if i in residuals:
                hidden = hidden + _scaled(residuals[i], control_scale, hidden)
        return self.project_out(hidden, stem)

    def velocities(
        self,
        latents: Tensor,
        timestep: Tensor,
        branches: Sequence[Branch] | BranchGroups,
        *,
        control: Sequence[Tensor] | None = None,
        control_scale: float = 1.0,
        batched: bool = True,
    ) -> list[Tensor]:
        """Velocities of several branches at the same latents: what they share is computed once.

        Args:
            latents: [B, 16, t, h, w].
            timestep: [1] or [B].
            branches: from `prepare_branch`, or what `group_branches` made of them.
            control: the same control states for all branches.
            control_scale: strength of the control.
            batched: of branches without groups, see `group_branches`.

        Returns:
            one velocity [B, 16, t, h, w] per branch, equal to `forward` on each but for rounding.
        """
        stem = self.embed(latents, timestep)
        first = self.blocks[0]
        assert isinstance(first, StyledWanBlock)
        residuals = self._control_residuals(control, control_scale, stem.hidden)
        # Block 0 up to its query is the same for all branches.
        shared = first.self_attend(stem.hidden, stem.modulation, stem.rotary)
        query = first.cross_query(shared)
        stem = stem._replace(hidden=shared[:0])
        if not isinstance(branches, BranchGroups):
            branches = self.group_branches(branches, batched=batched)
        outputs: list[Tensor] = [latents] * len(branches)
        groups = list(branches)
        for number, (numbers, prepared, merged) in enumerate(groups):
            count = len(numbers)
            attended = _join([_first_attention(first, query, *branch) for branch in prepared])
            modulation = _repeat(stem.modulation, count)
            hidden = first.finish(_repeat(shared, count), attended, modulation)
            del attended
            if number + 1 == len(groups):
                del shared, query  # what the last group does not need lowers the peak
            for i, block in enumerate(self.blocks):
                if i > 0:
                    style = None if merged.style is None else merged.style[i]
                    hidden = block(hidden, modulation, stem.rotary, merged.text[i], style)
                if i in residuals:
                    hidden = hidden + _repeat(_scaled(residuals[i], control_scale, hidden), count)
            repeated = stem._replace(time=_repeat(stem.time, count))
            velocities = self.project_out(hidden, repeated).chunk(count)
            for index, velocity in zip(numbers, velocities, strict=True):
                outputs[index] = velocity
        return outputs

    def _control_residuals(
        self, control: Sequence[Tensor] | None, control_scale: float, hidden: Tensor
    ) -> dict[int, Tensor]:
        """Control state of each block after which one is added."""
        if not control or control_scale == 0:
            return {}
        stride = math.ceil(len(self.blocks) / len(control))
        if (len(control) - 1) * stride >= len(self.blocks):
            raise LayoutError(
                f"{len(control)} control states do not spread evenly over {len(self.blocks)} "
                "blocks; the control network belongs to another model"
            )
        batch, length, width = hidden.shape
        for state in control:
            if state.shape not in ((1, length, width), (batch, length, width)):
                raise LayoutError(
                    f"control states must be [1 or {batch}, {length}, {width}] for these latents "
                    f"and this transformer, got {list(state.shape)}; make them from control "
                    "latents of the same size, by a control network of the same model"
                )
        return {i * stride: state for i, state in enumerate(control)}


def _first_attention(
    block: StyledWanBlock, query: Tensor, text: KeysValues, style: BlockStyle | None
) -> Tensor:
    attended = text.attend(query, block.num_heads)
    if style is not None:
        attended = attended + style_residual(query, style, block.num_heads)
    return attended


def _scaled(state: Tensor, scale: float, like: Tensor) -> Tensor:
    """Residual of a control state; made where it is added, as those of all blocks are large."""
    return (state if scale == 1 else state * scale).to(like)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, which would copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _groups(branches: Sequence[Branch], batched: bool) -> list[list[tuple[int, Branch]]]:
    """Branches that run as one batch, without style first; texts of other lengths run alone."""
    order = sorted(enumerate(branches), key=lambda pair: pair[1].num_styled)
    if not batched:
        return [[pair] for pair in order]
    groups: dict[object, list[tuple[int, Branch]]] = {}
    for pair in order:
        branch = pair[1]
        key = (branch.text[0].keys.shape[1], branch.style is None)
        groups.setdefault(key, []).append(pair)
    return list(groups.values())


def _merge(branches: Sequence[Branch]) -> Branch:
    """Stack the branches of a group along the batch."""
    if len(branches) == 1:
        return branches[0]
    # The branches of a generation are padded alike, so the bias of one is that of all.
    text = [
        KeysValues(
            torch.cat([t.keys for t in texts]), torch.cat([t.values for t in texts]), texts[0].bias
        )
        for texts in zip(*(branch.text for branch in branches), strict=True)
    ]
    styled = [b.style for b in branches if b.num_styled]
    if len(styled) > 1:
        raise LayoutError("only one styled branch fits into a batch; run the branches one by one")
    plain = [b.style for b in branches if b.style is not None and not b.num_styled]
    style = styled[0] if styled else plain[0] if plain else None
    return Branch(text, style)


def _expand_rows(style: BlockStyle, batch: int) -> BlockStyle:
    """Let one style serve a whole batch of latents."""
    keys = tuple(expand_rows(x, batch) for x in style.keys)
    return style._replace(keys=keys, values=tuple(expand_rows(x, batch) for x in style.values))


def _repeat(x: Tensor, count: int) -> Tensor:
    """A row for each branch; a single row serves all by broadcasting."""
    return x if x.shape[0] == 1 else x.repeat(count, *[1] * (x.ndim - 1))


def load_transformer(
    state_dict: Mapping[str, Tensor], *, num_heads: int | None = None
) -> StyledWanTransformer:
    """Build the transformer from a release-format state dict; all sizes are read off it.

    Args:
        state_dict: Wan's own (and ComfyUI's) or diffusers' key names, with or without the style
            branch of a StyleMaster or StyleCrafter adapter; the adapter's encoder is left to
            `load_style_projector` or `load_stylecrafter_encoder`. Tensors are not copied.
        num_heads: None for width / 128, Wan's head width.

    Returns:
        a frozen `StyledWanTransformer`; call it with (latents, timestep, text, style=, control=).

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    weights = strip_prefix(dict(state_dict))
    weights = {key: value for key, value in weights.items() if not key.startswith("style_model.")}
    _check_patches(weights)
    base = {
        key: value
        for key, value in weights.items()
        if not is_branch_key(key) and not is_encoder_key(key)
    }
    if "condition_embedder.time_proj.weight" not in base:
        base = native_to_diffusers(base)
    config = _read_config(base, num_heads)
    with torch.device("meta"):
        model = StyledWanTransformer(**config)
    model.rope = type(model.rope)(config["attention_head_dim"], (1, 2, 2), 1024)
    check_keys(
        {key: tuple(value.shape) for key, value in base.items()},
        {key: tuple(value.shape) for key, value in model.state_dict().items()},
        "Wan transformer",
    )
    model.load_state_dict(base, assign=True)
    model.style_attention = create_style_attention(weights)
    if model.style_attention is not None:
        _check_fits(model.style_attention, model)
    return model.requires_grad_(False).eval()


def _check_patches(weights: Mapping[str, Tensor]) -> None:
    patch = weights.get("patch_embedding.weight")
    if patch is not None and (patch.ndim != 5 or patch.shape[1:] != (16, 1, 2, 2)):
        channels = patch.shape[1] if patch.ndim > 1 else 0
        raise WeightsError(
            f"this Wan model takes {channels} input channels in patches of "
            f"{tuple(patch.shape[2:])}; StyleMaster needs a text-to-video model with 16 channels "
            "in patches of (1, 2, 2) (Wan 2.1 T2V)"
        )


def _check_fits(style: StyleAttention, model: StyledWanTransformer) -> None:
    host = len(model.blocks), model.proj_out.in_features
    if (len(style.blocks), style.width) != host:
        raise WeightsError(
            f"the style weights are for {len(style.blocks)} blocks of width {style.width}, the "
            f"transformer has {host[0]} of width {host[1]}; use an adapter trained on it"
        )


def _read_config(base: Mapping[str, Tensor], num_heads: int | None) -> dict[str, Any]:
    needed = (
        "patch_embedding.weight",
        "condition_embedder.text_embedder.linear_1.weight",
        "condition_embedder.time_embedder.linear_1.weight",
        "blocks.0.ffn.net.0.proj.weight",
        "proj_out.weight",
    )
    missing = [key for key in needed if key not in base]
    if missing:
        raise WeightsError(
            f"these {len(base)} tensors are no Wan transformer: {missing[0]} is missing "
            f"(first keys: {sorted(base)[:3]})"
        )
    patch, text, time, ffn, out = (base[key].shape for key in needed)
    width = patch[0]
    heads = num_heads or width // 128
    if heads < 1 or width % heads or (width // heads) % 2:
        raise WeightsError(
            f"a width of {width} does not divide into {heads} heads; pass num_heads="
        )
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": patch[1],
        "out_channels": out[0] // 4,
        "text_dim": text[1],
        "freq_dim": time[1],
        "ffn_dim": ffn[0],
        "num_layers": 1 + max(int(k.split(".")[1]) for k in base if k.startswith("blocks.")),
    }
