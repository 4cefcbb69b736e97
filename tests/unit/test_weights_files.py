"""Reading and writing weight files: formats by content, damage, refusals, nothing half-written."""

import hashlib
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from stylemaster_core.errors import WeightsError
from stylemaster_core.weights import files
from stylemaster_core.weights.files import (
    find_weight_file,
    read_keys,
    read_state_dict,
    sha256_of,
    write_state_dict,
)

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0]),
    "count": torch.tensor(7),
}


def assert_same(tensors):
    assert set(tensors) == set(TENSORS)
    for key, value in TENSORS.items():
        assert tensors[key].dtype == value.dtype
        assert torch.equal(tensors[key], value)


def test_safetensors_round_trip_with_metadata(tmp_path):
    path = write_state_dict(tmp_path / "deep" / "x.safetensors", TENSORS, {"format": "test-1"})
    content = read_state_dict(path)
    assert_same(content.tensors)
    assert content.metadata == {"format": "test-1"}
    assert os.listdir(path.parent) == ["x.safetensors"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_checkpoint(tmp_path, zipped, nested):
    path = tmp_path / "x.ckpt"
    content = {"state_dict": TENSORS, "global_step": 12} if nested else dict(TENSORS)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    result = read_state_dict(path)
    assert_same(result.tensors)
    assert result.metadata == ({"global_step": "12"} if nested else {})


def test_dictionaries_inside_become_dotted_keys(tmp_path):
    torch.save({"input_blocks.1.2": {"norm.weight": torch.ones(2)}}, tmp_path / "t.pth")
    assert list(read_state_dict(tmp_path / "t.pth").tensors) == ["input_blocks.1.2.norm.weight"]


def test_the_content_decides_not_the_name(tmp_path):
    save_file(TENSORS, str(tmp_path / "x.ckpt"))
    torch.save(TENSORS, tmp_path / "x.safetensors")
    assert_same(read_state_dict(tmp_path / "x.ckpt").tensors)
    assert_same(read_state_dict(tmp_path / "x.safetensors").tensors)


def test_read_keys_of_both_formats(tmp_path):
    expected = {key: (tuple(value.shape), value.dtype) for key, value in TENSORS.items()}
    save_file(TENSORS, str(tmp_path / "x.safetensors"))
    torch.save(TENSORS, tmp_path / "x.pt")
    assert read_keys(tmp_path / "x.safetensors") == expected
    assert read_keys(tmp_path / "x.pt") == expected


def test_read_keys_does_not_read_the_tensors(tmp_path, monkeypatch):
    path = write_state_dict(tmp_path / "x.safetensors", TENSORS)

    def refuse(_):
        raise AssertionError("the tensors were read")

    monkeypatch.setattr(files, "read_state_dict", refuse)
    assert set(read_keys(path)) == set(TENSORS)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_named_with_its_size(tmp_path, kind, share):
    path = tmp_path / "cut.bin"
    big = {"w": torch.rand(200, 50), "v": torch.rand(30)}
    if kind == "safetensors":
        save_file(big, str(path))
    else:
        torch.save(big, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)
    assert f"{path.stat().st_size:,} bytes" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "neither"),
        (b"<!DOCTYPE html><html>login</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "Git LFS pointer"),
        (struct.pack("<Q", 1 << 40) + b'{"a": 1}', "neither"),
        (b"GIF89a" + bytes(100), "neither"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        read_state_dict(path)
    with pytest.raises(WeightsError, match=words):
        read_keys(path)


class Malicious:
    """Would make a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, zipped):
    trace = tmp_path / "trace"
    path = tmp_path / "evil.ckpt"
    torch.save(
        {"w": torch.ones(1), "x": Malicious(str(trace))},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(WeightsError, match="refused"):
        read_state_dict(path)
    assert not trace.exists()


def test_a_bare_pickle_is_refused(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious(str(trace))))
    with pytest.raises(WeightsError):
        read_state_dict(tmp_path / "evil.pt")
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"step": 3}, {"state_dict": {}}])
def test_a_checkpoint_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="no named tensors"):
        read_state_dict(tmp_path / "x.pt")


def test_a_gguf_file_is_named_and_how_to_load_it(tmp_path):
    (tmp_path / "wan.gguf").write_bytes(b"GGUF\x03" + bytes(100))
    with pytest.raises(WeightsError, match=r"GGUF file.*Unet Loader \(GGUF\).*safetensors"):
        read_state_dict(tmp_path / "wan.gguf")


def test_nothing_is_overwritten_unless_asked(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("precious")
    with pytest.raises(WeightsError, match="exists"):
        write_state_dict(path, TENSORS)
    assert path.read_text() == "precious"
    write_state_dict(path, TENSORS, overwrite=True)
    assert_same(read_state_dict(path).tensors)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    import safetensors.torch

    path = tmp_path / "x.safetensors"
    path.write_text("precious")

    def fail_half_way(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail_half_way)
    with pytest.raises(WeightsError, match="No space left"):
        write_state_dict(path, TENSORS, overwrite=True)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_metadata_must_be_strings(tmp_path):
    with pytest.raises(WeightsError, match="num_blocks"):
        write_state_dict(tmp_path / "x.safetensors", TENSORS, {"num_blocks": 3})
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_or_are_strided_are_written(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "again": base, "turned": base.T, "part": base[1]}
    path = write_state_dict(tmp_path / "x.safetensors", tensors)
    for key, value in read_state_dict(path).tensors.items():
        assert torch.equal(value, tensors[key])


def test_sha256_and_its_progress(tmp_path):
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "x").write_bytes(data)
    seen = []
    digest = sha256_of(tmp_path / "x", lambda done, total: seen.append((done, total)))
    assert digest == hashlib.sha256(data).hexdigest()
    assert seen == [(1 << 20, len(data)), (len(data), len(data))]


def test_find_looks_in_order_and_in_sub_folders(tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    (first / "sub").mkdir(parents=True)
    second.mkdir()
    (second / "x[1].safetensors").write_text("")
    assert find_weight_file("x[1].safetensors", [first, second]).parent == second
    (first / "sub" / "x[1].safetensors").write_text("")
    assert find_weight_file("x[1].safetensors", [first, second]).parent == first / "sub"
    assert find_weight_file("sub/x[1].safetensors", [first]).parent == first / "sub"


def test_a_missing_file_is_named_with_folders_and_the_way_to_get_it(tmp_path):
    with pytest.raises(WeightsError) as caught:
        find_weight_file("wan_2.1_vae.safetensors", [tmp_path / "vae", tmp_path / "more"])
    message = str(caught.value)
    assert "wan_2.1_vae.safetensors" in message
    assert str(tmp_path / "vae") in message and str(tmp_path / "more") in message
    assert "stylemaster weights download wan-vae" in message
    with pytest.raises(WeightsError, match="stylemaster weights convert"):
        find_weight_file("stylemaster_adapter.safetensors", [tmp_path])
    with pytest.raises(WeightsError, match="not in the list of known files"):
        find_weight_file("model.safetensors", [tmp_path])


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x"])
def test_names_that_lead_out_of_the_folders_are_refused(tmp_path, name):
    (tmp_path / "x.safetensors").write_text("")
    (tmp_path / "models").mkdir()
    with pytest.raises(WeightsError, match="leads out"):
        find_weight_file(name, [tmp_path / "models"])


def test_folders_and_missing_paths_are_errors(tmp_path):
    with pytest.raises(WeightsError, match="folder"):
        read_state_dict(tmp_path)
    with pytest.raises(WeightsError, match="does not exist"):
        read_keys(tmp_path / "nothing.safetensors")


def test_a_file_without_tensors_is_read_again(tmp_path):
    """As the optimiser's is, if a run is stopped before its first step."""
    write_state_dict(tmp_path / "none.safetensors", {})
    assert read_state_dict(tmp_path / "none.safetensors").tensors == {}
    assert read_keys(tmp_path / "none.safetensors") == {}
