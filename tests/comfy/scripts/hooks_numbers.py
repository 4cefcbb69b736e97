"""Velocities and samplings of the hooked native Wan: REFERENCE MOTION LORA -> RESULTS.

Results carry the names of what they must equal: `core.*` in REFERENCE, `02_dit_a/...`,
`03_controlnet_a/...` and `04_guidance/...` in the golden files, or `same.A/...` one another.
"""

import inspect
import json
from typing import Any

import comfy.sd
import torch
from comfy.context_windows import (
    ContextFuseMethods,
    ContextSchedules,
    IndexListContextHandler,
    get_matching_context_schedule,
    get_matching_fuse_method,
)
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from safetensors.torch import load_file, save_file
from scripts import golden_wan as wan

torch.set_grad_enabled(False)
reference_path, motion_path, lora_path, results_path = wan.arguments()
x = load_file(reference_path)
conditionings, patches = wan.pack("nodes.conditionings"), wan.pack("nodes.wan_patches")
Region = wan.pack("stylemaster_core.models.decoupled_attention").StyleRegion
weights = wan.golden("weights_dit_a")
adapter = wan.adapter(weights)
plain = wan.load_model(weights)
styled_model = patches.patch_style(plain, adapter)
network = wan.pack("nodes.native_wan").load_native_controlnet(wan.control_weights(weights))
SIGMA = 0.7
results: dict[str, torch.Tensor] = {}


def text(features: torch.Tensor) -> Any:
    return [[features, {}]]


def prepared(*regions: Any) -> Any:
    return conditionings.prepare_styles(regions, adapter)


def style(conditioning: Any, *regions: Any) -> Any:
    return conditionings.styled_conditioning(conditioning, prepared(*regions))


def unstyle(conditioning: Any, *regions: Any) -> Any:
    return conditionings.unstyled_conditioning(conditioning, prepared(*regions))


def control(conds: list[Any], latents: torch.Tensor) -> list[Any]:
    """Conditionings with a control; golden latents are normalised, nodes get a VAE's."""
    raw = plain.model.process_latent_out(latents)
    given = conditionings.create_control(conds[0], raw)
    return [conditionings.controlled_conditioning(c, given) for c in conds]


def golden_velocities() -> None:
    case, states = wan.golden("02_dit_a"), wan.golden("03_controlnet_a")
    region = Region(case["in.style_feat"])
    prompt = text(case["in.context"])

    class GivenStates(torch.nn.Module):
        """In place of the network: the golden states."""

        def __init__(self) -> None:
            super().__init__()
            self.zero_convs = torch.nn.ModuleList(torch.nn.Conv1d(256, 256, 1) for _ in range(2))
            self.control_blocks = self.zero_convs

        def forward(self, *_: Any, **__: Any) -> list[torch.Tensor]:
            return [case["in.control_state.0"], case["in.control_state.1"]]

    given = wan.comfy.model_patcher.ModelPatcher(
        GivenStates(), network.load_device, network.offload_device
    )
    with_states = patches.patch_control(styled_model, given, strength=0.7)
    with_network = patches.patch_control(styled_model, network)
    for i in (0, 1):
        sigma = case[f"in.timestep.{i}"].item() / 1000
        styled, zero = style(prompt, region), unstyle(prompt, region)
        (controlled,) = control([styled], states["in.control_latents"])
        for name, model, conditioning in (
            ("style", styled_model, styled),
            ("no_style", styled_model, prompt),
            ("zero_style", styled_model, zero),
            ("control", with_states, controlled),
        ):
            velocity = wan.velocity(model, conditioning, case["in.latents"], sigma)
            results[f"02_dit_a/out.{i}.velocity_{name}"] = velocity
        if i == 0:
            velocity = wan.velocity(with_network, controlled, case["in.latents"], sigma)
            results["03_controlnet_a/out.0.copied.velocity"] = velocity


