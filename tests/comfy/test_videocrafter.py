"""StyleCrafter on VideoCrafter in ComfyUI: against the released code, the core, and treatment."""

from __future__ import annotations

import copy
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
from stylemaster_core.training.config import override, read_config
from stylemaster_core.training.trainer import TrainedFile, Trainer
from stylemaster_core.training.videocrafter import (
    create_videocrafter_adapter_trainer,
    create_videocrafter_temporal_trainer,
)
from tests.comfy import small_models
from tests.comfy.comparing import Numbers, compute, deviation
from tests.comfy.shipped_workflows import VIDEOCRAFTER, small, write_inputs, write_models

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "stylecrafter"
UNET_TOLERANCE, SAMPLING_TOLERANCE = 3e-6, 1e-5
NUM_STEPS = 4


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "v5_unet.safetensors")


@pytest.fixture(scope="session")
def numbers(run_in_comfy, tmp_path_factory) -> Numbers:
    folder = tmp_path_factory.mktemp("videocrafter")
    return compute(run_in_comfy, folder, "videocrafter_numbers.py", NUM_STEPS)


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


# ---- stock nodes on a server ----

STEPS = 3


@pytest.fixture(scope="module")
def comfy(comfy_server, comfy_models) -> Any:
    """The server, with the models that the template names and LoRAs for its UNet."""
    write_models(comfy_models)
    write_inputs(comfy_server.input_dir)
    unet = load_file(comfy_models / "diffusion_models" / "videocrafter_t2v_512_unet.safetensors")
    for name, place in {"spatial": 1, "temporal": 2}.items():
        key = f"input_blocks.1.{place}.transformer_blocks.0.attn1.to_q.weight"
        rows, columns = unet[key].shape
        draw = torch.Generator().manual_seed(6)
        layer = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        lora = {
            f"{layer}.lora_up.weight": torch.randn(rows, 2, generator=draw),
            f"{layer}.lora_down.weight": torch.randn(2, columns, generator=draw),
            f"{layer}.alpha": torch.tensor(2.0),
        }
        small_models.save(lora, comfy_models / "loras" / f"videocrafter_{name}.safetensors")
    for name, file in trained_files(unet).items():
        small_models.save(file.tensors, comfy_models / "stylecrafter" / name, file.metadata)
    return comfy_server


def trained_files(unet: dict[str, Tensor]) -> dict[str, TrainedFile]:
    """What the trainers of both stages write, of weights that were moved at random."""
    more = ["run.precision=float32", "stylecrafter.num_layers=1", "stylecrafter.scale_num_layers=1"]
    first, second = (override(read_config(f"videocrafter-{n}"), more) for n in ("images", "clips"))
    features = {"patch_features": (257, small_models.CLIP_WIDTH)}
    adapter = moved(create_videocrafter_adapter_trainer(first, unet, features))
    temporal = moved(create_videocrafter_temporal_trainer(second, unet, adapter.tensors))
    return {"trained_adapter.safetensors": adapter, "trained_temporal.safetensors": temporal}


def moved(trainer: Trainer) -> TrainedFile:
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.trained().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    (file,) = trainer.outputs()
    return file


def with_samplers(**samplers: dict[str, Any]) -> dict[str, Any]:
    """The template up to Apply Style, and KSamplers on what it gives, with some inputs changed."""
    shipped = small(VIDEOCRAFTER)
    by_class = {node["class_type"]: key for key, node in shipped.items()}
    ends = ("SaveVideo", "PreviewImage")
    workflow = {key: node for key, node in shipped.items() if node["class_type"] not in ends}
    styled = by_class["StyleMasterApplyStyle"]
    inputs = {
        "model": [styled, 0],
        "positive": [styled, 1],
        "negative": [styled, 3],
        "latent_image": [by_class["EmptyLatentImage"], 0],
        "seed": 1,
        "steps": STEPS,
        "cfg": 4.0,
        "sampler_name": "euler_ancestral",
        "scheduler": "ddim_uniform",
        "denoise": 1.0,
    }
    for name, changes in samplers.items():
        workflow[name] = {"class_type": "KSampler", "inputs": inputs | changes}
    return workflow


