"""What a machine with a GPU and without a network needs, in archives of at most 20 MiB.

    python -m bench.gpu --bundle DIR --has FILE --has-python 3.12 [--recipe runs/tiny]

FILE is what `pip list --format=freeze` prints there; packages that it lacks go along as wheels.
There, in an empty folder, `make gpu` then takes Python packages from the folder `wheels` alone:

    cat DIR/bundle-* | tar x && make gpu
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.tiny.bundle import check_folder, pack, stage_files
from stylemaster_core.errors import ConfigError

ROOT = Path(__file__).parents[1]
EXTRA = "train"  # what the pieces import
# What PyTorch brings is of its build, which no index knows.
OF_TORCH = re.compile(r"nvidia-|cuda-|triton|pytorch-triton")


def write_gpu_bundle(
    folder: Path, has: Path | None, *, python: str, recipe: Path | None = None
) -> list[Path]:
    """Pack the repository's files, wheels and perhaps the latents of the small model.

    Args:
        folder: of the archives; new or empty.
        has: list of the packages there; PyTorch must be one.
        python: version there, such as 3.12.
        recipe: folder of the small model's recipe.

    Raises:
        ConfigError: for a list that cannot be used, a folder that holds something, no git
            checkout, or packages that cannot be had.
    """
    check_folder(folder)
    if has is None or not has.is_file():
        raise ConfigError(
            f"--has {has}: give the file that `pip list --format=freeze` printed on that machine"
        )
    there = read_packages(has.read_text())
    if "torch" not in there:
        raise ConfigError(f"{has} names no torch; PyTorch is too large for a bundle")
    with tempfile.TemporaryDirectory() as scratch:
        wheels = download_wheels(Path(scratch), there, python)
        files = [*_tracked(), *((path, Path("wheels", path.name)) for path in wheels)]
        return pack(folder, [*files, *(stage_files(recipe) if recipe else ())])


def read_packages(text: str) -> dict[str, str | None]:
    """Versions of packages by name, from lines `name==version` or `name @ file`."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:==\s*(\S+)|@)", line)
        if match:
            found[canonical(match[1])] = match[2]
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download_wheels(folder: Path, there: dict[str, str | None], python: str) -> list[Path]:
    """Wheels of what the pieces need and the machine lacks."""
    constraints = folder / "constraints.txt"
    # A build of its own, such as 2.6.0+cu124, goes by its public version.
    constraints.write_text(
        "".join(f"{n}=={v.partition('+')[0]}\n" for n, v in there.items() if v is not None)
    )
    target = ["--only-binary=:all:", "--python-version", python]
    for platform in ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "linux_x86_64"):
        target += ["--platform", platform]
    wanted = ["--dry-run", "--ignore-installed", "--report", "-", f"{ROOT}[{EXTRA}]"]
    report = json.loads(_pip("install", *target, "-c", str(constraints), *wanted))
    lacking = list(_lacking(report, there))
    if lacking:
        _pip("download", *target, "--no-deps", "-d", str(folder), *lacking)
    return sorted(folder.glob("*.whl"))


def _lacking(report: dict[str, Any], there: dict[str, str | None]) -> Iterator[str]:
    for item in report["install"]:
        name, version = (item["metadata"][key] for key in ("name", "version"))
        name = canonical(name)
        if name not in there and name != "stylemaster" and not OF_TORCH.match(name):
            yield f"{name}=={version}"


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = "\n".join(result.stderr.strip().splitlines()[-5:])
        raise ConfigError(f"pip {arguments[0]} found no wheels for that machine:\n{last}")
    return result.stdout


def _tracked() -> list[tuple[Path, Path]]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"{ROOT} is no git checkout, whose files a bundle takes") from error
    places = [Path(name) for name in listed.split("\0") if name]
    return [(ROOT / place, place) for place in places if (ROOT / place).is_file()]
