"""The shipped workflows in the editor's format: made from the API ones, and read back.

`python -m tests.comfy.ui_workflows [NAME ...]` writes `workflows/NAME.json` from
`workflows/api/NAME.json` and `workflows/notes/NAME.md`, with the editor of a real ComfyUI.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from stylemaster_core.weights.manifest import load_manifest
from tests.comfy import browser, server, shipped_workflows, small_models, validate

FOLDER = shipped_workflows.FOLDER
PACK = "stylemaster"
_CONTROLS = ("fixed", "increment", "decrement", "randomize")
NOTE = "MarkdownNote"
UPLOAD = "upload"  # a button, not a value
_KINDS = {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "STRING"}

# Groups from left to right, and the classes of nodes in each, from top to bottom.
_GROUPS: dict[str, tuple[str, ...]] = {
    "1  Models": (
        "StyleMasterTinyLoader",
        "CheckpointLoaderSimple",
        "StyleMasterVideoCrafterLoader",
        "UNETLoader",
        "CLIPLoader",
        "VAELoader",
        "CLIPVisionLoader",
        "StyleMasterAdapterLoader",
    ),
    "2  What goes in": (
        "LoadImage",
        "LoadVideo",
        "CLIPTextEncode",
        "StyleMasterLoadStyle",
        "GetVideoComponents",
        "ImageFromBatch",
        "ImageScale",
        "ImageScaleToTotalPixels",
        "SolidMask",
        "MaskComposite",
        "InvertMask",
        "SAM3_VideoTrack",
        "SAM3_TrackToMask",
        "MaskToImage",
    ),
    "3  Style": (
        "StyleMasterStyleEncoder",
        "StyleMasterTextureSelector",
        "StyleMasterBlendStyles",
        "StyleMasterSaveStyle",
        "StyleMasterShowScales",
        "PreviewImage",
    ),
    "4  Style and content act": (
        "EmptyLatentImage",
        "StyleMasterLatent",
        "StyleMasterApplyStyle",
        "StyleMasterGrayTileControl",
        "WanContextWindowsManual",
        "StyleMasterMotionAdapter",
    ),
    "5  Sampling and result": (
        "StyleMasterGuider",
        "RandomNoise",
        "KSamplerSelect",
        "BasicScheduler",
        "SamplerCustomAdvanced",
        "StyleMasterSampler",
        "VAEDecode",
        "StyleMasterCrop",
        "ImageCompositeMasked",
        "CreateVideo",
        "StyleMasterCompareStyles",
        "SaveVideo",
        "SaveImage",
    ),
}
_TRAINING_GROUPS: dict[str, tuple[str, ...]] = {
    "1  Pictures": ("StyleMasterDataset", "StyleMasterEncodeDataset"),
    "2  Training": ("StyleMasterTrainMotionAdapter",),
    "3  What came of it": ("StyleMasterTrainingMonitor", "PreviewImage"),
}
# What App mode shows, from top to bottom: titles of nodes, their inputs, and what stands there (it
# does not show titles).
_APP_INPUTS = (
    ("Content video", "file", "content video"),
    ("Content image", "image", "content picture"),
    ("Style image", "image", "style picture"),
    ("Second style image", "image", "second style picture"),
    ("Saved style", "style_name", "saved style"),
    ("What takes the style", "text", "what takes the style"),
    ("Prompt", "text", "prompt"),
    ("Apply the style", "strength", "style strength"),
    ("Apply the first style", "strength", "strength of the first"),
    ("Apply the second style", "strength", "strength of the second"),
    ("Keep the content", "strength", "keep the content"),
    ("Sample", "seed", "seed"),
    ("Seed", "noise_seed", "seed"),
)
_APP_RESULTS = ("Result", "Comparison")
# Room for what a node shows once it has run; the others are as large as the editor makes them.
_SIZES = {
    "CLIPTextEncode": (320, 120),
    "LoadImage": (320, 314),
    "LoadVideo": (320, 314),
    "PreviewImage": (320, 250),
    "SaveVideo": (380, 340),
    "SaveImage": (380, 340),
    "StyleMasterTrainMotionAdapter": (380, 820),
    "StyleMasterTrainingMonitor": (380, 360),
}
# By class: the height of a node in any version and either way to draw it (`layout`).
HEIGHTS = Path(__file__).with_name("node_heights.json")
_WIDTH, _TITLE, _GAP, _TALLEST = 320, 30, 30, 1400
_NOTE_SIZE = (440, 530)
_NOTE_ROOM = 700  # a note grows with its text where nodes are elements of the page
_COLOUR = "#7fa6bd"


def is_linked(value: Any) -> bool:
    """Whether an input of the API format is a link."""
    return isinstance(value, list)


def to_api(graph: Mapping[str, Any]) -> dict[str, Any]:
    """A workflow of the editor's format in API format, without any ComfyUI.

    Raises:
        ValueError: if a node's values and its widgets do not belong together.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": dict(_inputs(node, sources)),
            "_meta": {"title": node["title"]},
        }
        for node in graph["nodes"]
        if node["type"] != NOTE
    }


