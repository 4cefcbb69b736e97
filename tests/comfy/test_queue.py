"""`stylemaster queue` drives two real servers, one of which is killed half-way."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from stylemaster_core.cli import queue as queue_cli
from tests.comfy.server import Checkout, ComfyServer

SIZE = 1024
INVERT = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "none.png"}},
    "2": {
        "class_type": "ImageScale",
        "inputs": {
            "image": ["1", 0],
            "upscale_method": "nearest-exact",
            "width": SIZE,
            "height": SIZE,
            "crop": "disabled",
        },
    },
    "3": {"class_type": "ImageInvert", "inputs": {"image": ["2", 0]}},
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
}
COPY_VIDEO = {
    "1": {"class_type": "LoadVideo", "inputs": {"file": "none.mp4"}},
    "2": {
        "class_type": "SaveVideo",
        "inputs": {"video": ["1", 0], "filename_prefix": "v", "format": "auto", "codec": "auto"},
    },
}

RunQueue = Callable[..., int]


@pytest.fixture(scope="module")
def two_servers(
    comfy_checkout: Checkout, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ComfyServer]]:
    folder = tmp_path_factory.mktemp("queue")
    (folder / "models").mkdir()
    servers = [ComfyServer(comfy_checkout, folder / str(n), folder / "models") for n in range(2)]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(ComfyServer.start, servers))
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.fixture
def run_queue(tmp_path: Path) -> RunQueue:
    """Run the command on a workflow; results go to `tmp_path / "out"`."""

    def run(workflow: dict[str, Any], servers: list[ComfyServer], *options: str | Path) -> int:
        (tmp_path / "w.json").write_text(json.dumps(workflow))
        parser = argparse.ArgumentParser()
        queue_cli.add_parser(parser.add_subparsers())
        words = [str(option) for option in options]
        words += [word for server in servers for word in ("--server", server.url)]
        out = str(tmp_path / "out")
        args = parser.parse_args(["queue", str(tmp_path / "w.json"), "--out", out, *words])
        return args.run(args)

    return run


def journal(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "out" / "queue.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def styles_in(folder: Path, count: int) -> dict[str, np.ndarray]:
    """Images of noise, so that saving the result takes a while; name -> pixels."""
    folder.mkdir()
    images: dict[str, np.ndarray] = {}
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        images[f"s{number}"] = pixels
        Image.fromarray(pixels).save(folder / f"s{number}.png", compress_level=0)
    return images


def test_a_video_and_failures(
    two_servers: list[ComfyServer],
    run_queue: RunQueue,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    video = tmp_path / "clip.mp4"
    with av.open(video, "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(8))
        stream.width = stream.height = 64
        for level in (0, 100, 200):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert run_queue(COPY_VIDEO, two_servers, "--videos", video) == 0
    with av.open(tmp_path / "out" / "clip_1.mp4") as container:
        assert len(list(container.decode(video=0))) == 3

    (tmp_path / "broken.png").write_bytes(b"no image")
    capsys.readouterr()
    assert run_queue(INVERT, two_servers, "--styles", tmp_path / "broken.png") == 1
    assert "node 1 (LoadImage)" in capsys.readouterr().out
    wrong = ["--set", "2.upscale_method=nonsense"]
    assert run_queue(INVERT, two_servers, "--styles", tmp_path / "broken.png", *wrong) == 1
    assert "node 2 (ImageScale): Value not in list" in capsys.readouterr().out


def test_one_of_two_servers_is_killed(
    two_servers: list[ComfyServer], run_queue: RunQueue, tmp_path: Path
) -> None:
    images = styles_in(tmp_path / "styles", 8)
    doomed = two_servers[1]
    codes: list[int] = []
    options = ["--styles", tmp_path / "styles", "--give-up", "2"]
    thread = threading.Thread(target=lambda: codes.append(run_queue(INVERT, two_servers, *options)))
    thread.start()
    while thread.is_alive():
        events = [r["event"] for r in journal(tmp_path) if r.get("server") == doomed.url]
        if "done" in events and events[-1] == "submitted":
            assert doomed.process is not None
            doomed.process.kill()
            break
        time.sleep(0.005)
    thread.join(60)
    assert codes == [0]

    count = Counter((record["event"], record["job"]) for record in journal(tmp_path))
    assert sum(event == "lost" for event, _ in count) == 1
    assert [n for (event, _), n in count.items() if event == "done"] == [1] * 8
    results = {path.name: path for path in (tmp_path / "out").glob("*.png")}
    assert sorted(results) == [f"{name}_1.png" for name in images]
    for name, pixels in images.items():
        result = np.asarray(Image.open(results[f"{name}_1.png"]), np.int16)
        assert np.abs(result - (255 - pixels.astype(np.int16))).max() <= 1

    before = len(journal(tmp_path))
    assert run_queue(INVERT, two_servers[:1], *options) == 0
    assert len(journal(tmp_path)) == before
