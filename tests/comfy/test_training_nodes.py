"""The training nodes in a real ComfyUI: pictures in, an adapter that the loader takes out.

The child process needs diffusers and accelerate, which a ComfyUI often lacks, so it is started
with the Python that runs the tests (STYLEMASTER_PYTHON).
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.comfy import server, shipped_workflows, small_models, test_nodes
from tests.comfy.test_nodes import node

SETTINGS = [
    "run.precision=float32",
    "run.num_workers=0",
    "run.validation_samples=2",
    "run.sample_steps=1",
    "optimizer.warmup_steps=0",
    "flow.text_length=8",
    "projection.hidden_width=32",
]
RUN = {
    "file_name": "tried",
    "run_name": "tried",
    "steps": 3,
    "batch_size": 1,
    "accumulation": 1,
    "learning_rate": 1e-3,
    "seed": 0,
    "save_every": 1000,
    "sample_every": 0,
    "resume": True,
    "settings": "\n".join(SETTINGS),
}
CURVE_WIDTH, CURVE_HEIGHT = 640, 360
BASE = {"base_model": small_models.TRANSFORMER_FILE}

DATA = node(
    "StyleMasterDataset", source="pictures", still_frames=5, caption="", strip_style_words=True
)
CACHE = node(
    "StyleMasterEncodeDataset",
    dataset="@data",
    name="stills",
    vae_name=small_models.VAE_FILE,
    text_encoder_name="words.json",
    clip_vision_name="small",
    width=32,
    height=32,
    num_frames=5,
    fps=0.0,
    short_videos="reject",
    gray_tile=True,
)
STILLS = {"data": DATA, "cache": CACHE}
PICTURES = {
    "data": {**DATA, "inputs": {**DATA["inputs"], "still_frames": 0}},
    "cache": {**CACHE, "inputs": {**CACHE["inputs"], "name": "pictures", "num_frames": 1}},
}
PAIRS = {
    "data": node(
        "StyleMasterIllusionDataset",
        pictures="pictures",
        name="pairs",
        num_pairs=8,
        size=32,
        seed=0,
    ),
    "cache": {**CACHE, "inputs": {**CACHE["inputs"], "name": "pairs", "gray_tile": False}},
}


@pytest.fixture(scope="module")
def comfy(comfy_checkout, tmp_path_factory):
    """A server with models of its own; its child processes get a Python with the libraries."""
    from stylemaster_core.data.demo_scene import demo_styles
    from stylemaster_core.models.small import write_small_models

    base = tmp_path_factory.mktemp("training")
    models = base / "models"
    small_models.write_small_models(models)
    small_models.save(
        small_models.adapter_weights(), models / "stylemaster" / "small_adapter.safetensors"
    )
    encoders = write_small_models(base / "encoders")
    for folder in ("text_encoders", "clip_vision", "controlnet", "loras"):
        (models / folder).mkdir()
    words = {"kind": "hashed_words", "width": small_models.TEXT_WIDTH, "seed": 0}
    (models / "text_encoders" / "words.json").write_text(json.dumps(words))
    shutil.copytree(encoders.image_encoder, models / "clip_vision" / "small")
    running = server.ComfyServer(comfy_checkout, base / "base", models)
    pictures = running.input_dir / "pictures"
    pictures.mkdir()
    for name, picture in demo_styles(64).items():
        Image.fromarray(picture).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a painting of {name}")
    (running.base / "secret.png").write_bytes((pictures / "neon.png").read_bytes())
    (running.input_dir / "bad.csv").write_text("file,caption\n../secret.png,a secret\n")
    shutil.copy(pictures / "neon.png", running.input_dir / "style_0.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLEMASTER_PYTHON", sys.executable)
        with running:
            yield running


def train(name: str, run_name: str, **inputs: Any) -> dict[str, Any]:
    """A trainer's node."""
    names = {"file_name": run_name, "run_name": run_name}
    return node(f"StyleMasterTrain{name}", cache="@cache", **{**RUN, **names, **inputs})


def sampler(model: str) -> dict[str, Any]:
    return node(
        "KSampler",
        model=model,
        positive="@prompt",
        negative="@prompt",
        latent_image="@latent",
        seed=0,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )


def use_projection(file: str) -> dict[str, Any]:
    graph = {**STILLS, "next": train("Style", "projected", **BASE, **NEW["Style"], steps=1)}
    graph["next"]["inputs"]["global_projection"] = file
    return graph


