"""Films: segments go on from each other within a shot, in constant memory, and survive kills."""

import itertools
import json
import os
import random
import time
import wave
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from stylemaster_core import ConfigError, denoise, flow_match_sigmas
from stylemaster_core.cli import main
from stylemaster_core.data import segment_files
from stylemaster_core.data.demo_scene import demo_clip, demo_styles
from stylemaster_core.data.images import read_image, write_image
from stylemaster_core.data.segment_files import check_leftovers, open_segments
from stylemaster_core.data.videos import probe_video, read_video, write_video
from stylemaster_core.errors import LayoutError
from stylemaster_core.models.small import write_small_models
from stylemaster_core.pipelines import estimate
from stylemaster_core.pipelines import film as film_module
from stylemaster_core.pipelines import models as models_module
from stylemaster_core.pipelines.film import (
    cut_segments,
    plan_segments,
    shots_of,
    stylize_film,
)
from stylemaster_core.pipelines.models import ModelFiles, Models
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.sampling.denoise import Lead
from stylemaster_core.sampling.windows import WindowConfig
from tests.forked import fork

HEIGHT, WIDTH = 16, 32
CUT = 13
WINDOWS = WindowConfig(3, 1)  # 9 frames, of which 1 is shared
CONFIG = StylizeConfig("video-to-video", prompt="a boat", num_steps=2, windows=WINDOWS)


@pytest.fixture(scope="module")
def pictures():
    """A film of 24 frames with one cut."""
    clip = demo_clip(24, HEIGHT, WIDTH)
    return np.concatenate([clip[:CUT], 255 - clip[CUT:, :, ::-1]])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    small = write_small_models(tmp_path_factory.mktemp("models"))
    return ModelFiles(
        transformer=small.stylemaster,
        controlnet=small.controlnet,
        vae=small.vae,
        text_encoder=small.text_encoder,
        image_encoder=small.image_encoder,
    )


@pytest.fixture(scope="module")
def models(files):
    return Models(files, device="cpu", keep_loaded=True)


def test_known_frames_are_noised_to_each_step_and_come_out_as_they_were(
    tiny_transformer, tiny_inputs
):
    net, given = tiny_transformer(), tiny_inputs()
    lead = Lead(given.control_latents[:, :, :2], given.latents[:, :, :2].clone())
    seen, velocities = [], net.velocities

    def watch(latents, *args, **kwargs):
        seen.append(latents.clone())
        return velocities(latents, *args, **kwargs)

    net.velocities = watch
    sigmas = flow_match_sigmas(3, shift=5.0).double()

    def run(known):
        return denoise(
            net,
            given.latents,
            sigmas=sigmas,
            text=given.text,
            negative_text=given.negative,
            style=given.tokens,
            text_scale=4.0,
            style_scale=2.0,
            lead=known,
        )

    result = run(lead)
    for sigma, latents in zip(sigmas, seen, strict=False):
        expected = (1 - sigma) * lead.clean + sigma * lead.noise
        torch.testing.assert_close(latents[:, :, :2], expected, atol=1e-6, rtol=0)
    assert torch.equal(result[:, :, :2], lead.clean)
    assert not torch.allclose(result[:, :, 2:], run(None)[:, :, 2:])  # the others follow them


@pytest.mark.parametrize("shape", [(1, 16, 3, 4, 6), (1, 16, 1, 4, 4), (2, 16, 1, 4, 6)])
def test_known_frames_must_fit(tiny_transformer, tiny_inputs, shape):
    given, wrong = tiny_inputs(), torch.zeros(shape)
    with pytest.raises(LayoutError, match="to go on from"):
        denoise(
            tiny_transformer(),
            given.latents,
            sigmas=flow_match_sigmas(2, shift=5.0),
            text=given.text,
            negative_text=None,
            style=None,
            text_scale=1.0,
            style_scale=0.0,
            lead=Lead(wrong, wrong),
        )


