import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from stylemaster_core.errors import LayoutError, UnsupportedHostError, WeightsError
from stylemaster_core.models.clip_text import joint_similarity, load_clip_text, project_patches
from stylemaster_core.models.image_encoder import _config, load_image_encoder
from stylemaster_core.weights.state_dict import shapes_of


@pytest.fixture(scope="module")
def reference():
    """A small tower of ViT-H's proportions: heads of 80, patches of 14."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=200,
        projection_dim=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        hidden_act="gelu",
    )
    model = CLIPVisionModelWithProjection(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def open_clip_names(model):
    """The same weights as open_clip stores them, written out by hand."""
    weights = model.state_dict()
    result = {
        "visual.class_embedding": weights["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": weights["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": weights["visual_projection.weight"].T.contiguous(),
        "token_embedding.weight": torch.zeros(3, 3),
    }
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for leaf in ("weight", "bias"):
            result[f"visual.{theirs}.{leaf}"] = weights[f"vision_model.{ours}.{leaf}"]
    pairs = [
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("attn.out_proj", "self_attn.out_proj"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ]
    for layer in range(model.config.num_hidden_layers):
        theirs_prefix = f"visual.transformer.resblocks.{layer}."
        ours_prefix = f"vision_model.encoder.layers.{layer}."
        for leaf in ("weight", "bias"):
            for theirs, ours in pairs:
                result[f"{theirs_prefix}{theirs}.{leaf}"] = weights[f"{ours_prefix}{ours}.{leaf}"]
            result[f"{theirs_prefix}attn.in_proj_{leaf}"] = torch.cat(
                [weights[f"{ours_prefix}self_attn.{n}_proj.{leaf}"] for n in "qkv"]
            )
    return result


def saved_as(kind, model, folder):
    if kind in ("folder", "root"):
        place = folder if kind == "folder" else folder / "image_encoder"
        model.save_pretrained(place)
        return folder
    weights = dict(model.state_dict())
    if kind == "file":
        weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        weights["text_model.final_layer_norm.weight"] = torch.ones(3)
    else:
        weights = open_clip_names(model)
    if kind == "checkpoint":
        torch.save({"state_dict": weights}, folder / "model.pt")
        return folder / "model.pt"
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("kind", ["folder", "root", "file", "open_clip", "checkpoint"])
def test_every_format_gives_the_same_features(kind, reference, pixels, tmp_path):
    encoder = load_image_encoder(saved_as(kind, reference, tmp_path))
    features = encoder.encode(pixels)
    with torch.no_grad():
        inside = reference.vision_model(pixels, output_hidden_states=True)
        embeds = reference(pixels).image_embeds
    assert features.patch_features.shape == (2, 17, 160)
    # Before the post-layernorm: the raw output of the last layer.
    assert torch.allclose(features.patch_features, inside.hidden_states[-1], atol=1e-5)
    assert torch.allclose(features.image_embeds, embeds, atol=1e-5)
    assert encoder.image_size == 56
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_dtype_and_heads_can_be_chosen(reference, pixels, tmp_path):
    path = saved_as("file", reference, tmp_path)
    assert load_image_encoder(path, dtype=torch.bfloat16).encode(pixels).image_embeds.dtype == (
        torch.bfloat16
    )
    other = load_image_encoder(path, num_heads=4).encode(pixels).patch_features
    assert not torch.allclose(other, load_image_encoder(path).encode(pixels).patch_features)
    tagged = tmp_path / "tagged.safetensors"
    save_file(reference.state_dict(), tagged, {"num_heads": "4"})
    assert torch.equal(load_image_encoder(tagged).encode(pixels).patch_features, other)
    with pytest.raises(WeightsError, match="give num_heads"):
        load_image_encoder(path, num_heads=7)


def test_sizes_of_vit_h_are_read_off_its_shapes():
    real = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "projection_dim": 1024,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**real))
    config = _config(shapes_of(model.state_dict()), 0, Path("clip_vision_h.safetensors"))
    assert {key: getattr(config, key) for key in real} == real
    assert config.hidden_act == "gelu"


def test_bad_images_are_refused(reference, pixels, tmp_path):
    encoder = load_image_encoder(saved_as("file", reference, tmp_path))
    with pytest.raises(LayoutError, match="clip_pixels"):
        encoder.encode(pixels[0])
    with pytest.raises(LayoutError, match="clip_pixels"):
        encoder.encode(torch.zeros(1, 3, 224, 224))
    pixels[1, 0, 3, 3] = torch.nan
    with pytest.raises(LayoutError, match="NaN"):
        encoder.encode(pixels)


def test_bad_files_are_refused(reference, tmp_path):
    weights = reference.state_dict()
    for name, keep, words in [
        ("other", lambda key: "layer_norm" in key, "expected a CLIP image encoder"),
        ("headless", lambda key: "projection" not in key, "visual_projection.weight"),
        ("holes", lambda key: "layers.1.mlp.fc2" not in key, "2 missing"),
    ]:
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value for key, value in weights.items() if keep(key)}, path)
        with pytest.raises(WeightsError, match=words):
            load_image_encoder(path)
    with pytest.raises(WeightsError, match="does not exist"):
        load_image_encoder(tmp_path / "missing.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="cannot be loaded as a CLIP image encoder"):
        load_image_encoder(tmp_path / "empty")
    CLIPVisionModel(reference.config).save_pretrained(tmp_path / "tower")
    with pytest.raises(WeightsError, match="lacks"):
        load_image_encoder(tmp_path / "tower")


def test_patches_in_the_joint_space(reference, pixels, tmp_path):
    encoder = load_image_encoder(saved_as("file", reference, tmp_path))
    features = encoder.encode(pixels)
    projected = project_patches(encoder, features.patch_features)
    assert projected.shape == (2, 17, 24)
    # CLIP's own embedding is the projection of the CLS token.
    assert torch.allclose(projected[:, 0], features.image_embeds, atol=1e-5)
    similarity = joint_similarity(encoder, features.patch_features, projected[:, 5])
    assert similarity.shape == (2, 17)
    assert torch.equal(similarity.argmax(-1), torch.tensor([5, 5]))
    with pytest.raises(LayoutError, match="same CLIP model"):
        joint_similarity(encoder, features.patch_features, torch.zeros(2, 25))
    with pytest.raises(LayoutError, match="patch features"):
        project_patches(encoder, torch.zeros(1, 17, 24))


def write_text_tower(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<start>", "<end>", "a", "cat", "dog", "?"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(folder)
    return model


def test_text_tower_from_a_folder(tmp_path):
    model = write_text_tower(tmp_path)
    text = load_clip_text(tmp_path)
    embeds = text.encode(["a cat", "a dog a dog a dog a dog a dog"])
    assert embeds.shape == (2, 24)
    ids = torch.tensor([[0, 2, 3, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        assert torch.allclose(embeds[:1], model(input_ids=ids).text_embeds, atol=1e-6)
    with pytest.raises(LayoutError, match="no prompt"):
        text.encode([])
    model.text_projection.weight.data[0, 0] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="text_projection.weight.* with NaN or infinity"):
        load_clip_text(tmp_path)
    load_clip_text(tmp_path, skip_check=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="CLIP text encoder"):
        load_clip_text(tmp_path)


def test_text_tower_of_open_clip(tmp_path, monkeypatch):
    path = tmp_path / "open_clip.safetensors"
    save_file({"text_projection": torch.eye(2), "visual": torch.ones(1)}, path)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UnsupportedHostError, match=r"stylemaster\[open-clip\]"):
        load_clip_text(path)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.text_projection = torch.nn.Parameter(torch.zeros(2, 2))
            self.register_buffer("visual", torch.zeros(1))

        def encode_text(self, tokens):
            return tokens @ self.text_projection

    stand_in = types.SimpleNamespace(
        create_model=lambda name, pretrained: Model(),
        get_tokenizer=lambda name: lambda prompts: torch.tensor([[len(p), 1.0] for p in prompts]),
    )
    monkeypatch.setitem(sys.modules, "open_clip", stand_in)
    assert load_clip_text(path).encode(["abc"]).tolist() == [[3.0, 1.0]]
    save_file({"visual": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match="no text tower"):
        load_clip_text(path)
