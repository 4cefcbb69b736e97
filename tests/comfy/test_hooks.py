"""The hooks on ComfyUI's native Wan: against the released code, the core, and bad treatment.

The core runs here and ComfyUI in its own process; files carry the numbers between them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.comfy import features_table, hook_cases
from tests.comfy.comparing import deviation

SCRIPTS = Path(__file__).parent / "scripts"
# ComfyUI computes the timestep's sinusoid in float32, the core in float64: 2e-6 to 4e-6.
TOLERANCE = 1e-5
GOLDEN_CASES = [
    *(
        f"02_dit_a/out.{index}.velocity_{name}"
        for index in (0, 1)
        for name in ("style", "no_style", "zero_style", "control")
    ),
    "03_controlnet_a/out.0.copied.velocity",
    *(
        f"04_guidance/out.{name}.final_latents"
        for name in ("t2v", "v2v", "v2v_window", "cfg1", "style0")
    ),
]
REGION_CASES = ["mask", "frame_mask", "two_masks", "all_and_mask", "block_scales"]
CORE_CASES = [
    *REGION_CASES,
    *(f"{name}.unstyled" for name in REGION_CASES),
    "two_videos",
    "two_videos_sampled",
    "fp8",
    "lora",
    "motion",
    "ranges",
    "schedule",
]


@pytest.fixture(scope="session")
def reference(golden, tmp_path_factory) -> tuple[dict[str, Tensor], list[Path]]:
    """Inputs with the core's results, and the files that carry them into ComfyUI."""
    folder = tmp_path_factory.mktemp("reference")
    paths = [folder / f"{name}.safetensors" for name in ("reference", "motion", "lora")]
    parts = hook_cases.make_results(golden)
    for tensors, path in zip(parts, paths, strict=True):
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return parts[0], paths


@pytest.fixture(scope="session")
def numbers(run_in_comfy, reference, tmp_path_factory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    results = tmp_path_factory.mktemp("results") / "results.safetensors"
    facts = run_in_comfy(SCRIPTS / "hooks_numbers.py", *reference[1], results)
    return load_file(results), facts


@pytest.fixture(scope="session")
def facts(run_in_comfy, reference) -> dict[str, Any]:
    return run_in_comfy(SCRIPTS / "hooks_behaviour.py", reference[1][0])


# ---- numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_equals_the_released_code(golden, numbers, name):
    file, key = name.split("/")
    golden(file).check(key, numbers[0][name])


@pytest.mark.parametrize("name", CORE_CASES)
def test_equals_the_core(reference, numbers, name):
    assert deviation(numbers[0][f"core.{name}"], reference[0][f"core.{name}"]) < TOLERANCE


@pytest.mark.parametrize("name", ["chain", "dual", "lora", "motion", "unloaded"])
def test_two_ways_give_the_same(numbers, name):
    """Styles one by one, ComfyUI's own guider, LoRA before and after, a LoRA come and gone."""
    ways = [value for key, value in numbers[0].items() if key.startswith(f"same.{name}/")]
    assert len(ways) == 2
    assert deviation(*ways) < 2e-6


@pytest.mark.parametrize("name", hook_cases.WINDOWS)
def test_masks_and_control_follow_the_context_window(reference, numbers, comfy_checkout, name):
    """Windows with and without the frame that newer versions put before them; one that wraps."""
    results, facts = numbers
    if name.endswith(".anchored") and not facts["anchors"]:
        pytest.skip(f"ComfyUI {comfy_checkout.version} puts no frame before a window")
    still, moving = f"core.still_mask_windows.{name}", f"core.windows.{name}"
    assert facts["refused"].get(still) is None
    assert deviation(results[still], reference[0][still]) < TOLERANCE
    if comfy_checkout.version == "0.3.64":
        said = facts["refused"][moving]
        assert "update it to 0.8.0, or use a mask of one frame" in said
    else:
        assert facts["refused"].get(moving) is None
        assert deviation(results[moving], reference[0][moving]) < TOLERANCE
    assert deviation(reference[0][moving], reference[0][still]) > 0.05


def test_numbers_leave_nothing_behind(numbers):
    assert numbers[1]["leftovers"] == []


# ---- behaviour --------------------------------------------------------------------------------


def test_effects_are_large_enough_to_be_seen(facts):
    for name in ("style_effect", "control_effect", "at_end", "foreign.plain_effect"):
        assert facts[name] > 0.1, name


@pytest.mark.parametrize(
    "name", ["no_keys", "control_strength_0", "control_without_keys", "beyond_end"]
)
def test_exactly_the_plain_model(facts, name):
    assert facts[name] == 0


def test_strength_0_is_exactly_the_plain_model(facts):
    assert facts["strength_0"] == [0, 0, 0]


def test_both_styles_act_where_their_ranges_touch(facts):
    assert facts["touching"] < 1e-6


@pytest.mark.parametrize(
    ("name", "rows", "network"),
    [
        ("three", 3, [1] * 3),
        ("two", 2, [1] * 3),
        ("one", 1, [1] * 3),
        ("two_videos_one_control", 6, [1] * 3),
        ("two_videos", 6, [2] * 3),
        ("regions", 3, None),
    ],
)
def test_one_call_a_step_for_all_branches(facts, name, rows, network):
    """Of 5 steps, 0.0, 0.2 and 0.4 lie in the control's range to 0.4."""
    assert facts[f"calls.{name}"] == [rows] * 5
    if network is not None:
        assert facts[f"network.{name}"] == network


def test_chains_with_another_packs_forward(facts):
    assert facts["foreign.seen"] == 3
    assert facts["foreign.order"] == 0
    assert facts["foreign.written_out"] < 2e-6
    assert facts["foreign.taken_off"] == 0


def test_an_error_in_the_middle_leaves_the_modules_alone(facts):
    assert facts["failure"].startswith("ZeroDivisionError")
    assert facts["failure.leftovers"] == []
    assert facts["failure.afterwards"] == 0
    assert facts["leftovers"] == []


def test_an_interrupt_ends_the_sampling_at_the_next_call(facts):
    assert facts["interrupt"].startswith("InterruptProcessingException")
    assert facts["interrupt.calls"] == 2


def test_clones(facts):
    assert facts["wrappers_after_twice"] == 1
    assert facts["clone"] == 0
    assert facts["unpatched_clone"] == 0
    assert facts["wrapper_holds"] == ["function", "str"]


def test_post_cfg_functions_are_called(facts):
    assert facts["post_cfg_calls"] == 5


def test_memory_for_the_states_is_reserved(facts):
    """One more video's worth, for states smaller than what the model needs for one."""
    assert facts["reserved"] == [[2, 16, *hook_cases.SIZE]]


def test_bfloat16_lies_near_float32(facts):
    assert 0 < facts["bfloat16"] < 0.03


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("in_dim", "UnsupportedHostError", ["36 input channels", "load wan2.1_t2v_1.3B"]),
        ("width", "WeightsError", ["width 256", "width 512", "load the Wan model"]),
        ("blocks", "WeightsError", ["3 blocks", "4 blocks", "load the Wan model"]),
        ("control_width", "WeightsError", ["width 256", "width 512"]),
        ("control_blocks", "WeightsError", ["2 blocks", "MODEL's 1"]),
        ("control_range", "ConfigError", ["0.7 to 0.2"]),
        ("control_twice", "ConfigError", ["already"]),
        ("wrong_model", "WeightsError", ["3 blocks", "MODEL has 4"]),
        ("control_size", "LayoutError", ["[3, 8, 8]", "[3, 8, 10]", "make the gray tile"]),
        ("control_channels", "LayoutError", ["[1, 4, 3, 8, 10]", "Wan 2.1 VAE"]),
        ("overlap", "ConfigError", ["at the same time", "mask"]),
        ("style_batch", "LayoutError", ["2 videos", "batch of 1"]),
        ("mask_and_area", "UnsupportedHostError", ["area"]),
        ("empty_schedule", "ConfigError", ["[]"]),
        ("text_cfg_0", "ConfigError", ["above 0"]),
    ],
)
def test_errors_say_what_came_and_what_to_do(facts, name, error, said):
    message = facts[f"error.{name}"]
    assert message.startswith(f"{error}: ")
    assert [part for part in said if part not in message] == []


