"""`stylemaster queue` against servers that answer like ComfyUI's and fail on purpose."""

import argparse
import asyncio
import json
import queue
import re
import threading
import time
import urllib.parse
from collections import Counter
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stylemaster_core.cli import queue as queue_cli
from stylemaster_core.errors import ConfigError, StyleMasterError
from stylemaster_core.queue.client import ComfyClient
from stylemaster_core.queue.journal import Journal, read_journal
from stylemaster_core.queue.progress import StepListener
from stylemaster_core.queue.runner import RunConfig, run_jobs

WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "own.png"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "own", "clip": ["9", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
}


class FakeComfy:
    """A ComfyUI on loopback; its prompts take `job_s` seconds, one after the other."""

    def __init__(self, job_s=0.0):
        self.job_s = job_s
        self.mutex = threading.RLock()
        self.inputs = {}  # path -> content
        self.uploads = Counter()
        self.finished = []  # texts of the prompts that were carried out
        self.views = Counter()
        self.posts = []
        self.interrupted = []
        self.own_ids = False  # choose prompt ids itself, as old servers do
        self.drop = {}  # "POST /prompt" -> how often to break off after having done it
        self.die_in_view = False
        self.reject = {}  # text of a prompt -> body of the 400
        self.fail = {}  # text of a prompt -> messages of its status
        self.no_files = False
        self.max_upload_bytes = 1000
        self.port = 0
        self.restart()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def restart(self):
        """Start with an empty queue and history; the input folder is still there."""
        self.queue, self.history, self.started = [], {}, None
        self.is_up = True
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                fake.handle(self, "GET")

            def do_POST(self):
                fake.handle(self, "POST")

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self):
        self.is_up = False
        self.http.server_close()
        threading.Thread(target=self.http.shutdown).start()

    def advance(self):
        """Carry out what had the time for it."""
        while self.queue:
            _, prompt_id, prompt, _, _ = item = self.queue[0]
            self.started = self.started or time.monotonic()
            if time.monotonic() < self.started + self.job_s:
                return
            self.end(item, self.fail.get(prompt["2"]["inputs"]["text"]))

    def end(self, item, messages=None):
        _, prompt_id, prompt, _, _ = item
        self.queue.remove(item)
        self.started = None
        outputs = {}
        if not messages:
            self.finished.append(prompt["2"]["inputs"]["text"])
            image = {"filename": f"{prompt_id}.png", "subfolder": "", "type": "output"}
            preview = image | {"filename": "preview.png", "type": "temp"}
            outputs = {"3": {"images": [image]}, "4": {"images": [preview], "text": ["hello"]}}
        self.history[prompt_id] = {
            "prompt": item,
            "outputs": {} if self.no_files else outputs,
            "status": {"status_str": "error" if messages else "success", "messages": messages},
        }

    def handle(self, request, method):
        url = urllib.parse.urlsplit(request.path)
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        with self.mutex:
            if not self.is_up:
                return
            self.advance()
            if method == "POST":
                self.posts.append(url.path)
            code, answer = self.answer(method, url, body)
            key = f"{method} {url.path}"
            if self.drop.get(key, 0) > 0:
                self.drop[key] -= 1
                return  # the connection ends without an answer
        if isinstance(answer, dict):
            answer = json.dumps(answer).encode()
        request.send_response(code)
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        if self.die_in_view and url.path == "/view":
            request.wfile.write(answer[:3])
            self.die()
        else:
            request.wfile.write(answer)

    def answer(self, method, url, body):
        if url.path == "/features":
            return 200, {"max_upload_size": self.max_upload_bytes}
        if url.path == "/queue" and method == "GET":
            return 200, {"queue_running": self.queue[:1], "queue_pending": self.queue[1:]}
        if url.path == "/queue":
            ids = json.loads(body)["delete"]
            self.queue[1:] = [item for item in self.queue[1:] if item[1] not in ids]
            return 200, b""
        if url.path == "/interrupt":
            assert self.queue[0][1] == json.loads(body)["prompt_id"]
            self.interrupted.append(self.queue[0][2]["2"]["inputs"]["text"])
            self.end(self.queue[0], [["execution_interrupted", {"node_id": "3"}]])
            return 200, b""
        if url.path.startswith("/history/"):
            prompt_id = url.path.rpartition("/")[2]
            return 200, {k: v for k, v in self.history.items() if k == prompt_id}
        if url.path == "/prompt":
            return self.post_prompt(json.loads(body))
        if url.path == "/upload/image":
            return self.post_upload(body)
        if url.path == "/view":
            query = dict(urllib.parse.parse_qsl(url.query))
            assert query["type"] == "output"
            prompt = self.history[query["filename"].removesuffix(".png")]["prompt"][2]
            self.views[prompt["2"]["inputs"]["text"]] += 1
            style = self.inputs.get(prompt["1"]["inputs"]["image"], b"own")
            return 200, prompt["2"]["inputs"]["text"].encode() + b"|" + style
        return 404, b"no such page"

    def post_prompt(self, body):
        text = body["prompt"]["2"]["inputs"]["text"]
        if text in self.reject:
            return 400, self.reject[text]
        prompt_id = f"server-{len(self.posts)}" if self.own_ids else body["prompt_id"]
        self.queue.append([0, prompt_id, body["prompt"], {"client_id": body["client_id"]}, []])
        return 200, {"prompt_id": prompt_id, "node_errors": {}}

    def post_upload(self, body):
        fields = {
            re.search(rb'name="(\w+)"', part)[1].decode(): part
            for part in body.split(b"\r\n--" + body[2:34])
            if b"name=" in part
        }
        name = re.search(rb'filename="(.+?)"', fields["image"])[1].decode()
        content = fields["image"].partition(b"\r\n\r\n")[2]
        folder = fields["subfolder"].partition(b"\r\n\r\n")[2].decode()
        assert fields["overwrite"].endswith(b"false")
        if self.inputs.setdefault(f"{folder}/{name}", content) != content:
            name = name.replace(".", " (1).")
            self.inputs[f"{folder}/{name}"] = content
        self.uploads[name] += 1
        return 200, {"name": name, "subfolder": folder, "type": "input"}


