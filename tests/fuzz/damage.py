"""Damaged files and malicious pickles: each is refused by our own error, or read for what it is."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from torch import Tensor, nn

from stylemaster_core.errors import StyleMasterError
from tests.fuzz import formats
from tests.fuzz.attack import Endpoint, Kind, require
from tests.fuzz.harm import Harm, apply_harms, harms

LARGEST_BYTES = 1 << 30  # of what a small file may become in memory


def _tensors(found: Any) -> list[Tensor]:
    """All tensors of what a reader returned."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, nn.Module):
        return list(found.state_dict().values())
    if isinstance(found, Mapping):
        return [tensor for value in found.values() for tensor in _tensors(value)]
    if isinstance(found, list | tuple):
        return [tensor for value in found for tensor in _tensors(value)]
    model = getattr(found, "model", None) or getattr(found, "tokens", None)
    return [] if model is None else _tensors(model)


@dataclass(frozen=True)
class Good:
    """A good file or folder, and how to read it."""

    path: Path
    read: Callable[[Path], Any]
    checked: bool  # whether its reader promises finite numbers


def _check(good: Good, harm: list[Harm], folder: Path) -> str:
    target = folder / good.path.name
    shutil.copytree(good.path, target) if good.path.is_dir() else shutil.copy(good.path, target)
    apply_harms(harm, target)
    return _read(good, target, folder)


def _read(good: Good, target: Path, folder: Path) -> str:
    before = {path for path in folder.rglob("*") if path.name != ".lock"}
    try:
        found = good.read(target)
    except StyleMasterError as error:
        require(target.name in str(error), f"the file is not named: {error}")
        require(len(str(error)) < 4000, f"a message of {len(str(error))} characters")
        outcome = "refused"
    else:
        outcome = "accepted"
        tensors = _tensors(found)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        require(size < LARGEST_BYTES, f"{size:,} bytes of tensors")
        if good.checked:
            bad = [t for t in tensors if t.is_floating_point() and not t.float().isfinite().all()]
            require(not bad, "accepted with NaN or infinity")
    after = {path for path in folder.rglob("*") if path.name != ".lock"}
    require(after <= before, f"the reader made {sorted(after - before)}")
    return outcome


def _endpoint(format_: formats.Format) -> Endpoint:
    def prepare(folder: Path) -> Good:
        good = Good(format_.make(folder), format_.read, format_.checked)
        good.read(good.path)  # or the cases would show nothing
        return good

    return Endpoint(harms(*format_.ways), _check, prepare)


KIND = Kind(
    "damage",
    {name: _endpoint(format_) for name, format_ in formats.FORMATS.items()},
    long_cases=5000,
)


class _Call:
    """Pickled, a call of any function by its name."""

    def __init__(self, module: str, name: str, arguments: tuple[Any, ...]) -> None:
        self.module, self.name, self.arguments = module, name, arguments


def _attack(call: _Call, form: str, nested: bool, protocol: int) -> bytes:
    """A checkpoint that calls a function when it is read."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol)
    # Written by hand: pickling the function itself would write where it really lives.
    pickler.dump(call.arguments)
    arguments = stream.getvalue().rstrip(b".")
    head = b"\x80" + bytes([protocol])
    body = arguments[2:] if arguments.startswith(b"\x80") else arguments
    words = f"c{call.module}\n{call.name}\n".encode()
    payload = head + words + body + b"R"
    payload = head + b"}X\x01\x00\x00\x00a" + payload[2:] + b"s." if nested else payload + b"."
    if form == "raw":
        return payload
    if form == "legacy":  # magic number, protocol and system come first
        parts = [
            pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        ]
        return b"".join(parts) + payload
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("archive/data.pkl", payload)
        written.writestr("archive/version", "3\n")
        written.writestr("archive/byteorder", "little")
    return archive.getvalue()


MARK = "executed"
CALLS = {
    "os.system": ("os", "system", "touch {mark}"),
    "posix.system": ("posix", "system", "touch {mark}"),
    "subprocess.getoutput": ("subprocess", "getoutput", "touch {mark}"),
    "builtins.exec": ("builtins", "exec", "open({mark!r}, 'w')"),
    "builtins.eval": ("builtins", "eval", "open({mark!r}, 'w')"),
    "builtins.open": ("builtins", "open", "{mark}"),
    "pathlib.Path.touch": ("pathlib", "Path.touch", "{mark}"),
    "runpy": ("runpy", "run_path", "{mark}"),
    "torch.load": ("torch", "load", "{mark}"),
    "torch.hub": ("torch.hub", "load", "{mark}"),
    "numpy.load": ("numpy", "load", "{mark}"),
    "timeit": ("timeit", "timeit", "open({mark!r}, 'w')"),
    "webbrowser": ("webbrowser", "open", "file://{mark}"),
    "getattr": ("builtins", "getattr", "{mark}"),
    "sys.exit": ("sys", "exit", "{mark}"),
    "os._exit": ("os", "_exit", "{mark}"),
}
PICKLED = st.tuples(
    st.sampled_from(sorted(CALLS)),
    st.sampled_from(["raw", "legacy", "zip"]),
    st.booleans(),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([".ckpt", ".pt", ".bin", ".pth", ".safetensors"]),
)


def _check_pickle(read: Callable[[Path], Any], drawn: tuple[Any, ...], folder: Path) -> str:
    name, form, nested, protocol, ending = drawn
    mark = folder / MARK
    module, function, text = CALLS[name]
    call = _Call(module, function, (text.format(mark=str(mark)),))
    path = folder / f"weights{ending}"
    path.write_bytes(_attack(call, form, nested, protocol))
    good = Good(path, read, checked=False)
    outcome = _read(good, path, folder)
    require(not mark.exists(), f"{name} was executed")
    require(outcome == "refused", f"{name} was accepted")
    return outcome


PICKLES = Kind(
    "pickles",
    {
        name: Endpoint(PICKLED, _check_pickle, lambda folder, read=read: read)
        for name, read in formats.CHECKPOINT_READERS.items()
    },
    long_cases=1600,
)
