"""Every node in a real ComfyUI, as workflows use them."""

from __future__ import annotations

import copy
import io
import json
import shutil
import subprocess
import urllib.error
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stylemaster_core.pipelines.pictures import Row, contact_sheet, grid_rows
from tests.comfy import server, small_models
from tests.unit import test_video_time as video_time

NODE_IDS = {
    "StyleMasterAdapterLoader",
    "StyleMasterApplyStyle",
    "StyleMasterBlendStyles",
    "StyleMasterCompareStyles",
    "StyleMasterCrop",
    "StyleMasterDataset",
    "StyleMasterEncodeDataset",
    "StyleMasterFindStyle",
    "StyleMasterFolderVideo",
    "StyleMasterGrayTileControl",
    "StyleMasterGuider",
    "StyleMasterIllusionDataset",
    "StyleMasterLatent",
    "StyleMasterLoadStyle",
    "StyleMasterMotionAdapter",
    "StyleMasterSampler",
    "StyleMasterSaveStyle",
    "StyleMasterShowScales",
    "StyleMasterStyleEncoder",
    "StyleMasterStyleGrid",
    "StyleMasterStyleSheet",
    "StyleMasterTextureSelector",
    "StyleMasterTinyLoader",
    "StyleMasterTrainGlobalProjection",
    "StyleMasterTrainGrayTileControl",
    "StyleMasterTrainMotionAdapter",
    "StyleMasterTrainStyle",
    "StyleMasterTrainStyleCrafter",
    "StyleMasterVideoCrafterLoader",
    "StyleMasterTrainingMonitor",
}
FRAMES, WIDTH, HEIGHT = 7, 62, 46  # padded to 9, 64 and 48


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node of an API workflow; "name:1" is the second output of `name`."""
    links = {
        key: [value[1:].split(":")[0], int((value.split(":") + ["0"])[1])]
        for key, value in inputs.items()
        if isinstance(value, str) and value.startswith("@")
    }
    return {"class_type": class_type, "inputs": {**inputs, **links}}


def stylemaster(name: str, **inputs: Any) -> dict[str, Any]:
    return node(f"StyleMaster{name}", **inputs)


def compare(a: str, b: str) -> dict[str, Any]:
    return node("StubCompare", a=a, b=b)


STYLED_VIDEO = {
    "model": node("UNETLoader", unet_name="wan", weight_dtype="default"),
    "clip": node("CLIPLoader", clip_name="umt5", type="wan"),
    "vae": node("VAELoader", vae_name="vae"),
    "vision": node("CLIPVisionLoader", clip_name="vit_h"),
    "prompt": node("CLIPTextEncode", clip="@clip", text="a cat in the rain"),
    "nothing": node("CLIPTextEncode", clip="@clip", text="blurry"),
    "adapter": stylemaster("AdapterLoader", adapter_name="small_adapter.safetensors"),
    "picture": node("LoadImage", image="style_0.png"),
    "features": stylemaster(
        "StyleEncoder", clip_vision="@vision", image="@picture", shuffle_seed=0, crop="center"
    ),
    "style": stylemaster(
        "TextureSelector",
        adapter="@adapter",
        features="@features",
        prompt="@prompt",
        mode="release",
        drop_rate=0.95,
        keep=0,
        selection_seed=0,
        several="mean",
    ),
    "apply": stylemaster(
        "ApplyStyle",
        model="@model",
        adapter="@adapter",
        style="@style",
        positive="@prompt",
        negative="@nothing",
        strength=1.0,
        start=0.0,
        end=1.0,
        blocks="all",
        block_weights="0:1",
        first_frame=0,
        last_frame=-1,
    ),
    "latent": stylemaster("Latent", num_frames=FRAMES, width=WIDTH, height=HEIGHT),
    "sample": stylemaster(
        "Sampler",
        model="@apply:0",
        styled="@apply:1",
        positive="@apply:2",
        negative="@apply:3",
        latent="@latent",
        seed=1,
        steps=3,
        text_cfg=8.0,
        style_cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
        shift=5.0,
        denoise=1.0,
    ),
    "decode": node("VAEDecode", samples="@sample", vae="@vae"),
    "crop": stylemaster("Crop", frames="@decode", latent="@sample"),
}


def variant(of: str, **inputs: Any) -> dict[str, Any]:
    """A copy of a node of the workflow with other inputs."""
    return variant_of(STYLED_VIDEO[of], **inputs)


def variant_of(original: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """A copy of a node with other inputs."""
    original = copy.deepcopy(original)
    changed = node("", **inputs)["inputs"]
    return {**original, "inputs": {**original["inputs"], **changed}}


def sampled(of: str, **inputs: Any) -> dict[str, Any]:
    """A sampler behind another Apply Style (or whatever has its outputs)."""
    links = {"model": f"@{of}:0", "styled": f"@{of}:1"}
    return variant("sample", **links, positive=f"@{of}:2", negative=f"@{of}:3", **inputs)


def workflow(**more: Any) -> dict[str, Any]:
    return small_models.with_stub_loaders({**STYLED_VIDEO, **more})


@pytest.fixture(scope="session", autouse=True)
def weight_files(comfy_models):
    """Small weight files of every kind where the nodes look for them."""
    save = small_models.save
    ours = comfy_models / "stylemaster"
    save(small_models.adapter_weights(), ours / "small_adapter.safetensors")
    save(small_models.controlnet_weights(), comfy_models / "controlnet" / "small_tile.safetensors")
    save(motion_weights(), comfy_models / "loras" / "small_motion.safetensors")
    save(motion_weights(), ours / "motion.safetensors")
    save(motion_weights(width=128), comfy_models / "loras" / "narrow_motion.safetensors")
    deep = {**small_models.adapter_weights()}
    deep = {key: value for key, value in deep.items() if ".3.cross_attn" not in key}
    save(deep, ours / "other_base.safetensors")
    torch.save(
        {**small_models.wan_weights(), **small_models.adapter_weights()}, ours / "stylemaster.ckpt"
    )
    (ours / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    image_to_video = small_models.wan_weights()
    patch = image_to_video["patch_embedding.weight"]
    image_to_video["patch_embedding.weight"] = patch.repeat(1, 3, 1, 1, 1)[:, :36].contiguous()
    image_to_video["img_emb.proj.0.bias"] = torch.zeros(1280)
    save(image_to_video, comfy_models / "diffusion_models" / "wan_i2v.safetensors")


def motion_weights(width: int = small_models.WIDTH, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for block in range(small_models.NUM_BLOCKS):
        for name in "qkvo":
            key = f"diffusion_model.blocks.{block}.self_attn.{name}.lora"
            weights[f"{key}_A.weight"] = torch.randn(rank, width, generator=generator) * 0.1
            weights[f"{key}_B.weight"] = torch.randn(width, rank, generator=generator) * 0.1
    return weights


@pytest.fixture
def comfy(comfy_server):
    """The server, with pictures and clips in its input folder."""
    if not (comfy_server.input_dir / "style_0.png").exists():
        random = np.random.RandomState(0)
        for number in range(2):
            pixels = random.randint(0, 256, (40, 56, 3), np.uint8)
            pixels[:, :, number] //= 4
            Image.fromarray(pixels).save(comfy_server.input_dir / f"style_{number}.png")
        half = np.zeros((48, 64, 4), np.uint8)
        half[:, :32, 3] = 255  # LoadImage's MASK is 1 where nothing is opaque
        Image.fromarray(half).save(comfy_server.input_dir / "half.png")
        write_clips(comfy_server.input_dir / "clips")
    return comfy_server


def write_clips(folder):
    from stylemaster_core.data.videos import write_video

    folder.mkdir()
    for number, count in enumerate((5, 6)):
        frames = np.full((count, 32, 48, 3), 60 + 100 * number, np.uint8)
        write_video(folder / f"clip_{number}.mp4", frames, fps=12)
    (folder / "notes.txt").write_text("no video")
    # What a Mac's drive holds beside a file, and a folder that is named like one: both come first.
    (folder / "._clip_0.mp4").write_bytes(b"\0\5\26\7")
    (folder / "a.mp4").mkdir()


def run(comfy, **more: Any) -> server.Result:
    result = comfy.run_prompt(workflow(**more))
    assert result.status == "success", result.error
    return result


def differences(comfy, **more: Any) -> dict[str, float]:
    """Run; the largest difference that each StubCompare saw, relative to the largest value."""
    outputs = run(comfy, **more).outputs
    return {
        key: seen["max_difference"][0] / max(seen["max_value"][0], 1e-9)
        for key, seen in outputs.items()
        if "max_difference" in seen
    }


def failure(comfy, node_id: str, **more: Any) -> str:
    """Run a workflow that must fail in this node; its message."""
    result = comfy.run_prompt(workflow(**more))
    assert result.status == "error", result
    assert result.error is not None
    assert result.error["node_id"] == node_id, result.error["exception_message"]
    return result.error["exception_message"]


def show(source: str) -> dict[str, Any]:
    return node("PreviewImage", images=source)


EQUAL = 1e-5
LEVELS = 4  # of 255
DIFFERENT = 1e-3


TRAINERS = {
    f"StyleMasterTrain{name}"
    for name in ("Style", "MotionAdapter", "GrayTileControl", "GlobalProjection", "StyleCrafter")
}


def test_nodes_are_described(comfy):
    info = comfy.object_info()
    ours = {name: entry for name, entry in info.items() if name.startswith("StyleMaster")}
    assert set(ours) == NODE_IDS
    for name, entry in ours.items():
        assert entry["category"].startswith("stylemaster/"), name
        assert bool(entry["experimental"]) == (name in TRAINERS), name
        assert entry["display_name"] and entry["description"], name
        inputs = {**entry["input"].get("required", {}), **entry["input"].get("optional", {})}
        for key, (kind, *options) in inputs.items():
            assert options[0].get("tooltip"), f"{name}.{key}"
            if kind in ("INT", "FLOAT"):
                assert {"min", "max", "default"} <= options[0].keys(), f"{name}.{key}"
        assert all(entry["output_tooltips"]), name


def test_rarely_used_inputs_are_marked_where_comfyui_knows_that(comfy, comfy_checkout):
    def marked(name: str) -> set[str]:
        inputs = {
            **info[name]["input"].get("required", {}),
            **info[name]["input"].get("optional", {}),
        }
        return {
            key for key, (_, *options) in inputs.items() if options and options[0].get("advanced")
        }

    info = comfy.object_info()
    # Stock nodes of the older kind may say it in versions whose inputs for packs cannot.
    inputs = (comfy_checkout.path / "comfy_api" / "latest" / "_io.py").read_text(encoding="utf-8")
    known = "advanced" in inputs
    wanted = {"blocks", "block_weights", "first_frame", "last_frame"} if known else set()
    assert marked("StyleMasterApplyStyle") == wanted
    assert marked("StyleMasterSampler") == ({"same_noise"} if known else set())
    assert marked("StyleMasterGuider") == set()


def test_a_style_picture_makes_a_video(comfy):
    save = node(
        "SaveAnimatedWEBP",
        images="@crop",
        filename_prefix="styled",
        fps=16.0,
        lossless=True,
        quality=80,
        method="fastest",
    )
    result = run(comfy, save=save, shuffled=show("@features:1"), picture_of=show("@style:1"))
    clip = Image.open(io.BytesIO(comfy.view(result.outputs["save"]["images"][0])))
    assert (clip.size, getattr(clip, "n_frames", 1)) == ((WIDTH, HEIGHT), FRAMES)
    assert result.previews >= 3
    shuffled = Image.open(io.BytesIO(comfy.view(result.outputs["shuffled"]["images"][0])))
    assert shuffled.size == (704, 512)
    panels = Image.open(io.BytesIO(comfy.view(result.outputs["picture_of"]["images"][0])))
    assert panels.size == (1024, 256)


def test_only_the_sampler_and_what_follows_run_again(comfy):
    run(comfy, out=show("@crop"))
    again = run(comfy, sample=variant("sample", seed=77), out=show("@crop"))
    assert set(again.node_seconds) == {"sample", "decode", "crop", "out"}
    same = run(comfy, sample=variant("sample", seed=77), out=show("@crop"))
    assert not set(same.node_seconds) - {"out"}


def test_seed_style_and_guidance_decide(comfy):
    seen = differences(
        comfy,
        again=variant("sample", denoise=0.999999),  # counts as 1, but is not answered from cache
        other_seed=variant("sample", seed=2),
        other_picture=node("LoadImage", image="style_1.png"),
        other_features=variant("features", image="@other_picture"),
        other_style=variant("style", features="@other_features"),
        other_apply=variant("apply", style="@other_style"),
        other_sample=sampled("other_apply"),
        shuffled=variant("features", shuffle_seed=5),
        shuffled_style=variant("style", features="@shuffled"),
        shuffled_apply=variant("apply", style="@shuffled_style"),
        shuffled_sample=sampled("shuffled_apply"),
        no_guidance=variant("sample", style_cfg=0.0),
        same=compare("@sample", "@again"),
        seeds=compare("@sample", "@other_seed"),
        styles=compare("@sample", "@other_sample"),
        shuffles=compare("@sample", "@shuffled_sample"),
        guidance=compare("@sample", "@no_guidance"),
    )
    assert seen.pop("same") == 0
    assert min(seen.values()) > DIFFERENT, seen


def test_strength_zero_is_the_base_model(comfy):
    plain = {"styled": "@prompt", "positive": "@prompt", "negative": "@nothing"}
    seen = differences(
        comfy,
        plain=variant("sample", model="@model", **plain),
        off=variant("apply", strength=0.0),
        off_sample=sampled("off"),
        zero=compare("@off_sample", "@plain"),
        one=compare("@sample", "@plain"),
    )
    assert seen["zero"] < EQUAL
    assert seen["one"] > DIFFERENT


def test_the_guider_with_stock_nodes_is_the_sampler(comfy):
    guider = {"styled": "@apply:1", "positive": "@apply:2", "negative": "@apply:3"}
    guider |= {"model": "@shifted", "text_cfg": 8.0, "style_cfg": 3.0}
    stock = {"noise": "@noise", "sampler": "@euler", "sigmas": "@sigmas", "latent_image": "@latent"}

    def advanced(guider_id: str) -> dict[str, Any]:
        return node("SamplerCustomAdvanced", guider=guider_id, **stock)

    seen = differences(
        comfy,
        shifted=node("ModelSamplingSD3", model="@apply:0", shift=5.0),
        noise=node("RandomNoise", noise_seed=1),
        euler=node("KSamplerSelect", sampler_name="euler"),
        sigmas=node("BasicScheduler", model="@shifted", scheduler="simple", steps=3, denoise=1.0),
        guider=stylemaster("Guider", **guider),
        scheduled=stylemaster("Guider", **{**guider, "text_cfg": 1.0}, text_schedule="0:8"),
        falling=stylemaster("Guider", **guider, style_schedule="0:3, 0.6:0"),
        one=advanced("@guider"),
        two=advanced("@scheduled"),
        three=advanced("@falling"),
        stock=compare("@one", "@sample"),
        constant=compare("@two", "@sample"),
        change=compare("@three", "@sample"),
    )
    assert seen["stock"] < EQUAL
    assert seen["constant"] < EQUAL
    assert seen["change"] > DIFFERENT


def test_masks_ranges_and_blocks(comfy):
    seen = differences(
        comfy,
        ones=node("SolidMask", value=1.0, width=8, height=8),
        everywhere=variant("apply", mask="@ones"),
        everywhere_sample=sampled("everywhere"),
        all_frames=variant("apply", first_frame=0, last_frame=FRAMES - 1, latent="@latent"),
        all_frames_sample=sampled("all_frames"),
        half=node("LoadImage", image="half.png"),
        right=variant("apply", mask="@half:1"),
        right_sample=sampled("right"),
        late_frames=variant("apply", first_frame=5, latent="@latent"),
        late_frames_sample=sampled("late_frames"),
        listed=variant("apply", blocks="list", block_weights="0-2:1, 3:1.0"),
        listed_sample=sampled("listed"),
        early=variant("apply", blocks="early"),
        early_sample=sampled("early"),
        at_first=variant("apply", end=0.4),
        at_first_sample=sampled("at_first"),
        equal_mask=compare("@everywhere_sample", "@sample"),
        equal_frames=compare("@all_frames_sample", "@sample"),
        equal_blocks=compare("@listed_sample", "@sample"),
        other_mask=compare("@right_sample", "@sample"),
        other_frames=compare("@late_frames_sample", "@sample"),
        other_blocks=compare("@early_sample", "@sample"),
        other_range=compare("@at_first_sample", "@sample"),
    )
    for key, value in seen.items():
        assert (value < EQUAL) if key.startswith("equal") else (value > DIFFERENT), (key, value)


def test_two_styles_in_two_regions(comfy):
    """Half of style 1 beside half of style 1 is style 1; beside style 2 it is not."""
    second = {"model": "@left:0", "positive": "@left:2", "negative": "@left:3"}
    seen = differences(
        comfy,
        half=node("LoadImage", image="half.png"),
        other_half=node("InvertMask", mask="@half:1"),
        other_picture=node("LoadImage", image="style_1.png"),
        other_features=variant("features", image="@other_picture"),
        other_style=variant("style", features="@other_features"),
        left=variant("apply", mask="@other_half"),
        same=variant("apply", mask="@half:1", **second),
        same_sample=sampled("same"),
        two=variant("apply", mask="@half:1", style="@other_style", **second),
        two_sample=sampled("two"),
        one_style=compare("@same_sample", "@sample"),
        two_styles=compare("@two_sample", "@sample"),
    )
    assert seen["one_style"] < 1e-4
    assert seen["two_styles"] > DIFFERENT


def test_selection_modes(comfy):
    modes = {
        name: (
            variant("style", **inputs),
            variant("apply", style=f"@{name}"),
            sampled(f"{name}_apply"),
            compare(f"@{name}_sample", "@sample"),
        )
        for name, inputs in {
            "paper": {"mode": "paper"},
            "all": {"mode": "all"},
            "random": {"mode": "random", "selection_seed": 3},
            "kept": {"keep": 13},
            "fewer": {"keep": 2},
        }.items()
    }
    nodes = {}
    for name, parts in modes.items():
        suffixes = ("", "_apply", "_sample", "_seen")
        nodes |= {name + suffix: part for suffix, part in zip(suffixes, parts, strict=True)}
    seen = differences(comfy, **nodes)
    assert seen.pop("kept_seen") == 0  # 5 % of 257
    assert min(seen.values()) > 1e-6, seen


def test_several_pictures_and_blends(comfy):
    """A batch of two pictures is the mean of both."""
    seen = differences(
        comfy,
        other_picture=node("LoadImage", image="style_1.png"),
        both=node("ImageBatch", image1="@picture", image2="@other_picture"),
        both_features=variant("features", image="@both"),
        both_style=variant("style", features="@both_features"),
        both_apply=variant("apply", style="@both_style"),
        both_sample=sampled("both_apply"),
        other_features=variant("features", image="@other_picture"),
        other_style=variant("style", features="@other_features"),
        blend=stylemaster(
            "BlendStyles",
            mode="mean",
            style_1="@style",
            weight_1=1.0,
            style_3="@other_style",
            weight_3=1.0,
        ),
        blend_apply=variant("apply", style="@blend"),
        blend_sample=sampled("blend_apply"),
        alone=stylemaster(
            "BlendStyles",
            mode="mean",
            style_1="@style",
            weight_1=2.0,
            style_2="@other_style",
            weight_2=0.0,
        ),
        alone_apply=variant("apply", style="@alone"),
        alone_sample=sampled("alone_apply"),
        chain=stylemaster(
            "BlendStyles",
            mode="concatenate",
            style_1="@style",
            weight_1=1.0,
            style_2="@other_style",
            weight_2=1.0,
        ),
        chain_apply=variant("apply", style="@chain"),
        chain_sample=sampled("chain_apply"),
        equal_batch=compare("@both_sample", "@blend_sample"),
        equal_weight=compare("@alone_sample", "@sample"),
        other_blend=compare("@blend_sample", "@sample"),
        other_chain=compare("@chain_sample", "@blend_sample"),
    )
    assert seen["equal_batch"] < 1e-4
    assert seen["equal_weight"] < EQUAL
    assert min(seen["other_blend"], seen["other_chain"]) > DIFFERENT


def test_a_saved_style_is_the_same(comfy, comfy_models):
    def save():
        saved = stylemaster("SaveStyle", style="@style", filename_prefix="tests/mine")
        return comfy.run_prompt(workflow(save=saved, seed=variant("sample", seed=9)))

    folder = comfy_models / "stylemaster" / "styles" / "tests"
    before = set(folder.glob("*"))
    assert save().status == "success"
    (path,) = set(folder.glob("*")) - before
    again = workflow(save=stylemaster("SaveStyle", style="@style", filename_prefix="tests/mine "))
    again["save"]["inputs"]["filename_prefix"] = "tests/mine"
    again["style"]["inputs"]["selection_seed"] = 4  # else it is answered from the cache
    assert comfy.run_prompt(again).status == "success"
    assert len(set(folder.glob("*")) - before) == 2
    name = f"tests/{path.name}"
    seen = differences(
        comfy,
        loaded=stylemaster("LoadStyle", style_name=name),
        loaded_apply=variant("apply", style="@loaded"),
        loaded_sample=sampled("loaded_apply"),
        same=compare("@loaded_sample", "@sample"),
    )
    assert seen["same"] == 0


def test_a_style_is_kept_with_a_picture_and_tags(comfy, comfy_models):
    saved = stylemaster(
        "SaveStyle", style="@style", filename_prefix="tests/card", picture="@picture", tags="oil, b"
    )
    (name,) = run(comfy, save=saved).outputs["save"]["text"]
    outputs = run(
        comfy,
        save=stylemaster("LoadStyle", style_name=f"tests/{name}"),
        shown=show("@save:1"),
        tags=node("PreviewAny", source="@save:2"),
    ).outputs
    picture = Image.open(io.BytesIO(comfy.view(outputs["shown"]["images"][0])))
    assert picture.size == (56, 40)
    assert outputs["tags"]["text"] == ["oil, b"]
    # What the interface asks for its list of pictures: ComfyUI's own route.
    header = json.loads(comfy._request(f"/view_metadata/stylemaster_styles?filename=tests/{name}"))
    assert header["modelspec.tags"] == "oil,b"
    assert header["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    with pytest.raises(urllib.error.HTTPError):
        comfy._request("/view_metadata/stylemaster_styles?filename=../small_adapter.safetensors")
    many = stylemaster(
        "SaveStyle",
        style="@style",
        filename_prefix="tests/card",
        tags=",".join("abcdefghijklmnopqrstu"),
    )
    assert "at most 20" in failure(comfy, "save", save=many)


def test_a_changed_file_is_read_again(comfy, comfy_models):
    from stylemaster_core.models.style_tokens import Style, save_style

    path = comfy_models / "stylemaster" / "styles" / "changing.safetensors"
    nodes = {
        "loaded": stylemaster("LoadStyle", style_name=path.name),
        "apply": variant("apply", style="@loaded"),
        "out": compare("@sample", "@sample"),
    }
    save_style(path, Style(torch.ones(1, 6, small_models.TEXT_WIDTH)), overwrite=True)
    assert "loaded" in run(comfy, **nodes).node_seconds
    assert "loaded" not in run(comfy, **nodes).node_seconds
    save_style(path, Style(torch.zeros(1, 6, small_models.TEXT_WIDTH)), overwrite=True)
    assert {"loaded", "apply", "sample"} <= set(run(comfy, **nodes).node_seconds)


STYLE_GRID = {
    "other_picture": node("LoadImage", image="style_1.png"),
    "other_features": variant("features", image="@other_picture"),
    "other_style": variant("style", features="@other_features"),
    "grid": stylemaster(
        "StyleGrid", style_1="@style", style_3="@other_style", strengths="0.5, 1", names="oil"
    ),
    "apply": variant("apply", style="@grid:0", strength="@grid:1"),
    "sample": variant("sample", steps=1),
    "sheet": stylemaster(
        "StyleSheet", grid="@grid:2", latent="@sample", vae="@vae", columns=1, side=96
    ),
}


def test_a_grid_of_styles_is_the_results_of_each(comfy):
    single = {}
    for number, (style, strength) in enumerate(
        (style, strength) for style in ("@style", "@other_style") for strength in (0.5, 1.0)
    ):
        single |= {
            f"apply_{number}": variant("apply", style=style, strength=strength),
            f"sample_{number}": sampled(f"apply_{number}", steps=1),
            f"decode_{number}": variant("decode", samples=f"@sample_{number}"),
            f"crop_{number}": variant(
                "crop", frames=f"@decode_{number}", latent=f"@sample_{number}"
            ),
            f"shown_{number}": show(f"@crop_{number}"),
        }
    clip_sheet = {**STYLE_GRID["sheet"]["inputs"], "columns": 3, "content": "@crop_0"}
    outputs = run(
        comfy,
        **STYLE_GRID,
        **single,
        shown=show("@sheet"),
        clips=stylemaster("StyleSheet", **{**clip_sheet, "grid": "@grid:2", "latent": "@sample"}),
        shown_clips=show("@clips"),
    ).outputs

    def pictures(key: str) -> list[np.ndarray]:
        files = [comfy.view(file) for file in outputs[key]["images"]]
        return [np.asarray(Image.open(io.BytesIO(file))) for file in files]

    results = [pictures(f"shown_{number}") for number in range(4)]
    names, strengths = ["oil", "style 2"], [0.5, 1.0]
    some = [[frames[0], frames[3], frames[6]] for frames in results]
    rows = [("content", some[0]), *grid_rows(names, strengths, some)]

    def apart(rows: list[Row], key: str) -> int:
        (sheet,) = pictures(key)
        return int(np.abs(contact_sheet(rows, 96).astype(int) - sheet).max())

    for number in range(4):  # each result in the place of the first: only one is right
        swapped = [results[number], *results[1:]]
        first = grid_rows(names, strengths, [frames[:1] for frames in swapped])
        # ComfyUI's PNGs are cut to whole levels, ours are rounded.
        assert (apart(first, "shown") <= LEVELS) == (number == 0)
    assert apart(rows, "shown_clips") <= LEVELS


def find(**inputs: Any) -> dict[str, Any]:
    given = {"folder": "library", "count": 2, "compare": "style", **inputs}
    return stylemaster("FindStyle", clip_vision="@vision", picture="@picture", **given)


@pytest.fixture
def library(comfy):
    """A folder of pictures in the input folder: one alike and others."""
    folder = comfy.input_dir / "library"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(comfy.input_dir / "style_0.png", folder / "same.png")
    shutil.copy(comfy.input_dir / "style_1.png", folder / "other.png")
    Image.new("RGB", (90, 30), (0, 90, 200)).save(folder / "Flat.jpg")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_pictures_of_a_like_style_are_found(comfy, library):
    def found(**inputs: Any) -> tuple[list[str], list[Any], dict[str, float]]:
        result = run(
            comfy,
            found=find(**inputs),
            shown=show("@found"),
            names=node("PreviewAny", source="@found:1"),
        )
        sizes = [
            Image.open(io.BytesIO(comfy.view(file))).size
            for file in result.outputs["shown"]["images"]
        ]
        return result.outputs["names"]["text"], sizes, result.node_seconds

    names, sizes, _ = found()
    assert names[0] == "same" and len(names) == 2 and sizes[0] == (56, 40)
    assert set(found(count=9)[0]) == {"same", "other", "Flat"}
    assert found(compare="whole picture")[0][0] == "same"
    # Nothing changed: ComfyUI answers from its cache. A new picture is found, a removed one is not.
    assert "found" not in found(compare="whole picture")[2]
    Image.open(library / "same.png").rotate(180).save(library / "turned.png")
    (library / "other.png").unlink()
    names, sizes, ran = found(count=9)
    assert set(names) == {"same", "turned", "Flat"} and "found" in ran
    assert sizes[names.index("Flat")] == (90, 30)
    (index,) = (comfy.output_dir / "stylemaster" / "indexes").glob("*")
    assert index.suffix == ".safetensors"


def test_found_pictures_make_a_grid(comfy, library):
    outputs = run(
        comfy,
        **{
            **STYLE_GRID,
            "found": find(),
            "features": variant("features", image="@found"),
            "grid": stylemaster("StyleGrid", style_1="@style", strengths="1", names="@found:1"),
        },
        shown=show("@sheet"),
    ).outputs
    sheet = Image.open(io.BytesIO(comfy.view(outputs["shown"]["images"][0])))
    assert sheet.size == (96, 2 * (96 + 18))


@pytest.mark.parametrize("folder", ["..", "/etc", "library/../..", "nowhere"])
def test_no_pictures_are_searched_outside_the_input(comfy, folder):
    said = refusal(comfy, found=find(folder=folder), out=show("@found"))
    assert "is refused" in said or "not in list" in said or "there is no folder" in said


def test_a_grid_that_cannot_be_made_is_refused(comfy):
    many = {**STYLE_GRID, "grid": variant_of(STYLE_GRID["grid"], strengths="0.5; 1")}
    assert "no number from 0 to 4" in failure(comfy, "grid", **many, out=show("@sheet"))
    named = {**STYLE_GRID, "grid": variant_of(STYLE_GRID["grid"], names="a, b, c")}
    assert "3 names came for 2 styles" in failure(comfy, "grid", **named, out=show("@sheet"))
    apart = {**STYLE_GRID, "apply": variant("apply"), "out": show("@sheet")}
    assert "1 latents came for a grid of 4" in failure(comfy, "sheet", **apart)


def test_motion(comfy):
    def motion(name: str, **inputs: Any) -> dict[str, Any]:
        chosen = {"adapter_name": "small_motion.safetensors", "motion_scale": -0.3}
        loader = stylemaster(
            "MotionAdapter", model="@apply:0", **{**chosen, "start": 0.0, "end": 1.0, **inputs}
        )
        return {name: loader, f"{name}_sample": variant("sample", model=f"@{name}")}

    seen = differences(
        comfy,
        **motion("merged"),
        **motion("added", end=0.9999),
        **motion("partly", start=0.5),
        **motion("zero", motion_scale=0.0),
        **motion("stock", adapter_name="motion.safetensors", motion_scale=-0.6, end=0.0),
        lora=node(
            "LoraLoaderModelOnly",
            model="@apply:0",
            lora_name="small_motion.safetensors",
            strength_model=-0.3,
        ),
        lora_sample=variant("sample", model="@lora"),
        equal_lora=compare("@merged_sample", "@lora_sample"),
        equal_added=compare("@added_sample", "@merged_sample"),
        equal_zero=compare("@zero_sample", "@sample"),
        other_merged=compare("@merged_sample", "@sample"),
        other_partly=compare("@partly_sample", "@sample"),
        other_part=compare("@partly_sample", "@merged_sample"),
    )
    for key, value in seen.items():
        assert (value < 1e-4) if key.startswith("equal") else (value > DIFFERENT), (key, value)


@pytest.mark.parametrize("first_frame", [0, 6])
def test_a_clip_of_varying_rate_keeps_its_times_and_its_sound(comfy, tmp_path, first_frame):
    """Through Folder Video and ComfyUI's own saving, which knows one rate only."""
    folder = comfy.input_dir / "varying"
    if not folder.exists():
        folder.mkdir()
        sounds = [(0, video_time.beeping(1.5, video_time.FLASHES_S))]
        video_time.write_clip(
            folder / "clip.mkv", video_time.VARYING_MS, video_time.FLASHES_S, sounds
        )
    clip = stylemaster("FolderVideo", folder="varying", index=0, max_frames=0)
    clip["inputs"]["first_frame"] = first_frame
    result = comfy.run_prompt(
        {
            "clip": clip,
            "video": node("CreateVideo", images="@clip", fps="@clip:1", audio="@clip:3"),
            "save": node(
                "SaveVideo",
                video="@video",
                filename_prefix=f"varying_{first_frame}",
                format="mp4",
                codec="h264",
            ),
        }
    )
    assert result.status == "success", result.error
    saved = tmp_path / "saved.mp4"
    saved.write_bytes(comfy.view(result.outputs["save"]["images"][0]))
    frame_s, start_s = 1 / 30, first_frame / 30
    flashes, end = video_time.flashes_of(saved)
    wanted = [time_s - start_s for time_s in video_time.FLASHES_S]
    assert flashes == pytest.approx(wanted, abs=frame_s + 1e-3)
    assert end == pytest.approx(1.5 - start_s, abs=frame_s + 1e-3)
    beeps, sound_end = video_time.beeps_of(saved)
    assert beeps == pytest.approx(wanted, abs=0.03), "AAC's own delay is a frame of 1024 samples"
    assert sound_end == pytest.approx(1.5 - start_s, abs=0.06)


