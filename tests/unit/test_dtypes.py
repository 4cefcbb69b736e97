"""The type to compute in: flags and a measurement decide on a CPU, capability on CUDA."""

from __future__ import annotations

import json
import logging
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stylemaster_core import dtypes
from stylemaster_core.cli import main
from stylemaster_core.dtypes import choose_dtype, choose_precision, explain_dtype
from stylemaster_core.errors import ConfigError
from stylemaster_core.training.config import PRESETS, TrainConfig, config_to_dict, override
from stylemaster_core.training.precision import settle_precision

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch):
    """Sets what this CPU is said to have, and how fast bfloat16 is measured."""

    def set_processor(flags: tuple[str, ...], speedup: float) -> None:
        monkeypatch.setattr(dtypes, "cpu_flags", lambda: flags)
        monkeypatch.setattr(dtypes, "cpu_speedup", lambda dtype: speedup)

    dtypes._warn_if_slower.cache_clear()
    yield set_processor
    dtypes._warn_if_slower.cache_clear()


@pytest.mark.parametrize(
    ("flags", "speedup", "chosen"),
    [
        (("AMX", "AVX512-BF16"), 4.0, torch.bfloat16),
        (("AVX512-BF16",), 1.3, torch.bfloat16),
        (("AVX512-BF16",), 1.1, torch.float32),  # the measurement's veto
        ((), 4.0, torch.float32),  # not measured where no flag says so
    ],
)
def test_a_cpu_takes_bfloat16_where_flags_and_measurement_agree(processor, flags, speedup, chosen):
    processor(flags, speedup)
    choice = explain_dtype("auto", CPU)
    assert choice.dtype == chosen
    assert choose_precision("auto", CPU) == str(chosen).removeprefix("torch.")
    assert all(flag in choice.reason for flag in flags or ("AMX",))
    assert f"{speedup:.1f}" in choice.reason or not flags


def test_nothing_is_measured_where_no_flag_speaks_for_bfloat16(monkeypatch):
    monkeypatch.setattr(dtypes, "cpu_flags", lambda: ())
    monkeypatch.setattr(dtypes, "_best_s", lambda operation: pytest.fail("measured"))
    dtypes.cpu_speedup.cache_clear()
    assert explain_dtype("auto", CPU).dtype == torch.float32


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float16),
        ((6, 1), torch.float32),
    ],
)
def test_cuda_takes_what_its_capability_says(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert choose_dtype("auto", device) == chosen
    # Gradients underflow in float16.
    trained = "bfloat16" if chosen == torch.bfloat16 else "float32"
    assert choose_precision("auto", device) == trained


def test_mps_takes_float32_and_what_is_named_is_obeyed():
    mps = torch.device("mps")
    assert choose_dtype("auto", mps) == torch.float32
    assert choose_dtype("float16", mps) == torch.float16
    assert choose_dtype("float32", CPU) == torch.float32
    with pytest.raises(ConfigError, match="int8.*auto, float32, float16, bfloat16"):
        choose_dtype("int8", CPU)


def test_an_emulated_type_is_obeyed_with_one_warning(processor, caplog):
    processor((), 1 / 8)
    with caplog.at_level(logging.WARNING, "stylemaster"):
        for _ in range(3):
            assert choose_dtype("bfloat16", CPU) == torch.bfloat16
        choose_dtype("float32", CPU)
    (warning,) = caplog.messages
    assert "bfloat16" in warning and "8 times slower" in warning


def test_a_fast_type_is_obeyed_without_a_warning(processor, caplog):
    processor(("AMX",), 4.0)
    with caplog.at_level(logging.WARNING, "stylemaster"):
        assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert not caplog.messages


def test_the_measurement_compares_a_type_with_float32_once(monkeypatch):
    times = {torch.float32: [0.002, 0.003], torch.bfloat16: [0.001, 0.002]}
    asked = []

    def best(operation):
        result = operation()
        asked.append(result.dtype)
        return times[result.dtype][result.ndim == 2]

    monkeypatch.setattr(dtypes, "_best_s", best)
    dtypes.cpu_speedup.cache_clear()
    try:
        # The convolution gains 2, the linear layer 1.5.
        assert dtypes.cpu_speedup(torch.bfloat16) == pytest.approx(1.5)
        assert dtypes.cpu_speedup(torch.bfloat16) == pytest.approx(1.5)
    finally:
        dtypes.cpu_speedup.cache_clear()
    assert sorted(map(str, asked)) == ["torch.bfloat16"] * 2 + ["torch.float32"] * 2


def test_one_disturbed_measurement_does_not_veto(monkeypatch):
    times = iter([0.002, 0.002, 0.002, 0.002, 0.002, 0.001, 0.002, 0.001])  # the second is right
    monkeypatch.setattr(dtypes, "_best_s", lambda operation: next(times))
    dtypes.cpu_speedup.cache_clear()
    try:
        assert dtypes.cpu_speedup(torch.bfloat16) == pytest.approx(2)
    finally:
        dtypes.cpu_speedup.cache_clear()
    assert next(times, None) is None


@pytest.mark.skipif(
    not (platform.machine() == "x86_64" and Path("/proc/cpuinfo").is_file()),
    reason="reads the flags of Linux on x86-64",
)
def test_flags_are_those_of_the_system():
    words = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    names = {"amx_tile": "AMX", "avx512_bf16": "AVX512-BF16"}
    # What an old PyTorch cannot tell is not claimed, and float32 is taken.
    known = {name for name, test in dtypes._FLAGS.items() if hasattr(torch.cpu, test)}
    found = {name for word, name in names.items() if word in words}
    assert set(dtypes.cpu_flags()) == found & known


def test_info_prints_the_choice_and_its_reason(processor, capsys):
    processor((), 1.0)
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    if facts["device"] == "cpu":
        assert facts["dtype"] == "float32"
    assert facts["dtype_reason"]


def test_presets_settle_on_what_the_device_is_fast_at(processor):
    preset = PRESETS["style-images"]
    assert preset.run.precision == "auto"
    processor((), 1.0)
    assert settle_precision(preset, CPU).run.precision == "float32"
    processor(("AMX",), 4.0)
    assert settle_precision(preset, CPU).run.precision == "bfloat16"
    assert settle_precision(TrainConfig(), CPU).run.precision == "float32"  # named


def test_a_run_goes_on_in_the_precision_that_it_was_begun_with(processor, tmp_path):
    preset = PRESETS["style-images"]
    begun = override(preset, ["run.precision=float32"])
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_dict(begun)))
    processor(("AMX",), 4.0)
    assert settle_precision(preset, CPU, tmp_path).run.precision == "float32"
    assert settle_precision(preset, CPU, tmp_path / "new").run.precision == "bfloat16"


def test_importing_it_does_not_import_torch():
    code = "import sys, stylemaster_core.dtypes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