@pytest.mark.parametrize("windows", [(3, 1), (5, 2), (21, 7), (2, 1)])
@pytest.mark.parametrize("cuts", [[], [1], [13], [5, 9, 50, 51], [81, 82, 99]])
def test_segments_cover_each_shot_and_nothing_beyond(windows, cuts):
    length, overlap = windows
    shots = shots_of(100, cuts)
    segments = plan_segments(shots, WindowConfig(length, overlap))
    new = [f for s in segments for f in range(s.start + s.overlap, s.stop)]
    assert new == list(range(100))
    for before, segment in zip([None, *segments], segments, strict=False):
        shot = shots[segment.shot]
        assert shot.start <= segment.start < segment.stop <= shot.stop
        assert (segment.start - shot.start) % 4 == 0  # where a latent frame ends
        assert segment.stop - segment.start <= 4 * (length - 1) + 1
        if segment.start == shot.start:
            assert segment.overlap == 0
        else:
            assert before is not None and segment.overlap == 4 * (overlap - 1) + 1
            assert before.stop == segment.start + segment.overlap


def test_cuts_and_overlaps_that_cannot_be_are_refused():
    for cuts in ([0], [100], [120], [7, 7], [9, 3]):
        with pytest.raises(ConfigError, match="cut"):
            shots_of(100, cuts)
    with pytest.raises(ConfigError, match="at least 4 frames"):
        plan_segments(shots_of(100, []), WindowConfig(3, 0))


def film(models, pictures, cuts=(CUT,), config=CONFIG, **options):
    assert config.windows is not None
    segments = plan_segments(shots_of(len(pictures), cuts), config.windows)
    return segments, stylize_film(
        models, [None] * (len(cuts) + 1), config, segments, iter(pictures), **options
    )


@pytest.mark.parametrize("same_noise", [False, True])
def test_a_film_of_one_segment_is_what_stylize_makes(models, pictures, same_noise):
    config = replace(CONFIG, same_noise=same_noise)
    _, results = film(models, pictures[:7], cuts=(), config=config)
    (result,) = results
    expected = stylize(models, None, config, frames=pictures[:7])
    assert np.array_equal(result.frames, expected.frames)


def test_a_shot_is_restyled_as_if_it_were_alone_and_segments_go_on(models, pictures, monkeypatch):
    latents, inner = [], film_module.stylize

    def watch(*args, **kwargs):
        result = inner(*args, **kwargs)
        latents.append(result.latents)
        return result

    monkeypatch.setattr(film_module, "stylize", watch)
    segments, results = film(models, pictures)
    whole = [result.frames for result in results]
    assert len(np.concatenate(whole)) == len(pictures)
    for index, (segment, following) in enumerate(itertools.pairwise(segments)):
        same = torch.equal(latents[index][:, :, -1:], latents[index + 1][:, :, :1])
        assert same == (following.shot == segment.shot)
    _, alone = film(models, pictures[:CUT], cuts=())
    for index, result in enumerate(alone):  # what comes after the cut changes nothing before it
        assert np.array_equal(result.frames, whole[index])


def test_the_rest_of_a_film_is_the_same_later(models, pictures):
    segments, results = film(models, pictures)
    whole = list(results)
    for done in range(1, len(segments)):
        rest = stylize_film(
            models, [None, None], CONFIG, segments[done:], pictures, lead=whole[done - 1].lead
        )
        for before, after in zip(whole[done:], rest, strict=True):
            assert np.array_equal(before.frames, after.frames)
    with pytest.raises(LayoutError, match="goes on from the one before"):
        next(stylize_film(models, [None, None], CONFIG, segments[1:], pictures))


def test_the_same_noise_is_that_of_the_whole_shot(models, monkeypatch):
    drawn, inner = [], film_module.stylize

    def watch(models_, style, config, **kwargs):
        drawn.append((config.seed, config.noise_frames))
        return inner(models_, style, config, **kwargs)

    monkeypatch.setattr(film_module, "stylize", watch)
    frames = demo_clip(14, HEIGHT, WIDTH)
    for same in (True, False):
        list(film(models, frames, cuts=(), config=replace(CONFIG, same_noise=same, seed=3))[1])
    alike, apart = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert len(alike) > 1 and set(alike) == {(3, 3)}
    assert len({seed for seed, _ in apart}) == len(apart) and apart[0][0] == 3


