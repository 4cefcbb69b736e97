"""Frames and sound keep their own times from a file to a file, whatever holds them."""

import logging
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from stylemaster_core.data.clips import ClipConfig, load_clip, pick_frames
from stylemaster_core.data.samples import Sample
from stylemaster_core.data.sound import read_sound
from stylemaster_core.data.timing import Timing, at_rate, pick_at_rate, steady_fps, timing_of
from stylemaster_core.data.videos import probe_video, read_video, write_video
from stylemaster_core.errors import LayoutError

RATE = 48000
FORMATS = (".mp4", ".mov", ".mkv", ".webm")
# 15 frames at 30 a second, then 5 at 5: flashes and beeps at 0.4 and 1.1 s, in all 1.5 s.
VARYING_MS = [round(index * 100 / 3) for index in range(15)] + [500 + 200 * n for n in range(5)]
FLASHES_S = (0.4, 1.1)


def beeping(duration_s, beeps_s, rate=RATE):
    samples = np.zeros(round(duration_s * rate), np.float32)
    tone = 0.5 * np.sin(2 * np.pi * 880 * np.arange(rate // 20) / rate)
    for beep_s in beeps_s:
        start = round(beep_s * rate)
        samples[start : start + len(tone)] = tone[: len(samples) - start]
    return samples


def write_clip(path, times_ms, flashes_s, sounds, *, audio="pcm_s16le", rate=RATE):
    """Write black frames with white ones, and pieces of sound: (start in seconds, samples)."""
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=30)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        sound = output.add_stream(audio, rate=rate, layout="mono") if sounds else None
        for time_ms in times_ms:
            flash = any(abs(time_ms / 1000 - time_s) < 1e-3 for time_s in flashes_s)
            pixels = np.full((48, 64, 3), 255 if flash else 0, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        for start_s, samples in sounds:
            context = sound.codec_context
            resampler = av.AudioResampler(context.format, "mono", rate, context.frame_size or 1024)
            first = round(start_s * rate)
            block = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            block.sample_rate, block.time_base, block.pts = rate, Fraction(1, rate), first
            for frame in (*resampler.resample(block), *resampler.resample(None)):
                frame.pts, frame.time_base = first, Fraction(1, rate)
                first += frame.samples
                output.mux(sound.encode(frame))
        if sound is not None:
            output.mux(sound.encode(None))


def flashes_of(path):
    """Times at which white frames begin, and when the last frame ends."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    bright = [frame.to_ndarray(format="gray").mean() > 128 for frame in frames]
    starts = [
        frame.time
        for index, frame in enumerate(frames)
        if bright[index] and not (index and bright[index - 1])
    ]
    return starts, frames[-1].time + float(frames[-1].duration * frames[-1].time_base)


def beeps_of(path):
    """Times at which beeps begin, and when the sound ends."""
    sound = read_sound(path)
    loud = np.flatnonzero(np.abs(sound.samples).max(0) > 0.1) / sound.sample_rate
    starts = loud[np.append(True, np.diff(loud) > 0.1)] if len(loud) else loud
    return starts.tolist(), sound.samples.shape[1] / sound.sample_rate


def rewrite(source, target, **cut):
    clip = read_video(source, **cut)
    write_video(
        target,
        clip.frames,
        fps=clip.fps,
        times_s=clip.times_s,
        audio_from=clip.audio_from,
        audio_start_s=clip.start_s,
    )
    return clip


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_varying_rate_is_kept(tmp_path, suffix):
    source, target = tmp_path / "source.mkv", tmp_path / f"target{suffix}"
    write_clip(source, VARYING_MS, FLASHES_S, [(0, beeping(1.5, FLASHES_S))])
    clip = rewrite(source, target)
    assert clip.times_s == pytest.approx([*np.array(VARYING_MS) / 1000, 1.5], abs=1e-3)
    starts, _ = flashes_of(target)
    assert starts == pytest.approx(FLASHES_S, abs=2e-3)
    assert read_video(target).duration_s == pytest.approx(1.5, abs=0.01)
    beeps, end_s = beeps_of(target)
    assert beeps == pytest.approx(FLASHES_S, abs=5e-3)
    assert end_s == pytest.approx(1.5, abs=0.03)
    assert len(read_video(target).frames) == len(VARYING_MS)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_cut_of_a_varying_rate_begins_where_it_should(tmp_path, suffix):
    source, target = tmp_path / "source.mkv", tmp_path / f"target{suffix}"
    write_clip(source, VARYING_MS, FLASHES_S, [(0, beeping(1.5, FLASHES_S))])
    clip = rewrite(source, target, start_frame=9, max_frames=10)
    assert clip.start_s == pytest.approx(0.3, abs=1e-3)
    assert clip.duration_s == pytest.approx(1.0, abs=2e-3)  # until the frame that was left out
    assert flashes_of(target)[0] == pytest.approx([0.1, 0.8], abs=2e-3)
    beeps, end_s = beeps_of(target)
    assert beeps == pytest.approx([0.1, 0.8], abs=5e-3)
    assert end_s == pytest.approx(1.0, abs=0.03)


def test_a_varying_rate_is_resampled_in_time(tmp_path):
    source = tmp_path / "source.mkv"
    write_clip(source, VARYING_MS, FLASHES_S, [(0, beeping(1.5, FLASHES_S))])
    whole = read_video(source)
    for fps in (30, 10):
        clip = read_video(source, fps=fps)
        assert clip.times_s is None and clip.fps == fps and len(clip.frames) == 1.5 * fps
        bright = clip.frames.mean((1, 2, 3)) > 128
        starts = np.flatnonzero(bright & ~np.append(False, bright[:-1])) / fps
        assert starts == pytest.approx(FLASHES_S, abs=1e-3)
        picked = pick_at_rate(Timing(whole.fps, whole.times_s), 20, Fraction(fps))
        np.testing.assert_array_equal(whole.frames[picked], clip.frames)
    part = read_video(source, fps=30, start_frame=12, max_frames=3)
    np.testing.assert_array_equal(part.frames, read_video(source, fps=30).frames[12:15])
    assert part.start_s == pytest.approx(0.4)


def test_a_constant_rate_stays_one_however_its_times_are_rounded(tmp_path):
    for fps in (Fraction(24000, 1001), Fraction(30), Fraction(60000, 1001)):
        for suffix in FORMATS:
            path = tmp_path / f"video{suffix}"
            write_video(path, np.zeros((30, 32, 32, 3), np.uint8), fps=fps, overwrite=True)
            clip = read_video(path)
            assert (clip.fps, clip.times_s) == (fps, None), suffix
            assert read_video(path, start_frame=3).start_s == float(3 / fps)
            assert probe_video(path).times_s is None
    resampled = read_video(path, fps=30)
    assert len(resampled.frames) == 15


def test_holds_of_an_animation_are_kept(tmp_path):
    durations_ms = [40, 40, 40, 1000, 40]
    pictures = [Image.new("RGB", (32, 24), (60 * index, 0, 0)) for index in range(5)]
    for name in ("held.gif", "held.webp", "held.png"):
        path = tmp_path / name
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations_ms)
        clip = read_video(path)
        assert clip.times_s == pytest.approx(np.cumsum([0, *durations_ms]) / 1000)
        assert clip.duration_s == pytest.approx(1.16)
        write_video(tmp_path / "out.mp4", clip.frames, fps=clip.fps, times_s=clip.times_s)
        assert read_video(tmp_path / "out.mp4").times_s == pytest.approx(clip.times_s)
        (tmp_path / "out.mp4").unlink()
        info = probe_video(path)
        assert info.duration_s == pytest.approx(1.16) and info.num_frames == 5


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("container", "audio"), [(".mp4", "aac"), (".mkv", "pcm_s16le")])
def test_sound_that_begins_late_stays_late(tmp_path, container, audio, suffix):
    source, target = tmp_path / f"source{container}", tmp_path / f"target{suffix}"
    late = beeping(1.0, [0.3])
    write_clip(source, range(0, 1500, 40), [0.8], [(0.5, late)], audio=audio)
    rewrite(source, target)
    assert beeps_of(target)[0] == pytest.approx([0.8], abs=5e-3)
    assert flashes_of(target)[0] == pytest.approx([0.8], abs=2e-3)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("audio", ["aac", "pcm_s16le"])
def test_a_gap_in_the_sound_stays_a_gap(tmp_path, audio, suffix):
    source, target = tmp_path / "source.mkv", tmp_path / f"target{suffix}"
    pieces = [(0, beeping(0.4, [0.2])), (0.8, beeping(0.7, [0.2]))]
    write_clip(source, range(0, 1500, 40), [0.2, 1.0], pieces, audio=audio)
    rewrite(source, target)
    assert beeps_of(target)[0] == pytest.approx([0.2, 1.0], abs=5e-3)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_cut_within_a_frame_of_sound_is_exact(tmp_path, suffix):
    source, target = tmp_path / "source.mkv", tmp_path / f"target{suffix}"
    write_clip(source, range(0, 1500, 40), [], [(0, beeping(1.5, [0.6]))], audio="mp2")
    rewrite(source, target, start_frame=13)
    assert beeps_of(target)[0] == pytest.approx([0.6 - 0.52], abs=2e-3)
    part = read_sound(source, start_s=0.52, end_s=0.72)
    assert part.samples.shape == (1, round(0.2 * RATE))
    whole = read_sound(source).samples
    np.testing.assert_array_equal(
        part.samples, whole[:, round(0.52 * RATE) :][:, : len(part.samples[0])]
    )
    longer = read_sound(source, start_s=1.4, end_s=2.0)
    assert longer.samples.shape == (1, round(0.6 * RATE))
    assert not longer.samples[:, RATE // 4 :].any()


def test_sound_of_a_rate_that_the_encoder_lacks_is_resampled(tmp_path):
    source = tmp_path / "source.mov"
    sound = beeping(1.0, [0.5], rate=192000)
    write_clip(source, range(0, 1000, 40), [], [(0, sound)], audio="pcm_s24le", rate=192000)
    for suffix, rate in ((".mp4", 48000), (".webm", 48000), (".mkv", 48000), (".mov", 192000)):
        target = tmp_path / f"target{suffix}"
        rewrite(source, target)
        assert read_sound(target).sample_rate == rate
        assert beeps_of(target)[0] == pytest.approx([0.5], abs=5e-3)


def test_sound_without_pictures_to_it_and_none(tmp_path):
    source = tmp_path / "silent.mkv"
    write_clip(source, range(0, 200, 40), [], [])
    assert read_sound(source) is None
    with pytest.raises(LayoutError, match="cannot be read"):
        (tmp_path / "text.mp4").write_text("no sound" * 100)
        read_sound(tmp_path / "text.mp4")


def test_times_that_do_not_fit_are_refused(tmp_path):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    for times_s, words in [
        ([0, 1, 2], "more frames than"),
        ([0, 1, 2, 3, 4], "3 frames, but times for 4"),
        ([0, 1, 1, 2], "do not grow"),
        ([0, 1, float("nan"), 2], "seconds"),
    ]:
        with pytest.raises(LayoutError, match=words):
            write_video(tmp_path / "video.mp4", frames, fps=10, times_s=np.array(times_s))
    assert list(tmp_path.iterdir()) == []


def test_training_clips_follow_the_time(tmp_path):
    source = tmp_path / "source.mkv"
    write_clip(source, VARYING_MS, FLASHES_S, [(0, beeping(1.5, FLASHES_S))])
    sample = Sample("one", source, "")
    config = ClipConfig(sizes=((48, 64),), num_frames=13, fps=10.0)
    bright = load_clip(sample, config).frames.mean((1, 2, 3)) > 128
    assert np.flatnonzero(bright).tolist() == [4, 11, 12]


def test_a_container_without_times_keeps_its_rate(tmp_path):
    path = tmp_path / "video.avi"  # with frames that are decoded in another order
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
        for frame in noise:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    clip = read_video(path)
    assert (clip.fps, clip.times_s, len(clip.frames)) == (25, None, 12)
    np.testing.assert_array_equal(read_video(path, fps=50).frames, clip.frames.repeat(2, 0))
    assert timing_of([0, 0.2, 0.1], 0.1, [Fraction(25)], 1e-3) == Timing(Fraction(25))


def test_rates_of_varying_times():
    times_s = np.array([*np.array(VARYING_MS) / 1000, 1.5])
    assert steady_fps(times_s) == 30
    assert steady_fps(np.cumsum([0, 0.04, 0.04, 1, 0.04])) == 25
    assert timing_of([0, 0.1, 0.2], 0.1, [Fraction(30)], 1e-3).fps == 10
    assert timing_of([0, 0.1, 0.3], 0.1, [Fraction(10)], 1e-3).times_s == pytest.approx(
        [0, 0.1, 0.3, 0.4]
    )
    assert list(at_rate(iter([]), Fraction(30), gap_s=1)) == []
    constant = pick_at_rate(Timing(Fraction(30)), 90, Fraction(16))
    assert constant.tolist() == pick_frames(48, Fraction(30), 16.0)


def test_a_matroska_file_that_was_cut_is_reported(tmp_path, caplog):
    whole = tmp_path / "whole.mkv"
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    write_video(whole, noise, fps=10)
    data = whole.read_bytes()
    cut = tmp_path / "cut.mkv"
    for share in (0.3, 0.6, 0.9):
        cut.write_bytes(data[: int(len(data) * share)])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "stylemaster"):
            assert len(read_video(cut).frames) < 40
        assert "may be cut short" in caplog.text, share
    caplog.clear()
    read_video(whole)
    assert not caplog.text
