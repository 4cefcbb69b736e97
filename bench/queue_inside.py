"""The processes that `bench.queue` measures: a server without a model, and a batch.

`serve SECONDS` is a ComfyUI as the queue sees it, over HTTP and websocket, whose jobs do nothing
for so long; /bench returns when each job began and ended. `batch SERVERS... JOBS FOLDER` runs jobs
through `run_jobs` as the command line does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from aiohttp import web

# A workflow of a usual size; the text makes each job another.
WORKFLOW = {
    str(number): {"class_type": f"Node{number}", "inputs": {"value": number, "from": ["1", 0]}}
    for number in range(2, 22)
} | {"1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}, "_meta": {"title": "Prompt"}}}
RESULT = bytes(100_000)
_HISTORY = 1000  # entries that a server keeps, as ComfyUI does


class _Server:
    def __init__(self, job_s: float) -> None:
        self.job_s = job_s
        self.waiting: asyncio.Queue[list[Any]] = asyncio.Queue()
        self.queue: dict[str, list[Any]] = {}
        self.running: list[list[Any]] = []
        self.history: dict[str, Any] = {}
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.spans: list[tuple[float, float]] = []

    async def work(self) -> None:
        while True:
            item = await self.waiting.get()
            prompt_id, client_id = item[1], item[3]["client_id"]
            if self.queue.pop(prompt_id, None) is None:
                continue
            self.running = [item]
            begun = time.monotonic()
            await asyncio.sleep(self.job_s)
            self.spans.append((begun, time.monotonic()))
            image = {"filename": f"{prompt_id}.png", "subfolder": "", "type": "output"}
            self.history[prompt_id] = {
                "prompt": item,
                "outputs": {"9": {"images": [image]}},
                "status": {"status_str": "success", "completed": True, "messages": []},
            }
            while len(self.history) > _HISTORY:
                del self.history[next(iter(self.history))]
            self.running = []
            if client_id in self.sockets:
                data = {"node": None, "prompt_id": prompt_id}
                await self.sockets[client_id].send_json({"type": "executing", "data": data})

    async def post_prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        extra = {"client_id": body["client_id"]}
        item = [0, body["prompt_id"], body["prompt"], extra, []]
        self.queue[body["prompt_id"]] = item
        self.waiting.put_nowait(item)
        return web.json_response({"prompt_id": body["prompt_id"], "number": 0, "node_errors": {}})

    async def post_queue(self, request: web.Request) -> web.Response:
        for prompt_id in (await request.json())["delete"]:
            self.queue.pop(prompt_id, None)
        return web.Response()

    async def get_queue(self, _: web.Request) -> web.Response:
        pending = list(self.queue.values())
        return web.json_response({"queue_running": self.running, "queue_pending": pending})

    async def get_history(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info["id"]
        found = {prompt_id: self.history[prompt_id]} if prompt_id in self.history else {}
        return web.json_response(found)

    async def get_socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[request.query["clientId"]] = socket
        async for _ in socket:
            pass
        return socket


async def _serve(job_s: float, has_socket: bool) -> None:
    server = _Server(job_s)
    app = web.Application()
    app.router.add_post("/prompt", server.post_prompt)
    app.router.add_post("/queue", server.post_queue)
    app.router.add_get("/queue", server.get_queue)
    app.router.add_get("/history/{id}", server.get_history)

    async def features(_: web.Request) -> web.Response:
        return web.json_response({"max_upload_size": 1 << 30})

    async def view(_: web.Request) -> web.Response:
        return web.Response(body=RESULT)

    async def spans(_: web.Request) -> web.Response:
        return web.json_response(server.spans)

    app.router.add_get("/features", features)
    app.router.add_get("/view", view)
    app.router.add_get("/bench", spans)
    if has_socket:
        app.router.add_get("/ws", server.get_socket)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await server.work()


def _resident_bytes() -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _batch(servers: list[str], count: int, folder: Path) -> None:
    from stylemaster_core.queue.client import ComfyClient
    from stylemaster_core.queue.jobs import Row, make_jobs
    from stylemaster_core.queue.journal import Journal
    from stylemaster_core.queue.runner import RunConfig, run_jobs

    jobs = make_jobs(WORKFLOW, [Row(prompt=f"prompt {number}") for number in range(count)])
    config = RunConfig()
    clients = [ComfyClient(url, config.timeout_s) for url in servers]
    begun, cpu = time.monotonic(), time.process_time()
    memory: list[int | None] = []
    done = 0
    with closing(Journal(folder)) as journal:
        for result in run_jobs(jobs, clients, journal, folder, config):
            done += result.status == "done"
            (folder / result.files[0]).unlink()  # 10,000 results need not lie about
            if done % max(count // 10, 1) == 0:
                memory.append(_resident_bytes())
    report = {
        "done": done,
        "seconds": time.monotonic() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "resident_bytes_after_each_tenth": memory,
    }
    sys.stdout.write(json.dumps(report))


def main() -> None:
    role, *words = sys.argv[1:]
    if role == "serve":
        asyncio.run(_serve(float(words[0]), has_socket=words[1] == "socket"))
    else:
        *servers, count, folder = words
        _batch(servers, int(count), Path(folder))


if __name__ == "__main__":
    main()
