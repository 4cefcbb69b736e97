"""`stats.jsonl`: a line for each step, validation and sample, whole lines only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.jsonl import read_jsonl, write_jsonl
from ..errors import UnsupportedHostError
from ..file_names import file_below
from ..writing import append_line

NAME = "stats.jsonl"
_FILES = ("sample", "sample_video")
_NUMBER = (int, float, type(None))
_NUMBERS = frozenset({*_NUMBER, bool})


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
        append_line(self._path, json.dumps({"step": step} | dict(values)).encode(), sync=False)
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's `stats.jsonl`; [] if there is none.

    Raises:
        ConfigError: if a line is something else.
    """
    return read_jsonl(folder / NAME, _problem, missing_ok=True)


def sample_file(folder: Path, line: Mapping[str, Any]) -> Path | None:
    """The sample picture that a line of `stats.jsonl` names, None if it names none.

    Raises:
        ConfigError: if it names a file that is not below the run's folder.
    """
    if "sample" not in line:
        return None
    return file_below(folder, line["sample"], folder / NAME)


def _problem(line: dict[str, Any]) -> str | None:
    if type(line.get("step")) is not int or line["step"] < 0:
        return "it has no step"
    if _FILES[0] not in line and _NUMBERS.issuperset(map(type, line.values())):
        return None
    wrong = [k for k, v in line.items() if not isinstance(v, str if k in _FILES else _NUMBER)]
    return f"{', '.join(wrong)} of another type than expected" if wrong else None


def forget_after(folder: Path, step: int) -> None:
    """Remove the lines after a step: a run that resumes there writes them again."""
    write_jsonl(folder / NAME, [line for line in read_stats(folder) if line["step"] <= step])