# ---- other tokens than the video's ------------------------------------------------------------


def test_tokens_behind_the_videos_get_no_style_and_no_control(run_in_comfy, reference):
    """Of Bernini's source video and pictures, where ComfyUI has it, and of Phantom's."""
    facts = run_in_comfy(SCRIPTS / "hooks_streams.py", reference[1][0])
    assert facts.pop("leftovers") == []
    assert len(facts) in (3, 6)
    for name, found in facts.items():
        assert isinstance(found, dict), (name, found)
        assert found["deviation"] < TOLERANCE, name
        assert found["effect_of_streams"] > 0.05, name
        assert found["effect_of_style"] > 0.05, name


# ---- what else ComfyUI offers ------------------------------------------------------------------


@pytest.fixture(scope="session")
def features(run_in_comfy, reference) -> dict[str, Any]:
    return run_in_comfy(SCRIPTS / "hooks_features.py", reference[1][0])


@pytest.mark.parametrize("name", features_table.ACTING)
def test_the_style_acts_beside(features, comfy_checkout, name):
    found = features[name]
    if str(found).startswith("absent"):
        pytest.skip(f"ComfyUI {comfy_checkout.version} has none")
    assert isinstance(found, dict), found
    assert found["finite"]
    assert found["style"] > 0.05
    if features_table.ACTING[name] == "changes":
        assert found["feature"] > 1e-3
    elif features_table.ACTING[name] == "skips":
        assert found["calls"] < 12
    else:
        assert found["feature"] < 1e-5


def test_models_that_keep_keys_and_values_of_the_text_are_refused(features):
    found = features["CausalAR models"]
    if not found.startswith("absent"):
        assert found.startswith("UnsupportedHostError") and "load wan2.1_t2v_1.3B" in found


def test_a_clone_for_another_gpu_has_a_control_of_its_own(features):
    found = features.get("cloned control")
    if found is None:
        pytest.skip("this ComfyUI makes no clones for other GPUs")
    assert found["own_network"]
    assert found["difference"] < 1e-6 < 0.05 < found["control"]


# ---- torch.compile -------------------------------------------------------------------------------


def test_compiled(run_in_comfy, reference):
    """Style, mask and control go on and off under ComfyUI's compile wrapper, in either order."""
    facts = run_in_comfy(SCRIPTS / "hooks_compile.py", reference[1][0])
    assert facts.pop("leftovers") == []
    assert set(facts) == {"compiled first", "hooked first", "blocks"}
    for name, runs in facts.items():
        seen = set()
        for kind, sigma, difference, graphs in runs:
            assert difference == 0, (name, kind, sigma)
            shape = "style" if kind == "other style" else kind
            # Another style, strength or step compiles nothing; only the first of a kind may.
            if shape in seen:
                assert graphs == 0, (name, kind, sigma)
            seen.add(shape)
        assert runs[0][3] > 0  # it did compile


def test_reference_is_not_trivial(reference):
    tensors = reference[0]
    for name in REGION_CASES:
        styled, unstyled = tensors[f"core.{name}"], tensors[f"core.{name}.unstyled"]
        assert deviation(styled, unstyled) > 0.1, name
    assert torch.isfinite(torch.cat([t.flatten() for t in tensors.values()])).all()
