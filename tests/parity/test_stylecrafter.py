"""StyleCrafter against the released code: encoders, dual attention, guidance, the SDXL UNet."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import stylemaster_core.models.decoupled_attention as decoupled_attention
import stylemaster_core.models.sdxl_unet as sdxl_unet
from stylemaster_core.data.images import clip_pixels, stylecrafter_video_pixels
from stylemaster_core.models.decoupled_attention import (
    BlockStyle,
    StyleRegion,
    attend,
    scaled_norm,
    style_residual,
)
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.sdxl_unet import StyledUNet, cross_attentions
from stylemaster_core.models.stylecrafter import load_stylecrafter_encoder
from stylemaster_core.models.stylecrafter_sdxl import layer_styles, load_stylecrafter_sdxl
from stylemaster_core.sampling.denoise_image import ImageText, denoise_image
from stylemaster_core.sampling.guidance import (
    GuidanceWeights,
    combine_guidance,
    combine_guidance_video,
)
from stylemaster_core.weights.stylecrafter_video_keys import stylecrafter_video_to_sdxl

GOLDEN = Path(__file__).parents[1] / "golden" / "stylecrafter"


def case(name):
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads(
        (GOLDEN / f"{name}.json").read_text()
    )


def close(value, reference, tolerance=1e-5):
    """Whether all values agree to a share of the largest one."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    assert reference.abs().max() > 0
    return ((value - reference).abs().max() / reference.abs().max()).item() <= tolerance


