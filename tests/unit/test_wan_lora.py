"""LoRAs for Wan: each naming, what fits nothing, and the command line that names it first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stylemaster_core.cli import main
from stylemaster_core.data.images import write_image
from stylemaster_core.errors import WeightsError
from stylemaster_core.models.small import draw_weights, write_small_models
from stylemaster_core.weights.key_maps import native_to_diffusers
from stylemaster_core.weights.lora import merge_wan_loras
from stylemaster_core.weights.shapes import WanSizes, expected_base_shapes

WIDTH, RANK = 24, 4
SIZES = WanSizes(width=WIDTH, ffn_width=32, num_blocks=2, text_width=10, freq_width=8)
NATIVE, DIFFUSERS = "blocks.1.self_attn.q", "blocks.1.attn1.to_q"
# Name of the layer, and of the two matrices.
FORMS = {
    "kohya": ("lora_unet_blocks_1_self_attn_q", "lora_down.weight", "lora_up.weight"),
    "Wan Fun": ("lora_unet__blocks_1_self_attn_q", "lora_down.weight", "lora_up.weight"),
    "ComfyUI": (f"diffusion_model.{NATIVE}", "lora_A.weight", "lora_B.weight"),
    "lightx2v": (f"diffusion_model.{NATIVE}", "lora_down.weight", "lora_up.weight"),
    "PEFT": (f"base_model.model.{NATIVE}", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": (f"transformer.{DIFFUSERS}", "lora_A.weight", "lora_B.weight"),
}


@pytest.fixture(scope="module")
def native() -> dict[str, Tensor]:
    return draw_weights(expected_base_shapes(SIZES), 0)


def matrices(rows: int = WIDTH, columns: int = WIDTH) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(RANK, columns, generator=draw), torch.randn(rows, RANK, generator=draw)


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def merged(weights: dict[str, Tensor], path: Path, scale: float = 1.0) -> dict[str, Tensor]:
    return merge_wan_loras(weights, [(path, scale)], torch.float32)


@pytest.mark.parametrize("base", ["native", "diffusers"])
@pytest.mark.parametrize("form", FORMS)
def test_each_naming(form: str, base: str, native: dict[str, Tensor], tmp_path: Path) -> None:
    weights = native if base == "native" else native_to_diffusers(native)
    key = f"{NATIVE if base == 'native' else DIFFUSERS}.weight"
    layer, down_name, up_name = FORMS[form]
    down, up = matrices()
    tensors = {f"{layer}.{down_name}": down, f"{layer}.{up_name}": up}
    tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    after = merged(weights, write(tmp_path / "a.safetensors", tensors), 0.5)
    torch.testing.assert_close(after[key] - weights[key], up @ down * (0.5 * 2 / RANK))
    assert {k for k in weights if after[k] is not weights[k]} == {key}


def test_two_loras_add_up(native: dict[str, Tensor], tmp_path: Path) -> None:
    layer, down_name, up_name = FORMS["ComfyUI"]
    down, up = matrices()
    path = write(
        tmp_path / "a.safetensors", {f"{layer}.{down_name}": down, f"{layer}.{up_name}": up}
    )
    twice = merge_wan_loras(native, [(path, 1.0), (path, -0.25)], torch.bfloat16)
    key = f"{NATIVE}.weight"
    assert twice[key].dtype == torch.bfloat16
    assert torch.equal(twice[key], (native[key] + up @ down * 0.75).bfloat16())


def test_whole_differences_and_convolutions(native: dict[str, Tensor], tmp_path: Path) -> None:
    """What distilled LoRAs carry beside the matrices."""
    draw = torch.Generator().manual_seed(2)
    norm, bias = torch.randn(WIDTH, generator=draw), torch.randn(WIDTH, generator=draw)
    table = torch.randn(1, 6, WIDTH, generator=draw)
    down = torch.randn(RANK, 16, 1, 2, 2, generator=draw)
    up = torch.randn(WIDTH, RANK, 1, 1, 1, generator=draw)
    path = write(
        tmp_path / "a.safetensors",
        {
            "diffusion_model.blocks.0.norm3.diff": norm,
            "diffusion_model.blocks.0.self_attn.o.diff_b": bias,
            "diffusion_model.blocks.1.modulation.diff": table,
            "diffusion_model.patch_embedding.lora_down.weight": down,
            "diffusion_model.patch_embedding.lora_up.weight": up,
        },
    )
    after = merged(native, path, 2.0)
    for key, change in {
        "blocks.0.norm3.weight": norm,
        "blocks.0.self_attn.o.bias": bias,
        "blocks.1.modulation": table,
        "patch_embedding.weight": torch.einsum("ou,ucthw->octhw", up.flatten(1), down),
    }.items():
        torch.testing.assert_close(after[key] - native[key], 2 * change, rtol=1e-4, atol=1e-5)


def pair(layer: str, down: Tensor | None = None, up: Tensor | None = None) -> dict[str, Tensor]:
    drawn = matrices()
    return {
        f"{layer}.lora_A.weight": drawn[0] if down is None else down,
        f"{layer}.lora_B.weight": drawn[1] if up is None else up,
    }


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            pair("diffusion_model.blocks.1.cross_attn.k_img"),
            "1 of 1 parts fit nothing.*blocks_1_cross_attn_k_img",
        ),
        (pair("diffusion_model.blocks.7.self_attn.q"), "blocks_7_self_attn_q"),
        (
            pair(f"diffusion_model.{NATIVE}", torch.ones(RANK, 48), torch.ones(48, RANK)),
            r"blocks.1.self_attn.q.weight is for \[48, 48\], this Wan transformer has \[24, 24\]",
        ),
        (pair(NATIVE, up=torch.ones(24, 5)), r"\[4, 24\] and \[24, 5\], which do not multiply"),
        (pair(NATIVE, up=torch.full((24, 4), torch.nan)), "holds NaN or infinity"),
        (
            pair(NATIVE) | {f"{NATIVE}.dora_scale": torch.ones(24, 1)},
            "left over: .*self_attn.q.dora_scale",
        ),
        ({"weight": torch.ones(2)}, "is no LoRA"),
    ],
)
def test_what_does_not_fit_is_named(
    tensors: dict[str, Tensor], words: str, native: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write(tmp_path / "other.safetensors", tensors)
    with pytest.raises(WeightsError, match=f"other.safetensors.*{words}"):
        merged(native, path)


def test_the_command_line_refuses_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stylemaster_core.pipelines.models import Models

    small = write_small_models(tmp_path / "models")
    path = write(tmp_path / "sdxl.safetensors", pair("lora_unet_down_blocks_0_attn_q"))
    for name in ("text_encoder", "image_encoder", "vae", "transformer"):
        monkeypatch.setattr(Models, name, property(lambda self: pytest.fail("a model was loaded")))
    style = tmp_path / "style.png"
    write_image(style, np.zeros((32, 32, 3), np.uint8))
    command = ["stylize", str(tmp_path / "out.png"), "--style", str(style), "--steps", "1"]
    command += ["--transformer", str(small.stylemaster), "--vae", str(small.vae)]
    command += ["--text-encoder", str(small.text_encoder), "--lora", f"{path}:0.8"]
    assert main(command) == 2
    assert "sdxl.safetensors: 1 of 1 parts fit nothing" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
