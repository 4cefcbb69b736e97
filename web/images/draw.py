"""Draws the icon, the banner, the thumbnails of the workflows and the pictures of the help pages.

`python -m web.images.draw`, from the top of the repository. Everything is drawn or computed here:
inputs and intermediate pictures are real, results of a model are only ever drawn as an empty film.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stylemaster_core.data.content_shuffle import content_shuffle
from stylemaster_core.data.demo_scene import demo_clip, demo_styles
from stylemaster_core.data.gray_tile import gray_tile
from stylemaster_core.pipelines.pictures import contact_sheet

HERE = Path(__file__).parent
WORKFLOWS = HERE.parents[1] / "workflows"

NIGHT, INK, PAPER, SUN = (24, 27, 34), (58, 64, 78), (236, 232, 220), (255, 205, 92)
THUMBNAIL = (560, 400)
BANNER = (1260, 540)  # 21:9
ICON = 400
PROMPT = ("“a sailing boat crosses", "a calm bay at sunset”")

Point = tuple[float, float]


class Sheet:
    """A dark picture to draw on."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.image = Image.new("RGB", size, NIGHT)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, at: Point, words: str, size: int = 20, colour: tuple = PAPER) -> None:
        """Words, centred at a point."""
        self.draw.text(at, words, colour, ImageFont.load_default(size), anchor="mm")

    def picture(
        self, centre: Point, pixels: np.ndarray, size: tuple[int, int], label: str = ""
    ) -> None:
        """A framed picture with a label below."""
        left, top = round(centre[0] - size[0] / 2), round(centre[1] - size[1] / 2)
        box = (left - 3, top - 3, left + size[0] + 2, top + size[1] + 2)
        self.draw.rectangle(box, PAPER)
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        self.image.paste(picture, (left, top))
        self.text((centre[0], top + size[1] + 18), label)

    def film(self, centre: Point, size: tuple[int, int], label: str = "") -> None:
        """An empty strip of film with a play sign: a video that the model makes."""
        left, top = centre[0] - size[0] / 2, centre[1] - size[1] / 2
        self.draw.rounded_rectangle((left, top, left + size[0], top + size[1]), 8, INK)
        hole = size[1] / 12
        for x in np.linspace(left + 2 * hole, left + size[0] - 2 * hole, round(size[0] / 24)):
            for y in (top + 1.2 * hole, top + size[1] - 1.2 * hole):
                box = (x - hole / 2, y - hole / 2, x + hole / 2, y + hole / 2)
                self.draw.rounded_rectangle(box, 2, NIGHT)
        self.play(centre, size[1] / 5)
        self.text((centre[0], top + size[1] + 18), label)

    def play(self, centre: Point, radius: float) -> None:
        x, y = centre
        tip, back = x + radius, x - radius * 0.6
        self.draw.polygon([(back, y - radius), (back, y + radius), (tip, y)], SUN)

    def arrow(self, start: Point, end: Point) -> None:
        self.draw.line([start, end], SUN, 4)
        direction = np.subtract(end, start) / np.hypot(*np.subtract(end, start))
        side = np.array([-direction[1], direction[0]])
        base = np.array(end) - 12 * direction
        self.draw.polygon([tuple(p) for p in (end, base + 8 * side, base - 8 * side)], SUN)

    def bars(self, centre: Point, size: tuple[int, int], label: str = "") -> None:
        """Bars of different heights."""
        (x, y), (width, height) = centre, size
        step, bottom = width / 12, y + height / 2
        for number in range(12):
            left = x - width / 2 + number * step
            top = bottom - height * (0.55 + 0.3 * np.sin(2.1 * number))
            self.draw.rectangle((left, top, left + step * 0.7, bottom), SUN)
        self.text((x, bottom + 18), label)

    def file(self, centre: Point, label: str, kind: str = "style") -> None:
        """A sheet of paper with a folded corner."""
        x, y = centre
        outline = [(x - 45, y - 60), (x + 20, y - 60), (x + 45, y - 35), (x + 45, y + 60)]
        self.draw.polygon([*outline, (x - 45, y + 60)], PAPER)
        self.draw.polygon([(x + 20, y - 60), (x + 20, y - 35), (x + 45, y - 35)], INK)
        self.text((x, y), kind, 22, NIGHT)
        self.text((x, y + 78), label)

    def prompt(self, centre: Point) -> None:
        x, y = centre
        self.draw.rounded_rectangle((x - 120, y - 40, x + 120, y + 40), 10, INK)
        for line, words in enumerate(PROMPT):
            self.text((x, y - 14 + 28 * line), words)


