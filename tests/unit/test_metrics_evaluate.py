"""`stylemaster evaluate` as a user runs it: drawn clips, formulas as styles, no networks."""

import csv
import json

import numpy as np
import pytest
import torch

from stylemaster_core.cli import main
from stylemaster_core.data.demo_scene import demo_clip, demo_styles
from stylemaster_core.data.images import read_image, write_image
from stylemaster_core.data.videos import read_video, write_video
from stylemaster_core.metrics.colour import colour_distance
from stylemaster_core.metrics.content import luma
from stylemaster_core.metrics.markdown import to_json, to_markdown
from stylemaster_core.metrics.motion import warping_error
from stylemaster_core.metrics.report import METRICS, Missing, Networks, evaluate
from stylemaster_core.metrics.scene import METHODS, Row
from stylemaster_core.metrics.texture import gabor_distance
from stylemaster_core.models.small import write_small_models
from stylemaster_core.weights.files import read_state_dict, write_state_dict

NUM_FRAMES, HEIGHT, WIDTH = 3, 48, 64
PALETTES = {
    "warm": np.array([[40, 10, 20], [150, 60, 30], [230, 160, 60], [250, 230, 190]]),
    "cold": np.array([[10, 20, 50], [20, 90, 140], [90, 180, 190], [220, 240, 250]]),
}
PERIODS = {"warm": 4, "cold": 9}


