"""StyleCrafter on VideoCrafter in ComfyUI: against the released code, the core, and treatment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.stylecrafter_sdxl import load_stylecrafter_video
from stylemaster_core.models.videocrafter_unet import load_videocrafter_unet
from stylemaster_core.sampling.denoise_video import denoise_video

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "stylecrafter"
UNET_TOLERANCE, SAMPLING_TOLERANCE = 3e-6, 1e-5
NUM_STEPS = 4


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "v5_unet.safetensors")


@pytest.fixture(scope="session")
def numbers(run_in_comfy, tmp_path_factory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    results = tmp_path_factory.mktemp("videocrafter") / "results.safetensors"
    script = HERE / "scripts" / "videocrafter_numbers.py"
    return (facts := run_in_comfy(script, results, NUM_STEPS)) and (load_file(results), facts)


@pytest.fixture(scope="session")
def results(numbers) -> dict[str, Tensor]:
    return numbers[0]


@pytest.fixture(scope="session")
def facts(numbers) -> dict[str, Any]:
    return numbers[1]


def deviation(value: Tensor, reference: Tensor) -> float:
    """Largest difference, as a part of the largest reference value."""
    assert value.shape == reference.shape
    return ((value - reference).abs().max() / reference.abs().max()).item()


def rows(video: Tensor) -> Tensor:
    return rearrange(video, "1 c t h w -> t c h w")


@pytest.mark.parametrize("key", ["eps_text", "eps_text_style", "eps_image_mode"])
def test_equals_the_released_code(golden, results, key):
    assert deviation(results[key], rows(golden[key])) <= UNET_TOLERANCE


def test_tokens_scales_and_features(golden, results, facts):
    assert deviation(results["style_tokens"], golden["style_tokens"]) <= UNET_TOLERANCE
    released = golden["scale_scalar"].squeeze(-1)[:, [0, 2, 3, 1]]  # in, out, out, middle
    assert deviation(results["scales"], released) <= UNET_TOLERANCE
    seen = load_file(GOLDEN / "v1_clip_features.safetensors")["features"]
    assert deviation(results["features"], seen) <= SAMPLING_TOLERANCE
    assert deviation(results["features.patches"], seen) > 1e-2
    assert facts["vision"] == [[], []]


def test_without_style_it_is_exactly_the_plain_model(results):
    assert torch.equal(results["eps_text.unstyled"], results["eps_text"])


@pytest.mark.parametrize(
    "mistake", ["logits", "positions", "init_attn", "norm", "upsampling", "gains"]
)
def test_mistakes_in_the_unet_are_seen(golden, results, mistake):
    assert deviation(results[f"wrong.{mistake}"], rows(golden["eps_text_style"])) > 1e-4


@pytest.fixture(scope="session")
def core(golden) -> dict[float, Tensor]:
    """The last guess of the clean latents by the core's sampling, by eta."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}

    heads = {"style_num_heads": "4", "scale_num_heads": "4"}
    adapter = load_stylecrafter_video(under("adapter."), heads)
    unet = load_videocrafter_unet(under("unet."))
    tokens, text = golden["style_tokens"], golden["context"]
    seen: dict[float, Tensor] = {}
    for eta in (0.0, 1.0):
        denoise_video(
            unet,
            rows(golden["x"]),
            num_steps=NUM_STEPS,
            text=text,
            negative_text=text.flip(1),
            regions=[StyleRegion(tokens, gains=adapter.gains(text, tokens))],
            keys_values=[adapter.keys_values(tokens)],
            text_scale=15.0,
            style_scale=7.5,
            eta=eta,
            generator=torch.Generator().manual_seed(2),  # as the script's
            callback=lambda step, denoised, eta=eta: seen.update({eta: denoised}),
        )
    return seen


@pytest.mark.parametrize(("name", "eta"), [("eta0", 0.0), ("eta1", 1.0)])
def test_stock_samplers_are_the_released_ddim(results, core, name, eta):
    """But for the last step, which ends at no noise here and at the least noise there."""
    assert deviation(results[f"sampled.{name}"], core[eta]) <= SAMPLING_TOLERANCE


def test_another_base_of_the_guidance_is_seen(results, core):
    assert deviation(results["wrong.base"], core[0.0]) > 1e-2
    assert len(results["sigmas"]) == NUM_STEPS + 1


@pytest.mark.parametrize(
    ("name", "tolerance"), [("restored", 0), ("batch", 1e-5), ("lora", 1e-5), ("unloaded", 0)]
)
def test_two_ways_give_the_same(results, name, tolerance):
    ways = [value for key, value in results.items() if key.startswith(f"same.{name}/")]
    assert len(ways) == 2
    assert deviation(*ways) <= tolerance


def test_a_lora_acts_on_spatial_and_temporal_layers(results):
    assert deviation(results["same.lora/loaded"], results["eps_text_style"]) > 0.01


def test_one_call_a_step_for_all_branches(facts):
    assert facts["calls"] == [3 * 4] * NUM_STEPS  # of four frames each


def test_interrupting_stops_after_the_step(facts):
    assert facts["interrupted"] == "InterruptProcessingException"
    assert facts["interrupted.steps"] == [0]


def test_half_precision_weights_are_used_widened(results, facts, golden):
    assert facts["half"] == ["torch.float16", "torch.float32"]
    assert 0 < deviation(results["half"], rows(golden["eps_text_style"])) < 1e-2


def test_names_are_those_of_the_release(facts):
    assert facts["keys"] == [] and facts["leftovers"] == []


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("crop", "ConfigError", ["only the crop center", "squash"]),
        ("sdxl_model", "UnsupportedHostError", ["SDXL", "Load VideoCrafter"]),
        ("sdxl_adapter", "UnsupportedHostError", ["VideoCrafter", "load an SDXL checkpoint"]),
        ("frames", "ConfigError", ["first_frame 2"]),
        ("missing", "WeightsError", ["1 missing: init_attn.0.norm.bias"]),
        ("temporal", "WeightsError", ["the temporal layers for this UNet"]),
    ],
)
def test_errors_say_what_came_and_what_to_do(facts, name, error, said):
    message = facts[f"error.{name}"]
    assert message.startswith(f"{error}: ")
    assert [part for part in said if part not in message] == []
