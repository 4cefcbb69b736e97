"""FSDP through accelerate's own launcher and config, on two CPU processes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stylemaster_core.cli.train import _check_launch
from stylemaster_core.errors import ConfigError, UnsupportedHostError
from stylemaster_core.training.config import OptimizerConfig
from stylemaster_core.training.gray_tile_controlnet import create_control_trainer
from stylemaster_core.training.loop import train
from stylemaster_core.training.sharding import prepare_sharding
from stylemaster_core.weights.files import read_state_dict
from tests.unit import test_training_loop as loop

TRAINERS = ("style", "control")
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
machine_rank: 0
mixed_precision: 'no'
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""
# accelerate 1.15 shards over accelerators alone; with `cpu` it falls back to plain data
# parallelism. These two lines let it take the CPU for one, all else is its own.
WORKER = """
import sys
import torch
from accelerate.state import DistributedType, PartialState
torch.set_num_threads(1)
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
from tests.unit import test_training_sharding as t
for name in t.TRAINERS:
    for steps in (3, 6):
        t.run(name, f"{sys.argv[1]}/{name}", steps, batch_size=2, resume=True)
"""


def run(name, folder, steps, batch_size, resume=False):
    config = loop.with_run(
        dataclasses.replace(loop.CONFIG, trainer=name, optimizer=OptimizerConfig(lr=1e-3)),
        num_steps=steps, batch_size=batch_size,
    )  # fmt: skip
    control = dataclasses.replace(config.control, style="train")
    config = dataclasses.replace(config, control=control)
    if name == "style":
        trainer = loop.style_trainer(config)
    else:
        features = {key: tuple(value.shape) for key, value in loop.WORLD.sample(0).items()}
        trainer = create_control_trainer(
            config, loop.base_weights(), features, num_heads=2, null_text=loop.WORLD.null_text
        )
    return train(trainer, loop.WORLD.dataset(12), folder, resume=resume)


def launch(folder):
    (folder / "fsdp.yaml").write_text(ACCELERATE)
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               folder / "fsdp.yaml", folder / "worker.py", folder / "two"]  # fmt: skip
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [str(part) for part in command],
        env=environment, cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_fsdp_resumed_equals_one_process_with_the_doubled_batch(tmp_path):
    launch(tmp_path)
    shards = tmp_path / "two/style/checkpoints/step-00000003/sharded/pytorch_model_fsdp_0"
    assert {p.name for p in shards.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    with pytest.raises(ConfigError, match="step-00000006 is spread over processes"):
        run("style", tmp_path / "two/style", 6, batch_size=4, resume=True)
    for name in TRAINERS:
        files = run(name, tmp_path / "one" / name, 6, batch_size=4).files
        two, one = (loop.comparable(tmp_path / n / name) for n in ("two", "one"))
        assert len(one) == len(two) == 6 + 3
        for ours, theirs in zip(two, one, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), (name, theirs["step"])
        for file in files:
            ours, theirs = (
                read_state_dict(tmp_path / n / name / file.name) for n in ("two", "one")
            )
            assert ours.metadata.keys() == theirs.metadata.keys()
            assert ours.tensors.keys() == theirs.tensors.keys()
            assert all(ours.tensors[k].dtype == v.dtype for k, v in theirs.tensors.items())
            distance = max((ours.tensors[k] - v).abs().max() for k, v in theirs.tensors.items())
            assert distance < 1e-4


def accelerator(kind, **state):
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind), state=SimpleNamespace(**state)
    )


def test_what_sharded_weights_cannot_do_is_refused():
    plain = dataclasses.replace(loop.CONFIG, optimizer=OptimizerConfig())
    assert not prepare_sharding(accelerator("MULTI_GPU"), loop.CONFIG)
    whole = accelerator("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=2))
    assert prepare_sharding(whole, plain)
    with pytest.raises(UnsupportedHostError, match="ema_decay=0"):
        prepare_sharding(whole, loop.CONFIG)
    old = accelerator("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with pytest.raises(UnsupportedHostError, match="fsdp_version: 2"):
        prepare_sharding(old, plain)


def test_the_command_line_refuses_what_accelerate_would_quietly_change(monkeypatch):
    _check_launch(cpu=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedHostError, match="2 processes were started"):
        _check_launch(cpu=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UnsupportedHostError, match="over GPUs alone"):
        _check_launch(cpu=True)