@pytest.fixture
def fakes():
    made = []

    def make(**options):
        made.append(FakeComfy(**options))
        return made[-1]

    yield make
    for fake in made:
        if fake.is_up:
            fake.die()


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Run the command on a small batch."""
    (tmp_path / "w.json").write_text(json.dumps(WORKFLOW))
    (tmp_path / "styles").mkdir()
    (tmp_path / "styles/s.png").write_bytes(b"style")
    monkeypatch.setattr(RunConfig, "__init__", _quick(RunConfig.__init__))

    def run(*fakes, prompts=("a", "b", "c"), options=()):
        (tmp_path / "p.txt").write_text("\n".join(prompts))
        parser = argparse.ArgumentParser()
        queue_cli.add_parser(parser.add_subparsers())
        servers = [option for fake in fakes for option in ("--server", fake.url)]
        fixed = ["--styles", "styles", "--prompts", "p.txt", "--out", "out"]
        monkeypatch.chdir(tmp_path)
        args = parser.parse_args(["queue", "w.json", *fixed, *servers, *options])
        return args.run(args)

    run.out = tmp_path / "out"
    return run


def _quick(init):
    def quick(self, **fields):
        init(self, poll_s=0.02, **fields)

    return quick


def in_time(batch, *fakes):
    """The status of a batch, which would hang for an hour if it waited for a server."""
    status = queue.Queue()
    options = ["--timeout", "3600", "--give-up", "3600"]
    thread = threading.Thread(
        target=lambda: status.put(batch(*fakes, options=options)), daemon=True
    )
    thread.start()
    return status.get(timeout=120)


def results(batch):
    """Readable files of the output folder, name -> content."""
    return {
        path.name: path.read_bytes()
        for path in batch.out.iterdir()
        if path.name not in ("queue.jsonl", ".queue.lock")
    }


def expected(*prompts):
    return {f"s__{prompt}_1.png": prompt.encode() + b"|style" for prompt in prompts}


def events(batch, event):
    lines = (batch.out / "queue.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def test_two_servers_share_the_jobs(fakes, batch, capsys):
    one, two = fakes(job_s=0.05), fakes(job_s=0.05)
    assert batch(one, two, prompts="abcdef", options=["--json"]) == 0
    assert results(batch) == expected(*"abcdef")
    assert sorted(one.finished + two.finished) == list("abcdef")
    assert one.finished and two.finished
    assert [sum(fake.uploads.values()) for fake in (one, two)] == [1, 1]
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["status"] for row in rows} == {"done"}
    assert sorted(row["files"][0] for row in rows) == sorted(expected(*"abcdef"))


def test_a_server_that_chooses_the_ids_itself(fakes, batch):
    fake = fakes()
    fake.own_ids = True
    assert batch(fake) == 0
    assert results(batch) == expected(*"abc")


def test_several_jobs_at_a_server(fakes, batch):
    fake = fakes(job_s=0.1)
    thread = threading.Thread(target=batch, args=(fake,), kwargs={"options": ["--per-server", "3"]})
    thread.start()
    most = 0
    while thread.is_alive():
        most = max(most, len(fake.queue))
        time.sleep(0.005)
    assert most == 3
    assert results(batch) == expected(*"abc")


def once_working(fake, act):
    """Do something to a server soon after it has got a job."""

    def wait():
        while not fake.queue:
            time.sleep(0.01)
        time.sleep(0.1)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_the_jobs_of_a_dead_server_go_to_another(fakes, batch):
    one, two = fakes(job_s=0.1), fakes(job_s=60)
    once_working(two, two.die)
    assert in_time(batch, one, two) == 0
    assert results(batch) == expected(*"abc")
    assert two.finished == []
    assert len(events(batch, "lost")) == 1
    assert len(events(batch, "done")) == 3


def test_a_server_that_dies_while_it_sends_a_result(fakes, batch):
    one, two = fakes(job_s=0.05), fakes()
    two.die_in_view = True
    assert batch(one, two) == 0
    assert results(batch) == expected(*"abc")


def test_a_server_that_hangs_is_lost_and_what_it_still_does_is_not_taken(fakes, batch):
    """Silent, not dead: it comes back with our prompt running, and that one is interrupted."""
    one, two = fakes(job_s=0.4), fakes(job_s=1)

    def hang():
        with two.mutex:
            time.sleep(0.7)

    once_working(two, hang)
    assert batch(one, two, prompts="abcd", options=["--timeout", "0.3"]) == 0
    assert results(batch) == expected(*"abcd")
    assert len(events(batch, "done")) == 4
    assert sum((one.views + two.views).values()) == 4
    assert two.interrupted


def test_a_restarted_server_that_has_forgotten_the_job_gets_it_again(fakes, batch):
    fake = fakes(job_s=0.3)

    def forget():
        with fake.mutex:
            fake.queue, fake.history, fake.started = [], {}, None

    once_working(fake, forget)
    assert batch(fake) == 0
    assert results(batch) == expected(*"abc")
    (lost,) = events(batch, "lost")
    assert lost["error"].endswith("was it restarted?")


def test_a_server_comes_back(fakes, batch):
    fake = fakes(job_s=0.1)

    def die():
        fake.die()
        threading.Timer(0.25, fake.restart).start()

    once_working(fake, die)
    assert batch(fake) == 0
    assert results(batch) == expected(*"abc")


@pytest.mark.parametrize("request_name", ["POST /prompt", "POST /upload/image", "GET /queue"])
def test_a_lost_answer_does_not_make_a_job_run_twice(fakes, batch, request_name):
    fake = fakes(job_s=0.05)
    connect = ComfyClient.probe

    def probe(self):
        connect(self)
        fake.drop = {request_name: 1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ComfyClient, "probe", probe)
        assert batch(fake) == 0
    assert results(batch) == expected(*"abc")
    assert fake.drop == {request_name: 0}
    assert sorted(fake.finished) == list("abc")


def test_a_lost_answer_of_an_old_server_leaves_no_stray(fakes, batch):
    """The id is not known, so the prompt is cancelled and queued again."""
    fake = fakes(job_s=0.3)
    fake.own_ids, fake.drop = True, {"POST /prompt": 1}
    assert batch(fake, prompts="a") == 0
    assert (fake.interrupted, fake.finished) == (["a"], ["a"])
    assert results(batch) == expected("a")


def test_a_job_that_kills_servers_is_given_up(fakes, batch, capsys):
    fake = fakes()
    fake.drop = {"POST /upload/image": 99}
    assert batch(fake, prompts="a", options=["--attempts", "2"]) == 1
    assert "its server was lost 2 times" in capsys.readouterr().out
    assert fake.drop == {"POST /upload/image": 97}


def test_a_server_that_always_breaks_off_its_results_is_lost(fakes, batch):
    one, two = fakes(job_s=0.1), fakes()
    two.drop = {"GET /view": 1_000_000}
    assert batch(one, two, options=["--timeout", "0.1"]) == 0
    assert results(batch) == expected(*"abc")
    assert sorted(one.finished) == list("abc")


def test_a_job_that_every_server_lost_is_tried_again(fakes, batch):
    one, two = fakes(), fakes()
    one.drop = two.drop = {"POST /upload/image": 2}
    assert batch(one, two, prompts="a") == 0
    assert results(batch) == expected("a")


def test_a_job_is_tried_again_on_another_server(fakes, batch):
    one, two = fakes(), fakes(job_s=0.1)
    one.drop = {"POST /upload/image": 99}
    assert batch(one, two, prompts="abcd", options=["--attempts", "2"]) == 0
    assert two.finished and not one.finished
    assert results(batch) == expected(*"abcd")


def test_all_servers_gone(fakes, batch, capsys):
    fake = fakes(job_s=0.5)

    def die_after_the_first_result():
        while not batch.out.exists() or not results(batch):
            time.sleep(0.01)
        fake.die()

    threading.Thread(target=die_after_the_first_result, daemon=True).start()
    assert batch(fake, options=["--give-up", "0.1"]) == 1
    assert "no server is left" in capsys.readouterr().out
    assert results(batch) == expected("a")
    fake.restart()
    assert batch(fake) == 0
    assert results(batch) == expected(*"abc")


def test_a_failing_node_is_reported_and_not_tried_again(fakes, batch, capsys):
    fake = fakes()
    error = {
        "node_id": "3",
        "node_type": "SaveImage",
        "exception_type": "ValueError",
        "exception_message": "no such thing\n",
    }
    fake.fail = {"b": [["execution_start", {}], ["execution_error", error]]}
    assert batch(fake) == 1
    out = capsys.readouterr().out
    assert re.search(r"failed: s__b \(\w+\): node 3 \(SaveImage\): ValueError: no such thing", out)
    assert results(batch) == expected("a", "c")
    assert fake.posts.count("/prompt") == 3
    fake.fail = {}
    assert batch(fake) == 0
    assert fake.posts.count("/prompt") == 4


def test_a_refused_workflow_is_explained(fakes, batch, capsys):
    fake = fakes()
    problem = {"message": "Value not in list", "details": "image: 'x' not in []"}
    fake.reject = {
        "b": {
            "error": {"message": "Prompt outputs failed validation", "details": ""},
            "node_errors": {"1": {"class_type": "LoadImage", "errors": [problem]}},
        }
    }
    assert batch(fake) == 1
    out = capsys.readouterr().out
    assert (
        "Prompt outputs failed validation\n  node 1 (LoadImage): Value not in list: image:" in out
    )
    assert results(batch) == expected("a", "c")


def test_a_workflow_that_saves_nothing_fails(fakes, batch, capsys):
    fake = fakes()
    fake.no_files = True
    assert batch(fake, prompts="a") == 1
    assert "without a file" in capsys.readouterr().out


def test_a_file_that_is_too_large_is_not_sent(fakes, batch, capsys):
    fake = fakes()
    fake.max_upload_bytes = 3
    assert batch(fake, prompts="a") == 1
    assert "--max-upload-size" in capsys.readouterr().out
    assert fake.posts == []


def test_a_different_file_of_the_same_name_on_the_server(fakes, batch):
    fake = fakes()
    assert batch(fake, prompts="a") == 0
    (path,) = fake.inputs
    fake.inputs = {path: b"half"}
    assert batch(fake, prompts="b") == 0
    assert results(batch) == expected("a", "b")


def test_a_rerun_continues_and_a_changed_workflow_is_new(fakes, batch):
    fake = fakes()
    assert batch(fake, prompts="ab") == 0
    assert batch(fake, prompts="abc") == 0
    assert fake.finished == list("abc")
    assert batch(fake, prompts="abc") == 0
    assert fake.finished == list("abc")
    assert batch(fake, prompts="a", options=["--set", "3.filename_prefix=y"]) == 0
    assert fake.finished == list("abca")
    assert results(batch) == expected(*"abc") | {"s__a_1-2.png": b"a|style"}


def test_nothing_is_overwritten(fakes, batch):
    batch.out.mkdir()
    (batch.out / "s__a_1.png").write_bytes(b"somebody else's")
    assert batch(fakes(), prompts=["a", "A", "a!"]) == 0
    assert results(batch) == {
        "s__a_1.png": b"somebody else's",
        "s__a_1-2.png": b"a|style",
        "s__a_1-3.png": b"A|style",
        "s__a_1-4.png": b"a!|style",
    }


def test_a_run_that_died_while_delivering_overwrites_its_own(fakes, batch):
    fake = fakes()
    assert batch(fake, prompts="a") == 0
    journal = batch.out / "queue.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["event"] == "done"
    journal.write_text("".join(lines[:-1]))
    (batch.out / ".stylemaster-x-1.png.part").write_bytes(b"left over")
    assert batch(fake, prompts="a") == 0
    assert results(batch) == expected("a")


def test_a_killed_run_leaves_a_prompt_that_the_next_one_adopts(fakes, batch):
    fake = fakes(job_s=0.2)
    assert batch(fake, prompts="a") == 0
    journal = batch.out / "queue.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    submitted = [line for line in lines if json.loads(line)["event"] == "submitted"]
    journal.write_text("".join(submitted))
    (batch.out / "s__a_1.png").unlink()
    assert batch(fake, prompts="a") == 0
    assert fake.finished == ["a"]
    assert results(batch) == expected("a")


def test_a_stopped_run_cancels_only_its_own(fakes, batch, tmp_path, monkeypatch):
    fake = fakes(job_s=60)
    other = {"prompt": WORKFLOW, "client_id": "somebody", "prompt_id": "theirs"}

    def interrupt_main(self, *args, **kwargs):
        deadline = time.monotonic() + 5
        while len(fake.queue) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        fake.post_prompt(other)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stylemaster_core.queue.runner.queue.Queue.get", interrupt_main)
        assert batch(fake, options=["--per-server", "2"]) == 130
    assert fake.interrupted == ["a"]
    assert [item[1] for item in fake.queue] == ["theirs"]
    assert sorted(record["event"] for record in read_journal(batch.out).values()) == [
        "cancelled",
        "cancelled",
    ]
    fake.queue, fake.job_s = [], 0
    assert batch(fake) == 0
    assert results(batch) == expected(*"abc")


def test_a_stop_interrupts_nobody_else(fakes, batch, monkeypatch):
    """Ours ended between the two looks at the queue, and somebody else's prompt runs now."""
    fake = fakes(job_s=60)
    client = ComfyClient(fake.url, 1.0)
    fake.post_prompt({"prompt": WORKFLOW, "client_id": client.client_id, "prompt_id": "ours"})
    fake.post_prompt({"prompt": WORKFLOW, "client_id": "somebody", "prompt_id": "theirs"})
    look = ComfyClient._queue

    def look_and_end(self):
        items = look(self)
        if fake.queue[0][1] == "ours":
            fake.end(fake.queue[0])
        return items

    monkeypatch.setattr(ComfyClient, "_queue", look_and_end)
    client.cancel({"ours"})
    assert fake.interrupted == []
    assert [item[1] for item in fake.queue] == ["theirs"]


