"""Room for the nodes of the templates: measured in the browser, in both ways to draw them.

`python -m tests.comfy.layout` measures on each ComfyUI found, keeps the largest in
`node_heights.json`, and places the nodes of every template by them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.comfy import browser, server, shipped_workflows, small_models, ui_workflows

MODES = {"classic": False, "Nodes 2.0": True}
TITLE = 30
TOLERANCE = 2.0  # px; borders


def rectangles(ui: browser.Ui, *, dom: bool) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, width and height of every node of the open graph, its title bar included."""
    found = ui.page.evaluate(
        """() => { const { scale, offset } = window.app.canvas.ds;
          return window.app.graph._nodes.map(node => {
            const element = document.querySelector(`[data-node-id="${node.id}"]`);
            const box = element?.getBoundingClientRect();
            return { key: `${node.id} ${node.title}`, pos: [...node.pos], size: [...node.size],
              dom: box && [box.x / scale - offset[0], box.y / scale - offset[1],
                           box.width / scale, box.height / scale] }; }); }"""
    )
    boxes = {}
    for node in found:
        (left, top), (width, height) = node["pos"], node["size"]
        assert bool(node["dom"]) == dom, f"{node['key']} is drawn in the other way"
        boxes[node["key"]] = tuple(
            node["dom"] if dom else (left, top - TITLE, width, height + TITLE)
        )
    return boxes


def overlaps(boxes: dict[str, tuple[float, float, float, float]]) -> list[tuple[str, str]]:
    """Pairs of rectangles that cover a common area."""

    def meet(a: Any, b: Any, axis: int) -> bool:
        return min(a[axis] + a[axis + 2], b[axis] + b[axis + 2]) - max(a[axis], b[axis]) > TOLERANCE

    return [
        (first, second)
        for (first, a), (second, b) in combinations(boxes.items(), 2)
        if meet(a, b, 0) and meet(a, b, 1)
    ]


def heights(ui: browser.Ui, *, dom: bool) -> dict[str, float]:
    """The height that each class needs in the open graph, without its title bar."""
    ui.page.evaluate(
        """() => { for (const node of window.app.graph._nodes)
          node.setSize([node.size[0], node.computeSize()[1]]); }"""
    )
    ui.page.wait_for_timeout(500)
    types = ui.page.evaluate(
        "() => window.app.graph._nodes.map(node => [`${node.id} ${node.title}`, node.type])"
    )
    boxes, tallest = rectangles(ui, dom=dom), dict[str, float]()
    for key, kind in types:
        if kind != ui_workflows.NOTE:
            tallest[kind] = max(tallest.get(kind, 0), round(boxes[key][3] - TITLE))
    return tallest


def largest(measured: Iterable[dict[str, float]]) -> dict[str, float]:
    kept: dict[str, float] = {}
    for found in measured:
        for kind, height in found.items():
            kept[kind] = max(kept.get(kind, 0), height)
    return dict(sorted(kept.items()))


def measure(checkout: server.Checkout, folder: Path) -> list[dict[str, float]]:
    models = folder / "models"
    small_models.write_small_models(models)
    shipped_workflows.write_models(models)
    found = []
    with server.ComfyServer(checkout, folder / "base", models) as comfy:
        shipped_workflows.write_inputs(comfy.input_dir)
        for dom in MODES.values():
            with browser.open_ui(comfy.url, nodes_2=dom) as ui:
                for name in shipped_workflows.names():
                    path = ui_workflows.FOLDER / f"{name}.json"
                    ui.load(json.loads(path.read_text(encoding="utf-8")))
                    ui.fit()
                    found.append(heights(ui, dom=dom))
    return found


def place_all() -> None:
    """Place the nodes of every template anew."""
    for name in shipped_workflows.names():
        path = ui_workflows.FOLDER / f"{name}.json"
        graph = json.loads(path.read_text(encoding="utf-8"))
        ui_workflows.place(graph)
        text = json.dumps(graph, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    measured = [json.loads(ui_workflows.HEIGHTS.read_text(encoding="utf-8"))]
    for checkout in server.find_comfyui():
        with tempfile.TemporaryDirectory() as folder:
            measured += measure(checkout, Path(folder))
    ui_workflows.HEIGHTS.write_text(
        json.dumps(largest(measured), indent=1) + "\n", encoding="utf-8"
    )
    place_all()


if __name__ == "__main__":
    main()
