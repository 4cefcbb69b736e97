"""StyleCrafter's hooks on ComfyUI's native SDXL: against the released code, and bad treatment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.comfy.comparing import Numbers, compute, deviation

HERE = Path(__file__).parent
TOLERANCE = 1e-4
SAMPLED = "latents_after_3_euler_steps."


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(HERE.parent / "golden" / "stylecrafter" / "x3_sdxl_unet.safetensors")


@pytest.fixture(scope="session")
def numbers(run_in_comfy, tmp_path_factory) -> Numbers:
    folder = tmp_path_factory.mktemp("sdxl")
    return compute(run_in_comfy, folder, "sdxl_numbers.py")


@pytest.mark.parametrize(
    "key",
    [
        "style_tokens",
        "scale_scalar",
        "eps_text_style_scale1",
        *(f"{SAMPLED}{case}" for case in ("g7p5_s5", "g7p5_s0", "g5_s5")),
    ],
)
def test_equals_the_released_code(golden, results, key):
    assert deviation(results[key], golden[key]) < TOLERANCE


@pytest.mark.parametrize("name", ["positive", "no_style"])
def test_without_style_it_is_exactly_the_plain_model(golden, results, name):
    assert torch.equal(results[f"eps_text.{name}"], results["plain"])
    assert deviation(results["plain"], golden["eps_text"]) < TOLERANCE


def test_mistakes_are_seen(golden, results):
    eps = golden["eps_text_style_scale1"]
    assert deviation(golden["eps_text"], eps) > 0.01
    assert deviation(results["wrong.order.eps"], eps) > 0.001
    for mistake in ("order", "scale", "range"):
        sampled = results[f"wrong.{mistake}"]
        assert deviation(sampled, golden[SAMPLED + "g7p5_s5"]) > 0.001, mistake


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("outside", 1e-6),
        ("ones", 1e-6),
        ("two", 2e-6),
        ("touching", 1e-5),
        ("batch", 1e-5),
        ("mixed", 1e-5),
        ("lora", 1e-6),
        ("folded", 1e-5),
        ("unloaded", 0),
        ("foreign", 1e-6),
        ("off", 1e-6),
    ],
)
def test_two_ways_give_the_same(results, name, tolerance):
    """Ranges, masks, batches, a LoRA before, after and folded, another pack's patches."""
    ways = [value for key, value in results.items() if key.startswith(f"same.{name}/")]
    assert len(ways) == 2
    assert deviation(*ways) <= tolerance


def test_effects_are_large_enough_to_be_seen(results):
    styled, plain = results["eps_text_style_scale1"], results["plain"]
    for key in ("same.lora/after", "same.foreign/last", "half_masked", "same.two/ab"):
        assert deviation(results[key], styled) > 0.005, key
        assert deviation(results[key], plain) > 0.005, key
    assert deviation(results["foreign.plain"], plain) > 0.01


def test_one_call_a_step_for_all_branches(facts):
    assert facts["calls"] == [3, 3, 3]


def test_chains_with_another_packs_patches(facts):
    """One transformer block replaced, and both of the middle block."""
    assert facts["foreign.seen"] == 3


def test_nothing_is_left_behind(facts):
    assert facts["wrappers"] == 1
    assert facts["leftovers"] == []


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("wan", "UnsupportedHostError", ["WAN21", "load an SDXL checkpoint"]),
        ("style_on_wan", "UnsupportedHostError", ["SDXL", "load wan2.1_t2v_1.3B"]),
        ("layers", "WeightsError", ["11 cross-attentions", "MODEL has 10", "70"]),
        ("text", "WeightsError", ["text of width 24", "text of width 32"]),
        ("compiled", "UnsupportedHostError", ["TorchCompileModel", "take that node off"]),
        ("tokens", "LayoutError", ["[1, 16, 23]", "encode the style with the adapter"]),
        ("overlap", "ConfigError", ["at the same time", "mask"]),
        ("area", "UnsupportedHostError", ["area"]),
    ],
)
def test_errors_say_what_came_and_what_to_do(facts, name, error, said):
    message = facts[f"error.{name}"]
    assert message.startswith(f"{error}: ")
    assert [part for part in said if part not in message] == []


