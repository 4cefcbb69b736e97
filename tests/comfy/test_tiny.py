"""stylemaster-tiny in a real ComfyUI that has no other model: its template, and its parts."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from stylemaster_core.data.demo_scene import write_demo_inputs
from stylemaster_core.data.videos import read_video
from stylemaster_core.pipelines.encode_style import encode_style
from stylemaster_core.pipelines.models import ModelFiles, Models
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.pipelines.tiny import SETTINGS, tiny_files
from tests.comfy import browser, server, shipped_workflows
from tests.comfy.shipped_workflows import node_titled
from tests.standin_tiny import pack_with_weights

SEED = 3
# A number that divides 1000: ComfyUI's `simple` rounds other schedules to a table of 1000 sigmas.
STEPS = 12
FRAMES = 9
ROUNDING = 1  # sums of floats depend on where in memory the numbers lie


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return pack_with_weights(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def comfy(comfy_checkout, pack, tmp_path_factory):
    """A server without any model but those of the pack."""
    base = tmp_path_factory.mktemp("tiny_server") / "base"
    models = tmp_path_factory.mktemp("no_models")
    with server.ComfyServer(comfy_checkout, base, models, pack) as running:
        write_demo_inputs(running.input_dir)
        yield running


def template(**changes: dict[str, Any]) -> dict[str, Any]:
    """The shipped template, only shorter, after changes to nodes of these titles."""
    workflow = shipped_workflows.load(shipped_workflows.TINY)
    shorter = {"Sample": {"seed": SEED, "steps": STEPS}, "First 33 frames": {"length": FRAMES}}
    for title, inputs in {**shorter, **changes}.items():
        workflow[node_titled(workflow, title)]["inputs"] |= inputs
    return workflow


def run(comfy, workflow) -> dict[str, Any]:
    result = comfy.run_prompt(workflow, timeout_s=400)
    assert result.status == "success", result.error
    return result.outputs


def frames_of(comfy, workflow, node: str, output: int = 0) -> np.ndarray:
    """IMAGE of a node as uint8, through PNG files."""
    preview = {"class_type": "PreviewImage", "inputs": {"images": [node, output]}}
    files = run(comfy, {**workflow, "seen": preview})["seen"]["images"]
    return np.stack([np.asarray(Image.open(io.BytesIO(comfy.view(file)))) for file in files])


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(-10 * np.log10(((first / 255.0 - second / 255.0) ** 2).mean() + 1e-12))


def test_its_template_runs_to_the_video_of_the_core(comfy, pack):
    workflow = template()
    crop = node_titled(workflow, "Cut back")
    frames = frames_of(comfy, workflow, crop)
    (file,) = run(comfy, template())[node_titled(workflow, "Result")]["images"]
    with av.open(io.BytesIO(comfy.view(file))) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(frames)

    clip = read_video(comfy.input_dir / "stylemaster_clip.mp4").frames[:FRAMES]
    prompt = workflow[node_titled(workflow, "Prompt")]["inputs"]["text"]
    files = vars(tiny_files(pack / "stylemaster_core" / "tiny")) | {"motion_adapter": None}
    models = Models(ModelFiles(**files), device="cpu")
    picture = np.asarray(Image.open(comfy.input_dir / "stylemaster_mosaic.png").convert("RGB"))
    style = encode_style(models, picture, prompt).style
    settings = {**SETTINGS, "num_steps": STEPS, "seed": SEED, "prompt": prompt}
    config = StylizeConfig("video-to-video", **settings)
    ours = stylize(models, style, config, frames=clip).frames
    assert ours.std() > 5
    assert psnr(frames, ours) >= 40
    other = stylize(models, None, config, frames=clip).frames
    assert psnr(frames, other) < 30


@pytest.mark.skipif(
    browser.find_chromium() is None, reason="no Chromium found: install it or set CHROMIUM_PATH"
)
def test_it_runs_in_the_browser(comfy):
    pytest.importorskip("playwright", reason="the browser tests need `pip install playwright`")
    with browser.open_ui(comfy.url) as ui:
        ui.load(small())
        ui.fit()  # what is out of sight is not drawn
        assert ui.missing_nodes() == [] and ui.alerts() == []
        ui.queue()
        result = ui.page.locator('video[src*="tiny_video_to_video"]').first
        result.wait_for(state="attached", timeout=200_000)
        ui.page.wait_for_function(
            "() => [...document.querySelectorAll('video')].some(v => v.videoWidth === 64)",
            timeout=30_000,
        )
        assert ui.errors == []


def small(**changes: dict[str, Any]) -> dict[str, Any]:
    fast = {"First 33 frames": {"length": 5}, "Sample": {"seed": SEED, "steps": 2}}
    return template(**{**fast, "Size of the video": {"width": 64, "height": 48}, **changes})


@pytest.mark.parametrize(
    ("title", "changes"),
    [
        ("Style image", {"image": "stylemaster_woodcut.png"}),
        ("Keep the content", {"strength": 0.0}),
        ("Sample", {"seed": SEED + 1, "steps": 2}),
    ],
)
def test_its_inputs_matter(comfy, title, changes):
    crop = node_titled(small(), "Cut back")
    before = frames_of(comfy, small(), crop)
    after = frames_of(comfy, small(**{title: changes}), crop)
    assert np.abs(before.astype(int) - after).max() > ROUNDING


def test_words_of_a_prompt_count_and_their_weights_do_not(comfy):
    """Seen in the choice of textures: the small model itself hardly heeds the prompt."""

    def chosen(text: str) -> np.ndarray:
        workflow = small(Prompt={"text": text})
        return frames_of(comfy, workflow, node_titled(workflow, "Choose its textures"), 1)

    plain = chosen("a red boat")
    assert (chosen("a (red:1.4) boat") == plain).all()
    assert (chosen("a green boat") != plain).any()


def test_its_motion_adapter_is_linked(comfy):
    workflow = small()
    moved = {
        "class_type": "StyleMasterMotionAdapter",
        "inputs": {
            "model": ["1", 0],
            "adapter_name": "(linked)",
            "motion_scale": 1.0,
            "start": 0.0,
            "end": 1.0,
            "motion_adapter": ["1", 6],
        },
    }
    crop = node_titled(workflow, "Cut back")
    before = frames_of(comfy, workflow, crop)
    workflow[node_titled(workflow, "Apply the style")]["inputs"]["model"] = ["moved", 0]
    workflow["moved"] = moved
    assert np.abs(before.astype(int) - frames_of(comfy, workflow, crop)).max() > ROUNDING


def test_a_link_that_is_not_there_is_named(comfy):
    workflow = small()
    control = node_titled(workflow, "Keep the content")
    del workflow[control]["inputs"]["control_net"]
    result = comfy.run_prompt(workflow)
    assert result.status == "error" and result.error is not None
    assert result.error["node_id"] == control
    assert "control_net" in result.error["exception_message"]


def test_stock_nodes_take_its_vae(comfy):
    """Encoded and decoded, whole and in tiles, a clip is much the same."""
    workflow = template(**{"Size of the video": {"width": 130, "height": 100}})
    clip = node_titled(workflow, "Size of the video")
    used = {key: workflow[key] for key in needed(workflow, clip) | {"1"}}

    def there_and_back(ending: str, **options: int) -> np.ndarray:
        both = {"vae": ["1", 2], **options}
        encode = {"class_type": f"VAEEncode{ending}", "inputs": {"pixels": [clip, 0], **both}}
        decode = {"class_type": f"VAEDecode{ending}", "inputs": {"samples": ["encode", 0], **both}}
        return frames_of(comfy, {**used, "encode": encode, "decode": decode}, "decode")

    seen = frames_of(comfy, dict(used), clip)[:, 2:98, 1:129]  # what multiples of 8 leave
    whole = there_and_back("")
    tiled = there_and_back("Tiled", tile_size=64, overlap=32, temporal_size=64, temporal_overlap=8)
    assert psnr(whole, seen) > 18
    assert psnr(tiled, whole) > 30


def needed(workflow: dict[str, Any], key: str) -> set[str]:
    """A node and all that it depends on."""
    links = [v[0] for v in workflow[key]["inputs"].values() if isinstance(v, list)]
    return {key}.union(*(needed(workflow, link) for link in links))
