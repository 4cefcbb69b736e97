"""Processes forked from one that has imported everything, which each would do for 10 s first.

Not from the tests themselves: where PyTorch started threads for gradients, as it does with CUDA in
it, a process that is forked afterwards can compute none.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[1]
SERVER: Any = None
if hasattr(os, "fork"):
    SERVER = multiprocessing.get_context("forkserver")
    SERVER.set_forkserver_preload(["accelerate", "tests.unit.test_training_loop"])


def fork(function: Callable[..., object], *arguments: object, said: Path | None = None,
         own_group: bool = False, environment: dict[str, str] | None = None
         ) -> multiprocessing.process.BaseProcess:  # fmt: skip
    """Start a process that calls a function with one thread.

    Args:
        function: what it calls; its exit status is 0 once that returns, and 1 after an exception.
        arguments: what the function takes.
        said: file for all that the process writes to its standard error.
        own_group: whether the process leads a process group of its own.
        environment: variables to add to the environment.
    """
    if SERVER is None:
        pytest.skip("Windows has no fork")
    everything = dict(os.environ) | (environment or {})  # the server's is that of its start
    process = SERVER.Process(target=_call, args=(function, arguments, said, own_group, everything))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # in Python 3.10 a server has no path of ours
        process.start()
    return process


def _call(function, arguments, said, own_group, environment):
    if own_group:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in ((signal.SIGINT, signal.default_int_handler),
                            (signal.SIGTERM, signal.SIG_DFL)):  # fmt: skip
        signal.signal(number, handler)
    if said is not None:
        sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115 (open to the process's end)
        os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    function(*arguments)


def fork_distributed(count: int, function: Callable[..., object], *arguments: object,
                     folder: Path, deadline_s: float, environment: dict[str, str] | None = None
                     ) -> None:  # fmt: skip
    """Call a function in processes that find each other as those of torch's launcher do.

    Raises:
        AssertionError: if one of them fails, with what it said.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port}  # fmt: skip
    files = [folder / f"stderr-{rank}" for rank in range(count)]
    processes = []
    try:
        for rank, file in enumerate(files):
            names = {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            processes.append(
                fork(function, *arguments, said=file, environment=(environment or {}) | names)
            )
        for process in processes:
            process.join(deadline_s)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * count, (codes, [file.read_text()[-3000:] for file in files])
    finally:
        for process in processes:
            process.kill()
            process.join()
