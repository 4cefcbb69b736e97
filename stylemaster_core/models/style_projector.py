"""From CLIP features of a style picture to style tokens: texture tokens, then global tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import LayoutError, WeightsError
from .query_transformer import QueryTransformer
from .texture_selector import SelectionMode, select_patches

# Of the style picture itself, or of its content-shuffled version.
GlobalEmbeds = Literal["image_embeds", "shuffled_embeds"]


class StyleTokens(NamedTuple):
    """Style tokens and what they were made of."""

    tokens: Tensor  # [B, S, D] texture tokens, then global tokens
    kept: Tensor  # [B, K] ascending indices of the patches that were used
    similarity: Tensor | None  # [B, N] of each patch with the prompt


class GlobalProjection(nn.Module):
    """Global style tokens from a projected CLIP embedding: Linear, then LayerNorm (eps 1e-5).

    Source: StyleMaster, sec. 3.1. The release feeds the embedding of the content-shuffled picture;
    the paper a contrastively trained projection of the picture's own (see `ContrastiveProjection`).
    """

    def __init__(self, embed_width: int, num_tokens: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(embed_width, num_tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, image_embeds: Tensor) -> Tensor:
        tokens = rearrange(
            self.proj(image_embeds), "b (s d) -> b s d", d=self.norm.normalized_shape[0]
        )
        return self.norm(tokens)


class ContrastiveProjection(nn.Module):
    """The paper's MLP on CLIP's image embedding, trained so that equal styles lie together.

    Same width in and out, so it stands between CLIP and `GlobalProjection`. The paper gives no
    layer sizes; ours is Linear, GELU, Linear with a residual that starts at the identity.

    Source: StyleMaster, sec. 3.1 and supplement (triplet loss and MSE on model-illusion pairs).
    """

    def __init__(self, embed_width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, embed_width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, image_embeds: Tensor) -> Tensor:
        return image_embeds + self.fc2(nn.functional.gelu(self.fc1(image_embeds)))


class StyleProjector(nn.Module):
    """Texture selection and global projection (`style_model` of the release)."""

    def __init__(self, texture: QueryTransformer, global_projection: GlobalProjection) -> None:
        super().__init__()
        self.texture = texture
        self.global_projection = global_projection
        self.contrastive: ContrastiveProjection | None = None
        self.trained_on: GlobalEmbeds | None = None

    @property
    def global_embeds(self) -> GlobalEmbeds:
        """Which embedding of a style picture it takes: what it was trained on, where that is known.

        Else the picture's own if there is a contrastive projection (the paper), and otherwise the
        shuffled one (the release).
        """
        default = "shuffled_embeds" if self.contrastive is None else "image_embeds"
        return self.trained_on or default

    def forward(
        self,
        patch_features: Tensor,
        image_embeds: Tensor,
        prompt_features: Tensor | None = None,
        *,
        selection: SelectionMode = "release",
        drop_rate: float | None = None,
        keep: int | None = None,
        include_cls: bool = True,
        similarity: Tensor | None = None,
        seed: int | None = None,
    ) -> StyleTokens:
        """Style tokens of B pictures.

        Args:
            patch_features: [B, N, Dc] CLIP's last hidden state before post-layernorm, CLS first.
            image_embeds: [B, De] projected CLIP embedding: of the content-shuffled picture for
                released weights, of the picture itself where a contrastive projection was trained.
            prompt_features: [B or 1, L, Dt] text features of the prompt.
            selection: `mode` of `select_patches`; the following ones have its names.
            drop_rate: see there.
            keep: see there.
            include_cls: see there.
            similarity: see there.
            seed: see there.

        Returns:
            `StyleTokens` with tokens [B, S, D].

        Raises:
            LayoutError: for features that do not fit together or the weights.

        Source: StyleMaster, sec. 3.1 and its released code; deviation: none with the defaults.
        """
        self._check_widths(patch_features, image_embeds)
        chosen = select_patches(
            patch_features,
            prompt_features,
            mode=selection,
            drop_rate=drop_rate,
            keep=keep,
            include_cls=include_cls,
            similarity=similarity,
            seed=seed,
        )
        dtype = self.texture.queries.dtype
        index = chosen.kept[..., None].expand(-1, -1, patch_features.shape[-1])
        texture = self.texture(patch_features.gather(1, index).to(dtype))
        embeds = image_embeds.to(dtype)
        if self.contrastive is not None:
            embeds = self.contrastive(embeds)
        tokens = torch.cat([texture, self.global_projection(embeds)], dim=1)
        return StyleTokens(tokens, chosen.kept, chosen.similarity)

    def _check_widths(self, patch_features: Tensor, image_embeds: Tensor) -> None:
        patch_width = self.texture.queries.shape[-1]
        embed_width = self.global_projection.proj.in_features
        if patch_features.shape[-1] != patch_width or image_embeds.shape[-1] != embed_width:
            raise LayoutError(
                f"this adapter takes image features of width {patch_width} and embeddings of width "
                f"{embed_width}, got {patch_features.shape[-1]} and {image_embeds.shape[-1]}; use "
                "the image encoder it was trained with (CLIP ViT-H/14 for the released weights)"
            )
        if image_embeds.ndim != 2 or image_embeds.shape[0] != patch_features.shape[0]:
            raise LayoutError(
                f"image embeddings must be [{patch_features.shape[0]}, {embed_width}], one per "
                f"picture, got {list(image_embeds.shape)}"
            )
        if not torch.isfinite(image_embeds).all():
            raise LayoutError("the image embedding holds NaN or infinity")

    def release_state_dict(self) -> dict[str, Tensor]:
        """Weights under the names of the release, without its `style_model.` prefix."""
        return {_release_name(key): value for key, value in self.state_dict().items()}


def _release_name(key: str) -> str:
    key = key.removeprefix("texture.").removeprefix("global_projection.")
    return {"queries": "style_emb", "projection": "proj_patch"}.get(key, key)


def _module_name(release_key: str) -> str:
    if release_key.startswith(("proj.", "norm.")):
        return "global_projection." + release_key
    if release_key.startswith("contrastive."):
        return release_key
    renamed = {"style_emb": "queries", "proj_patch": "projection"}.get(release_key, release_key)
    return "texture." + renamed


def load_style_projector(
    state_dict: Mapping[str, Tensor], *, num_heads: int = 8, global_embeds: str | None = None
) -> StyleProjector:
    """Build the style projector from release-format weights; all sizes are read off them.

    Args:
        state_dict: keys as in the release, without the `style_model.` prefix. Not copied.
        num_heads: heads of the query transformer; it cannot be read off the weights.
        global_embeds: the embedding it was trained on, as an adapter's metadata may tell.

    Returns:
        a frozen module; call it with (patch_features, image_embeds, prompt_features).

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys, or an unknown embedding.
    """
    from ..weights.state_dict import check_keys

    if global_embeds not in (None, *get_args(GlobalEmbeds)):
        raise WeightsError(
            f"the adapter says global_embeds={global_embeds!r} in its metadata, expected one of "
            f"{get_args(GlobalEmbeds)}; get a newer release of this software, or another adapter"
        )
    for key in ("style_emb", "proj_patch", "proj.weight", "norm.weight"):
        if key not in state_dict:
            raise WeightsError(
                f"no {key!r} among {len(state_dict)} keys: these are not style_model weights "
                "(expected style_emb, proj_patch, proj, norm, ln1, ln2, transformer_blocks)"
            )
    _, num_queries, width = state_dict["style_emb"].shape
    out_width = state_dict["proj_patch"].shape[1]
    embeds_out, embed_width = state_dict["proj.weight"].shape
    layers = [int(key.split(".")[2]) for key in state_dict if key.startswith("transformer_blocks.")]
    if num_heads < 1 or width % num_heads:
        raise WeightsError(
            f"the width {width} of the query transformer is no multiple of {num_heads}"
        )
    with torch.device("meta"):
        module = StyleProjector(
            QueryTransformer(num_queries, width, 1 + max(layers, default=-1), num_heads, out_width),
            GlobalProjection(embed_width, embeds_out // out_width, out_width),
        )
        if "contrastive.fc1.weight" in state_dict:
            hidden = state_dict["contrastive.fc1.weight"].shape[0]
            module.contrastive = ContrastiveProjection(embed_width, hidden)
    check_keys(
        {key: tuple(value.shape) for key, value in state_dict.items()},
        {key: tuple(value.shape) for key, value in module.release_state_dict().items()},
        "style model",
    )
    weights = {_module_name(key): value for key, value in state_dict.items()}
    module.load_state_dict(weights, assign=True)
    module.trained_on = global_embeds  # type: ignore[assignment]  # checked above
    return module.requires_grad_(False).eval()