def under(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# ---- v1: CLIP features of the video version ----


def test_pixels_of_the_video_version():
    tensors, _ = case("v1_clip_features")
    image = tensors["image_u8"].permute(1, 2, 0).numpy()
    assert close(stylecrafter_video_pixels(image)[None], tensors["pixel_values"])
    assert not close(clip_pixels(image)[None], tensors["pixel_values"], 1e-2)


def test_features_of_the_video_version(tmp_path):
    tensors, meta = case("v1_clip_features")
    visual = {k: v for k, v in tensors.items() if k.startswith("visual.")}
    save_file(visual, tmp_path / "visual.safetensors")
    heads = meta["cfg"]["heads"]
    encoder = load_image_encoder(tmp_path / "visual.safetensors", num_heads=heads)
    pixels = tensors["pixel_values"]
    assert close(encoder.stylecrafter_video(pixels), tensors["features"])
    assert not close(encoder.encode(pixels).patch_features, tensors["features"])
    assert not close(encoder.penultimate(pixels), tensors["features"])


# ---- v2, v3, x1: style tokens and scales ----


@pytest.fixture(scope="module")
def video_encoder():
    style, meta = case("v2_style_transformer")
    scales, scale_meta = case("v3_scale_predictor")
    weights = {f"image_context_model.{k}": v for k, v in under(style, "style_transformer.").items()}
    weights |= {k: v for k, v in scales.items() if k.startswith("scale_predictor.")}
    return load_stylecrafter_encoder(
        stylecrafter_video_to_sdxl(weights),
        num_heads=meta["cfg"]["num_heads"],
        scale_num_heads=scale_meta["cfg"]["num_heads"],
    )


def test_style_tokens_of_the_video_version(video_encoder):
    tensors, _ = case("v2_style_transformer")
    assert close(video_encoder(tensors["in_single"]), tensors["out_single"])
    references = tensors["in_multi"].chunk(3, dim=1)
    assert close(video_encoder(list(references)), tensors["out_multi"])
    mean = torch.stack([video_encoder(r) for r in references]).mean(0)
    assert not close(mean, tensors["out_multi"], 1e-2)


def test_scales_of_the_video_version(video_encoder):
    tensors, _ = case("v3_scale_predictor")
    gains = video_encoder.gains(tensors["text_tokens"], tensors["style_tokens"])
    assert close(gains - 1, tensors["scale_scalar"].squeeze(-1))


@pytest.fixture(scope="module")
def sdxl_encoder():
    tensors, meta = case("x1_encoders")
    return load_stylecrafter_encoder(
        tensors,
        num_heads=meta["cfg"]["image_context"]["num_heads"],
        scale_num_heads=meta["cfg"]["scale"]["num_heads"],
    )


def test_style_tokens_and_scales_of_sdxl(sdxl_encoder):
    tensors, _ = case("x1_encoders")
    assert close(sdxl_encoder(tensors["clip_features"]), tensors["style_tokens"])
    gains = sdxl_encoder.gains(tensors["text_tokens"], tensors["style_tokens"])
    assert close(gains - 1, tensors["scale_scalar"].squeeze(-1))
    assert gains.min() > 0 and gains.max() < 2


def test_scales_are_of_both_text_and_style(sdxl_encoder):
    tensors, _ = case("x1_encoders")
    text, style = tensors["text_tokens"], tensors["style_tokens"]
    expected = tensors["scale_scalar"].squeeze(-1)
    for other in ((text.flip(0), style), (text, style.flip(0))):
        assert not close(sdxl_encoder.gains(*other) - 1, expected, 1e-2)


def test_padding_of_the_text_changes_no_scale(sdxl_encoder):
    tensors, _ = case("x1_encoders")
    text, style = tensors["text_tokens"].clone(), tensors["style_tokens"]
    lengths = (5, 30)
    alone = [sdxl_encoder.gains(text[i : i + 1, :n], style[i : i + 1])
             for i, n in enumerate(lengths)]  # fmt: skip
    for i, n in enumerate(lengths):
        text[i, n:] = 0
    together = sdxl_encoder.gains(F.pad(text, (0, 0, 0, 40)), style)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


# ---- v4, x2: dual attention ----


def dual_attention(
    tensors, text_length, layer, *, heads, weight=1.0, with_scalar=True, styled=True
):
    x, context = tensors["x"], tensors["context"]
    text, style = context[:, :text_length], context[:, text_length:]
    query = F.linear(x, tensors["attn.to_q.weight"])
    attended = attend(
        query,
        F.linear(text, tensors["attn.to_k.weight"]),
        F.linear(text, tensors["attn.to_v.weight"]),
        heads,
    )
    if styled:
        norm = torch.nn.LayerNorm(x.shape[-1])
        norm.load_state_dict(under(tensors, "processor.norm_style."))
        gain = weight * (1 + tensors["scale_scalar"][:, layer, 0] * with_scalar)
        block = BlockStyle(
            (F.linear(style, tensors["processor.to_k_style.weight"]),),
            (F.linear(style, tensors["processor.to_v_style.weight"]),),
            (),
            None,
            (scaled_norm(norm, gain),),
        )
        attended = attended + style_residual(query, block, heads)
    return F.linear(attended, tensors["attn.to_out.0.weight"], tensors["attn.to_out.0.bias"])


VIDEO = {
    "out_full": {},
    "out_no_scalar": {"with_scalar": False},
    "out_text_only": {"styled": False},
    "out_weight0p6": {"weight": 0.6},
}
SDXL = {
    "out_full": {},
    "out_text_only": {"styled": False},
    "out_scale0p5": {"weight": 0.5},
    "out_no_scalar_scale0p5": {"weight": 0.5, "with_scalar": False},
}
CASES = [("v4_dual_attn", 77, key, options) for key, options in VIDEO.items()]
CASES += [("x2_dual_attn", 77, key, options) for key, options in SDXL.items()]


@pytest.mark.parametrize(("name", "text_length", "key", "options"), CASES)
def test_dual_attention(name, text_length, key, options):
    tensors, meta = case(name)
    heads, layer = meta["cfg"]["heads"], meta["cfg"]["layer_idx"]
    value = dual_attention(tensors, text_length, layer, heads=heads, **options)
    assert close(value, tensors[key])
    if options != {"styled": False}:
        assert not close(value, tensors["out_text_only"], 1e-2)


@pytest.mark.parametrize("mistake", ["layer", "heads", "split", "norm", "logits"])
@pytest.mark.parametrize("name", ["v4_dual_attn", "x2_dual_attn"])
def test_mistakes_in_dual_attention_are_seen(name, mistake, monkeypatch):
    tensors, meta = case(name)
    heads, layer, text_length = meta["cfg"]["heads"], meta["cfg"]["layer_idx"], 77
    if mistake == "layer":
        layer += 1
    elif mistake == "heads":
        heads //= 2
    elif mistake == "split":
        text_length += 1
    elif mistake == "norm":
        monkeypatch.setattr(decoupled_attention, "style_norm", lambda x: x)
    else:  # the release's slip in its branch without xformers
        real = decoupled_attention.attend

        def unscaled(query, keys, values, num_heads):
            width = query.shape[-1] // num_heads
            return real(query * width**0.5, keys, values, num_heads)

        monkeypatch.setattr(decoupled_attention, "attend", unscaled)
    value = dual_attention(tensors, text_length, layer, heads=heads)
    assert not close(value, tensors["out_full"], 1e-3)
    if mistake == "logits" and name.startswith("v4"):
        assert close(value, tensors["out_fallback_UNSCALED_LOGITS"])


# ---- v6: guidance ----

VIDEO_DDIM = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False,
    "clip_sample": False,
}  # fmt: skip
BRANCHES = ("eps_uncond", "eps_text", "eps_text_style")