def save_jpg(sheet: Sheet, name: str) -> None:
    """Write the thumbnail of a workflow."""
    sheet.image.save(WORKFLOWS / f"{name}.jpg", quality=82, optimize=True)


def tile_of(frames: np.ndarray) -> np.ndarray:
    """The gray tile of frames, uint8 [T, H, W, 3]."""
    tile = gray_tile(frames, *frames.shape[1:3], factor=8)
    return ((tile.permute(1, 2, 3, 0).numpy() + 1) * 127.5).round().astype(np.uint8)


def draw_thumbnails() -> None:
    """One picture for each workflow: what goes in, and what the model sees of it."""
    styles, clip = demo_styles(), demo_clip(5, 192, 288)
    frame, tile = clip[2], tile_of(clip)[2]
    square, wide = (132, 132), (174, 116)

    def sheet(title: str) -> Sheet:
        new = Sheet(THUMBNAIL)
        new.text((280, 34), title, 28, SUN)
        return new

    s = sheet("Text to video")
    s.picture((130, 140), styles["woodcut"], square, "style picture")
    s.prompt((140, 310))
    s.arrow((260, 160), (340, 205))
    s.arrow((280, 300), (340, 255))
    s.film((445, 230), (180, 120), "video")
    save_jpg(s, "text_to_video")

    for name, title, result in (
        ("video_to_video", "Video to video", "video, restyled"),
        ("image_restyle", "Restyle a photo", "photo, restyled"),
    ):
        s = sheet(title)
        s.picture((120, 135), frame, wide, result.split(",")[0])
        s.arrow((222, 135), (262, 135))
        s.picture((365, 135), tile, wide, "gray tile: its content")
        s.picture((120, 300), styles["mosaic"], (120, 120), "style picture")
        s.arrow((200, 300), (330, 300))
        s.draw.line([(460, 135), (487, 135)], SUN, 4)
        s.arrow((485, 135), (485, 240))
        if name == "video_to_video":
            s.film((440, 300), (180, 110), result)
        else:
            s.draw.rectangle((352, 245, 528, 355), outline=PAPER, width=3, fill=INK)
            s.text((440, 373), result)
        save_jpg(s, name)

    s = sheet("Tiny: restyle without downloads")
    s.picture((120, 130), frame, wide, "small video")
    s.picture((120, 300), styles["neon"], (120, 120), "style picture")
    s.arrow((222, 140), (320, 195))
    s.arrow((200, 290), (320, 245))
    s.film((430, 220), (180, 120), "without a graphics card")
    save_jpg(s, "tiny_video_to_video")

    s = sheet("Tiny: StyleCrafter")
    s.picture((120, 130), frame, wide, "small video")
    s.picture((120, 300), styles["mosaic"], (120, 120), "style picture")
    s.bars((320, 300), (120, 90), "strength in each layer")
    s.arrow((200, 300), (250, 300))
    s.arrow((222, 140), (330, 150))
    s.arrow((385, 250), (410, 215))
    s.film((440, 150), (190, 110))
    save_jpg(s, "stylecrafter_tiny_video")

    s = sheet("Two methods, side by side")
    s.picture((110, 130), frame, wide, "small video")
    s.picture((110, 300), styles["woodcut"], (120, 120), "style picture")
    for y, label in ((145, "StyleMaster"), (305, "StyleCrafter")):
        s.arrow((215, 155), (325, y - 10))
        s.arrow((190, 290), (325, y + 10))
        s.film((430, y), (180, 100), label)
    save_jpg(s, "two_methods_side_by_side")

    s = sheet("SDXL: a picture in a style")
    s.picture((130, 140), styles["neon"], square, "style picture")
    s.prompt((140, 310))
    s.arrow((215, 140), (345, 180))
    s.arrow((280, 300), (345, 255))
    s.draw.rectangle((360, 130, 520, 290), outline=PAPER, width=3, fill=INK)
    s.text((440, 310), "picture, by StyleCrafter")
    save_jpg(s, "sdxl_image_in_a_style")

    s = sheet("VideoCrafter: a video in a style")
    s.picture((130, 140), styles["woodcut"], square, "style picture")
    s.prompt((140, 310))
    s.arrow((215, 140), (345, 180))
    s.arrow((280, 300), (345, 255))
    s.film((445, 215), (180, 120), "by StyleCrafter")
    save_jpg(s, "stylecrafter_videocrafter")

    s = sheet("Two styles, one mask")
    both = np.concatenate([styles["mosaic"][:, :128], styles["neon"][:, 128:]], 1)
    mask = np.repeat(np.where(np.arange(288) < 144, 255, 0)[None, :, None], 192, 0)
    s.picture((110, 130), styles["mosaic"], (120, 120), "style 1")
    s.picture((110, 300), styles["neon"], (120, 120), "style 2")
    s.picture((280, 215), mask.repeat(3, 2).astype(np.uint8), (150, 100), "mask")
    s.arrow((365, 215), (392, 215))
    s.picture((475, 215), both, (150, 100), "where each acts")
    save_jpg(s, "two_styles_with_mask")
    s.image.quantize(128).save(HERE / "regions.png", optimize=True)

    s = sheet("Style on one object")
    masked = np.full((192, 288, 3), 16, np.uint8)
    masked[75:150, 112:164] = 255
    styled = np.array(frame)
    styled[75:150, 112:164] = styles["mosaic"][75:150, 112:164]
    s.picture((100, 130), frame, (150, 100), "clip")
    s.picture((100, 300), styles["mosaic"], (110, 110), "style picture")
    s.picture((280, 215), masked, (150, 100), "found by its name")
    s.arrow((365, 215), (392, 215))
    s.picture((475, 215), styled, (150, 100), "the clip around it")
    save_jpg(s, "style_on_one_object")

    s = sheet("Mix styles, keep the mixture")
    s.picture((110, 130), styles["woodcut"], (120, 120), "1.0")
    s.picture((110, 300), styles["neon"], (120, 120), "1.0")
    for y in (140, 300):
        s.arrow((185, y), (235, 205 + (y - 140) / 8))
    s.file((295, 215), "saved mixture")
    s.arrow((350, 215), (385, 215))
    s.film((470, 215), (150, 100), "video")
    save_jpg(s, "style_blend")

    s = sheet("A saved style")
    s.file((120, 140), "from models/stylemaster")
    s.prompt((140, 320))
    s.arrow((200, 160), (335, 215))
    s.arrow((280, 310), (335, 265))
    s.film((440, 240), (180, 120), "video")
    save_jpg(s, "saved_style")

    s = sheet("Motion scale: 0, -0.3, -1")
    s.picture((110, 220), styles["woodcut"], square, "style picture")
    for y, label in ((110, "0"), (215, "-0.3"), (320, "-1")):
        s.arrow((195, 220), (300, y))
        s.film((395, y), (160, 80), "")
        s.text((510, y), label, 26)
    save_jpg(s, "motion_scale_sweep")

    s = sheet("Long video, in windows")
    for i, picture in enumerate(demo_clip(7, 192, 288)):
        s.picture((62 + 73 * i, 150), picture, (66, 66))
    for i in range(3):
        left = 30 + 146 * i
        s.draw.rounded_rectangle((left, 110 - 4 * i, left + 210, 196 + 8 * i), 8, None, SUN, 3)
    s.text((280, 240), "overlapping windows of 81 frames")
    s.arrow((280, 260), (280, 288))
    s.film((280, 334), (500, 80))
    save_jpg(s, "long_video")

    s = sheet("Train a motion adapter")
    pictures = [*styles.values()]
    for y, picture in zip((110, 215, 320), pictures, strict=True):
        s.picture((75, y), picture, (80, 80))
        s.arrow((130, y), (165, y))
        for i in range(4):
            s.picture((205 + 26 * i, y), picture, (66, 66))
        s.arrow((330, y), (395, 215 + (y - 215) / 4))
    s.text((75, 382), "pictures")
    s.text((244, 382), "clips that stand still")
    s.file((465, 215), "motion adapter", "LoRA")
    save_jpg(s, "train_motion_adapter")


