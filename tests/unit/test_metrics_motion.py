"""Motion, retrieval and the scores of networks, on drawn clips and small random networks."""

import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stylemaster_core.cli import main
from stylemaster_core.data.demo_scene import demo_clip, demo_styles
from stylemaster_core.data.images import write_image
from stylemaster_core.errors import (
    ConfigError,
    LayoutError,
    UnsupportedHostError,
    WeightsError,
)
from stylemaster_core.metrics.motion import (
    frame_difference,
    frame_difference_ratio,
    warping_error,
)
from stylemaster_core.metrics.perceptual import (
    art_fid,
    clip_embedder,
    clip_text_score,
    csd_score,
    frechet_distance,
    load_art_inception,
    load_csd,
    load_lpips,
)
from stylemaster_core.metrics.retrieval import embed_clip, p_own_nearer, retrieval_at_1
from stylemaster_core.models.clip_text import ClipText
from stylemaster_core.weights.files import write_state_dict

CLIP = demo_clip(4, 64, 96)
STILL = np.repeat(CLIP[:1], 4, axis=0)


def panned(step: int = 2, count: int = 5) -> np.ndarray:
    """A smooth random picture that moves by whole pixels."""
    coarse = np.random.default_rng(0).integers(0, 256, (14, 20, 3), np.uint8)
    from PIL import Image

    picture = np.asarray(Image.fromarray(coarse).resize((120, 84), Image.Resampling.BICUBIC))
    return np.stack([picture[10:74, i * step : i * step + 96] for i in range(count)])


def test_a_still_clip_does_not_differ_and_a_known_step_does():
    assert frame_difference(STILL) == 0
    steps = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (0, 51, 255)])
    assert frame_difference(steps) == pytest.approx((0.2 + 0.8) / 2)


def test_more_motion_is_more_difference():
    assert frame_difference_ratio(panned(4), panned(1)) > 1.5
    assert frame_difference_ratio(STILL, CLIP) == 0
    assert frame_difference_ratio(CLIP, CLIP) == 1
    with pytest.raises(ConfigError, match="stands still"):
        frame_difference_ratio(CLIP, STILL)


def test_one_frame_has_no_motion():
    for measure in (frame_difference, warping_error):
        with pytest.raises(LayoutError, match="at least two"):
            measure(CLIP[:1])


def test_a_shift_is_explained_by_its_flow_and_flicker_is_not():
    pan = panned()
    assert warping_error(pan) < 0.25 * frame_difference(pan)
    assert warping_error(pan) < 0.5 * warping_error(pan[[0, 4, 1, 3, 2]][:, ::-1].copy())
    flicker = np.clip(pan + np.array([0, 40, 0, 40, 0])[:, None, None, None], 0, 255)
    assert warping_error(flicker.astype(np.uint8), pan) > 4 * warping_error(pan)


def test_the_flow_of_the_content_explains_a_recoloured_result():
    pan = panned()
    assert warping_error(255 - pan, pan) < 0.25 * frame_difference(pan)
    still_flow = warping_error(pan, np.repeat(pan[:1], 5, axis=0))
    assert still_flow == pytest.approx(frame_difference(pan), rel=0.05)
    with pytest.raises(LayoutError, match="same shape"):
        warping_error(pan, CLIP)


def test_without_opencv_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UnsupportedHostError, match="pip install opencv"):
        warping_error(CLIP)


def test_share_of_nearer_references():
    distances = np.array([[1.0, 2, 3], [1, 2, 3], [1, 1, 1]])
    # first: nearer than both; second (own 1): nearer than one; third: equal is not nearer
    assert p_own_nearer(distances, [0, 1, 2]) == pytest.approx(3 / 6)
    assert p_own_nearer(distances, [2, 2, 0]) == 0
    assert p_own_nearer(distances, [0, 0, 0]) == pytest.approx(4 / 6)
    for wrong in ([0, 1], [0, 1, 3], [0, 1, -1]):
        with pytest.raises(ConfigError, match="own references"):
            p_own_nearer(distances, wrong)
    with pytest.raises(ConfigError, match="two pictures"):
        p_own_nearer(distances[:, :1], [0, 0, 0])


