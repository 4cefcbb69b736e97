"""The jobs of `stylemaster queue`: which inputs receive what, and what makes a job the same."""

import copy
import json

import pytest

from stylemaster_core.errors import ConfigError
from stylemaster_core.queue.jobs import Row, cross_product, make_jobs, read_csv
from stylemaster_core.queue.journal import Journal, read_journal
from stylemaster_core.queue.workflow import (
    Target,
    find_role,
    find_target,
    load_workflow,
    parse_value,
)

WORKFLOW = {
    "1": {"class_type": "LoadVideo", "inputs": {"file": "a.mp4"}},
    "2": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "My v1.0"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "good", "clip": ["9", 0]}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["9", 0]}},
    "5": {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["3", 0], "negative": ["4", 0], "strength": 1.0},
    },
    "6": {
        "class_type": "KSampler",
        "inputs": {"positive": ["5", 0], "negative": ["5", 1], "seed": 1, "size.width": 64},
    },
}


@pytest.fixture
def workflow():
    return copy.deepcopy(WORKFLOW)


@pytest.fixture
def files(tmp_path):
    for name in ("videos/b.mp4", "videos/a.MP4", "videos/notes.txt", "styles/s.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def test_a_workflow_of_the_editor_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"nodes": [], "links": []}))
    with pytest.raises(ConfigError, match=r"Export \(API\)"):
        load_workflow(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"1": {"inputs": {}}}'])
def test_what_is_no_workflow_is_refused(tmp_path, text):
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_workflow(path)


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("6.seed", Target("6", "seed")),
        ("6.size.width", Target("6", "size.width")),
        ("my V1.0.image", Target("2", "image")),
    ],
)
def test_an_input_is_found_by_id_or_title(workflow, key, target):
    assert find_target(workflow, key) == target


@pytest.mark.parametrize(
    ("key", "listed"),
    [
        ("7.seed", r"1 \(LoadVideo\)"),
        ("6.steps", "seed, size.width"),
        ("6", "NODE.input"),
        ("6.positive", r"connected to node 5 \(ControlNetApplyAdvanced\)"),
    ],
)
def test_an_unknown_input_is_refused_with_what_there_is(workflow, key, listed):
    with pytest.raises(ConfigError, match=listed):
        find_target(workflow, key)


def test_a_title_that_two_nodes_have_is_refused(workflow):
    workflow["7"] = copy.deepcopy(workflow["2"])
    with pytest.raises(ConfigError, match=r"2\.image, 7\.image"):
        find_target(workflow, "My v1.0.image")


def test_the_stock_nodes_are_found(workflow):
    assert find_role(workflow, "video") == ("1", "file")
    assert find_role(workflow, "style") == ("2", "image")
    assert find_role(workflow, "prompt") == ("3", "text")  # not the negative one


def test_several_candidates_are_listed_and_a_title_or_map_decides(workflow):
    workflow["7"] = {"class_type": "LoadImage", "inputs": {"image": "b.png"}}
    with pytest.raises(ConfigError, match=r'--map style=.*2 \(LoadImage "My v1.0"\): image; 7'):
        find_role(workflow, "style")
    assert find_role(workflow, "style", "7.image") == ("7", "image")
    workflow["7"]["_meta"] = {"title": "Style Image"}
    assert find_role(workflow, "style") == ("7", "image")


def test_a_missing_role_is_refused(workflow):
    del workflow["1"]
    with pytest.raises(ConfigError, match="No node could take the video"):
        find_role(workflow, "video")


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("0.5", 0.5), ("true", True), ('"5"', "5"), ("a b", "a b"), ("NaN", "NaN")],
)
def test_values_are_json_or_text(text, value):
    assert parse_value(text) == value