CONTROL = stylemaster(
    "GrayTileControl",
    model="@apply:0",
    control_net_name="small_tile.safetensors",
    vae="@vae",
    frames="@clip_frames",
    positive="@apply:2",
    negative="@apply:3",
    styled="@apply:1",
    factor=8,
    strength=1.0,
    start=0.0,
    end=0.7,
)
CLIP_FRAMES = stylemaster("FolderVideo", folder="clips", index=0, first_frame=0, max_frames=0)


def controlled(**inputs: Any) -> dict[str, Any]:
    return {**CONTROL, "inputs": {**CONTROL["inputs"], **node("", **inputs)["inputs"]}}


def test_gray_tile_control(comfy):
    result = run(
        comfy,
        clip_frames={**CLIP_FRAMES, "inputs": {**CLIP_FRAMES["inputs"], "index": 1}},
        control=controlled(),
        off=controlled(strength=0.0),
        matched=stylemaster("Latent", num_frames=81, width=832, height=480, frames="@clip_frames"),
        on_sample=sampled("control", latent="@matched"),
        off_sample=sampled("off", latent="@matched"),
        without=variant("sample", latent="@matched"),
        decode=node("VAEDecode", samples="@on_sample", vae="@vae"),
        cut=stylemaster("Crop", frames="@decode", latent="@matched"),
        tile=show("@control:4"),
        equal=compare("@off_sample", "@without"),
        other=compare("@on_sample", "@without"),
        shape=compare("@cut", "@clip_frames"),
    )
    assert result.outputs["equal"]["max_difference"][0] < 1e-4
    assert result.outputs["other"]["max_difference"][0] > 1e-2
    assert result.outputs["shape"]["shape"][0] == [6, 32, 48, 3]
    tiles = result.outputs["tile"]["images"]
    assert len(tiles) == 9
    pixels = np.asarray(Image.open(io.BytesIO(comfy.view(tiles[0]))))
    assert pixels.shape[:2] == (32, 48)
    assert (pixels == pixels[..., :1]).all()


