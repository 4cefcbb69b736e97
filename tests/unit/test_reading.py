"""Damaged files: one place makes our error of a reader's failures; weights have to be numbers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from stylemaster_core.data.pairs import open_pair_folder
from stylemaster_core.errors import ConfigError, DiskError, WeightsError
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.small import draw_weights, write_small_image_encoder
from stylemaster_core.models.style_tokens import Style, load_style, save_style
from stylemaster_core.models.text_encoder import load_text_encoder
from stylemaster_core.pipelines.models import ModelFiles, Models
from stylemaster_core.reading import reading
from stylemaster_core.training.config import read_config
from stylemaster_core.training.run_lock import lock_run
from stylemaster_core.weights.files import read_state_dict
from stylemaster_core.weights.manifest import load_manifest
from stylemaster_core.weights.numbers import check_weights, not_finite
from stylemaster_core.weights.shapes import WanSizes, expected_base_shapes

FLOATS = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def test_a_readers_failure_gets_the_files_name(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"12345")
    for raw in (IndexError("x"), RecursionError(), AttributeError("y" * 10_000), MemoryError()):
        with (
            pytest.raises(WeightsError, match=r"a\.bin \(5 bytes\) cannot be read as a") as caught,
            reading(path, "a thing"),
        ):
            raise raw
        assert type(raw).__name__ in str(caught.value) and len(str(caught.value)) < 1000
        assert caught.value.__cause__ is raw
    with pytest.raises(ConfigError, match=r"a\.bin: no width"), reading(path, "a thing"):
        raise ConfigError("no width")
    with pytest.raises(ImportError), reading(path, "a thing"):
        raise ImportError("a library")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinity_are_found_in_every_dtype(dtype):
    good = torch.linspace(-3, 3, 1000).to(dtype)
    assert not_finite({"a": good, "b": good[:0], "c": good[::2], "d": torch.arange(3)}) == []
    assert not_finite({"a": good.to("meta")}) == []
    values = [float("nan")]
    if dtype != torch.float8_e4m3fn:  # which knows no infinity
        values += [float("inf"), -float("inf")]
    for value in values:
        bad = good.float().clone()
        bad[777] = value
        assert not_finite({"a": good, "b": bad.to(dtype)}) == ["b"]


def test_whole_numbers_are_no_weights():
    check_weights({"a": torch.ones(2), "x.position_ids": torch.arange(3)}, "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors: 1 weights \(b\) of whole numbers"):
        check_weights({"a": torch.ones(2), "b": torch.arange(3)}, "w.safetensors")


@pytest.fixture(scope="module")
def transformer():
    sizes = WanSizes(width=128, ffn_width=8, num_blocks=1, text_width=8, freq_width=8)
    return draw_weights(expected_base_shapes(sizes), 0)


@pytest.mark.parametrize("storage", ["compute", "float8"])
def test_a_model_with_nan_names_its_file_and_the_check_can_be_skipped(
    tmp_path, transformer, storage
):
    path = tmp_path / "broken.safetensors"
    weights = {key: value.clone() for key, value in transformer.items()}
    weights["blocks.0.self_attn.q.weight"][3, 5] = float("inf")
    save_file(weights, path)
    files = ModelFiles(transformer=path)
    models = Models(files, device="cpu", dtype="float32", storage=storage)
    with (
        pytest.raises(WeightsError, match=r"broken\.safetensors: 1 weights \(blocks\.0\.self_attn"),
        models.transformer(),
    ):
        pass
    skipping = Models(files, device="cpu", dtype="float32", check_weights=False)
    with skipping.transformer() as model:
        assert model is not None


def test_a_style_with_nan(tmp_path):
    path = save_style(tmp_path / "s.safetensors", Style(torch.ones(1, 2, 3)))
    file = read_state_dict(path)
    save_file({"style_tokens": torch.full((1, 2, 3), float("nan"))}, path, file.metadata)
    with pytest.raises(WeightsError, match=r"s\.safetensors is no usable style: .* NaN"):
        load_style(path)


def test_what_a_broken_download_of_an_image_encoder_looks_like(tmp_path):
    folder = tmp_path / "encoder"
    write_small_image_encoder(folder, 0)
    load_image_encoder(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for data in (whole[:1000], whole[: len(whole) // 2], b""):
        weights.write_bytes(data)
        with pytest.raises(WeightsError, match="encoder"):
            load_image_encoder(folder)
    weights.write_bytes(whole)
    for text in ("[]", "null", "{}", '{"hidden_size": "x"}', "[" * 60_000, "3"):
        (folder / "config.json").write_text(text)
        with pytest.raises(WeightsError, match="encoder"):
            load_image_encoder(folder)


def test_wrong_types_in_json_files(tmp_path):
    path = tmp_path / "file.json"
    for text in ("[]", "3", '{"files": [3]}', '{"files": {"a": 1}}', "[" * 60_000):
        path.write_text(text)
        with pytest.raises(WeightsError, match=r"file\.json"):
            load_manifest(path)
        with pytest.raises(ConfigError, match=r"file\.json"):
            read_config(path)
    for width in ("[]", "null", '"x"', "1e999", "-1"):
        path.write_text(f'{{"kind": "hashed_words", "seed": 0, "width": {width}}}')
        with pytest.raises((WeightsError, ConfigError), match=r"file\.json"):
            load_text_encoder(path)
    path.write_text(json.dumps({"kind": "x" * 10_000}))
    with pytest.raises(WeightsError, match=r"file\.json") as caught:
        load_text_encoder(path)
    assert len(str(caught.value)) < 1000


def test_a_lock_that_is_a_folder(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(DiskError, match=r"\.lock cannot be"):
        open_pair_folder(tmp_path, {})
    with pytest.raises(DiskError, match=r"\.lock cannot be"):
        lock_run(tmp_path)


def test_a_checkpoint_that_refers_to_itself(tmp_path):
    content: dict[str, object] = {"a": torch.ones(2)}
    content["self"] = content
    torch.save(content, tmp_path / "loop.pt")
    with pytest.raises(WeightsError, match=r"loop\.pt"):
        read_state_dict(tmp_path / "loop.pt")


def test_a_tensor_that_claims_more_than_the_file_holds(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "bomb.pt")
    with pytest.raises(WeightsError, match=r"bomb\.pt: 'a' is no plain tensor"):
        read_state_dict(tmp_path / "bomb.pt")
