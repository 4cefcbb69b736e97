"""Colour, shape and transparency of frames come out as players show them."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from stylemaster_core.data.clips import ClipConfig, load_clip
from stylemaster_core.data.frame_pixels import wide_to_bt709
from stylemaster_core.data.images import read_image, write_image
from stylemaster_core.data.samples import Sample
from stylemaster_core.data.timecode import later_timecode
from stylemaster_core.data.videos import probe_video, read_video, write_video
from stylemaster_core.errors import ConfigError, LayoutError

# Patches of a chart in SDR (sRGB), and a highlight twice as bright as white.
CHART = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
CHART += ((0, 0, 0), (128, 128, 128), (255, 128, 0), (64, 128, 192))
BT709_TO_BT2020 = np.array(
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)
PQ, HLG = 16, 18


def light_of(srgb):
    code = np.asarray(srgb) / 255
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def encoded(light, transfer):
    """PQ or HLG codes 0..1 of BT.2020 light in which 1 is 203 nits, by BT.2100's inverses."""
    nits = light * 203
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        power = (nits / 10000) ** m1
        return ((c1 + c2 * power) / (1 + c3 * power)) ** m2
    shown = nits / 1000
    luma = shown @ np.array([0.2627, 0.6780, 0.0593])
    scene = shown * np.where(luma > 0, luma, 1)[..., None] ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    high = a * np.log(np.maximum(12 * scene - b, 1e-9)) + c
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def hdr_chart(transfer):
    """uint16 [32, 256, 3], a patch every 32 pixels."""
    codes = encoded(light_of(CHART) @ BT709_TO_BT2020.T, transfer)
    row = np.repeat(np.rint(codes * 65535).clip(0, 65535).astype(np.uint16), 32, axis=0)
    return np.repeat(row[None], 32, axis=0)


def frame_of(codes, pix_fmt, *, matrix):
    """10-bit Y'CbCr, MPEG range, of 16-bit codes (BT.2100, table 9; BT.709).

    Not by FFmpeg's scaler: that of PyAV 17.1 writes BT.709 for BT.2020, unasked.
    """
    red, blue = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}[matrix]
    r, g, b, *alpha = np.moveaxis(codes / 65535, -1, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = [(b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)]
    step = 2 if "420" in pix_fmt else 1
    planes = [64 + 876 * luma, *(512 + 896 * part[::step, ::step] for part in chroma)]
    planes += [1023 * part for part in alpha]
    frame = av.VideoFrame(codes.shape[1], codes.shape[0], pix_fmt)
    frame.colorspace, frame.color_range = matrix, 1
    for plane, values in zip(frame.planes, planes, strict=True):
        lines = np.zeros((values.shape[0], plane.line_size // 2), np.uint16)
        lines[:, : values.shape[1]] = np.rint(values)
        plane.update(lines.tobytes())
    return frame


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_becomes_sdr(tmp_path, caplog, transfer):
    path = tmp_path / "hdr.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx265", rate=10)
        stream.width, stream.height, stream.pix_fmt = 256, 32, "yuv420p10le"
        stream.options = {"crf": "5", "x265-params": "log-level=none"}
        context = stream.codec_context
        context.color_primaries = context.colorspace = 9
        context.color_trc, context.color_range = transfer, 1
        frame = frame_of(hdr_chart(transfer), "yuv420p10le", matrix=9)
        frame.color_primaries, frame.color_trc = 9, transfer
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    pixels = read_video(path).frames[0]
    patches = pixels[16, 16::32].astype(int)
    # Beside a bright channel, rounding to 10 bits alone makes 13 of a dark one's 0 (PQ, green).
    bounds = np.where(np.asarray(CHART) < 64, 20, 8)
    assert (np.abs(patches - CHART) <= bounds).all(), patches.tolist()
    assert "converted to SDR" in caplog.text


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_highlights_keep_their_hue_and_order(transfer):
    orange = light_of((255, 128, 0))
    light = np.array([orange, 1.5 * orange, 3 * orange]) @ BT709_TO_BT2020.T
    codes = np.rint(encoded(light, transfer) * 65535).astype(np.uint16)
    shown = wide_to_bt709(codes[None], transfer, 9)[0].astype(int)
    assert shown[0, 0] < shown[1, 0] < shown[2, 0] <= 255
    assert np.abs(shown[:, 1] - 128).max() < 8  # clipping each channel would make it yellow
    ramp = np.linspace(0, 65535, 4096).astype(np.uint16)
    gray = wide_to_bt709(np.repeat(ramp[None, :, None], 3, -1), transfer, 9)[0, :, 0].astype(int)
    assert (np.diff(gray) >= 0).all() and gray[0] == 0 and gray[-1] >= 254


# Red, green, blue and white of each code of H.273's table 2, as x and y.
CHROMATICITIES = {
    1: ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290)),
}