def golden_guidance() -> None:
    case = wan.golden("04_guidance")
    region = Region(case["out.style_feat"])
    positive, negative = text(case["in.context_pos"]), text(case["in.context_neg"])
    conds = [style(positive, region), unstyle(positive, region), unstyle(negative, region)]
    described = json.loads((wan.GOLDEN / "04_guidance.json").read_text())["cases"]
    for name in ("t2v", "v2v", "v2v_window", "cfg1", "style0"):
        info, model, given = described[name], styled_model, conds
        scales = (info["cfg_scale"], info["style_cfg_scale"])
        if info.get("control"):
            options = {"start": info["start"], "end": info["end"], "strength": info["scale"]}
            model = patches.patch_control(styled_model, network, **options)
            given = control(conds, case["in.control_latents"])
        sigmas = torch.cat([case[f"out.{name}.sigmas"], torch.zeros(1)])
        final = wan.guided(model, tuple(given), scales, case["in.noise"], sigmas)
        results[f"04_guidance/out.{name}.final_latents"] = final


def stock_dual_guider() -> None:
    positive, negative = text(x["in.text"]), text(x["in.negative"])
    region = Region(x["in.tokens"])
    conds = (style(positive, region), unstyle(positive, region), unstyle(negative, region))
    ours = wan.guided(styled_model, conds, (5.0, 3.0), x["in.latents"], x["in.sigmas"])
    guider = Guider_DualCFG(styled_model)
    guider.set_conds(*conds)
    guider.set_cfg(3.0, 5.0)
    euler = wan.comfy.samplers.ksampler("euler")
    stock = wan.run_guider(guider, x["in.latents"], euler, x["in.sigmas"])
    results["same.dual/ours"] = ours
    results["same.dual/stock"] = plain.model.process_latent_in(stock)


def against_core() -> None:
    prompt = text(x["in.text"])
    a, b = x["in.tokens"], x["in.other_tokens"]
    scales = x["in.block_scales"].tolist()
    regions = {
        "mask": [Region(a, 0.8, mask=x["in.mask"])],
        "frame_mask": [Region(a, mask=x["in.frame_mask"])],
        "two_masks": [
            Region(a, 0.7, scales, x["in.mask"]),
            Region(b, 1.2, mask=x["in.frame_mask"]),
        ],
        "all_and_mask": [Region(a), Region(b, mask=x["in.frame_mask"])],
        "block_scales": [Region(a, 1.5, scales)],
    }
    for name, given in regions.items():
        conds = [unstyle(prompt, *given), style(prompt, *given)]
        unstyled, styled = wan.velocities(styled_model, conds, x["in.latents"], SIGMA)
        results[f"core.{name}"], results[f"core.{name}.unstyled"] = styled, unstyled
    first, second = regions["two_masks"]
    chained = style(style(prompt, first), second)
    results["same.chain/one by one"] = wan.velocity(styled_model, chained, x["in.latents"], SIGMA)
    results["same.chain/together"] = results["core.two_masks"]

    controlled = patches.patch_control(styled_model, network)
    (pair,) = control([style(prompt, Region(x["in.two_tokens"]))], x["in.two_control"])
    results["core.two_videos"] = wan.velocity(controlled, pair, x["in.two_latents"], SIGMA)

    one = style(prompt, Region(a))
    stored = wan.load_model(weights, torch.float8_e4m3fn, torch.float32)
    stored = patches.patch_style(stored, adapter)
    results["core.fp8"] = wan.velocity(stored, one, x["in.latents"], SIGMA)

    results["same.unloaded/before"] = wan.velocity(styled_model, one, x["in.latents"], SIGMA)
    lora, motion = load_file(lora_path), load_file(motion_path)
    for name, change, strength in (("lora", lora, 1.0), ("motion", motion, -0.3)):
        before, _ = comfy.sd.load_lora_for_models(plain, None, change, strength, 0)
        before = patches.patch_style(before, adapter)
        after, _ = comfy.sd.load_lora_for_models(styled_model, None, change, strength, 0)
        results[f"core.{name}"] = wan.velocity(before, one, x["in.latents"], SIGMA)
        results[f"same.{name}/before"] = results[f"core.{name}"]
        results[f"same.{name}/after"] = wan.velocity(after, one, x["in.latents"], SIGMA)
    results["same.unloaded/after"] = wan.velocity(styled_model, one, x["in.latents"], SIGMA)


