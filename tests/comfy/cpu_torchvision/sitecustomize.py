"""Lets torchvision and torchaudio be imported beside a CPU build of PyTorch.

PyPI has them compiled for CUDA only. Where their compiled part cannot load, torchvision trips over
operators that it declares and torchaudio over its own library; ComfyUI needs neither of the two at
work, but imports both. Python reads this file at start when its folder is on PYTHONPATH. It does
nothing where the compiled parts load.
"""

import importlib.machinery
import importlib.util
import sys

# The operators that torchvision describes to PyTorch even when they were never compiled.
UNCOMPILED = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def declare_uncompiled_operators():
    if sys.modules["torchvision.extension"]._has_ops():
        return
    import torch

    for name, schema in UNCOMPILED.items():
        torch.library.define(name, schema)


class ForgivingLoader(importlib.machinery.SourceFileLoader):
    """torchaudio has an answer for "there is no library", but none for "it does not load"."""

    def exec_module(self, module):
        super().exec_module(module)
        load = module._load_lib

        def load_or_say_no(library):
            try:
                return load(library)
            except OSError:
                return False

        module._load_lib = load_or_say_no  # pyright: ignore[reportAttributeAccessIssue]


class Finder:
    """Sees each import before the ordinary finders do; acts on two."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            declare_uncompiled_operators()
        if name != "torchaudio._extension.utils":
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is None or not found.origin:
            return found
        loader = ForgivingLoader(name, found.origin)
        return importlib.util.spec_from_file_location(name, found.origin, loader=loader)


sys.meta_path.insert(0, Finder)
