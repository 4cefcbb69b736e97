import enum
import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from stylemaster_core.data import video_writing
from stylemaster_core.data.containers import video_stream
from stylemaster_core.data.videos import (
    VideoClip,
    as_fps,
    iter_video,
    probe_video,
    read_video,
    write_video,
)
from stylemaster_core.errors import ConfigError, LayoutError


def moving_square(num_frames, height=48, width=64):
    """Frames of a colour ramp with a bright square that moves right, on a dark left half."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(30, 200, height).astype(np.uint8)[:, None]
    frames[..., 2] = 90
    for index in range(num_frames):
        left = 4 + 2 * index
        frames[index, 8:24, left : left + 16] = (40, 220, 60)
    return frames


def write_with_audio(path, num_frames, fps, *, codec="aac", audio_s=1.0, rate=44100):
    """Write a video with a sine tone straight through PyAV, independent of write_video."""
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=fps)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = output.add_stream(codec, rate=rate)
        audio.codec_context.layout = "stereo"
        for frame in moving_square(num_frames):
            output.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(video.encode(None))
        tone = np.sin(np.arange(int(audio_s * rate)) * 2 * np.pi * 440 / rate) * 0.5
        sample_format = audio.codec_context.format.name
        for start in range(0, len(tone), 1024):
            piece = tone[start : start + 1024].astype(np.float32)
            packed = np.stack([piece, piece])
            frame = av.AudioFrame.from_ndarray(packed, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = rate, start
            for resampled in av.AudioResampler(sample_format, "stereo", rate).resample(frame):
                output.mux(audio.encode(resampled))
        output.mux(audio.encode(None))


def audio_of(path):
    """Return (codec, seconds, packet sizes, loudness) of the first audio stream."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        sizes = [packet.size for packet in container.demux(stream) if packet.size]
        codec, rate = stream.codec_context.name, stream.codec_context.sample_rate
    with av.open(str(path)) as container:
        samples = np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)
    return codec, samples.shape[-1] / rate, sizes, float(np.abs(samples).mean())


def test_video_with_audio_survives_reading_and_writing(tmp_path):
    source, target = tmp_path / "source.mp4", tmp_path / "target.mp4"
    write_with_audio(source, 24, 24, audio_s=1.0)
    clip = read_video(source)
    assert isinstance(clip, VideoClip)
    assert clip.frames.shape == (24, 48, 64, 3)
    assert clip.fps == 24
    assert clip.audio_from == source

    done = []
    write_video(target, clip.frames, fps=clip.fps, audio_from=source, progress=done.append)
    again = read_video(target)
    assert again.fps == clip.fps
    assert again.frames.shape == clip.frames.shape
    assert np.abs(again.frames.astype(int) - clip.frames).mean() < 3
    assert done == list(range(1, 25))
    codec, seconds, sizes, loudness = audio_of(target)
    source_codec, _, source_sizes, source_loudness = audio_of(source)
    assert codec == source_codec == "aac"
    # Copied, not encoded anew: the packets have the same sizes.
    assert len(sizes) >= len(source_sizes) - 1
    assert sizes == source_sizes[: len(sizes)]
    assert seconds == pytest.approx(1.0, abs=0.05)
    assert loudness == pytest.approx(source_loudness, rel=0.05)


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "mp2"), (".webm", "aac")])
def test_audio_is_encoded_anew_where_the_container_does_not_take_it(tmp_path, suffix, codec):
    source, target = tmp_path / "source.mkv", tmp_path / f"target{suffix}"
    write_with_audio(source, 12, 12, codec=codec, audio_s=3.0)
    clip = read_video(source)
    write_video(target, clip.frames, fps=clip.fps, audio_from=source)
    codec, seconds, _, loudness = audio_of(target)
    assert codec == {".mp4": "aac", ".webm": "opus"}[suffix]
    assert seconds == pytest.approx(1.0, abs=0.1)
    assert loudness > 0.1


def test_audio_encoded_anew_is_complete(tmp_path):
    source, target = tmp_path / "source.mkv", tmp_path / "target.mp4"
    write_with_audio(source, 12, 12, codec="mp2", audio_s=0.5)
    write_video(target, moving_square(12), fps=12, audio_from=source)
    assert 0.5 <= audio_of(target)[1] < 0.6


def test_audio_ends_with_the_video_and_begins_where_the_frames_do(tmp_path):
    source, target = tmp_path / "source.mp4", tmp_path / "target.mp4"
    write_with_audio(source, 40, 20, audio_s=2.0)
    clip = read_video(source, start_frame=10, max_frames=10)
    assert clip.start_s == 0.5
    write_video(
        target, clip.frames, fps=clip.fps, audio_from=clip.audio_from, audio_start_s=clip.start_s
    )
    _, seconds, sizes, _ = audio_of(target)
    assert seconds == pytest.approx(0.5, abs=0.08)
    source_sizes = audio_of(source)[2]
    position = ",".join(map(str, source_sizes)).find(",".join(map(str, sizes)))
    first_packet = ",".join(map(str, source_sizes))[:position].count(",")
    assert first_packet * 1024 / 44100 == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("capability", "asked"), [("AVX512", "asm=avx2"), ("AVX2", None)])
