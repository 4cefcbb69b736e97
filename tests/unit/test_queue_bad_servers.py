"""A server that misbehaves beside a good one: everything is delivered, once, and nothing breaks."""

import asyncio
import json
import random
import time
from collections import Counter

import pytest

from stylemaster_core.data.jsonl import read_jsonl
from stylemaster_core.queue import answers, board, client
from stylemaster_core.queue.client import ComfyClient, ServerSick
from stylemaster_core.queue.journal import read_journal
from stylemaster_core.queue.workflow import Target
from tests.bad_comfy import BadComfy, cases
from tests.fake_comfy import FakeComfy
from tests.queue_batch import SLOW_S, Batches, files_in, run_batch, until_idle

# A sample that takes seconds; the fuzz run takes them all.
SAMPLE = [*cases()[::25], "job/swaps-ids", "view/gzip-lie", "upload/renames"]
MAX_BYTES = 300_000_000


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "SLOW_S", SLOW_S)


@pytest.fixture
def servers():
    made = []

    def make(case=None, **options):
        made.append(BadComfy(case, **options) if case else FakeComfy(**options))
        return made[-1]

    yield make
    for fake in made:
        if fake.is_up:
            fake.die()


def assert_delivered(outcome, texts):
    results, files = outcome
    assert Counter(result.status for result in results) == {"done": len(texts)}, results
    assert files == {f"style__{text}_1.png": f"{text}|style".encode() for text in texts}


@pytest.mark.parametrize("case", SAMPLE)
def test_everything_is_delivered_beside_a_bad_server(servers, tmp_path, case):
    texts = [f"p{n}" for n in range(6)]
    outcome = run_batch(tmp_path, [servers(case), servers(job_s=0.03)], texts)
    assert_delivered(outcome, texts)
    for result in outcome[0]:
        assert str(result.error).isprintable()


@pytest.mark.parametrize("case", ["prompt/500", "prompt/429", "view/404", "job/fails"])
def test_a_sick_server_does_not_swallow_the_queue(servers, tmp_path, case):
    texts = [f"p{n}" for n in range(20)]
    bad = servers(case)
    outcome = run_batch(tmp_path, [bad, servers(job_s=0.03)], texts)
    assert_delivered(outcome, texts)
    assert len(bad.posts) < 20


def test_a_pause_that_a_server_asks_for_is_kept(servers, tmp_path, monkeypatch):
    """The server answers 429 once; nothing is sent there again before the time is over."""
    server = servers()
    asked = []
    post = FakeComfy.post_prompt

    def busy(self, body):
        asked.append(time.monotonic())
        if len(asked) == 1:
            return 429, b"later"
        return post(self, body)

    monkeypatch.setattr(FakeComfy, "post_prompt", busy)
    monkeypatch.setattr(FakeComfy, "fields", {"Retry-After": "1"})
    assert_delivered(run_batch(tmp_path, [server], ["a", "b"]), ["a", "b"])
    assert asked[1] - asked[0] >= 1


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [
        (None, None),
        ("7", 7.0),
        ("0", 0.0),
        ("soon", None),
        ("-3", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("9" * 400, 86_400.0),
    ],
)
def test_retry_after(header, wait_s):
    assert client._wait_s(header) == wait_s


def test_a_job_that_fails_on_two_servers_is_the_jobs_fault(servers, tmp_path):
    fakes = [servers(job_s=0.01) for _ in range(3)]
    for fake in fakes:
        fake.fail = {"bad": [["execution_error", {"exception_message": "no"}]]}
    texts = [f"p{n}" for n in range(8)]
    results, files = run_batch(tmp_path, fakes, ["bad", *texts])
    assert [r.job.name for r in results if r.status == "failed"] == ["style__bad"]
    assert len(files) == 8
    assert sum(fake.posts.count("/prompt") for fake in fakes) == 8 + 2


def test_many_bad_jobs_make_no_server_sick(servers, tmp_path, caplog):
    fakes = [servers(), servers()]
    texts = [f"bad{n}" for n in range(8)]
    for fake in fakes:
        fake.fail = {text: [["execution_error", {"exception_message": "no"}]] for text in texts}
    results, files = run_batch(tmp_path, fakes, [*texts, "good"])
    assert Counter(result.status for result in results) == {"failed": 8, "done": 1}
    assert list(files) == ["style__good_1.png"]


def test_a_server_alone_that_stays_sick_is_given_up(servers, tmp_path):
    results, _ = run_batch(tmp_path, [servers("prompt/500")], ["a", "b"], give_up_s=0.3)
    assert [result.status for result in results] == ["failed", "failed"]
    assert "no server is left" in results[0].error


