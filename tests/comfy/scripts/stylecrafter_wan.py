"""A StyleCrafter adapter on the native Wan: REFERENCE ADAPTER -> velocities beside the core's."""

import json
import shutil
from pathlib import Path
from typing import Any

import folder_paths
import torch
from safetensors.torch import load_file
from scripts import golden_wan as wan

torch.set_grad_enabled(False)
reference_path, adapter_path = wan.arguments()
x = load_file(reference_path)
wan.pack("nodes.paths").register_folders()
folder = Path(folder_paths.models_dir) / "stylecrafter"
folder.mkdir(exist_ok=True)
shutil.copy(adapter_path, folder / "wan_small.safetensors")
adapter = wan.pack("nodes.loaders").LoadAdapter.execute("wan_small.safetensors")[0]
style = wan.pack("stylemaster_core.models.style_tokens").Style(x["tokens"])
plain = wan.load_model(wan.golden("weights_dit_a"))
positive, negative = [[x["text"], {}]], [[x["negative"], {}]]
SIGMA = 0.7


def applied(**changes: Any) -> Any:
    options = {
        "model": plain,
        "adapter": adapter,
        "style": style,
        "positive": positive,
        "negative": negative,
        "strength": 0.8,
    }
    return wan.apply_style(**(options | changes))


facts: dict[str, Any] = {}
model, styled, text, no_text = applied()
gains = wan.pack("nodes.sdxl_styles").predicted_gains(adapter, x["text"], style.tokens)
facts["gains"] = wan.relative(gains, x["gains"])
facts["styled"] = wan.relative(wan.velocity(model, styled, x["latents"], SIGMA), x["styled"])
bare = wan.velocity(plain, positive, x["latents"], SIGMA)
facts["no_style"] = wan.relative(wan.velocity(model, text, x["latents"], SIGMA), bare)
off = applied(strength=0.0)
facts["strength_0"] = wan.relative(wan.velocity(off[0], off[1], x["latents"], SIGMA), bare)
facts["effect"] = wan.relative(x["styled"], bare)
together = wan.velocities(model, [styled, text, no_text], x["latents"], SIGMA)
facts["batch.styled"] = wan.relative(together[0], x["styled"])
facts["batch.no_style"] = wan.relative(together[1], bare)
masked = applied(mask=x["mask"])
facts["mask"] = wan.relative(wan.velocity(masked[0], masked[1], x["latents"], SIGMA), x["masked"])
facts["guided"] = wan.relative(
    wan.guided(model, (styled, text, no_text), (5.0, 3.0), x["latents"], x["sigmas"]), x["sampled"]
)
attention = wan.adapter(wan.golden("weights_dit_a"))
other = wan.pack("stylemaster_core.models.style_adapter").StyleMasterAdapter(
    "small", None, attention
)
tokens = wan.golden("04_guidance")["out.style_feat"]
second = wan.pack("stylemaster_core.models.style_tokens").Style(tokens[:1])
facts["mixed"] = wan.error_of(
    lambda: applied(
        model=model, positive=text, negative=no_text, adapter=other, style=second, mask=x["mask"]
    )
)
print(json.dumps(facts))
