"""What the hooks do besides numbers; prints facts as JSON. Argument: REFERENCE (inputs)."""

import json
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import load_file
from scripts import golden_wan as wan

torch.set_grad_enabled(False)
x = load_file(wan.arguments()[0])
core = wan.pack("stylemaster_core.models.decoupled_attention")
conditionings, patches = wan.pack("nodes.conditionings"), wan.pack("nodes.wan_patches")
Region = core.StyleRegion
weights = wan.golden("weights_dit_a")
adapter = wan.adapter(weights)
plain = wan.load_model(weights)
styled_model = patches.patch_style(plain, adapter)
network = wan.pack("nodes.native_wan").load_native_controlnet(wan.control_weights(weights))
SIGMA = 0.7
positive, negative = [[x["in.text"], {}]], [[x["in.negative"], {}]]
z = x["in.latents"]
facts: dict[str, Any] = {}


def three(*regions: Any) -> tuple[Any, Any, Any]:
    prepared = conditionings.prepare_styles(regions, adapter)
    return (
        conditionings.styled_conditioning(positive, prepared),
        conditionings.unstyled_conditioning(positive, prepared),
        conditionings.unstyled_conditioning(negative, prepared),
    )


def controlled(conds: Any, latents: torch.Tensor) -> tuple[Any, ...]:
    control = conditionings.create_control(positive, plain.model.process_latent_out(latents))
    return tuple(conditionings.controlled_conditioning(c, control) for c in conds)


def at_once(model: Any, conds: Any) -> torch.Tensor:
    return wan.velocity(model, conds, z, SIGMA)


conds = three(Region(x["in.tokens"]))
expected = at_once(styled_model, conds[0])
without = at_once(plain, positive)
facts["style_effect"] = wan.relative(expected, without)


def exactness() -> None:
    zero = three(Region(x["in.tokens"], 0.0))
    facts["strength_0"] = [
        wan.relative(at_once(styled_model, conditioning), at_once(plain, text))
        for conditioning, text in zip(zero, (positive, positive, negative), strict=True)
    ]
    facts["no_keys"] = wan.relative(at_once(styled_model, positive), without)
    both = controlled(conds, x["in.control"])
    off = patches.patch_control(styled_model, network, strength=0.0)
    facts["control_strength_0"] = wan.relative(at_once(off, both[0]), expected)
    on = patches.patch_control(styled_model, network)
    facts["control_effect"] = wan.relative(at_once(on, both[0]), expected)
    facts["control_without_keys"] = wan.relative(at_once(on, conds[0]), expected)


def batching() -> None:
    """Calls of the transformer and the network: once a step whatever the number of branches."""
    calls: list[int] = []
    runs: list[int] = []
    hook = network.model.register_forward_hook(lambda _, inputs, __: runs.append(len(inputs[0])))
    model = wan.watched(patches.patch_control(styled_model, network, end=0.4), calls)
    for name, latents, control, scales in (
        ("three", z, x["in.control"], (5.0, 3.0)),
        ("two", z, x["in.control"], (5.0, 5.0)),
        ("one", z, x["in.control"], (1.0, 3.0)),
        ("two_videos_one_control", x["in.two_latents"], x["in.control"], (5.0, 3.0)),
        ("two_videos", x["in.two_latents"], x["in.two_control"], (5.0, 3.0)),
    ):
        calls.clear()
        runs.clear()
        wan.guided(model, controlled(conds, control), scales, latents, x["in.sigmas"])
        facts[f"calls.{name}"], facts[f"network.{name}"] = list(calls), list(runs)
    hook.remove()
    calls.clear()
    regions = three(
        Region(x["in.tokens"], end=0.3), Region(x["in.other_tokens"], mask=x["in.frame_mask"])
    )
    wan.guided(wan.watched(styled_model, calls), regions, (5.0, 3.0), z, x["in.sigmas"])
    facts["calls.regions"] = list(calls)