def test_a_server_alone_that_is_sick_for_a_while_loses_no_job(servers, tmp_path, monkeypatch):
    """It answers 500 more often than a job may lose its server, and then it is well."""
    server = servers()
    asked = []
    post = FakeComfy.post_prompt

    def sick(self, body):
        asked.append(body["prompt"]["2"]["inputs"]["text"])
        return (500, b"starting") if len(asked) <= 5 else post(self, body)

    monkeypatch.setattr(FakeComfy, "post_prompt", sick)
    assert_delivered(run_batch(tmp_path, [server], ["a", "b"]), ["a", "b"])


def test_a_job_that_makes_a_server_sick_fails_alone(servers, tmp_path, monkeypatch):
    post = FakeComfy.post_prompt

    def sick(self, body):
        is_poison = body["prompt"]["2"]["inputs"]["text"] == "poison"
        return (500, b"oh") if is_poison else post(self, body)

    monkeypatch.setattr(FakeComfy, "post_prompt", sick)
    results, files = run_batch(tmp_path, [servers()], ["poison", "a", "b"])
    assert {r.job.name: r.status for r in results}["style__poison"] == "failed"
    assert len(files) == 2


def test_a_waiting_job_is_taken_off_a_busy_server_for_an_idle_one(servers, tmp_path):
    slow, quick = servers(job_s=1.0), servers(job_s=0.02)
    texts = ["a", "b", "c", "d"]
    assert_delivered(run_batch(tmp_path, [slow, quick], texts), texts)
    assert len(slow.finished) == 1
    assert sorted(slow.finished + quick.finished) == texts


def test_a_slow_result_is_no_result(servers, tmp_path):
    bad = servers("view/drip-body")
    assert_delivered(run_batch(tmp_path, [bad, servers(job_s=0.2)], ["a", "b"]), ["a", "b"])
    assert "too slow" in (tmp_path / "out/queue.jsonl").read_text()


ENTRY = {
    "prompt": [1, "id", {"1": {"class_type": "A", "inputs": {"x": 5}}}],
    "outputs": {"1": {"images": [{"filename": "a.png"}], "text": ["b", None], "flag": True}},
    "status": {"status_str": "success", "messages": [["execution_start", {"x": [1]}]]},
}


def entry(**changes):
    return answers.decode(json.dumps(ENTRY | changes).encode(), answers.Entry)


def test_an_entry_of_the_history_is_read():
    assert entry().files() == [answers.OutputFile("a.png")]
    assert entry().problem() is None
    assert entry(status=None, outputs=None).files() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": {"1": {"images": [{"filename": None}]}}},
        {"outputs": {"1": {"images": [{"filename": "a", "subfolder": 3}]}}},
        {"outputs": [1]},
        {"status": "fine"},
        {"status": {"status_str": "error", "messages": [["execution_error", 5]]}},
        {"status": {"status_str": "error", "messages": [["execution_error"]]}},
        {"status": {"status_str": "error", "messages": [["execution_error", {"node_type": {}}]]}},
        {"prompt": None},
    ],
)
def test_an_entry_of_another_form_is_none(changes):
    with pytest.raises(answers.AnswerError):
        bad = entry(**changes)
        bad.problem()
        bad.files()


@pytest.mark.parametrize(
    ("nodes", "is_ours"),
    [
        ({"1": {"class_type": "A", "inputs": {"x": 5}}}, True),
        ({"1": {"class_type": "A", "inputs": {"x": "5"}}}, True),  # a text input
        ({"1": {"class_type": "A", "inputs": {"x": 5.0, "y": 1}}}, True),  # filled in by a pack
        ({"1": {"class_type": "A", "inputs": {"x": 6}}}, False),
        ({"1": {"class_type": "B", "inputs": {"x": 5}}}, False),
        ({"1": {"class_type": "A", "inputs": {}}}, False),
        ({"2": {"class_type": "A", "inputs": {"x": 5}}}, False),
        ({}, False),
    ],
)
def test_a_prompt_of_the_history_is_known_again(nodes, is_ours):
    sent = {"1": {"class_type": "A", "inputs": {"x": 5}}}
    assert entry(prompt=[1, "id", nodes]).answers(sent, {Target("1", "x"): 5}) is is_ours


def test_an_upload_that_the_server_renamed_is_known_again():
    nodes = {"1": {"class_type": "A", "inputs": {"x": "folder/ab (2).png"}}}
    sent = {"1": {"class_type": "A", "inputs": {"x": "folder/ab.png"}}}
    assert entry(prompt=[1, "id", nodes]).answers(sent, {Target("1", "x"): "folder/ab.png"})