def sampled_against_core() -> None:
    positive, negative = text(x["in.text"]), text(x["in.negative"])

    def conds(*regions: Any) -> list[Any]:
        return [
            style(positive, *regions),
            unstyle(positive, *regions),
            unstyle(negative, *regions),
        ]

    tokens = (x["in.tokens"], x["in.other_tokens"])
    ranges = ((0.0, 0.4), (0.6, 1.0))
    regions = [Region(t, start=s, end=e) for t, (s, e) in zip(tokens, ranges, strict=True)]
    results["core.ranges"] = wan.guided(
        styled_model, tuple(conds(*regions)), (5.0, 3.0), x["in.latents"], x["in.sigmas"]
    )
    controlled = patches.patch_control(styled_model, network, start=0.2, end=0.6)
    results["core.two_videos_sampled"] = wan.guided(
        controlled,
        tuple(control(conds(Region(x["in.two_tokens"])), x["in.two_control"])),
        (5.0, 3.0),
        x["in.two_latents"],
        x["in.sigmas"],
    )
    results["core.schedule"] = wan.guided(
        styled_model,
        tuple(conds(Region(x["in.tokens"]))),
        ([6.0, 1.0, 3.0, 3.0, 2.0], [4.0, 2.0]),
        x["in.latents"],
        x["in.sigmas"],
    )


LOOPED = (ContextSchedules.UNIFORM_LOOPED, {"context_length": 4, "closed_loop": True})
STATIC = (ContextSchedules.STATIC_STANDARD, {"context_length": 3})
ANCHORS = "causal_window_fix" in inspect.signature(IndexListContextHandler).parameters


def windows(per_frame: bool, schedule: str, options: dict[str, Any]) -> torch.Tensor:
    handler = IndexListContextHandler(
        get_matching_context_schedule(schedule),
        get_matching_fuse_method(ContextFuseMethods.FLAT),
        context_overlap=1,
        dim=2,
        **options,
    )
    model = patches.patch_control(styled_model, network)
    model.model_options["context_handler"] = handler
    mask = x["in.long_mask"] if per_frame else x["in.long_mask"][:1]
    regions = (
        Region(x["in.tokens"], mask=mask),
        Region(x["in.other_tokens"], 0.5, None, x["in.mask"]),
    )
    (conditioning,) = control([style(text(x["in.text"]), *regions)], x["in.long_control"])
    return wan.velocity(model, conditioning, x["in.long_latents"], SIGMA)


def all_windows() -> dict[str, str]:
    """Velocities with windows of each kind that this ComfyUI has; which masks it refused."""
    refused = {}
    for name, (schedule, options) in {"static": STATIC, "looped": LOOPED}.items():
        ways = {name: {"causal_window_fix": False}, f"{name}.anchored": {"causal_window_fix": True}}
        for way, anchor in (ways if ANCHORS else {name: {}}).items():
            for kind, per_frame in (("still_mask_windows", False), ("windows", True)):

                def run() -> None:
                    key = f"core.{kind}.{way}"  # noqa: B023
                    results[key] = windows(per_frame, schedule, options | anchor)  # noqa: B023

                if said := wan.error_of(run):
                    refused[f"core.{kind}.{way}"] = said
    return refused


golden_velocities()
golden_guidance()
stock_dual_guider()
against_core()
sampled_against_core()
facts: dict[str, Any] = {"anchors": ANCHORS, "refused": all_windows()}
facts["leftovers"] = wan.leftovers(plain)
save_file({key: value.clone() for key, value in results.items()}, results_path)
print(json.dumps(facts))
