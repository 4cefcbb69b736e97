"""The pieces for a GPU, rehearsed on the CPU: their real code at toy size."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_bundle, gpu_right
from stylemaster_core.errors import ConfigError


def call(tmp_path, *options):
    return gpu.main(["--out", str(tmp_path), "--device", "cpu", "--toy", *options])


def test_checks_hold_on_the_cpu_and_find_a_wrong_device(monkeypatch):
    cpu = torch.device("cpu")
    rows = gpu_right._guided_steps(cpu, seeds=1) + gpu_right._branches(cpu)
    assert len(rows) == 7 and all(row["holds"] for row in rows), rows
    guided = gpu_right._guided
    monkeypatch.setattr(gpu_right, "_guided", lambda *a, **o: guided(*a, **o) * 1.0001)
    wrong = gpu_right._guided_steps(cpu, seeds=1)
    assert not any(row["holds"] for row in wrong if "float32" in row["check"])


def test_what_a_device_cannot_do_is_told_and_the_rest_goes_on(monkeypatch):
    def cannot(device):
        raise RuntimeError("no kernel image is available\nmore words")

    for name in ("_guided_steps", "_samplers", "_tiny"):
        monkeypatch.setattr(gpu_right, name, lambda device, **options: [])
    monkeypatch.setattr(gpu_right, "_branches", cannot)
    rows = gpu_right.check_device(torch.device("cpu"))
    told, trained = rows
    assert told["check"] == "branches" and not told["holds"]
    assert told["note"] == "no kernel image is available"
    assert trained["check"] == "training in two parts" and trained["holds"]


def test_pieces_run_report_and_go_on(tmp_path, capsys, monkeypatch):
    assert call(tmp_path, "--only", "fast,train") == 0
    for name in ("fast", "train"):
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["toy"] and report["failed"] == []
        (measured,) = report["reports"].values()
        rows = measured["parts" if name == "fast" else "trainers"]
        assert rows and all(row["status"] == "measured" for row in rows)
    assert call(tmp_path, "--only", "fast") == 0 and "done before" in capsys.readouterr().out
    monkeypatch.setitem(gpu.PIECES, "right", lambda args: {"failed": ["a check"]})
    assert call(tmp_path, "--only", "right") == 1
    assert "right: FAILED: a check" in capsys.readouterr().err
    assert call(tmp_path / "late", "--only", "right", "--minutes", "-1") == gpu.UNFINISHED
    assert call(tmp_path, "--only", "other") == 2


def test_a_part_of_the_recipe_is_trained(tmp_path, monkeypatch):
    commands, statuses = [], iter([gpu.UNFINISHED, 0, 0])

    def recipe(command):
        commands.append(command)
        return next(statuses)

    monkeypatch.setattr(gpu, "call", recipe)
    assert call(tmp_path, "--only", "tiny", "--tiny", "--seed 3") == gpu.UNFINISHED
    assert commands[0][-2:] == ["--seed", "3"] and "recipes.tiny" in commands[0]
    assert call(tmp_path, "--only", "tiny") == 1, "no stage was done"
    done = tmp_path / "b" / "recipe" / "vae" / "done.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    assert call(tmp_path / "b", "--only", "tiny") == 0
    assert json.loads((tmp_path / "b" / "tiny.json").read_text())["stages"] == ["vae"]


def test_unknown_pieces():
    with pytest.raises(ConfigError, match="choose from right, tiny, fast, train, comfy"):
        gpu.run(gpu.parse_arguments(["--only", "x"]))


def test_comfyui_runs_where_one_is_named(tmp_path, monkeypatch, capsys):
    for name in ("COMFYUI_PATHS", "COMFYUI_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert call(tmp_path, "--only", "comfy") == 0
    assert "skipped: no COMFYUI_PATH" in capsys.readouterr().out
    assert not (tmp_path / "comfy.json").exists(), "it can be run later"
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert call(tmp_path, "--only", "comfy") == 1, "no ComfyUI is there"
    assert "comfyui_version.py" in capsys.readouterr().err


def test_a_piece_that_reports_nothing_has_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu.PIECES, "right", lambda args: {"checks": [], "failed": []})
    assert call(tmp_path, "--only", "right") == 1
    assert "right: FAILED: it reported nothing" in capsys.readouterr().err


PACKAGES = "torch==2.6.0+cu124\nNumPy==2.1.0\nonnx @ file:///opt/onnx.whl\n# made by hand\n"


def test_what_a_machine_has():
    there = gpu_bundle.read_packages(PACKAGES)
    assert there == {"torch": "2.6.0+cu124", "numpy": "2.1.0", "onnx": None}


def resolved(*names):
    return {"install": [{"metadata": {"name": n, "version": "1.0"}} for n in names]}


def test_a_bundle_holds_code_and_what_is_lacking(tmp_path, monkeypatch):
    (tmp_path / "has.txt").write_text(PACKAGES)
    calls = []

    def pip(*arguments):
        calls.append(arguments)
        if arguments[0] == "download":
            folder = Path(arguments[arguments.index("-d") + 1])
            (folder / "einops-1.0-py3-none-any.whl").write_text("wheel")
            return ""
        constraints = Path(arguments[arguments.index("-c") + 1]).read_text()
        assert constraints.splitlines() == ["torch==2.6.0", "numpy==2.1.0"]
        names = ("torch", "Numpy", "nvidia_nccl_cu12", "einops", "stylemaster")
        return json.dumps(resolved(*names))

    monkeypatch.setattr(gpu_bundle, "_pip", pip)
    options = ["--bundle", str(tmp_path / "packed"), "--has", str(tmp_path / "has.txt")]
    assert gpu.main([*options, "--has-python", "3.10"]) == 0
    assert calls[1][-1] == "einops==1.0" and calls[1][-2] != "torch==1.0"
    assert all(call[call.index("--python-version") + 1] == "3.10" for call in calls)
    paths = sorted((tmp_path / "packed").iterdir())
    assert max(path.stat().st_size for path in paths) <= 20 * 2**20
    with tarfile.open(fileobj=io.BytesIO(b"".join(path.read_bytes() for path in paths))) as tar:
        names = set(tar.getnames())
    assert "wheels/einops-1.0-py3-none-any.whl" in names
    assert {"Makefile", "bench/gpu.py", "stylemaster_core/tiny/transformer.safetensors"} <= names
    assert gpu.main(options) == 2, "the folder holds something"


@pytest.mark.parametrize("text", [None, "numpy==2.1.0\n"])
def test_a_bundle_needs_to_know_the_machine(tmp_path, text, capsys):
    path = tmp_path / "has.txt"
    if text is not None:
        path.write_text(text)
    assert gpu.main(["--bundle", str(tmp_path / "packed"), "--has", str(path)]) == 2
    assert "torch" in capsys.readouterr().err or text is None
    assert not (tmp_path / "packed").exists()
