"""The harness itself: the pack loads in a real ComfyUI, and small stock workflows run in it."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import pytest
from PIL import Image

from tests.comfy import server, small_models

TEXT_TO_VIDEO = {
    "model": {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "wan2.1_t2v.safetensors", "weight_dtype": "default"},
    },
    "clip": {
        "class_type": "CLIPLoader",
        "inputs": {"clip_name": "umt5.safetensors", "type": "wan"},
    },
    "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "wan_2.1_vae.safetensors"}},
    "prompt": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": "a cat"}},
    "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": ""}},
    "empty": {
        "class_type": "EmptyHunyuanLatentVideo",
        "inputs": {"width": 64, "height": 48, "length": 5, "batch_size": 1},
    },
    "sample": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["model", 0],
            "positive": ["prompt", 0],
            "negative": ["negative", 0],
            "latent_image": ["empty", 0],
            "seed": 1,
            "steps": 3,
            "cfg": 4.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        },
    },
    "decode": {
        "class_type": "VAEDecode",
        "inputs": {"samples": ["sample", 0], "vae": ["vae", 0]},
    },
}


def text_to_video(**more_nodes: Any) -> dict[str, Any]:
    return small_models.with_stub_loaders({**TEXT_TO_VIDEO, **more_nodes})


def variant(of: str, **inputs: Any) -> dict[str, Any]:
    node = TEXT_TO_VIDEO[of]
    return {"class_type": node["class_type"], "inputs": {**node["inputs"], **inputs}}


def compare(a: str, b: str) -> dict[str, Any]:
    return {"class_type": "StubCompare", "inputs": {"a": [a, 0], "b": [b, 0]}}


IMPORT_NODES = """
import asyncio, json, sys, time
import comfy.sd, comfy_api.latest, comfy_extras.nodes_custom_sampler, folder_paths, latent_preview
import custom_nodes_stylemaster as pack

before, start = set(sys.modules), time.process_time()
asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
added = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"added": sorted(added), "cpu_seconds": time.process_time() - start}))
"""
# Each takes longer to import than all of the pack may; ComfyUI's own imports do not count.
HEAVY = {"accelerate", "av", "cv2", "diffusers", "matplotlib", "scipy", "tensorboard"}


def test_pack_loads_without_heavy_imports(comfy_server, run_in_comfy):
    pack = comfy_server.pack_imports()[server.PACK_NAME]
    assert pack.ok, "ComfyUI could not import the pack, see its log"
    found = run_in_comfy(IMPORT_NODES)
    assert not HEAVY.intersection(found["added"]), found
    assert len(found["added"]) < 10, found


@pytest.mark.parametrize("before", ["", "\x1b[32m[INFO]\x1b[0m ", "[INFO] "])
def test_imports_are_read_from_the_log_of_any_version(before):
    lines = ["starting", "   0.1 seconds: /c/stylemaster", " 12.0 seconds (IMPORT FAILED): /c/bad"]
    found = server.imports_of_packs("\n".join(before + line for line in lines) + "\n")
    assert found == {
        "stylemaster": server.PackImport(0.1, ok=True),
        "bad": server.PackImport(12.0, ok=False),
    }


def test_small_text_to_video(comfy_server):
    save = {
        "class_type": "SaveAnimatedWEBP",
        "inputs": {
            "images": ["decode", 0],
            "filename_prefix": "small",
            "fps": 16.0,
            "lossless": True,
            "quality": 80,
            "method": "fastest",
        },
    }
    result = comfy_server.run_prompt(text_to_video(save=save))
    assert result.status == "success", result.error
    assert {"sample", "decode", "save"} <= result.node_seconds.keys()
    assert result.previews >= 3
    clip = Image.open(io.BytesIO(comfy_server.view(result.outputs["save"]["images"][0])))
    assert (clip.size, getattr(clip, "n_frames", 1)) == ((64, 48), 5)


def test_seed_and_prompt_decide(comfy_server):
    """That outputs differ where they must shows that the small models are no constants."""
    # ComfyUI counts from 0.9999 on as 1; an equal input would be answered from its cache.
    result = comfy_server.run_prompt(
        text_to_video(
            again=variant("sample", denoise=0.999999),
            other_seed=variant("sample", seed=2),
            dog=variant("prompt", text="a dog"),
            other_prompt=variant("sample", positive=["dog", 0]),
            same=compare("sample", "again"),
            seeds=compare("sample", "other_seed"),
            prompts=compare("sample", "other_prompt"),
        )
    )
    assert result.status == "success", result.error
    difference = {node: seen["max_difference"][0] for node, seen in result.outputs.items()}
    assert difference["same"] == 0
    assert difference["seeds"] > 0.1
    assert difference["prompts"] > 0.01


def test_interrupt_ends_sampling(comfy_server):
    endless = text_to_video(sample=variant("sample", steps=5000), save=compare("sample", "sample"))

    def on_event(kind, _data):
        if kind == "progress":
            comfy_server.interrupt()

    result = comfy_server.run_prompt(endless, on_event=on_event)
    assert result.status == "interrupted"
    after = comfy_server.run_prompt(text_to_video(out=compare("sample", "sample")))
    assert after.status == "success", after.error


def test_a_failing_node_is_an_error(comfy_server):
    result = comfy_server.run_prompt(
        text_to_video(bad=compare("sample", "empty_2"), empty_2=variant("empty", width=128))
    )
    assert result.status == "error"
    assert result.error is not None
    assert result.error["node_id"] == "bad"
    assert "cannot compare" in result.error["exception_message"]


def test_an_invalid_workflow_is_rejected(comfy_server):
    result = comfy_server.run_prompt({**TEXT_TO_VIDEO, "out": compare("decode", "decode")})
    assert result.status == "rejected"
    assert "wan2.1_t2v.safetensors" in json.dumps(result.error)


LOAD_SMALL_MODELS = """
import json, logging, sys
import comfy.sd, folder_paths, torch
import custom_nodes_stylemaster, small_models, stub_nodes

