"""A cache of encoded samples: safetensors shards, and a manifest that says what made them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError, WeightsError
from ..reading import reading
from ..weights.files import read_state_dict, sha256_of
from .jsonl import read_json

FORMAT = "stylemaster-cache-1"
MANIFEST = "manifest.json"
NULL_TEXT = "null_text"  # tensor, and stem of its file
_AGAIN = "encode the same dataset again"
CacheKind = Literal["samples", "pairs"]
Shape = tuple[int, ...]


class CachedDataset(Dataset[dict[str, Tensor]]):
    """The samples of a cache.

    Of kind "samples", each is `latents` [16, t, h, w], `text` [L, D], `patch_features` [257, C],
    `image_embeds` [E], `shuffled_embeds` [E] and perhaps `control_latents` like `latents`; of kind
    "pairs", `first_embeds` [E] and `second_embeds` [E]. Shards are mapped into memory on first use,
    in every process anew.

    Attributes:
        ids: names of the samples.
        groups: for pairs, what each one's style is called; samples of one group are alike.
        hashes: SHA-256 of the model files that made the cache, by the model's name.
        settings: with which it was made.
        null_text: [L, D] features of the empty prompt; None for pairs, and in a cache of an earlier
            version of this software (encode again: it adds them).
        sizes: shape of each sample's `latents` (of pairs, of `first_embeds`).
        buckets: size to the numbers of the samples that have it.
        shapes: of each tensor of a sample; None where samples differ (the text's length).
    """

    def __init__(self, path: str | Path, *, kind: str = "samples", bucket: bool = False) -> None:
        """Open a cache.

        Args:
            path: its folder.
            kind: "samples" or "pairs".
            bucket: allow samples of several sizes; batches are then to be drawn from one of
                `buckets` each.

        Raises:
            ConfigError: if there is no finished cache of this kind, it is empty, a shard is missing
                or has another length, only some samples have control latents, or sizes are mixed
                and `bucket` is false.
        """
        self.path = Path(path)
        with reading(self.path, "a cache", error=ConfigError, advice=_AGAIN):
            self._open_cache(kind, bucket)

    def _open_cache(self, kind: str, bucket: bool) -> None:
        path = self.path
        manifest = read_manifest(self.path)
        if manifest["kind"] != kind:
            raise ConfigError(f"{path} is a cache of {manifest['kind']}; expected one of {kind}")
        if not manifest["complete"]:
            raise ConfigError(f"{path} is unfinished; encode the same dataset again")
        self.hashes: dict[str, str] = manifest["hashes"]
        self.settings: dict[str, Any] = manifest["settings"]
        self.null_text = _read_null_text(self.path, manifest)
        self.ids: list[str] = []
        self.groups: list[str] = []
        self._places: list[tuple[int, int]] = []
        self._keys: list[tuple[str, ...]] = []
        shapes: list[dict[str, Shape]] = []
        for record in manifest["shards"]:
            self._check_file(record)
            shard, samples = record["shard"], record["samples"]
            self.ids += [sample["id"] for sample in samples]
            self.groups += [sample["group"] for sample in samples]
            self._places += [(shard, position) for position in range(len(samples))]
            own = [sample["shapes"] for sample in samples]
            self._keys += map(tuple, own)
            shapes += [{key: tuple(value) for key, value in each.items()} for each in own]
        if not self.ids:
            raise ConfigError(f"{path} holds no sample, all were bad (bad.jsonl says why)")
        self._check_keys()
        main = "latents" if kind == "samples" else "first_embeds"
        self.sizes = [each[main] for each in shapes]
        self.buckets: dict[Shape, list[int]] = {}
        for index, size in enumerate(self.sizes):
            self.buckets.setdefault(size, []).append(index)
        if len(self.buckets) > 1 and not bucket:
            counts = ", ".join(f"{list(size)}: {len(own)}" for size, own in self.buckets.items())
            raise ConfigError(
                f"{path} holds latents of mixed sizes ({counts} samples); encode with one size, "
                "or train in buckets"
            )
        self.shapes = {key: _common([each[key] for each in shapes]) for key in shapes[0]}
        self._files: dict[int, Callable[[str], Tensor]] = {}  # readers of single tensors

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        shard, position = self._places[index]
        get_tensor = self._files.get(shard) or self._open(shard)
        try:
            return {key: get_tensor(tensor_key(position, key)) for key in self._keys[index]}
        except Exception:
            with self._reading(shard):  # only now, as every step of a training comes by here
                raise

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def require(self, *names: str) -> None:
        """Check that every sample holds these tensors.

        Raises:
            ConfigError: if not.
        """
        if missing := [name for name in names if name not in self.shapes]:
            raise ConfigError(
                f"the cache {self.path} holds {', '.join(self.shapes)}, and no "
                f"{', '.join(missing)}; encode again (control_latents: with gray tiles)"
            )

    def check_encoders(self, files: Mapping[str, Path]) -> None:
        """Check that the cache was made with these models.

        Args:
            files: by their names in `hashes`: vae, text_encoder, image_encoder; those that matter.

        Raises:
            ConfigError: if one differs, or is unknown to the cache.
        """
        self.check_hashes(hash_models(files))

    def check_hashes(self, hashes: Mapping[str, str]) -> None:
        """As `check_encoders`, with hashes; for instance those of another cache."""
        if wrong := [name for name, value in hashes.items() if self.hashes.get(name) != value]:
            names = ", ".join(name.replace("_", " ") for name in wrong)
            raise ConfigError(
                f"the cache {self.path} was made with another {names} (the SHA-256 differ); use "
                "that model, or encode the data again"
            )

    def _open(self, shard: int) -> Callable[[str], Tensor]:
        from safetensors import safe_open

        with self._reading(shard):
            file = safe_open(str(shard_path(self.path, shard)), framework="pt")
            return self._files.setdefault(shard, file.get_tensor)

    def _reading(self, shard: int) -> reading:
        path = shard_path(self.path, shard)
        return reading(path, "a shard of a cache", error=ConfigError, advice=_AGAIN)

    def _check_file(self, record: Mapping[str, Any]) -> None:
        path = shard_path(self.path, record["shard"])
        if not record["samples"]:
            return
        try:
            size = path.stat().st_size
        except OSError:
            size = None
        if size != record["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes, not {record['bytes']}"
            raise ConfigError(f"the shard {path} {state}; encode the same dataset again")

    def _check_keys(self) -> None:
        counts = Counter(self._keys)
        if len(counts) > 1:
            said = ", ".join(f"{count} with {' '.join(keys)}" for keys, count in counts.items())
            raise ConfigError(
                f"the samples of {self.path} hold different tensors ({said}); encode with gray "
                "tiles, or without the samples that have no tile"
            )


def hash_models(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of model files; of a folder, over the names and hashes of its files.

    Raises:
        WeightsError: if one is missing.
    """
    return {name: _hash_model(Path(path), name) for name, path in files.items()}


def check_cache(folder: Path, on_shard: Callable[[int, int], None] | None = None) -> list[str]:
    """Compare every shard with its SHA-256.

    Args:
        folder: of a cache.
        on_shard: called with the number of shards looked at, and of all.

    Returns:
        What is wrong, a sentence each; empty if nothing is.

    Raises:
        ConfigError: if the folder holds no cache.
    """
    manifest = read_manifest(folder)
    problems = []
    if not manifest["complete"]:
        problems.append(f"{folder} is unfinished; encode the same dataset again")
    if NULL_TEXT in manifest and (problem := null_text_problem(folder, manifest)):
        problems.append(problem)
    for number, record in enumerate(manifest["shards"], start=1):
        if problem := shard_problem(folder, record):
            problems.append(problem)
        if on_shard is not None:
            on_shard(number, len(manifest["shards"]))
    return problems


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a cache.

    Raises:
        ConfigError: if the folder holds none, or one of another format.
    """
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} holds no {MANIFEST}; encode a dataset there")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigError(f"{folder / MANIFEST} is no manifest of the format {FORMAT}; encode anew")
    if problem := _manifest_problem(manifest):
        raise ConfigError(f"{folder / MANIFEST} is damaged: {problem}; encode anew")
    return manifest


def _manifest_problem(manifest: Mapping[str, Any]) -> str | None:
    types = {"kind": str, "complete": bool, "hashes": dict, "settings": dict, "shards": list}
    wrong = [name for name, kind in types.items() if not isinstance(manifest.get(name), kind)]
    if not isinstance(manifest.get(NULL_TEXT, {}), dict):
        wrong.append(NULL_TEXT)
    if wrong:
        return f"{', '.join(wrong)} missing or of another type than expected"
    problems = (record_problem(record) for record in manifest["shards"])
    return next((f"shards: {problem}" for problem in problems if problem), None)


def record_problem(record: Any) -> str | None:
    """Say what is wrong with the record of a shard; None if it has the form of one."""
    if not isinstance(record, dict):
        return "no record of a shard"
    types: dict[str, type] = {"shard": int, "fingerprint": str, "samples": list}
    if record.get("samples"):
        types |= {"bytes": int, "sha256": str}
    wrong = [name for name, kind in types.items() if not isinstance(record.get(name), kind)]
    if wrong or record["shard"] < 0 or not isinstance(record.get("bad", []), list):
        return f"no record of a shard ({', '.join(wrong) or 'shard, bad'} cannot be)"
    for sample in record["samples"]:
        if (
            not isinstance(sample, dict)
            or not isinstance(sample.get("id"), str)
            or not isinstance(sample.get("group"), str)
            or not _are_shapes(sample.get("shapes"))
        ):
            return f"a sample without id, group or shapes: {sample!r:.80}"
    return None


def _are_shapes(shapes: Any) -> bool:
    # Loops, as a cache has very many: generators take three times as long.
    if not isinstance(shapes, dict):
        return False
    for shape in shapes.values():
        if not isinstance(shape, list):
            return False
        for size in shape:
            if type(size) is not int or size < 0:
                return False
    return True


def shard_problem(folder: Path, record: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a shard's file; None if it is as it was written."""
    if not record["samples"]:
        return None
    path = shard_path(folder, record["shard"])
    if not path.is_file():
        return f"the shard {path} is missing"
    if path.stat().st_size != record["bytes"]:
        return f"the shard {path} has {path.stat().st_size} bytes, not {record['bytes']}"
    if sha256_of(path) != record["sha256"]:
        return f"the shard {path} is damaged (its SHA-256 differs)"
    return None


def null_text_path(folder: Path) -> Path:
    """Where the features of the empty prompt are."""
    return folder / f"{NULL_TEXT}.safetensors"


def null_text_problem(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the features of the empty prompt; None if they are as written."""
    path = null_text_path(folder)
    if not path.is_file():
        return f"{path} is missing; encode the same dataset again"
    record = manifest.get(NULL_TEXT)
    if record is not None and sha256_of(path) != record["sha256"]:
        return f"{path} is damaged (its SHA-256 differs); encode the same dataset again"
    return None


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard's file is."""
    return folder / f"shard_{index:05d}.safetensors"


def tensor_key(position: int, name: str) -> str:
    """What the tensor of the sample at a position in its shard is called there."""
    return f"{position:05d}.{name}"


def _read_null_text(folder: Path, manifest: Mapping[str, Any]) -> Tensor | None:
    if NULL_TEXT not in manifest:
        return None
    if problem := null_text_problem(folder, manifest):
        raise ConfigError(problem)
    return read_state_dict(null_text_path(folder)).tensors[NULL_TEXT]


def _common(shapes: list[Shape]) -> tuple[int | None, ...]:
    unique = zip(*dict.fromkeys(shapes), strict=True)
    return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in unique)


def _hash_model(path: Path, name: str) -> str:
    if not path.is_dir():
        return sha256_of(path)
    # Where loaders look, too: a whole repository holds other models beside this one.
    folder = path / name if (path / name).is_dir() else path
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in (".safetensors", ".bin", ".json", ".model")
    )
    if not files:
        raise WeightsError(f"{folder} holds no weights")
    parts = [f"{file.relative_to(folder).as_posix()} {sha256_of(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
