"""The web interface of a real server, driven in headless Chromium."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from stylemaster_core.models.style_tokens import FORMAT, TAGS_KEY, THUMBNAIL_KEY, load_style
from stylemaster_core.weights.files import write_state_dict
from tests.comfy import blueprints, browser, layout, node_texts, server, shipped_workflows, validate
from tests.comfy.shipped_workflows import names, small

pytest.importorskip("playwright", reason="the browser tests need `pip install playwright`")
pytestmark = pytest.mark.skipif(
    browser.find_chromium() is None, reason="no Chromium found: install it or set CHROMIUM_PATH"
)


APPS = [name for name in names() if not name.startswith("train_")]


@pytest.fixture(scope="module")
def ui(comfy_server, comfy_models) -> Iterator[browser.Ui]:
    shipped_workflows.write_models(comfy_models)
    shipped_workflows.write_inputs(comfy_server.input_dir)
    with browser.open_ui(comfy_server.url) as opened:
        yield opened


def get(ui: browser.Ui, path: str) -> Any:
    with urllib.request.urlopen(ui.url + path, timeout=30) as response:
        return json.load(response)


def test_the_templates_are_listed_and_open(ui):
    templates = get(ui, "/api/workflow_templates")
    assert set(templates[server.PACK_NAME]) == set(names())
    # Pictures out of sight are not loaded.
    ui.page.set_viewport_size({"width": browser.WIDTH_PX, "height": 2 * browser.HEIGHT_PX})
    ui.command("Comfy.BrowseTemplates")
    ui.page.get_by_role("dialog").get_by_text(server.PACK_NAME, exact=True).click()
    for name in names():
        ui.page.get_by_text(name, exact=True).first.wait_for()
    ui.page.wait_for_function(
        """count => [...document.querySelectorAll('img')]
            .filter(image => image.naturalWidth === 560).length === count""",
        arg=len(names()),
    )
    ui.page.get_by_text("saved_style", exact=True).first.click()
    opened = "() => window.app.graph._nodes.some(node => node.type === 'StyleMasterLoadStyle')"
    ui.page.wait_for_function(opened)
    ui.page.wait_for_timeout(500)
    assert "wan2.1_t2v_1.3B_fp16.safetensors" in ui.page.get_by_role("dialog").inner_text()
    ui.page.keyboard.press("Escape")
    ui.page.set_viewport_size({"width": browser.WIDTH_PX, "height": browser.HEIGHT_PX})


@pytest.mark.parametrize("name", names())
def test_a_template_opens_without_missing_nodes(ui, name):
    ui.load(get(ui, f"/api/workflow_templates/{server.PACK_NAME}/{name}.json"))
    ui.page.keyboard.press("Escape")  # the list of models to download
    info = get(ui, "/object_info")
    lacking = shipped_workflows.lacking(name, info)
    assert sorted(ui.missing_nodes()) == lacking
    if lacking:
        return  # the editor has named them, and posts no such node
    assert ui.alerts() == []
    assert ui.errors == []
    assert validate.differences(ui.to_api(), shipped_workflows.load(name), info) == []


@pytest.mark.parametrize("name", APPS)
def test_app_mode_shows_what_a_template_names(ui, name):
    graph = json.loads((shipped_workflows.FOLDER / f"{name}.json").read_text("utf-8"))
    ui.load(graph)
    ui.page.keyboard.press("Escape")
    known = "() => window.app.extensionManager.command.commands.map(command => command.id)"
    if "Comfy.ToggleLinear" not in ui.page.evaluate(known):
        pytest.skip("this version has no App mode")
    ui.command("Comfy.ToggleLinear")
    labels = ui.page.get_by_test_id("builder-widget-label")
    shown = {
        (str(node["id"]), slot["name"]): slot["label"]
        for node in graph["nodes"]
        for slot in node["inputs"]
        if "label" in slot
    }
    wanted = [shown[tuple(entry)] for entry in graph["extra"]["linearData"]["inputs"]]
    labels.nth(len(wanted) - 1).wait_for()
    assert labels.all_inner_texts() == wanted
    assert ui.errors == []
    ui.command("Comfy.ToggleLinear")


@pytest.fixture(scope="module", params=layout.MODES)
def drawn(request, ui) -> Iterator[tuple[browser.Ui, bool]]:
    """The interface in each way to draw nodes; versions without the second are skipped."""
    nodes_2 = layout.MODES[request.param]
    with ui.beside(nodes_2=nodes_2) as opened:
        opened.load(shipped_workflows.load("text_to_video"))
        opened.fit()
        if nodes_2 and not opened.page.locator("[data-node-id]").count():
            pytest.skip("this version draws nodes in one way only")
        yield opened, nodes_2


@pytest.mark.parametrize("name", names())
def test_no_two_nodes_overlap(drawn, name):
    opened, nodes_2 = drawn
    opened.load(json.loads((shipped_workflows.FOLDER / f"{name}.json").read_text("utf-8")))
    opened.page.keyboard.press("Escape")
    opened.fit()
    assert layout.overlaps(layout.rectangles(opened, dom=nodes_2)) == []


@pytest.mark.parametrize("name", [blueprint.name for blueprint in blueprints.BLUEPRINTS])
def test_a_blueprint_is_listed_and_opens_to_its_template(ui, name):
    listed = get(ui, "/api/global_subgraphs").values()
    assert name in [entry["name"] for entry in listed if server.PACK_NAME in str(entry["info"])]
    graph = json.loads((blueprints.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    (node,) = graph["nodes"]
    ui.load(graph)
    ui.page.keyboard.press("Escape")
    assert ui.errors == []
    posted = ui.to_api()
    for key, inside in blueprints.to_api(graph).items():
        links = {
            name: [f"{node['id']}:{value[0]}", value[1]] if isinstance(value, list) else value
            for name, value in inside["inputs"].items()
        }
        found = posted[f"{node['id']}:{key}"]
        assert links.items() <= found["inputs"].items()
        ours = found["class_type"].startswith("StyleMaster")
        assert not ours or found["inputs"].keys() == links.keys()


def test_saved_styles_are_chosen_by_their_pictures(drawn, comfy_models):
    opened, _ = drawn
    folder = comfy_models / "stylemaster" / "styles"
    shutil.copy(folder / "blend_00001_.safetensors", folder / "ink.safetensors")
    shutil.copy(folder / "blend_00001_.safetensors", folder / "remote.safetensors")
    style = load_style(folder / "ink.safetensors")
    elsewhere = {"format": FORMAT, THUMBNAIL_KEY: "https://example.org/x.jpg", TAGS_KEY: "far"}
    tokens = {"style_tokens": style.tokens}
    write_state_dict(folder / "remote.safetensors", tokens, elsewhere, overwrite=True)
    opened.load(json.loads((shipped_workflows.FOLDER / "saved_style.json").read_text("utf-8")))
    opened.page.keyboard.press("Escape")
    opened.fit()
    opened.command("Comfy.RefreshNodeDefinitions")
    buttons = opened.page.locator(".stylemaster-library button")
    buttons.nth(2).wait_for(state="attached")

    def shown(name: str) -> str:
        return buttons.filter(has_text=name).locator("img").evaluate("image => image.src")

    opened.page.wait_for_function(
        """() => [...document.querySelectorAll('.stylemaster-library img')]
            .filter(image => image.naturalWidth === 96).length === 2"""
    )
    assert shown("ink").startswith("data:image/jpeg") and shown("remote").startswith(
        "data:image/gif"
    )
    buttons.filter(has_text="ink").click()
    api = opened.to_api()
    (chosen,) = (node for node in api.values() if node["class_type"] == "StyleMasterLoadStyle")
    assert chosen["inputs"] == {"style_name": "ink.safetensors"}
    assert buttons.filter(has_text="ink").get_attribute("aria-pressed") == "true"
    opened.page.locator(".stylemaster-library input").fill("far")
    buttons.filter(has_text="ink").wait_for(state="hidden")
    assert buttons.filter(has_text="remote").is_visible()
    (saved,) = (n for n in opened.serialize()["nodes"] if n["type"] == "StyleMasterLoadStyle")
    assert saved["widgets_values"] == ["ink.safetensors"]
    assert opened.errors == []


def test_a_workflow_runs_to_a_video(ui):
    ui.load(small("text_to_video"))
    ui.fit()
    ui.queue()
    result = ui.page.locator('video[src*="text_to_video"]').first
    result.wait_for(state="attached")
    ui.page.wait_for_function(
        "() => [...document.querySelectorAll('video')].some(video => video.videoWidth > 0)"
    )
    assert result.evaluate("video => [video.videoWidth, video.videoHeight]") == [
        shipped_workflows.WIDTH,
        shipped_workflows.HEIGHT,
    ]
    assert ui.errors == []


@pytest.mark.parametrize("node", ["StyleMasterStyleEncoder", "StyleMasterApplyStyle"])
def test_a_nodes_help_is_shown(ui, node):
    ui.load(small("text_to_video"))
    ui.fit()
    ui.select(node)
    ui.page.locator('[data-testid="info-button"]').first.click()
    title = json.loads((node_texts.LOCALES / "en" / "nodeDefs.json").read_text())[node]
    ui.page.get_by_role("heading", name=title["display_name"], exact=True).wait_for()
    ui.page.wait_for_function(
        """() => [...document.querySelectorAll('img[src*="images/"]')]
            .some(image => image.complete && image.naturalWidth > 300)"""
    )


def test_texts_are_those_of_the_nodes(ui):
    served = get(ui, "/i18n")
    described = node_texts.english_texts(get(ui, "/object_info"))
    english = served["en"]["nodeDefs"]
    assert {node: english.get(node) for node in described} == described
    assert served["zh"]["nodeDefs"].keys() >= described.keys()
    written = json.loads((node_texts.LOCALES / "en" / "nodeDefs.json").read_text())
    assert written == described, "run `python -m tests.comfy.node_texts`"