@pytest.mark.parametrize("num_segments", [2, 5])
def test_no_more_than_a_segment_is_kept(models, num_segments):
    """Frames that were read, and results, die as the film goes on."""
    windows = WindowConfig(2, 1)  # 5 frames, of which 1 is shared
    num_frames = 5 + 4 * (num_segments - 1)
    alive, most = set(), 0

    def follow(thing, name):
        alive.add(name)
        weakref.finalize(thing, alive.discard, name)

    def source():
        nonlocal most
        for index in range(num_frames):
            frame = np.full((HEIGHT, WIDTH, 3), index, np.uint8)
            follow(frame, ("frame", index))
            most = max(most, len(alive))
            yield frame

    segments = plan_segments(shots_of(num_frames, []), windows)
    assert len(segments) == num_segments
    config = replace(CONFIG, num_steps=1, windows=windows)
    results = stylize_film(models, [None], config, segments, source())
    for index, result in enumerate(results):
        follow(result.frames.base if result.frames.base is not None else result.frames, index)
        follow(result.lead, ("lead", index))
        del result
    # 5 frames of a segment and the next one, a result and what the next goes on from.
    assert 5 <= most <= 5 + 1 + 1 + 2


def test_a_film_that_became_shorter_is_refused(pictures):
    segments = plan_segments(shots_of(24, []), WINDOWS)
    with pytest.raises(LayoutError, match="ends after 20 frames"):
        list(cut_segments(pictures[:20], segments))


JOB = {"--seed": 1, "the shots": [[0, 9]]}


def test_finished_segments_stay_and_come_back_without_loss(tmp_path):
    output, noise = tmp_path / "out.mp4", np.random.default_rng(0)
    parts = [noise.integers(0, 256, (n, 17, 23, 3), dtype=np.uint8) for n in (20, 3)]
    first = open_segments(output, JOB, [20, 3])
    assert first.done == 0 and first.lead() is None
    first.add(parts[0], torch.ones(1, 16, 1, 2, 2))
    with pytest.raises(ConfigError, match="another process"):
        open_segments(output, JOB, [20, 3])
    first.close()
    again = open_segments(output, JOB, [20, 3])
    assert again.done == 1 and torch.equal(again.lead(), torch.ones(1, 16, 1, 2, 2))
    again.add(parts[1], torch.zeros(1, 16, 1, 2, 2))
    chunks = list(again.frames())
    assert max(map(len, chunks)) <= 16
    assert np.array_equal(np.concatenate(chunks), np.concatenate(parts))
    assert len(list(again.folder.glob("*.safetensors"))) == 1
    again.remove()
    assert not list(tmp_path.iterdir())


def test_segments_of_another_job_are_refused_in_words_and_left(tmp_path):
    output = tmp_path / "out [1].mp4"
    kept = open_segments(output, JOB, [9])
    kept.add(np.zeros((9, 16, 16, 3), np.uint8), torch.zeros(1, 16, 1, 2, 2))
    kept.close()
    with pytest.raises(ConfigError, match="1 finished segments of out.*resume that run"):
        check_leftovers(output, resume=False)
    check_leftovers(output, resume=True)
    with pytest.raises(ConfigError, match=r"another job.*differ in: --seed\)"):
        open_segments(output, JOB | {"--seed": 2}, [9])
    check_leftovers(tmp_path / "other.mp4", resume=False)
    assert len(list(kept.folder.glob("*.mkv"))) == 1


@pytest.mark.parametrize("name", ["000000.mkv", "000001.safetensors"])
def test_damaged_segments_are_named(tmp_path, name):
    kept = open_segments(tmp_path / "out.mp4", JOB, [9, 9])
    for _ in range(2):
        kept.add(np.zeros((9, 16, 16, 3), np.uint8), torch.zeros(1, 16, 1, 2, 2))
    path = kept.folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LayoutError, match=name):
        kept.lead()
        list(kept.frames())


def arguments(files):
    names = ("transformer", "controlnet", "vae", "text_encoder", "image_encoder")
    return [
        word for n in names for word in (f"--{n.replace('_', '-')}", str(getattr(files, n)))
    ] + ["--device", "cpu"]