def compare(a: str, b: str) -> dict[str, Any]:
    return {"class_type": "StubCompare", "inputs": {"a": [a, 0], "b": [b, 0]}}


def lora_on(model: str, name: str, strength: float) -> dict[str, Any]:
    inputs = {"model": [model, 0], "lora_name": f"videocrafter_{name}.safetensors"}
    return {"class_type": "LoraLoaderModelOnly", "inputs": inputs | {"strength_model": strength}}


def test_the_stock_sampler_runs_it_with_previews_style_and_loras(comfy):
    workflow = with_samplers(
        styled={},
        again={"denoise": 0.999999},  # an equal input would be answered from the cache
        seed={"seed": 2},
        unstyled={"positive": ["13", 2]},
        temporal={"model": ["with temporal", 0]},
        spatial={"model": ["with spatial", 0]},
        off={"model": ["without", 0]},
    )
    assert workflow["13"]["class_type"] == "StyleMasterApplyStyle"
    for name in ("again", "seed", "unstyled", "temporal", "spatial", "off"):
        workflow[f"as {name}"] = compare(name, "styled")
    workflow |= {
        "with temporal": lora_on("13", "temporal", 1.0),
        "with spatial": lora_on("13", "spatial", 1.0),
        "without": lora_on("13", "spatial", 0.0),
    }
    seen = []
    result = comfy.run_prompt(workflow, on_preview=seen.append)
    assert result.status == "success", result.error
    assert result.previews >= STEPS * 7 and all(data[:2] == b"\xff\xd8" for data in seen)
    said = {name.removeprefix("as "): out for name, out in result.outputs.items()}
    size = said["seed"]["max_value"][0]
    difference = {name: out["max_difference"][0] / size for name, out in said.items()}
    print(difference)
    assert said["again"]["shape"] == [[5, 4, 8, 8]]
    assert difference["again"] == difference["off"] == 0
    for name in ("seed", "unstyled", "temporal", "spatial"):
        assert difference[name] > 1e-3, name


def test_an_interrupt_ends_the_stock_sampler_and_the_next_run_is_whole(comfy):
    endless = with_samplers(first={"steps": 900}) | {"out": compare("first", "first")}

    def on_event(kind: str, _data: Any) -> None:
        if kind == "progress":
            comfy.interrupt()

    result = comfy.run_prompt(endless, on_event=on_event)
    assert result.status == "interrupted"
    after = comfy.run_prompt(with_samplers(whole={}) | {"out": compare("whole", "whole")})
    assert after.status == "success", after.error


def test_the_files_of_the_trainers_load_and_act(comfy):
    workflow = with_samplers(
        shipped={"positive": ["13", 2]},
        unstyled={"model": ["own 13", 0], "positive": ["own 13", 2], "negative": ["own 13", 3]},
        styled={"model": ["own 13", 0], "positive": ["own 13", 1], "negative": ["own 13", 3]},
    )
    for number in ("1", "5", "10", "13"):  # model, adapter, style, Apply Style
        copied = copy.deepcopy(workflow[number])
        for value in copied["inputs"].values():
            if isinstance(value, list) and value[0] in ("1", "5", "10"):
                value[0] = f"own {value[0]}"
        workflow[f"own {number}"] = copied
    workflow["own 1"]["inputs"]["temporal_name"] = "trained_temporal.safetensors"
    workflow["own 5"]["inputs"]["adapter_name"] = "trained_adapter.safetensors"
    workflow |= {"layers": compare("unstyled", "shipped"), "style": compare("styled", "unstyled")}
    result = comfy.run_prompt(workflow)
    assert result.status == "success", result.error
    for name in ("layers", "style"):
        seen = result.outputs[name]
        assert seen["max_difference"][0] > 1e-3 * seen["max_value"][0], name
