"""Videos cut short at any place: a frame less than the file says is refused or reported."""

from __future__ import annotations

import logging
from pathlib import Path

import av
import numpy as np
from hypothesis import strategies as st

from stylemaster_core.data.videos import read_video, write_video
from stylemaster_core.errors import StyleMasterError
from tests.fuzz.attack import Endpoint, Kind, require

FRAMES = 40
PLACES = 60
FILES = ("mkv", "webm", "mp4", "mp4, index first")


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.said += record.getMessage() + "\n"


def write_whole(folder: Path, kind: str) -> bytes:
    """A short clip of one of `FILES`."""
    ending = kind.partition(",")[0]
    texture = np.random.default_rng(0).integers(0, 256, (48, 64 + 4 * FRAMES, 3)).astype(np.uint8)
    frames = np.stack([texture[:, 4 * index :][:, :64] for index in range(FRAMES)])
    path = folder / f"whole.{ending}"
    write_video(path, frames, fps=24)
    if ending != kind:
        path = _with_index_first(path)
    require(len(read_video(path).frames) == FRAMES, "the whole file is not whole")
    return path.read_bytes()


def _with_index_first(source: Path) -> Path:
    target = source.with_name("index_first.mp4")
    options = {"movflags": "faststart"}
    with av.open(str(source)) as read, av.open(str(target), "w", options=options) as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)
    data = target.read_bytes()
    require(data.index(b"moov") < data.index(b"mdat"), "the index is not first")
    return target


def play_cut(whole: bytes, place: int, folder: Path, kind: str) -> str:
    """Read a file that is cut at `place` of `PLACES` + 1 parts of its bytes."""
    path = folder / f"cut.{kind.partition(',')[0]}"
    path.write_bytes(whole[: len(whole) * place // (PLACES + 1)])
    logger, listener = logging.getLogger("stylemaster"), _Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    try:
        found = len(read_video(path).frames)
    except StyleMasterError as error:
        require(path.name in str(error), f"the file is not named: {error}")
        return "refused"
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
    if found == FRAMES:
        return "whole"
    require("may be cut short" in listener.said, f"{found} of {FRAMES} frames without a word")
    require(path.name in listener.said, f"the file is not named: {listener.said}")
    return "reported"


def _endpoint(kind: str) -> Endpoint:
    return Endpoint(
        st.sampled_from(range(1, PLACES + 1)),
        lambda whole, place, folder: play_cut(whole, place, folder, kind),
        lambda folder: write_whole(folder, kind),
    )


KIND = Kind(
    "cuts",
    {kind: _endpoint(kind) for kind in FILES},
    long_cases=PLACES * len(FILES),
    batch=PLACES,  # or places of an earlier batch would come again
)
