"""The list of weight files against its schema, and what it tells users."""

import json
from pathlib import Path

import pytest

from stylemaster_core.errors import WeightsError
from stylemaster_core.weights import manifest
from stylemaster_core.weights.manifest import get_entry, how_to_get, load_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def content():
    return json.loads((ROOT / "weights_manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "weights_manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_manifest_agrees_with_its_schema(content, validator):
    assert [error.message for error in validator.iter_errors(content)] == []


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "abc"},
        {"size": 0},
        {"folder": "../vae"},
        {"save_as": "a/b"},
        {"needed_by": ["cooking"]},
        {"sha256": None},  # while sha256_source still says where it was read
        {"sha256_source": None},
        {"extra": 1},
    ],
)
def test_schema_refuses_wrong_entries(content, validator, change):
    entry = next(item for item in content["files"] if item["id"] == "wan-vae")
    wrong = {"version": 1, "files": [entry | change]}
    assert list(validator.iter_errors(wrong))


def test_entries(content):
    entries = load_manifest()
    assert list(entries) == [item["id"] for item in content["files"]]
    vae = entries["wan-vae"]
    assert vae.file_name == "wan_2.1_vae.safetensors" and vae.folder == "vae"
    assert vae.size == 253815318 and vae.sha256_source == "mirror"
    assert entries["csd"].file_name == "csd_vit_l.safetensors"
    for entry in entries.values():
        assert entry.alternative_to is None or entry.alternative_to in entries
        assert (entry.file is None) == entry.gated


def test_no_two_files_share_a_place():
    places = [(entry.folder, entry.file_name) for entry in load_manifest().values() if entry.file]
    assert len(set(places)) == len(places)


def test_a_missing_manifest_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="pip install -e"):
        load_manifest(tmp_path / "weights_manifest.json")
    monkeypatch.setattr(manifest, "MANIFEST_PATH", tmp_path / "weights_manifest.json")
    assert "model folders" in how_to_get("wan_2.1_vae.safetensors")


@pytest.mark.parametrize("text", ["{", '{"files": [{"id": "x"}]}', "[]"])
def test_a_broken_manifest_is_an_error(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(WeightsError, match="be read as a list of weight files"):
        load_manifest(tmp_path / "m.json")


def test_ids_are_unique(tmp_path, content):
    twice = {"version": 1, "files": [content["files"][0]] * 2}
    (tmp_path / "m.json").write_text(json.dumps(twice))
    with pytest.raises(WeightsError, match="twice"):
        load_manifest(tmp_path / "m.json")


def test_unknown_id_lists_the_known_ones():
    with pytest.raises(WeightsError, match="wan-vae"):
        get_entry("nothing")


def test_how_to_get():
    assert "stylemaster weights download wan-vae" in how_to_get("wan_2.1_vae.safetensors")
    assert "models/vae" in how_to_get("wan_2.1_vae.safetensors")
    assert "weights convert" in how_to_get("stylemaster_controlnet.safetensors")
    assert "stylemaster-controlnet" in how_to_get("controlnet.ckpt")
    # Three repositories have a file of this name.
    assert "not in the list" in how_to_get("model.safetensors")
