"""The loop: seeds, resuming, processes, kills, requests to stop, and errors before training."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stylemaster_core.data.images import read_image
from stylemaster_core.data.videos import read_video
from stylemaster_core.errors import ConfigError, LayoutError, StyleMasterError, WeightsError
from stylemaster_core.models.small import draw_weights
from stylemaster_core.training import checkpoint as checkpoints
from stylemaster_core.training import loop
from stylemaster_core.training.checks import disk_bytes
from stylemaster_core.training.config import (
    FlowConfig,
    OptimizerConfig,
    RunConfig,
    StyleConfig,
    TrainConfig,
)
from stylemaster_core.training.gray_tile_controlnet import create_control_trainer
from stylemaster_core.training.loop import NonFiniteError, _Loop, train
from stylemaster_core.training.motion_adapter import create_motion_trainer
from stylemaster_core.training.optimizer import create_optimizer, learning_rate
from stylemaster_core.training.previews import References, write_preview
from stylemaster_core.training.run_lock import is_running, lock_run
from stylemaster_core.training.samples import (
    BatchPlan,
    MemoryDataset,
    StepBatches,
    StepSamples,
    group_by_size,
)
from stylemaster_core.training.stats import read_stats
from stylemaster_core.training.style_modulation import create_style_trainer
from stylemaster_core.training.synthetic import SyntheticWorld
from stylemaster_core.weights.files import read_state_dict
from stylemaster_core.weights.shapes import WanSizes, expected_base_shapes
from tests.forked import fork, fork_distributed

SIZES = WanSizes(width=24, ffn_width=32, num_blocks=2, text_width=10, freq_width=8)
WORLD = SyntheticWorld()
CONFIG = TrainConfig(
    "style",
    RunConfig(
        num_steps=6, batch_size=2, accumulation=2, save_every=3, validate_every=3,
        validation_samples=3, validation_draws=2,
    ),
    OptimizerConfig(lr=1e-2, warmup_steps=2, schedule="cosine", ema_decay=0.9),
    FlowConfig(text_length=5),
    StyleConfig(selection="all", global_tokens=2, num_layers=1, num_heads=2),
)  # fmt: skip


def with_run(config=CONFIG, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def base_weights():
    return {k: v.float() for k, v in draw_weights(expected_base_shapes(SIZES), 0).items()}


def style_trainer(config=CONFIG, data=None, base=None):
    sample = (data or WORLD.dataset(1))[0]
    features = {key: tuple(value.shape) for key, value in sample.items()}
    return create_style_trainer(
        config, base or base_weights(), features, num_heads=2, null_text=WORLD.null_text
    )


def comparable(folder):
    timing = {"samples_per_s", "peak_memory_gb"}
    return [{k: v for k, v in line.items() if k not in timing} for line in read_stats(folder)]


# ---- which samples a step sees ----


def test_an_epoch_shows_every_sample_in_batches_of_one_size():
    sizes = [(16, 1, 4, 4)] * 5 + [(16, 2, 4, 4)] * 3
    data = MemoryDataset([{"latents": torch.zeros(size)} for size in sizes])
    plan = BatchPlan(group_by_size(data), 2, seed=1)
    assert plan.batches_per_epoch == 3 + 2
    for epoch in range(3):
        batches = [plan[epoch * 5 + i] for i in range(5)]
        assert {i for batch in batches for i in batch} == set(range(8))
        assert all(len({sizes[i] for i in batch}) == 1 for batch in batches)
    assert [plan[i] for i in range(5)] != [plan[i + 5] for i in range(5)]


def test_processes_share_a_step_without_overlap():
    data = WORLD.dataset(16)
    plan = BatchPlan(group_by_size(data), 8, seed=0)

    def places(process, count, batch_size, accumulation):
        sampler = StepBatches(
            plan, steps=range(3, 5), batch_size=batch_size, accumulation=accumulation,
            process=process, num_processes=count,
        )  # fmt: skip
        return [place for batch in sampler for place in batch]

    alone = places(0, 1, 8, 1)
    shared = places(0, 2, 2, 2) + places(1, 2, 2, 2)
    assert sorted(alone) == sorted(shared) and len(alone) == 16


def test_what_is_drawn_depends_on_seed_step_and_row_alone():
    trainer = style_trainer()
    data = WORLD.dataset(4)
    place = next(iter(StepBatches(BatchPlan([[0, 1, 2, 3]], 4, 0), steps=range(5, 6), batch_size=4,
                                  accumulation=1, process=0, num_processes=1)))  # fmt: skip
    samples = StepSamples(data, trainer.draws, seed=7)
    first, again = samples[place[1]][1], samples[place[1]][1]
    assert all(torch.equal(first[key], again[key]) for key in first)
    moved = samples[place[1]._replace(step=6)][1]
    reseeded = StepSamples(data, trainer.draws, seed=8)[place[1]][1]
    other_row = samples[place[1]._replace(row=2)][1]
    for other in (moved, reseeded, other_row):
        assert not torch.equal(first["noise"], other["noise"])
    levels = {int(samples[p][1]["level"]) for p in place}
    assert len(levels) == 4, "timesteps are drawn per sample"


# ---- resuming ----


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    data = WORLD.dataset(12)
    whole = train(style_trainer(), data, tmp_path / "whole")
    first = style_trainer()
    (tmp_path / "part").mkdir()
    asked = _stop_after(first, 2, tmp_path / "part")
    stopped = train(asked, data, tmp_path / "part")
    assert not stopped.finished and stopped.step == 2
    assert read_stats(tmp_path / "part")[-1]["step"] == 2
    resumed = train(style_trainer(), data, tmp_path / "part", resume=True)
    assert resumed.finished and resumed.step == 6
    ours, theirs = (read_state_dict(r.files[0]).tensors for r in (resumed, whole))
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    ours, theirs = (
        checkpoints.read_checkpoint(checkpoints.latest_checkpoint(tmp_path / n / "checkpoints"))
        for n in ("part", "whole")
    )
    for part in ("weights", "average"):
        a, b = getattr(ours, part), getattr(theirs, part)
        assert all(torch.equal(a[k], b[k]) for k in b)
    for index, state in theirs.optimizer["state"].items():
        assert all(torch.equal(ours.optimizer["state"][index][k], v) for k, v in state.items())
    lines = {json.dumps(line) for line in comparable(tmp_path / "whole")}
    assert {json.dumps(line) for line in comparable(tmp_path / "part")} == lines


def _stop_after(trainer, step, folder):
    """Ask for a stop, by the file, in the middle of the step after this one."""
    plain, passes = trainer.forward, [0]

    def forward(batch):
        if torch.is_grad_enabled():
            passes[0] += 1
            if passes[0] == step * trainer.config.run.accumulation + 1:
                (folder / "stop").touch()
        return plain(batch)

    trainer.forward = forward
    return trainer


def test_the_order_of_steps_matters_to_the_result(tmp_path):
    data = WORLD.dataset(12)
    one = train(style_trainer(), data, tmp_path / "a").files[0]
    other = with_run(seed=1)
    two = train(style_trainer(other), data, tmp_path / "b").files[0]
    a, b = read_state_dict(one).tensors, read_state_dict(two).tensors
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    data = WORLD.dataset(12)
    train(style_trainer(), data, tmp_path / "a")
    train(style_trainer(with_run(batch_size=4, accumulation=1)), data, tmp_path / "b")
    losses = [[line["loss"] for line in read_stats(tmp_path / n) if "loss" in line] for n in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_checkpointed_blocks_give_the_same_gradients():
    batch = _batch(style_trainer())
    gradients = []
    for every in (0, 1, 2):
        trainer = style_trainer(with_run(checkpoint_blocks=every))
        trainer(batch).mean().backward()
        gradients.append({n: p.grad for n, p in trainer.trained().items()})
    for other in gradients[1:]:
        assert all(torch.equal(gradients[0][n], other[n]) for n in other)


def _batch(trainer, count=4):
    from stylemaster_core.training.samples import Place, collate

    samples = StepSamples(WORLD.dataset(count), trainer.draws, 0)
    return collate([samples[Place(0, i, i)] for i in range(count)]).tensors


def test_frozen_parts_keep_nothing_for_backward():
    trainer = style_trainer()
    frozen = {id(p) for p in trainer.parameters() if not p.requires_grad}
    batch = _batch(trainer)
    trainer(batch).mean().backward()
    assert all(p.grad is None for p in trainer.parameters() if id(p) in frozen)
    sizes = []
    for every in (0, 1):
        kept = {}
        trainer = style_trainer(with_run(checkpoint_blocks=every))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t,
            lambda t: t,
        ):
            trainer(batch)
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    assert sizes[1] < 0.8 * sizes[0]


def test_bfloat16_keeps_master_weights_in_float32(tmp_path, fresh_accelerator):
    trainer = style_trainer(with_run(precision="bfloat16", num_steps=2))
    assert trainer.transformer.patch_embedding.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.trained().values()} == {torch.float32}
    train(trainer, WORLD.dataset(12), tmp_path)
    exact = _first_loss(train_and_read(tmp_path.parent / "exact"))
    assert _first_loss(read_stats(tmp_path)) == pytest.approx(exact, rel=3e-2)
    saved = checkpoints.read_checkpoint(checkpoints.latest_checkpoint(tmp_path / "checkpoints"))
    assert {v.dtype for v in saved.weights.values()} == {torch.float32}


def train_and_read(folder):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    train(style_trainer(with_run(num_steps=1)), WORLD.dataset(12), folder)
    return read_stats(folder)


def _first_loss(lines):
    return next(line["loss"] for line in lines if "loss" in line)


@pytest.fixture
def fresh_accelerator():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


# ---- checkpoints ----


def test_a_checkpoint_folder_is_whole_and_says_what_it_is(tmp_path):
    train(style_trainer(), WORLD.dataset(12), tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000003", "step-00000006"]
    assert (folder / "latest").read_text().strip() == "step-00000006"
    config = json.loads((folder / "step-00000003" / "config.json").read_text())
    assert config["optimizer"]["lr"] == 1e-2 and config["trainer"] == "style"
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_old_checkpoints_go_and_the_latest_stays(tmp_path):
    train(style_trainer(with_run(save_every=1, keep_checkpoints=2)), WORLD.dataset(12), tmp_path)
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000005", "step-00000006"]


ROOT = Path(__file__).parents[2]


def child_environment():
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return os.environ | environment


HANG_S = 300  # to import everything alone takes 10 s where a core is shared
CHILDREN = []


@pytest.fixture(autouse=True)
def no_child_stays():
    """One that a failed test left would train for ever."""
    yield
    for child in CHILDREN:
        child.kill()
        child.join()
    CHILDREN.clear()


def train_for_ever(folder, **changes):
    changes = {"num_steps": 100000, "save_every": 1, "validate_every": 0} | changes
    config = with_run(keep_checkpoints=2, **changes)
    train(style_trainer(config), WORLD.dataset(12), folder, resume=True)


def train_to_the_signal(folder, num_workers=0):
    train_for_ever(folder, save_every=100000, num_workers=num_workers)


def fork_training(function, *arguments, **options):
    child = fork(function, *arguments, **options)
    CHILDREN.append(child)
    return child


def test_sigkill_leaves_whole_files_and_loses_at_most_the_last_step(tmp_path):
    folder, reached = tmp_path / "checkpoints", 0
    for delay in (0.0, 0.017):
        child = fork_training(train_for_ever, tmp_path)
        target = reached + 4
        deadline = time.monotonic() + HANG_S
        while _last_step(tmp_path) < target and child.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert child.is_alive()
        time.sleep(delay)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        lines = read_stats(tmp_path)
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == list(range(1, steps[-1] + 1)), "every line is whole, none is twice"
        latest = checkpoints.latest_checkpoint(folder)
        saved = checkpoints.read_checkpoint(latest)
        assert set(saved.weights) == set(style_trainer().trained())
        assert saved.step >= steps[-1] - 1
        for path in folder.glob("step-*"):
            checkpoints.read_checkpoint(path)
        reached = saved.step
    config = with_run(num_steps=reached + 2, save_every=1, validate_every=0)
    result = train(style_trainer(config), WORLD.dataset(12), tmp_path, resume=True)
    assert result.step == reached + 2
    assert not list(folder.glob(".*.tmp")), "what the kill left is removed"


def _last_step(folder):
    latest = folder / "checkpoints" / "latest"
    return int(latest.read_text().strip()[5:]) if latest.is_file() else 0


def wait_for_steps(folder, count, child):
    deadline = time.monotonic() + HANG_S
    while len(read_stats(folder)) < count:
        assert time.monotonic() < deadline and child.is_alive()
        time.sleep(0.01)


def test_sigterm_to_the_whole_group_leaves_a_checkpoint(tmp_path):
    """As `timeout`, scancel and systemd send it: to the processes that read samples, too."""
    said = tmp_path / "said"
    child = fork_training(train_to_the_signal, tmp_path, 2, said=said, own_group=True)
    wait_for_steps(tmp_path, 3, child)
    os.killpg(child.pid, signal.SIGTERM)
    child.join(HANG_S)
    assert child.exitcode == 0 and "Traceback" not in said.read_text(), said.read_text()
    latest = checkpoints.latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoints.read_checkpoint(latest).step == read_stats(tmp_path)[-1]["step"] >= 3


def train_and_kill_a_reader(folder):
    check = _Loop._check_finite

    def kills(self, step, *arguments):
        if step == 3:  # in the middle of a step, not while it waits for samples
            pid = os.getpid()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            time.sleep(0.5)
        return check(self, step, *arguments)

    _Loop._check_finite = kills  # in this process alone
    train_to_the_signal(folder, 1)
    print("not reached", file=sys.stderr)


def test_a_killed_reader_of_samples_is_named_and_the_steps_are_kept(tmp_path):
    file = tmp_path / "said"
    child = fork_training(train_and_kill_a_reader, tmp_path, said=file)
    child.join(HANG_S)
    said = file.read_text()
    assert child.exitcode == 1
    assert "WorkerLostError" in said and "run.num_workers" in said and "not reached" not in said
    latest = checkpoints.latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoints.read_checkpoint(latest).step == read_stats(tmp_path)[-1]["step"] >= 3


WATCHES = """
import sys
from stylemaster_core.cli.stop_with_stdin import stop_with_stdin
stop_with_stdin()
from tests.unit.test_training_loop import torch, train_to_the_signal
torch.set_num_threads(1)
train_to_the_signal(sys.argv[1])
"""


def start_training_and_wait(folder):
    child = subprocess.Popen(
        [sys.executable, "-c", WATCHES, str(folder)],
        env=child_environment(), cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    (folder / "pid").write_text(str(child.pid))
    time.sleep(2 * HANG_S)


def test_training_ends_with_the_process_that_started_it(tmp_path):
    """A killed ComfyUI tells nobody anything; the pipe to its child closes."""
    parent = fork_training(start_training_and_wait, tmp_path)
    try:
        wait_for_steps(tmp_path, 3, parent)
        parent.kill()
        deadline = time.monotonic() + HANG_S
        while is_running(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    except BaseException:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        raise
    latest = checkpoints.latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoints.read_checkpoint(latest).step == read_stats(tmp_path)[-1]["step"] >= 3


def test_a_checkpoint_without_part_of_its_state_is_not_gone_on_from(tmp_path):
    train(style_trainer(), WORLD.dataset(12), tmp_path / "run")
    latest = checkpoints.latest_checkpoint(tmp_path / "run" / "checkpoints")
    for name in ("optimizer", "weights", "average"):
        file = latest / f"{name}.safetensors"
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(WeightsError, match=f"{name}.safetensors is missing"):
            checkpoints.read_checkpoint(latest)
        save_file({}, file)
        with pytest.raises(WeightsError, match="bytes were written"):
            checkpoints.read_checkpoint(latest)
        file.write_bytes(whole)
    # Those of earlier versions did not say what belongs to them.
    state = json.loads((latest / "state.json").read_text())
    del state["files"]
    (latest / "state.json").write_text(json.dumps(state))
    assert checkpoints.read_checkpoint(latest).step == 6
    optimizer, average = latest / "optimizer.safetensors", latest / "average.safetensors"
    average.rename(tmp_path / "kept")
    with pytest.raises(WeightsError, match="no moving average"):
        train(style_trainer(), WORLD.dataset(12), tmp_path / "run", resume=True)
    (tmp_path / "kept").rename(average)
    save_file({}, optimizer)
    with pytest.raises(WeightsError, match="no state of the optimiser"):
        checkpoints.read_checkpoint(latest)


def test_a_checkpoint_with_nan_names_its_file(tmp_path):
    train(style_trainer(), WORLD.dataset(12), tmp_path)
    latest = checkpoints.latest_checkpoint(tmp_path / "checkpoints")
    file = latest / "weights.safetensors"
    weights = read_state_dict(file).tensors
    key = next(iter(weights))
    save_file({k: v.fill_(float("nan")) if k == key else v for k, v in weights.items()}, file)
    state = json.loads((latest / "state.json").read_text())
    state["files"]["weights.safetensors"] = file.stat().st_size
    (latest / "state.json").write_text(json.dumps(state))
    with pytest.raises(WeightsError, match=r"weights\.safetensors: 1 weights"):
        train(style_trainer(), WORLD.dataset(12), tmp_path, resume=True)


def test_sigterm_ends_with_a_checkpoint(tmp_path):
    child = fork_training(train_to_the_signal, tmp_path)
    wait_for_steps(tmp_path, 3, child)
    child.terminate()
    time.sleep(0.005)
    child.terminate()  # launchers pass on what the terminal has sent already
    child.join(HANG_S)
    assert child.exitcode == 0
    latest = checkpoints.latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoints.read_checkpoint(latest).step == read_stats(tmp_path)[-1]["step"] >= 3
    assert (tmp_path / "style_adapter.safetensors").is_file()


# ---- processes ----


def train_in_a_group(folder):
    config = with_run(num_steps=6, batch_size=2, accumulation=2, save_every=100)
    train(style_trainer(config), WORLD.dataset(12), folder, cpu=True)


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    fork_distributed(2, train_in_a_group, tmp_path / "two", folder=tmp_path, deadline_s=HANG_S)
    config = with_run(num_steps=6, batch_size=4, accumulation=2, save_every=100)
    train(style_trainer(config), WORLD.dataset(12), tmp_path / "one")
    two, one = comparable(tmp_path / "two"), comparable(tmp_path / "one")
    assert len(one) == len(two) == 6 + 3
    for ours, theirs in zip(two, one, strict=True):
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-5), (key, theirs["step"])
    ours, theirs = (
        read_state_dict(tmp_path / name / "style_adapter.safetensors").tensors
        for name in ("two", "one")
    )
    # Softmax ignores a bias of the keys: its gradient is rounding noise, which Adam makes steps of.
    for tensors in (ours, theirs):
        for key in [key for key in tensors if key.endswith("in_proj_bias")]:
            queries, _, values = tensors[key].chunk(3)
            tensors[key] = torch.cat([queries, values])
    # By the norm of all: Adam makes a step of the rounding noise of a gradient that is nothing.
    difference, size = (
        torch.cat([tensors[k].flatten() for k in theirs]).norm()
        for tensors in ({k: ours[k] - theirs[k] for k in theirs}, theirs)
    )
    assert difference < 3e-6 * size


def test_who_sees_the_numbers_of_a_run_can_read_its_config(tmp_path, monkeypatch):
    """The training nodes watch the numbers, and then ask the config for the number of steps."""
    seen, forget = [], loop.forget_after

    def watched(folder, step):
        seen.append((folder / "config.json").is_file())
        forget(folder, step)

    monkeypatch.setattr(loop, "forget_after", watched)
    train(style_trainer(with_run(num_steps=1)), WORLD.dataset(4), tmp_path)
    assert seen == [True]


def test_runs_of_one_process_have_precisions_of_their_own(tmp_path):
    for precision in ("float32", "bfloat16", "float32"):
        config = with_run(num_steps=1, precision=precision, validate_every=0)
        result = train(
            style_trainer(config),
            WORLD.dataset(4),
            tmp_path / f"{precision}{len(list(tmp_path.iterdir()))}",
        )
        assert result.finished


# ---- optimiser ----


def test_learning_rates():
    def rates(**options):
        config = OptimizerConfig(lr=1.0, warmup_steps=2, **options)
        return [round(learning_rate(config, step, 10), 4) for step in (0, 1, 2, 6, 10)]

    assert rates() == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert rates(schedule="linear") == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert rates(schedule="cosine", final_share=0.2) == [0.5, 1.0, 1.0, 0.6, 0.2]


def test_eight_bits_without_bitsandbytes_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(StyleMasterError, match="bitsandbytes"):
        create_optimizer([torch.nn.Parameter(torch.zeros(2))], OptimizerConfig("adamw8bit"))


def test_eight_bits_learn_resume_and_stay_near_32(tmp_path):
    """On the CPU, with the real library: the losses of both are within 1 %."""
    pytest.importorskip("bitsandbytes", "0.50", reason="install stylemaster[scale] to run it")
    # Tensors of fewer than 4096 numbers keep 32 bits.
    world = SyntheticWorld(text_width=48)
    sizes = dataclasses.replace(SIZES, width=128, text_width=48)
    base = {k: v.float() for k, v in draw_weights(expected_base_shapes(sizes), 0).items()}
    features = {key: tuple(value.shape) for key, value in world.sample(0).items()}

    def run(name, folder, resume=False, **options):
        optimizer = OptimizerConfig(name, lr=1e-2)
        config = dataclasses.replace(with_run(**options), optimizer=optimizer)
        trainer = create_style_trainer(
            config, base, features, num_heads=2, null_text=world.null_text
        )
        train(trainer, world.dataset(12), tmp_path / folder, resume=resume)

    for name in ("adamw", "adamw8bit"):
        run(name, name, num_steps=30)
    run("adamw8bit", "part", num_steps=15)
    run("adamw8bit", "part", num_steps=30, resume=True)
    losses = {
        folder: [line["validation_loss"] for line in read_stats(tmp_path / folder)
                 if "validation_loss" in line]
        for folder in ("adamw", "adamw8bit", "part")
    }  # fmt: skip
    assert losses["adamw8bit"][-1] < 0.9 * losses["adamw8bit"][0]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=1e-2)
    assert losses["adamw8bit"] != losses["adamw"]
    last, resumed = (
        checkpoints.read_checkpoint(checkpoints.latest_checkpoint(tmp_path / n / "checkpoints"))
        for n in ("adamw8bit", "part")
    )
    assert all(torch.equal(last.weights[k], resumed.weights[k]) for k in last.weights)
    states = [s["__bnb_optimizer_quant_state__"] for s in last.optimizer["state"].values()]
    assert sum(s["state1"].dtype == s["state2"].dtype == torch.uint8 for s in states) >= 4


# ---- errors ----


def changed(index, **tensors):
    samples = list(WORLD.dataset(8).samples)
    samples[index] = samples[index] | tensors
    return MemoryDataset(samples, ids=[f"clip {i}" for i in range(8)])


def quick(**options):
    return with_run(validate_every=0, num_steps=4, **options)


def test_a_loss_that_is_not_finite_stops_and_names_the_sample(tmp_path):
    data = changed(5, latents=torch.full((16, 2, 4, 4), 1e30))
    trainer = style_trainer(quick())
    with pytest.raises(NonFiniteError, match=r"step \d: the loss is nan; samples: clip 5\. "):
        train(trainer, data, tmp_path)
    assert all(torch.isfinite(p).all() for p in trainer.trained().values())


def test_what_cannot_be_trained_on_is_named_before_the_first_step(tmp_path):
    data = WORLD.dataset(8)

    def fails(error, match, dataset=data, config=None, **options):
        config = config or quick()
        with pytest.raises(error, match=match):
            train(style_trainer(config), dataset, tmp_path / "run", **options)
        assert not list(tmp_path.glob("run/stats.jsonl"))

    fails(ConfigError, "the dataset is empty", MemoryDataset([]))
    fails(ConfigError, "held out", config=with_run(validation_samples=8))
    odd = torch.zeros(16, 2, 3, 4)
    fails(LayoutError, "sample 'clip 2'.*multiples of 16", changed(2, latents=odd))
    wide = MemoryDataset([s | {"text": torch.zeros(5, 11)} for s in data.samples])
    fails(LayoutError, r"must be \[L, 10\]", wide)
    without = MemoryDataset([{"latents": s["latents"]} for s in data.samples])
    fails(LayoutError, "has no text, patch_features, shuffled_embeds", without)
    other = MemoryDataset(data.samples, hashes={"vae": "b" * 64})
    ours = MemoryDataset(data.samples, hashes={"vae": "a" * 64})
    fails(WeightsError, "vae bbbbbbbbbbbb instead of aaaaaaaaaaaa", ours, validation=other)


def test_nan_in_a_cache_names_the_sample(tmp_path):
    data = changed(3, patch_features=torch.full((17, 16), float("nan")))
    with pytest.raises(LayoutError, match="patch_features of sample 'clip 3' holds NaN"):
        train(style_trainer(quick()), data, tmp_path)


def test_mixed_sizes_train_in_batches_of_one_size(tmp_path):
    still = SyntheticWorld(size=(1, 4, 6))
    samples = WORLD.dataset(6).samples + still.dataset(6).samples
    train(style_trainer(quick()), MemoryDataset(samples), tmp_path)
    assert len(read_stats(tmp_path)) == 4


def test_too_little_disk(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match="0.00 GB free"):
        train(style_trainer(quick()), WORLD.dataset(8), tmp_path / "run")


def test_sharded_checkpoints_hold_the_frozen_weights_too():
    trainer = style_trainer(quick(keep_checkpoints=4))
    frozen = sum(4 * v.numel() for v in base_weights().values())
    assert disk_bytes(trainer, sharded=True) - disk_bytes(trainer) == 5 * frozen


def test_a_run_is_not_overwritten_nor_continued_as_another(tmp_path):
    data = MemoryDataset(WORLD.dataset(12).samples, hashes={"vae": "a" * 64})
    train(style_trainer(), data, tmp_path)
    with pytest.raises(ConfigError, match="another run; resume it"):
        train(style_trainer(), data, tmp_path)
    motion = dataclasses.replace(CONFIG, trainer="motion")
    trainer = create_motion_trainer(motion, base_weights(), num_heads=2, null_text=WORLD.null_text)
    with pytest.raises(WeightsError, match="trainer 'style', this is 'motion'"):
        train(trainer, data, tmp_path, resume=True)
    slower = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(lr=1e-3))
    with pytest.raises(ConfigError, match="optimizer.lr 0.001 instead of 0.01"):
        train(style_trainer(slower), data, tmp_path, resume=True)
    with pytest.raises(ConfigError, match="a step had 4 samples"):
        train(style_trainer(with_run(batch_size=4)), data, tmp_path, resume=True)
    other = MemoryDataset(data.samples, hashes={"vae": "b" * 64})
    with pytest.raises(WeightsError, match="vae bbbbbbbbbbbb instead of aaaaaaaaaaaa"):
        train(style_trainer(), other, tmp_path, resume=True)
    longer = with_run(num_steps=7, batch_size=1, accumulation=4)
    assert train(style_trainer(longer), data, tmp_path, resume=True).step == 7


def test_a_run_that_ends_while_this_one_waits_for_it_is_not_trained_over(tmp_path, monkeypatch):
    def wait_for_the_other(out):
        (out / "checkpoints" / "step-00000002").mkdir(parents=True)
        return lock_run(out)

    monkeypatch.setattr("stylemaster_core.training.loop.lock_run", wait_for_the_other)
    with pytest.raises(ConfigError, match="holds the checkpoints of another run"):
        train(style_trainer(), WORLD.dataset(12), tmp_path)
    assert not read_stats(tmp_path)


def test_resuming_an_empty_folder_says_that_it_starts_anew(tmp_path, caplog):
    config = with_run(num_steps=1, validate_every=0)
    assert train(style_trainer(config), WORLD.dataset(12), tmp_path, resume=True).step == 1
    assert f"{tmp_path} holds no checkpoint to go on from; training starts anew" in caplog.text


def test_text_dropout_needs_the_empty_prompt():
    features = {key: tuple(value.shape) for key, value in WORLD.dataset(1)[0].items()}
    with pytest.raises(ConfigError, match="empty prompt"):
        create_style_trainer(CONFIG, base_weights(), features, num_heads=2, null_text=None)


# ---- samples and TensorBoard ----


def decode(latents):
    """Latents [1, 16, 2, 4, 4] as 5 frames of 32 x 32."""
    small = latents[0, :3].sigmoid().mul(255).to(torch.uint8).permute(1, 2, 3, 0)
    frames = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return frames[[0, 0, 0, 1, 1]].contiguous().numpy()


def sampling(**options):
    return with_run(sample_every=3, sample_steps=2, **options)


def test_samples_are_a_sheet_a_video_and_numbers(tmp_path):
    data = WORLD.dataset(12)
    train(style_trainer(sampling()), data, tmp_path, decode=decode)
    names = ["step-00000003.mp4", "step-00000003.png", "step-00000006.mp4", "step-00000006.png"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == names
    assert read_video(tmp_path / "samples" / names[0]).frames.shape == (5, 32, 32, 3)
    assert read_image(tmp_path / "samples" / names[1]).shape == (32, 5 * 32, 3)
    line, _ = (line for line in read_stats(tmp_path) if "sample" in line)
    assert line["sample"] == f"samples/{names[1]}" and line["sample_video"] == f"samples/{names[0]}"
    assert line["sample_colour"] > 0 and line["sample_gabor"] > 0
    assert line["sample_difference"] > 0 and "sample_luma" not in line
    with pytest.raises(ConfigError, match="need a VAE"):
        train(style_trainer(sampling()), data, tmp_path / "b")


def test_numbers_of_a_sample_that_is_the_held_out_one(tmp_path):
    held_out = WORLD.dataset(3, "held out")
    truth, tile = (held_out[0][key][None] for key in ("latents", "control_latents"))
    trainer = create_control_trainer(
        dataclasses.replace(sampling(), trainer="control"), base_weights(), {}, num_heads=2,
        null_text=WORLD.null_text,
    )  # fmt: skip
    made = iter([truth, tile])
    trainer.sample = lambda *arguments: next(made)
    train(trainer, WORLD.dataset(12), tmp_path, validation=held_out, decode=decode)
    first, second = (line for line in read_stats(tmp_path) if "sample" in line)
    assert first["sample_colour"] == first["sample_gabor"] == 0
    assert first["sample_difference"] == first["truth_difference"] > 0
    assert second["sample_luma"] == pytest.approx(1, abs=1e-6) and first["sample_luma"] < 0.999
    assert second["sample_colour"] > 0.01
    assert second["truth_difference"] == first["truth_difference"] != second["sample_difference"]


def test_a_single_picture_has_no_motion(tmp_path):
    picture = decode(WORLD.dataset(1)[0]["latents"][None])[:1]
    values = write_preview(tmp_path, 3, picture, References(255 - picture))
    assert set(values) == {"sample", "sample_colour", "sample_gabor"}
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-00000003.png"]


def test_tensorboard_shows_the_numbers_and_forgets_what_a_resumed_run_does_again(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="install stylemaster[dev]"
    )
    data = WORLD.dataset(12)
    train(style_trainer(sampling(tensorboard=True)), data, tmp_path, decode=decode)
    folder = tmp_path / "checkpoints"
    (folder / "latest").write_text("step-00000003")  # as if killed before the last checkpoint
    train(style_trainer(sampling(tensorboard=True)), data, tmp_path, decode=decode, resume=True)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    stats = read_stats(tmp_path)
    for key in ("loss", "lr", "grad_norm", "validation_loss", "sample_colour", "sample_gabor"):
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        assert shown == [(s["step"], pytest.approx(s[key], rel=1e-6)) for s in stats if key in s]


def test_tensorboard_that_is_not_installed_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(StyleMasterError, match="needs tensorboard"):
        train(style_trainer(with_run(tensorboard=True)), WORLD.dataset(12), tmp_path)
