"""A report as one HTML page that needs no other file: figures, and clips side by side."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .markdown import NOTES, cell, counts, extremes, not_measured, ordering, shown_methods
from .report import METRICS
from .scene import Scene

PREVIEW_PX, PREVIEW_FRAMES, PREVIEW_MS = 160, 12, 1200
STYLE = "style picture"


def save_previews(folder: Path, name: str, scene: Scene) -> None:
    """Keep a row's clips, small, for `write_page`: only one row is in memory at a time.

    Args:
        folder: where; a folder is made in it.
        name: of the row.
        scene: its clips.
    """
    shown = {STYLE: scene.style_image[None], **scene.clips}
    place = folder / name_of(name)
    place.mkdir(parents=True)
    for method, clip in shown.items():
        (place / f"{name_of(method)}.webp").write_bytes(preview(clip))


def name_of(text: str) -> str:
    """A name for files and elements of the page that any text has for itself."""
    return "r" + hashlib.sha256(text.encode()).hexdigest()[:16]


def preview(frames: np.ndarray) -> bytes:
    """At most 12 frames of uint8 [T, H, W, 3], evenly chosen, as animated WebP of up to 160 px."""
    count = min(PREVIEW_FRAMES, len(frames))
    chosen = [round(i * (len(frames) - 1) / max(count - 1, 1)) for i in range(count)]
    pictures = [Image.fromarray(frames[i]) for i in chosen]
    for picture in pictures:
        picture.thumbnail((PREVIEW_PX, PREVIEW_PX))
    stream = io.BytesIO()
    more: dict[str, Any] = {}
    if count > 1:
        more = {"save_all": True, "append_images": pictures[1:], "duration": PREVIEW_MS // count}
    pictures[0].save(stream, "WEBP", quality=70, method=2, loop=0, **more)
    return stream.getvalue()


def write_page(path: Path, content: dict[str, Any], previews: Path) -> None:
    """Write the page.

    Args:
        path: of the new file.
        content: from `to_json`.
        previews: the folder of `save_previews`.
    """
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(_page(content, previews))


def _page(content: dict[str, Any], previews: Path) -> Iterable[str]:
    title = content.get("title", "Evaluation")
    method, metric = ordering(content)
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
    yield f"<meta name=viewport content='width=device-width'><style>{_CSS}</style>"
    yield f"<h1>{escape(title)}</h1><p>{escape(counts(content))}</p>"
    yield from _summary(content)
    yield from _list("Could not be made or measured", content["problems"])
    yield from _list("Not measured", not_measured(content))
    yield f"<p class=note>{escape(NOTES)}</p>"
    best, worst = extremes(content)
    for label, rows in (("best", best), ("worst", worst)):
        what = f"{escape(method)} by {escape(METRICS[metric][0])}"
        yield f"<h2>The {label} {len(rows)} of {what}</h2>"
        yield "<ol class=strip>"
        for row in rows:
            number = cell(row["scores"][method][metric])
            yield f"<li><a href='#{name_of(row['name'])}'><b>{number}</b> {escape(row['name'])}</a>"
        yield "</ol>"
    methods = shown_methods(content)
    yield "<h2>Rows</h2><p class=controls>Order by <select id=metric>"
    for name, (label, better) in METRICS.items():
        found = [content["summary"][m].get(name, {}).get("value") for m in methods]
        if better in ("higher", "lower") and any(isinstance(value, float) for value in found):
            chosen = " selected" if name == metric else ""
            yield f"<option value={name}{chosen}>{escape(label)}</option>"
    yield "</select> of <select id=method>"
    for name in methods:
        yield f"<option{' selected' if name == method else ''}>{escape(name)}</option>"
    yield "</select> <button data-show=best>best ten</button> <button data-show=worst>worst ten"
    yield "</button> <button data-show=all>all, as listed</button></p><main>"
    for row in content["rows"]:
        yield from _card(row, methods, previews)
    facts = {
        "higher": [name for name, (_, better) in METRICS.items() if better == "higher"],
        "scores": {name_of(row["name"]): row["scores"] for row in content["rows"]},
    }
    # "<" could end the script.
    yield f"</main><script>const facts = {json.dumps(facts).replace('<', chr(92) + 'u003c')};"
    yield f"{_SCRIPT}</script></html>"


def _summary(content: dict[str, Any]) -> Iterable[str]:
    methods = shown_methods(content)
    yield "<div class=scroll><table><tr><th>metric<th>better"
    yield from (f"<th>{escape(method)}" for method in methods)
    for name, (label, better) in METRICS.items():
        found = [content["summary"][method].get(name) for method in methods]
        if not any(f is not None and isinstance(f["value"], float) for f in found):
            continue
        yield f"<tr><td>{escape(label)}<td>{escape(better)}"
        for one in found:
            text = "-" if one is None else cell(one["value"])
            interval = one and one["interval"]
            between = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
            yield f"<td>{text}<small>{between}</small>"
    yield "</table></div>"


def _card(row: dict[str, Any], methods: list[str], previews: Path) -> Iterable[str]:
    yield f"<section id='{name_of(row['name'])}'><h3>{escape(row['name'])}</h3>"
    yield f"<p>{escape(row['prompt'])}</p><div class=clips>"
    folder = previews / name_of(row["name"])
    for method in (STYLE, *methods):
        file = folder / f"{name_of(method)}.webp"
        if file.is_file():
            data = base64.b64encode(file.read_bytes()).decode()
            yield f"<figure><img loading=lazy src='data:image/webp;base64,{data}' "
            yield f"alt='{escape(method)}'><figcaption>{escape(method)}</figcaption></figure>"
    present = [method for method in methods if method in row["scores"]]
    yield "</div><details open><summary>figures</summary><div class=scroll><table><tr><th>metric"
    yield from (f"<th>{escape(method)}" for method in present)
    for name, (label, _) in METRICS.items():
        numbers = [row["scores"][method].get(name) for method in present]
        if any(isinstance(number, float) for number in numbers):
            yield f"<tr><td>{escape(label)}" + "".join(f"<td>{cell(n)}" for n in numbers)
    yield "</table></div></details></section>"


def _list(heading: str, items: list[str]) -> Iterable[str]:
    if items:
        yield f"<details{' open' if len(items) <= 10 else ''}><summary>{heading}: {len(items)}"
        yield (
            "</summary><ul>" + "".join(f"<li>{escape(item)}" for item in items) + "</ul></details>"
        )


_CSS = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1250px; padding: 0 1rem;
  color: #1d2329; background: #fff }
h1, h2 { line-height: 1.2 } h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th, td { text-align: left; padding: .2rem .7rem; border-bottom: 1px solid #dde2e6 }
td:nth-child(n+2) { font-variant-numeric: tabular-nums } td small { display: block; color: #68727b }
.note, figcaption, section p { color: #55606a; font-size: 13px }
section { border: 1px solid #dde2e6; border-radius: 8px; padding: .8rem 1rem; margin: 1rem 0 }
section p { margin: .2rem 0 .6rem } section:target { border-color: #1a6fd4 }
.clips { display: flex; flex-wrap: wrap; gap: .6rem } figure { margin: 0 }
figure img { display: block; max-width: 160px; border-radius: 4px }
.strip { columns: 2; font-size: 13px } .strip li { break-inside: avoid; overflow-wrap: anywhere }
.controls { position: sticky; top: 0; background: #fff; padding: .5rem 0 }
"""

_SCRIPT = """
const list = document.querySelector("main"), cards = [...list.children];
const chosen = id => document.getElementById(id).value;
function show(what) {
  if (what === "all") {
    cards.forEach(card => { card.hidden = false; list.append(card); });
    return;
  }
  const metric = chosen("metric"), method = chosen("method");
  const score = card => facts.scores[card.id][method]?.[metric];
  const known = cards.filter(card => typeof score(card) === "number");
  const sign = (facts.higher.includes(metric) ? -1 : 1) * (what === "best" ? 1 : -1);
  known.sort((a, b) => sign * (score(a) - score(b)));
  cards.forEach(card => card.hidden = true);
  known.slice(0, 10).forEach(card => { card.hidden = false; list.append(card); });
}
document.querySelectorAll("button").forEach(b => b.onclick = () => show(b.dataset.show));
document.querySelectorAll(".strip a").forEach(a => a.onclick = () => show("all"));
"""
