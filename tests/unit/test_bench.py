"""`python -m bench.generate`: its report, its options, and what it counts."""

import json
import platform
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.generate import generation_seconds, generations, main
from bench.workloads import PARTS, REFERENCE, Setting, building, count_flop, meta_rows

ROOT = Path(__file__).parents[2]
SMALLEST = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--frames",
    "1",
    "--size",
    "32x16",
    "--blocks",
    "1",
    "--repeat",
    "1",
]


def test_report(tmp_path, capsys):
    out = tmp_path / "report.json"
    assert main([*SMALLEST, "--parts", "transformer,step,controlnet,image", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]

    rows = report["parts"]
    assert [row["part"] for row in rows] == ["transformer"] * 3 + ["step"] * 3 + [
        "controlnet",
        "image",
    ]
    for row in rows:
        assert row["status"] == "measured" and row["dtype"] == "float32"
        assert row["seconds"] > 0 and len(row["runs"]) == 1
        assert row["tflop"] / row["seconds"] == pytest.approx(row["tflop_per_s"])
        best = report["matmul"][0]["tflop_per_s"]
        assert row["utilisation"] == pytest.approx(row["tflop_per_s"] / best)
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 1e8
        factor = row["extrapolated_reference_seconds"] / row["seconds"]
        assert factor == pytest.approx(row["reference_tflop"] / row["tflop"]) and factor > 1
    assert rows[3]["reference_tflop"] == rows[4]["reference_tflop"]  # batched, one by one
    assert report["setting"]["tokens"] == 2 and report["reference"]["tokens"] == 32760
    assert report["matmul"][0]["tflop_per_s"] > 0
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["name"]

    ratios = report["flop_ratios"]
    assert ratios["step / three plain passes"] <= 0.985
    assert ratios["step, equal scales / three plain passes"] <= 0.67
    assert ratios["ControlNet / plain pass"] == pytest.approx(143.82 / 283.11, rel=0.01)
    assert ratios["VAE encode / the release's 9 tiles"] <= 0.45
    assert ratios["VAE decode / the release's 9 tiles"] <= 0.45

    # A reduced setting gives no time of a generation, and its table says what was not measured.
    assert report["generation"] is None
    measured, extrapolated = capsys.readouterr().out.split("EXTRAPOLATED", 1)
    assert "MEASURED at 1 frames of 32 x 16 (2 tokens), 1 blocks" in measured
    assert "NOT MEASURED" in extrapolated
    assert "283.110 TFLOP" in extrapolated and "283.110" not in measured
    for private in (platform.node(), str(ROOT), str(Path.home())):
        assert not private or private not in out.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "4"], "4n+1"),
        (["--size", "40x48"], "multiples of 16"),
        (["--size", "wide"], "WxH"),
        (["--blocks", "31"], "1 to 30"),
        (["--blocks", "0"], "1 to 30"),
        (["--steps", "0"], "at least 1"),
        (["--repeat", "0"], "at least 1"),
        (["--parts", "vae,sound"], "choose from"),
        (["--parts", ""], "choose from"),
        (["--dtype", "int3"], "unknown"),
        (["--device", "abacus"], "cannot be used"),
        (["--out", "no/such/folder/x.json"], "does not exist"),
    ],
)
def test_options_that_cannot_work(options, message, capsys):
    assert main([*SMALLEST, *options]) == 2
    assert message in capsys.readouterr().err


def test_an_existing_file_is_kept(tmp_path, capsys):
    out = tmp_path / "report.json"
    out.write_text("kept")
    assert main([*SMALLEST, "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err and out.read_text() == "kept"


def test_preparation_is_not_counted_in_a_row():
    setting = Setting(frames=1, width=32, height=16, blocks=2)
    count = count_flop.__wrapped__
    first, again = (count("controlnet", "one evaluation", setting) for _ in range(2))
    assert first == again > 0


def test_vae_flop_grow_evenly_with_the_frames():
    setting = Setting(frames=13, width=288, height=64)
    with building("meta", torch.bfloat16):
        rows = PARTS["vae"](setting, False)
    for name, run in rows.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        assert count_flop("vae", name, setting) == counter.get_total_flops() > 0


@pytest.mark.parametrize("part", sorted(set(PARTS) - {"vae"}))
def test_flop_grow_evenly_with_the_blocks(part):
    """Hence those of 30 blocks need not be counted one by one."""
    setting = Setting(frames=1, width=32, height=16, blocks=5)
    for name, run in meta_rows(part, setting).items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        assert count_flop(part, name, setting) == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("part", "name", "published"),
    [
        ("text", "UMT5, 512 tokens", 4.8e12),
        ("image", "CLIP, one image", 0.33e12),
        ("vae", "decode", 275.4e12),
        ("vae", "encode", 163.7e12),
        ("transformer", "plain pass", 283.11e12),
        ("transformer", "style K, V", 0.012e12),
    ],
)
def test_flop_of_the_cost_model(part, name, published):
    assert count_flop(part, name, REFERENCE) == pytest.approx(published, rel=0.02)


SECONDS = {
    "text: UMT5, 512 tokens": 1.0,
    "transformer: text K, V": 0.0,
    "transformer: style K, V": 0.0,
    "image: CLIP, one image": 0.0,
    "vae: encode": 3.0,
    "vae: decode": 5.0,
    "step: three branches, one by one": 10.0,
    "controlnet: one evaluation": 100.0,
}


def test_sum_of_a_generation():
    """Two prompts, 50 steps, control in 36 of them."""
    total = generation_seconds(SECONDS, 50)
    assert total == {"text_to_video": 507.0, "video_to_video": 507.0 + 3.0 + 3600.0}
    without_encode = {name: value for name, value in SECONDS.items() if name != "vae: encode"}
    assert generation_seconds(without_encode, 50) is None


@pytest.mark.parametrize("setting", [REFERENCE, Setting(frames=17), Setting(blocks=2)])
def test_sums_of_measured_and_of_extrapolated_parts_are_kept_apart(setting):
    rows = []
    for key, seconds in SECONDS.items():
        part, name = key.split(": ")
        row = {"part": part, "name": name, "status": "measured", "seconds": seconds}
        if setting != REFERENCE:
            row["extrapolated_reference_seconds"] = 2 * seconds
        rows.append(row)
    sums = generations(rows, setting, 50)
    measured, extrapolated = sums["generation"], sums["extrapolated_generation"]
    assert (measured is None) == (setting.blocks == 2)
    assert (extrapolated is None) == (setting == REFERENCE)
    if measured is not None:
        assert measured["text_to_video"] == 507.0
    if extrapolated is not None:
        assert extrapolated["text_to_video"] == 2 * 507.0


def test_a_part_that_ran_out_of_memory_gives_no_sum():
    rows = [{"part": "vae", "name": "decode", "status": "out of memory"}]
    sums = generations(rows, REFERENCE, 50)
    assert sums == {"generation": None, "extrapolated_generation": None}