def use_style(file: str) -> dict[str, Any]:
    graph = test_nodes.workflow(next=node("PreviewImage", images="@crop"))
    graph["adapter"]["inputs"]["adapter_name"] = file
    graph["latent"]["inputs"] |= {"num_frames": 1, "width": 64, "height": 64}
    return graph


def use_motion(file: str) -> dict[str, Any]:
    return {
        "model": node(
            "UNETLoader", unet_name=small_models.TRANSFORMER_FILE, weight_dtype="default"
        ),
        "motion": node(
            "StyleMasterMotionAdapter",
            model="@model",
            adapter_name=file,
            motion_scale=-1.0,
            start=0.0,
            end=1.0,
        ),
        "clip": node("StubTextEncoderLoader"),
        "prompt": node("CLIPTextEncode", clip="@clip", text="a cat"),
        "latent": node("StyleMasterLatent", num_frames=5, width=32, height=32),
        "with": sampler("@motion"),
        "without": sampler("@model"),
        "next": node("StubCompare", a="@with", b="@without"),
    }


def use_adapter(file: str) -> dict[str, Any]:
    """The next stage of StyleCrafter."""
    inputs = {"stage": "stylecrafter-scales", "adapter": file, "steps": 2}
    return {**PICTURES, "next": train("StyleCrafter", "scales", **BASE, **inputs)}


def use_control(file: str) -> dict[str, Any]:
    graph = test_nodes.workflow(
        frames=node("LoadImage", image="style_0.png"),
        control=test_nodes.controlled(frames="@frames", control_net_name=file, model="@apply:0"),
        sample=test_nodes.sampled("control", latent="@latent"),
        next=node("PreviewImage", images="@crop"),
    )
    graph["latent"]["inputs"] |= {"num_frames": 1, "width": 64, "height": 64}
    return graph


class Case(NamedTuple):
    """A trainer's node."""

    data: dict[str, Any]  # dataset and cache
    inputs: dict[str, Any]  # its own
    trained: str  # file in the folder of its run
    folder: str  # of models, where the loaders look
    use: Callable[[str], dict[str, Any]]  # a workflow whose "next" needs the trained file


NEW = {
    "Style": {"stage": "style-images", "adapter": "new", "global_projection": "new"},
    "MotionAdapter": {"motion_adapter": "new", "rank": 2},
    "GrayTileControl": {"controlnet": "new"},
    "StyleCrafter": {"stage": "stylecrafter-images", "adapter": "new"},
}
CASES = {
    "GlobalProjection": Case(
        PAIRS, {}, "global_projection.safetensors", "stylemaster", use_projection
    ),
    "Style": Case(
        STILLS, BASE | NEW["Style"], "style_adapter.safetensors", "stylemaster", use_style
    ),
    "MotionAdapter": Case(
        STILLS, BASE | NEW["MotionAdapter"], "motion_adapter.safetensors", "loras", use_motion
    ),
    "GrayTileControl": Case(
        STILLS, BASE | NEW["GrayTileControl"], "controlnet.safetensors", "controlnet", use_control
    ),
    "StyleCrafter": Case(
        PICTURES,
        BASE | NEW["StyleCrafter"],
        "stylecrafter_adapter.safetensors",
        "stylemaster",
        use_adapter,
    ),
}


def run(comfy: server.ComfyServer, graph: dict[str, Any], **options: Any) -> server.Result:
    result = comfy.run_prompt(graph, **options)
    assert result.status == "success", said(result)
    return result


def refusal(comfy: server.ComfyServer, graph: dict[str, Any]) -> str:
    result = comfy.run_prompt(graph)
    assert result.status == "error"
    return said(result)


def said(result: server.Result) -> str:
    """The message of an error, or all of another result."""
    return (result.error or {}).get("exception_message", str(result))


def written_at(folder: Path) -> list[int]:
    """When the files were last written that a training writes first."""
    return [(folder / name).stat().st_mtime_ns for name in ("config.json", "stats.jsonl")]