def test_control_is_brought_to_the_latent(comfy):
    latent = stylemaster("Latent", num_frames=5, width=60, height=40)
    result = run(
        comfy,
        clip_frames=CLIP_FRAMES,
        latent=latent,
        control=controlled(latent="@latent"),
        on_sample=sampled("control"),
        tile=show("@control:4"),
        out=compare("@on_sample", "@sample"),
    )
    pixels = Image.open(io.BytesIO(comfy.view(result.outputs["tile"]["images"][0])))
    assert pixels.size == (64, 48)


def test_a_latent_of_another_length_is_explained(comfy):
    nodes = {"clip_frames": CLIP_FRAMES, "control": controlled(), "out": show("@control:4")}
    message = failure(comfy, "control", **{**nodes, "control": controlled(latent="@latent")})
    assert "5 control frames" in message and "StyleMaster Latent" in message
    unmatched = {**nodes, "bad": sampled("control"), "out": compare("@bad", "@sample")}
    assert "gray tile" in failure(comfy, "bad", **unmatched)


def test_a_size_that_follows_the_clips_shape(comfy):
    def latent(**inputs: Any) -> dict[str, Any]:
        return stylemaster(
            "Latent", num_frames=81, width=64, height=48, frames="@upright", **inputs
        )

    result = run(
        comfy,
        upright=node("EmptyImage", width=270, height=480, batch_size=3, color=0),
        as_it_is=latent(),
        shape=latent(resize="to the area"),
        exact=latent(resize="to the size"),
        latent=stylemaster("Latent", num_frames=5, width=64, height=48),
        seen=show("@as_it_is:4"),
        seen_shape=show("@shape:4"),
        seen_exact=show("@exact:4"),
    )

    def size(key: str) -> tuple[int, int]:
        files = result.outputs[key]["images"]
        assert len(files) == 3
        return Image.open(io.BytesIO(comfy.view(files[0]))).size

    assert size("seen") == (270, 480)
    assert size("seen_shape") == (48, 80)  # 9:16, about as many pixels as 64 x 48
    assert size("seen_exact") == (64, 48)