# ---- nodes -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def nodes(run_in_comfy) -> dict[str, Any]:
    return run_in_comfy(HERE / "scripts" / "sdxl_nodes.py")


def test_a_half_precision_file_stays_one_and_is_used_widened(nodes):
    assert nodes["stored"] == "torch.float16"
    assert 0 < nodes["from_half"] < 1e-3


def test_style_tokens_are_those_of_the_core(nodes):
    assert nodes["features"] == [2, 257, 40]
    assert nodes["picture"] == [2, 256, 256, 3]
    assert nodes["together"] < 2e-3  # the file's half precision
    for other in ("not_last", "mean", "other_picture"):
        assert nodes[other] > 0.02, other


def test_styles_act_through_apply_style(nodes):
    assert nodes["strength_0"] == nodes["listed"] == 0
    for change in ("effect", "second_style", "early", "chain"):
        assert nodes[change] > 0.05, change


def test_projections_are_let_go(nodes):
    """Only keys, values and norms stay, none of them a view of the adapter's file."""
    assert nodes["freed"]
    assert nodes["kept_layers"] == 11 and nodes["views"] == 0


def test_widened_projections_leave_no_memory_behind(run_in_comfy):
    """Of 30 layers 5 MB stay; it was 611 MB when a copy of each was made and freed."""
    assert run_in_comfy(HERE / "scripts" / "sdxl_memory.py")["left_behind"] < 20e6


def test_scales_are_shown(nodes):
    assert nodes["shown"] == [1, 320, 768, 3]
    assert nodes["long_prompt"] and not nodes["same_scales"]


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("wan", "UnsupportedHostError", ["WAN21", "load an SDXL checkpoint"]),
        ("sd15", "UnsupportedHostError", ["SD15", "load an SDXL checkpoint"]),
        ("flux", "UnsupportedHostError", ["Flux", "load an SDXL checkpoint"]),
        ("stylemaster", "UnsupportedHostError", ["SDXL", "load wan2.1_t2v_1.3B"]),
        ("vision", "LayoutError", ["[1, 257, 48]", "CLIP ViT-H/14"]),
        ("style", "LayoutError", ["[1, 16, 8]", "encode the style with the adapter"]),
        ("text", "LayoutError", ["[1, 77, 40]", "use the base model"]),
        ("frames", "ConfigError", ["first_frame 2", "leave them at 0 and -1"]),
        ("masks", "LayoutError", ["3 masks", "give one"]),
        ("strength", "ConfigError", ["must not be negative"]),
        ("layers", "ConfigError", ["0 to 10"]),
        ("mode", "ConfigError", ["mode paper", "use mode all"]),
        ("keep", "ConfigError", ["keep 15"]),
        ("clip_prompt", "ConfigError", ["clip_prompt"]),
        ("scales", "ConfigError", ["predicts no scales", "link a StyleCrafter adapter"]),
        ("file", "WeightsError", ["models/stylemaster", "models/stylecrafter"]),
    ],
)
def test_nodes_say_what_came_and_what_to_do(nodes, name, error, said):
    message = nodes[f"error.{name}"]
    assert message.startswith(f"{error}: ")
    assert [part for part in said if part not in message] == []


def test_a_missing_style_is_named(comfy_server):
    text = {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["clip", 0]}}
    adapter = {"adapter_name": "stylecrafter_sdxl.safetensors"}
    result = comfy_server.run_prompt(
        {
            "clip": {"class_type": "StubTextEncoderLoader", "inputs": {}},
            "prompt": text,
            "adapter": {"class_type": "StyleMasterAdapterLoader", "inputs": adapter},
            "scales": {
                "class_type": "StyleMasterShowScales",
                "inputs": {"adapter": ["adapter", 0], "prompt": ["prompt", 0]},
            },
            "out": {"class_type": "PreviewImage", "inputs": {"images": ["scales", 0]}},
        }
    )
    assert result.status == "rejected"
    said = [(e["type"], e["details"]) for e in result.error["node_errors"]["scales"]["errors"]]
    assert ("required_input_missing", "style") in said
