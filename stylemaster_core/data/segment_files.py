"""Finished segments of a film in a folder beside the result: without loss, and whole or not at all.

The folder's name ends with the hash of the job. A segment is there once its pictures are; what the
next one goes on from is written before them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..weights.files import sha256_of
from ..writing import disk_errors, write_text, written_beside
from .containers import open_container

MARK = ".segments-"
LARGE_BYTES = 1 << 28
_JOB, _LOCK, _WRITING = "job.json", ".lock", "result_is_being_written"
_CHUNK_FRAMES = 16


class SegmentFiles:
    """The finished segments of one job.

    Attributes:
        folder: where they are.
        done: how many there are, from the first on.
    """

    def __init__(self, folder: Path, lengths: Sequence[int]) -> None:
        """Take a folder for this process; it exists.

        Args:
            folder: of the job.
            lengths: frames of each segment.

        Raises:
            ConfigError: if another process works there.
        """
        self.folder, self.lengths = folder, list(lengths)
        self._lock = FileLock(folder / _LOCK)
        with disk_errors(folder / _LOCK):
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise ConfigError(
                    f"another process is working in {folder}; wait for its end, or stop it"
                ) from error
        paths = map(self._pictures, range(len(self.lengths)))
        self.done = next((i for i, path in enumerate(paths) if not path.is_file()), len(lengths))

    def add(self, frames: np.ndarray, lead: Tensor) -> None:
        """Write the next segment; once this returns, it stays.

        Args:
            frames: uint8 [T, H, W, 3].
            lead: latents that the next one goes on from.

        Raises:
            DiskError: if the disk does not take it.
        """
        with written_beside(self._latents(self.done), overwrite=True) as part:
            save_file({"lead": lead.contiguous()}, part)
        with written_beside(self._pictures(self.done), overwrite=True) as part:
            _write_lossless(part, frames)
        self.done += 1
        if self.done > 1:
            self._latents(self.done - 2).unlink(missing_ok=True)

    def lead(self) -> Tensor | None:
        """Latents of the last finished segment; None without any.

        Raises:
            LayoutError: if they are damaged.
        """
        if self.done == 0:
            return None
        path = self._latents(self.done - 1)
        try:
            return load_file(path)["lead"]
        except (OSError, SafetensorError, KeyError) as error:
            raise LayoutError(self._damaged(path)) from error

    def frames(self) -> Iterator[np.ndarray]:
        """All frames in order, uint8 [<= 16, H, W, 3] at a time.

        Raises:
            LayoutError: if a file is damaged.
        """
        for index, length in enumerate(self.lengths):
            path, count, chunk = self._pictures(index), 0, []
            for frame in _read_lossless(path):
                count += 1
                chunk.append(frame)
                if len(chunk) == _CHUNK_FRAMES:
                    yield np.stack(chunk)
                    chunk = []
            if count != length:
                raise LayoutError(self._damaged(path))
            if chunk:
                yield np.stack(chunk)

    def begin_result(self) -> None:
        """Note that from now on the result may appear; `is_result` asks for it."""
        write_text(self.folder / _WRITING, "", overwrite=True)

    def is_result(self, output: Path) -> bool:
        """Whether the result is there already, of a process that was killed after it wrote it."""
        note = self.folder / _WRITING
        if self.done < len(self.lengths) or not note.is_file() or not output.is_file():
            return False
        return output.stat().st_mtime_ns >= note.stat().st_mtime_ns

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def remove(self) -> None:
        """Remove the folder; whatever moment this ends at, no half of it is taken for a job."""
        self.close()
        with disk_errors(self.folder):
            gone = self.folder.with_name(f".{self.folder.name}.gone")
            self.folder.rename(gone)
            shutil.rmtree(gone)

    def _pictures(self, index: int) -> Path:
        return self.folder / f"{index:06}.mkv"

    def _latents(self, index: int) -> Path:
        return self.folder / f"{index:06}.safetensors"

    def _damaged(self, path: Path) -> str:
        return (
            f"{path} is damaged or not whole; remove it and those after it, or all of the folder, "
            "and run the command again"
        )


def check_leftovers(output: Path, *, resume: bool) -> bool:
    """Refuse to begin where segments of the result lie already; and remove those of finished ones.

    Returns:
        Whether there are segments to go on from.

    Raises:
        ConfigError: naming the folder, unless `resume`.
    """
    for gone in output.parent.glob(f".{_escaped(output)}{MARK}*.gone"):
        shutil.rmtree(gone, ignore_errors=True)
    left = _folders(output)
    if left and not resume:
        raise ConfigError(
            f"{left[0]} holds {_count(left[0])} finished segments of {output.name}; resume "
            "that run with its options, or remove the folder, or choose another output"
        )
    return bool(left)


def stopped_job(output: Path) -> dict[str, Any]:
    """The job of the stopped run of a result, as JSON; empty without one that can be read."""
    return next((_read_job(folder) for folder in _folders(output)), {})


def open_segments(output: Path, job: Mapping[str, Any], lengths: Sequence[int]) -> SegmentFiles:
    """Open the folder of a job beside its result; make it if there is none.

    Args:
        output: the result's file.
        job: whatever decides the result, as JSON.
        lengths: frames of each segment.

    Raises:
        ConfigError: if there are segments of another job, saying in what it differs; or another
            process works there.
        DiskError: if the folder cannot be made.
    """
    text = json.dumps(job, indent=1, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = output.with_name(f"{output.name}{MARK}{name}")
    others = [other for other in _folders(output) if other.name != folder.name]
    if others:
        raise ConfigError(
            f"{others[0]} holds {_count(others[0])} finished segments of another job for "
            f"{output.name}{_differences(others[0], json.loads(text))}; finish it with its own "
            "options, or remove the folder, or choose another output"
        )
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    if not (folder / _JOB).is_file():
        write_text(folder / _JOB, text, overwrite=True)
    return SegmentFiles(folder, lengths)


def file_identity(path: Path) -> str:
    """What tells a file or folder from others: its content, of large files size and time.

    Raises:
        LayoutError: if it cannot be read.
    """
    try:
        if path.is_dir():
            inner = [f"{p.name}:{file_identity(p)}" for p in sorted(path.iterdir())]
            return hashlib.sha256("\n".join(inner).encode()).hexdigest()
        facts = path.stat()
        if facts.st_size > LARGE_BYTES:
            return f"{facts.st_size} bytes of {facts.st_mtime_ns}"
        return sha256_of(path)
    except OSError as error:
        raise LayoutError(f"{path} cannot be read: {error.strerror or error}") from error


def _escaped(output: Path) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in output.name)


def _folders(output: Path) -> list[Path]:
    found = output.parent.glob(f"{_escaped(output)}{MARK}*")
    return sorted(path for path in found if path.is_dir())


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("[0-9]*.mkv"))


def _read_job(folder: Path) -> dict[str, Any]:
    try:
        job = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return job if isinstance(job, dict) else {}


def _differences(folder: Path, job: Mapping[str, Any]) -> str:
    other = _read_job(folder)
    if not other:
        return ""
    names = sorted({*other, *job} - {k for k in job if k in other and other[k] == job[k]})
    return f" (they differ in: {', '.join(names)})" if names else ""


def _write_lossless(path: Path, frames: np.ndarray) -> None:
    import av

    with av.open(str(path.absolute()), "w") as output:
        stream: Any = output.add_stream("ffv1", rate=25, options={"level": "3", "slicecrc": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="bgr0")
            picture.pts = index
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))


def _read_lossless(path: Path) -> Iterator[np.ndarray]:
    with open_container(path) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")