def _inputs(node: Mapping[str, Any], sources: Mapping[int, Any]) -> Iterator[tuple[str, Any]]:
    for slot, values in _slots(node):
        if slot.get("link") is not None:
            yield slot["name"], sources[slot["link"]]
        elif values and slot["name"] != UPLOAD:
            yield slot["name"], values[0]


def _slots(node: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[Any]]]:
    """Each input of a node with the values of its widget: none, one, or two of a seed."""
    values, slots = list(node.get("widgets_values") or []), []
    for slot in node["inputs"]:
        own = [values.pop(0) if values else None] if "widget" in slot else []
        if own and isinstance(own[0], int) and values and values[0] in _CONTROLS:
            own.append(values.pop(0))  # what the editor does with a seed after a run
        slots.append((slot, own))
    if values:
        raise ValueError(f"node {node['id']} ({node['type']}) has more values: {values}")
    return slots


def name_the_same(graph: Mapping[str, Any], api: Mapping[str, Any]) -> None:
    """Give each node the inputs with a value that the API workflow names, and no others.

    Stock nodes of other versions have more of them, or fewer; a value of one that this version
    lacks stands after the others, as in newer versions. Whether what is left out is at its default
    says `validate.differences`.
    """
    for node in graph["nodes"]:
        if node["type"] == NOTE:
            continue
        wanted = api[str(node["id"])]["inputs"]
        kept = [
            (slot, values)
            for slot, values in _slots(node)
            if not values or slot["name"] in wanted or slot["name"] == UPLOAD
        ]
        there = {slot["name"] for slot, _ in kept}
        for name, value in wanted.items():
            if name not in there:
                kind = _KINDS[type(value)]
                slot = {"name": name, "type": kind, "widget": {"name": name}, "link": None}
                kept.append((slot, [value]))
        node["inputs"] = [slot for slot, _ in kept]
        if any(values for _, values in kept):
            node["widgets_values"] = [value for _, values in kept for value in values]


def model_files() -> dict[str, dict[str, str]]:
    """What the missing-model dialog is told of each safetensors file that can be downloaded."""
    models = {}
    for entry in load_manifest().values():
        if not entry.file_name.endswith(".safetensors"):
            continue
        url = f"https://huggingface.co/{entry.repository}/resolve/main/{entry.file}"
        model = {"name": entry.file_name, "url": url, "directory": entry.folder}
        if entry.sha256:
            model |= {"hash": entry.sha256, "hash_type": "SHA256"}
        models[entry.file_name] = model
    return models


def finish(graph: dict[str, Any], note: str) -> dict[str, Any]:
    """Arrange what the editor serialised; add the note, groups and addresses of models."""
    models = model_files()
    for node in graph["nodes"]:
        node.pop("widgets_values_named", None)  # newer editors say all values twice
        values = node.get("widgets_values") or []
        node["widgets_values"] = ["fixed" if value in _CONTROLS else value for value in values]
        wanted = [models[value] for value in values if isinstance(value, str) and value in models]
        if wanted:
            node["properties"]["models"] = wanted
        if node["type"].startswith("StyleMaster"):
            node["properties"]["cnr_id"] = PACK
    _arrange(graph)
    graph["nodes"].append(_note(graph["last_node_id"] + 1, note))
    graph["last_node_id"] += 1
    graph["extra"] = {"ds": {"scale": 0.6, "offset": [120, 140]}}
    graph.pop("id", None)
    return graph