def test_encoded_frames_are_a_start(comfy):
    seen = differences(
        comfy,
        clip_frames=CLIP_FRAMES,
        latent=stylemaster(
            "Latent", num_frames=81, width=832, height=480, frames="@clip_frames", vae="@vae"
        ),
        near=variant("sample", denoise=0.05),
        near_start=compare("@near", "@latent"),
        far=compare("@sample", "@latent"),
    )
    assert seen["near_start"] < seen["far"]


def test_folder_of_videos(comfy):
    def clip(index: int, **inputs: Any) -> dict[str, Any]:
        return {**CLIP_FRAMES, "inputs": {**CLIP_FRAMES["inputs"], "index": index, **inputs}}

    result = run(
        comfy,
        first=clip(0),
        second=clip(1, first_frame=1, max_frames=4),
        sheet=stylemaster(
            "CompareStyles",
            reference="@picture",
            content="@first",
            result_1="@second",
            labels="mine",
            columns=3,
            side=64,
        ),
        frames=show("@first"),
        more=show("@second"),
        seen=show("@sheet"),
    )
    assert len(result.outputs["frames"]["images"]) == 5
    assert len(result.outputs["more"]["images"]) == 4
    sheet = Image.open(io.BytesIO(comfy.view(result.outputs["seen"]["images"][0])))
    assert sheet.size == (3 * 64, 3 * (64 + 18))
    message = failure(comfy, "first", first=clip(2), out=show("@first"))
    assert "no video 2" in message and "holds 2" in message


