"""Batches of the queue for tests, here or in processes of their own.

`python -m tests.queue_batch` forks a process for each line of JSON that it is told, which costs
milliseconds and not the second of an import; it says the process id, and then how it ended.
"""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import closing
from pathlib import Path

from stylemaster_core.queue import client as client_module
from stylemaster_core.queue.client import ComfyClient
from stylemaster_core.queue.jobs import Row, make_jobs
from stylemaster_core.queue.journal import Journal
from stylemaster_core.queue.runner import RunConfig, run_jobs
from tests.fake_comfy import WORKFLOW

MAX_RESULT_BYTES = 1 << 22
SLOW_S = 0.5  # in place of 30 s


def run(folder, servers, texts, *, timeout_s=0.4, **config):
    """Run jobs with these prompts and the style of `folder`; return their results.

    Args:
        folder: has "style.png", gets "out".
        servers: (address, how long it may be silent) of each. A good one has more time, as a busy
            machine must not make it look dead.
        texts: the prompts.
        timeout_s: of the batch.
        config: more of `RunConfig`.
    """
    config = RunConfig(timeout_s=timeout_s, **({"poll_s": 0.02, "give_up_s": 30.0} | config))
    style = folder / "style.png"
    jobs = make_jobs(WORKFLOW, [Row(prompt=text, style=style) for text in texts])
    clients = [ComfyClient(url, silence_s, MAX_RESULT_BYTES) for url, silence_s in servers]
    out = folder / "out"
    with closing(Journal(out)) as journal:
        return list(run_jobs(jobs, clients, journal, out, config))


def files_in(folder):
    """The result files of `run`, name -> content."""
    return {path.name: path.read_bytes() for path in (folder / "out").glob("style__*")}


def run_batch(folder, fakes, texts, *, deadline_s=60.0, **options):
    """Run jobs; return their results and the result files.

    Raises:
        Exception: what the run raises.
        TimeoutError: if it is not over in time.
    """
    (folder / "style.png").write_bytes(b"style")
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        servers = [(fake.url, fake.silence_s) for fake in fakes]
        results = pool.submit(run, folder, servers, texts, **options).result(deadline_s)
    finally:
        pool.shutdown(wait=False)
    return results, files_in(folder)


class Batches:
    """Run batches in processes of their own, which may be killed."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.queue_batch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(self, folder, fakes, texts, *, kill_after_s=None, deadline_s=60.0, **options):
        """Run one; return how it ended.

        Returns:
            "statuses" of the results, "error" (a traceback or None), "was_killed", and
            "peak_bytes" of memory.
        """
        (folder / "style.png").write_bytes(b"style")
        servers = [(fake.url, fake.silence_s) for fake in fakes]
        order = {"folder": str(folder), "servers": servers, "texts": texts}
        self._process.stdin.write(json.dumps(order | {"options": options}) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        waiting = concurrent.futures.ThreadPoolExecutor(1)
        end = waiting.submit(self._process.stdout.readline)
        try:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                end.result(deadline_s if kill_after_s is None else kill_after_s)
            if not end.done():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            report = json.loads(end.result(10))
        finally:
            waiting.shutdown(wait=False)
        said = folder / "said.json"
        report |= json.loads(said.read_text()) if said.exists() else {"statuses": [], "error": None}
        report["was_killed"] = report["status"] == signal.SIGKILL
        return report


def _be_child(order):
    client_module.SLOW_S = SLOW_S
    folder = Path(order["folder"])
    said = folder / "said.json"
    said.unlink(missing_ok=True)
    report = {"statuses": [], "errors": [], "error": None}
    try:
        results = run(folder, order["servers"], order["texts"], **order["options"])
        report["statuses"] = [result.status for result in results]
        report["errors"] = [result.error for result in results]
    except BaseException:  # noqa: BLE001
        report["error"] = traceback.format_exc()
    said.write_text(json.dumps(report))


def main():
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _be_child(json.loads(line))
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status, usage = os.wait4(pid, 0)
        sys.stdout.write(
            json.dumps({"status": status, "peak_bytes": usage.ru_maxrss * 1024}) + "\n"
        )
        sys.stdout.flush()


def until_idle(fakes):
    """Wait until servers have answered what a killed run had asked."""
    deadline = time.monotonic() + 10
    while any(fake.at_work for fake in fakes) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.01)


if __name__ == "__main__":
    main()
