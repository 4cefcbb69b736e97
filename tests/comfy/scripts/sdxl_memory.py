"""Memory that stays when projections of real width have been used, in a process of its own."""

import json
from pathlib import Path

import folder_paths
import torch
from safetensors.torch import save_file
from scripts import golden_wan as wan

NUM_LAYERS, WIDTH = 30, 1280
shapes = wan.pack("stylemaster_core.weights.shapes")
memory = wan.pack("bench.comfy_measure").memory
encoder = shapes.StyleCrafterSizes(feature_width=64, num_layers=1, num_scales=NUM_LAYERS)
sizes = shapes.StyleCrafterSdxlSizes(encoder, (WIDTH,) * NUM_LAYERS)
wanted = shapes.expected_stylecrafter_sdxl_shapes(sizes)
path = Path(folder_paths.models_dir) / "stylecrafter_wide.safetensors"
save_file({key: torch.zeros(shape).half() for key, shape in wanted.items()}, path)
adapter = wan.pack("nodes.loaders").load_adapter(path)
before = memory()["anonymous"]
kept = adapter.layers.keys_values(torch.zeros(1, 16, encoder.style_width))
print(json.dumps({"left_behind": memory()["anonymous"] - before}))
path.unlink()
