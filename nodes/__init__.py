"""The nodes of StyleMaster for ComfyUI: each module has its list of them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    apply_style,
    control,
    dataset,
    find_style,
    folders,
    latent,
    loaders,
    sampling,
    scales,
    style,
    style_grid,
    tiny,
    training,
    training_monitor,
    videocrafter,
)
from .paths import register_folders


class StyleMasterExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Here and not in on_load, which ComfyUI 0.3.64 does not call.
        register_folders()
        modules = (
            loaders,
            style,
            find_style,
            apply_style,
            scales,
            control,
            latent,
            sampling,
            folders,
            style_grid,
            dataset,
            training,
            training_monitor,
            tiny,
            videocrafter,
        )
        return [node for module in modules for node in module.NODES]
