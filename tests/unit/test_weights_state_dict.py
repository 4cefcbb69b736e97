"""Key maps, detection, splitting, checks and the report on the style path."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stylemaster_core.errors import WeightsError
from stylemaster_core.weights import state_dict as sd
from stylemaster_core.weights.shapes import (
    AdapterSizes,
    ControlNetSizes,
    WanSizes,
    adapter_sizes,
    controlnet_sizes,
    expected_adapter_shapes,
    expected_base_shapes,
    expected_controlnet_shapes,
    wan_sizes,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL_ADAPTER = AdapterSizes(
    width=8,
    num_blocks=2,
    style_width=6,
    patch_width=4,
    num_layers=1,
    local_tokens=2,
    global_tokens=3,
    global_width=5,
)
SMALL_WAN = WanSizes(width=8, ffn_width=12, num_blocks=2, text_width=10, freq_width=4)
SMALL_CONTROLNET = ControlNetSizes(width=8, ffn_width=12, num_blocks=1, text_width=10, freq_width=4)


def golden_shapes(name):
    keys = json.loads((GOLDEN / "checkpoint_keys" / f"{name}.json").read_text())["keys"]
    return {key: tuple(shape) for key, shape in keys.items()}


def golden_map():
    pairs = json.loads(
        (GOLDEN / "checkpoint_keys" / "official_to_diffusers_keys_small.json").read_text()
    )
    # The five "blocks.N" lines are a template for the adapter, which is kept apart here.
    return {native: diffusers for native, diffusers in pairs.items() if "blocks.N." not in native}


def meta(shapes):
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_real_release_equals_the_rules():
    tensors = meta(golden_shapes("stylemaster_ckpt_keys"))
    base, adapter = sd.split_release(tensors)
    assert (len(base), len(adapter)) == (825, 196)
    assert sd.shapes_of(base) == expected_base_shapes()
    assert sd.shapes_of(adapter) == expected_adapter_shapes()
    assert sum(value.numel() for value in base.values()) == 1_418_996_800
    assert sum(value.numel() for value in adapter.values()) == 123_068_672 + 377_625_600


def test_real_controlnet_equals_the_rules():
    shapes = golden_shapes("controlnet_ckpt_keys")
    assert len(shapes) == 447
    assert expected_controlnet_shapes() == shapes


def test_sizes_are_read_off_the_shapes():
    release = golden_shapes("stylemaster_ckpt_keys")
    assert wan_sizes(release) == WanSizes()
    assert adapter_sizes(release) == AdapterSizes()
    assert controlnet_sizes(golden_shapes("controlnet_ckpt_keys")) == ControlNetSizes()
    assert wan_sizes(expected_base_shapes(SMALL_WAN)) == SMALL_WAN
    assert adapter_sizes(expected_adapter_shapes(SMALL_ADAPTER)) == SMALL_ADAPTER
    assert controlnet_sizes(expected_controlnet_shapes(SMALL_CONTROLNET)) == SMALL_CONTROLNET


def test_rules_equal_the_small_golden_model():
    tensors = load_file(GOLDEN / "stylemaster" / "weights_dit_a.safetensors")
    base, adapter = (sd.shapes_of(part) for part in sd.split_release(tensors))
    assert base == expected_base_shapes(wan_sizes(base))
    assert adapter == expected_adapter_shapes(adapter_sizes(adapter))


def test_a_stray_block_number_does_not_blow_up_the_list():
    shapes = {**expected_adapter_shapes(SMALL_ADAPTER)}
    shapes["blocks.99999999.cross_attn.k_img.weight"] = (8, 6)
    assert adapter_sizes(shapes).num_blocks == 3
    with pytest.raises(WeightsError, match="unexpected"):
        sd.check_keys(shapes, expected_adapter_shapes(adapter_sizes(shapes)), "test")


def test_missing_size_tensors_are_named():
    with pytest.raises(WeightsError, match="patch_embedding.weight is missing"):
        wan_sizes({})
    with pytest.raises(WeightsError, match="has the shape"):
        adapter_sizes({"blocks.0.cross_attn.k_img.weight": (3,)})


def test_key_map_equals_the_golden_map():
    pairs = golden_map()
    assert len(pairs) == 96
    assert sd.native_to_diffusers({key: key for key in pairs}) == {v: k for k, v in pairs.items()}
    assert sd.diffusers_to_native({v: v for v in pairs.values()}) == pairs


def test_key_map_is_a_bijection_on_the_real_base():
    base = expected_base_shapes()
    renamed = sd.native_to_diffusers(base)
    assert len(renamed) == 825
    assert sd.diffusers_to_native(renamed) == base


def test_key_map_fits_diffusers_own_model():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=8,
            text_dim=10,
            freq_dim=4,
            ffn_dim=12,
            num_layers=2,
        )
    renamed = sd.native_to_diffusers(expected_base_shapes(SMALL_WAN))
    assert renamed == sd.shapes_of(model.state_dict())


def test_block_keys_serve_the_controlnet():
    prefix = "control_blocks.0."
    for key in expected_controlnet_shapes(SMALL_CONTROLNET):
        if key.startswith(prefix):
            rest = key.removeprefix(prefix)
            renamed = sd.native_block_key_to_diffusers(rest)
            assert sd.diffusers_block_key_to_native(renamed) == rest
    assert sd.native_block_key_to_diffusers("norm3.bias") == "norm2.bias"


@pytest.mark.parametrize(
    "key",
    [
        "style_model.ln1.weight",
        "blocks.0.cross_attn.k_img.weight",
        "blocks.0.norm1.weight",
        "blocks.0.self_attn.q.scale_weight",
        "scaled_fp8",
        "img_emb.proj.0.weight",
    ],
)
def test_keys_without_a_rule_are_errors(key):
    with pytest.raises(WeightsError, match=key):
        sd.native_to_diffusers({key: 0})
    with pytest.raises(WeightsError, match=key):
        sd.diffusers_to_native({key: 0})


def adapted(targets, down, up, prefix="diffusion_model."):
    return [f"{prefix}blocks.0.{t}.{part}.weight" for t in targets for part in (down, up)]


ATTENTION = [f"self_attn.{name}" for name in "qkvo"]
UMT5 = [f"encoder.block.{n}.layer.0.SelfAttention.q.weight" for n in range(2)]
UMT5_BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("motion_adapter", adapted(ATTENTION, "lora_A", "lora_B")),
        ("motion_adapter", adapted(ATTENTION[:1], "lora_down", "lora_up", "")),
        ("unknown", adapted([*ATTENTION, "ffn.0"], "lora_A", "lora_B")),
        ("wan_vae_native", ["decoder.middle.0.residual.0.gamma", "conv1.weight"]),
        ("wan_vae_diffusers", ["decoder.mid_block.resnets.0.norm1.gamma"]),
        ("unknown", ["decoder.mid_block.resnets.0.norm1.weight"]),
        ("clip_vision_hf", ["vision_model.embeddings.class_embedding"]),
        ("unknown", ["vision_model.embeddings.patch_embedding.weight"]),
        (
            "clip_vision_open_clip",
            ["visual.class_embedding", "visual.transformer.resblocks.0.ln_1.weight"],
        ),
        ("umt5_hf", [*UMT5, UMT5_BIAS, "spiece_model"]),
        ("unknown", UMT5),
        ("umt5_native", ["token_embedding.weight", "blocks.0.attn.q.weight"]),
        ("style_tokens", ["style_tokens"]),
        ("stylecrafter_sdxl", ["image_context_model.proj", "kv_attn_layers.1.to_k.weight"]),
        ("stylecrafter_wan", ["image_context_model.proj", "blocks.0.cross_attn.k_img.weight"]),
        ("stylecrafter_video", ["image_context_model.proj", "kv_attn_layers.input_1_1.k.weight"]),
        ("unknown", []),
        ("unknown", ["model.layers.0.weight"]),
    ],
)
def test_detect_by_keys(kind, keys):
    assert sd.detect_kind(dict.fromkeys(keys, (1,))) == kind


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_detect_the_wan_family(prefix):
    release = golden_shapes("stylemaster_ckpt_keys")
    base, adapter = sd.split_release(release)
    image_to_video = base | {k: v for k, v in adapter.items() if k.startswith("blocks.")}
    cases = {
        "stylemaster": release,
        "wan_native": base,
        "style_adapter": adapter,
        "gray_tile_controlnet": golden_shapes("controlnet_ckpt_keys"),
        "wan_diffusers": sd.native_to_diffusers(base),
    }
    for kind, shapes in cases.items():
        assert sd.detect_kind({prefix + key: shape for key, shape in shapes.items()}) == kind
    assert sd.detect_kind(image_to_video) == "wan_native"


def test_every_kind_is_described():
    for kind in sd.Kind.__args__:
        assert len(sd.describe_kind(kind)) > 10
    assert "models/diffusion_models" in sd.describe_kind("wan_native")


def test_strip_prefix():
    assert sd.strip_prefix({"model.diffusion_model.a": 1, "diffusion_model.b": 2, "c": 3}) == {
        "a": 1,
        "b": 2,
        "c": 3,
    }
    with pytest.raises(WeightsError, match="twice"):
        sd.strip_prefix({"diffusion_model.a": 1, "a": 2})


def test_check_keys_names_and_counts():
    expected = {f"k{i:02}": (i + 1,) for i in range(30)}
    sd.check_keys(expected, dict(expected), "thing")
    came = {f"k{i:02}": (i + 1,) for i in range(12, 30)} | {"extra": (1,), "k29": (5, 5)}
    with pytest.raises(WeightsError) as caught:
        sd.check_keys(came, expected, "thing")
    message = str(caught.value)
    assert "12 missing: k00, k01" in message and "k09, ..." in message and "k10" not in message
    assert "1 unexpected: extra" in message
    assert "1 of another shape: k29 (5, 5) instead of (30,)" in message
    assert "thing" in message


def test_style_path_report():
    norm = "blocks.{}.cross_attn.norm_k_img.weight"
    alive = {norm.format(n): torch.tensor([0.5, -n - 1.0]) for n in range(11)}
    report = sd.style_path_report(alive)
    assert report.max_norm_k_img == tuple(float(n + 1) for n in range(11))
    assert not report.is_uniform and "works in all 11 blocks" in report.message

    dead = {key: torch.zeros(2, dtype=torch.bfloat16) for key in alive}
    report = sd.style_path_report(dead)
    assert report.is_uniform
    assert "style attention is uniform: the file's norm_k_img is zero" in report.message
    assert "v_img" in report.message

    report = sd.style_path_report(dead | {norm.format(3): torch.ones(2)})
    assert not report.is_uniform and "1 of 11 blocks" in report.message
    with pytest.raises(WeightsError, match="norm_k_img"):
        sd.style_path_report({"a": torch.ones(1)})


def open_clip_tower(width=8, layers=2, out=6, grid=2, patch=4):
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (grid * grid + 1, width),
        "proj": (width, out),
        "conv1.weight": (width, 3, patch, patch),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for n in range(layers):
        p = f"transformer.resblocks.{n}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{p}{norm}.weight": (width,), f"{p}{norm}.bias": (width,)}
        shapes |= {
            f"{p}attn.in_proj_weight": (3 * width, width),
            f"{p}attn.in_proj_bias": (3 * width,),
            f"{p}attn.out_proj.weight": (width, width),
            f"{p}attn.out_proj.bias": (width,),
            f"{p}mlp.c_fc.weight": (4 * width, width),
            f"{p}mlp.c_fc.bias": (4 * width,),
            f"{p}mlp.c_proj.weight": (width, 4 * width),
            f"{p}mlp.c_proj.bias": (width,),
        }
    generator = torch.Generator().manual_seed(0)
    return {
        f"visual.{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()
    }


def run_open_clip(tower, pixels, heads):
    """The image tower of open_clip, written with PyTorch's own attention."""
    w = {key.removeprefix("visual."): value for key, value in tower.items()}
    functional = torch.nn.functional
    width = w["class_embedding"].numel()

    def norm(x, name):
        return functional.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = functional.conv2d(pixels, w["conv1.weight"], stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = norm(x, "ln_pre")
    for n in range(2):
        p = f"transformer.resblocks.{n}."
        attention = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        attention.load_state_dict(
            {k.removeprefix(f"{p}attn."): v for k, v in w.items() if k.startswith(f"{p}attn.")}
        )
        y = norm(x, f"{p}ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = norm(x, f"{p}ln_2") @ w[f"{p}mlp.c_fc.weight"].T + w[f"{p}mlp.c_fc.bias"]
        x = x + functional.gelu(y) @ w[f"{p}mlp.c_proj.weight"].T + w[f"{p}mlp.c_proj.bias"]
    return norm(x[:, 0], "ln_post") @ w["proj"]


def test_open_clip_tower_computes_the_same_in_transformers():
    transformers = pytest.importorskip("transformers")
    tower = open_clip_tower()
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=32,
        projection_dim=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        hidden_act="gelu",
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    renamed = sd.open_clip_to_hf_vision(tower | {"logit_scale": torch.ones(())})
    assert sd.detect_kind(sd.shapes_of(renamed)) == "clip_vision_hf"
    assert sd.detect_kind(sd.shapes_of(tower)) == "clip_vision_open_clip"
    model.load_state_dict(renamed, strict=True)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = run_open_clip(tower, pixels, heads=2)
        torch.testing.assert_close(
            model(pixel_values=pixels).image_embeds, expected, atol=1e-4, rtol=1e-4
        )


def test_open_clip_without_image_tower_or_with_unknown_keys():
    with pytest.raises(WeightsError, match="visual"):
        sd.open_clip_to_hf_vision({"logit_scale": torch.ones(())})
    with pytest.raises(WeightsError, match="attn_pool"):
        sd.open_clip_to_hf_vision({"visual.attn_pool.q.weight": torch.ones(1)})


def test_umt5_native_fits_transformers():
    transformers = pytest.importorskip("transformers")
    shapes = {"token_embedding.weight": (11, 8), "norm.weight": (8,)}
    for n in range(2):
        p = f"blocks.{n}."
        shapes |= {f"{p}norm1.weight": (8,), f"{p}norm2.weight": (8,)}
        shapes |= {f"{p}attn.{name}.weight": (8, 8) for name in "qkvo"}
        shapes |= {
            f"{p}ffn.gate.0.weight": (16, 8),
            f"{p}ffn.fc1.weight": (16, 8),
            f"{p}ffn.fc2.weight": (8, 16),
            f"{p}pos_embedding.embedding.weight": (32, 2),
        }
    assert sd.detect_kind(shapes) == "umt5_native"
    config = transformers.UMT5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2
    )
    model = transformers.UMT5EncoderModel(config)
    renamed = sd.umt5_native_to_hf(meta(shapes))
    assert sd.shapes_of(renamed) == sd.shapes_of(model.state_dict())
    assert sd.detect_kind(sd.shapes_of(renamed)) == "umt5_hf"
    # The gate is what the activation works on: wi_0 in transformers.
    tagged = sd.umt5_native_to_hf({key: key for key in shapes})
    wi = "encoder.block.1.layer.1.DenseReluDense.wi_"
    assert tagged[f"{wi}0.weight"] == "blocks.1.ffn.gate.0.weight"
    assert tagged[f"{wi}1.weight"] == "blocks.1.ffn.fc1.weight"
    with pytest.raises(WeightsError, match="head.weight"):
        sd.umt5_native_to_hf({"head.weight": 0})


def native_vae_shapes(base=4, z=16):
    """Shapes of Wan's own VAE at another base width."""

    def conv(name, out, into, *kernel):
        return {f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)}

    def gamma(name, width, dims=3):
        return {f"{name}.gamma": (width, *[1] * dims)}

    def residual(name, into, out):
        shapes = gamma(f"{name}.residual.0", into) | gamma(f"{name}.residual.3", out)
        shapes |= conv(f"{name}.residual.2", out, into, 3, 3, 3)
        shapes |= conv(f"{name}.residual.6", out, out, 3, 3, 3)
        return shapes | (conv(f"{name}.shortcut", out, into, 1, 1, 1) if into != out else {})

    def middle(name, width):
        shapes = residual(f"{name}.0", width, width) | residual(f"{name}.2", width, width)
        shapes |= gamma(f"{name}.1.norm", width, 2)
        shapes |= conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
        return shapes | conv(f"{name}.1.proj", width, width, 1, 1)

    widths = [base * m for m in (1, 2, 4, 4)]
    shapes = conv("encoder.conv1", base, 3, 3, 3, 3)
    into, index = base, 0
    for level, width in enumerate(widths):
        for _ in range(2):
            shapes |= residual(f"encoder.downsamples.{index}", into, width)
            into, index = width, index + 1
        if level < 3:
            shapes |= conv(f"encoder.downsamples.{index}.resample.1", width, width, 3, 3)
            if level > 0:
                shapes |= conv(f"encoder.downsamples.{index}.time_conv", width, width, 3, 1, 1)
            index += 1
    shapes |= middle("encoder.middle", into) | gamma("encoder.head.0", into)
    shapes |= conv("encoder.head.2", 2 * z, into, 3, 3, 3)
    shapes |= conv("conv1", 2 * z, 2 * z, 1, 1, 1) | conv("conv2", z, z, 1, 1, 1)
    into, index = widths[-1], 0
    shapes |= conv("decoder.conv1", into, z, 3, 3, 3) | middle("decoder.middle", into)
    for level, width in enumerate([widths[3], widths[2], widths[1], widths[0]]):
        into = into // 2 if level else into
        for _ in range(3):
            shapes |= residual(f"decoder.upsamples.{index}", into, width)
            into, index = width, index + 1
        if level < 3:
            shapes |= conv(f"decoder.upsamples.{index}.resample.1", width // 2, width, 3, 3)
            if level < 2:
                shapes |= conv(f"decoder.upsamples.{index}.time_conv", 2 * width, width, 3, 1, 1)
            index += 1
    return shapes | gamma("decoder.head.0", into) | conv("decoder.head.2", 3, into, 3, 3, 3)


def test_vae_native_fits_diffusers():
    diffusers = pytest.importorskip("diffusers")
    shapes = native_vae_shapes()
    assert sd.detect_kind(shapes) == "wan_vae_native"
    renamed = sd.shapes_of(sd.vae_native_to_diffusers(meta(shapes)))
    with torch.device("meta"):
        model = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16)
    sd.check_keys(renamed, sd.shapes_of(model.state_dict()), "Wan VAE")
    assert sd.detect_kind(renamed) == "wan_vae_diffusers"
