"""stylemaster-tiny in a real ComfyUI that has no other model: its templates, and its parts."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from stylemaster_core.data.demo_scene import write_demo_inputs
from stylemaster_core.data.videos import read_video
from stylemaster_core.pipelines.encode_style import encode_style, encode_stylecrafter
from stylemaster_core.pipelines.models import ModelFiles, Models
from stylemaster_core.pipelines.pictures import contact_sheet
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.pipelines.tiny import SETTINGS, tiny_files
from tests.comfy import browser, server, shipped_workflows
from tests.comfy.shipped_workflows import node_titled
from tests.standin_tiny import pack_with_weights

SEED = 3
STEPS = 12
FRAMES = 9
ROUNDING = 1  # sums of floats depend on where in memory the numbers lie
PROMPT = "a sailing boat in a bay at sunset"
STYLECRAFTER, BOTH = "stylecrafter_tiny_video", "two_methods_side_by_side"
# For each template: the node that cuts a result, the node that saves it, and its method.
RESULTS = {
    "tiny_video_to_video": [("Cut back", "Result", "StyleMaster")],
    STYLECRAFTER: [("Cut back", "Result", "StyleCrafter")],
    BOTH: [
        (f"Cut back ({method})", f"Result ({method})", method)
        for method in ("StyleMaster", "StyleCrafter")
    ],
}


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


def template(name: str = "tiny_video_to_video", **changes: dict[str, Any]) -> dict[str, Any]:
    """A shipped template, only shorter, after changes to nodes of these titles."""
    workflow = shipped_workflows.load(name)
    for node in workflow.values():
        if node["class_type"] == "StyleMasterSampler":
            node["inputs"] |= {"seed": SEED, "steps": STEPS}
    for title, inputs in {"First 33 frames": {"length": FRAMES}, **changes}.items():
        workflow[node_titled(workflow, title)]["inputs"] |= inputs
    return workflow


def run(comfy, workflow) -> dict[str, Any]:
    result = comfy.run_prompt(workflow, timeout_s=400)
    assert result.status == "success", result.error
    return result.outputs


def frames_of(comfy, workflow, node: str, output: int = 0) -> np.ndarray:
    """IMAGE of a node as uint8, through PNG files."""
    preview = {"class_type": "PreviewImage", "inputs": {"images": [node, output]}}
    return pictures(comfy, run(comfy, {**workflow, "seen": preview})["seen"])


def pictures(comfy, outputs: dict[str, Any]) -> np.ndarray:
    """What a node saved or shows, uint8 [N, H, W, 3]."""
    files = [comfy.view(file) for file in outputs["images"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(-10 * np.log10(((first / 255.0 - second / 255.0) ** 2).mean() + 1e-12))


@pytest.fixture(scope="module")
def of_the_core(comfy, pack):
    """The video of a method by the command line's pipeline, of the clip that templates name."""

    @cache
    def video(method: str, *, styled: bool = True) -> np.ndarray:
        folder = pack / "stylemaster_core" / "tiny"
        if method == "StyleCrafter":
            models = Models(tiny_files(folder, stylecrafter=True), device="cpu")
            style = encode_stylecrafter(models, [style_picture(comfy)])
        else:
            files = vars(tiny_files(folder)) | {"motion_adapter": None}
            models = Models(ModelFiles(**files), device="cpu")
            style = encode_style(models, style_picture(comfy), PROMPT).style
        settings = {**SETTINGS, "num_steps": STEPS, "seed": SEED, "prompt": PROMPT}
        config = StylizeConfig("video-to-video", **settings)
        return stylize(models, style if styled else None, config, frames=content(comfy)).frames

    return video


def style_picture(comfy) -> np.ndarray:
    return np.asarray(Image.open(comfy.input_dir / "stylemaster_mosaic.png").convert("RGB"))


def content(comfy) -> np.ndarray:
    return read_video(comfy.input_dir / "stylemaster_clip.mp4").frames[:FRAMES]


@pytest.mark.parametrize("name", RESULTS)
def test_a_template_runs_to_the_video_of_the_core(comfy, of_the_core, name):
    workflow = template(name)
    assert workflow[node_titled(workflow, "Prompt")]["inputs"]["text"] == PROMPT
    for cut, saved, method in RESULTS[name]:
        frames = frames_of(comfy, workflow, node_titled(workflow, cut))
        (file,) = run(comfy, workflow)[node_titled(workflow, saved)]["images"]
        with av.open(io.BytesIO(comfy.view(file))) as container:
            assert sum(1 for _ in container.decode(video=0)) == len(frames)
        assert frames.std() > 5
        assert psnr(frames, of_the_core(method)) >= 40
        assert psnr(frames, of_the_core(method, styled=False)) < 30


