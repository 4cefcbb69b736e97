"""`stylemaster queue` against servers that answer like ComfyUI's and fail on purpose."""

import argparse
import asyncio
import itertools
import json
import queue
import re
import threading
import time
import types
import urllib.parse
from contextlib import closing

import pytest
from aiohttp import web

from stylemaster_core.cli import queue as queue_cli
from stylemaster_core.errors import ConfigError, DiskError, StyleMasterError
from stylemaster_core.queue.client import ComfyClient
from stylemaster_core.queue.journal import Journal, read_journal
from stylemaster_core.queue.listener import Listener
from stylemaster_core.queue.runner import RunConfig, run_jobs
from tests.fake_comfy import WORKFLOW, FakeComfy


@pytest.fixture
def fakes():
    made = []

    def make(kind=FakeComfy, **options):
        made.append(kind(**options))
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
    one, two = fakes(job_s=0.4), fakes(job_s=2)

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

    async def probe(self):
        await connect(self)
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
    assert batch(one, two, options=["--timeout", "1"]) == 0
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


def test_a_result_that_was_deleted_is_made_again(fakes, batch, capsys):
    fake = fakes()
    assert batch(fake) == 0
    (batch.out / "s__b_1.png").unlink()
    capsys.readouterr()
    assert batch(options=["--dry-run"]) == 0
    assert capsys.readouterr().out.count("(done earlier)") == 2
    assert batch(fake) == 0
    assert fake.finished == list("abcb")
    assert results(batch) == expected(*"abc")


def test_redo_makes_all_of_them_again_in_their_places(fakes, batch, capsys):
    fake = fakes()
    assert batch(fake) == 0
    (batch.out / "s__a_1.png").unlink()
    (batch.out / "s__b_1.png").write_bytes(b"somebody else's")
    assert batch(options=["--dry-run", "--redo"]) == 0
    assert "(done earlier)" not in capsys.readouterr().out
    assert batch(fake, options=["--redo"]) == 0
    assert sorted(fake.finished) == list("aabbcc")
    mine = expected(*"abc") | {"s__b_1.png": b"somebody else's", "s__b_1-2.png": b"b|style"}
    assert results(batch) == mine
    assert batch(fake) == 0
    assert len(fake.finished) == 6


class CachingComfy(FakeComfy):
    """It makes nothing twice, as ComfyUI does, and says which nodes' results are earlier ones."""

    def __init__(self, **options):
        self.made = {}  # the prompt -> its id
        self.gone = set()  # files that somebody has deleted
        super().__init__(**options)

    def end(self, item, messages=None):
        prompt = item[2]
        key = json.dumps(prompt, sort_keys=True)
        super().end(item, messages)
        earlier = self.made.setdefault(key, item[1])
        if earlier != item[1]:
            self.finished.pop()
            entry = self.history[item[1]]
            entry["outputs"]["3"]["images"][0]["filename"] = f"{earlier}.png"
            entry["status"]["messages"] = [["execution_cached", {"nodes": ["1", "3"]}]]

    def answer(self, method, url, body):
        name = dict(urllib.parse.parse_qsl(url.query)).get("filename")
        return (404, b"") if name in self.gone else super().answer(method, url, body)


def test_a_cached_result_whose_file_is_gone_is_made_under_another_prefix(fakes, batch):
    fake = fakes(kind=CachingComfy)
    assert batch(fake, prompts="ab") == 0
    for name in ("s__a_1.png", "s__b_1.png"):
        (batch.out / name).unlink()
    first = next(prompt_id for key, prompt_id in fake.made.items() if '"text": "a"' in key)
    fake.gone = {f"{first}.png"}
    assert batch(fake, prompts="ab") == 0
    assert results(batch) == expected(*"ab")
    assert fake.finished == list("aba"), "b came from the cache, a was made again"
    prefixes = [json.loads(key)["3"]["inputs"]["filename_prefix"] for key in fake.made]
    assert prefixes[:2] == ["x", "x"] and re.fullmatch(r"x_[0-9a-f]{6}", prefixes[2])
    assert batch(fake, prompts="ab") == 0 and len(fake.finished) == 3


