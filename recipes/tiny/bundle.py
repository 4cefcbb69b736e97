"""What a machine with a GPU and without a network needs: `python -m recipes.tiny --bundle DIR`.

Archives of at most 20 MiB hold the code and what the stages up to the samples have made: the VAE,
the encoders, the global projection and all latents. There:

    cat DIR/bundle-* | tar x && python -m recipes.tiny --profile gpu --out runs/tiny --minutes 8
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from stylemaster_core.errors import ConfigError
from stylemaster_core.writing import written_beside

VOLUME_BYTES = 20 * 2**20
ROOT = Path(__file__).parents[2]
CODE = ("pyproject.toml", "LICENSE", "README.md", "recipes", "stylemaster_core")
CODE_SUFFIXES = frozenset({".py", ".toml", ".json", ".md", ".xz", ""})
# The stages whose files travel; the others are the GPU's work.
STAGES = ("vae", "encoder", "judge", "samples", "global-projection", "pictures")
NEEDED = STAGES[:5]


def write_bundle(out: Path, folder: Path, *, weights: bool = False) -> list[Path]:
    """Pack code and stages into `bundle-000`, `bundle-001` and so on: one tar, cut into pieces.

    Args:
        out: folder of the recipe.
        folder: of the archives; new or empty.
        weights: with those in the package, for `--from-shipped`.

    Raises:
        ConfigError: if a stage is not done, or the folder holds something.
    """
    missing = [name for name in NEEDED if not (out / name / "done.json").is_file()]
    if missing:
        raise ConfigError(
            f"{out} lacks the stages {', '.join(missing)}; run the recipe with --until "
            f"{NEEDED[-1]} first"
        )
    check_folder(folder)
    suffixes = CODE_SUFFIXES | ({".safetensors"} if weights else set())
    code = [
        (path, path.relative_to(ROOT))
        for name in CODE
        for path in _files(ROOT / name)
        if path.suffix in suffixes
    ]
    return pack(folder, [*code, *stage_files(out)])


def check_folder(folder: Path) -> None:
    """Refuse a folder of archives that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something already; choose a new folder for --bundle")


def stage_files(out: Path) -> Iterator[tuple[Path, Path]]:
    """What the stages that travel have made, and its place there."""
    for name in STAGES:
        for path in _files(out / name):
            if path.suffix in (".safetensors", ".json") and "checkpoints" not in path.parts:
                yield path, Path("runs/tiny") / path.relative_to(out)


def pack(folder: Path, files: Iterable[tuple[Path, Path]]) -> list[Path]:
    """One tar of files and their places, cut into `bundle-000`, `bundle-001` and so on."""
    volumes = _Volumes(folder)
    with tarfile.open(fileobj=volumes, mode="w|") as tar:  # type: ignore[call-overload]
        for path, place in files:
            tar.add(path, place.as_posix(), recursive=False)
    volumes.flush_rest()
    return volumes.paths


class _Volumes(io.RawIOBase):
    """A stream that is written to files of at most so many bytes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.paths = folder, []
        self.waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.waiting += data
        while len(self.waiting) >= VOLUME_BYTES:
            self._write_volume(VOLUME_BYTES)
        return len(data)

    def flush_rest(self) -> None:
        """Write what is left."""
        if self.waiting:
            self._write_volume(len(self.waiting))

    def _write_volume(self, size: int) -> None:
        path = self.folder / f"bundle-{len(self.paths):03d}"
        with written_beside(path) as part:
            part.write_bytes(self.waiting[:size])
        del self.waiting[:size]
        self.paths.append(path)


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    found = sorted(path for path in place.rglob("*") if path.is_file())
    return [path for path in found if "__pycache__" not in path.parts]
