"""Models of real size have exactly the keys and shapes of the released files."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from stylemaster_core.models.decoupled_attention import BlockStyle, StyleAttention, scaled_norm
from stylemaster_core.models.gray_tile_controlnet import (
    DiffusersHost,
    GrayTileControlNet,
    copy_from_transformer,
)
from stylemaster_core.models.query_transformer import QueryTransformer
from stylemaster_core.models.sdxl_unet import StyledUNet, check_unet, cross_attentions
from stylemaster_core.models.style_projector import GlobalProjection, StyleProjector
from stylemaster_core.models.stylecrafter import create_stylecrafter_encoder
from stylemaster_core.models.stylecrafter_sdxl import StyleCrafterSdxl
from stylemaster_core.models.wan_transformer import StyledWanTransformer
from stylemaster_core.weights.key_maps import diffusers_block_key_to_native, diffusers_to_native
from stylemaster_core.weights.shapes import (
    StyleCrafterSdxlSizes,
    StyleCrafterSizes,
    expected_stylecrafter_sdxl_shapes,
    sdxl_layer_key,
    stylecrafter_sdxl_sizes,
)

FOLDER = Path(__file__).parents[1] / "golden" / "checkpoint_keys"


def released(name):
    keys = json.loads((FOLDER / f"{name}_ckpt_keys.json").read_text())["keys"]
    return {key: tuple(shape) for key, shape in keys.items()}


def shapes(state_dict):
    return {key: tuple(value.shape) for key, value in state_dict.items()}


@pytest.fixture(scope="module")
def stylemaster():
    with torch.device("meta"):
        base = diffusers_to_native(StyledWanTransformer().state_dict())
        style = StyleAttention(30, 4096, 1536).state_dict()
        projector = StyleProjector(
            QueryTransformer(2, 1280, 3, 8, 4096), GlobalProjection(1024, 14, 4096)
        )
    prefixed = {f"style_model.{k}": v for k, v in projector.release_state_dict().items()}
    return base, style, prefixed


def test_stylemaster(stylemaster):
    base, style, projector = stylemaster
    assert shapes(base | style | projector) == released("stylemaster")
    assert [len(part) for part in stylemaster] == [825, 150, 46]
    assert [sum(t.numel() for t in part.values()) for part in stylemaster] == [
        1_418_996_800,
        377_625_600,
        123_068_672,
    ]


def native_control_key(key):
    if not key.startswith("control_blocks."):
        return key
    prefix, index, rest = key.split(".", 2)
    return f"{prefix}.{index}.{diffusers_block_key_to_native(rest)}"


def test_controlnet():
    with torch.device("meta"):
        module = GrayTileControlNet(
            DiffusersHost(), width=1536, ffn_width=8960, num_heads=12, num_blocks=15
        )
    ours = {native_control_key(key): value for key, value in module.state_dict().items()}
    assert shapes(ours) == released("controlnet")
    assert sum(t.numel() for t in ours.values()) == 757_697_280


def test_copying_the_transformer_gives_the_controlnet(stylemaster):
    base, style, projector = stylemaster
    assert shapes(copy_from_transformer(base | style | projector)) == released("controlnet")


SDXL = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def stylecrafter():
    with torch.device("meta"):
        encoder = create_stylecrafter_encoder(StyleCrafterSizes())
        return StyleCrafterSdxl(encoder, StyleCrafterSdxlSizes().layer_widths)


def test_stylecrafter_sdxl(stylecrafter):
    ours = stylecrafter.release_state_dict()
    keys = released("stylecrafter_sdxl")
    assert shapes(ours) == keys == expected_stylecrafter_sdxl_shapes() and len(keys) == 372
    assert stylecrafter_sdxl_sizes(keys) == StyleCrafterSdxlSizes()
    numbers = json.loads((FOLDER / "stylecrafter_sdxl_ckpt_keys.json").read_text())["params"]
    assert sum(t.numel() for t in ours.values()) == numbers["adapter_total"] == 431_029_825
    layers = sum(p.numel() for p in stylecrafter.layers.parameters())
    assert layers == numbers["kv_attn_layers"] == 340_953_600


@pytest.fixture(scope="module")
def sdxl_unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def test_layers_of_stylecrafter_are_those_of_sdxl(stylecrafter, sdxl_unet):
    unet = sdxl_unet
    check_unet(unet, stylecrafter)
    order = json.loads((FOLDER / "stylecrafter_sdxl_ckpt_keys.json").read_text())["layer_order"]
    assert cross_attentions(unet) == [name for _, name, _, _ in order]
    assert stylecrafter.layer_widths == [width for _, _, _, width in order]
    indices = [int(sdxl_layer_key(i, "x").split(".")[1]) for i in range(70)]
    assert indices == [index for index, _, _, _ in order]


@pytest.mark.slow
def test_cost_of_the_style_on_sdxl(stylecrafter, sdxl_unet):
    """Of a guided step of three branches at 1024 x 1024, counted."""
    with torch.device("meta"), torch.no_grad():
        keys_values = stylecrafter.keys_values(torch.empty(1, 16, 2048))
        styles = [
            BlockStyle((k.keys,), (k.values,), (), None, (scaled_norm(k.norm, 1.0),))
            for k in keys_values
        ]
        text, pooled = torch.empty(3, 77, 2048), torch.empty(3, 1280)
        added = {"text_embeds": pooled, "time_ids": torch.empty(3, 6)}
        flop = []
        for chosen in (None, styles):
            with StyledUNet(sdxl_unet) as host, FlopCounterMode(display=False) as counter:
                host.set(chosen, {})
                sdxl_unet(
                    torch.empty(3, 4, 128, 128), torch.empty(1), text, added_cond_kwargs=added
                )
            flop.append(counter.get_total_flops())
    assert flop[0] > 1e13 and 1 < flop[1] / flop[0] < 1.001
    assert sum(k.keys.numel() + k.values.numel() for k in keys_values) < 3e6