def test_retrieval_finds_what_is_there_and_is_chance_otherwise():
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(64, 16, generator=generator)
    own = list(range(64))
    near = references + 0.1 * torch.randn(64, 16, generator=generator)
    assert retrieval_at_1(near, references, own) == 1
    assert retrieval_at_1(near, references, own[1:] + [0]) < 0.1
    strangers = torch.randn(64, 16, generator=generator)
    assert retrieval_at_1(strangers, references, own) < 0.15
    few, many = (retrieval_at_1(strangers, references, own, num_candidates=n) for n in (2, 64))
    assert few > 0.3 > many
    crowd = torch.randn(2, 400, 16, generator=generator)
    assert 0.43 < retrieval_at_1(*crowd, range(400), num_candidates=2) < 0.57
    assert retrieval_at_1(torch.ones(64, 16), torch.ones(64, 16), own) == 0  # no ties for free


def test_retrieval_is_cosine_and_repeats():
    references = torch.tensor([[1.0, 0], [100, 100]])
    assert retrieval_at_1(torch.tensor([[5.0, 1]]), references, [0]) == 1
    generator = torch.Generator().manual_seed(1)
    clips, many = torch.randn(40, 3, generator=generator), torch.randn(40, 3, generator=generator)
    runs = [retrieval_at_1(clips, many, range(40), num_candidates=4, seed=3) for _ in range(2)]
    assert runs[0] == runs[1]
    with pytest.raises(ConfigError, match="candidates"):
        retrieval_at_1(clips, many, range(40), num_candidates=1)


def mean_colour(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).float().mean((1, 2))


def test_a_clip_is_embedded_as_its_mean_direction():
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    frames[0, ..., 0], frames[1, ..., 1] = 200, 10  # lengths do not count
    expected = torch.tensor([0.5**0.5, 0.5**0.5, 0])
    torch.testing.assert_close(embed_clip(mean_colour, frames), expected)


def test_clip_text_score_is_the_mean_cosine():
    text = ClipText(lambda prompts: torch.tensor([[1.0, 0, 0]] * len(prompts)))
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    frames[0, ..., 0], frames[1, ..., 1] = 200, 10
    assert clip_text_score(mean_colour, text, frames, "red") == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="prompt is empty"):
        clip_text_score(mean_colour, text, frames, " ")
    narrow = ClipText(lambda prompts: torch.ones(len(prompts), 2))
    with pytest.raises(LayoutError, match="same CLIP model"):
        clip_text_score(mean_colour, narrow, frames, "red")


def vision_model():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=64,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    return CLIPVisionModelWithProjection(config).eval()


@pytest.fixture
def csd_file(tmp_path):
    """CSD's naming with transformers' backbone, small and random."""
    weights = vision_model().state_dict()
    style = weights.pop("visual_projection.weight").T.contiguous()
    tensors = {f"backbone.{key}": value for key, value in weights.items()}
    tensors |= {"last_layer_style": style, "last_layer_content": torch.zeros_like(style)}
    write_state_dict(tmp_path / "csd.safetensors", tensors)
    return tmp_path / "csd.safetensors"


def test_csd_is_the_style_projection_of_its_backbone(csd_file):
    from stylemaster_core.models.image_encoder import ImageEncoder

    frames = np.stack(list(demo_styles(32).values()))
    embed = load_csd(csd_file)
    torch.testing.assert_close(embed(frames), clip_embedder(ImageEncoder(vision_model()))(frames))
    assert csd_score(embed, frames[:1], frames[0]) == pytest.approx(1)
    assert csd_score(embed, frames[1:], frames[0]) < 0.999


