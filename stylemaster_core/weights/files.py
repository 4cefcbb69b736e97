"""Reading and writing weight files, told apart by their content and not by their name."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, DiskError, WeightsError
from ..reading import reading
from ..writing import written_beside
from .int8_rows import SCALE, scale_keys, unpack_rows
from .manifest import how_to_get

logger = logging.getLogger("stylemaster")

# Called with the bytes done so far and the bytes in all (None where that is unknown).
Progress = Callable[[int, "int | None"], None]

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_PICKLE_MAGIC = b"\x80"
_CHUNK_BYTES = 1 << 20

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StateDictFile(NamedTuple):
    """Content of a weight file."""

    tensors: dict[str, Tensor]  # on the CPU, as stored
    metadata: dict[str, str]  # a safetensors header's strings, or the plain values of a checkpoint


def read_state_dict(path: str | os.PathLike[str]) -> StateDictFile:
    """Read a `.safetensors` file or a PyTorch checkpoint (`.ckpt`, `.pt`, `.pth`, `.bin`).

    A checkpoint is read with `weights_only=True`, so that it cannot run code. Its outer
    "state_dict" is unwrapped and nested dictionaries are flattened to dotted keys. Tensors of a
    zip checkpoint are memory-mapped: keep the file while they are in use.

    Args:
        path: the weight file; its content decides the format.

    Returns:
        Tensors on the CPU in their stored dtype (8-bit rows, as `pack_rows` stores them, in
        float16), and metadata.

    Raises:
        WeightsError: if the file is missing, truncated, of another kind, or holds code.
    """
    path = _existing(path)
    with reading(path, "a weight file"):
        if _format_of(path) == "safetensors":
            with _open_safetensors(path) as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return StateDictFile(unpack_rows(tensors), dict(file.metadata() or {}))
        return _flatten_checkpoint(_load_checkpoint(path), path)


def read_keys(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Read names, shapes and dtypes; of a safetensors file only the header is read.

    Args:
        path: the weight file.

    Returns:
        Key to (shape, dtype).

    Raises:
        WeightsError: as `read_state_dict`.
    """
    path = _existing(path)
    with reading(path, "a weight file"):
        if _format_of(path) == "safetensors":
            return _read_header(path)
    tensors = read_state_dict(path).tensors
    return {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    keys: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    with _open_safetensors(path) as file:
        for key in file.keys():  # noqa: SIM118
            view = file.get_slice(key)
            dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
            if dtype is None:
                raise WeightsError(
                    f"{path}: tensor {key!r} has the dtype {view.get_dtype()}, which this version "
                    f"does not know. Use a file in {', '.join(_SAFETENSORS_DTYPES)}."
                )
            keys[key] = (tuple(view.get_shape()), dtype)
    for name in scale_keys(keys):
        del keys[name]
        key = name.removesuffix(SCALE)
        if key in keys:
            keys[key] = (keys[key][0], torch.float16)
    return keys


def shards_of(path: str | os.PathLike[str], wanted: str) -> list[Path]:
    """The files that hold a model: the one given, or the safetensors of a folder of diffusers'.

    Args:
        path: file, or folder with or without a subfolder "transformer".
        wanted: what was expected, for the error.

    Raises:
        WeightsError: if a folder has none.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(
            f"{path} holds no .safetensors files; expected {wanted} (a file, or a folder in "
            "diffusers' format)"
        )
    return files


def write_state_dict(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a safetensors file beside its place, then rename it into place.

    Args:
        path: where to write; missing folders are made.
        tensors: what to write, any device and layout.
        metadata: strings for the header.
        overwrite: replace an existing file.

    Returns:
        The path written.

    Raises:
        WeightsError: if the file exists and `overwrite` is False, if a metadata value is not a
            string, or if the disk cannot take the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    for key, value in (metadata or {}).items():
        if not isinstance(value, str):
            raise WeightsError(
                f"Metadata {key!r} is {type(value).__name__}; a safetensors header holds only "
                "strings. Convert it with str() or json.dumps()."
            )
    try:
        with written_beside(path, overwrite=overwrite) as part:
            try:
                # Without tensors safetensors 0.8 writes empty metadata as what it cannot read.
                save_file(_storable(tensors), str(part), metadata=dict(metadata or {}) or None)
            except SafetensorError as error:  # a full disk is one of them
                raise DiskError(
                    f"{path} cannot be written: {error}; check free space and permissions of "
                    f"{path.parent}"
                ) from error
    except (ConfigError, DiskError) as error:
        raise WeightsError(str(error)) from error
    return path


def sha256_of(path: str | os.PathLike[str], progress: Progress | None = None) -> str:
    """SHA-256 of a file in lower-case hexadecimal digits.

    Args:
        path: the file.
        progress: called with (bytes done, bytes in all) after each piece.

    Returns:
        64 hexadecimal digits.

    Raises:
        WeightsError: if the file is missing.
    """
    path = _existing(path)
    total = path.stat().st_size
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


def find_weight_file(name: str, folders: Iterable[str | os.PathLike[str]]) -> Path:
    """Look for a weight file in folders and in their sub-folders.

    Args:
        name: file name, optionally with a sub-folder ("wan/base.safetensors").
        folders: where to look, in this order; the first hit wins.

    Returns:
        Path of the file.

    Raises:
        WeightsError: if it is in none of the folders, or if `name` leads out of them.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise WeightsError(
            f"{name!r} leads out of the model folders. Give a file name, optionally with a "
            "sub-folder, and put the file into one of the model folders."
        )
    looked_in = [Path(folder) for folder in folders]
    for folder in looked_in:
        if (folder / name).is_file():
            return folder / name
        for candidate in sorted(folder.rglob(glob.escape(name))):
            if candidate.is_file():
                return candidate
    places = "".join(f"\n  {folder}" for folder in looked_in) or "\n  (no folder was given)"
    raise WeightsError(f"{name} was not found. Looked in:{places}\n{how_to_get(Path(name).name)}")


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; a weight file was expected.")
    raise WeightsError(f"{path} does not exist.\n{how_to_get(path.name)}")


def _format_of(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(64)
    if head.startswith(_ZIP_MAGIC):
        return "zip"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head.startswith(_LEGACY_PICKLE_MAGIC):
        return "pickle"
    if head.startswith(b"GGUF"):
        raise WeightsError(
            f"{path} is a GGUF file, a format of quantised weights that is not read here. In "
            "ComfyUI load it with Unet Loader (GGUF) of the pack ComfyUI-GGUF and link its MODEL "
            "to Apply Style; on the command line give the model's .safetensors file."
        )
    if head.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer; the file itself was never fetched (run `git lfs pull`)"
    elif head.lstrip().startswith(b"<"):
        found = "a web page; the download needs a login or an accepted licence, or the link is dead"
    else:
        found = "neither a safetensors file nor a PyTorch checkpoint, or it is cut off at the start"
    raise WeightsError(f"{path} ({size:,} bytes) is {found}. Delete it and download it again.")


def _open_safetensors(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(str(path), framework="pt")


def _load_checkpoint(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors" or _format_of(path) != "zip":
            # Newer PyTorch goes by the name here, and only zip checkpoints can be mapped.
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) was refused: it is damaged, or it holds "
            "Python objects beside tensors, and reading those could run code from the file. "
            f"Use a file of plain tensors, best a .safetensors file. Reader's words: {error}"
        ) from error


def _flatten_checkpoint(content: Any, path: Path) -> StateDictFile:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        metadata = {
            str(key): str(value)
            for key, value in content.items()
            if isinstance(value, str | int | float)
        }
        content = content["state_dict"]
    else:
        metadata = {}
    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    size = path.stat().st_size

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, Tensor):
                _check_stored(name, value, path, size)
                tensors[name] = value.detach()
            elif isinstance(value, Mapping):
                walk(value, f"{name}.")
            elif isinstance(value, str | int | float):
                metadata[name] = str(value)
            else:
                left_out.append(name)

    if isinstance(content, Mapping):
        walk(content, "")
    if not tensors:
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) holds no named tensors but "
            f"{type(content).__name__}; a state dict (name to tensor) was expected."
        )
    if left_out:
        logger.warning("%s: left out entries that are no tensors: %s", path, left_out[:10])
    return StateDictFile(tensors, metadata)


def _check_stored(name: str, value: Tensor, path: Path, size: int) -> None:
    """Refuse a tensor that is no plain array, or claims more numbers than the file holds.

    One number with strides of 0 can stand for any size, and fills the memory once it is used.
    """
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.numel() * value.element_size() > max(4 * size, 1 << 20):
        raise WeightsError(
            f"{path}: {name!r} is no plain tensor of the file's own numbers ({value.layout}, "
            f"{list(value.shape)}); use a file of plain tensors, best a .safetensors file"
        )


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors demands."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in tensors.items():
        stored = value.detach().cpu().contiguous()
        address = stored.untyped_storage().data_ptr()
        if address in seen and stored.numel():
            stored = stored.clone()
        seen.add(stored.untyped_storage().data_ptr())
        result[key] = stored
    return result