def make_app(graph: Mapping[str, Any]) -> None:
    """Say what App mode shows of a workflow; nothing where no result is saved, as in a training.

    Every template opens as a graph; the editor's switch shows it as an app.
    """
    titled = {node["title"]: node for node in graph["nodes"]}
    results = [str(node["id"]) for title, node in titled.items() if title.startswith(_APP_RESULTS)]
    if not results:
        return
    inputs = []
    for title, name, label in _APP_INPUTS:
        for slot in titled[title]["inputs"] if title in titled else ():
            if slot["name"] == name:
                slot["label"] = label
                inputs.append([str(titled[title]["id"]), name])
    graph["extra"] |= {"linearMode": False, "linearData": {"inputs": inputs, "outputs": results}}


def _arrange(graph: dict[str, Any]) -> None:
    types = {node["type"] for node in graph["nodes"]}
    groups = _TRAINING_GROUPS if "StyleMasterEncodeDataset" in types else _GROUPS
    left_out = types - {class_ for classes in groups.values() for class_ in classes}
    if left_out:
        raise ValueError(f"put these classes into a group: {sorted(left_out)}")
    left = 0.0
    graph["groups"] = []
    for title, classes in groups.items():
        chosen = [node for node in graph["nodes"] if node["type"] in classes]
        if not chosen:
            continue
        chosen.sort(key=lambda node: node["id"])
        columns = _columns(chosen)
        # The first group stands below the note, with a column as wide.
        above = 0.0 if graph["groups"] else _NOTE_ROOM + 2 * _GAP + _TITLE
        right, bottom = left, above
        for column in columns:
            width, top = max(_size(node)[0] for node in column), above
            width = max(width, _NOTE_SIZE[0] if above else 0)
            for node in column:
                node["size"] = [width, _size(node)[1]]
                node["pos"] = [right, top + _TITLE]
                top += _TITLE + _room(node) + _GAP
            right, bottom = right + width + _GAP, max(bottom, top)
        box = [left - _GAP / 2, above - 60, right - left, bottom - above + 60]
        number = len(graph["groups"]) + 1
        graph["groups"].append(
            {"id": number, "title": title, "bounding": box, "color": _COLOUR, "flags": {}}
        )
        left = right + 2 * _GAP


