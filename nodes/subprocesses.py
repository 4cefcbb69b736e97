"""The core's command line as a child process: watched, interrupted with the prompt, never a thread.

Training inside ComfyUI's process would share its memory, its signals and its module names.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from comfy import model_management

from ..stylemaster_core.errors import StyleMasterError, UnsupportedHostError

logger = logging.getLogger("stylemaster")

PACK = Path(__file__).resolve().parents[1]
PYTHON_VARIABLE = "STYLEMASTER_PYTHON"  # another Python for the child, with the libraries
LIBRARIES = ("diffusers", "transformers", "accelerate", "cv2")
POLL_S = 0.5
GRACE_S = 30.0  # for the step under way and its checkpoint
SHOWN_LINES = 12


class ChildError(StyleMasterError):
    """The command line ended with an error."""


def run_core(
    words: Sequence[str], watch: Callable[[], None], *, stop_file: Path | None = None
) -> str:
    """Run `python -m stylemaster_core` to its end, with ComfyUI's models out of memory.

    Args:
        words: its arguments.
        watch: called about twice a second, and once at the end; shows progress.
        stop_file: a file that asks the command to stop; None if it may simply be ended.

    Returns:
        What it wrote to its standard output.

    Raises:
        InterruptProcessingException: if the prompt was interrupted; the command has ended then.
        ChildError: if it failed, with its message.
        UnsupportedHostError: if its Python lacks libraries.
    """
    python = os.environ.get(PYTHON_VARIABLE) or sys.executable
    _check_libraries(python)
    model_management.unload_all_models()
    model_management.soft_empty_cache()
    logger.info("starting: stylemaster %s", " ".join(words))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [python, "-m", "stylemaster_core", "--stop-with-stdin", *words],
            cwd=PACK,
            env=_environment(),
            stdin=subprocess.PIPE,  # it closes with this process, however that ends
            stdout=out,
            stderr=log,
            start_new_session=True,
        )
        atexit.register(_kill, child)
        try:
            while child.poll() is None:
                model_management.throw_exception_if_processing_interrupted()
                watch()
                _wait(child, POLL_S)
        finally:
            _end(child, stop_file)
            atexit.unregister(_kill)
            if child.stdin is not None:
                child.stdin.close()
        watch()
        if child.returncode:
            raise ChildError(_message(child.returncode, _text(log)))
        return _text(out)


def device_is_cpu() -> bool:
    """Whether ComfyUI was told to stay off the GPU; the child then does so, too."""
    return model_management.get_torch_device().type == "cpu"


def _environment() -> dict[str, str]:
    paths = [str(PACK)]
    if not os.environ.get(PYTHON_VARIABLE):  # what suits one Python may not suit another
        paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUTF8": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _check_libraries(python: str) -> None:
    code = (
        "import importlib.util as u, json; "
        f"print(json.dumps([n for n in {LIBRARIES!r} if u.find_spec(n) is None]))"
    )
    try:
        done = subprocess.run(
            [python, "-c", code], env=_environment(), capture_output=True, text=True, timeout=60
        )
        missing = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UnsupportedHostError(
            f"{python} does not start as a Python ({error}); mend or unset {PYTHON_VARIABLE}"
        ) from error
    if missing:
        raise UnsupportedHostError(
            f"training and its data need {', '.join(missing)}, which {python} lacks. The command, "
            f'for a terminal:\n"{python}" -m pip install -e "{PACK}[train]"\n'
            f"Or set the environment variable {PYTHON_VARIABLE} to a Python that has them, and "
            "start ComfyUI again"
        )


def _wait(child: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)


def _end(child: subprocess.Popen[bytes], stop_file: Path | None) -> None:
    """End the child if it runs; it may write a checkpoint first, if that does not take long."""
    if child.poll() is None:
        # On Windows this would be an end at once, without a checkpoint.
        if stop_file is None or os.name != "nt":
            child.terminate()
        deadline = time.monotonic() + GRACE_S
        while child.poll() is None and time.monotonic() < deadline:
            # Again and again: a command that is only starting removes an older request.
            if stop_file is not None and stop_file.parent.is_dir():
                stop_file.touch()
            _wait(child, 0.2)
        _kill(child)
    if stop_file is not None:
        stop_file.unlink(missing_ok=True)


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        if os.name == "nt":
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)  # its own workers, too
        child.wait()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def _message(code: int, log: str) -> str:
    """The command's own last word, or the end of its log."""
    _, said, message = log.rpartition("stylemaster: ")
    if code == 2 and said:
        return message.strip()
    if code == 130:
        return "the command was stopped from outside; run again to go on"
    lines = "\n".join(log.strip().splitlines()[-SHOWN_LINES:])
    return f"the command ended with code {code}; the end of its log:\n{lines}"