def test_words_of_a_server_are_safe_to_print():
    words = answers.plain("\x1b[31mred\x07\u202e\n\tnext" + "x" * 100_000)
    assert words.isprintable()
    assert words.startswith("\ufffd[31mred\ufffd\ufffd next")
    assert len(words) < 500
    problems = {f"\x1b{n}": {"errors": [{"message": "m\x1b"}]} for n in range(1000)}
    refusal = {"error": "\x1b]0;x", "node_errors": problems}
    text = answers.refusal_words(answers.decode(json.dumps(refusal).encode(), answers.Refusal))
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text.split("\n")) == 21


@pytest.mark.parametrize("case", ["queue/endless-json", "queue/length-huge", "queue/deep-known"])
def test_an_endless_answer_ends(servers, case):
    async def ask():
        one = ComfyClient(servers(case).url, 10.0)
        try:
            await one.probe()
        finally:
            await one.close()

    with pytest.raises(ServerSick):
        asyncio.run(ask())


@pytest.mark.parametrize("point", ["before", "between", "after"])
def test_a_run_killed_while_it_delivers_is_taken_up(servers, tmp_path, monkeypatch, point):
    """Killed between the entries "delivering" and "done", wherever the file is by then."""

    class Killed(Exception):
        pass

    def kill(*args):
        if point == "after":
            place(*args)
        raise Killed

    server = servers()
    place = board.move_new
    with monkeypatch.context() as patch:
        patch.setattr(board, "move_new", kill)
        patch.setattr(board._ResultFiles, "sweep", lambda self: None)
        with pytest.raises(Killed):
            run_batch(tmp_path, [server], ["a"])
    last = read_journal(tmp_path / "out").popitem()[1]
    assert last["event"] == "delivering"
    if point == "between":  # a power cut took the file
        for part in (tmp_path / "out").glob(".stylemaster-*.part"):
            part.unlink()
    assert_delivered(run_batch(tmp_path, [server], ["a"]), ["a"])
    assert len(server.finished) == 1
    assert server.views["a"] == (2 if point == "between" else 1)


def test_somebody_elses_file_is_not_overwritten_by_a_race(servers, tmp_path, monkeypatch):
    """It appears after the name was chosen; and it is not taken for our own afterwards."""
    place = board.move_new

    def late(part, target):
        if not target.exists() and target.name == "style__a_1.png":
            target.write_bytes(b"theirs")
        place(part, target)

    monkeypatch.setattr(board, "move_new", late)
    _, files = run_batch(tmp_path, [servers()], ["a"])
    assert files == {"style__a_1.png": b"theirs", "style__a_1-2.png": b"a|style"}


@pytest.fixture(scope="module")
def batches():
    made = Batches()
    yield made
    made.close()


ENDLESS = [
    "queue/endless-json",
    "history/endless-body",
    "prompt/endless-error",
    "view/endless-body",
]
ENDLESS += ["features/endless-head", "history/endless-field", "socket/flood", "socket/huge"]


@pytest.mark.parametrize("case", ENDLESS)
def test_what_does_not_end_takes_no_memory(servers, batches, tmp_path, case):
    texts = ["a", "b", "c"]
    report = batches.run(tmp_path, [servers(case), servers(job_s=0.05)], texts, timeout_s=5.0)
    assert (report["error"], report["statuses"]) == (None, ["done"] * 3)
    assert report["peak_bytes"] < MAX_BYTES


@pytest.mark.parametrize("seed", range(6))
def test_kills_lose_and_double_nothing(servers, batches, tmp_path, seed):
    draw = random.Random(seed)
    fakes = [servers(job_s=draw.choice([0.0, 0.02])) for _ in range(1 + seed % 2)]
    texts = [f"p{n}" for n in range(8)]
    kills = [draw.uniform(0.0, 0.4) for _ in range(3)]
    for kill_after_s in [*kills, None]:
        report = batches.run(tmp_path, fakes, texts, timeout_s=20.0, kill_after_s=kill_after_s)
        assert report["error"] is None
        until_idle(fakes)
    assert sorted(text for fake in fakes for text in fake.finished) == texts
    assert files_in(tmp_path) == {f"style__{t}_1.png": f"{t}|style".encode() for t in texts}
    records = read_jsonl(tmp_path / "out/queue.jsonl", lambda record: None)
    assert Counter(r["job"] for r in records if r["event"] == "done").most_common(1)[0][1] == 1
    assert not list((tmp_path / "out").glob(".stylemaster-*.part"))
