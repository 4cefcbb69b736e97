"""From checkpoints to the files that nodes load, on a small model with the release's structure."""

import hashlib
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stylemaster_core.cli import main
from stylemaster_core.errors import ConfigError, WeightsError
from stylemaster_core.weights.convert import convert
from stylemaster_core.weights.files import read_state_dict
from stylemaster_core.weights.shapes import (
    AdapterSizes,
    ControlNetSizes,
    expected_adapter_shapes,
    expected_controlnet_shapes,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "stylemaster" / "weights_dit_a.safetensors"


@pytest.fixture(scope="module")
def release():
    return load_file(GOLDEN)


@pytest.fixture
def checkpoint(tmp_path, release):
    path = tmp_path / "stylemaster.ckpt"
    torch.save({"state_dict": {f"diffusion_model.{k}": v for k, v in release.items()}}, path)
    return path


@pytest.fixture
def controlnet(tmp_path):
    sizes = ControlNetSizes(width=8, ffn_width=12, num_blocks=2, text_width=10, freq_width=4)
    tensors = {key: torch.rand(shape) for key, shape in expected_controlnet_shapes(sizes).items()}
    path = tmp_path / "controlnet.ckpt"
    torch.save(tensors, path)
    return path


def small_adapter(**sizes):
    shapes = expected_adapter_shapes(
        AdapterSizes(
            **({"width": 8, "num_blocks": 2, "style_width": 6, "patch_width": 4} | sizes),
            num_layers=1,
            global_width=5,
        )
    )
    return {key: torch.rand(shape) for key, shape in shapes.items()}


def is_adapter_key(key):
    return key.startswith("style_model.") or "_img." in key


def test_release_to_adapter(tmp_path, checkpoint, release):
    paths = convert(checkpoint, tmp_path / "out")
    assert paths == [tmp_path / "out" / "stylemaster_adapter.safetensors"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["stylemaster_adapter.safetensors"]
    content = read_state_dict(paths[0])
    assert content.metadata == {
        "format": "stylemaster-adapter-1",
        "base_model": "custom",
        "num_blocks": "3",
        "source_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "source_name": "stylemaster.ckpt",
    }
    expected = {key: value for key, value in release.items() if is_adapter_key(key)}
    assert set(content.tensors) == set(expected) and len(expected) == 46 + 5 * 3
    for key, value in content.tensors.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[key])


def test_release_with_base(tmp_path, checkpoint, release):
    adapter, base = convert(checkpoint, tmp_path, include_base=True, dtype=torch.float32)
    assert base.name == "stylemaster_base.safetensors"
    tensors, metadata = read_state_dict(base)
    assert metadata["format"] == "stylemaster-base-1" and metadata["num_blocks"] == "3"
    parts = read_state_dict(adapter).tensors | tensors
    assert set(parts) == set(release)
    for key, value in parts.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, release[key].float())


def test_an_adapter_is_normalised(tmp_path, checkpoint):
    first = convert(checkpoint, tmp_path / "one")[0]
    again = convert(first, tmp_path / "two")[0]
    assert again.name == first.name
    one, two = read_state_dict(first), read_state_dict(again)
    assert set(one.tensors) == set(two.tensors)
    assert two.metadata["source_name"] == first.name
    torch.save(one.tensors, tmp_path / "mine.pt")
    assert convert(tmp_path / "mine.pt", tmp_path)[0].name == "mine_adapter.safetensors"


def test_controlnet(tmp_path, controlnet):
    (path,) = convert(controlnet, tmp_path)
    assert path.name == "controlnet.safetensors"
    tensors, metadata = read_state_dict(path)
    assert metadata["format"] == "stylemaster-gray-tile-controlnet-1"
    assert metadata["base_model"] == "custom" and metadata["num_blocks"] == "2"
    source = read_state_dict(controlnet).tensors
    assert set(tensors) == set(source)
    assert all(torch.equal(tensors[key], source[key]) for key in source)


def test_the_real_size_is_recognised(tmp_path, monkeypatch):
    from stylemaster_core.weights import convert as module

    tensors = {
        key: torch.empty(shape, device="meta") for key, shape in expected_adapter_shapes().items()
    }
    for key, value in tensors.items():
        if "norm_k_img" in key:
            tensors[key] = torch.ones(value.shape)
    metadata = module._adapter_metadata(tensors, Path("stylemaster.ckpt"))
    assert metadata["base_model"] == "wan2.1-t2v-1.3b" and metadata["num_blocks"] == "30"
    shapes = expected_controlnet_shapes()
    assert module._controlnet_metadata(shapes, Path("x"))["base_model"] == "wan2.1-t2v-1.3b"


def test_a_dead_style_path_is_reported(tmp_path, checkpoint, release, caplog):
    with caplog.at_level(logging.INFO, logger="stylemaster"):
        convert(checkpoint, tmp_path / "alive")
    assert "works in all 3 blocks" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    dead = {k: v * 0 if "norm_k_img" in k else v for k, v in release.items()}
    torch.save(dead, checkpoint)
    with caplog.at_level(logging.WARNING, logger="stylemaster"):
        convert(checkpoint, tmp_path / "dead")
    assert "style attention is uniform" in caplog.text