def test_the_sampler_can_be_interrupted(comfy):
    def on_event(kind, _data):
        if kind == "progress":
            comfy.interrupt()

    endless = workflow(sample=variant("sample", steps=1000), out=show("@crop"))
    assert comfy.run_prompt(endless, on_event=on_event).status == "interrupted"
    run(comfy, out=show("@crop"))


def test_the_released_checkpoint_is_explained(comfy, comfy_models):
    chosen = stylemaster("AdapterLoader", adapter_name="stylemaster.ckpt")
    message = failure(comfy, "adapter", adapter=chosen, out=show("@crop"))
    command = next(line for line in message.splitlines() if line.startswith("cd "))
    subprocess.run(command + " --overwrite", shell=True, check=True, capture_output=True)
    made = comfy_models / "stylemaster" / "stylemaster_adapter.safetensors"
    assert made.exists()
    converted = stylemaster("AdapterLoader", adapter_name=made.name)
    seen = differences(
        comfy,
        converted=converted,
        converted_style=variant("style", adapter="@converted"),
        converted_apply=variant("apply", adapter="@converted", style="@converted_style"),
        converted_sample=sampled("converted_apply"),
        same=compare("@converted_sample", "@sample"),
    )
    assert seen["same"] < EQUAL


@pytest.mark.parametrize(
    ("name", "words"),
    [("motion.safetensors", "motion adapter"), ("broken.safetensors", "broken.safetensors")],
)
def test_wrong_files_are_named(comfy, name, words):
    chosen = stylemaster("AdapterLoader", adapter_name=name)
    assert words in failure(comfy, "adapter", adapter=chosen, out=show("@crop"))


