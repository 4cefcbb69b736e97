"""Run a script inside ComfyUI: python bootstrap.py CHECKOUT PACK BASE SCRIPT [ARGUMENT...]

The script finds ComfyUI's modules (on the CPU, with BASE as base directory), the pack under the
name `custom_nodes_stylemaster`, and, after ComfyUI's own, the modules beside this file:
`small_models`, `stub_nodes`. Its arguments are in `sys.argv`.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

PACK_NAME = "custom_nodes_stylemaster"


def main() -> None:
    checkout, pack, base, script, *arguments = sys.argv[1:]
    # ComfyUI's `server` and `nodes` must win over ours.
    sys.path[0] = checkout
    sys.path.append(str(Path(__file__).parent))
    use_cpu(base)
    import_pack(Path(pack))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def use_cpu(base: str) -> None:
    """Set what `main.py --cpu --base-directory BASE` would; the modules read it when imported."""
    from comfy.cli_args import args  # pyright: ignore[reportMissingImports]

    args.cpu = True
    args.base_directory = base


def import_pack(folder: Path) -> None:
    """Import the pack as ComfyUI does: by its path, under a name of ComfyUI's choice."""
    spec = importlib.util.spec_from_file_location(PACK_NAME, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK_NAME] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