def test_x264_does_without_avx512(capability, asked, tmp_path, monkeypatch):
    """With it, now and then other bytes are made of the same frames (2 of 40 files differed)."""
    options, create = [], video_writing._video_stream

    def watched(*arguments):
        stream = create(*arguments)
        options.append(dict(stream.options))
        return stream

    monkeypatch.setattr(video_writing, "_video_stream", watched)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    write_video(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=6)
    assert options[0].get("x264-params") == asked


def test_start_and_length_choose_the_frames(tmp_path):
    path = tmp_path / "video.mp4"
    write_video(path, moving_square(13), fps=8)
    whole = read_video(path).frames
    np.testing.assert_array_equal(read_video(path, start_frame=4, max_frames=3).frames, whole[4:7])
    chunks = list(iter_video(path, chunk_frames=5))
    assert [len(chunk) for chunk in chunks] == [5, 5, 3]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    with pytest.raises(LayoutError, match="no frame from frame 13 on"):
        read_video(path, start_frame=13)
    with pytest.raises(ConfigError, match="max_frames 0"):
        read_video(path, max_frames=0)


def test_chunks_can_be_written_as_they_come(tmp_path):
    source, target = tmp_path / "a.mp4", tmp_path / "b.mp4"
    write_video(source, moving_square(7), fps=10)
    write_video(target, iter_video(source, chunk_frames=3), fps=10)
    assert probe_video(target).num_frames == 7


@pytest.mark.parametrize("size", [(47, 64), (48, 63), (35, 33)])
def test_odd_sizes_are_kept(tmp_path, size):
    path = tmp_path / "odd.mp4"
    frames = moving_square(5)[:, : size[0], : size[1]]
    write_video(path, frames, fps=Fraction(30000, 1001))
    clip = read_video(path)
    assert clip.frames.shape == frames.shape
    assert clip.fps == Fraction(30000, 1001)
    assert np.abs(clip.frames.astype(int) - frames).mean() < 2