def foreign_patches() -> None:
    """Another pack's forward on a cross-attention, put on before or after ours."""
    path = "diffusion_model.blocks.1.cross_attn"
    module = plain.get_model_object(path)
    seen = []

    def foreign(hidden: torch.Tensor, context: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.append(1)
        return 1.5 * type(module).forward(module, hidden, context, **kwargs)

    class Doubled(type(module)):
        """What the two together must give, written out."""

        def forward(
            self, hidden: torch.Tensor, context: torch.Tensor, **kwargs: Any
        ) -> torch.Tensor:
            query = self.norm_q(self.q(hidden))
            region = Region(x["in.tokens"])
            kv = adapter(region)
            style = core.attend(query, kv.keys[1], kv.values[1], self.num_heads)
            text = 1.5 * super().forward(hidden, context, **kwargs)
            return text + torch.nn.functional.linear(style, self.o.weight)

    before = plain.clone()
    before.add_object_patch(f"{path}.forward", foreign)
    before = patches.patch_style(before, adapter)
    after = styled_model.clone()
    after.add_object_patch(f"{path}.forward", foreign)
    facts["foreign.plain_effect"] = wan.relative(at_once(before, positive), without)
    both = [at_once(before, conds[0]), at_once(after, conds[0])]
    facts["foreign.seen"] = len(seen)
    facts["foreign.order"] = wan.relative(*both)
    facts["foreign.taken_off"] = wan.relative(at_once(styled_model, conds[0]), expected)

    vars(module).pop("forward", None)  # ComfyUI leaves the original, bound
    others = [b.cross_attn for i, b in enumerate(plain.model.diffusion_model.blocks) if i != 1]
    kv = adapter(Region(x["in.tokens"]))
    hooks = []
    for other, k, v in zip(others, kv.keys[[0, 2]], kv.values[[0, 2]], strict=True):
        style = core.BlockStyle((k,), (v,), (), None)
        set_by_hooks = {"stylemaster_style": style, "stylemaster_tokens": z[0, 0].numel() // 4}
        hooks.append((other, patches._styled_cross_attention, set_by_hooks))
    with patches.hooked(hooks):
        module.__class__, kept = Doubled, module.__class__
        try:
            written_out = at_once(plain, positive)
        finally:
            module.__class__ = kept
    facts["foreign.written_out"] = wan.relative(both[0], written_out)


def failing() -> None:
    """An error or an interrupt in the middle leaves the modules as they were."""
    last = plain.model.diffusion_model.blocks[2].ffn
    handle = last.register_forward_hook(lambda *_: 1 / 0)
    model = patches.patch_control(styled_model, network)
    given = controlled(conds, x["in.control"])
    facts["failure"] = wan.error_of(lambda: at_once(model, given[0]))
    handle.remove()
    facts["failure.leftovers"] = wan.leftovers(plain)
    facts["failure.afterwards"] = wan.relative(at_once(styled_model, conds[0]), expected)

    calls: list[int] = []

    def interrupt_in_second_step() -> None:
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing(True)

    watched = wan.watched(styled_model, calls, interrupt_in_second_step)
    facts["interrupt"] = wan.error_of(
        lambda: wan.guided(watched, conds, (5.0, 3.0), z, x["in.sigmas"])
    )
    facts["interrupt.calls"] = len(calls)
    comfy.model_management.interrupt_current_processing(False)


def clones() -> None:
    again = patches.patch_style(styled_model.clone(), adapter)
    wrappers = again.get_wrappers(WrappersMP.APPLY_MODEL, patches.STYLE_KEY)
    facts["wrappers_after_twice"] = len(wrappers)
    facts["clone"] = wan.relative(at_once(again, conds[0]), expected)
    facts["unpatched_clone"] = wan.relative(at_once(plain, positive), without)
    # Nothing of the adapter stays: only keys and values travel, with the conditioning.
    held = [cell.cell_contents for w in wrappers for cell in w.__closure__]
    assert patches.style_hooks in held and not patches.style_hooks.__closure__
    facts["wrapper_holds"] = sorted(type(value).__name__ for value in held)
    calls: list[str] = []
    post = styled_model.clone()
    post.set_model_sampler_post_cfg_function(lambda a: (calls.append("post"), a["denoised"])[1])
    wan.guided(post, conds, (5.0, 3.0), z, x["in.sigmas"])
    facts["post_cfg_calls"] = len(calls)
    shapes: list[Any] = []
    model = patches.patch_control(styled_model, network)

    def note(executor: Any, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append([float(n) for n in shape])
        return executor(model, shape, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "note", note)
    at_once(model, controlled(conds, x["in.control"])[0])
    facts["reserved"] = shapes


def errors() -> None:
    def refused(name: str, call: Any) -> None:
        facts[f"error.{name}"] = wan.error_of(call)

    i2v = wan.load_model({}, in_dim=36)
    refused("in_dim", lambda: patches.patch_style(i2v, adapter))
    wide = wan.load_model({}, dim=512, num_heads=4)
    refused("width", lambda: patches.patch_style(wide, adapter))
    deep = wan.load_model({}, num_layers=4)
    refused("blocks", lambda: patches.patch_style(deep, adapter))
    refused("control_width", lambda: patches.patch_control(wide, network))
    shallow = wan.load_model({}, num_layers=1)
    refused("control_blocks", lambda: patches.patch_control(shallow, network))
    refused("control_range", lambda: patches.patch_control(plain, network, start=0.7, end=0.2))
    on = patches.patch_control(plain, network)
    refused("control_twice", lambda: patches.patch_control(on, network))
    refused("wrong_model", lambda: at_once(_patched_by_force(deep), conds[0]))
    small = controlled(conds, x["in.control"][..., :8])
    refused("control_size", lambda: at_once(on, small[0]))
    refused("control_channels", lambda: conditionings.create_control(positive, z[:, :4]))
    a, b = Region(x["in.tokens"]), Region(x["in.other_tokens"])
    refused("overlap", lambda: three(a, b))
    pair = three(Region(x["in.two_tokens"]))
    refused("style_batch", lambda: at_once(styled_model, pair[0]))
    masked = three(Region(x["in.tokens"], mask=x["in.mask"]))
    area = [[masked[0][0][0], {**masked[0][0][1], "area": (4, 4, 0, 0)}]]
    refused("mask_and_area", lambda: at_once(styled_model, area))
    guider = wan.pack("nodes.guider").StyleGuider(styled_model)
    refused("empty_schedule", lambda: guider.set_cfg([], 3.0))
    refused("text_cfg_0", lambda: guider.set_cfg([5.0, 0.0], 3.0))


def _patched_by_force(model: Any) -> Any:
    return patches.with_hooks(model, patches.STYLE_KEY, patches.style_hooks)


def touching_ranges() -> None:
    """Where one range ends and the next begins, at exactly a step's sigma, both act by half."""
    a, b = x["in.tokens"], x["in.other_tokens"]
    # Steps of 5 begin at 0, 0.2, 0.4, ... of the sampling; 0.4 is this sigma.
    sigma = x["in.sigmas"][2].item()
    both = three(Region(a, end=0.4), Region(b, start=0.4))[0]
    half = three(*(Region(t, mask=torch.full((1, 1), 0.5)) for t in (a, b)))[0]
    velocities = [wan.velocity(styled_model, c, z, sigma) for c in (both, half)]
    facts["touching"] = wan.relative(*velocities)
    alone = three(Region(a, end=0.4))
    off = [wan.velocity(styled_model, c, z, sigma - 1e-4) for c in alone[:2]]
    on = [wan.velocity(styled_model, c, z, sigma) for c in alone[:2]]
    facts["beyond_end"], facts["at_end"] = wan.relative(*off), wan.relative(*on)


def low_precision() -> None:
    """bfloat16, as on a GPU: runs, and lies near float32."""
    model = patches.patch_style(wan.load_model(weights, torch.bfloat16), adapter)
    model = patches.patch_control(model, network)
    exact = patches.patch_control(styled_model, network)
    given = controlled(three(Region(x["in.tokens"], mask=x["in.mask"])), x["in.control"])[0]
    rough = wan.velocity(model, given, z, SIGMA)
    facts["bfloat16"] = wan.relative(rough, wan.velocity(exact, given, z, SIGMA))


for part in (
    exactness,
    batching,
    foreign_patches,
    failing,
    clones,
    errors,
    touching_ranges,
    low_precision,
):
    part()
facts["leftovers"] = wan.leftovers(plain)
print(json.dumps(facts))
