"""`stylemaster info`: what is installed, and what a generation would run on."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "einops",
    "av",
    "Pillow",
    "numpy",
    "sentencepiece",
    "huggingface_hub",
    "open_clip_torch",
)


def add_parser(subparsers: Any) -> None:
    """Add `info` to the command line."""
    parser = subparsers.add_parser("info", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="as JSON, for scripts")


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster info`."""
    import torch

    from .. import __version__
    from ..dtypes import explain_dtype
    from ..pipelines.models import choose_device

    device = choose_device()
    dtype, reason = explain_dtype("auto", device)
    facts: dict[str, Any] = {
        "stylemaster": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_reason": reason,
        "attention": _attention_backends(device.type),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return 0
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version or 'absent'}" for name, version in value.items())
        sys.stdout.write(f"{key:12} {value}\n")
    return 0


def _attention_backends(device: str) -> str:
    """Kernels that torch's scaled_dot_product_attention may choose from."""
    import torch

    if device != "cuda":
        return "torch scaled_dot_product_attention"
    flags = torch.backends.cuda
    backends = {
        "flash": flags.flash_sdp_enabled(),
        "cudnn": flags.cudnn_sdp_enabled(),
        "memory-efficient": flags.mem_efficient_sdp_enabled(),
    }
    return "torch scaled_dot_product_attention: " + ", ".join(k for k, on in backends.items() if on)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