def opened(jpeg: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(float)


def shows(preview: np.ndarray, sheet: Path) -> bool:
    """Whether the lower part of a picture of a run is this sheet of sample frames."""
    lower = preview[CURVE_HEIGHT:]
    if not len(lower):
        return False
    frames = Image.open(sheet)
    scale = min(CURVE_WIDTH / frames.width, CURVE_HEIGHT / frames.height)
    width, height = round(frames.width * scale), round(frames.height * scale)
    assert len(lower) == height, "as large as fits"
    left = (CURVE_WIDTH - width) // 2
    expected = np.array(frames.resize((width, height)))
    return np.abs(lower[:, left : left + width] - expected).mean() < 4


@pytest.mark.parametrize("name", CASES)
def test_interrupt_resume_and_use(comfy, name):
    case, file = CASES[name], f"{name}_tried"
    folder = comfy.output_dir / "stylemaster" / "runs" / file
    sampled = 0 if name == "GlobalProjection" else 1

    def graph(steps: int, **changes: Any) -> dict[str, Any]:
        inputs = {**case.inputs, "steps": steps, "sample_every": sampled, **changes}
        return {**case.data, "train": train(name, file, **inputs)}

    steps: list[int] = []
    previews: list[np.ndarray] = []
    stopped: list[int] = []

    def note(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data.get("node") == "train":
            steps.append(data["value"])

    def interrupt_at_step_2(jpeg: bytes) -> None:
        previews.append(opened(jpeg))
        if steps and steps[-1] >= 2 and not stopped:
            stopped.append(steps[-1])
            comfy.interrupt()

    result = comfy.run_prompt(graph(100_000), on_event=note, on_preview=interrupt_at_step_2)
    assert result.status == "interrupted", said(result)
    assert (len(previews[-1]) > CURVE_HEIGHT) == bool(sampled), "sample frames below the curve"
    # A trainer that does not stop when asked is killed, and leaves no checkpoint.
    done = int((folder / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert steps == sorted(steps) and done >= steps[-1] >= 2 and not (folder / "stop").exists()
    target = comfy.models_dir / case.folder / f"{file}.safetensors"
    assert not target.exists()

    steps.clear()
    previews.clear()
    result = run(
        comfy, graph(done + 2), on_event=note, on_preview=lambda j: previews.append(opened(j))
    )
    lines = map(json.loads, (folder / "stats.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, done + 3))
    assert steps[0] >= done and steps[-1] == done + 2
    assert target.read_bytes() == (folder / case.trained).read_bytes()
    assert result.node_seconds.keys() == {"train"}, "the cache is kept"
    if sampled:
        last = folder / "samples" / f"step-{done + 2:08d}.png"
        assert shows(previews[-1], last)
        assert shows(picture(comfy, result.outputs["train"]), last)

    before, written = target.read_bytes(), written_at(folder)
    again = graph(done + 2, save_every=7) | {"more": node("PreviewImage", images="@train:2")}
    result = run(comfy, again)
    assert written_at(folder) == written, "a run that is finished is not trained again"
    curve = picture(comfy, result.outputs["more"])
    assert curve.shape == (CURVE_HEIGHT, CURVE_WIDTH, 3)
    assert len(np.unique(curve.reshape(-1, 3), axis=0)) > 4

    outputs = run(comfy, case.use(f"{file}.safetensors")).outputs["next"]
    assert outputs["images"] if name != "MotionAdapter" else outputs["max_difference"][0] > 1e-6
    assert target.read_bytes() == before


def test_stylecrafter_stage_by_stage(comfy):
    def stage(name: str, adapter: str, data: dict[str, Any], **more: Any) -> str:
        inputs = {**BASE, "stage": name, "adapter": adapter, **more}
        run(comfy, {**data, "train": train("StyleCrafter", name, **inputs)})
        return f"{name}.safetensors"

    adapter = stage("stylecrafter-images", "new", PICTURES)
    scales = stage("stylecrafter-scales", adapter, PICTURES)
    without_pictures = "\n".join([*SETTINGS, "stylecrafter.image_share=0"])
    lora = stage("stylecrafter-clips", scales, STILLS, settings=without_pictures)
    folders = {adapter: "stylemaster", scales: "stylemaster", lora: "loras"}
    assert all((comfy.models_dir / folder / name).is_file() for name, folder in folders.items())
    for name in (adapter, scales):
        assert run(comfy, use_style(name)).outputs["next"]["images"]
    assert run(comfy, use_motion(lora)).outputs["next"]["max_difference"][0] > 1e-6
    graph = {**PICTURES, "train": train("StyleCrafter", "no", **BASE, **NEW["StyleCrafter"])}
    graph["train"]["inputs"]["stage"] = "stylecrafter-scales"
    assert "there is no adapter whose scales" in refusal(comfy, graph)


def test_an_existing_file_is_not_overwritten(comfy):
    target = comfy.models_dir / "loras" / "mine.safetensors"
    target.write_bytes(b"mine")
    inputs = {**BASE, **NEW["MotionAdapter"], "file_name": "mine"}
    graph = {**STILLS, "train": train("MotionAdapter", "other", **inputs)}
    assert "exists and is not overwritten" in refusal(comfy, graph)
    assert target.read_bytes() == b"mine"


def test_pairs_hold_the_same_pixels(comfy):
    graph = {**PAIRS, "look": node("SaveImage", images="@data:1", filename_prefix="pairs")}
    images = run(comfy, graph).outputs["look"]["images"]
    shown = [np.array(Image.open(comfy.output_dir / image["filename"])) for image in images]
    assert [image.shape for image in shown] == [(32, 64, 3)] * 8
    for image in shown:
        one, other = image[:, :32].reshape(-1, 3), image[:, 32:].reshape(-1, 3)
        assert not np.array_equal(one, other)
        assert sorted(map(tuple, one)) == sorted(map(tuple, other))


def test_the_monitor_follows_a_run_of_the_command_line(comfy):
    run(comfy, STILLS)
    folder = comfy.output_dir / "stylemaster" / "runs" / "elsewhere"
    words = {
        "data": comfy.output_dir / "stylemaster" / "caches" / "stills",
        "out": folder,
        "base": comfy.models_dir / "diffusion_models" / small_models.TRANSFORMER_FILE,
        "vae": comfy.models_dir / "vae" / small_models.VAE_FILE,
        "steps": 100_000,
    }
    options = [f"--{key}={value}" for key, value in words.items()]
    settings = [*SETTINGS, "run.sample_every=1", "run.save_every=100000", "motion.rank=2"]
    options += [f"--set={setting}" for setting in settings]
    command = [sys.executable, "-m", "stylemaster_core", "train", "motion", *options, "--cpu"]

    def watch(**inputs: Any) -> dict[str, Any]:
        return {
            "monitor": node("StyleMasterTrainingMonitor", run_name="elsewhere", **inputs),
            "curve": node("PreviewImage", images="@monitor:0"),
            "samples": node("PreviewImage", images="@monitor:1"),
        }

    sheets: list[int] = []

    def act_at_the_third_picture(act: Callable[[], object]) -> Callable[[bytes], None]:
        def see(jpeg: bytes) -> None:
            sheets.append(len(opened(jpeg)) - CURVE_HEIGHT)
            if len(sheets) == 3:
                act()

        sheets.clear()
        return see

    with subprocess.Popen(command, cwd=server.PACK, stderr=subprocess.DEVNULL) as trainer:
        try:
            stats = folder / "stats.jsonl"
            while not (stats.exists() and '"sample"' in stats.read_text()):
                assert trainer.poll() is None
                time.sleep(0.2)
            # As it is now, at once.
            outputs = run(comfy, watch(follow=False)).outputs
            assert outputs["curve"]["images"] and outputs["samples"]["images"]
            # Live, until the prompt is interrupted: the run goes on.
            result = comfy.run_prompt(watch(), on_preview=act_at_the_third_picture(comfy.interrupt))
            assert result.status == "interrupted" and trainer.poll() is None
            assert all(height > 0 for height in sheets)
            # Live, until it ends.
            stop = act_at_the_third_picture((folder / "stop").touch)
            result = run(comfy, watch(), on_preview=stop)
            assert trainer.wait(30) == 130 and len(sheets) >= 3
        finally:
            trainer.kill()
    last = sorted(folder.glob("samples/*.png"))
    assert shows(picture(comfy, result.outputs["monitor"]), last[-1])
    assert len(result.outputs["samples"]["images"]) == len(last)
    run(comfy, watch())
    assert not run(comfy, watch()).node_seconds, "it has ended: there is nothing new to show"


def test_the_shipped_workflow(comfy):
    """As it is shipped but for models, sizes, steps and the name of the trained file."""
    name = "train_motion_adapter"
    settings = next(
        node["inputs"]["settings"]
        for node in shipped_workflows.load(name).values()
        if "settings" in node["inputs"]
    )
    encoders = {key: CACHE["inputs"][key] for key in CACHE["inputs"] if key.endswith("_name")}
    graph = shipped_workflows.small(
        name,
        {
            "Folder of pictures": {"still_frames": 5},
            "Encode them as still clips": {
                **encoders,
                "width": 32,
                "height": 32,
                "num_frames": 5,
            },
            "Train the motion adapter": {
                "base_model": small_models.TRANSFORMER_FILE,
                "file_name": "shipped",
                "steps": 2,
                "accumulation": 2,
                "sample_every": 1,
                "settings": f"{settings}\n{RUN['settings']}\nrun.sample_steps=2",
            },
        },
    )
    outputs = run(comfy, graph).outputs
    assert (comfy.models_dir / "loras" / "shipped.safetensors").is_file()
    samples = outputs[shipped_workflows.node_titled(graph, "Sample pictures")]["images"]
    assert len(samples) == 2


def picture(comfy: server.ComfyServer, outputs: dict[str, Any]) -> np.ndarray:
    return opened(comfy.view(outputs["images"][0]))


@pytest.mark.parametrize(
    ("key", "inputs", "reason"),
    # The trainer first: what is before it is kept from one prompt to the next.
    [
        ("train", {"run_name": "/tmp/run"}, "absolute"),
        ("train", {"file_name": "../tried"}, "climbs up"),
        ("train", {"file_name": "styles/tried"}, "saved styles"),
        ("train", {"settings": "optimizer.lrate=1"}, "there is no field 'optimizer.lrate'"),
        ("cache", {"name": "../../stolen"}, "climbs up"),
        ("data", {"source": "bad.csv", "still_frames": 0}, "secret.png is not in"),
    ],
)
def test_what_cannot_work_is_refused(comfy, key, inputs, reason):
    graph = {**STILLS, "train": train("MotionAdapter", "refused", **BASE, **NEW["MotionAdapter"])}
    graph = copy.deepcopy(graph)
    graph[key]["inputs"] |= inputs
    assert reason in refusal(comfy, graph)
    assert not (comfy.base / "stolen").exists()


def test_a_seed_stays_from_one_run_to_the_next(comfy):
    """The editor changes an input named `seed` after each run unless told not to."""
    nodes = {f"StyleMasterTrain{name}" for name in CASES} | {"StyleMasterIllusionDataset"}
    info = comfy.object_info()
    for name in nodes:
        assert info[name]["input"]["required"]["seed"][1]["control_after_generate"] is False


def test_missing_libraries_are_named(run_in_comfy):
    said = run_in_comfy(
        """
import json, os
os.environ.pop("STYLEMASTER_PYTHON", None)
from custom_nodes_stylemaster.nodes import subprocesses
subprocesses.LIBRARIES = (*subprocesses.LIBRARIES, "no_such_library")
try:
    subprocesses.run_core(["info"], lambda: None)
except Exception as error:
    print(json.dumps({"said": str(error)}))
"""
    )["said"]
    assert "no_such_library" in said and 'pip install -e "' in said and "[train]" in said


def test_planted_files_name_nothing_outside(run_in_comfy):
    """What ComfyUI's upload route can put beside a run, and values that links can carry."""
    said = run_in_comfy(
        """
import json
from pathlib import Path
import folder_paths
import numpy as np
from PIL import Image
from custom_nodes_stylemaster.nodes import dataset, training, training_files, training_monitor

output, entry = Path(folder_paths.get_output_directory()), Path(folder_paths.get_input_directory())
run, pairs = output / "stylemaster/runs/planted", output / "stylemaster/datasets/planted"
private = output.parent / "private.png"
Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(private)
for folder in (run, pairs, entry / "links"):
    folder.mkdir(parents=True)
(entry / "links" / "a.png").write_bytes(private.read_bytes())
(output.parent / "private.txt").write_text("a password")
(entry / "links" / "a.txt").symlink_to(output.parent / "private.txt")
said = {}

def refused(key, call, *words, **inputs):
    try:
        said[key] = repr(call(*words, **inputs))
    except Exception as error:
        said[key] = f"{type(error).__name__}: {error}"

for number, name in enumerate((str(private), "../../../../private.png")):
    (run / "stats.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "sample": name}))
    refused(f"sample {number}", training_monitor.TrainingMonitor.execute, "planted", False)
    record = {"index": 0, "kept": True, "first": name, "second": name, "view": {"name": "identity"}}
    (pairs / "pairs.jsonl").write_text(json.dumps(record))
    refused(f"pair {number}", dataset.read_pairs, pairs)
refused("nested", training_monitor.TrainingMonitor.execute, "planted/checkpoints", False)
refused("caption", dataset.samples_of, "links", 0, "", False)
cache = training_files.Cache(run, run, run)
refused("style", training.TrainStyle.execute, cache, "b", "--help", "new", "new")
refused("crafter", training.TrainStyleCrafter.execute, cache, "b", "--help", "new")
print(json.dumps(said))
"""
    )
    assert set(said) == {
        *("sample 0", "sample 1", "pair 0", "pair 1", "nested", "caption", "style", "crafter")
    }
    for key, words in said.items():
        assert words.startswith("ConfigError"), (key, words)