def test_the_comparison_shows_both_methods(comfy, of_the_core):
    workflow = template(BOTH)
    seen = pictures(comfy, run(comfy, workflow)[node_titled(workflow, "Comparison")])
    inputs = workflow[node_titled(workflow, "Side by side")]["inputs"]
    shown = np.linspace(0, FRAMES - 1, inputs["columns"]).round().astype(int)
    rows = {"content": content(comfy)}
    rows |= {method: of_the_core(method) for method in ("StyleMaster", "StyleCrafter")}
    sheet = [("reference", [style_picture(comfy)])]
    sheet += [(label, list(frames[shown])) for label, frames in rows.items()]
    assert psnr(seen, contact_sheet(sheet, inputs["side"])[None]) >= 40


@pytest.mark.skipif(
    browser.find_chromium() is None, reason="no Chromium found: install it or set CHROMIUM_PATH"
)
@pytest.mark.parametrize("name", RESULTS)
def test_a_template_runs_in_the_browser(comfy, name):
    pytest.importorskip("playwright", reason="the browser tests need `pip install playwright`")
    workflow = small(name)
    with browser.open_ui(comfy.url) as ui:
        ui.load(workflow)
        ui.fit()  # what is out of sight is not drawn
        assert ui.missing_nodes() == [] and ui.alerts() == []
        ui.queue()
        for _, saved, _ in RESULTS[name]:
            prefix = workflow[node_titled(workflow, saved)]["inputs"]["filename_prefix"]
            result = ui.page.locator(f'video[src*="{prefix.split("/")[-1]}"]').first
            result.wait_for(state="attached", timeout=300_000)
        ui.page.wait_for_function(
            """count => [...document.querySelectorAll('video')]
                .filter(v => v.videoWidth === 64).length === count""",
            arg=len(RESULTS[name]),
            timeout=30_000,
        )
        assert ui.errors == []


def small(name: str = "tiny_video_to_video", **changes: dict[str, Any]) -> dict[str, Any]:
    size = {"width": 64, "height": 48}
    fast = {"First 33 frames": {"length": 5}, "Size and length": size}
    workflow = template(name, **{**fast, **changes})
    for node in workflow.values():
        if node["class_type"] == "StyleMasterSampler":
            node["inputs"]["steps"] = 2
    return workflow


@pytest.mark.parametrize(
    ("name", "title", "changes"),
    [
        ("tiny_video_to_video", "Style image", {"image": "stylemaster_woodcut.png"}),
        ("tiny_video_to_video", "Keep the content", {"strength": 0.0}),
        ("tiny_video_to_video", "Sample", {"seed": SEED + 1}),
        (STYLECRAFTER, "Style image", {"image": "stylemaster_woodcut.png"}),
        (STYLECRAFTER, "Keep the content", {"strength": 0.0}),
        (STYLECRAFTER, "For videos", {"motion_scale": 0.0}),
    ],
)
def test_its_inputs_matter(comfy, name, title, changes):
    crop = node_titled(small(name), "Cut back")
    before = frames_of(comfy, small(name), crop)
    after = frames_of(comfy, small(name, **{title: changes}), crop)
    assert np.abs(before.astype(int) - after).max() > ROUNDING


def test_a_workflow_that_names_no_method_has_stylemasters(comfy):
    workflow = small()
    crop = node_titled(workflow, "Cut back")
    named = frames_of(comfy, workflow, crop)
    del workflow[node_titled(workflow, "stylemaster-tiny")]["inputs"]["method"]
    assert np.abs(named.astype(int) - frames_of(comfy, workflow, crop)).max() <= ROUNDING


def test_predicted_strengths_are_shown_and_follow_the_style(comfy):
    def shown(image: str) -> np.ndarray:
        workflow = small(STYLECRAFTER, **{"Style image": {"image": image}})
        outputs = run(comfy, workflow)[node_titled(workflow, "Strength, as predicted")]
        return pictures(comfy, outputs)

    first, second = (shown(f"stylemaster_{style}.png") for style in ("mosaic", "woodcut"))
    assert first.shape == (1, 320, 768, 3)
    assert (first != second).any()


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
    size = {"width": 130, "height": 100, "resize": "to the size"}
    workflow = template(**{"Size and length": size})
    clip = node_titled(workflow, "Size and length")
    used = {key: workflow[key] for key in needed(workflow, clip) | {"1"}}

    def there_and_back(ending: str, **options: int) -> np.ndarray:
        both = {"vae": ["1", 2], **options}
        encode = {"class_type": f"VAEEncode{ending}", "inputs": {"pixels": [clip, 4], **both}}
        decode = {"class_type": f"VAEDecode{ending}", "inputs": {"samples": ["encode", 0], **both}}
        return frames_of(comfy, {**used, "encode": encode, "decode": decode}, "decode")

    seen = frames_of(comfy, dict(used), clip, 4)[:, 2:98, 1:129]  # what multiples of 8 leave
    whole = there_and_back("")
    tiled = there_and_back("Tiled", tile_size=64, overlap=32, temporal_size=64, temporal_overlap=8)
    assert psnr(whole, seen) > 18
    assert psnr(tiled, whole) > 30


def needed(workflow: dict[str, Any], key: str) -> set[str]:
    """A node and all that it depends on."""
    links = [v[0] for v in workflow[key]["inputs"].values() if isinstance(v, list)]
    return {key}.union(*(needed(workflow, link) for link in links))