def refusal(comfy, **more: Any) -> str:
    """What ComfyUI says of a workflow with a name that is not in a node's list.

    0.8.0 rejects it; 0.3.64 does not look at the lists of such nodes, and the node itself refuses.
    """
    result = comfy.run_prompt(workflow(**more))
    assert result.status in ("rejected", "error"), result
    return json.dumps(result.error)


def test_a_missing_adapter_is_refused(comfy):
    chosen = stylemaster("AdapterLoader", adapter_name="no.safetensors")
    assert "no.safetensors" in refusal(comfy, adapter=chosen, out=show("@crop"))


def test_wrong_models_are_refused(comfy):
    other = stylemaster("AdapterLoader", adapter_name="other_base.safetensors")
    message = failure(
        comfy,
        "bad",
        other=other,
        bad=variant("apply", adapter="@other"),
        out=compare("@bad_sample", "@sample"),
        bad_sample=sampled("bad"),
    )
    assert "4 blocks" in message
    wrong = node("UNETLoader", unet_name="wan_i2v.safetensors", weight_dtype="default")
    broken = workflow(out=show("@crop"))
    broken["model"] = wrong
    result = comfy.run_prompt(broken)
    assert result.error["node_id"] == "apply"
    assert "text-to-video" in result.error["exception_message"]
    narrow = stylemaster(
        "MotionAdapter",
        model="@model",
        adapter_name="narrow_motion.safetensors",
        motion_scale=-0.3,
        start=0.0,
        end=1.0,
    )
    message = failure(
        comfy, "narrow", narrow=narrow, apply=variant("apply", model="@narrow"), out=show("@crop")
    )
    assert "width 128" in message


