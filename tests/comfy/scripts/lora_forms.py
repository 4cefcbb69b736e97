"""LoRAs merged by ComfyUI itself; prints the largest deviation from the given results, by file."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.lora
import comfy.lora_convert
from safetensors.torch import load_file

PREFIX = "diffusion_model."


def merge(weights: dict, lora: dict, scale: float) -> dict:
    named = {PREFIX + key: value for key, value in weights.items()}
    model = SimpleNamespace(state_dict=lambda: named, model_config=SimpleNamespace(unet_config={}))
    keys = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora), keys)
    return {
        key.removeprefix(PREFIX): comfy.lora.calculate_weight(
            [(scale, patch, 1.0, None, None)], named[key].clone(), key
        )
        for key, patch in patches.items()
    }


folder = Path(sys.argv[1])
base = load_file(folder / "base.safetensors")
result = {}
for path in sorted((folder / "loras").glob("*.safetensors")):
    theirs = merge(base, load_file(path), 0.7)
    ours = load_file(folder / "merged" / path.name)
    changed = {key for key in base if not base[key].equal(ours[key])}
    assert set(theirs) == changed, (path.name, set(theirs) ^ changed)
    result[path.stem] = max(
        float((ours[key] - value).abs().max() / base[key].abs().max())
        for key, value in theirs.items()
    )
print(json.dumps(result))