def to_xyz(primaries):
    """Linear RGB to XYZ, as SMPTE RP 177 derives it."""
    *colours, white = [np.array([x / y, 1, (1 - x - y) / y]) for x, y in CHROMATICITIES[primaries]]
    matrix = np.stack(colours, axis=1)
    return matrix * np.linalg.solve(matrix, white)


def write_wide(path, codes, primaries, codec, pix_fmt):
    """One frame of 16-bit codes, tagged as SDR of some primaries."""
    matrix = 9 if primaries == 9 else 1
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *codes.shape[:2], pix_fmt
        if codec == "prores_ks":
            stream.options = {"profile": "4444"}
        else:
            stream.options = {"crf": "1"}
        context = stream.codec_context
        context.color_primaries, context.colorspace = primaries, matrix
        context.color_trc, context.color_range = 1, 1
        frame = frame_of(codes, pix_fmt, matrix=matrix)
        frame.color_primaries, frame.color_trc = primaries, 1
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def wide_chart(primaries):
    """The chart in codes of wider primaries; uint16 [32, 256, 3]."""
    light = light_of(CHART) @ np.linalg.solve(to_xyz(primaries), to_xyz(1)).T
    light = light.clip(0, 1)
    codes = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    row = np.repeat(np.rint(codes * 65535).astype(np.uint16), 32, axis=0)
    return np.repeat(row[None], 32, axis=0)


@pytest.mark.parametrize("primaries", [9, 12])
def test_wide_colours_without_hdr_become_bt709(tmp_path, caplog, primaries):
    path = tmp_path / "wide.mkv"
    write_wide(path, wide_chart(primaries), primaries, "libx264", "yuv444p10le")
    patches = read_video(path).frames[0][16, 16::32].astype(int)
    assert np.abs(patches - CHART).max() <= 4, patches.tolist()
    plain = np.rint(wide_chart(primaries)[16, 16::32] / 257)
    assert np.abs(plain - CHART).max() > 25, "without a conversion they are others"
    assert f"is {'BT.2020' if primaries == 9 else 'Display P3'}; its colours" in caplog.text


def test_wide_colours_keep_their_transparency(tmp_path):
    alpha = np.full((32, 256, 1), 65535, np.uint16)
    alpha[:, :32] = 0
    path = tmp_path / "wide.mov"
    codes = np.dstack([wide_chart(12), alpha])
    write_wide(path, codes, 12, "prores_ks", "yuva444p10le")
    clip, kept = read_video(path), read_video(path, keep_alpha=True)
    patches = clip.frames[0][16, 16::32].astype(int)
    assert np.abs(patches - ((255, 255, 255), *CHART[1:])).max() <= 8, patches.tolist()
    np.testing.assert_array_equal(kept.alpha[0], alpha[..., 0] >> 8)
    np.testing.assert_array_equal(kept.frames, clip.frames)


def write_tagged(path, frame, *, colorspace=1, codec="libx264", pix_fmt="yuv420p"):
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], pix_fmt
        stream.codec_context.colorspace = colorspace
        standard = "ITU601" if frame.shape[0] < 720 else "ITU709"
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = picture.reformat(format=pix_fmt, dst_colorspace=standard)
        picture.colorspace = colorspace
        output.mux(stream.encode(picture))
        output.mux(stream.encode(None))


@pytest.mark.parametrize("height", [480, 720])
def test_untagged_colours_follow_the_size(tmp_path, height):
    path = tmp_path / "untagged.mp4"
    frame = np.full((height, 64, 3), (200, 40, 90), np.uint8)
    write_tagged(path, frame, colorspace=2)
    with av.open(str(path)) as container:
        assert int(next(container.decode(video=0)).colorspace) == 2
    assert np.abs(read_video(path).frames[0].astype(int) - frame).max() <= 4


