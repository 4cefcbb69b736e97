"""A real ComfyUI for tests: find it, serve it, run workflows and scripts in it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACK = HERE.parents[1]
PACK_NAME = "stylemaster"

Workflow = Mapping[str, Any]  # API format: node id to class_type and inputs
OnEvent = Callable[[str, dict[str, Any]], None]
OnPreview = Callable[[bytes], None]
PREVIEW_HEADER = 8  # bytes before a preview's JPEG
LIMIT_S = 1200.0  # against hanging; a busy machine may need minutes to import ComfyUI


class ComfyUIError(Exception):
    """ComfyUI was not found where it should be, did not start, or a script failed inside it."""


@dataclass(frozen=True)
class Checkout:
    """A ComfyUI on this machine."""

    path: Path
    python: Path
    version: str


def find_comfyui() -> list[Checkout]:
    """Find the ComfyUIs to test against.

    COMFYUI_PATHS names several folders (separated like PATH), COMFYUI_PATH one; without them
    `comfy/ComfyUI` in the home folder is taken, if it is there. Each is the folder that contains
    `custom_nodes`; a `.venv` or `venv` in it is used, else the Python that runs the tests.

    Returns:
        The checkouts, maybe none.

    Raises:
        ComfyUIError: if a variable names a folder that is no ComfyUI.
    """
    for variable in ("COMFYUI_PATHS", "COMFYUI_PATH"):
        if os.environ.get(variable):
            names = os.environ[variable].split(os.pathsep)
            return [_checkout(Path(name).expanduser(), variable) for name in names if name]
    default = Path.home() / "comfy" / "ComfyUI"
    return [_checkout(default, "the default")] if (default / "comfyui_version.py").exists() else []


def _checkout(path: Path, source: str) -> Checkout:
    try:
        version_file = (path / "comfyui_version.py").read_text()
    except OSError:
        raise ComfyUIError(
            f"{source} names {path}, which holds no comfyui_version.py; "
            "it must be the folder of a ComfyUI, the one that contains custom_nodes"
        ) from None
    version = re.search(r'__version__ = "(.+)"', version_file)
    interpreters = (
        path / venv / place
        for venv in (".venv", "venv")
        for place in ("bin/python", "Scripts/python.exe")
    )
    python = next((p for p in interpreters if p.exists()), Path(sys.executable))
    return Checkout(path.absolute(), python.absolute(), version.group(1) if version else "unknown")


def environment(*, on_cpu: bool = True) -> dict[str, str]:
    """What ComfyUI's Python is started with: offline, on few threads."""
    shim = str(HERE / "cpu_torchvision") if on_cpu else None
    paths = list(filter(None, [shim, os.environ.get("PYTHONPATH")]))
    return {
        "OMP_NUM_THREADS": "2",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }


@dataclass
class Result:
    """What became of one workflow."""

    status: str = "timeout"  # success, error, interrupted, rejected (never ran) or timeout
    outputs: dict[str, Any] = field(default_factory=dict)  # by node id, as in ComfyUI's history
    error: dict[str, Any] | None = None  # exception_message, node_id and so on; or the rejection
    node_seconds: dict[str, float] = field(default_factory=dict)  # nodes that ran, not cached ones
    previews: int = 0  # pictures sent while sampling


@dataclass(frozen=True)
class PackImport:
    """ComfyUI's word on a folder of custom nodes."""

    seconds: float
    ok: bool


def imports_of_packs(log: str) -> dict[str, PackImport]:
    """What a log of ComfyUI says about the import of each folder in custom_nodes.

    Since 0.23 its lines are coloured and begin with their level.
    """
    plain = re.sub(r"\x1b\[[\d;]*m", "", log)
    line = re.compile(
        r"^(?:\[\w+\])? *([\d.]+) seconds( \(IMPORT FAILED\))?: (.+?)\s*$", re.MULTILINE
    )
    return {
        Path(path).name: PackImport(float(seconds), ok=not failed)
        for seconds, failed, path in line.findall(plain)
    }


