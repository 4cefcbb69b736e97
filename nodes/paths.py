"""Files that a workflow may name: only those inside ComfyUI's own folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import folder_paths

from ..stylemaster_core.errors import ConfigError, WeightsError
from ..stylemaster_core.file_names import check_name
from ..stylemaster_core.weights.manifest import how_to_get

ADAPTERS = "stylemaster"
STYLECRAFTER = "stylecrafter"
STYLES = "stylemaster_styles"
STYLES_SUBFOLDER = "styles"

LINKED = "(linked)"  # in the place of a file's name: another node gives it

_MAX_RACES = 100
_SEPARATORS = re.compile(r"[/\\]")


def register_folders() -> None:
    """Make models/stylemaster, its `styles` and models/stylecrafter known to ComfyUI.

    A `.ckpt` is listed so that its loader can tell how to convert it.
    """
    root = os.path.join(folder_paths.models_dir, ADAPTERS)
    _register(ADAPTERS, root, {".safetensors", ".ckpt"})
    stylecrafter = os.path.join(folder_paths.models_dir, STYLECRAFTER)
    _register(STYLECRAFTER, stylecrafter, {".safetensors", ".ckpt"})
    _register(STYLES, os.path.join(root, STYLES_SUBFOLDER), {".safetensors"})


def _register(name: str, folder: str, endings: set[str]) -> None:
    folder_paths.add_model_folder_path(name, folder)
    # ComfyUI lists every file of a folder that was added without endings.
    folders, _ = folder_paths.folder_names_and_paths[name]
    folder_paths.folder_names_and_paths[name] = (folders, endings)


def model_names(*categories: str) -> list[str]:
    """Names of the files in these model folders, saved styles left out of the adapters."""
    names = dict.fromkeys(
        name for category in categories for name in folder_paths.get_filename_list(category)
    )
    return [name for name in names if _SEPARATORS.split(name)[0] != STYLES_SUBFOLDER]


def names_or_link(*categories: str) -> list[str]:
    """Names of the files in these model folders, and the choice to link one instead."""
    return [*model_names(*categories), LINKED]


def check_named(name: str, socket: str) -> None:
    """Check that a file was chosen, where nothing is linked.

    Raises:
        ConfigError: otherwise.
    """
    if name == LINKED:
        raise ConfigError(
            f"{LINKED} was chosen, but nothing is linked to {socket}; link it (Load StyleMaster "
            "Tiny gives one), or choose a file"
        )


def model_file(name: str, *categories: str) -> Path:
    """The file of this name in one of these model folders; the first one counts.

    Raises:
        ConfigError: if the name leads out of them.
        WeightsError: if there is no such file.
    """
    folders = [f for category in categories for f in folder_paths.get_folder_paths(category)]
    path = find_inside(name, folders)
    if path is None or not path.is_file():
        places = ", ".join(folders)
        raise WeightsError(f"there is no file {name!r} in {places}. {how_to_get(Path(name).name)}")
    return path


def fingerprint(path: Path) -> str:
    """Changes whenever the file does: size and time of the last change."""
    stat = path.stat()
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def named_fingerprint(name: str, *categories: str) -> str:
    """Fingerprint of the chosen file; what is linked instead has one of its own."""
    return LINKED if name == LINKED else fingerprint(model_file(name, *categories))


def find_inside(name: str, folders: Iterable[str | Path]) -> Path | None:
    """Resolve a name inside one of some folders.

    Args:
        name: relative path with either separator.
        folders: which to look in, in this order; they themselves may be links.

    Returns:
        The real path of an existing file or folder; None if none of them holds it.

    Raises:
        ConfigError: if the name is absolute, climbs up, names a drive, or is a link that leads out.
    """
    parts = check_name(name)
    roots = [Path(os.path.realpath(folder)) for folder in folders]
    for root in roots:
        path = Path(os.path.realpath(root.joinpath(*parts)))
        if not any(path == other or other in path.parents for other in roots):
            raise ConfigError(
                f"{name!r} is a link that leads out of ComfyUI's folders; put the file itself "
                "there, or name its folder in extra_model_paths.yaml"
            )
        if path.exists():
            return path
    return None


def new_inside(root: Path, name: str) -> Path:
    """Real path of a file or folder to be made below a folder; nothing is made yet.

    Args:
        root: which it is to be in, a real path.
        name: relative path with either separator.

    Raises:
        ConfigError: if the name is refused (`check_name`), leads out through a link, or leads
            through a file.
    """
    path = Path(os.path.realpath(root.joinpath(*check_name(name, new=True))))
    if root not in path.parents:
        raise ConfigError(f"{name!r} is a link that leads out of {root}; choose another name")
    for folder in path.relative_to(root).parents:
        if os.path.lexists(root / folder) and not (root / folder).is_dir():
            raise ConfigError(f"{name!r} leads through a file, {folder}; choose another name")
    return path


def check_choice(value: str, choices: Collection[str], socket: str) -> None:
    """Check a value of a list: ComfyUI checks those that are chosen, not those that are linked.

    Raises:
        ConfigError: if it is not in the list.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{socket} is {value!r:.80}; expected one of {', '.join(choices)}")


def save_numbered(prefix: str, save: Callable[[Path], Path]) -> Path:
    """Save a style under the next number, or the one after it where somebody else was faster.

    Args:
        prefix: as `new_style_file`.
        save: writes to a path, over nothing, and returns it.

    Raises:
        ConfigError: as `new_style_file`.
        WeightsError: if it cannot be saved.
    """
    for _ in range(_MAX_RACES):
        path = new_style_file(prefix)
        try:
            return save(path)
        except WeightsError:
            if not os.path.lexists(path):
                raise
    raise WeightsError(f"{prefix!r}: others take each next number first; choose another name")


def new_style_file(prefix: str) -> Path:
    """A free path `<prefix>_00001_.safetensors` in the folder of styles.

    Raises:
        ConfigError: if the prefix leads out of it.
    """
    root = Path(os.path.realpath(folder_paths.get_folder_paths(STYLES)[0]))
    # Looked at before ComfyUI's function is called: that one makes the folders.
    path = new_inside(root, prefix)
    prefix = path.relative_to(root).as_posix()
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(root))
    return Path(folder) / f"{name}_{counter:05}_.safetensors"
