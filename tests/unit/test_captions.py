"""Captions: StyleCrafter's three rules against the released code, tables and sidecar files."""

import json
from pathlib import Path

import pytest

from stylemaster_core.data.captions import read_table, sidecar_caption, strip_style_words
from stylemaster_core.data.samples import Sample, find_pictures, read_samples, write_samples
from stylemaster_core.data.still_videos import still_samples
from stylemaster_core.data.tile_triplets import tile_samples
from stylemaster_core.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "stylecrafter" / "x4_captions.json"
CASES = json.loads(GOLDEN.read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["caption"])
def test_style_words_as_released(case):
    assert strip_style_words(case["caption"]) == case["cleaned"]


def test_the_greedy_rule_is_kept():
    assert strip_style_words("a dog in a city street with a view") == "a dog "
    assert strip_style_words("Painting of a dog") == "Painting of a dog"


def test_sidecar(tmp_path):
    (tmp_path / "cat.txt").write_text("\ufeffa cat \n", encoding="utf-8")
    assert sidecar_caption(tmp_path / "cat.png") == "a cat"
    assert sidecar_caption(tmp_path / "dog.png") is None


@pytest.fixture
def media(tmp_path):
    for name in ("clip_10.mp4", "clip_2.mp4", "sub/cat.png", "notes.md", ".hidden.png"):
        path = tmp_path / "media" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        path.with_suffix(".txt").write_text(f"a painting of {path.stem}")
    return tmp_path / "media"


def test_folder(media):
    samples = read_samples(media, strip_style=True)
    assert [sample.id for sample in samples] == ["clip_2.mp4", "clip_10.mp4", "sub/cat.png"]
    assert samples[2].caption == "cat" and samples[2].media == media / "sub" / "cat.png"
    assert find_pictures(media) == [media / "sub" / "cat.png"]


def test_csv_and_jsonl(media, tmp_path):
    csv = media / "table.csv"
    csv.write_text(
        'video,caption,style\nclip_2.mp4,"a boat, sailing",self\nclip_10.mp4,a car,sub/cat.png\n'
    )
    samples = read_samples(csv)
    assert samples[0] == Sample("clip_2.mp4", media / "clip_2.mp4", "a boat, sailing")
    assert samples[1].style == media / "sub" / "cat.png"
    table = tmp_path / "table.jsonl"
    write_samples(table, tile_samples(samples))
    again = read_samples(table)
    assert [s.media.resolve() for s in again] == [s.media.resolve() for s in samples]
    assert again[1].style.resolve() == samples[1].style.resolve()
    assert all(s.tile and s.repeat is None for s in again)
    with pytest.raises(ConfigError, match="exists"):
        write_samples(table, samples)


def test_still_samples(media):
    cat = [s for s in read_samples(media) if s.media.suffix == ".png"]
    assert [s.repeat for s in still_samples(cat, 17)] == [17]
    with pytest.raises(ConfigError, match="4n"):
        still_samples(cat, 16)
    with pytest.raises(ConfigError, match="videos"):
        still_samples(read_samples(media), 17)


def test_rows_cut_short_by_a_kill_are_left_out(tmp_path):
    table = tmp_path / "t.jsonl"
    table.write_text('{"media": "a.mp4", "caption": "a"}\n{"media": "b.mp')
    assert [row["media"] for row in read_table(table)] == ["a.mp4"]


BAD = {
    "empty table": ("video,caption\n", "no rows"),
    "missing caption": ("video,title\na.mp4,a\n", "caption, prompt, text"),
    "missing media": ("clip,caption\na.mp4,a\n", "video"),
    "two media": ("video,image,caption\na.mp4,b.png,a\n", "exactly one"),
    "no file named": ("video,caption\n,a\n", "row 1"),
    "commas": ("video,caption\na.mp4,a boat, sailing\n", "double quotes"),
    "too few fields": ("video,caption\na.mp4\n", "fields"),
    "same id": ("video,caption\na.mp4,a\na.mp4,b\n", "more than once"),
    "repeat": ("video,caption,repeat\na.png,a,many\n", "repeat"),
    "control": ("video,caption,control\na.png,a,depth\n", "depth"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_bad_tables(tmp_path, text, said):
    table = tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_samples(table)


def test_bad_sources(tmp_path, media):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        read_samples(tmp_path / "empty")
    with pytest.raises(ConfigError, match="absent"):
        read_samples(tmp_path / "absent.csv")
    (tmp_path / "t.jsonl").write_text("[1]\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_samples(tmp_path / "t.jsonl")
    (media / "clip_2.txt").unlink()
    with pytest.raises(ConfigError, match=r"clip_2.mp4.*one caption for all"):
        read_samples(media)
    assert read_samples(media, caption="anything")[0].caption == "anything"