def stylized(frames, name, texture=None):
    """A palette and stripes: both colour and texture tell the two styles apart."""
    y, x = np.mgrid[0 : frames.shape[1], 0 : frames.shape[2]]
    stripes = np.sin(2 * np.pi * (x + y) / PERIODS[texture or name])[None] > 0.2
    tones = (luma(frames) * 4).astype(int).clip(0, 3)
    colours = PALETTES[name][tones]
    return np.where(stripes[..., None], colours // 2, colours).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two rows whose result is the true filter itself, with a picture of another scene as style."""
    folder = tmp_path_factory.mktemp("pairs")
    scenes = {"warm": demo_clip(NUM_FRAMES, HEIGHT, WIDTH)}
    scenes["cold"] = 255 - scenes["warm"][:, ::-1].copy()
    picture = np.ascontiguousarray(demo_clip(9, HEIGHT, WIDTH)[-1:, :, ::-1])
    for name, clip in scenes.items():
        (folder / name).mkdir()
        write_frames(folder / name / "content", clip)
        write_frames(folder / name / "result", stylized(clip, name))
        write_image(folder / name / "style.png", stylized(picture, name)[0])
        (folder / name / "prompt.txt").write_text("a boat")
    with (folder / "pairs.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["name", "content", "style", "result", "prompt", "true_filter"])
        for name in scenes:
            parts = [f"{name}/content", f"{name}/style.png", f"{name}/result"]
            writer.writerow([name, *parts, "a boat, at sea", f"{name}/result"])
        writer.writerow(["alone", "", "warm/style.png", "warm/result", "", ""])
    return folder


def write_frames(folder, frames):
    folder.mkdir()
    for number, frame in enumerate(frames):
        write_image(folder / f"{number}.png", frame)


def run(data, out, *options):
    return main(["evaluate", "--pairs", str(data / "pairs.csv"), "--out", str(out), *options])


def test_report_orders_results_and_baselines(data, tmp_path, capsys):
    assert run(data, tmp_path / "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert printed["summary"] == report["summary"]

    def value(metric, method):
        return report["summary"][method][metric]["value"]

    assert value("colour", "result") < value("colour", "content unchanged")
    assert value("colour", "Reinhard") < value("colour", "content unchanged")
    assert value("gabor", "result") < 0.6 * value("gabor", "Reinhard")
    assert value("colour_p", "result") == value("gabor_p", "result") == 1
    assert value("gabor_p", "content unchanged") <= 0.5
    assert value("ssim", "content unchanged") == pytest.approx(1)
    assert value("ssim", "result") < 0.7
    assert value("luma", "result") > value("luma_shuffled", "result") + 0.2
    assert value("difference_true", "result") == pytest.approx(1)
    assert value("difference_content", "content unchanged") == pytest.approx(1)
    for method in METHODS:  # what nothing was given for has a reason and never a number
        for metric in ("clip_t", "csd", "lpips", "art_fid", "retrieval"):
            assert "pass --" in value(metric, method)["not_measured"]


def test_rows_without_content_have_no_baselines(data, tmp_path):
    run(data, tmp_path / "out", "--json")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    alone = report["rows"][2]
    assert alone["name"] == "alone" and set(alone["scores"]) == {"result"}
    assert "no content" in alone["scores"]["result"]["ssim"]["not_measured"]
    assert report["summary"]["result"]["ssim"]["rows"] == 2
    assert report["summary"]["result"]["colour"]["rows"] == 3
    assert report["num_style_pictures"] == 2


def test_report_has_a_picture_of_every_row(data, tmp_path, capsys):
    assert run(data, tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.split("## Rows")[0] in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        *(f"row_000{i}.png" for i in range(3)),
    ]
    for number, rows in ((0, 5), (2, 2)):
        assert f"(row_000{number}.png)" in text
        height = read_image(tmp_path / "out" / f"row_000{number}.png").shape[0]
        assert height == rows * (192 + 18)
    table = [line for line in text.splitlines() if line.startswith("| SSIM")]
    assert table[0].count("|") == 7 and "1.000" in table[0]
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]  # nothing left beside


def test_folders_are_rows_too_and_give_the_same_numbers(data, tmp_path):
    folders = [str(data / name) for name in PALETTES]
    options = ["--out", str(tmp_path / "folders"), "--max-frames", "2"]
    assert main(["evaluate", "--pairs", *folders, *options]) == 0
    assert run(data, tmp_path / "table", "--max-frames", "2") == 0
    rows = [
        json.loads((tmp_path / kind / "report.json").read_text())["rows"][0]
        for kind in ("folders", "table")
    ]
    assert rows[0]["name"] == "warm" and rows[0]["prompt"] == "a boat"
    for metric in ("colour", "gabor", "luma", "ssim", "difference", "warping"):
        assert rows[0]["scores"]["result"][metric] == rows[1]["scores"]["result"][metric]


def test_nothing_is_overwritten_unasked(data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("mine")
    assert run(data, tmp_path / "out") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.md").read_text() == "mine"
    assert run(data, tmp_path / "out", "--overwrite") == 0
    assert (tmp_path / "out" / "report.md").read_text().startswith("# Evaluation")


@pytest.mark.parametrize(
    "table, message",
    [
        ("style,result\nwarm/style.png,\n", "names no result"),
        ("style,video\nwarm/style.png,x\n", "columns video"),
        ("style,result\nwarm/style.png,gone.mp4\n", "there is no result"),
        (
            "name,style,result\na,warm/style.png,warm/result\na,warm/style.png,warm/result\n",
            "twice",
        ),
        ("style,result,content\nwarm/style.png,warm/result,short\n", "has 1 frames"),
    ],
)
def test_wrong_tables_are_refused_in_words(data, tmp_path, capsys, table, message):
    if not (data / "short").exists():
        write_frames(data / "short", demo_clip(1, HEIGHT, WIDTH))
    path = data / "wrong.csv"
    path.write_text(table)
    assert main(["evaluate", "--pairs", str(path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [("--max-frames", "0"), ("--candidates", "1"), ("--seed", "-1"), ("--csd", "gone")]
)
def test_wrong_options_are_refused(data, tmp_path, options):
    assert run(data, tmp_path / "out", *options) == 2
    assert not list(tmp_path.iterdir())


def test_a_judge_retrieves_the_own_style(data):
    """A judge that sees colour alone, in place of a network; and ArtFID's parts put together."""

    def colours(frames):
        return torch.from_numpy(frames).float().mean((1, 2)) - 128

    def difference(first, second):
        return torch.from_numpy(first - second).float().abs().mean((1, 2, 3)) * 0 + 0.25

    rows = [
        Row(n, data / n / "style.png", data / n / "result", data / n / "content") for n in PALETTES
    ]
    networks = Networks(judge=colours, lpips=difference, inception=lambda f: colours(f) * 0)
    summary = evaluate(rows, networks).summary
    assert summary["result"]["retrieval"] == 1
    assert summary["content unchanged"]["retrieval"] < 1
    assert summary["result"]["art_fid"] == pytest.approx(1.25)  # FID 0
    assert isinstance(summary["true filter"]["retrieval"], Missing)


def test_colour_and_texture_are_told_apart(data, tmp_path):
    """Results with the own colours and the other style's stripes."""
    rows = []
    for name, other in (("warm", "cold"), ("cold", "warm")):
        write_frames(tmp_path / name, stylized(demo_clip(2, HEIGHT, WIDTH), name, other))
        rows.append(Row(name, data / name / "style.png", tmp_path / name))
    report = evaluate(rows)
    assert (report.summary["result"]["colour_p"], report.summary["result"]["gabor_p"]) == (1, 0)
    clip, style = stylized(demo_clip(2, HEIGHT, WIDTH), "warm", "cold"), read_image(rows[0].style)
    scores = report.scores[0]["result"]
    assert scores["colour"] == pytest.approx(colour_distance(clip, style[None]))
    assert scores["gabor"] == pytest.approx(gabor_distance(clip, style[None]))


def test_art_fid_without_lpips_is_no_number(data):
    rows = [Row(n, data / n / "style.png", data / n / "result") for n in PALETTES]
    networks = Networks(inception=lambda frames: torch.zeros(len(frames), 3))
    score = evaluate(rows, networks).summary["result"]["art_fid"]
    assert isinstance(score, Missing) and "needs LPIPS" in score.reason


def test_the_flow_of_the_warping_error_is_the_contents(data):
    row = Row("warm", data / "warm/style.png", data / "warm/result", data / "warm/content")
    frames, content = (read_video(path).frames for path in (row.result, row.content))
    score = evaluate([row]).summary["result"]["warping"]
    assert score == pytest.approx(warping_error(frames, content))
    assert score != pytest.approx(warping_error(frames))


def test_weights_of_networks_are_used(data, tmp_path):
    """CSD's and CLIP's small random doubles: CSD judges, CLIP alone does not suffice for CLIP-T."""
    small = write_small_models(tmp_path / "models")
    tensors = read_state_dict(small.image_encoder / "model.safetensors").tensors
    style = tensors.pop("visual_projection.weight").T.contiguous()
    csd = {f"backbone.{key}": value for key, value in tensors.items()}
    write_state_dict(tmp_path / "csd.safetensors", {**csd, "last_layer_style": style})
    assert run(data, tmp_path / "out", "--csd", str(tmp_path / "csd.safetensors")) == 0
    summary = json.loads((tmp_path / "out" / "report.json").read_text())["summary"]["result"]
    assert -1 <= summary["csd"]["value"] <= 1 and summary["csd"]["rows"] == 3
    assert summary["retrieval"]["value"] in (0, 1 / 3, 2 / 3, 1)
    assert "not_measured" in summary["clip_t"]["value"]
    assert run(data, tmp_path / "clip", "--image-encoder", str(small.image_encoder)) == 0
    summary = json.loads((tmp_path / "clip" / "report.json").read_text())["summary"]["result"]
    assert summary["retrieval"]["rows"] == 3
    assert "not_measured" in summary["csd"]["value"]


def test_the_true_filter_is_the_clip_that_was_named(data):
    content = data / "warm/content"
    row = Row("warm", data / "warm/style.png", data / "warm/result", content, true_filter=content)
    summary = evaluate([row]).summary
    assert summary["true filter"]["colour"] == summary["content unchanged"]["colour"]
    assert summary["true filter"]["difference_true"] == pytest.approx(1)
    assert summary["result"]["difference_true"] == summary["result"]["difference_content"]


def test_one_row_says_what_it_cannot_tell(data):
    row = Row("one | <b>", data / "warm/style.png", data / "warm/result", data / "warm/content")
    report = evaluate([row], max_frames=1)
    for metric in ("colour_p", "gabor_p", "luma_shuffled", "difference", "warping"):
        assert isinstance(report.summary["result"][metric], Missing)
    content = to_json(report, ["x.png"])
    text = to_markdown(content)
    assert "one frame has no motion" in text and "one \\| &lt;b>" in text
    json.dumps(content, allow_nan=False)
    assert set(report.summary["result"]) == set(METRICS)


def test_videos_and_pictures_of_other_sizes_are_fitted(data, tmp_path):
    write_video(tmp_path / "content.mp4", demo_clip(5, 96, 96), fps=16)
    write_image(tmp_path / "style.png", demo_styles(200)["neon"])
    write_video(tmp_path / "result.mp4", stylized(demo_clip(4, 48, 64), "warm"), fps=16)
    assert main(["evaluate", "--pairs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["rows"][0]["scores"]) == {"result", "content unchanged", "Reinhard"}
