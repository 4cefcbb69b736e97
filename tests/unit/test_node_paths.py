"""Workflows name files only inside ComfyUI's folders, for reading and for writing."""

from __future__ import annotations

import os
import types

import pytest

from tests.unit.node_modules import node_module


class FolderPaths(types.SimpleNamespace):
    """What `nodes.paths` asks of ComfyUI's module of that name."""

    def __init__(self, models):
        super().__init__(models_dir=str(models), folder_names_and_paths={})

    def add_model_folder_path(self, name, folder):
        self.folder_names_and_paths.setdefault(name, ([], set()))[0].append(folder)

    def get_folder_paths(self, name):
        return self.folder_names_and_paths[name][0]

    def get_filename_list(self, name):
        folders, endings = self.folder_names_and_paths[name]
        return [
            os.path.relpath(os.path.join(place, file), folder)
            for folder in folders
            for place, _, files in os.walk(folder)
            for file in files
            if os.path.splitext(file)[1] in endings
        ]

    def get_save_image_path(self, prefix, root):
        subfolder, name = os.path.split(prefix)
        folder = os.path.join(root, subfolder)
        os.makedirs(folder, exist_ok=True)
        taken = [file for file in os.listdir(folder) if file.startswith(f"{name}_")]
        return folder, name, len(taken) + 1, subfolder, prefix


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    for name in (
        "stylemaster/sub/a.safetensors",
        "stylemaster/release.ckpt",
        "loras/m.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "stylemaster" / "notes.txt").write_text("no weights")
    (tmp_path / "secret.safetensors").write_text("secret")
    return folder


@pytest.fixture
def paths(models):
    with node_module("paths", FolderPaths(models)) as module:
        module.register_folders()
        yield module


def error(paths):
    """ConfigError and WeightsError of the pack under its own name."""
    return (paths.ConfigError, paths.WeightsError)


OUTSIDE = [
    "../secret.safetensors",
    "sub/../../secret.safetensors",
    "sub\\..\\..\\secret.safetensors",
    "..",
    "...",
    ".. /secret.safetensors",
    "/etc/passwd",
    "\\\\server\\share\\a.safetensors",
    "\\a.safetensors",
    "C:\\a.safetensors",
    "c:a.safetensors",
    "a.safetensors:stream",
    "a\0.safetensors",
    "a\n.safetensors",
    "\ud800.safetensors",
    "x" * 300,
    "a/" * 2000,
    "",
    "  ",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_are_refused(paths, models, name):
    with pytest.raises(paths.ConfigError, match="is refused"):
        paths.find_inside(name, [models / "stylemaster"])
    with pytest.raises(paths.ConfigError, match="is refused"):
        paths.model_file(name, paths.ADAPTERS)
    with pytest.raises(paths.ConfigError, match="is refused"):
        paths.new_style_file(name)


def test_an_absolute_path_inside_is_refused_too(paths, models):
    with pytest.raises(paths.ConfigError, match="absolute"):
        paths.model_file(str(models / "stylemaster" / "release.ckpt"), paths.ADAPTERS)


@pytest.mark.parametrize("name", ["sub/a.safetensors", "sub\\a.safetensors", "./sub/a.safetensors"])
def test_names_inside_are_found(paths, models, name):
    found = paths.model_file(name, paths.ADAPTERS)
    assert found == (models / "stylemaster" / "sub" / "a.safetensors").resolve()


def test_links_out_are_refused(paths, models, tmp_path):
    root = models / "stylemaster"
    (root / "file.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (root / "folder").symlink_to(tmp_path)
    for name in ("file.safetensors", "folder/secret.safetensors"):
        with pytest.raises(paths.ConfigError, match="link that leads out"):
            paths.model_file(name, paths.ADAPTERS)


def test_links_between_the_named_folders_and_linked_roots_are_fine(paths, models, tmp_path):
    (models / "stylemaster" / "m2.safetensors").symlink_to(models / "loras" / "m.safetensors")
    link = tmp_path / "linked"
    link.symlink_to(models / "stylemaster")
    assert paths.find_inside("m2.safetensors", [link, models / "loras"]).name == "m.safetensors"
    assert paths.find_inside("sub/a.safetensors", [link]).is_file()


def test_a_missing_file_names_the_folders(paths, models):
    with pytest.raises(paths.WeightsError, match="none.safetensors") as caught:
        paths.model_file("none.safetensors", paths.ADAPTERS)
    assert str(models / "stylemaster") in str(caught.value)


def test_lists_hold_weights_and_leave_styles_out(paths, models):
    style = models / "stylemaster" / "styles" / "mine_00001_.safetensors"
    style.parent.mkdir()
    style.write_bytes(b"")
    assert sorted(paths.model_names(paths.ADAPTERS)) == [
        "release.ckpt",
        os.path.join("sub", "a.safetensors"),
    ]
    assert paths.model_names(paths.STYLES) == ["mine_00001_.safetensors"]


def test_new_styles_never_overwrite(paths, models):
    first = paths.new_style_file("oil/monet")
    assert first == (models / "stylemaster/styles/oil").resolve() / "monet_00001_.safetensors"
    first.write_bytes(b"")
    assert paths.new_style_file("oil/monet").name == "monet_00002_.safetensors"

    def save(path):
        if path.name == "monet_00002_.safetensors" and not path.exists():
            path.write_bytes(b"somebody else's")  # just now
            raise paths.WeightsError("it exists already")
        path.write_bytes(b"ours")
        return path

    saved = paths.save_numbered("oil/monet", save)
    assert saved.name == "monet_00003_.safetensors" and saved.read_bytes() == b"ours"

    def fail(path):
        raise paths.WeightsError("the disk is full")

    with pytest.raises(error(paths), match="the disk is full"):
        paths.save_numbered("oil/monet", fail)


def test_styles_are_not_written_through_a_link(paths, models, tmp_path):
    styles = models / "stylemaster" / "styles"
    styles.mkdir()
    (styles / "out").symlink_to(tmp_path)
    with pytest.raises(paths.ConfigError, match="leads out"):
        paths.new_style_file("out/mine")


def test_nothing_is_made_through_a_link_before_it_is_refused(paths, models, tmp_path):
    styles, outside = models / "stylemaster" / "styles", tmp_path / "outside"
    styles.mkdir()
    outside.mkdir()
    (styles / "out").symlink_to(outside)
    with pytest.raises(paths.ConfigError, match="leads out"):
        paths.new_style_file("out/new/mine")
    assert list(outside.iterdir()) == []


def test_styles_need_room_for_their_number_and_no_file_where_a_folder_would_be(paths, models):
    with pytest.raises(paths.ConfigError, match="longer than 200 bytes"):
        paths.new_style_file("ä" * 120)
    (models / "stylemaster" / "styles").mkdir()
    (models / "stylemaster" / "styles" / "a_00001_.safetensors").write_bytes(b"")
    with pytest.raises(paths.ConfigError, match="leads through a file"):
        paths.new_style_file("a_00001_.safetensors/x")
    assert paths.model_file("sub/a.safetensors", paths.ADAPTERS).is_file()
    with pytest.raises(paths.WeightsError, match="there is no file"):
        paths.model_file("sub/a.safetensors/x", paths.ADAPTERS)


@pytest.mark.parametrize("value", ["--help", "style", "", None, 3, ["style-images"], {}])
def test_values_of_lists_that_a_link_carries(paths, value):
    with pytest.raises(paths.ConfigError, match="expected one of style-images, style-clips"):
        paths.check_choice(value, ["style-images", "style-clips"], "stage")
    paths.check_choice("style-clips", ["style-images", "style-clips"], "stage")


def test_the_fingerprint_follows_the_file(paths, models):
    path = models / "loras" / "m.safetensors"
    before = paths.fingerprint(path)
    assert paths.fingerprint(path) == before
    path.write_bytes(b"longer than it was before")
    assert paths.fingerprint(path) != before
