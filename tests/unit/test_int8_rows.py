"""Weights in 8 bits with a scale for each row."""

import pytest
import torch
from safetensors.torch import save_file

from stylemaster_core import WeightsError
from stylemaster_core.weights.files import read_keys, read_state_dict, write_state_dict
from stylemaster_core.weights.int8_rows import pack_rows


@pytest.fixture
def weights():
    torch.manual_seed(0)
    rows = torch.logspace(-3, 2, 64)[:, None] * torch.randn(64, 300)
    return {"large": rows.half(), "small": torch.randn(8, 8).half(), "bias": torch.randn(20_000)}


def test_read_back_every_number_is_within_half_a_level_of_its_row(weights, tmp_path):
    write_state_dict(tmp_path / "w.safetensors", pack_rows(weights), {"format": "x"})
    found, metadata = read_state_dict(tmp_path / "w.safetensors")
    assert metadata == {"format": "x"} and list(found) == sorted(weights)
    level = weights["large"].float().abs().amax(1, keepdim=True) / 127
    # Half a level, and float16's own rounding.
    error = (found["large"].float() - weights["large"].float()).abs()
    assert (error <= 0.505 * level + 1e-3 * weights["large"].float().abs()).all()
    assert error.max() > 0 and found["large"].dtype == torch.float16
    assert torch.equal(found["small"], weights["small"])
    assert torch.equal(found["bias"], weights["bias"])


def test_the_header_names_what_is_read(weights, tmp_path):
    write_state_dict(tmp_path / "w.safetensors", pack_rows(weights))
    keys = read_keys(tmp_path / "w.safetensors")
    assert keys == {
        key: (tuple(value.shape), value.dtype) for key, value in weights.items()
    }  # packed or not
    size = (tmp_path / "w.safetensors").stat().st_size
    assert size < sum(v.nbytes for v in weights.values()) - 64 * 300 + 64 * 4 + 1000


@pytest.mark.parametrize("damage", ["no rows", "other rows", "not 8 bits"])
def test_a_scale_without_its_rows_is_named(weights, tmp_path, damage):
    packed = pack_rows(weights)
    if damage == "no rows":
        del packed["large"]
    elif damage == "other rows":
        packed["large.row_scale"] = packed["large.row_scale"][:-1].clone()
    else:
        packed["large"] = packed["large"].half()
    save_file(packed, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"large\.row_scale.*damaged"):
        read_state_dict(tmp_path / "w.safetensors")