def test_nothing_is_overwritten_and_no_first_file_is_left(tmp_path, checkpoint):
    (tmp_path / "stylemaster_base.safetensors").write_text("precious")
    with pytest.raises(WeightsError, match="stylemaster_base.safetensors exists"):
        convert(checkpoint, tmp_path, include_base=True)
    assert (tmp_path / "stylemaster_base.safetensors").read_text() == "precious"
    assert not (tmp_path / "stylemaster_adapter.safetensors").exists()
    assert len(convert(checkpoint, tmp_path, include_base=True, overwrite=True)) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("style_model.ln1.weight"), "1 missing: style_model.ln1.weight"),
        (lambda t: t.pop("blocks.1.ffn.0.bias"), "1 missing: blocks.1.ffn.0.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "1 unexpected: extra"),
        (
            lambda t: t.update({"style_model.norm.bias": torch.ones(3)}),
            "1 of another shape: style_model.norm.bias",
        ),
    ],
)
def test_a_release_that_is_not_whole_is_refused(tmp_path, release, change, words):
    tensors = dict(release)
    change(tensors)
    torch.save(tensors, tmp_path / "broken.ckpt")
    with pytest.raises(WeightsError, match=words):
        convert(tmp_path / "broken.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_strangers_is_refused(tmp_path):
    torch.save(small_adapter() | {"stranger": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="1 unexpected: stranger"):
        convert(tmp_path / "x.pt", tmp_path)


def test_other_files_are_called_what_they_are(tmp_path):
    torch.save({"vision_model.embeddings.class_embedding": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="CLIP image encoder"):
        convert(tmp_path / "x.pt", tmp_path)


def test_options_that_cannot_work(tmp_path, checkpoint, controlnet):
    with pytest.raises(ConfigError, match="floating point"):
        convert(checkpoint, tmp_path, dtype=torch.int8)
    with pytest.raises(ConfigError, match="include_base"):
        convert(controlnet, tmp_path, include_base=True)


def test_an_adapter_with_a_contrastive_projection(tmp_path):
    tensors = small_adapter(contrastive_width=7)
    names = {key for key in tensors if ".contrastive." in key}
    assert len(names) == 4 and tensors["style_model.contrastive.fc1.weight"].shape == (7, 5)
    torch.save(tensors, tmp_path / "mine.pt")
    (path,) = convert(tmp_path / "mine.pt", tmp_path)
    content = read_state_dict(path)
    assert content.metadata["format"] == "stylemaster-adapter-1"
    assert set(content.tensors) == set(tensors)
    assert all(torch.equal(content.tensors[key], tensors[key]) for key in tensors)
    del tensors["style_model.contrastive.fc2.bias"]
    torch.save(tensors, tmp_path / "part.pt")
    with pytest.raises(WeightsError, match="contrastive.fc2.bias"):
        convert(tmp_path / "part.pt", tmp_path)
    del tensors["style_model.contrastive.fc1.weight"]
    torch.save(tensors, tmp_path / "part.pt")
    with pytest.raises(WeightsError, match="contrastive.fc1.weight is missing"):
        convert(tmp_path / "part.pt", tmp_path)


@pytest.mark.parametrize(("change", "base"), [({}, "wan2.1-t2v-1.3b"), ({"width": 8}, "custom")])
def test_a_contrastive_projection_does_not_change_the_base(change, base, monkeypatch):
    from stylemaster_core.weights import convert as module

    report = type("Report", (), {"is_uniform": False, "message": ""})
    monkeypatch.setattr(module, "style_path_report", lambda adapter: report)
    shapes = expected_adapter_shapes(AdapterSizes(**change, contrastive_width=2048))
    adapter = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert module._adapter_metadata(adapter, Path("x"))["base_model"] == base


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_converted(tmp_path, release, controlnet, value):
    """Nor those of the base, which is not written."""
    names = [next(key for key in release if is_adapter_key(key) is kind) for kind in (True, False)]
    source = tmp_path / "bad.ckpt"
    for name in names:
        bad = release[name].clone()
        bad.view(-1)[0] = value
        torch.save(release | {name: bad}, source)
        with pytest.raises(WeightsError, match=r"bad\.ckpt: 1 weights .* with NaN or infinity"):
            convert(source, tmp_path / "out")
    assert main(["weights", "convert", str(source), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    (path,) = convert(source, tmp_path / "out", skip_check=True)
    assert path.is_file()
    tensors = torch.load(controlnet, weights_only=True)
    next(iter(tensors.values())).view(-1)[0] = value
    torch.save(tensors, controlnet)
    with pytest.raises(WeightsError, match=r"controlnet\.ckpt: .*NaN or infinity"):
        convert(controlnet, tmp_path / "out")


def test_a_type_that_cannot_hold_the_numbers_is_refused(tmp_path, controlnet):
    tensors = torch.load(controlnet, weights_only=True)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = -70000.0
    torch.save(tensors, controlnet)
    with pytest.raises(WeightsError, match=f"{name}.*up to 70000.*float16 ends at 65504"):
        convert(controlnet, tmp_path / "out", dtype=torch.float16)
    (path,) = convert(controlnet, tmp_path / "out", dtype=torch.bfloat16)
    assert read_state_dict(path).tensors[name].view(-1)[0] == -70144
