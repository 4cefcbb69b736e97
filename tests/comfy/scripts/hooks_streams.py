"""Tokens behind those of the video: style and control leave them alone. Argument: REFERENCE.

Models that look at a source video or at pictures put their tokens behind the video's. What they
must give with a style and a control is written out here on the plain model.
"""

import inspect
import json
from typing import Any

import comfy.ldm.wan.model
import torch
from safetensors.torch import load_file
from scripts import golden_wan as wan
from torch import Tensor

torch.set_grad_enabled(False)
x = load_file(wan.arguments()[0])
core = wan.pack("stylemaster_core.models.decoupled_attention")
conditionings, patches = wan.pack("nodes.conditionings"), wan.pack("nodes.wan_patches")
Region = core.StyleRegion
weights = wan.golden("weights_dit_a")
adapter = wan.adapter(weights)
plain = wan.load_model(weights)
network = wan.pack("nodes.native_wan").load_native_controlnet(wan.control_weights(weights))
net = plain.model.diffusion_model
SIGMA = 0.7
z = x["in.latents"]
GRID = (z.shape[2], z.shape[3] // 2, z.shape[4] // 2)
TOKENS = GRID[0] * GRID[1] * GRID[2]
CONTEXT_LATENTS = "context_latents" in inspect.getsource(comfy.ldm.wan.model)
source = plain.model.process_latent_out(x["in.two_latents"][:1])
picture = plain.model.process_latent_out(x["in.two_latents"][1:, :, :1, :4, :6])


def style_of_block(query: Tensor, region: Any, block: int, heads: int) -> Tensor:
    """The style's attention at the video's tokens, "no style" where its mask is 0."""
    kv, none = adapter(region), adapter.no_style([region])
    style = core.attend(query, kv.keys[block], kv.values[block], heads)
    if region.mask is None:
        return style
    weight, rest = core.region_masks([region], GRID)
    return weight * style + rest * none[block]


def written_out(region: Any, states: list[Tensor] | None) -> Any:
    """The plain model with a style, and control after the even blocks, on the first tokens."""
    model = plain.clone()
    for number in range(len(net.blocks)):
        path = f"diffusion_model.blocks.{number}"
        attention = model.get_model_object(f"{path}.cross_attn")

        def attend(
            hidden: Tensor,
            context: Tensor,
            *,
            module: Any = attention,
            block: int = number,
            **_: Any,
        ) -> Tensor:
            query = module.norm_q(module.q(hidden))
            keys, values = module.norm_k(module.k(context)), module.v(context)
            out = core.attend(query, keys, values, module.num_heads)
            style = style_of_block(query[:, :TOKENS], region, block, module.num_heads)
            out[:, :TOKENS] += style
            return module.o(out)

        model.add_object_patch(f"{path}.cross_attn.forward", attend)
        if states is not None and number % 2 == 0:
            whole = model.get_model_object(path)

            def run(*args: Any, module: Any = whole, block: int = number, **kwargs: Any) -> Tensor:
                hidden = type(module).forward(module, *args, **kwargs)
                hidden[:, :TOKENS] += states[block // 2]
                return hidden

            model.add_object_patch(f"{path}.forward", run)
    return model


def deviation(options: dict[str, Any], region: Any, controlled: bool) -> dict[str, float]:
    """Of our hooks from what is written out; and how much the streams and the style matter."""
    prompt = [[x["in.text"], options]]
    model = patches.patch_style(plain, adapter)
    styled = conditionings.styled_conditioning(
        prompt, conditionings.prepare_styles([region], adapter)
    )
    states = None
    if controlled:
        model = patches.patch_control(model, network)
        raw = plain.model.process_latent_out(x["in.control"])
        control = conditionings.create_control(prompt, raw)
        styled = conditionings.controlled_conditioning(styled, control)
        sigma = torch.tensor([SIGMA])
        states = network.model(
            x["in.control"], plain.model.model_sampling.timestep(sigma).float(), x["in.text"],
            dtype=torch.float32,
        )  # fmt: skip
    ours = wan.velocity(model, styled, z, SIGMA)
    expected = wan.velocity(written_out(region, states), prompt, z, SIGMA)
    alone = wan.velocity(
        model, [[x["in.text"], {"model_conds": styled[0][1]["model_conds"]}]], z, SIGMA
    )
    return {
        "deviation": wan.relative(ours, expected),
        "effect_of_streams": wan.relative(ours, alone),
        "effect_of_style": wan.relative(ours, wan.velocity(plain, prompt, z, SIGMA)),
    }


streams: dict[str, dict[str, Any]] = {
    "time_dim_concat": {"time_dim_concat": source},
}
if CONTEXT_LATENTS:
    streams["context_latents"] = {"context_latents": [source, picture]}
facts: dict[str, Any] = {}
for stream, options in streams.items():
    for name, region, controlled in (
        ("style", Region(x["in.tokens"]), False),
        ("still mask", Region(x["in.tokens"], mask=x["in.mask"]), False),
        ("moving mask and control", Region(x["in.tokens"], mask=x["in.frame_mask"]), True),
    ):
        try:
            facts[f"{stream}: {name}"] = deviation(options, region, controlled)
        except Exception as error:  # noqa: BLE001
            facts[f"{stream}: {name}"] = f"{type(error).__name__}: {error}"
facts["leftovers"] = wan.leftovers(plain)
print(json.dumps(facts))