class ComfyServer:
    """A ComfyUI server with this pack and the stubs as its only custom nodes.

    Use it as a context manager. All that it writes lies under `base`.
    """

    def __init__(
        self,
        checkout: Checkout,
        base: Path,
        models: Path,
        pack: Path = PACK,
        *,
        on_cpu: bool = True,
    ) -> None:
        """Prepare a base directory; `models` and the pack are linked into it."""
        self.checkout = checkout
        self.on_cpu = on_cpu
        self.base = base
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        (base / "custom_nodes").mkdir(parents=True)
        (base / "input").mkdir()
        (base / "custom_nodes" / PACK_NAME).symlink_to(pack)
        (base / "custom_nodes" / "stub_nodes.py").symlink_to(HERE / "stub_nodes.py")
        (base / "models").symlink_to(models)

    @property
    def input_dir(self) -> Path:
        """Where LoadImage and its like look for files."""
        return self.base / "input"

    @property
    def models_dir(self) -> Path:
        return self.base / "models"

    @property
    def output_dir(self) -> Path:
        return self.base / "output"

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def start(self, timeout_s: float = LIMIT_S) -> None:
        """Start the server and wait until it answers."""
        options = {
            "--listen": "127.0.0.1",
            "--port": str(self.port),
            "--base-directory": str(self.base),
            "--database-url": f"sqlite:///{self.base}/comfyui.db",
            "--preview-method": "latent2rgb",
        }
        flags = ["--disable-auto-launch", "--disable-api-nodes", "--log-stdout"]
        flags += ["--cpu"] if self.on_cpu else []
        command = [str(self.checkout.python), "main.py", *flags]
        command += [word for option in options.items() for word in option]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.checkout.path,
                env=environment(on_cpu=self.on_cpu),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ComfyUIError(f"ComfyUI did not start:\n{self.log_tail()}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server, whatever it is doing."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log_file(self) -> Path:
        return self.base / "server.log"

    def log_tail(self, lines: int = 60) -> str:
        """The last lines of what the server printed."""
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    def pack_imports(self) -> dict[str, PackImport]:
        """What ComfyUI printed about the import of each folder in custom_nodes."""
        return imports_of_packs(self.log_file.read_text(errors="replace"))

    def object_info(self) -> dict[str, Any]:
        """The description of every node, by its id."""
        return json.loads(self._request("/object_info"))

    def view(self, image: Mapping[str, str]) -> bytes:
        """The content of a file that an output node named, e.g. `outputs["9"]["images"][0]`."""
        query = {key: image[key] for key in ("filename", "subfolder", "type")}
        return self._request("/view?" + urllib.parse.urlencode(query))

    def interrupt(self) -> None:
        """Ask for the end of what is running; a node that samples heeds it at its next step."""
        self._request("/interrupt", data=b"")

    def run_prompt(
        self,
        workflow: Workflow,
        *,
        timeout_s: float = LIMIT_S,
        on_event: OnEvent | None = None,
        on_preview: OnPreview | None = None,
    ) -> Result:
        """Run a workflow to its end; a failing one is a Result too.

        Args:
            workflow: in API format.
            timeout_s: after it the workflow is interrupted, with status "timeout".
            on_event: called with the type and data of each message, e.g. to interrupt at a
                "progress".
            on_preview: called with each preview, a JPEG.
        """
        result = Result()
        try:
            running = self._run(workflow, result, on_event, on_preview)
            asyncio.run(asyncio.wait_for(running, timeout_s))
        except (asyncio.TimeoutError, TimeoutError):
            self.interrupt()
        return result

    async def _run(
        self,
        workflow: Workflow,
        result: Result,
        on_event: OnEvent | None,
        on_preview: OnPreview | None,
    ) -> None:
        import aiohttp

        client = uuid.uuid4().hex
        request = {"prompt": dict(workflow), "client_id": client}
        async with aiohttp.ClientSession(self.url) as session:
            async with session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket_:
                async with session.post("/prompt", json=request) as response:
                    answer = await response.json()
                if response.status != 200:
                    result.status, result.error = "rejected", answer
                    return
                watch = _Watch(result, answer["prompt_id"])
                async for message in socket_:
                    if message.type == aiohttp.WSMsgType.BINARY:
                        result.previews += 1
                        if on_preview is not None:
                            on_preview(message.data[PREVIEW_HEADER:])
                        continue
                    event = json.loads(message.data)
                    if on_event is not None:
                        on_event(event["type"], event["data"])
                    if watch.sees(event["type"], event["data"]):
                        break
                else:
                    raise ComfyUIError(f"ComfyUI closed the connection:\n{self.log_tail()}")
            result.outputs = await self._outputs(session, watch.prompt_id)

    async def _outputs(self, session: Any, prompt_id: str) -> dict[str, Any]:
        while True:  # the history is written a moment after the last message
            async with session.get(f"/history/{prompt_id}") as response:
                history = await response.json()
            if prompt_id in history:
                return history[prompt_id]["outputs"]
            await asyncio.sleep(0.05)

    def _answers(self) -> bool:
        try:
            self._request("/system_stats")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def _request(self, path: str, data: bytes | None = None) -> bytes:
        with urllib.request.urlopen(self.url + path, data, timeout=60) as response:
            return response.read()


class _Watch:
    """Follows the messages of one workflow."""

    ENDS = {
        "execution_success": "success",
        "execution_error": "error",
        "execution_interrupted": "interrupted",
    }

    def __init__(self, result: Result, prompt_id: str) -> None:
        self.result = result
        self.prompt_id = prompt_id
        self.node: str | None = None
        self.since = time.monotonic()

    def sees(self, kind: str, data: dict[str, Any]) -> bool:
        """Note one message; True if it was the last."""
        if data.get("prompt_id") != self.prompt_id:
            return False
        if kind == "executing" or kind in self.ENDS:
            self._turn_to(data.get("node") if kind == "executing" else None)
        if kind in self.ENDS:
            self.result.status = self.ENDS[kind]
            self.result.error = data if kind == "execution_error" else None
        return kind in self.ENDS

    def _turn_to(self, node: str | None) -> None:
        now = time.monotonic()
        if self.node is not None:
            seconds = self.result.node_seconds
            seconds[self.node] = seconds.get(self.node, 0.0) + now - self.since
        self.node, self.since = node, now


def run_script(
    checkout: Checkout, base: Path, script: Path, *arguments: str, timeout_s: float = LIMIT_S
) -> dict[str, Any]:
    """Run a Python script inside a ComfyUI without a server (see `bootstrap.py`).

    Args:
        checkout: the ComfyUI.
        base: its base directory, which contains `models`.
        script: must print JSON as its last line.
        arguments: its `sys.argv[1:]`.
        timeout_s: after which it is ended.

    Returns:
        The JSON.

    Raises:
        ComfyUIError: if the script fails or prints something else.
    """
    places = (HERE / "bootstrap.py", checkout.path, PACK, base, script)
    done = subprocess.run(
        [str(checkout.python), *map(str, places), *arguments],
        cwd=checkout.path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    lines = done.stdout.splitlines()
    try:
        if done.returncode == 0 and lines:
            return json.loads(lines[-1])
    except json.JSONDecodeError:
        pass
    raise ComfyUIError(
        f"{script} ended with {done.returncode} inside ComfyUI {checkout.version}; "
        f"its last line should have been JSON\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
