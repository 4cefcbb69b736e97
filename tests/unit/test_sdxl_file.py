"""SDXL as a single file of the original layout, and LoRA files: read without the network."""

import re
import socket

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stylemaster_core.cli import main
from stylemaster_core.cli.model_options import parse_lora
from stylemaster_core.errors import WeightsError
from stylemaster_core.models import sdxl_file
from stylemaster_core.models.sdxl_file import SDXL, load_sdxl_file
from stylemaster_core.models.sdxl_lora import merge_lora
from stylemaster_core.models.small import draw_weights
from stylemaster_core.models.small_sdxl import TIME_WIDTH, UNET, VAE, write_small_sdxl
from stylemaster_core.pipelines.stylize_sdxl import load_sdxl
from stylemaster_core.weights.state_dict import shapes_of

FIRST, SECOND = 24, 40  # widths of the text encoders, together as the small adapter wants
CLIP = {
    "vocab_size": 49408, "max_position_embeddings": 77, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 64, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
SMALL = {
    "unet": UNET | {"projection_class_embeddings_input_dim": SECOND + 6 * TIME_WIDTH},
    "vae": VAE,
    "text_encoder": CLIP | {"hidden_size": FIRST, "projection_dim": FIRST},
    "text_encoder_2": CLIP | {"hidden_size": SECOND, "projection_dim": SECOND},
    "scheduler": SDXL["scheduler"],
}


def drawn(module, seed):
    weights = draw_weights(shapes_of(module.state_dict()), seed)
    module.load_state_dict({key: value.float() for key, value in weights.items()})
    return module.eval()


@pytest.fixture(scope="module")
def parts():
    texts = [
        kind(CLIPTextConfig(**SMALL[name]))
        for name, kind in (
            ("text_encoder", CLIPTextModel),
            ("text_encoder_2", CLIPTextModelWithProjection),
        )
    ]
    models = [UNet2DConditionModel(**SMALL["unet"]), AutoencoderKL(**VAE), *texts]
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {n: drawn(m, seed) for seed, (n, m) in enumerate(zip(names, models, strict=True))}


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def original_unet_key(key):
    for ours, theirs in OUTSIDE.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    part, *rest = key.split(".")
    if part == "mid_block":
        kind, number, *inner = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        block, kind, number, *inner = rest
        each = UNET["layers_per_block"] + 1
        down = part == "down_blocks"
        index = int(block) * each + int(number) + (1 if down else 0)
        has_attention = (
            "CrossAttn" in UNET["down_block_types" if down else "up_block_types"][int(block)]
        )
        if kind == "downsamplers":
            return f"input_blocks.{(int(block) + 1) * each}.0.op.{inner[-1]}"
        if kind == "upsamplers":
            index = int(block) * each + each - 1
            return f"output_blocks.{index}.{1 + has_attention}.conv.{inner[-1]}"
        side = "input_blocks" if down else "output_blocks"
        place = f"{side}.{index}.{1 if kind == 'attentions' else 0}"
    if kind == "resnets":
        inner[0] = RESNET[inner[0]]
    return ".".join([place, *inner])


def original_vae_key(key):
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    if "attn_1" in key:
        key = key.replace("group_norm", "norm").replace("to_out.0", "proj_out")
        key = re.sub(r"to_([qkv])", r"\1", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
    return key.replace("conv_shortcut", "nin_shortcut")


def open_clip(weights):
    """Names of the second text encoder in the original, and its products of q, k and v in one."""
    found = {}
    for key, value in weights.items():
        key = key.removeprefix("text_model.")
        if key == "text_projection.weight":
            found["text_projection"] = value.T
        elif key.startswith("embeddings.token"):
            found["token_embedding.weight"] = value
        elif key.startswith("embeddings.position_embedding"):
            found["positional_embedding"] = value
        elif key.startswith("final_layer_norm"):
            found[key.replace("final_layer_norm", "ln_final")] = value
        elif "q_proj" in key:
            layer = key.split(".")[2]
            three = [weights[f"text_model.{key.replace('q_proj', f'{x}_proj')}"] for x in "qkv"]
            name = f"transformer.resblocks.{layer}.attn.in_proj_{key.rpartition('.')[2]}"
            found[name] = torch.cat(three)
        elif "k_proj" not in key and "v_proj" not in key and "position_ids" not in key:
            for ours, theirs in (
                ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn", "attn"),
            ):  # fmt: skip
                key = key.replace(ours, theirs)
            found[key] = value
    return found


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    """All parts in one file, named as in the original."""
    tensors = {}
    for key, value in parts["unet"].state_dict().items():
        tensors[f"model.diffusion_model.{original_unet_key(key)}"] = value
    for key, value in parts["vae"].state_dict().items():
        # Attention was a convolution of size 1.
        value = value[..., None, None] if re.search(r"to_[qkvo].*weight", key) else value
        tensors[f"first_stage_model.{original_vae_key(key)}"] = value
    for key, value in parts["text_encoder"].state_dict().items():
        name = f"text_model.{key.removeprefix('text_model.')}"
        tensors[f"conditioner.embedders.0.transformer.{name}"] = value
    for key, value in open_clip(parts["text_encoder_2"].state_dict()).items():
        tensors[f"conditioner.embedders.1.model.{key}"] = value
    path = tmp_path_factory.mktemp("single") / "community.safetensors"
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    return path


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_every_part_is_read_without_the_network(checkpoint, parts, offline):
    pipe = load_sdxl_file(checkpoint, dtype=torch.float32, configs=SMALL)
    for name, part in parts.items():
        read = getattr(pipe, name).state_dict()
        for key, value in part.state_dict().items():
            assert torch.equal(read[key], value), (name, key)
    assert pipe.vae.config.scaling_factor == 0.13025
    assert pipe.scheduler.config.timestep_spacing == "leading"


def test_the_tokenizers_are_clips(checkpoint):
    """Numbers as in its vocabulary; the second text encoder's is padded with "!"."""
    pipe = load_sdxl_file(checkpoint, dtype=torch.float32, configs=SMALL)
    ids = pipe.tokenizer("A photo of a cat", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    ids = pipe.tokenizer_2("a cat", padding="max_length").input_ids
    assert ids == [49406, 320, 2368, 49407] + [0] * 73


def test_another_file_is_refused_in_words(tmp_path, checkpoint):
    save_file({"model.diffusion_model.x": torch.ones(1)}, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"no whole SDXL.*conditioner\.embedders\.1"):
        load_sdxl_file(tmp_path / "part.safetensors", dtype=torch.float32)
    with pytest.raises(WeightsError, match="cannot be loaded as SDXL.*refiner"):
        load_sdxl_file(checkpoint, dtype=torch.float32)  # not of SDXL's size


# ---- LoRA ----

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"
NAMES = {
    "kohya, original": ("lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q", "lora_"),
    "kohya, diffusers": (f"lora_unet_{LAYER.replace('.', '_')}", "lora_"),
    "peft": (f"unet.{LAYER}", "peft"),
}


def write_lora(path, layer, style, shape=(32, 32), alpha=None):
    draw = torch.Generator().manual_seed(1)
    down, up = torch.randn(4, shape[1], generator=draw), torch.randn(shape[0], 4, generator=draw)
    suffixes = ("lora_A", "lora_B") if style == "peft" else ("lora_down", "lora_up")
    tensors = {f"{layer}.{suffixes[0]}.weight": down, f"{layer}.{suffixes[1]}.weight": up}
    if alpha is not None:
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return up @ down


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_sdxl(tmp_path_factory.mktemp("sdxl"))


def weight(pipe, layer):
    return pipe.unet.get_submodule(layer).weight.clone()


@pytest.mark.parametrize("name", list(NAMES))
def test_a_lora_is_merged(name, small, tmp_path):
    layer, style = NAMES[name]
    change = write_lora(tmp_path / "a.safetensors", layer, style, alpha=2.0)
    cpu, full = torch.device("cpu"), torch.float32
    before = load_sdxl(small.sdxl, device=cpu, dtype=full)
    loras = [(tmp_path / "a.safetensors", 0.5)]
    after = load_sdxl(small.sdxl, device=cpu, dtype=full, loras=loras)
    difference = weight(after, LAYER) - weight(before, LAYER)
    torch.testing.assert_close(difference, change * 0.5 * 2 / 4, rtol=1e-4, atol=1e-5)
    other = LAYER.replace("to_q", "to_v")
    assert torch.equal(weight(after, other), weight(before, other))


def test_a_lora_of_a_text_encoder_is_merged(small, tmp_path):
    name = f"lora_te2_{TEXT_LAYER.replace('.', '_')}"
    change = write_lora(tmp_path / "a.safetensors", name, "kohya")
    pipe = load_sdxl(small.sdxl, device=torch.device("cpu"), dtype=torch.float32)
    before = pipe.text_encoder_2.get_submodule(TEXT_LAYER).weight.clone()
    merge_lora(pipe, tmp_path / "a.safetensors", -1.0)
    difference = pipe.text_encoder_2.get_submodule(TEXT_LAYER).weight - before
    torch.testing.assert_close(difference, -change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", (32, 32), "1 of 1 parts fit no linear layer"),
        (NAMES["kohya, diffusers"][0], (32, 48), r"\[32, 48\], this SDXL has \[32, 32\]"),
    ],
)
def test_a_lora_of_another_model_changes_nothing(layer, shape, message, small, tmp_path):
    write_lora(tmp_path / "a.safetensors", layer, "kohya", shape)
    pipe = load_sdxl(small.sdxl, device=torch.device("cpu"), dtype=torch.float32)
    before = weight(pipe, LAYER)
    with pytest.raises(WeightsError, match=message):
        merge_lora(pipe, tmp_path / "a.safetensors", 1.0)
    assert torch.equal(weight(pipe, LAYER), before)


def test_a_file_that_is_no_lora(small, tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors")
    pipe = load_sdxl(small.sdxl, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(WeightsError, match="no LoRA.*left over: weight"):
        merge_lora(pipe, tmp_path / "a.safetensors", 1.0)


def test_lora_option():
    assert [(str(p), s) for p, s in map(parse_lora, ("a.st", "a.st:0.6", "C:\\a.st", "a:-1"))] == [
        ("a.st", 1.0), ("a.st", 0.6), ("C:\\a.st", 1.0), ("a", -1.0)
    ]  # fmt: skip


def test_command_line(checkpoint, small, tmp_path, monkeypatch, offline):
    """Pictures from a single file, and with a LoRA."""
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    write_lora(tmp_path / "lora.safetensors", *NAMES["kohya, original"])
    for part, config in SMALL.items():
        monkeypatch.setitem(sdxl_file.SDXL, part, config)
    out = tmp_path / "out.png"
    command = [
        "stylize-sdxl", str(out), "--model", "small-random", "--sdxl", str(checkpoint),
        "--style", str(tmp_path / "a.png"), "--steps", "1", "--size", "64x64", "--json",
    ]  # fmt: skip
    assert main(command) == 0
    plain = np.asarray(Image.open(out))
    assert plain.shape == (64, 64, 3)
    assert main([*command, "--overwrite", "--lora", f"{tmp_path / 'lora.safetensors'}:0.5"]) == 0
    assert not np.array_equal(np.asarray(Image.open(out)), plain)