QUADRANTS = np.zeros((48, 64, 3), np.uint8)
QUADRANTS[:24, :32], QUADRANTS[:24, 32:] = (255, 0, 0), (0, 255, 0)
QUADRANTS[24:, :32], QUADRANTS[24:, 32:] = (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), QUADRANTS),
        ((-1, 0, 0, 1), QUADRANTS[:, ::-1]),
        ((1, 0, 0, -1), QUADRANTS[::-1]),
        ((-1, 0, 0, -1), QUADRANTS[::-1, ::-1]),
        ((0, 1, -1, 0), np.rot90(QUADRANTS, -1)),
        ((0, -1, 1, 0), np.rot90(QUADRANTS, 1)),
        ((0, 1, 1, 0), QUADRANTS.swapaxes(0, 1)),
        ((0, -1, -1, 0), QUADRANTS[::-1, ::-1].swapaxes(0, 1)),
    ],
)
def test_display_matrices(tmp_path, matrix, shown):
    path = tmp_path / "turned.mp4"
    write_video(path, QUADRANTS[None], fps=10, pixel_aspect=Fraction(2))
    set_matrix(path, matrix)
    clip = read_video(path)
    height, width = shown.shape[:2]
    assert clip.frames.shape[1:3] == (height, width)
    middles = (slice(height // 4, None, height // 2), slice(width // 4, None, width // 2))
    assert np.abs(clip.frames[0][middles].astype(int) - shown[middles]).max() <= 4
    turned = matrix[0] == 0
    assert (
        clip.pixel_aspect == probe_video(path).pixel_aspect == Fraction(2) ** (-1 if turned else 1)
    )


def set_matrix(path, matrix):
    """Overwrite the display matrix in the track header of an mp4."""
    data = bytearray(path.read_bytes())
    unity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    position = data.index(unity, data.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    data[position : position + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def test_a_matrix_of_other_angles_is_refused(tmp_path):
    path = tmp_path / "turned.mp4"
    write_video(path, QUADRANTS[None], fps=10)
    set_matrix(path, (1, 1, -1, 1))
    with pytest.raises(LayoutError, match="only quarters"):
        read_video(path)


def test_shape_of_pixels_is_kept_or_made_square(tmp_path):
    frames, aspect = QUADRANTS[None].repeat(2, 0), Fraction(64, 45)
    wide = round(64 * aspect)
    for name in ("a.mp4", "a.mov", "a.mkv"):
        write_video(tmp_path / name, frames, fps=10, pixel_aspect=aspect)
        clip = read_video(tmp_path / name)
        assert (clip.pixel_aspect, clip.frames.shape[1:3]) == (aspect, (48, 64)), name
    write_video(tmp_path / "b.mov", frames, fps=10, pixel_aspect=aspect, codec="prores")
    assert read_video(tmp_path / "b.mov").pixel_aspect == aspect
    for name in ("a.webm", "a.gif", "a.webp", "frames/%03d.png"):
        write_video(tmp_path / name, frames, fps=10, pixel_aspect=aspect)
        clip = read_video((tmp_path / name).parent if "%" in name else tmp_path / name)
        assert (clip.pixel_aspect, clip.frames.shape[1:3]) == (1, (48, wide)), name
    config = ClipConfig(sizes=((32, 64),), num_frames=1, fps=None)
    assert load_clip(Sample("a", tmp_path / "a.mp4", ""), config).picture.shape == (48, wide, 3)


HIDDEN = np.full((3, 48, 64, 3), (0, 255, 0), np.uint8)
HIDDEN[:, 16:32, 16:32] = (255, 0, 0)
OPACITY = np.zeros((3, 48, 64), np.uint8)
OPACITY[:, 16:32, 16:32] = 255
OPACITY[1, 40:44] = 255


def write_transparent(path):
    """A file whose transparent pixels hide green, straight through PyAV or Pillow."""
    if path.suffix in (".webp", ".png"):
        pictures = [Image.fromarray(np.dstack(pair)) for pair in zip(HIDDEN, OPACITY, strict=True)]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], lossless=True)
        return
    codec, pix_fmt = {
        ".mov": ("prores_ks", "yuva444p10le"),
        ".webm": ("libvpx-vp9", "yuva420p"),
    }[path.suffix]
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
        if codec == "prores_ks":
            stream.options = {"profile": "4444"}
        for pair in zip(HIDDEN, OPACITY, strict=True):
            frame = av.VideoFrame.from_ndarray(np.dstack(pair), format="rgba")
            output.mux(stream.encode(frame.reformat(format=pix_fmt)))
        output.mux(stream.encode(None))


@pytest.mark.parametrize("name", ["a.mov", "a.webm", "a.webp", "a.png"])
def test_transparency_is_put_on_white_or_kept(tmp_path, name):
    source = tmp_path / name
    write_transparent(source)
    clip, kept = read_video(source), read_video(source, keep_alpha=True)
    assert clip.alpha is None
    assert np.abs(clip.frames[:, 4, 4].astype(int) - 255).max() <= 3
    assert np.abs(clip.frames[:, 24, 24].astype(int) - (255, 0, 0)).max() <= 5
    np.testing.assert_array_equal(kept.frames, clip.frames)
    assert np.abs(kept.alpha.astype(int) - OPACITY).max() <= 3
    options = {"fps": 10, "alpha": kept.alpha, "quality": 100}
    for target in ("b.mov", "b.webm", "b.mkv", "b.webp", "frames/%d.png"):
        path = tmp_path / target
        write_video(path, kept.frames, **options)
        again = read_video(path.parent if "%" in target else path, keep_alpha=True)
        assert np.abs(again.alpha.astype(int) - kept.alpha).max() <= 8, target
        assert np.abs(again.frames[:, 4, 4].astype(int) - 255).max() <= 3
    with pytest.raises(ConfigError, match="transparent"):
        write_video(tmp_path / "c.mp4", kept.frames, **options)
    with pytest.raises(LayoutError, match="opacity"):
        write_video(tmp_path / "c.webm", kept.frames, fps=10, alpha=kept.alpha[:2])
    with pytest.raises(LayoutError, match="opacity"):
        write_video(tmp_path / "c.webm", kept.frames, fps=10, alpha=kept.alpha[:, :8])


def opacities(kind):
    """uint8 [4, 24, 32]."""
    y, x = np.mgrid[:24, :32]
    moving = [(y // 12 == i % 2) & (x // 16 == i // 2) for i in range(4)]
    return {
        "a border": np.repeat([(y > 5) & (y < 18) & (x > 7) & (x < 20)], 4, 0) * np.uint8(255),
        "what moves": np.stack(moving) * np.uint8(255),
        "half": np.repeat([np.where(x > 15, 128, 127)], 4, 0).astype(np.uint8),
        "steps": np.repeat([x * 8], 4, 0).astype(np.uint8),
        "ever less": np.stack([(x < 32 - 10 * i) * np.uint8(255) for i in range(4)]),
        "nothing at first": np.stack([(x < 10 * i) * np.uint8(255) for i in range(4)]),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["a border", "what moves", "half", "steps", "ever less", "nothing at first"]
)
def test_animations_are_as_transparent_as_they_were_made(tmp_path, kind):
    alpha = opacities(kind)
    levels = np.random.default_rng(0).choice([0, 90, 180, 255], (4, 6, 8, 3)).astype(np.uint8)
    frames = levels.repeat(4, 1).repeat(4, 2)
    for target, wanted, quality in (
        ("a.webp", alpha, 100),
        ("lossy.webp", alpha, 80),
        ("a.gif", np.where(alpha < 128, 0, 255), 100),
    ):
        write_video(tmp_path / target, frames, fps=10, alpha=alpha, quality=quality)
        again = read_video(tmp_path / target, keep_alpha=True)
        assert again.alpha is not None and again.fps == 10, target
        np.testing.assert_array_equal(again.alpha, wanted, err_msg=target)
        if quality == 100:
            seen = wanted == 255
            np.testing.assert_array_equal(again.frames[seen], frames[seen], err_msg=target)
        plain = read_video(tmp_path / target).frames
        assert (plain[wanted == 0] == 255).all(), "transparent is white"


def test_a_transparent_animation_of_one_picture_stays_transparent(tmp_path):
    alpha = np.repeat(opacities("a border")[:1], 3, 0)
    frames = np.full((3, 24, 32, 3), (200, 30, 90), np.uint8)
    for target in ("a.webp", "a.gif"):
        write_video(tmp_path / target, frames, fps=10, alpha=alpha, quality=100)
        again = read_video(tmp_path / target, keep_alpha=True)
        np.testing.assert_array_equal(again.alpha[0], alpha[0])
        assert again.frames[0, 10, 10].tolist() == [200, 30, 90]


def test_an_image_keeps_its_transparency_if_asked(tmp_path):
    pixels = np.dstack([HIDDEN[0], OPACITY[0]])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown = read_image(tmp_path / "a.png", keep_alpha=True)
    np.testing.assert_array_equal(shown[..., 3], OPACITY[0])
    assert (shown[0, 0, :3] == 255).all()
    write_image(tmp_path / "b.webp", shown[..., :3], alpha=shown[..., 3], quality=100)
    np.testing.assert_array_equal(read_image(tmp_path / "b.webp", keep_alpha=True), shown)
    assert read_image(tmp_path / "a.png").shape == (48, 64, 3)
    with pytest.raises(ConfigError, match="cannot be transparent"):
        write_image(tmp_path / "b.jpg", shown[..., :3], alpha=shown[..., 3])
    for quality in (20, 95):
        write_image(tmp_path / f"{quality}.jpg", demo_noise(), quality=quality)
    assert (tmp_path / "20.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size
    with pytest.raises(ConfigError, match="quality 0"):
        write_image(tmp_path / "c.jpg", demo_noise(), quality=0)


def demo_noise():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_animated_avif(tmp_path):
    pytest.importorskip("PIL._avif")
    pictures = [Image.new("RGB", (64, 48), (60 * index, 0, 0)) for index in range(4)]
    path = tmp_path / "a.avif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    clip = read_video(path)
    assert (clip.fps, clip.times_s, len(clip.frames)) == (25, None, 4)
    assert np.abs(clip.frames[:, 20, 20, 0].astype(int) - [0, 60, 120, 180]).max() <= 6


def test_pictures_of_other_numbers(tmp_path, caplog):
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(48, 0)
    expected = np.rint(ramp * 255)
    Image.fromarray(ramp).save(tmp_path / "f.tif")
    assert np.abs(read_image(tmp_path / "f.tif")[..., 0] - expected).max() <= 1
    assert not caplog.text
    Image.fromarray(ramp * 1000 - 500).save(tmp_path / "wide.tif")
    Image.fromarray((ramp * 65535).astype(np.int32)).save(tmp_path / "i.tif")
    for name in ("wide.tif", "i.tif"):
        caplog.clear()
        assert np.abs(read_image(tmp_path / name)[..., 0] - expected).max() <= 1
        assert "brightest white" in caplog.text
    holed = ramp.copy()
    holed[0, 0], holed[0, 1] = np.nan, np.inf
    Image.fromarray(holed).save(tmp_path / "nan.tif")
    assert np.abs(read_image(tmp_path / "nan.tif")[1:, :, 0] - expected[1:]).max() <= 1
    Image.fromarray(np.full((4, 4), 7, np.int32)).save(tmp_path / "flat.tif")
    assert (read_image(tmp_path / "flat.tif") == 0).all()


def gamma_profile(gamma):
    """An ICC profile of sRGB's primaries and another curve, out of Pillow's sRGB one."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    curve = struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256)) + b"\0\0"
    for index in range(count):
        place = 132 + 12 * index
        if data[place : place + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            data[place + 4 : place + 12] = struct.pack(">II", len(data), len(curve) - 2)
    data += curve
    data[:4] = struct.pack(">I", len(data))
    return bytes(data).replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))


def test_embedded_profiles_are_converted(tmp_path, caplog):
    gray = np.full((4, 4, 3), 128, np.uint8)
    profile = gamma_profile(1.0)
    expected = round(255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055))
    for name, mode in (("a.png", "RGB"), ("b.png", "RGBA"), ("c.png", "P"), ("d.tif", "RGB")):
        picture = Image.fromarray(gray)
        picture = picture.quantize(2) if mode == "P" else picture.convert(mode)
        picture.save(tmp_path / name, icc_profile=profile)
        assert np.abs(read_image(tmp_path / name).astype(int) - expected).max() <= 2, name
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(gray).save(tmp_path / "e.png", icc_profile=srgb)
    np.testing.assert_array_equal(read_image(tmp_path / "e.png"), gray)
    assert not caplog.text
    Image.fromarray(gray).save(tmp_path / "f.png", icc_profile=b"no profile")
    np.testing.assert_array_equal(read_image(tmp_path / "f.png"), gray)
    assert "taken for sRGB" in caplog.text


def test_formats_of_videos(tmp_path):
    frames = np.linspace(0, 255, 5 * 48 * 64 * 3).reshape(5, 48, 64, 3).astype(np.uint8)
    for codec, profile, error in (("prores", "HQ", 3), ("prores4444", "4444", 3)):
        path = tmp_path / f"{codec}.mov"
        write_video(path, frames, fps=24, codec=codec)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.profile) == ("prores", profile)
        clip = read_video(path)
        assert clip.fps == 24 and np.abs(clip.frames.astype(int) - frames).mean() < error
    times_s = np.array([0, 0.04, 0.08, 0.5, 0.54, 0.58])
    for name in ("a.gif", "a.webp"):
        done = []
        write_video(tmp_path / name, frames, fps=25, times_s=times_s, progress=done.append)
        clip = read_video(tmp_path / name)
        assert clip.times_s == pytest.approx(times_s) and done == [1, 2, 3, 4, 5]
        assert np.abs(clip.frames.astype(int) - frames).mean() < 12
    steps = np.arange(0, 240, 8, dtype=np.uint8)[:, None, None, None]
    write_video(tmp_path / "thirds.gif", steps.repeat(32, 1).repeat(32, 2).repeat(3, 3), fps=30)
    assert read_video(tmp_path / "thirds.gif").duration_s == pytest.approx(1, abs=2e-3)
    write_video(tmp_path / "frames" / "f_%04d.png", frames, fps=25, times_s=times_s)
    names = sorted(file.name for file in (tmp_path / "frames").iterdir())
    assert names == [f"f_{number:04}.png" for number in range(1, len(names) + 1)]
    assert len(names) == round(0.58 * 25)
    np.testing.assert_array_equal(read_video(tmp_path / "frames").frames[2:12], frames[[2] * 10])
    for name, options, words in [
        ("frames/%04d.png", {}, "holds something already"),
        ("new/%d_%d.png", {}, "a single number"),
        ("a.mp4", {"codec": "prores"}, "prores is written as .mov"),
        ("b.gif", {"codec": "h264"}, "none of .gif"),
        ("b.webp", {"quality": 101}, "quality 101"),
    ]:
        with pytest.raises(ConfigError, match=words):
            write_video(tmp_path / name, frames, fps=25, **options)
    assert not (tmp_path / "new").exists()


def test_timecode_and_date_are_kept(tmp_path):
    source, frames = tmp_path / "a.mov", np.zeros((10, 32, 32, 3), np.uint8)
    tags = {"creation_time": "2024-05-06T07:08:09.000000Z", "timecode": "01:02:03:20"}
    write_video(source, frames, fps=25, tags=tags)
    clip = read_video(source, start_frame=6)
    assert clip.tags == tags | {"timecode": "01:02:04:01"}
    for name in ("b.mov", "b.mp4", "b.mkv"):
        write_video(tmp_path / name, clip.frames, fps=25, tags=clip.tags)
        assert read_video(tmp_path / name).tags == clip.tags, name
    assert "timecode" not in read_video(source, fps=10).tags


@pytest.mark.parametrize(
    ("timecode", "frames", "fps", "later"),
    [
        ("00:00:59:29", 1, Fraction(30), "00:01:00:00"),
        ("00:00:59;29", 1, Fraction(30000, 1001), "00:01:00;02"),
        ("00:09:59;29", 1, Fraction(30000, 1001), "00:10:00;00"),
        ("00:00:00;00", 17982, Fraction(30000, 1001), "00:10:00;00"),
        ("00:00:59;59", 1, Fraction(60000, 1001), "00:01:00;04"),
        ("23:59:59:24", 1, Fraction(25), "00:00:00:00"),
        ("01:00:00:29", 1, Fraction(25), None),
        ("noon", 1, Fraction(25), None),
    ],
)
def test_timecodes_count_frames(timecode, frames, fps, later):
    assert later_timecode(timecode, frames, fps) == later