complaints = []
logging.basicConfig(level=logging.INFO)
class Listen(logging.Handler):
    def emit(self, record):
        if any(word in record.getMessage() for word in ("missing", "unexpected", "left over")):
            complaints.append(record.getMessage())
logging.getLogger().addHandler(Listen())

path = folder_paths.get_full_path_or_raise("diffusion_models", small_models.TRANSFORMER_FILE)
wan = comfy.sd.load_diffusion_model(path).model
vae, = stub_nodes.StubVAELoader().load(small_models.VAE_FILE)
latents = vae.encode(torch.rand(5, 32, 48, 3))
vision, = stub_nodes.StubCLIPVisionLoader().load()
seen = vision.encode_image(torch.rand(1, 224, 224, 3))
print(json.dumps({
    "arguments": sys.argv[1:],
    "device": str(wan.device),
    "blocks": len(wan.diffusion_model.blocks),
    "width": wan.diffusion_model.dim,
    "dtype": str(wan.get_dtype()),
    "latents": list(latents.shape),
    "last_hidden_state": list(seen.last_hidden_state.shape),
    "image_embeds": list(seen.image_embeds.shape),
    "finite": bool(latents.isfinite().all() and seen.last_hidden_state.isfinite().all()),
    "complaints": complaints,
    "pack": custom_nodes_stylemaster.__file__,
}))
"""


def test_run_in_comfy(run_in_comfy):
    seen = run_in_comfy(LOAD_SMALL_MODELS, "one", 2)
    assert seen.pop("pack") == str(server.PACK / "__init__.py")
    assert seen == {
        "arguments": ["one", "2"],
        "device": "cpu",
        "blocks": small_models.NUM_BLOCKS,
        "width": small_models.WIDTH,
        "dtype": "torch.float32",
        "latents": [1, 16, 2, 4, 6],
        "last_hidden_state": [1, 257, small_models.CLIP_WIDTH],
        "image_embeds": [1, small_models.CLIP_PROJECTION],
        "finite": True,
        "complaints": [],
    }


def test_run_in_comfy_tells_what_failed(run_in_comfy):
    with pytest.raises(server.ComfyUIError, match="ZeroDivisionError"):
        run_in_comfy("1 / 0")
    with pytest.raises(server.ComfyUIError, match="no JSON here"):
        run_in_comfy("print('no JSON here')")


def test_a_wrong_path_is_no_skip(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATHS", str(tmp_path))
    with pytest.raises(server.ComfyUIError, match="custom_nodes"):
        server.find_comfyui()


def test_a_python_beside_the_checkout_is_used(monkeypatch, tmp_path):
    for version in ("1.0", "2.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    own = tmp_path / "1.0" / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    monkeypatch.setenv(
        "COMFYUI_PATHS", os.pathsep.join([str(tmp_path / "1.0"), str(tmp_path / "2.0")])
    )
    first, second = server.find_comfyui()
    assert (first.version, first.python) == ("1.0", own)
    assert (second.version, str(second.python)) == ("2.0", server.sys.executable)
