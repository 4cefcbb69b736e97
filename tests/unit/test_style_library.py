"""Styles carry a small picture and tags; files from before, and of other programs, are read."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from stylemaster_core import ConfigError, LayoutError
from stylemaster_core.data.thumbnails import MAX_BYTES, read_thumbnail, thumbnail_jpeg
from stylemaster_core.models.style_tokens import (
    FORMAT,
    JPEG_URL,
    TAGS_KEY,
    THUMBNAIL_KEY,
    Style,
    load_style,
    parse_tags,
    read_style,
    save_style,
)
from stylemaster_core.weights.files import write_state_dict

STYLE = Style(torch.ones(1, 4, 6), {"prompt": "a fox"})


def picture(height=300, width=500):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows % 256, columns % 256, (rows + columns) % 256], -1).astype(np.uint8)


def test_tags_and_picture_come_back(tmp_path):
    thumbnail = thumbnail_jpeg(picture())
    tags = parse_tags("oil, dick aufgetragen,\n油画 , oil")
    assert tags == ("oil", "dick aufgetragen", "油画")
    path = save_style(tmp_path / "a.safetensors", STYLE, tags=tags, thumbnail=thumbnail)
    read = read_style(path)
    assert (read.tags, read.thumbnail) == (tags, thumbnail)
    assert torch.equal(read.style.tokens, STYLE.tokens)
    assert load_style(path).provenance == STYLE.provenance
    small = read_thumbnail(thumbnail)
    assert small.shape == (154, 256, 3)
    expected = np.asarray(Image.fromarray(picture()).resize((256, 154), Image.Resampling.LANCZOS))
    assert np.abs(small.astype(int) - expected).mean() < 8


def test_what_comfyui_serves_is_a_header_below_its_limit(tmp_path):
    thumbnail = thumbnail_jpeg(np.random.RandomState(0).randint(0, 256, (700, 700, 3), np.uint8))
    path = save_style(tmp_path / "a.safetensors", STYLE, thumbnail=thumbnail)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size < 1 << 20
    url = json.loads(data[8 : 8 + size])["__metadata__"]["modelspec.thumbnail"]
    assert base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) == thumbnail


@pytest.mark.parametrize("shape", [(1, 1), (2000, 3), (700, 700), (64, 64)])
def test_every_picture_fits(shape):
    noise = np.random.RandomState(0).randint(0, 256, (*shape, 3), np.uint8)
    data = thumbnail_jpeg(noise)
    assert 0 < len(data) <= MAX_BYTES
    assert max(read_thumbnail(data).shape[:2]) <= 256


def test_files_from_before_have_neither(tmp_path):
    path = save_style(tmp_path / "old.safetensors", STYLE)
    assert set(json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")["__metadata__"]) == {
        "format",
        "provenance",
    }
    assert read_style(path)[1:] == ((), None)


@pytest.mark.parametrize(
    "url", ["https://example.org/a.jpg", "data:image/svg+xml;base64,PHN2Zz4=", "", JPEG_URL + "ä!"]
)
def test_a_picture_of_another_kind_is_left_alone(tmp_path, url):
    metadata = {"format": FORMAT, THUMBNAIL_KEY: url, TAGS_KEY: " , a,, b ,"}
    path = write_state_dict(tmp_path / "a.safetensors", {"style_tokens": STYLE.tokens}, metadata)
    assert read_style(path)[1:] == (("a", "b"), None)


def test_pictures_that_are_no_thumbnails_are_refused():
    stream = io.BytesIO()
    Image.new("RGB", (4000, 8)).save(stream, "JPEG")
    with pytest.raises(LayoutError, match="4000x8"):
        read_thumbnail(stream.getvalue())
    for data in (b"", b"GIF89a", thumbnail_jpeg(picture())[:900]):
        with pytest.raises(LayoutError, match="no whole JPEG"):
            read_thumbnail(data)
    with pytest.raises(LayoutError, match="at most 20000 bytes"):
        read_thumbnail(b"\xff\xd8" * 20_000)
    with pytest.raises(LayoutError, match="uint8"):
        thumbnail_jpeg(np.zeros((4, 4, 3), np.float32))  # pyright: ignore[reportArgumentType]


def test_tags_are_words():
    assert parse_tags("") == parse_tags(" ,, \n") == ()
    with pytest.raises(ConfigError, match="21 tags"):
        parse_tags(",".join(map(str, range(21))))
    for text in ("x" * 51, "a\0b", "a\tb"):
        with pytest.raises(ConfigError, match="is refused"):
            parse_tags(text)