def test_a_dry_run_asks_no_server_and_writes_nothing(fakes, batch, capsys):
    fake = fakes()
    assert batch(fake, prompts="ab", options=["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1.image = styles/s.png" in out
    assert "2.text = b" in out
    assert fake.posts == []
    assert not batch.out.exists()
    assert batch(prompts="a", options=["--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == {
        "1.image": "styles/s.png",
        "2.text": "a",
    }


def test_no_server_answers(fakes, batch):
    fake = fakes()
    fake.die()
    with pytest.raises(StyleMasterError, match="No server answers"):
        batch(fake)


def test_one_server_that_never_answers_does_not_hold_up_the_other(fakes, batch):
    one, two = fakes(), fakes()
    two.die()
    assert in_time(batch, one, two) == 0
    assert results(batch) == expected(*"abc")


@pytest.mark.parametrize("url", ["127.0.0.1:8188", "ftp://x", "http://", "http://me:pw@host"])
def test_a_bad_address_is_refused(url):
    with pytest.raises(ConfigError, match="--server"):
        ComfyClient(url, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "2.text"],
        ["--set", "3.images=1"],
        ["--map", "picture=1.image"],
        ["--per-server", "0"],
        ["--csv", "x.csv"],
    ],
)
def test_bad_usage(fakes, batch, options):
    with pytest.raises(ConfigError):
        batch(fakes(), options=options)


def test_a_server_is_named(batch):
    with pytest.raises(ConfigError, match="--server"):
        batch()


def test_a_full_disk_ends_the_run(fakes, batch, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    fake = fakes(job_s=0.05)
    monkeypatch.setattr("stylemaster_core.queue.runner.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        batch(fake)


def test_closing_early_ends_the_threads(fakes, tmp_path):
    from stylemaster_core.queue.jobs import Row, make_jobs

    fake = fakes(job_s=0.01)
    jobs = make_jobs(WORKFLOW, [Row(prompt=text) for text in "abcdef"])
    before = threading.active_count()
    with closing(Journal(tmp_path)) as journal:
        run = run_jobs(
            jobs, [ComfyClient(fake.url, 1.0)], journal, tmp_path, RunConfig(poll_s=0.01)
        )
        assert next(run).status == "done"
        run.close()
    assert threading.active_count() <= before + 1
    assert len(fake.finished) < 6


def test_steps_come_from_the_websocket():
    web = pytest.importorskip("aiohttp.web", reason="steps are shown only with aiohttp")

    async def connect(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        data = {"value": 2, "max": 5, "client": request.query["clientId"]}
        await socket.send_bytes(b"a preview")
        await socket.send_json({"type": "status", "data": {}})
        await socket.send_json({"type": "progress", "data": data})
        await socket.receive()  # until the listener disconnects
        return socket

    async def serve(ready):
        app = web.Application()
        app.router.add_get("/ws", connect)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ready(runner.addresses[0][1])
        await stop.wait()
        await runner.cleanup()

    loop, stop, steps = asyncio.new_event_loop(), asyncio.Event(), queue.Queue()
    ports = queue.Queue()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(ports.put),))
    thread.start()
    url = f"http://127.0.0.1:{ports.get(timeout=5)}"
    listener = StepListener(url, "me", lambda *step: steps.put(step))
    try:
        assert steps.get(timeout=5) == (url, 2, 5)
    finally:
        listener.close()
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)
    loop.close()
