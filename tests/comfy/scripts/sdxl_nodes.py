"""The nodes with a StyleCrafter adapter, one after another as a workflow runs them."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
import stub_nodes
import torch
from safetensors.torch import save_file
from scripts import golden_sdxl as sdxl
from scripts import golden_wan as wan

torch.set_grad_enabled(False)
loaders, style = (wan.pack(f"nodes.{n}") for n in ("loaders", "style"))
sampling, scales = wan.pack("nodes.sampling"), wan.pack("nodes.scales")
wan.pack("nodes.paths").register_folders()
facts: dict[str, Any] = {}
folder = Path(folder_paths.models_dir) / "stylecrafter"
folder.mkdir(exist_ok=True)
heads = {"style_num_heads": "5", "scale_num_heads": "2"}
weights = {key: value.half() for key, value in sdxl.under("adapter.").items()}
save_file(weights, folder / "stylecrafter_small.safetensors", heads)

loaders.LoadAdapter.fingerprint_inputs("stylecrafter_small.safetensors")
adapter = loaders.LoadAdapter.execute("stylecrafter_small.safetensors")[0]
golden = sdxl.load_adapter()
facts["stored"] = str(next(adapter.layers.parameters()).dtype)
tokens = sdxl.tensors["style_tokens"]
exact, stored = (a.layers.keys_values(tokens)[3].keys for a in (golden, adapter))
facts["from_half"] = wan.relative(stored, exact)

(vision,) = stub_nodes.StubCLIPVisionLoader().load(width=40)
image = torch.rand(2, 40, 56, 3, generator=torch.Generator().manual_seed(1))


def features(vision: Any, image: torch.Tensor) -> Any:
    return style.StyleEncoder.execute(vision, image, 0, "center")[0]


def encoded(seen: Any, **changes: Any) -> Any:
    options = {
        "adapter": adapter,
        "features": seen,
        "prompt": sdxl.conditioning(),
        "mode": "release",
        "drop_rate": 0.95,
        "keep": 0,
        "selection_seed": 0,
        "several": "concatenate",
    }
    return style.TextureSelector.execute(**(options | changes))


pair = features(vision, image)
facts["features"] = list(pair.penultimate.shape)
facts["not_last"] = wan.relative(pair.penultimate, pair.patches)
together, picture = encoded(pair)
facts["picture"] = list(picture.shape)
core = golden.encoder([view for view in pair.penultimate.split(1)])
facts["together"] = wan.relative(together.tokens, core)
facts["mean"] = wan.relative(encoded(pair, several="mean")[0].tokens, core)
first = encoded(features(vision, image[:1]))[0]
second = encoded(features(vision, image[1:]))[0]
facts["other_picture"] = wan.relative(second.tokens, first.tokens)

plain = sdxl.load_model()
positive, negative = sdxl.conditioning(), sdxl.conditioning("negative_")


def applied(**changes: Any) -> Any:
    options = {
        "model": plain,
        "adapter": adapter,
        "style": first,
        "positive": positive,
        "negative": negative,
        "strength": 0.5,
    }
    return wan.apply_style(**(options | changes))


def sampled(model: Any, styled: Any, positive: Any, negative: Any) -> torch.Tensor:
    guider = sampling.StyleGuiderNode.execute(model, styled, positive, negative, 7.5, 5.0)[0]
    euler = comfy.samplers.ksampler("euler")
    return wan.run_guider(guider, sdxl.tensors["latents"], euler, sdxl.tensors["sampler_sigmas"])


base, one = sampled(plain, positive, positive, negative), sampled(*applied())
facts["effect"] = wan.relative(one, base)
facts["strength_0"] = wan.relative(sampled(*applied(strength=0.0)), base)
facts["second_style"] = wan.relative(sampled(*applied(style=second)), one)
facts["early"] = wan.relative(sampled(*applied(blocks="early")), one)
listed = {"blocks": "list", "block_weights": "0-10:1"}
facts["listed"] = wan.relative(sampled(*applied(**listed)), one)
left = torch.tensor([[[1.0, 0.0]]])
chain = applied(mask=left)
chain = applied(model=chain[0], positive=chain[2], negative=chain[3], style=second, mask=1 - left)
facts["chain"] = wan.relative(sampled(*chain), one)
long = [[torch.cat([positive[0][0]] * 2, 1), positive[0][1]]]
shown, again = (scales.ShowScales.execute(adapter, first, text)[0] for text in (positive, long))
facts["shown"] = list(shown.shape)
facts["long_prompt"] = bool(torch.equal(shown, again))
facts["same_scales"] = bool(torch.equal(shown, scales.ShowScales.execute(adapter, second, long)[0]))

# What MODEL and conditionings keep of an adapter.
once = loaders.LoadAdapter.execute("stylecrafter_small.safetensors")[0]
kept = applied(adapter=once)
alive = weakref.ref(once.layers)
del once
gc.collect()
facts["freed"] = alive() is None
condition = kept[1][0][1]["model_conds"]["stylecrafter_layers"].cond[0][0]
tensors = [x for kv in condition.styles[0].keys_values for x in (*kv[:2], *kv.norm.parameters())]
facts["kept_layers"] = len(condition.styles[0].keys_values)
facts["views"] = sum(x.untyped_storage().nbytes() - x.nbytes for x in tensors)

adapters = wan.pack("stylemaster_core.models.style_adapter")
attention = wan.adapter(wan.golden("weights_dit_a"))
stylemaster = adapters.StyleMasterAdapter("small.safetensors", None, attention)
other = wan.load_model(wan.golden("weights_dit_a"))
narrow = wan.pack("stylemaster_core.models.style_tokens").Style(first.tokens[..., :8])
(small_vision,) = stub_nodes.StubCLIPVisionLoader().load(width=48)
three = torch.ones(3, 4, 4)
errors = {
    "wan": lambda: applied(model=other),
    "sd15": lambda: applied(model=sdxl.other_model(sdxl.SD15)),
    "flux": lambda: applied(model=sdxl.other_model(sdxl.FLUX)),
    "stylemaster": lambda: applied(adapter=stylemaster),
    "vision": lambda: encoded(features(small_vision, image)),
    "style": lambda: applied(style=narrow),
    "text": lambda: applied(positive=[[torch.ones(1, 77, 40), {}]]),
    "frames": lambda: applied(first_frame=2),
    "masks": lambda: applied(mask=three),
    "strength": lambda: applied(strength=-1.0),
    "layers": lambda: applied(blocks="list", block_weights="0-11:1"),
    "mode": lambda: encoded(pair, mode="paper"),
    "keep": lambda: encoded(pair, keep=15),
    "clip_prompt": lambda: encoded(pair, clip_prompt=positive),
    "scales": lambda: scales.ShowScales.execute(stylemaster, first, positive),
    "file": lambda: loaders.LoadAdapter.execute("absent.safetensors"),
}
facts |= {f"error.{name}": wan.error_of(call) for name, call in errors.items()}
print(json.dumps(facts))