def draw_icon() -> Image.Image:
    """Three styles and a gray tile around a play sign."""
    s, styles = Sheet((ICON, ICON)), demo_styles(160)
    tile = tile_of(demo_clip(3, 160, 160))[1]
    pictures = [styles["woodcut"], styles["neon"], styles["mosaic"], tile]
    for number, pixels in enumerate(pictures):
        place = (34 + 172 * (number % 2), 34 + 172 * (number // 2))
        s.image.paste(Image.fromarray(pixels), place)
    s.draw.ellipse((130, 130, 270, 270), NIGHT)
    s.play((200, 200), 42)
    return s.image


def draw_banner() -> Image.Image:
    """Styles with their shuffles, the name, and a clip with its gray tile."""
    s, styles = Sheet(BANNER), demo_styles()
    for number, picture in enumerate(styles.values()):
        s.picture((105, 100 + 170 * number), picture, (140, 140))
        s.picture((265, 100 + 170 * number), content_shuffle(picture, seed=3), (140, 140))
    clip = demo_clip(3, 192, 288)
    for number, (frame, tile) in enumerate(zip(clip, tile_of(clip), strict=True)):
        s.picture((1000, 100 + 170 * number), frame, (200, 140))
        s.picture((1155, 100 + 170 * number), tile[:, 96:240], (100, 140))
    s.play((616, 130), 52)
    s.text((618, 255), "StyleMaster", 82, PAPER)
    s.text((618, 330), "videos in the style of a picture", 31, SUN)
    s.text((618, 378), "Wan 2.1 in ComfyUI", 27, PAPER)
    return s.image


def draw_help() -> None:
    """Pictures of the help pages."""
    styles, clip = demo_styles(), demo_clip(9, 192, 288)
    pairs = []
    for picture in styles.values():
        pairs += [picture, content_shuffle(picture, seed=3)]
    shuffles = Image.fromarray(contact_sheet([("", pairs)], 150)).crop((0, 18, 900, 18 + 148))
    shuffles.quantize(64).save(HERE / "shuffle.png", optimize=True)
    rows = [("", [clip[0], tile_of(clip)[0], clip[8], tile_of(clip)[8]])]
    tiles = Image.fromarray(contact_sheet(rows, 220)).crop((0, 18, 880, 18 + 145))
    tiles.quantize(128).save(HERE / "gray_tile.png")
    rows = [("reference", [styles["neon"]]), ("content", [*clip[::2]])]
    rows.append(("gray tile", [*tile_of(clip)[::2]]))
    Image.fromarray(contact_sheet(rows, 160)).quantize(128).save(HERE / "compare.png")


def main() -> None:
    """Draw everything."""
    draw_thumbnails()
    draw_icon().quantize(128).save(HERE / "icon.png", optimize=True)
    draw_banner().quantize(200).save(HERE / "banner.png", optimize=True)
    draw_help()


if __name__ == "__main__":
    main()