def test_a_server_that_never_has_its_cached_results_is_not_asked_for_ever(fakes, batch):
    fake = fakes(kind=CachingComfy)
    assert batch(fake, prompts="a") == 0
    (batch.out / "s__a_1.png").unlink()
    fake.gone = {f"{prompt_id}.png" for prompt_id in fake.made.values()}
    end = fake.end

    def lose(item, messages=None):
        end(item, messages)
        fake.gone.add(f"{item[1]}.png")
        fake.history[item[1]]["status"]["messages"] = [["execution_cached", {"nodes": ["3"]}]]

    fake.end = lose
    options = ["--give-up", "0.2", "--timeout", "0.2"]
    assert batch(fake, prompts="a", options=options) == 1
    assert len(fake.made) == 2


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
    client = ComfyClient(fake.url, 5.0)
    fake.post_prompt({"prompt": WORKFLOW, "client_id": client.client_id, "prompt_id": "ours"})
    fake.post_prompt({"prompt": WORKFLOW, "client_id": "somebody", "prompt_id": "theirs"})
    look = ComfyClient._queue

    async def look_and_end(self):
        items = await look(self)
        if fake.queue[0][1] == "ours":
            fake.end(fake.queue[0])
        return items

    async def cancel():
        await client.cancel({"ours"})
        await client.close()

    monkeypatch.setattr(ComfyClient, "_queue", look_and_end)
    asyncio.run(cancel())
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


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8188", "ftp://x", "http://", "http://me:pw@host", "http://a:b", "http://[::1"],
)
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
        ["--timeout", "nan"],
        ["--max-jobs", "0"],
        ["--seed", str(2**64)],
        ["--csv", "x.csv"],
    ],
)
def test_bad_usage(fakes, batch, options):
    with pytest.raises(ConfigError):
        batch(fakes(), options=options)


def test_a_server_is_named(batch):
    with pytest.raises(ConfigError, match="--server"):
        batch()


def test_what_does_not_fit_on_the_disk_is_refused_before_work(fakes, batch, monkeypatch):
    """With the option that makes it fit; 3 jobs of 5 bytes each."""
    fake = fakes(job_s=0.0)
    usage = types.SimpleNamespace(free=12)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(DiskError, match="3 jobs takes about .*--max-jobs 2 .*--out") as found:
        batch(fake)
    assert "--skip-space-check" in str(found.value) and not fake.finished
    assert batch(fake, options=["--max-jobs", "2"]) == 0
    assert sorted(text for text in fake.finished) == ["a", "b"]
    assert batch(fake) == 0, "the last one fits"
    assert sorted(fake.finished) == ["a", "b", "c"]
    usage.free = 3
    with pytest.raises(DiskError, match="free; pass --out on another disk, or --skip"):
        batch(fake, options=["--redo"])
    assert batch(fake, options=["--redo", "--skip-space-check"]) == 0
    assert len(fake.finished) == 6


def test_a_full_disk_ends_the_run(fakes, batch, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    fake = fakes(job_s=0.05)
    monkeypatch.setattr("stylemaster_core.queue.board.os.link", full)
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


def test_steps_and_ends_come_from_the_websocket():
    strange = [
        "null",
        "[]",
        "{",
        "7",
        '{"type": null}',
        '{"type": "executing"}',
        '{"type": "progress"}',
    ]
    strange += [
        json.dumps({"type": kind, "data": data})
        for kind, data in itertools.product(
            ("progress", "executing"), (None, [], "x", 1e400, {"value": None}, {"node": 7})
        )
    ]

    async def connect(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        data = {"value": 2, "max": 5, "client": request.query["clientId"]}
        await socket.send_bytes(b"a preview")
        for text in strange:
            await socket.send_str(text)
        await socket.send_json({"type": "status", "data": {}})
        await socket.send_json({"type": "progress", "data": data})
        await socket.send_json({"type": "executing", "data": {"node": "3", "prompt_id": "mine"}})
        await socket.send_json({"type": "executing", "data": {"node": None, "prompt_id": "mine"}})
        await socket.receive()  # until the listener disconnects
        return socket

    async def listen():
        stop, steps = asyncio.Event(), []
        app = web.Application()
        app.router.add_get("/ws", connect)
        runner = web.AppRunner(app, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = ComfyClient(f"http://127.0.0.1:{runner.addresses[0][1]}", 5.0)
        ends = []

        def on_end(prompt_id):
            ends.append(prompt_id)
            stop.set()

        listener = Listener(client, on_end, lambda: None, lambda *step: steps.append(step))
        listening = asyncio.ensure_future(listener.run())
        await asyncio.wait_for(stop.wait(), 10)
        listening.cancel()
        await client.close()
        await runner.cleanup()
        return client, steps, ends

    client, steps, ends = asyncio.run(listen())
    assert steps == [(client.url, 2, 5)]
    assert ends == ["mine"]
