"""ComfyUI's web interface in headless Chromium, cut off from everything but the server."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

WIDTH_PX, HEIGHT_PX = 1600, 950
LIMIT_MS = 600_000  # against hanging; a busy machine needed two minutes for the first page
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
_READY = """() => window.app?.graph && window.app?.canvas &&
    Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100"""
# Text that is readable at any zoom, and nothing that lies over the graph.
_SETTINGS = {
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.TutorialCompleted": True,
}


def find_chromium() -> str | None:
    """A Chromium: CHROMIUM_PATH, or one that is installed."""
    return os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def open_ui(url: str, *, nodes_2: bool = False) -> Iterator[Ui]:
    """Open the interface of a server.

    Args:
        url: of the server.
        nodes_2: whether nodes are drawn as elements of the page, where the version can.

    Raises:
        FileNotFoundError: if there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    executable = find_chromium()
    if executable is None:
        raise FileNotFoundError(f"no Chromium found ({', '.join(_NAMES)}); set CHROMIUM_PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=_FLAGS)
        try:
            page = browser.new_page(viewport={"width": WIDTH_PX, "height": HEIGHT_PX})
            ui = Ui(page, url, nodes_2=nodes_2)
            ui.open()
            yield ui
        finally:
            browser.close()


class Ui:
    """The open interface."""

    def __init__(self, page: Page, url: str, *, nodes_2: bool = False) -> None:
        self.settings = {**_SETTINGS, "Comfy.VueNodes.Enabled": nodes_2}
        self.page = page
        self.url = url
        self.errors: list[str] = []

    @contextmanager
    def beside(self, *, nodes_2: bool) -> Iterator[Ui]:
        """A second page of the same browser; Playwright takes one browser at a time."""
        browser = self.page.context.browser
        assert browser is not None
        page = browser.new_page(viewport={"width": WIDTH_PX, "height": HEIGHT_PX})
        try:
            other = Ui(page, self.url, nodes_2=nodes_2)
            other.open()
            yield other
        finally:
            page.close()

    def open(self) -> None:
        """Load the page and wait for the editor."""
        self.page.set_default_timeout(LIMIT_MS)
        self.page.route("**/*", self._only_this_server)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        # Before the page is there: the first visit would open the templates, some time later.
        answer = self.page.request.post(f"{self.url}/api/settings", data=self.settings)
        assert answer.ok, answer.text()
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(_READY)
        self.page.wait_for_timeout(1500)

    def _only_this_server(self, route: Route) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("data", "blob") or address.netloc == urlsplit(self.url).netloc:
            route.continue_()
        else:
            route.abort()

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow of either format."""
        call = (
            "loadGraphData(w, true, true, 'test')"
            if "nodes" in workflow
            else ("loadApiJson(w, 'test')")
        )
        self.page.evaluate(f"async w => {{ await window.app.{call} }}", workflow)
        self.page.wait_for_timeout(800)

    def missing_nodes(self) -> list[str]:
        """Classes of the open graph that the server does not know."""
        return self.page.evaluate(
            # Not `has_errors`, which newer editors also set for a missing model.
            """() => window.app.graph._nodes.map(node => node.type)
                .filter(type => !(type in window.LiteGraph.registered_node_types))"""
        )

    def serialize(self) -> dict[str, Any]:
        """The open graph as the editor saves it."""
        # As text: what is undefined there must be absent here, not null.
        text = self.page.evaluate("() => JSON.stringify(window.app.graph.serialize())")
        return json.loads(text)

    def alerts(self) -> list[str]:
        """Texts of the messages that lie over the graph."""
        return self.page.locator(".p-toast-message").all_inner_texts()

    def to_api(self) -> dict[str, Any]:
        """The open graph in API format, as the editor posts it."""
        text = self.page.evaluate(
            "async () => JSON.stringify((await window.app.graphToPrompt()).output)"
        )
        return json.loads(text)

    def queue(self) -> None:
        """Press Run."""
        self.page.evaluate("async () => { await window.app.queuePrompt(0, 1) }")

    def command(self, name: str) -> None:
        """Run one of the editor's commands."""
        self.page.evaluate("name => window.app.extensionManager.command.execute(name)", name)

    def fit(self) -> None:
        """Bring the whole graph into view."""
        self.page.evaluate(
            """() => {
              const app = window.app, canvas = app.canvas;
              let box = [1e9, 1e9, -1e9, -1e9];
              const grow = (x, y, w, h) => { box = [Math.min(box[0], x), Math.min(box[1], y),
                Math.max(box[2], x + w), Math.max(box[3], y + h)]; };
              for (const n of app.graph._nodes)
                grow(n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30);
              for (const g of app.graph._groups) grow(g.pos[0], g.pos[1], g.size[0], g.size[1]);
              const room = [canvas.canvas.clientWidth - 110, canvas.canvas.clientHeight - 140];
              const scale = Math.min(room[0] / (box[2] - box[0]), room[1] / (box[3] - box[1]), 1);
              canvas.ds.scale = scale;
              canvas.ds.offset[0] = -box[0] + 80 / scale;
              canvas.ds.offset[1] = -box[1] + 100 / scale;
              canvas.setDirty(true, true);
            }"""
        )
        self.page.wait_for_timeout(600)

    def select(self, class_type: str) -> None:
        """Select the first node of a class."""
        self.page.evaluate(
            """type => { const canvas = window.app.canvas;
              canvas.deselectAll?.();
              canvas.selectNode(window.app.graph._nodes.find(node => node.type === type)); }""",
            class_type,
        )
        self.page.wait_for_timeout(500)