def test_csd_with_openais_names_is_the_same(csd_file, tmp_path):
    from stylemaster_core.weights.files import read_state_dict

    renamed = {}
    whole = {k: v.clone() for k, v in read_state_dict(csd_file).tensors.items()}
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    inside |= {"mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    outside = {"embeddings.class_embedding": "class_embedding", "pre_layrnorm": "ln_pre"}
    outside |= {"embeddings.position_embedding.weight": "positional_embedding"}
    outside |= {"embeddings.patch_embedding": "conv1", "post_layernorm": "ln_post"}
    for key, value in whole.items():
        if "_proj." in key and "out_proj" not in key and "self_attn" in key:
            stem, kind = key.split("self_attn.")[0], key.rsplit(".", 1)[1]
            parts = [whole[f"{stem}self_attn.{n}_proj.{kind}"] for n in "qkv"]
            key, value = f"{stem}attn.in_proj_{kind}", torch.cat(parts)
        key = key.replace("vision_model.encoder.layers", "transformer.resblocks")
        for old, new in (inside | outside).items():
            key = key.replace(f"vision_model.{old}", new).replace(f".{old}.", f".{new}.")
        renamed[key] = value
    write_state_dict(tmp_path / "openai.safetensors", renamed)
    frames = np.stack(list(demo_styles(32).values()))
    embeddings = [load_csd(path)(frames) for path in (csd_file, tmp_path / "openai.safetensors")]
    torch.testing.assert_close(*embeddings)


def test_other_files_are_not_csd(tmp_path):
    write_state_dict(tmp_path / "other.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(WeightsError, match="is not CSD"):
        load_csd(tmp_path / "other.safetensors")


def test_csd_that_is_damaged_is_named(csd_file, tmp_path):
    """Whatever is wrong with it; the readers' own errors name no file."""
    whole = {key: value.clone() for key, value in load_file(csd_file).items()}
    style, patch = "last_layer_style", "backbone.vision_model.embeddings.patch_embedding.weight"
    position = "backbone.vision_model.embeddings.position_embedding.weight"
    changes = [
        {style: torch.zeros(())},
        {style: torch.zeros(3)},
        {patch: torch.zeros(0, 3, 0, 0)},
        {position: torch.zeros(())},
        {position: torch.zeros(1, 64)},
        {"backbone.vision_model.encoder.layers.": torch.zeros(1)},
        {style: whole[style] * torch.nan},
        {patch: whole[patch] / 0},
        {style: torch.ones(64, 24, dtype=torch.int32)},
    ]
    for number, change in enumerate(changes):
        path = tmp_path / f"csd{number}.safetensors"
        write_state_dict(path, whole | change)
        with pytest.raises(WeightsError, match=path.name):
            load_csd(path)
    load_csd(tmp_path / "csd6.safetensors", skip_check=True)


class Inception3(torch.nn.Module):
    """In place of art-fid's."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))


def test_art_inception_that_is_damaged_is_named(tmp_path, monkeypatch):
    package = types.SimpleNamespace(Inception3=Inception3)
    monkeypatch.setitem(sys.modules, "art_fid", types.SimpleNamespace(inception=package))
    monkeypatch.setitem(sys.modules, "art_fid.inception", package)
    path = tmp_path / "inception.safetensors"
    for tensors, words in (
        ({"weight": torch.zeros(3)}, "does not fit"),
        ({"weight": torch.full((2,), torch.nan)}, "NaN or infinity"),
        ({"other": torch.zeros(2)}, "lacks 1 weights"),
    ):
        write_state_dict(path, tensors, overwrite=True)
        with pytest.raises(WeightsError, match=f"inception.safetensors.*{words}"):
            load_art_inception(path)
    (tmp_path / "inception.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(WeightsError, match="inception.pth"):
        load_art_inception(tmp_path / "inception.pth")


def test_clip_with_nan_judges_nothing(tmp_path, capsys):
    model = vision_model()
    model.visual_projection.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "clip")
    write_image(tmp_path / "style.png", np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "table.jsonl").write_text('{"style": "style.png", "result": "style.png"}\n')
    command = ["evaluate", "--pairs", str(tmp_path / "table.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*command, "--image-encoder", str(tmp_path / "clip")]) == 2
    said = capsys.readouterr().err
    assert "clip: 1 weights (visual_projection.weight) with NaN" in said
    assert not (tmp_path / "out").exists()


def test_libraries_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setitem(sys.modules, "art_fid", None)
    with pytest.raises(UnsupportedHostError, match="pip install lpips"):
        load_lpips()
    write_state_dict(tmp_path / "x.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(UnsupportedHostError, match="pip install art-fid"):
        load_art_inception(tmp_path / "x.safetensors")


def test_frechet_distance_equals_the_formula():
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50, 4, generator=generator, dtype=torch.float64) * 2 + 1
    second = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (first, second)]
    root = np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    means = (first.mean(0) - second.mean(0)).square().sum().item()
    expected = means + sum(np.trace(c) for c in covariances) - 2 * root
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    with pytest.raises(LayoutError, match="at least two"):
        frechet_distance(first[:1], second)


def test_art_fid_of_equal_pictures_is_one():
    assert art_fid(0, 0) == 1
    assert art_fid(0.5, 3) == 6