QUICK = ("--stream", "--steps", "1", "--window", "9", "--window-overlap", "4", "--json")


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, pictures):
    """A film with times that vary and with sound, a list of its shots, and style pictures."""
    folder = tmp_path_factory.mktemp("film")
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(np.random.default_rng(0).bytes(2 * 16000 * 2))
    times_s = np.cumsum([0.0, *[0.04, 0.06] * (len(pictures) // 2)])
    write_video(
        folder / "film.mp4", pictures, fps=20, times_s=times_s, audio_from=folder / "sound.wav"
    )
    (folder / "shots.csv").write_text(f"frame\n0\n{CUT}\n")
    for name, picture in demo_styles(64).items():
        write_image(folder / f"{name}.png", picture)
    (folder / "styles.csv").write_text("shot,style\n2,woodcut.png\n")
    return folder


def stylize_words(inputs, files, *words):
    film = ("--video", inputs / "film.mp4", "--shots", inputs / "shots.csv")
    same = ("--dtype", "float32")  # auto is measured, in each process anew
    return (*film, "--style", inputs / "neon.png", *QUICK, *same, *arguments(files), *words)


@pytest.fixture(scope="module")
def restyled(inputs, files, tmp_path_factory):
    """The film, restyled without a stop."""
    output = tmp_path_factory.mktemp("restyled") / "out.mp4"
    assert run("stylize", output, *stylize_words(inputs, files)) == 0
    return output


def test_the_result_has_the_times_and_the_sound_of_the_film(inputs, restyled):
    before, after = probe_video(inputs / "film.mp4"), probe_video(restyled)
    assert (after.num_frames, after.height, after.width) == (24, HEIGHT, WIDTH)
    assert after.times_s is not None and before.times_s is not None
    np.testing.assert_allclose(after.times_s, before.times_s, atol=1e-4)
    assert after.has_audio
    assert list(restyled.parent.iterdir()) == [restyled]  # the segments are gone


def test_a_style_by_shot_changes_that_shot_alone(inputs, files, restyled, tmp_path, capsys):
    output, sheet = tmp_path / "out.mp4", tmp_path / "sheet.png"
    lists = ("--style-by-shot", inputs / "styles.csv", "--shots-sheet", sheet, "--crf", 0)
    assert run("stylize", output, *stylize_words(inputs, files, *lists)) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 24
    frames, plain = (read_video(path).frames.astype(int) for path in (output, restyled))
    change = np.abs(frames - plain).mean((1, 2, 3))
    assert change[CUT:].min() > 2 * change[:CUT].max()
    assert read_image(sheet).shape[1] == 2 * 192  # shots beside their styles, two rows
    assert read_image(sheet).shape[0] > 2 * 192


def test_what_a_stopped_run_finished_is_gone_on_from_or_refused(
    inputs, files, restyled, tmp_path, monkeypatch, capsys
):
    output, words = tmp_path / "out.mp4", stylize_words(inputs, files)
    add, stopped = segment_files.SegmentFiles.add, []

    def stop(self, frames, lead):
        if self.done == 2 and not stopped:
            stopped.append(self.folder)
            raise KeyboardInterrupt
        add(self, frames, lead)

    monkeypatch.setattr(segment_files.SegmentFiles, "add", stop)
    assert run("stylize", output, *words) == 130
    assert run("stylize", output, *words) == 2
    assert "holds 2 finished segments of out.mp4; resume that run" in capsys.readouterr().err
    assert run("stylize", output, *words, "--seed", 4, "--resume") == 2
    assert "another job for out.mp4 (they differ in: --seed, settings)" in capsys.readouterr().err
    assert len(list(stopped[0].glob("*.mkv"))) == 2 and not output.exists()
    assert run("stylize", output, *words, "--resume", "--quality", 90) == 0
    assert list(tmp_path.iterdir()) == [output]
    assert np.array_equal(read_video(output).frames, read_video(restyled).frames)


def test_a_stopped_run_goes_on_in_the_type_it_chose(inputs, files, tmp_path, monkeypatch, capsys):
    """On some CPUs `--dtype auto` measures, and may find another type the next time."""
    output, words = tmp_path / "out.mp4", stylize_words(inputs, files, "--dtype", "auto")
    add, chosen, inner = segment_files.SegmentFiles.add, [], models_module.choose_dtype

    def choose(dtype, device):
        found = [torch.bfloat16, torch.float32][min(len(chosen), 1)]
        chosen.append(found if dtype == "auto" else inner(dtype, device))
        return chosen[-1]

    def stop(self, frames, lead):
        if self.done == 1 and len(chosen) == 1:
            raise KeyboardInterrupt
        add(self, frames, lead)

    monkeypatch.setattr(models_module, "choose_dtype", choose)
    monkeypatch.setattr(segment_files.SegmentFiles, "add", stop)
    assert run("stylize", output, *words) == 130
    assert run("stylize", output, *words, "--resume") == 0, capsys.readouterr().err
    assert chosen == [torch.bfloat16] * 2


def run_in(folder, words):
    os.chdir(folder)
    assert run(*words) == 0


def test_kills_at_random_moments_change_nothing(inputs, files, restyled, tmp_path):
    seed = random.SystemRandom().randrange(2**31)
    moments, words = random.Random(seed), stylize_words(inputs, files, "--resume")
    output, said = tmp_path / "out.mp4", tmp_path.with_suffix(".said")
    for least in (0, 2):  # segments that are finished when it is killed
        child = fork(run_in, tmp_path, ["stylize", output, *words], said=said)
        while child.is_alive() and len(list(tmp_path.glob("*/*.mkv"))) < least:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 2))
        child.kill()
        child.join()
    if not output.exists() or len(list(tmp_path.iterdir())) > 1:
        assert run("stylize", output, *words) == 0, f"seed {seed}: {said.read_text()}"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"], f"seed {seed}"
    frames, whole = (read_video(path).frames for path in (output, restyled))
    assert np.array_equal(frames, whole), f"seed {seed}"


def test_a_kill_after_the_result_appeared_is_no_failure(inputs, files, restyled, tmp_path, capsys):
    output, words = tmp_path / "out.mp4", stylize_words(inputs, files)
    remove = segment_files.SegmentFiles.remove
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_files.SegmentFiles, "remove", lambda self: self.close())
        assert run("stylize", output, *words) == 0
    written = output.stat().st_mtime_ns
    assert segment_files.SegmentFiles.remove is remove
    assert run("stylize", output, *words, "--resume") == 0
    assert output.stat().st_mtime_ns == written and list(tmp_path.iterdir()) == [output]
    assert run("stylize", output, *words, "--resume") == 2  # now it may be anybody's
    assert "exists already" in capsys.readouterr().err and list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--resume",), "belongs to --stream"),
        (("--shots", "none"), "belongs to --stream"),
        (("--stream", "--window-overlap", "3"), "at least 4 frames"),
        (("--stream", "--window", "8", "--window-overlap", "8"), "longer than that"),
        (("--stream", "--keep-alpha"), "--keep-alpha"),
        (("--stream", "--blend", "time"), "--style-by-shot"),
        (("--stream", "--speed", "draft", "--steps", "4"), "at least 8 steps"),
    ],
)
def test_options_that_contradict_are_refused(inputs, files, tmp_path, capsys, words, reason):
    output = tmp_path / "out.mp4"
    assert run("stylize", output, "--video", inputs / "film.mp4", *words, *arguments(files)) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_formats_and_inputs_are_refused(inputs, tmp_path, capsys):
    video = ("--video", inputs / "film.mp4")
    assert run("stylize", tmp_path / "out.gif", *video, "--stream") == 2
    assert run("stylize", tmp_path / "out.mp4", "--stream") == 2
    said = capsys.readouterr().err
    assert "--stream writes .mp4" in said and "--stream restyles a --video" in said


def test_where_the_whole_does_not_fit_the_refusal_names_stream(
    inputs, files, tmp_path, monkeypatch, capsys
):
    part, whole = (
        estimate.estimate_needs((n, 16, 32), (n, 16, 32), gpu=False, video=True).main
        for n in (9, 24)
    )
    free = whole - 1
    monkeypatch.setattr(estimate, "free_main_memory", lambda: free)
    output, video = tmp_path / "out.mp4", ("--video", inputs / "film.mp4")
    words = (*video, "--window", 9, "--window-overlap", 4, *arguments(files))
    assert run("stylize", output, *words) == 2
    assert "pass --stream or" in capsys.readouterr().err
    for ending, left in ((".gif", whole - 1), (".mp4", part - 1)):  # where that would not help
        free = left
        assert run("stylize", output.with_suffix(ending), *words) == 2
        said = capsys.readouterr().err
        assert "--size" in said and "--stream" not in said
    free = whole - 1

    def look(args, film):
        raise ConfigError("it is begun")

    monkeypatch.setattr("stylemaster_core.cli.film._look_through", look)
    assert run("stylize", output, *stylize_words(inputs, files)) == 2
    assert "it is begun" in capsys.readouterr().err
