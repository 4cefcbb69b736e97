"""The training nodes in a real ComfyUI: pictures in, an adapter that the loader takes out.

The child process needs diffusers and accelerate, which a ComfyUI often lacks, so it is started
with the Python that runs the tests (STYLEMASTER_PYTHON).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.comfy import server, shipped_workflows, small_models, test_nodes
from tests.comfy.test_nodes import node

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
    "settings": "run.precision=float32\nrun.num_workers=0\nrun.validation_samples=1\n"
    "optimizer.warmup_steps=0\nflow.text_length=8",
}

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
    gray_tile=False,
)


@pytest.fixture(scope="module")
def comfy(comfy_checkout, comfy_models, tmp_path_factory):
    """A server of its own, whose child processes are given a Python with the libraries."""
    from stylemaster_core.data.demo_scene import demo_styles
    from stylemaster_core.models.small import write_small_models

    encoders = write_small_models(tmp_path_factory.mktemp("encoders"))
    for folder in ("text_encoders", "clip_vision"):
        (comfy_models / folder).mkdir(exist_ok=True)
    words = {"kind": "hashed_words", "width": small_models.TEXT_WIDTH, "seed": 0}
    (comfy_models / "text_encoders" / "words.json").write_text(json.dumps(words))
    vision = comfy_models / "clip_vision" / "small"
    if not vision.exists():
        shutil.copytree(encoders.image_encoder, vision)
    running = server.ComfyServer(
        comfy_checkout, tmp_path_factory.mktemp("training") / "base", comfy_models
    )
    pictures = running.input_dir / "pictures"
    pictures.mkdir()
    for name, picture in demo_styles(64).items():
        Image.fromarray(picture).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a painting of {name}")
    (running.base / "secret.png").write_bytes((pictures / "neon.png").read_bytes())
    (running.input_dir / "bad.csv").write_text("file,caption\n../secret.png,a secret\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLEMASTER_PYTHON", sys.executable)
        with running:
            yield running


def workflow(**changes: Any) -> dict[str, Any]:
    """Still clips of pictures -> cache -> motion adapter -> monitor."""
    return {
        "data": node(
            "StyleMasterDataset",
            source="pictures",
            still_frames=5,
            caption="",
            strip_style_words=True,
        ),
        "cache": CACHE,
        "train": node(
            "StyleMasterTrainMotionAdapter",
            cache="@cache",
            base_model=small_models.TRANSFORMER_FILE,
            motion_adapter="new",
            rank=2,
            **{**RUN, **changes},
        ),
        "monitor": node("StyleMasterTrainingMonitor", run_name="@train:1"),
        "sampled": node("PreviewImage", images="@monitor:1"),
    }


def run(comfy: server.ComfyServer, graph: dict[str, Any], **options: Any) -> server.Result:
    result = comfy.run_prompt(graph, **options)
    assert result.status == "success", (result.error or {}).get("exception_message", result)
    return result


def refusal(comfy: server.ComfyServer, graph: dict[str, Any]) -> str:
    result = comfy.run_prompt(graph)
    assert result.status == "error" and result.error is not None
    return result.error["exception_message"]


def test_interrupt_resume_and_use(comfy, comfy_models):
    steps: list[int] = []
    stopped = {"at": 0.0}

    def interrupt_while_training(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data.get("node") == "train":
            steps.append(data["value"])
            if data["value"] >= 2 and not stopped["at"]:
                stopped["at"] = time.monotonic()
                comfy.interrupt()

    result = comfy.run_prompt(workflow(steps=100_000), on_event=interrupt_while_training)
    assert result.status == "interrupted" and time.monotonic() - stopped["at"] < 10
    assert result.previews > 0  # loss curves
    folder = comfy.output_dir / "stylemaster" / "runs" / "tried"
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    done = int(latest.removeprefix("step-"))
    assert steps == sorted(steps) and done >= steps[-1] >= 2 and not (folder / "stop").exists()
    target = comfy_models / "loras" / "tried.safetensors"
    assert not target.exists()

    # A sample picture makes the monitor's second output run.
    result = run(comfy, workflow(steps=done + 2, sample_every=done + 2))
    lines = (folder / "stats.jsonl").read_text().splitlines()
    found = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]
    assert found == list(range(1, done + 3))
    assert target.read_bytes() == (folder / "motion_adapter.safetensors").read_bytes()
    assert result.node_seconds.keys() == {"train", "monitor", "sampled"}, "the cache is kept"
    curve = picture(comfy, result.outputs["train"])
    assert curve.shape == (360, 640, 3) and len(np.unique(curve.reshape(-1, 3), axis=0)) > 4
    assert result.outputs["sampled"]["images"]

    use = {
        "model": node(
            "UNETLoader", unet_name=small_models.TRANSFORMER_FILE, weight_dtype="default"
        ),
        "motion": node(
            "StyleMasterMotionAdapter",
            model="@model",
            adapter_name="tried.safetensors",
            motion_scale=-1.0,
            start=0.0,
            end=1.0,
        ),
        "clip": node("StubTextEncoderLoader"),
        "prompt": node("CLIPTextEncode", clip="@clip", text="a cat"),
        "latent": node("StyleMasterLatent", num_frames=5, width=32, height=32),
        "with": sampler("@motion"),
        "without": sampler("@model"),
        "compare": node("StubCompare", a="@with", b="@without"),
    }
    result = run(comfy, use)
    assert result.outputs["compare"]["max_difference"][0] > 1e-6

    before = target.read_bytes()
    # A run that is finished is not trained again, and its file stays.
    result = run(comfy, workflow(steps=done + 2, sample_every=done + 2, save_every=7))
    assert result.node_seconds["train"] < 2 and target.read_bytes() == before
    assert "exists and is not overwritten" in refusal(comfy, workflow(run_name="other"))
    assert target.read_bytes() == before


def test_the_shipped_workflow(comfy, comfy_models):
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
    assert (comfy_models / "loras" / "shipped.safetensors").is_file()
    samples = outputs[shipped_workflows.node_titled(graph, "Sample pictures")]["images"]
    assert len(samples) == 2


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


def picture(comfy: server.ComfyServer, outputs: dict[str, Any]) -> np.ndarray:
    import io

    return np.array(Image.open(io.BytesIO(comfy.view(outputs["images"][0]))))


@pytest.mark.parametrize(
    ("key", "inputs", "said"),
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
def test_what_cannot_work_is_refused(comfy, key, inputs, said):
    graph = workflow(run_name="refused", file_name="refused")
    graph[key]["inputs"] |= inputs
    message = refusal(comfy, graph)
    assert said in message
    assert not (comfy.base / "stolen").exists()


def encoded(dataset: str, name: str, **changes: Any) -> dict[str, Any]:
    return {
        **CACHE,
        "inputs": {
            **CACHE["inputs"],
            **node("", dataset=dataset)["inputs"],
            "name": name,
            **changes,
        },
    }


def test_the_other_trainers(comfy, comfy_models):
    """Pairs and clips with tiles -> projection and ControlNet -> style adapter -> a video."""
    base = {"base_model": small_models.TRANSFORMER_FILE}
    small = RUN["settings"] + "\nprojection.hidden_width=32\nrun.validate_every=0"
    settings = {**RUN, "steps": 2, "settings": small}

    def named(name: str) -> dict[str, Any]:
        return {**settings, "file_name": name, "run_name": name}

    stills = node(
        "StyleMasterDataset",
        source="pictures",
        still_frames=5,
        caption="",
        strip_style_words=True,
    )
    first = {
        "pairs": node(
            "StyleMasterIllusionDataset",
            pictures="pictures",
            name="pairs",
            num_pairs=4,
            size=32,
            seed=0,
        ),
        "look": node("SaveImage", images="@pairs:1", filename_prefix="pairs"),
        "pair_cache": encoded("@pairs", "pairs"),
        "projection": node(
            "StyleMasterTrainGlobalProjection", cache="@pair_cache", **named("projection")
        ),
        "stills": stills,
        "cache": encoded("@stills", "tiles", gray_tile=True),
        "control": node(
            "StyleMasterTrainGrayTileControl",
            cache="@cache",
            controlnet="new",
            **base,
            **named("tile"),
        ),
    }
    outputs = run(comfy, first).outputs
    shown = [
        np.array(Image.open(comfy.output_dir / image["filename"]))
        for image in outputs["look"]["images"]
    ]
    assert [image.shape for image in shown] == [(32, 64, 3)] * 4
    for image in shown:  # the same pixels, rearranged
        one, other = image[:, :32].reshape(-1, 3), image[:, 32:].reshape(-1, 3)
        assert not np.array_equal(one, other)
        assert sorted(map(tuple, one)) == sorted(map(tuple, other))

    second = {
        "stills": stills,
        "cache": first["cache"],
        "style": node(
            "StyleMasterTrainStyle",
            cache="@cache",
            stage="style-images",
            adapter="new",
            global_projection="projection.safetensors",
            **base,
            **named("style"),
        ),
    }
    run(comfy, second)
    for name in ("stylemaster/projection", "stylemaster/style", "controlnet/tile"):
        assert (comfy_models / f"{name}.safetensors").is_file(), name

    shutil.copy(comfy.input_dir / "pictures" / "neon.png", comfy.input_dir / "style_0.png")
    use = test_nodes.workflow(
        frames=node("LoadImage", image="style_0.png"),
        control=test_nodes.controlled(
            frames="@frames", control_net_name="tile.safetensors", model="@apply:0"
        ),
        sample=test_nodes.sampled("control", latent="@latent"),
        show=node("PreviewImage", images="@crop"),
    )
    use["adapter"]["inputs"]["adapter_name"] = "style.safetensors"
    use["latent"]["inputs"] |= {"num_frames": 1, "width": 64, "height": 64}
    assert run(comfy, use).outputs["show"]["images"]


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