@pytest.mark.parametrize("size", [(48, 64), (720, 1280)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_colours_survive(tmp_path, size, suffix):
    path = tmp_path / f"colours{suffix}"
    frames = np.empty((2, *size, 3), np.uint8)
    frames[:] = (200, 40, 90)
    write_video(path, frames, fps=16)
    with av.open(str(path)) as container:
        assert int(next(container.decode(video=0)).colorspace) == 1
    assert np.abs(read_video(path).frames.astype(int) - frames).max() <= 4


def turned(path, matrix):
    """Overwrite the display matrix in the track header of an mp4."""
    data = bytearray(path.read_bytes())
    unity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    position = data.index(unity, data.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    data[position : position + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("matrix", "quarters"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)]
)
def test_rotation_of_phones_is_undone(tmp_path, matrix, quarters):
    path = tmp_path / "phone.mp4"
    write_video(path, moving_square(3), fps=10)
    flat = read_video(path).frames
    turned(path, matrix)
    clip = read_video(path)
    np.testing.assert_array_equal(clip.frames, np.rot90(flat, quarters, axes=(1, 2)))
    info = probe_video(path)
    assert (info.height, info.width) == clip.frames.shape[1:3]


def test_probe_says_what_reading_finds(tmp_path):
    for name in ("video.mp4", "video.mkv"):  # Matroska does not store the number of frames
        write_with_audio(tmp_path / name, 10, 20, audio_s=0.5)
        info = probe_video(tmp_path / name)
        assert (info.num_frames, info.height, info.width, info.fps) == (10, 48, 64, 20)
        assert info.has_audio
        assert info.duration_s == pytest.approx(0.5)
    write_video(tmp_path / "silent.mp4", moving_square(4), fps=20)
    assert not probe_video(tmp_path / "silent.mp4").has_audio


def test_variable_frame_rate_reads_at_the_average(tmp_path):
    path = tmp_path / "vfr.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame, time in zip(moving_square(4), (0, 3, 5, 20), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 30)
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    clip = read_video(path)
    assert len(clip.frames) == 4
    assert 0 < clip.fps < 31


def test_files_that_are_no_videos_are_refused(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video" * 50)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    whole = tmp_path / "whole.mp4"
    write_video(whole, moving_square(20), fps=10)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as output:
        stream = output.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((2, 1024), np.float32), format="fltp", layout="stereo"
        )
        silence.sample_rate = 44100
        output.mux(stream.encode(silence))
        output.mux(stream.encode(None))
    for path, words in [
        (text, "cannot be read as a video"),
        (empty, "empty"),
        (cut, "damaged"),
        (sound, "no video stream"),
        (tmp_path / "missing.mp4", "no file or folder"),
        (tmp_path, "change size|holds no images"),
    ]:
        with pytest.raises(LayoutError, match=words):
            read_video(path)
        with pytest.raises(LayoutError, match=words):
            probe_video(path)


def test_a_video_cut_short_is_reported(tmp_path, caplog):
    path = tmp_path / "fast.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
        for frame in noise:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    path.write_bytes(data[: len(data) * 6 // 10])
    try:
        clip = read_video(path)
    except LayoutError as error:
        assert "damaged" in str(error)
    else:
        assert len(clip.frames) < 20
        assert "announces 20 frames" in caplog.text


def test_animations_images_and_folders_are_videos(tmp_path):
    frames = moving_square(4)
    pictures = [Image.fromarray(frame) for frame in frames]
    webp = tmp_path / "animated.webp"
    pictures[0].save(webp, save_all=True, append_images=pictures[1:], duration=125, lossless=True)
    clip = read_video(webp)
    assert clip.fps == 8
    assert clip.audio_from is None
    np.testing.assert_array_equal(clip.frames, frames)
    gif = tmp_path / "animated.gif"
    pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=100)
    assert read_video(gif).frames.shape == frames.shape
    assert probe_video(gif).fps == 10
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, picture in zip((1, 2, 10, 11), pictures, strict=True):
        picture.save(folder / f"frame_{index}.png")
    (folder / "notes.txt").write_text("not a frame")
    np.testing.assert_array_equal(read_video(folder).frames, frames)
    assert probe_video(folder).num_frames == 4
    assert read_video(folder / "frame_2.png").frames.shape == (1, 48, 64, 3)
    pictures[0].crop((0, 0, 10, 10)).save(folder / "frame_3.png")
    with pytest.raises(LayoutError, match=r"change size from \[48, 64\] to \[10, 10\]"):
        read_video(folder)


def test_one_frame_is_written_as_an_image(tmp_path):
    frames = moving_square(1)
    write_video(tmp_path / "still.png", frames, fps=16)
    np.testing.assert_array_equal(read_video(tmp_path / "still.png").frames, frames)
    with pytest.raises(ConfigError, match="one frame"):
        write_video(tmp_path / "stills.png", moving_square(2), fps=16)


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path):
    path = tmp_path / "video.mp4"
    write_video(path, moving_square(2), fps=16)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        write_video(path, moving_square(3), fps=16)
    assert path.read_bytes() == before

    def broken():
        yield moving_square(2)
        yield moving_square(2)[:, :20]

    with pytest.raises(LayoutError, match="change size"):
        write_video(path, broken(), fps=16, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]
    write_video(path, moving_square(3), fps=16, overwrite=True)
    assert probe_video(path).num_frames == 3


def test_bad_arguments_are_refused(tmp_path):
    frames = moving_square(2)
    with pytest.raises(ConfigError, match="no video is written as '.avi'"):
        write_video(tmp_path / "video.avi", frames, fps=16)
    with pytest.raises(ConfigError, match="crf 60"):
        write_video(tmp_path / "video.mp4", frames, fps=16, crf=60)
    with pytest.raises(ConfigError, match="frames per second"):
        write_video(tmp_path / "video.mp4", frames, fps=0)
    with pytest.raises(LayoutError, match="float32"):
        write_video(tmp_path / "video.mp4", frames.astype(np.float32), fps=16)
    with pytest.raises(LayoutError, match="empty"):
        write_video(tmp_path / "video.mp4", frames[:0], fps=16)
    with pytest.raises(LayoutError, match="empty"):
        write_video(tmp_path / "video.mp4", iter([]), fps=16)
    with pytest.raises(LayoutError, match="no file or folder"):
        write_video(tmp_path / "video.mp4", frames, fps=16, audio_from=tmp_path / "no.mp4")
    assert list(tmp_path.iterdir()) == []
    assert as_fps(23.976023976) == Fraction(24000, 1001)


@pytest.mark.parametrize("kind", [enum.Flag, enum.IntFlag])  # of older and newer PyAV
def test_a_cover_picture_is_no_video(kind, monkeypatch):
    disposition = kind("Disposition", {"default": 1, "attached_pic": 0x400})
    monkeypatch.setattr("av.stream.Disposition", disposition)
    flags = disposition.default | disposition.attached_pic, disposition.default
    cover, film = (SimpleNamespace(disposition=flag, codec_context=object()) for flag in flags)
    streams = SimpleNamespace(video=[cover, film])
    assert video_stream(SimpleNamespace(streams=streams), Path("clip.mp4")) is film
