"""What the pack ships besides code: workflows, help, texts, pictures, the registry's fields."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stylemaster_core.pipelines.encode_style import TextureConfig
from stylemaster_core.pipelines.stylize import StylizeConfig
from stylemaster_core.pipelines.stylize_sdxl import SdxlConfig
from stylemaster_core.pipelines.stylize_videocrafter import VideoCrafterConfig
from stylemaster_core.pipelines.tiny import SETTINGS
from stylemaster_core.queue.workflow import find_role, load_workflow, seed_targets
from stylemaster_core.training.config import PRESETS
from stylemaster_core.weights.manifest import load_manifest
from tests.comfy import node_texts, shipped_workflows, ui_workflows

PACK = Path(__file__).parents[2]
WORKFLOWS = shipped_workflows.FOLDER
NAMES = shipped_workflows.names()
SAMPLING = shipped_workflows.sampling_names()
DOCS = PACK / "web" / "docs"
UNETS = {shipped_workflows.SDXL, shipped_workflows.VIDEOCRAFTER}
UNLINKED = {"control_net"}  # a socket that may stay open
CONTROLLED = {"video_to_video", "image_restyle", "long_video", "style_on_one_object"}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def texts(language: str) -> dict[str, Any]:
    return read_json(PACK / "locales" / language / "nodeDefs.json")


def ui_nodes(name: str) -> list[dict[str, Any]]:
    return read_json(WORKFLOWS / f"{name}.json")["nodes"]


def test_there_is_one_of_each():
    assert {
        "text_to_video",
        "video_to_video",
        "image_restyle",
        "two_styles_with_mask",
        "style_on_one_object",
        "style_blend",
        "saved_style",
        "motion_scale_sweep",
        "long_video",
        "train_motion_adapter",
        "tiny_video_to_video",
        "sdxl_image_in_a_style",
        "stylecrafter_videocrafter",
        "stylecrafter_tiny_video",
        "two_methods_side_by_side",
    } <= set(NAMES)
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == set(NAMES)
    assert {path.stem for path in WORKFLOWS.glob("*.jpg")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_editors_twin_means_the_same(name):
    api = shipped_workflows.load(name)
    graph = read_json(WORKFLOWS / f"{name}.json")
    assert ui_workflows.to_api(graph) == api


@pytest.mark.parametrize("name", NAMES)
def test_every_input_of_our_nodes_is_named(name):
    """The editor adds an input that a template lacks, and then its twin is another workflow."""
    ours = texts("en")
    lacking = {
        node["title"]: wanted
        for node in ui_nodes(name)
        if node["type"] in ours
        and (wanted := _inputs(ours[node["type"]]) - {slot["name"] for slot in node["inputs"]})
    }
    assert not lacking


@pytest.mark.parametrize("name", NAMES)
def test_app_mode_has_the_pictures_the_prompt_and_the_results(name):
    graph = read_json(WORKFLOWS / f"{name}.json")
    app = graph["extra"].get("linearData")
    assert bool(app) != name.startswith("train_")
    if app is None:
        return
    nodes = {str(node["id"]): node for node in graph["nodes"]}
    labels = []
    for number, input_ in app["inputs"]:
        (slot,) = (slot for slot in nodes[number]["inputs"] if slot["name"] == input_)
        assert "widget" in slot and slot["link"] is None
        labels.append(slot["label"])
    loaded = [n for n, node in nodes.items() if node["type"] in ("LoadImage", "LoadVideo")]
    assert {*loaded} <= {number for number, _ in app["inputs"]}
    assert "prompt" in labels and len(labels) == len(set(labels))
    saved = {n for n, node in nodes.items() if node["type"] in ("SaveVideo", "SaveImage")}
    assert saved and saved <= set(app["outputs"])
    assert graph["extra"]["linearMode"] is False


def _inputs(node: dict[str, Any]) -> set[str]:
    return set(node["inputs"]) - UNLINKED


@pytest.mark.parametrize("name", NAMES)
def test_links_join_nodes_of_the_workflow(name):
    api = shipped_workflows.load(name)
    known = texts("en")
    for key, node in api.items():
        for value in filter(ui_workflows.is_linked, node["inputs"].values()):
            assert value[0] in api and value[0] != key
        if node["class_type"] in known:
            assert node["inputs"].keys() <= known[node["class_type"]]["inputs"].keys()


@pytest.mark.parametrize("name", [*SAMPLING, *shipped_workflows.TINY])
def test_the_queue_finds_what_it_sets(name):
    workflow = load_workflow(WORKFLOWS / "api" / f"{name}.json")
    assert find_role(workflow, "prompt").input == "text"
    assert seed_targets(workflow)
    if name != "saved_style":
        assert find_role(workflow, "style").input == "image"
    if name in (
        "video_to_video",
        "long_video",
        shipped_workflows.ONE_OBJECT,
        *shipped_workflows.TINY,
    ):
        assert find_role(workflow, "video").input == "file"


@pytest.mark.parametrize("name", sorted(set(SAMPLING) - UNETS))
def test_numbers_are_the_releases(name):
    nodes = shipped_workflows.load(name).values()
    samplers = [node["inputs"] for node in nodes if node["class_type"] == "StyleMasterSampler"]
    assert samplers
    for inputs in samplers:
        assert (inputs["steps"], inputs["shift"], inputs["text_cfg"]) == (50, 5.0, 8.0)
        assert inputs["style_cfg"] == (3.0 if name in CONTROLLED else 4.0)
        assert (inputs["sampler_name"], inputs["scheduler"]) == ("euler", "simple")
    for node in nodes:
        if node["class_type"] == "StyleMasterGrayTileControl":
            assert (node["inputs"]["start"], node["inputs"]["end"]) == (0.0, 0.7)
            assert node["inputs"]["factor"] == 8
        if node["class_type"] == "StyleMasterTextureSelector":
            assert (node["inputs"]["mode"], node["inputs"]["drop_rate"]) == ("release", 0.95)


def test_numbers_of_sdxl_are_the_releases():
    workflow = shipped_workflows.load(shipped_workflows.SDXL)
    nodes = {node["class_type"]: node["inputs"] for node in workflow.values()}
    release, guider = SdxlConfig(), nodes["StyleMasterGuider"]
    assert (guider["text_cfg"], guider["style_cfg"]) == (release.text_scale, release.style_scale)
    assert nodes["BasicScheduler"]["steps"] == release.num_steps
    assert nodes["KSamplerSelect"]["sampler_name"] == "euler"
    assert nodes["StyleMasterApplyStyle"]["strength"] == 0.5
    latent = nodes["EmptyLatentImage"]
    assert (latent["height"], latent["width"]) == release.size
    negative = shipped_workflows.node_titled(workflow, "Negative prompt")
    assert workflow[negative]["inputs"]["text"] == release.negative_prompt


def test_numbers_of_videocrafter_are_the_releases():
    workflow = shipped_workflows.load(shipped_workflows.VIDEOCRAFTER)
    nodes = {node["class_type"]: node["inputs"] for node in workflow.values()}
    release, guider = VideoCrafterConfig(), nodes["StyleMasterGuider"]
    # The release counts from the styled prediction.
    text_scale, style_scale = (scale + 1 for scale in release.scales)
    assert (guider["text_cfg"], guider["style_cfg"]) == (text_scale, style_scale) == (16.0, 8.5)
    assert nodes["BasicScheduler"]["steps"] == release.num_steps
    assert nodes["BasicScheduler"]["scheduler"] == "ddim_uniform"
    assert release.eta == 1 and nodes["KSamplerSelect"]["sampler_name"] == "euler_ancestral"
    assert nodes["RandomNoise"]["noise_seed"] == release.seed
    latent = nodes["EmptyLatentImage"]
    assert (latent["height"], latent["width"]) == release.size
    assert latent["batch_size"] == release.num_frames


@pytest.mark.parametrize("name", shipped_workflows.TINY)
def test_numbers_of_the_small_model_are_those_of_the_command_line(name):
    def inputs(class_type: str) -> list[dict[str, Any]]:
        nodes = shipped_workflows.load(name).values()
        return [node["inputs"] for node in nodes if node["class_type"] == class_type]

    samplers, controls = inputs("StyleMasterSampler"), inputs("StyleMasterGrayTileControl")
    for sampler, control in zip(samplers, controls, strict=True):
        assert {
            "num_steps": sampler["steps"],
            "same_noise": sampler["same_noise"],
            "text_scale": sampler["text_cfg"],
            "style_scale": sampler["style_cfg"],
            "tile_factor": control["factor"],
            "control_range": (control["start"], control["end"]),
        } == SETTINGS
        assert (sampler["sampler_name"], sampler["shift"]) == ("euler", StylizeConfig.shift)
    for selector in inputs("StyleMasterTextureSelector"):
        assert selector["mode"] == TextureConfig.selection
    for motion in inputs("StyleMasterMotionAdapter"):
        assert motion["motion_scale"] == 1.0  # StyleCrafter's LoRA for videos


def test_numbers_of_the_training_are_the_presets():
    dataset, cache, trainer, *_ = shipped_workflows.load("train_motion_adapter").values()
    inputs, preset = trainer["inputs"], PRESETS["motion"]
    assert (inputs["steps"], inputs["save_every"]) == (preset.run.num_steps, preset.run.save_every)
    assert inputs["batch_size"] == preset.run.batch_size
    assert inputs["accumulation"] == preset.run.accumulation
    assert inputs["learning_rate"] == preset.optimizer.lr
    assert inputs["rank"] == preset.motion.rank
    assert inputs["sample_every"] > 0, "without samples nothing is previewed"
    assert dataset["inputs"]["still_frames"] == cache["inputs"]["num_frames"]
    sweep = shipped_workflows.load("motion_scale_sweep").values()
    loaded = {
        node["inputs"]["adapter_name"]
        for node in sweep
        if node["class_type"] == "StyleMasterMotionAdapter"
    }
    assert loaded == {inputs["file_name"] + ".safetensors"}


@pytest.mark.parametrize("name", NAMES)
def test_the_note_explains_and_is_up_to_date(name):
    notes = [node for node in ui_nodes(name) if node["type"] == ui_workflows.NOTE]
    text = ui_workflows.note_of(name, shipped_workflows.load(name))
    assert [note["widgets_values"] for note in notes] == [[text]]
    assert "Run" in text


@pytest.mark.parametrize("name", NAMES)
def test_models_that_can_be_downloaded_say_where(name):
    entries = {entry.file_name: entry for entry in load_manifest().values()}
    loaders = 0
    for node in ui_nodes(name):
        values = [v for v in node.get("widgets_values") or [] if isinstance(v, str)]
        wanted = [v for v in values if v in entries and v.endswith(".safetensors")]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == wanted
        for model in models:
            entry = entries[model["name"]]
            assert model["url"] == (
                f"https://huggingface.co/{entry.repository}/resolve/main/{entry.file}"
            )
            assert model["directory"] == entry.folder
            assert model.get("hash") == entry.sha256
            assert model.get("hash_type") == ("SHA256" if entry.sha256 else None)
        loaders += len(models)
    fewer = {"saved_style": 3, shipped_workflows.SDXL: 2, shipped_workflows.VIDEOCRAFTER: 1}
    fewer |= dict.fromkeys(shipped_workflows.TINY, 0)
    assert loaders == fewer.get(name, 4)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_lies_over_something_else(name):
    boxes = {
        node["id"]: (
            *node["pos"],
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1],
        )
        for node in ui_nodes(name)
    }
    title = 30
    for a, (left, top, right, bottom) in boxes.items():
        for b, other in boxes.items():
            apart = (
                right <= other[0] or other[2] <= left
                or bottom <= other[1] - title or other[3] <= top - title
            )  # fmt: skip
            assert a == b or apart, (a, b)


@pytest.mark.parametrize("name", NAMES)
def test_thumbnails_are_small_pictures(name):
    path = WORKFLOWS / f"{name}.jpg"
    assert path.stat().st_size < 60_000
    assert Image.open(path).size[0] >= 400


def test_every_node_has_a_page_that_explains_every_input():
    nodes = texts("en")
    assert {path.stem for path in DOCS.glob("*.md")} == set(nodes)
    for node, text in nodes.items():
        page = (DOCS / f"{node}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {text['display_name']}\n"), node
        wanted = {*text["inputs"], *(out["name"] for out in text["outputs"].values())}
        listed = {
            name
            for names in re.findall(r"^- (`[^:]+`): ", page, re.MULTILINE)
            for name in re.findall(r"`(\w+)`", names)
        }
        assert listed == wanted, f"{node}: {listed ^ wanted}"


def test_pictures_of_the_pages_are_there():
    pages = [*DOCS.glob("*.md"), *(PACK / "docs").glob("*.md"), PACK / "README.md"]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    ]
    assert len(links) >= 6
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("language", node_texts.HEADINGS)
def test_help_pages_of_other_languages_are_up_to_date(language):
    pages = node_texts.pages(language)
    assert {path.parent.name for path in pages} == set(texts("en"))
    for path, page in pages.items():
        written = path.read_text(encoding="utf-8")
        assert written == page, "run `python -m tests.comfy.node_texts pages`"
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
            assert (DOCS / link).exists(), f"{path}: {link}"


def test_translations_are_complete():
    english, chinese = texts("en"), texts("zh")

    def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
        if isinstance(value, str):
            return {path: value}
        return {k: v for key, part in value.items() for k, v in leaves(part, (*path, key)).items()}

    assert leaves(english).keys() == leaves(chinese).keys()
    assert all(text.strip() for text in leaves(chinese).values())
    explained = {path: text for path, text in leaves(chinese).items() if path[-1] != "name"}
    untranslated = [
        path for path, text in explained.items() if not re.search("[\u4e00-\u9fff]", text)
    ]
    assert not untranslated


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11 and newer")
def test_the_registrys_fields():
    import tomllib

    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    fields = project["tool"]["comfy"]
    assert fields["PublisherId"] and fields["DisplayName"] and fields["requires-comfyui"]
    repository = project["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    raw = f"https://raw.githubusercontent.com/{repository}/main/"
    sizes = {}
    for key in ("Icon", "Banner"):
        assert fields[key].startswith(raw), key
        sizes[key] = Image.open(PACK / fields[key].removeprefix(raw)).size
    assert sizes["Icon"] == (400, 400)
    assert sizes["Banner"][0] * 9 == sizes["Banner"][1] * 21
