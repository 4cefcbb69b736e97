"""The training loop: one for all trainers, on one process or many."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import BaseFileLock
from torch import Tensor

from ..errors import ConfigError, LayoutError, StyleMasterError, WeightsError
from ..reading import reading
from ..weights.files import write_state_dict
from ..weights.numbers import check_weights
from ..writing import check_folder, remove_leftovers, write_text
from . import checkpoint as checkpoints
from .checks import check_data, check_disk, check_hashes, check_resume, check_trained, disk_bytes
from .config import config_to_dict
from .ema import MovingAverage
from .optimizer import create_optimizer, learning_rate
from .previews import SAMPLES, References, write_preview
from .run_lock import lock_run
from .samples import (
    Batch,
    BatchPlan,
    StepBatches,
    StepSamples,
    TrainingData,
    collate,
    draw_sample,
    generator_of,
    group_by_size,
    split_validation,
)
from .sharding import gather_for_methods, prepare_sharding
from .stats import Stats, forget_after
from .stop import StopRequest
from .trainer import Trainer

logger = logging.getLogger("stylemaster")

CHECKPOINTS = "checkpoints"
# Latents [1, 16, t, h, w] -> frames, uint8 [T, H, W, 3].
Decode = Callable[[Tensor], np.ndarray]


class NonFiniteError(StyleMasterError):
    """The loss or the gradient is NaN or infinite."""


class WorkerLostError(StyleMasterError):
    """A process of the data loader is gone."""


class _StopSampling(Exception):  # noqa: N818
    """Ends a sample generation because the run was asked to stop."""


class TrainResult(NamedTuple):
    """How a run ended."""

    step: int  # optimiser steps done
    finished: bool  # False: it was asked to stop
    files: list[Path]  # trained files


def train(
    trainer: Trainer,
    data: TrainingData,
    out: str | Path,
    *,
    validation: TrainingData | None = None,
    resume: bool = False,
    cpu: bool = False,
    decode: Decode | None = None,
    progress: bool = False,
) -> TrainResult:
    """Train, and write checkpoints, `stats.jsonl` and at the end the trained files.

    Args:
        trainer: what is trained, how, and by which config.
        data: the samples.
        out: folder of the run.
        validation: held-out samples; None to hold some out of `data`.
        resume: go on from the latest checkpoint in `out`, or begin if there is none.
        cpu: stay off the GPU.
        decode: makes frames of latents; needed for samples (`previews`).
        progress: show a progress bar.

    Returns:
        The step reached, and the files; after a request to stop, the files as trained so far.

    Raises:
        StyleMasterError: before the first step if something does not fit (`checks`), later for a
            loss that is not finite.
    """
    run = trainer.config.run
    if run.validate_every and validation is None:
        data, validation = split_validation(data, run.validation_samples, run.seed)
    data = trainer.arrange(data)
    check_trained(trainer)
    check_data(trainer, data)
    if validation is not None:
        check_data(trainer, validation, "validation data")
        check_hashes(data.hashes, validation.hashes, "the validation data")
    if run.sample_every and (decode is None or validation is None):
        raise ConfigError(
            "sample pictures (run.sample_every) need a VAE and held-out samples; give both, or set "
            "run.sample_every=0"
        )
    out = Path(out)
    if not resume:
        check_new(out)
    check_folder(out)
    check_disk(out, disk_bytes(trainer))
    with StopRequest(out) as stop:
        loop = _Loop(
            trainer, data, validation, out, stop, cpu=cpu, decode=decode, progress=progress
        )
        try:
            result = loop.run(resume=resume)
            loop.accelerator.wait_for_everyone()
            return result
        finally:
            loop.close()


def check_new(out: Path) -> None:
    """Check that a folder holds no checkpoints of an earlier run.

    Raises:
        ConfigError: if it does.
    """
    folder = out / CHECKPOINTS
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"{out} holds the checkpoints of another run; resume it, or choose another folder"
        )


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole process group asks the trainer for a checkpoint, which needs samples.

    Workers end with the trainer: it tells them to, and they look whether it is there.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _children_end_quietly() -> Iterator[None]:
    """Keep PyTorch from raising the end of a worker wherever the trainer is just then.

    In the middle of an optimiser step that would leave half of the weights changed. The loader
    finds a lost worker by itself as soon as it waits for its samples.
    """
    number = getattr(signal, "SIGCHLD", None)  # not on Windows
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(number) if number is not None and in_main else None
    yield
    if before is not None:
        signal.signal(number, before)  # type: ignore[arg-type]


class _Loop:
    def __init__(
        self,
        trainer: Trainer,
        data: TrainingData,
        validation: TrainingData | None,
        out: Path,
        stop: StopRequest,
        *,
        cpu: bool,
        decode: Decode | None,
        progress: bool,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.config = trainer.config
        run, optimizer = self.config.run, self.config.optimizer
        self.accelerator = Accelerator(
            mixed_precision="bf16" if run.precision == "bfloat16" else "no",
            gradient_accumulation_steps=run.accumulation,
            cpu=cpu,
            # All buffers are constants, and validation runs different counts on each process.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.sharded = prepare_sharding(self.accelerator, self.config)
        if self.sharded:
            check_disk(out, disk_bytes(trainer, sharded=True))
        self.trainer, self.data, self.validation = trainer, data, validation
        self.out, self.stop, self.decode = out, stop, decode
        created = create_optimizer(trainer.trained().values(), optimizer)
        self.model, self.optimizer = self.accelerator.prepare(trainer, created)
        gather_for_methods(self.accelerator, self.model)
        self.parameters = trainer.trained()
        self.average: MovingAverage | None = None
        if optimizer.ema_decay:
            self.average = MovingAverage(self.parameters, optimizer.ema_decay)
        self.hashes = dict(data.hashes) | trainer.provenance
        self.is_main = self.accelerator.is_main_process
        self.progress = progress and self.is_main
        self.lock: BaseFileLock | None = None
        self.stats: Stats | None = None
        self.references: References | None = None
        self.samples_per_step = run.batch_size * run.accumulation * self.accelerator.num_processes

    def close(self) -> None:
        if self.stats is not None:
            self.stats.close()
        if self.lock is not None:
            self.lock.release()
        # The wrapped model holds on to the process group: left to be freed after it, a process can
        # hang for ever in the end (seen with gloo).
        from accelerate.state import AcceleratorState

        del self.model, self.optimizer
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()
        AcceleratorState._reset_state()  # else the next run of this process has our precision

    def run(self, *, resume: bool) -> TrainResult:
        from tqdm import tqdm

        run = self.config.run
        self._lock(resume)
        start = self._resume() if resume else 0
        self._open_files(start)
        plan = BatchPlan(group_by_size(self.data), self.samples_per_step, run.seed)
        self._say(start)
        if start == 0:
            self._validate(0)
        step, saved, stopped = start, start if start else -1, False
        bar = tqdm(total=run.num_steps, initial=start, disable=not self.progress, unit="step")
        with bar:
            batches = self._batches(plan, start)
            while step < run.num_steps and not stopped:
                try:
                    loss = self._step(step + 1, batches)
                except WorkerLostError:
                    if saved != step and self.accelerator.num_processes == 1:
                        self._save(step)
                    raise
                stopped = loss is None
                if loss is not None:
                    step += 1
                    bar.set_postfix(loss=f"{loss:.4f}")
                    bar.update()
                    if step % run.save_every == 0:
                        self._save(step)
                        saved = step
                    if run.validate_every and step % run.validate_every == 0:
                        self._validate(step)
                    if run.sample_every and step % run.sample_every == 0:
                        self._sample(step)
        if saved != step:
            self._save(step)
        if stopped and self.is_main:
            logger.info("stopped as asked after step %d; a resume goes on from there", step)
        return TrainResult(step, not stopped, self._write_files())

    def _batches(self, plan: BatchPlan, start: int) -> Iterator[Batch]:
        run = self.config.run
        sampler = StepBatches(
            plan,
            steps=range(start, run.num_steps),
            batch_size=run.batch_size,
            accumulation=run.accumulation,
            process=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        loader = torch.utils.data.DataLoader(
            StepSamples(self.data, self.trainer.draws, run.seed),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=run.num_workers,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        with _children_end_quietly():
            return iter(loader)

    def _step(self, step: int, batches: Iterator[Batch]) -> float | None:
        """One optimiser step; `step` counts from 1.

        Returns:
            The loss of all its samples; None if it was asked to stop, and then nothing has changed.
        """
        config, began = self.config, time.perf_counter()
        rate = learning_rate(config.optimizer, step - 1, config.run.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        names, losses = [], []
        norm: Any = None
        for _ in range(config.run.accumulation):
            if self._stopping():
                self.optimizer.zero_grad()
                return None
            batch = self._next_batch(step, batches)
            with self.accelerator.accumulate(self.model):
                loss = self._losses(batch, step)
                names += batch.names
                losses.append(loss.detach())
                self.accelerator.backward(loss.mean())
        own = torch.cat(losses)
        total = self.accelerator.reduce(own.mean(), "mean").item()  # type: ignore[union-attr]
        self._check_finite(step, total, own, names)
        clip = config.optimizer.clip_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
        norm = None if norm is None else float(norm)
        if norm is not None and not math.isfinite(norm):
            raise self._not_finite(step, f"the norm of the gradient is {norm}", names)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step - 1)
        seconds = time.perf_counter() - began
        self._write(
            step,
            {
                "loss": total,
                "lr": rate,
                "grad_norm": norm,
                "samples_per_s": round(self.samples_per_step / seconds, 4),
                "peak_memory_gb": self._peak_memory(),
            },
        )
        return total

    def _next_batch(self, step: int, batches: Iterator[Batch]) -> Batch:
        try:
            return next(batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.optimizer.zero_grad()
            raise WorkerLostError(
                f"step {step}: a process that reads samples was killed ({error}); often the memory "
                "was full. Resume with a smaller run.num_workers (0 reads in this process)"
            ) from error

    def _losses(self, batch: Batch, step: int) -> Tensor:
        device = self.accelerator.device
        tensors = {k: v.to(device, non_blocking=True) for k, v in batch.tensors.items()}
        try:
            with self.accelerator.autocast():
                return self.model(tensors).float()
        except LayoutError as error:
            raise LayoutError(f"step {step}, samples {', '.join(batch.names)}: {error}") from error

    def _check_finite(self, step: int, total: float, own: Tensor, names: list[str]) -> None:
        """Stop before a loss that is not finite reaches the weights."""
        if math.isfinite(total):
            return
        bad = [name for name, loss in zip(names, own.tolist(), strict=True) if loss - loss != 0]
        raise self._not_finite(step, f"the loss is {total}", bad)

    def _not_finite(self, step: int, what: str, names: list[str]) -> NonFiniteError:
        from accelerate.utils import gather_object

        names = sorted(set(gather_object(names)))
        last = checkpoints.latest_checkpoint(self.out / CHECKPOINTS)
        return NonFiniteError(
            f"step {step}: {what}; samples: {', '.join(names)}. The weights were left as they were "
            f"before this step; the last checkpoint is {last.name if last else 'none'}. Look at "
            "those samples; if they are fine, lower optimizer.lr or use run.precision=float32"
        )

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Mean loss of held-out samples at fixed noise and noise levels."""
        run = self.config.run
        if self.validation is None or not run.validate_every:
            return
        process, count = self.accelerator.process_index, self.accelerator.num_processes
        total = torch.zeros(2, device=self.accelerator.device)
        with self._averaged():
            # Every process makes as many passes; one without a sample left repeats the last.
            for index in range(process, math.ceil(len(self.validation) / count) * count, count):
                if self.stop.asked:
                    break
                losses = self._validation_losses(min(index, len(self.validation) - 1))
                if index < len(self.validation):
                    total += torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))])
            metrics = self.trainer.metrics(self.validation)
        if self._stopping():
            return
        total = self.accelerator.reduce(total, "sum")
        loss = (total[0] / total[1]).item()  # type: ignore[index]
        self._write(step, {"validation_loss": loss} | metrics)
        if self.is_main:
            said = "".join(f", {key} {value:.4f}" for key, value in metrics.items())
            logger.info("step %d: held-out loss %.5f%s", step, loss, said)

    def _validation_losses(self, index: int) -> Tensor:
        run, draws = self.config.run, self.trainer.draws
        drawn = []
        for number in range(run.validation_draws):
            generator = generator_of(run.seed, "validation", index, number)
            position = (number + 0.5) / run.validation_draws
            drawn.append(draw_sample(self.validation, index, draws, generator, position))  # type: ignore[arg-type]
        return self._losses(collate(drawn), 0)

    def _sample(self, step: int) -> None:
        """Generate under the conditions of the first held-out sample."""
        if self.is_main and self.decode is not None and self.validation is not None:
            with self._averaged(), self.accelerator.autocast():
                try:
                    latents = self.trainer.sample(self.validation, 0, self._check_stop)
                except _StopSampling:
                    latents = None
            if latents is not None:
                frames = self.decode(latents.float())
                self._write(step, write_preview(self.out, step, frames, self._references()))
        self.accelerator.wait_for_everyone()

    def _references(self) -> References:
        if self.references is None:
            sample, keys = self.validation[0], self.trainer.draws.keys  # type: ignore[index]
            read = [key for key in ("latents", "control_latents") if key in keys]
            self.references = References(*(self.decode(sample[k][None].float()) for k in read))  # type: ignore[misc]
        return self.references

    def _averaged(self) -> Any:
        from contextlib import nullcontext

        return nullcontext() if self.average is None else self.average.applied()

    def _resume(self) -> int:
        """Load the latest checkpoint, if there is one; returns the steps done."""
        folder = self.out / CHECKPOINTS
        path = checkpoints.latest_checkpoint(folder)
        if path is None:
            if self.is_main:
                logger.warning(
                    "%s holds no checkpoint to go on from; training starts anew", self.out
                )
            return 0
        found = checkpoints.read_checkpoint(path)
        check_resume(found, self.config, self.hashes, self.accelerator.num_processes)
        if self.sharded != checkpoints.is_sharded(path):
            raise ConfigError(
                f"{path.name} {'is whole' if self.sharded else 'is spread over processes'}, and "
                "this run would hold its weights in another way; resume it as it was begun, with "
                "the same accelerate config"
            )
        if self.sharded:
            self.accelerator.load_state(str(path / checkpoints.SHARDED))
            return found.step
        check_weights(found.weights, path / "weights.safetensors")
        if self.average is not None:
            if found.average is None:
                raise WeightsError(
                    f"{path} holds no moving average, which this run keeps; use another checkpoint"
                )
            check_weights(found.average, path / "average.safetensors")
        advice = "use another checkpoint"
        with reading(path, "a checkpoint of this run", advice=advice), torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.weights[name])
            self.optimizer.load_state_dict(found.optimizer)
            if self.average is not None and found.average is not None:
                self.average.load(found.average)
        return found.step

    def _save(self, step: int) -> None:
        run, folder = self.config.run, self.out / CHECKPOINTS
        shards = folder / f".shards-{step}.tmp"
        if self.sharded:
            self.accelerator.save_state(str(shards))
            self.accelerator.wait_for_everyone()
        if self.is_main:
            whole = not self.sharded
            found = checkpoints.Checkpoint(
                step,
                self.trainer.name,
                config_to_dict(self.config),
                self.hashes,
                self.accelerator.num_processes,
                checkpoints.to_cpu(self.parameters) if whole else {},
                self.optimizer.state_dict() if whole else {},
                checkpoints.to_cpu(self.average.average) if self.average is not None else None,
            )
            checkpoints.write_checkpoint(
                folder, found, keep=run.keep_checkpoints, shards=shards if self.sharded else None
            )
            logger.info("step %d: wrote a checkpoint", step)
        self.accelerator.wait_for_everyone()

    def _write_files(self) -> list[Path]:
        """Write the trained files, with the moving average if there is one."""
        paths = []
        with self._averaged():
            files = self.trainer.outputs()
        if self.is_main:
            for file in files:
                path = self.out / file.name
                write_state_dict(path, file.tensors, file.metadata, overwrite=True)
                logger.info("wrote %s", path)
                paths.append(path)
        self.accelerator.wait_for_everyone()
        return paths

    def _lock(self, resume: bool) -> None:
        """Take the folder before looking at what it holds: another process may just end there."""
        if self.is_main:
            self.lock = lock_run(self.out)
            if not resume:
                check_new(self.out)
            checkpoints.remove_leftovers(self.out / CHECKPOINTS)
            remove_leftovers(self.out)
            remove_leftovers(self.out / SAMPLES)
        self.accelerator.wait_for_everyone()

    def _open_files(self, start: int) -> None:
        if not self.is_main:
            return
        # First, as who sees numbers looks here for how many there will be.
        config = json.dumps(config_to_dict(self.config), indent=2)
        write_text(self.out / "config.json", config + "\n", overwrite=True)
        forget_after(self.out, start)
        self.stats = Stats(self.out, tensorboard=self.config.run.tensorboard, start=start)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self.stats is not None:
            self.stats.write(step, values)

    def _check_stop(self, progress: object) -> None:
        if self.stop.asked:
            raise _StopSampling

    def _stopping(self) -> bool:
        """Whether any process was asked to stop: all must do so at the same pass."""
        if self.accelerator.num_processes == 1:
            return self.stop.asked
        flag = torch.tensor(float(self.stop.asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())  # type: ignore[union-attr]

    def _peak_memory(self) -> float | None:
        if self.accelerator.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)

    def _say(self, start: int) -> None:
        if self.is_main:
            trained = sum(p.numel() for p in self.parameters.values())
            logger.info(
                "%s: %s trained parameters, %d samples (%d held out), %d a step on %d process(es) "
                "of %s, steps %d to %d",
                self.trainer.name,
                f"{trained:,}",
                len(self.data),
                0 if self.validation is None else len(self.validation),
                self.samples_per_step,
                self.accelerator.num_processes,
                self.accelerator.device,
                start + 1,
                self.config.run.num_steps,
            )