def test_guidance_of_paper_and_video_code():
    tensors, _ = case("v6_guidance_ddim")
    branches = [tensors[key] for key in BRANCHES]
    video = combine_guidance_video(*branches, text_scale=15.0, style_scale=7.5)
    assert close(video, tensors["expect.video_code"])
    assert close(video, tensors["video_eta1.eps_guided"], 1e-4)
    paper = combine_guidance(*branches, text_scale=15.0, style_scale=7.5)
    assert close(paper, tensors["expect.paper_eq2"])
    assert not close(paper, tensors["expect.video_code"], 1e-2)
    swapped = combine_guidance_video(*branches, text_scale=7.5, style_scale=15.0)
    assert not close(swapped, tensors["expect.video_code"], 1e-2)


@pytest.mark.parametrize(
    ("name", "eta"), [("video_eta1", 1.0), ("video_eta0", 0.0), ("image_eta1", 1.0)]
)
def test_a_guided_ddim_step_of_the_video_code(name, eta):
    tensors, meta = case("v6_guidance_ddim")
    scheduler = DDIMScheduler(**VIDEO_DDIM)
    scheduler.set_timesteps(meta["ddim_steps"])
    assert torch.equal(scheduler.timesteps.flip(0), tensors["ddim_timesteps"])
    branches = [tensors[key] for key in BRANCHES]
    if name.startswith("video"):
        eps = combine_guidance_video(*branches, text_scale=15.0, style_scale=7.5)
    else:  # plain guidance, by the prompt and the style together
        eps = combine_guidance(*branches, text_scale=6.0, style_scale=6.0)
    timestep = tensors["ddim_timesteps"][meta["index"]]
    noise = tensors["noise"] if eta else None
    step = scheduler.step(eps, timestep, tensors["x_t"], eta=eta, variance_noise=noise)
    assert close(step.prev_sample, tensors[f"{name}.x_prev"])
    assert close(step.pred_original_sample, tensors[f"{name}.pred_x0"])


def test_weights_of_guidance_are_its_formula():
    tensors, _ = case("v6_guidance_ddim")
    negative, text, styled = (tensors[key] for key in BRANCHES)
    for scales in ((7.5, 5.0), (7.5, 7.5), (5.0, 5.0)):
        weights = GuidanceWeights.of_stylecrafter(*scales)
        total = weights.negative * negative + weights.text * text + weights.styled * styled
        expected = combine_guidance(
            negative, text, styled, text_scale=scales[0], style_scale=scales[1]
        )
        assert close(total, expected)
    assert GuidanceWeights.of_stylecrafter(7.5, 0.0) == (1 - 7.5, 0.0, 7.5)


# ---- x3: a small SDXL UNet with the adapter ----


@pytest.fixture(scope="module")
def sdxl():
    tensors, meta = case("x3_sdxl_unet")
    unet = UNet2DConditionModel(**meta["cfg"]["unet"])
    unet.load_state_dict(under(tensors, "unet."))
    heads = [
        str(meta["cfg"]["adapter"][f"{name}_config"]["params"]["num_heads"])
        for name in ("image_context", "scale_predictor")
    ]
    metadata = dict(zip(("style_num_heads", "scale_num_heads"), heads, strict=True))
    adapter = load_stylecrafter_sdxl(under(tensors, "adapter."), metadata)
    return tensors, meta, unet.eval(), adapter


