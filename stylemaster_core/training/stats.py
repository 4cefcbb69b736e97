"""`stats.jsonl`: a line for each step, validation and sample, whole lines only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UnsupportedHostError

NAME = "stats.jsonl"


class Stats:
    """Appends lines to `stats.jsonl`, and to TensorBoard if wanted."""

    def __init__(self, folder: Path, *, tensorboard: bool, start: int = 0) -> None:
        """Open the files.

        Args:
            folder: of the run.
            tensorboard: whether to write its events, too.
            start: steps done; TensorBoard hides what an interrupted run wrote after them.

        Raises:
            UnsupportedHostError: if TensorBoard is wanted and not installed.
        """
        self._path = folder / NAME
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UnsupportedHostError(
                    "run.tensorboard needs tensorboard, which is not installed; install it (pip "
                    "install tensorboard), or set run.tensorboard=false"
                ) from error
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a line; one system call, so that a kill cannot cut it in two."""
        line = json.dumps({"step": step} | dict(values)) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's `stats.jsonl`; [] if there is none."""
    path = folder / NAME
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def forget_after(folder: Path, step: int) -> None:
    """Remove the lines after a step: a run that resumes there writes them again."""
    lines = [json.dumps(line) for line in read_stats(folder) if line["step"] <= step]
    part = folder / f".{NAME}.tmp"
    part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(part, folder / NAME)
