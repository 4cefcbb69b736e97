"""StyleMaster for ComfyUI. ComfyUI calls `comfy_entrypoint`; the core is `stylemaster_core`."""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> object:
    """Return the node extension; ComfyUI prints no traceback for a failing entrypoint, so we do."""
    try:
        from .nodes import StyleMasterExtension
    except Exception:
        logging.getLogger("stylemaster").exception("StyleMaster could not load its nodes")
        raise
    return StyleMasterExtension()
