"""FSDP and DeepSpeed through accelerate's own config, on two CPU processes."""

import dataclasses
import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState, DistributedType, PartialState

from stylemaster_core.cli.train import _check_launch
from stylemaster_core.errors import ConfigError, UnsupportedHostError
from stylemaster_core.training.config import OptimizerConfig
from stylemaster_core.training.gray_tile_controlnet import create_control_trainer
from stylemaster_core.training.loop import train
from stylemaster_core.training.sharding import knows_fsdp_2, prepare_sharding
from stylemaster_core.weights.files import read_state_dict
from tests.forked import fork_distributed
from tests.unit import test_training_loop as loop

ACCELERATE = tuple(int(n) for n in importlib.metadata.version("accelerate").split(".")[:2])
# bfloat16 is as near as its rounding lets Adam stay.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-3}
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
machine_rank: 0
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""
DEEPSPEED = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
machine_rank: 0
num_machines: 1
num_processes: 2
deepspeed_config: {zero_stage: 2}
"""
RUN, RESUMED = ("style", "float32", 2), ("style", "float32", 4)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def run(name, folder, precision, steps, batch_size, resume=False):
    control = dataclasses.replace(loop.CONFIG.control, style="train")
    # Gradients are above this norm in some steps and below it in others.
    optimizer = OptimizerConfig(lr=1e-3, clip_norm=0.5, warmup_steps=2)
    config = loop.with_run(
        dataclasses.replace(loop.CONFIG, trainer=name, control=control, optimizer=optimizer),
        num_steps=steps, batch_size=batch_size, precision=precision, save_every=2, validate_every=2,
    )  # fmt: skip
    if name == "style":
        trainer = loop.style_trainer(config)
    else:
        features = {key: tuple(value.shape) for key, value in loop.WORLD.sample(0).items()}
        trainer = create_control_trainer(
            config, loop.base_weights(), features, num_heads=2, null_text=loop.WORLD.null_text
        )
    return train(trainer, loop.WORLD.dataset(12), folder, resume=resume)


def work(folder, *runs):
    """What each of two processes does: several runs, which share the process group."""
    # accelerate shards over accelerators alone; with `cpu` it falls back to plain data parallelism.
    # Two lines let it take the CPU for one, all else is its own.
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    destroy = PartialState.destroy_process_group
    for number, (name, precision, steps) in enumerate(runs, 1):
        last = number == len(runs)
        PartialState.destroy_process_group = destroy if last else lambda *args, **kwargs: None
        run(name, folder / name, precision, steps, batch_size=2, resume=True)
        AcceleratorState._reset_state(True)


def launch(folder, config, *runs):
    """Trainers in a precision to a step, such as ("style", "float32", 4), one after the other.

    accelerate reads its config as for `accelerate launch`; where it hands over to torch's launcher,
    the processes are forked, since to import everything takes far longer than to train.
    """
    (folder / "accelerate.yaml").write_text(config)
    words = ["--config_file", str(folder / "accelerate.yaml"), "worker.py"]
    started = []

    def fork_them(arguments):
        started.append(arguments.training_script)
        fork_distributed(
            int(arguments.nproc_per_node), work, folder / "two", *runs, folder=folder,
            deadline_s=300, environment={"DS_ACCELERATOR": "cpu"},
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", fork_them)
        launch_command(launch_command_parser().parse_args(words))
    assert started == ["worker.py"]


def equals_one_process(folder, name, precision, steps):
    """What two processes made in `folder` against one process with the doubled batch."""
    AcceleratorState._reset_state(True)
    files = run(name, folder / "one" / name, precision, steps, batch_size=4).files
    two, one = (loop.comparable(folder / n / name) for n in ("two", "one"))
    assert [line["step"] for line in one if "loss" in line] == list(range(1, steps + 1))
    assert len(one) == len(two)
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCES[precision]), (name, theirs["step"])
    for file in files:
        ours, theirs = read_state_dict(folder / "two" / name / file.name), read_state_dict(file)
        assert ours.metadata.keys() == theirs.metadata.keys()
        assert {k: (v.shape, v.dtype) for k, v in ours.tensors.items()} == {
            k: (v.shape, v.dtype) for k, v in theirs.tensors.items()
        }
        if precision == "float32":
            distances = [(ours.tensors[k] - v).abs().max() for k, v in theirs.tensors.items()]
            assert max(distances) < 1e-4


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """A run that is resumed, and one of another trainer in bfloat16."""
    if not knows_fsdp_2():
        pytest.skip("FSDP 2 needs PyTorch 2.6 and accelerate 1.6; without them it is refused")
    folder = tmp_path_factory.mktemp("fsdp")
    launch(folder, FSDP, RUN, RESUMED, ("control", "bfloat16", 2))
    return folder


def test_fsdp_resumed_equals_one_process_with_the_doubled_batch(fsdp):
    shards = fsdp / "two/style/checkpoints/step-00000002/sharded/pytorch_model_fsdp_0"
    assert {p.name for p in shards.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    with pytest.raises(ConfigError, match="step-00000004 is spread over processes"):
        run("style", fsdp / "two/style", "float32", 4, batch_size=4, resume=True)
    equals_one_process(fsdp, "style", "float32", 4)


def test_fsdp_in_bfloat16_equals_one_process_with_the_doubled_batch(fsdp):
    equals_one_process(fsdp, "control", "bfloat16", 2)


@pytest.mark.slow
def test_deepspeed_resumed_equals_one_process_with_the_doubled_batch(tmp_path):
    pytest.importorskip("deepspeed", reason="install deepspeed; it needs a compiler, and minutes")
    launch(tmp_path, DEEPSPEED, RUN, RESUMED)
    equals_one_process(tmp_path, "style", "float32", 4)


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
    for trainer in ("global-projection", "videocrafter-adapter"):
        with pytest.raises(UnsupportedHostError, match=f"{trainer}.*plain data parallelism"):
            prepare_sharding(whole, dataclasses.replace(plain, trainer=trainer))
    old = accelerator("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with pytest.raises(UnsupportedHostError, match="fsdp_version: 2"):
        prepare_sharding(old, plain)


def test_the_command_line_refuses_what_accelerate_would_quietly_change(monkeypatch):
    _check_launch(cpu=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if ACCELERATE > (1, 12):  # before, it makes a group on the CPU without being told
        with pytest.raises(UnsupportedHostError, match="2 processes were started"):
            _check_launch(cpu=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UnsupportedHostError, match="over GPUs alone"):
        _check_launch(cpu=True)
    monkeypatch.setattr("stylemaster_core.training.sharding.knows_fsdp_2", lambda: False)
    with pytest.raises(UnsupportedHostError, match="needs PyTorch 2.6 and accelerate 1.6"):
        _check_launch(cpu=False)