def conditions(tensors):
    return {
        "text": ImageText(tensors["prompt_embeds"], tensors["pooled"]),
        "negative_text": ImageText(tensors["negative_prompt_embeds"], tensors["negative_pooled"]),
        "time_ids": tensors["time_ids"],
    }


def style_of(adapter, tensors, scale):
    tokens = adapter.encoder(tensors["clip_features"])
    gains = adapter.gains(tensors["prompt_embeds"], tokens)
    return StyleRegion(tokens, scale, gains=gains), adapter.keys_values(tokens)


def prediction(sdxl, styled=True):
    tensors, _, unet, adapter = sdxl
    region, keys_values = style_of(adapter, tensors, 1.0)
    with torch.no_grad(), StyledUNet(unet) as host:
        if styled:
            host.set(layer_styles([region], [keys_values], tensors["latents"]), {})
        return unet(
            tensors["latents"],
            tensors["timestep"],
            tensors["prompt_embeds"],
            added_cond_kwargs={"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]},
        ).sample


def sampled(sdxl, text_scale, style_scale, **changes):
    tensors, _, unet, adapter = sdxl
    region, keys_values = style_of(adapter, tensors, 0.5)
    options = {"text_scale": text_scale, "style_scale": style_scale} | conditions(tensors)
    scheduler = EulerDiscreteScheduler(**SDXL_EULER)
    result = denoise_image(
        unet, scheduler, tensors["latents"], num_steps=3,
        regions=[dataclasses.replace(region, **changes)], keys_values=[keys_values], **options,
    )  # fmt: skip
    assert close(scheduler.sigmas, tensors["sampler_sigmas"])
    assert close(scheduler.timesteps, tensors["sampler_timesteps"])
    return result


SDXL_EULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1,
}  # fmt: skip
SAMPLED = "latents_after_3_euler_steps."


def test_encoder_of_the_small_adapter(sdxl):
    tensors, _, _, adapter = sdxl
    region, _ = style_of(adapter, tensors, 1.0)
    assert close(region.tokens, tensors["style_tokens"])
    assert close(region.gains - 1, tensors["scale_scalar"].squeeze(-1))


def test_layers_are_counted_as_in_the_release(sdxl):
    _, meta, unet, _ = sdxl
    assert cross_attentions(unet) == [layer["diffusers_attn"] for layer in meta["layer_order"]]


def test_one_prediction(sdxl):
    tensors = sdxl[0]
    assert close(prediction(sdxl), tensors["eps_text_style_scale1"])
    assert close(prediction(sdxl, styled=False), tensors["eps_text"])
    assert not close(tensors["eps_text"], tensors["eps_text_style_scale1"], 1e-2)


@pytest.mark.parametrize(
    ("key", "scales"), [("g7p5_s5", (7.5, 5.0)), ("g7p5_s0", (7.5, 0.0)), ("g5_s5", (5.0, 5.0))]
)
def test_three_guided_euler_steps(sdxl, key, scales):
    assert close(sampled(sdxl, *scales), sdxl[0][SAMPLED + key], 1e-4)


@pytest.mark.parametrize("mistake", ["order", "gains", "scale", "swapped", "range"])
def test_mistakes_on_the_unet_are_seen(sdxl, mistake, monkeypatch):
    scales, changes = (7.5, 5.0), {}
    if mistake == "order":  # middle before up, as the blocks are run
        monkeypatch.setattr(sdxl_unet, "PARTS", ("down_blocks.", "mid_block.", "up_blocks."))
        assert not close(prediction(sdxl), sdxl[0]["eps_text_style_scale1"], 1e-3)
    elif mistake == "gains":
        changes = {"gains": None}
    elif mistake == "scale":
        changes = {"scale": 0.55}
    elif mistake == "range":
        changes = {"end": 0.5}
    else:
        scales = (5.0, 7.5)
    assert not close(sampled(sdxl, *scales, **changes), sdxl[0][SAMPLED + "g7p5_s5"], 1e-3)