def test_the_cross_product(files, workflow):
    prompts = files / "prompts.txt"
    prompts.write_text("A red Fox!\n\n# not this\nüber\n", encoding="utf-8")
    rows = cross_product(files / "videos", files / "styles", prompts)
    jobs = make_jobs(workflow, rows, settings={"5.strength": 0.5}, seed=7)
    assert [job.name for job in jobs] == [
        "a__s__a-red-fox",
        "a__s__über",
        "b__s__a-red-fox",
        "b__s__über",
    ]
    assert len({job.id for job in jobs}) == 4
    inputs = jobs[0].workflow
    assert inputs["3"]["inputs"]["text"] == "A red Fox!"
    assert inputs["4"]["inputs"]["text"] == "bad"
    assert inputs["5"]["inputs"]["strength"] == 0.5
    assert inputs["6"]["inputs"]["seed"] == 7
    assert inputs["1"]["inputs"]["file"].startswith("stylemaster_queue/")
    assert jobs[0].uploads[Target("1", "file")].upload_name.endswith(".mp4")
    assert workflow == WORKFLOW


def test_the_names_of_a_server_replace_the_upload_names(files, workflow):
    (job,) = make_jobs(workflow, [Row(style=files / "styles/s.png")])
    name = job.uploads[Target("2", "image")].upload_name
    assert job.prompt({name: "sub/x (1).png"})["2"]["inputs"]["image"] == "sub/x (1).png"


def test_a_job_is_the_same_by_content_and_not_by_name(files, workflow):
    def job_id(**changes):
        (job,) = make_jobs(workflow, [Row(**({"style": files / "styles/s.png"} | changes))])
        return job.id

    first = job_id()
    workflow["1"]["_meta"] = {"title": "renamed"}
    other_name = files / "t.png"
    other_name.write_bytes((files / "styles/s.png").read_bytes())
    assert job_id() == job_id(style=other_name) == first
    assert job_id(settings={"6.seed": 2}) != first
    assert job_id(prompt="x") != first
    other_name.write_bytes(b"other")
    assert job_id(style=other_name) != first
    workflow["5"]["inputs"]["strength"] = 0.1
    assert job_id() != first


def test_equal_jobs_are_made_once(workflow, caplog):
    jobs = make_jobs(workflow, [Row(prompt="x"), Row(prompt="x"), Row(prompt="y")])
    assert [job.name for job in jobs] == ["x", "y"]
    assert "listed twice" in caplog.text


def test_a_table(files, workflow):
    table = files / "jobs.csv"
    table.write_text("video,style,prompt,6.seed\na.MP4,styles/s.png,fox,5\n,,,\n")
    rows = read_csv(table, videos=files / "videos")
    assert rows == [
        Row(files / "videos/a.MP4", files / "styles/s.png", "fox", {"6.seed": 5}),
        Row(),
    ]
    first, second = make_jobs(workflow, rows, default_name="plain")
    assert first.workflow["6"]["inputs"]["seed"] == 5
    assert (second.workflow, second.name) == (WORKFLOW, "plain")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,size\na.mp4,1\n", "unknown columns 'size'"),
        ("video\nmissing.mp4\n", "line 2: there is no file"),
        ("prompt\na,b\n", "line 2: not as many cells"),
        ("prompt\n", "no line below"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, text, message):
    path = tmp_path / "jobs.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_csv(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No video in"):
        cross_product(tmp_path)
    with pytest.raises(ConfigError, match="There is no folder"):
        cross_product(None, tmp_path / "x")


def test_a_workflow_without_seed_refuses_one(workflow):
    workflow["6"]["inputs"]["seed"] = ["9", 0]
    with pytest.raises(ConfigError, match="--seed"):
        make_jobs(workflow, [Row()], seed=1)


def test_the_journal_survives_a_crash_within_a_record(tmp_path):
    journal = Journal(tmp_path)
    journal.write("delivering", "j1", files=["a.png"])
    journal.write("done", "j1", files=["a.png"])
    journal.close()
    with journal.path.open("ab") as stream:
        stream.write(b'{"event": "done", "jo')
    journal = Journal(tmp_path)
    journal.write("failed", "j2", error="x")
    journal.close()
    last = read_journal(tmp_path)
    assert {job: record["event"] for job, record in last.items()} == {"j1": "done", "j2": "failed"}
    journal = Journal(tmp_path)
    assert journal.own_files("j1") == {"a.png": None}
    journal.close()


def test_two_runs_do_not_share_a_folder(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(ConfigError, match="Another run"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_a_damaged_journal_is_refused(tmp_path):
    (tmp_path / "queue.jsonl").write_text('{"event": "done"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        Journal(tmp_path)