def _columns(nodes: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """As few columns as are no taller than the tallest allowed, a new one for each sampler."""
    starts = [0, *(i for i, node in enumerate(nodes) if i and node["type"] == "StyleMasterSampler")]
    branches = [nodes[a:b] for a, b in zip(starts, [*starts[1:], len(nodes)], strict=True)]
    return [column for branch in branches for column in _balanced(branch)]


def _balanced(nodes: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    heights = [_room(node) + _TITLE + _GAP for node in nodes]
    count = -(-int(sum(heights)) // _TALLEST)
    columns: list[list[dict[str, Any]]] = [[]]
    filled = 0.0
    for node, height in zip(nodes, heights, strict=True):
        if columns[-1] and filled + height / 2 > len(columns) * sum(heights) / count:
            columns.append([])
        columns[-1].append(node)
        filled += height
    return columns


def _size(node: Mapping[str, Any]) -> tuple[float, float]:
    tallest = _heights().get(node["type"], node["size"][1])
    return _SIZES.get(node["type"], (_WIDTH, min(node["size"][1], tallest)))


@cache
def _heights() -> dict[str, float]:
    return json.loads(HEIGHTS.read_text(encoding="utf-8"))


def _room(node: Mapping[str, Any]) -> float:
    """Height that is kept free for a node, however it is drawn."""
    return max(_size(node)[1], _heights().get(node["type"], 0))


def place(graph: dict[str, Any]) -> None:
    """Place the nodes of a finished workflow anew, below and beside its note."""
    notes = [node for node in graph["nodes"] if node["type"] == NOTE]
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] != NOTE]
    _arrange(graph)
    for note in notes:
        note["size"] = list(_NOTE_SIZE)
    graph["nodes"] += notes


def _note(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number,
        "type": NOTE,
        "title": "Read me",
        "pos": [0, -_TITLE],
        "size": list(_NOTE_SIZE),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


def note_of(name: str, api: Mapping[str, Any]) -> str:
    """The note of a workflow: its own text, and the files that it needs."""
    text = (FOLDER / "notes" / f"{name}.md").read_text(encoding="utf-8")
    models, lines = model_files(), []
    for node in api.values():
        for value in node["inputs"].values():
            if value in (models if isinstance(value, str) else ()):
                file = models[value]
                lines.append(f"- [{value}]({file['url']}) in `models/{file['directory']}`")
    values = [value for node in api.values() for value in node["inputs"].values()]
    lines += [line for file, line in _OWN_FILES.items() if file in values]
    return text + ("\n## Files\n\n" + "\n".join(lines) + "\n" if lines else "")


_OWN_FILES = {
    "sam3.1_multiplex_fp16.safetensors": "- [sam3.1_multiplex_fp16.safetensors](https://huggingface"
    ".co/Comfy-Org/sam3.1/resolve/main/checkpoints/sam3.1_multiplex_fp16.safetensors) in "
    "`models/checkpoints` (Meta's SAM licence)",
    "videocrafter_t2v_512_unet.safetensors": "- `videocrafter_t2v_512_unet.safetensors` in "
    "`models/diffusion_models`, `videocrafter_t2v_512_vae.safetensors` in `models/vae` and "
    "`videocrafter_t2v_512_text_encoder.safetensors` in `models/text_encoders`: in the pack's "
    "folder, run `python -m stylemaster_core weights download videocrafter-t2v-512` and then `... "
    "weights convert FILE` with ComfyUI's Python, or get "
    "[model.ckpt](https://huggingface.co/VideoCrafter/Text2Video-512) (research and non-commercial "
    "use) yourself",
    "stylecrafter_adapter_v1.safetensors": "- `stylecrafter_adapter_v1.safetensors` and "
    "`stylecrafter_temporal_v1_1.safetensors` in `models/stylecrafter`, in the same way of "
    "`stylecrafter-adapter` and `stylecrafter-temporal` "
    "([adapter_v1.pth, temporal_v1_1.pth](https://huggingface.co/liuhuohuo/StyleCrafter))",
    "stylemaster_adapter.safetensors": "- `stylemaster_adapter.safetensors` in "
    "`models/stylemaster`: put the released "
    "[stylemaster.ckpt](https://huggingface.co/KlingTeam/StyleMaster) there; choosing it in *Style "
    "adapter* and pressing Run shows the command that converts it",
    "stylemaster_controlnet.safetensors": "- `stylemaster_controlnet.safetensors` in "
    "`models/controlnet`, made by the same command from the release's `controlnet.ckpt`; that file "
    "itself works, too",
    "stylecrafter_sdxl.safetensors": "- `stylecrafter_sdxl.safetensors` in `models/stylecrafter`: "
    "put the released [stylecrafter_sdxl.ckpt](https://huggingface.co/liuhuohuo/StyleCrafter-SDXL) "
    "there (its README allows research and non-commercial use) and, in the pack's folder, run "
    "`python -m stylemaster_core weights convert FILE` with ComfyUI's Python",
}


def make(name: str, ui: browser.Ui, info: Mapping[str, Any]) -> dict[str, Any]:
    """One workflow in the editor's format.

    Args:
        name: of the workflow.
        ui: the editor.
        info: the server's `object_info`.

    Raises:
        ValueError: if it would not mean the same as the API one.
    """
    api = shipped_workflows.load(name)
    ui.load(api)
    graph = finish(ui.serialize(), note_of(name, api))
    for node in graph["nodes"]:
        node["title"] = node.get("title") or api[str(node["id"])]["_meta"]["title"]
    _check(name, to_api(graph), api, info)
    name_the_same(graph, api)
    make_app(graph)
    ui.load(graph)  # whether the editor reads what was taken off and put on as it is meant
    _check(name, ui.to_api(), api, info)
    return graph


def _check(
    name: str, made: Mapping[str, Any], api: Mapping[str, Any], info: Mapping[str, Any]
) -> None:
    if found := validate.differences(made, api, info):
        lines = "\n".join(found)
        raise ValueError(f"{name}: the editor changed the workflow; are all files there?\n{lines}")


def main() -> None:
    checkouts = server.find_comfyui()
    if not checkouts:
        raise SystemExit("no ComfyUI found: set COMFYUI_PATH")
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        small_models.write_small_models(models)
        shipped_workflows.write_models(models)
        with server.ComfyServer(checkouts[0], Path(folder) / "base", models) as comfy:
            shipped_workflows.write_inputs(comfy.input_dir)
            info = comfy.object_info()
            with browser.open_ui(comfy.url) as ui:
                for name in sys.argv[1:] or shipped_workflows.names():
                    text = json.dumps(make(name, ui, info), indent=1, ensure_ascii=False)
                    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