def test_another_clip_vision_is_refused(comfy):
    wide = workflow(out=show("@crop"))
    wide["vision"] = node("StubCLIPVisionLoader", width=96, projection=48)
    result = comfy.run_prompt(wide)
    assert result.error["node_id"] == "style"
    assert "width 80" in result.error["exception_message"]


def test_a_clip_prompt_must_be_clips(comfy):
    message = failure(
        comfy, "style", style=variant("style", mode="paper", clip_prompt="@prompt"), o=show("@crop")
    )
    assert "UMT5" in message


def test_negative_strength_is_refused(comfy):
    result = comfy.run_prompt(workflow(apply=variant("apply", strength=-1.0), out=show("@crop")))
    assert result.status == "rejected"
    minus = node("PrimitiveFloat", value=-1.0)
    linked = {"minus": minus, "apply": variant("apply", strength="@minus"), "out": show("@crop")}
    assert "must not be negative" in failure(comfy, "apply", **linked)


def test_masks_and_ranges_that_do_not_fit_are_refused(comfy):
    masks = node("RepeatImageBatch", image="@picture", amount=3)
    three = {"images": masks, "three": node("ImageToMask", image="@images", channel="red")}
    message = failure(
        comfy, "apply", **three, apply=variant("apply", mask="@three", latent="@latent"),
        out=show("@crop"),
    )  # fmt: skip
    assert "3 masks came for a video of 7 frames" in message
    message = failure(comfy, "apply", apply=variant("apply", first_frame=3), out=show("@crop"))
    assert "link the LATENT" in message
    listed = variant("apply", blocks="list", block_weights="0-9:1.0")
    assert "0 to 3" in failure(comfy, "apply", apply=listed, out=show("@crop"))


@pytest.mark.parametrize("prefix", ["../../out", "/tmp/out", "C:\\out", "a\0b", "sub/../../../out"])
def test_styles_are_saved_in_their_folder_only(comfy, prefix):
    saved = stylemaster("SaveStyle", style="@style", filename_prefix=prefix)
    assert "is refused" in failure(comfy, "save", save=saved)


def test_a_link_out_of_the_styles_is_refused(comfy, comfy_models, tmp_path):
    link = comfy_models / "stylemaster" / "styles" / f"link_{tmp_path.name}"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path)
    saved = stylemaster("SaveStyle", style="@style", filename_prefix=f"{link.name}/out")
    message = failure(comfy, "save", save=saved)
    link.unlink()
    assert "leads out" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["..", "/etc", "clips/..", "C:\\", "clips\0"])
def test_folders_outside_the_input_are_refused(comfy, folder):
    clip = {**CLIP_FRAMES, "inputs": {**CLIP_FRAMES["inputs"], "folder": folder}}
    said = refusal(comfy, first=clip, out=show("@first"))
    assert "is refused" in said or "not in list" in said


# Whoever gets past the lists of names (another client, a later ComfyUI) meets the same walls.
DIRECT = """
import asyncio, json, os, sys
import comfy_api.latest, folder_paths, nodes
import custom_nodes_stylemaster as pack
before = set(sys.modules)  # ComfyUI itself needs av
extension = asyncio.run(pack.comfy_entrypoint())
asyncio.run(extension.get_node_list())
from custom_nodes_stylemaster.nodes import find_style, folders, loaders, style, control

heavy = {"diffusers", "transformers", "av", "cv2"}
loaded = sorted((set(sys.modules) - before) & heavy)
inside = folder_paths.get_input_directory()
os.makedirs(inside, exist_ok=True)
link = os.path.join(inside, "link")
if not os.path.lexists(link):
    os.symlink("/etc", link)
names = ["../x", "/etc/passwd", "C:/x", "x\\0", "link", "..", "a/../../x"]
calls = {
    "folder of pictures": lambda name: find_style.pictures_of(name),
    "folder": lambda name: folders.FolderVideo.execute(name, 0, 0, 0),
    "adapter": lambda name: loaders.LoadAdapter.execute(name),
    "motion": lambda name: loaders.MotionAdapterLoader.execute(None, name, 0.1, 0.0, 1.0),
    "style": lambda name: style.LoadStyle.execute(name),
    "control": lambda name: control.GrayTileControl.fingerprint_inputs(name),
}
said = {}
for what, call in calls.items():
    for name in names:
        try:
            call(name)
            said[f"{what} {name}"] = "nothing"
        except Exception as error:
            said[f"{what} {name}"] = type(error).__name__
os.unlink(link)
print(json.dumps({"said": said, "loaded": loaded}))
"""


