"""An index of pictures follows its folder, looks at each picture once, and finds the nearest."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from stylemaster_core import ConfigError
from stylemaster_core.data.media_files import IMAGE_ENDINGS, media_files
from stylemaster_core.data.picture_index import BATCH, most_alike, update_index
from stylemaster_core.weights.files import write_state_dict

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


def paint(folder, name, colour, size=(12, 8)):
    Image.new("RGB", size, colour).save(folder / f"{name}.png")


class Encoder:
    """The mean colour, and which pictures were looked at."""

    def __init__(self):
        self.seen = []

    def __call__(self, pictures):
        means = torch.stack([torch.from_numpy(p.reshape(-1, 3).mean(0)) for p in pictures])
        self.seen += [tuple(picture[0, 0]) for picture in pictures]
        return {"style": means, "whole": means.flip(-1)}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    for number, (name, colour) in enumerate(COLOURS.items()):
        paint(place, name, colour, (12 + number, 8))
    return place


def update(folder, encoder=None, identity="e", progress=lambda done, of: None):
    encoder = encoder or Encoder()
    index = update_index(
        folder.parent / "index.safetensors",
        media_files(folder, IMAGE_ENDINGS),
        identity,
        encoder,
        progress,
    )
    return index, encoder.seen


def test_the_nearest_come_first(folder):
    index, seen = update(folder)
    assert index.names == ["blue.png", "green.png", "red.png"] and len(seen) == 3
    found = most_alike(index, "style", torch.tensor([[200.0, 100.0, 0.0]]), 2)
    assert [name for name, _ in found] == ["red.png", "green.png"]
    assert found[0].similarity == pytest.approx(200 / np.hypot(200, 100), abs=0.06)
    assert most_alike(index, "whole", torch.tensor([[200.0, 100.0, 0.0]]), 1)[0].name == "blue.png"
    both = torch.tensor([[1.0, 0, 0], [0, 9.0, 0]])  # each counts alike, however long
    red, green, blue = (
        {name: x for name, x in most_alike(index, "style", both, 9)}[f"{c}.png"] for c in COLOURS
    )
    assert red == pytest.approx(green, abs=1e-3) and blue < 0.2


def test_only_what_changed_is_looked_at(folder):
    update(folder)
    assert update(folder)[1] == []
    paint(folder, "white", (255, 255, 255))
    paint(folder, "red", (128, 0, 0))
    (folder / "green.png").unlink()
    index, seen = update(folder)
    assert index.names == ["blue.png", "red.png", "white.png"]
    assert sorted(seen) == [(128, 0, 0), (255, 255, 255)]
    (folder / "blue.png").rename(folder / "sky.png")
    assert update(folder)[0].names == ["red.png", "sky.png", "white.png"]
    os.utime(folder / "sky.png", ns=(1, 1))
    assert update(folder)[1] == [(10, 10, 250)]
    assert update(folder)[1] == []


def test_another_encoder_or_a_damaged_index_begins_anew(folder):
    update(folder)
    assert len(update(folder, identity="other")[1]) == 3
    path = folder.parent / "index.safetensors"
    header = {"format": "stylemaster-pictures-1", "encoder": "other"}
    damages = [
        lambda: path.write_bytes(path.read_bytes()[:-3]),
        lambda: path.write_bytes(b"no index at all"),
        lambda: write_state_dict(
            path, {"style": torch.ones(3, 2)}, header | {"pictures": "[[1]]"}, overwrite=True
        ),
        lambda: write_state_dict(
            path, {"style": torch.full((1, 2), torch.nan)}, header | {"pictures": "[]"},
            overwrite=True,
        ),
        lambda: write_state_dict(path, {"a": torch.ones(1)}, {"format": "x"}, overwrite=True),
    ]  # fmt: skip
    for damage in damages:
        damage()
        index, seen = update(folder, identity="other")
        assert len(seen) == len(index.names) == 3
        assert update(folder, identity="other")[1] == []


def test_pictures_that_cannot_be_read_are_left_out(folder, caplog):
    (folder / "broken.png").write_bytes(b"\x89PNG and nothing else")
    paint(folder, "thin", (0, 0, 0), (600, 1))
    assert update(folder)[0].names == ["blue.png", "green.png", "red.png"]
    assert "broken.png is left out" in caplog.text and "thin.png is left out" in caplog.text
    for name in COLOURS:
        (folder / f"{name}.png").write_bytes(b"gone bad")
    assert update(folder)[0].names == []
    assert update(folder) == update(folder)


def test_what_was_looked_at_survives_an_interrupt(folder):
    class Interrupt(BaseException):
        pass

    for number in range(2 * BATCH):
        paint(folder, f"more_{number:02}", (number, 0, 99))

    def stop(done, total):
        assert total == 3 + 2 * BATCH
        if done >= BATCH:
            raise Interrupt

    with pytest.raises(Interrupt):
        update(folder, progress=stop)
    index, seen = update(folder)
    assert len(index.names) == 3 + 2 * BATCH and len(seen) == 3 + BATCH


def test_senseless_questions_are_refused(folder):
    index, _ = update(folder)
    with pytest.raises(ConfigError, match="give at least 1"):
        most_alike(index, "style", torch.ones(1, 3), 0)
    with pytest.raises(ConfigError, match="same image encoder"):
        most_alike(index, "style", torch.ones(1, 4), 1)
