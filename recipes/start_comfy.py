"""Start a ComfyUI with this pack and open the template of the small model: `make comfy`.

Takes the ComfyUI of COMFYUI_PATH or in ~/comfy/ComfyUI; without one, installs it there.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from stylemaster_core.data.demo_scene import write_demo_inputs

PACK = Path(__file__).resolve().parents[1]
DEFAULT = Path.home() / "comfy" / "ComfyUI"
TEMPLATE = "tiny_video_to_video"
START_TIMEOUT_S = 600


def main(argv: Sequence[str] | None = None) -> int:
    """Run until ComfyUI ends or Ctrl-C; returns ComfyUI's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8188, help="the next free one from here on")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    args = parser.parse_args(argv)
    folder = find_comfyui() or install_comfyui()
    name = link_pack(folder)
    for path in write_demo_inputs(folder / "input"):
        _say(f"for the template: {path}")
    python, port = python_of(folder), free_port(args.port)
    command = [str(python), "main.py", "--port", str(port), "--disable-auto-launch"]
    if not has_gpu(python):
        command.append("--cpu")
    _say(f"starting {folder}: {' '.join(command)}")
    process = subprocess.Popen(command, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        if wait_for(address, process):
            opened = f"{address}/?template={TEMPLATE}&source={name}"
            _say(
                f"\nComfyUI is ready: {opened}\n(older versions open empty: Templates, {name}, "
                f"{TEMPLATE}). Press Run. Ctrl-C ends it."
            )
            if not args.no_browser:
                webbrowser.open(opened)
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        process.terminate()
        process.wait()


def find_comfyui() -> Path | None:
    """The folder of a ComfyUI on this machine.

    Raises:
        SystemExit: if COMFYUI_PATH names something else.
    """
    named = os.environ.get("COMFYUI_PATH")
    folder = Path(named).expanduser() if named else DEFAULT
    if (folder / "main.py").is_file() and (folder / "custom_nodes").is_dir():
        return folder
    if named:
        raise SystemExit(f"COMFYUI_PATH is {named}, which holds no ComfyUI (main.py, custom_nodes)")
    return None


def install_comfyui() -> Path:
    """Install ComfyUI with comfy-cli, after saying so.

    Raises:
        SystemExit: if it did not work.
    """
    kind = "--nvidia" if shutil.which("nvidia-smi") else "--cpu"
    if sys.platform == "darwin" and platform.machine() == "arm64":
        kind = "--m-series"
    _say(
        f"No ComfyUI in COMFYUI_PATH or {DEFAULT}. Installing it there with comfy-cli ({kind}); "
        "this downloads a few GB. Ctrl-C stops it."
    )
    comfy = Path(sys.executable).with_name("comfy")
    try:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "comfy-cli"], check=True)
        words = ["--skip-prompt", "--workspace", str(DEFAULT), "install", kind]
        subprocess.run([str(comfy), *words], check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise SystemExit(
            f"comfy-cli could not install ComfyUI ({error}); install it by hand (https://docs.comfy"
            ".org/installation) and name its folder: COMFYUI_PATH=... make comfy"
        ) from error
    found = find_comfyui()
    if found is None:
        raise SystemExit(f"comfy-cli ended well, but there is no ComfyUI in {DEFAULT}; see above")
    return found


def link_pack(folder: Path) -> str:
    """Make this pack one of its custom nodes, unless it is; returns its name there.

    Raises:
        SystemExit: if another thing has that name, or links cannot be made.
    """
    nodes = folder / "custom_nodes"
    for entry in nodes.iterdir():
        if entry.resolve() == PACK:
            return entry.name
    link = nodes / "stylemaster"
    if link.exists() or link.is_symlink():
        raise SystemExit(f"{link} is another copy of the pack; remove it, or use that one")
    try:
        link.symlink_to(PACK, target_is_directory=True)
    except OSError as error:
        raise SystemExit(f"{link} cannot be made ({error}); copy {PACK} there by hand") from error
    _say(f"linked {link} -> {PACK}")
    return link.name


def python_of(folder: Path) -> Path:
    """The Python of a ComfyUI: of a virtual environment in it, else this one."""
    places = [
        folder / venv / inner
        for venv in (".venv", "venv")
        for inner in ("bin/python", "Scripts/python.exe")
    ]
    return next((place for place in places if place.exists()), Path(sys.executable))


def has_gpu(python: Path) -> bool:
    """Whether that Python's torch sees one."""
    code = "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} has no working torch:\n{done.stderr.strip()}")
    return done.stdout.strip() == "True"


def free_port(first: int) -> int:
    """The first port from here on that nobody uses."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise SystemExit(f"no free port from {first} on; name another with --port")


def wait_for(address: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers; False if it ended before."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/system_stats", timeout=10):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if time.monotonic() > deadline:
                raise SystemExit(f"ComfyUI did not answer within {START_TIMEOUT_S} s") from None
            time.sleep(0.5)
    return False


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