def test_nodes_refuse_paths_by_themselves(run_in_comfy):
    seen = run_in_comfy(DIRECT)
    assert seen["loaded"] == []
    expected = {
        key: "WeightsError"
        if key.endswith(" link") and not key.startswith("folder")
        else "ConfigError"
        for key in seen["said"]
    }
    assert seen["said"] == expected


FEATURES = """
import json, sys
import numpy as np, torch
import custom_nodes_stylemaster, stub_nodes
from custom_nodes_stylemaster.nodes import style_encoding
from custom_nodes_stylemaster.nodes.layouts import frames_to_image
from custom_nodes_stylemaster.stylemaster_core.data.content_shuffle import content_shuffle
from custom_nodes_stylemaster.stylemaster_core.data.images import clip_pixels
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

vision, = stub_nodes.StubCLIPVisionLoader().load()
pictures = np.random.RandomState(3).randint(0, 256, (2, 50, 77, 3), np.uint8)
with torch.inference_mode():
    features = style_encoding.encode_pictures(vision, frames_to_image(pictures), 5, "center")
config = CLIPVisionConfig(hidden_size=80, intermediate_size=160, num_attention_heads=1,
    num_hidden_layers=2, image_size=224, patch_size=14, hidden_act="gelu", projection_dim=48)
reference = CLIPVisionModelWithProjection(config).eval()
weights = {k: v.float() for k, v in vision.get_sd().items()}
missing = reference.load_state_dict(weights, strict=False).missing_keys
views = [*pictures, *(content_shuffle(picture, seed=5) for picture in pictures)]
with torch.inference_mode():
    seen = reference(torch.stack([clip_pixels(view) for view in views]))
    joint = reference.visual_projection(
        reference.vision_model.post_layernorm(seen.last_hidden_state[:2]))
    text = torch.randn(1, 48)
    similarity = style_encoding.joint_similarity(features, [[None, {"pooled_output": text}]])
    cosine = torch.nn.functional.cosine_similarity(joint, text[:, None], dim=-1)
def worst(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()
print(json.dumps({
    "missing": [key for key in missing if "position_ids" not in key],
    "patches": worst(features.patches, seen.last_hidden_state[:2]),
    "image": worst(features.image_embeds, seen.image_embeds[:2]),
    "shuffled": worst(features.shuffled_embeds, seen.image_embeds[2:]),
    "joint": worst(similarity, cosine),
    "apart": worst(seen.image_embeds[:2], seen.image_embeds[2:]),
}))
"""


def test_features_are_those_of_transformers(run_in_comfy):
    seen = run_in_comfy(FEATURES)
    assert seen.pop("missing") == []
    assert seen.pop("apart") > 0.01
    assert max(seen.values()) < 1e-4, seen


TEXTS = """
import json, sys
import torch
from safetensors.torch import save_file
import stub_nodes
from custom_nodes_stylemaster.nodes.sampling import with_shift
from custom_nodes_stylemaster.stylemaster_core.sampling.schedules import flow_match_sigmas
import comfy.samplers
from types import SimpleNamespace

clip = stub_nodes.HashedWordsCLIP()
encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0] for text in sys.argv[2:]]
save_file({str(i): text for i, text in enumerate(encoded)}, sys.argv[1])

patched = {}
clone = SimpleNamespace(add_object_patch=patched.__setitem__)
with_shift(SimpleNamespace(model=SimpleNamespace(model_config=None), clone=lambda: clone), 5.0)
apart = {
    steps: (comfy.samplers.calculate_sigmas(patched["model_sampling"], "simple", steps)
        - flow_match_sigmas(steps, shift=5.0)).abs().max().item()
    for steps in (1, 4, 20, 50)
}
print(json.dumps(apart))
"""


def test_the_whole_path_agrees_with_the_core(comfy, run_in_comfy, comfy_models, tmp_path):
    """Style, two-condition guidance and control by the nodes, and by the core on diffusers' Wan."""
    from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]
    from safetensors.torch import load_file

    from stylemaster_core import load_transformer
    from stylemaster_core.models.gray_tile_controlnet import load_gray_tile_controlnet
    from stylemaster_core.models.style_tokens import load_style
    from stylemaster_core.sampling.denoise import denoise
    from stylemaster_core.sampling.schedules import flow_match_sigmas

    names = {key: f"{tmp_path.name}_{key}" for key in ("style", "latents", "tile")}
    run(
        comfy,
        clip_frames={**CLIP_FRAMES, "inputs": {**CLIP_FRAMES["inputs"], "index": 1}},
        latent=stylemaster("Latent", num_frames=81, width=832, height=480, frames="@clip_frames"),
        control=controlled(),
        sample=sampled("control", steps=5, seed=11),
        encoded=node("VAEEncode", pixels="@control:4", vae="@vae"),
        style_file=stylemaster("SaveStyle", style="@style", filename_prefix=names["style"]),
        latents=node("SaveLatent", samples="@sample", filename_prefix=names["latents"]),
        tile=node("SaveLatent", samples="@encoded", filename_prefix=names["tile"]),
    )
    apart = run_in_comfy(TEXTS, tmp_path / "texts", "a cat in the rain", "blurry")
    assert max(apart.values()) < 1e-6

    with torch.device("meta"):
        statistics = AutoencoderKLWan().config
    mean, std = (
        torch.tensor(statistics[key]).reshape(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    saved = {
        key: (load_file(comfy.output_dir / f"{names[key]}_00001_.latent")["latent_tensor"] - mean)
        / std
        for key in ("latents", "tile")
    }
    texts = load_file(tmp_path / "texts")
    style = load_style(comfy_models / "stylemaster/styles" / f"{names['style']}_00001_.safetensors")
    expected = denoise(
        load_transformer({**small_models.wan_weights(), **small_models.adapter_weights()}),
        torch.randn(saved["latents"].shape, generator=torch.Generator().manual_seed(11)),
        sigmas=flow_match_sigmas(5, shift=5.0),
        text=texts["0"],
        negative_text=texts["1"],
        style=style.tokens,
        text_scale=8.0,
        style_scale=3.0,
        controlnet=load_gray_tile_controlnet(small_models.controlnet_weights()),
        control_latents=saved["tile"],
        control_range=(0.0, 0.7),
    )
    worst = (saved["latents"] - expected).abs().max() / expected.abs().max()
    assert worst < 1e-4, worst
