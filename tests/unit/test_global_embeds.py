"""Which embedding of a style picture an adapter takes: its metadata tell, core and nodes obey."""

import importlib
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from stylemaster_core.data.demo_scene import demo_styles
from stylemaster_core.errors import WeightsError
from stylemaster_core.models.small import draw_weights, write_small_models
from stylemaster_core.models.style_projector import ContrastiveProjection, load_style_projector
from stylemaster_core.pipelines.encode_style import TextureConfig, encode_style
from stylemaster_core.pipelines.models import ModelFiles, Models
from stylemaster_core.training.config import StyleConfig, TrainConfig
from stylemaster_core.training.setup import _as_trained
from stylemaster_core.training.style_branch import style_keys
from stylemaster_core.weights.files import read_state_dict, write_state_dict
from stylemaster_core.weights.shapes import AdapterSizes, expected_adapter_shapes
from tests.origin import ORIGIN, TEXTURE
from tests.unit.node_modules import NAME, node_module

SIZES = AdapterSizes(
    width=8, num_blocks=1, style_width=10, patch_width=16, num_layers=1, global_tokens=3,
    global_width=6, contrastive_width=4,
)  # fmt: skip
CASES = [
    (False, None, "shuffled_embeds"),
    (True, None, "image_embeds"),
    (False, "image_embeds", "image_embeds"),
    (True, "shuffled_embeds", "shuffled_embeds"),
]


def adapter_weights(contrastive):
    drawn = draw_weights(expected_adapter_shapes(SIZES), 0)
    return {k: v.float() for k, v in drawn.items() if contrastive or "contrastive" not in k}


def style_model(weights):
    start = "style_model."
    return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}


@pytest.mark.parametrize(("contrastive", "metadata", "expected"), CASES)
def test_what_the_projector_takes(contrastive, metadata, expected):
    weights = style_model(adapter_weights(contrastive))
    projector = load_style_projector(weights, global_embeds=metadata)
    assert projector.global_embeds == expected


def test_an_unknown_embedding_is_refused():
    with pytest.raises(WeightsError, match="global_embeds='both'.*expected one of"):
        load_style_projector(style_model(adapter_weights(False)), global_embeds="both")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(("contrastive", "metadata", "expected"), CASES)
def test_the_pipeline_obeys(contrastive, metadata, expected, small, tmp_path):
    path = tmp_path / "adapter.safetensors"
    tensors = read_state_dict(small.stylemaster).tensors
    tensors = {k: v.float() for k, v in tensors.items() if k.startswith("style_model.")}
    if contrastive:
        module = ContrastiveProjection(tensors["style_model.proj.weight"].shape[1], 4)
        tensors |= {f"style_model.contrastive.{k}": v for k, v in module.state_dict().items()}
    write_state_dict(path, tensors, {"global_embeds": metadata} if metadata else {})
    files = ModelFiles(adapter=path, image_encoder=small.image_encoder)
    models = Models(files, device="cpu", keep_loaded=True)
    picture = next(iter(demo_styles(64).values()))
    with models.image_encoder() as encoder, models.style_projector() as projector:
        inner, seen = encoder.encode, []
        encoder.encode = lambda views: seen.append(inner(views)) or seen[-1]  # type: ignore[method-assign]
        taken = []
        projector.register_forward_pre_hook(lambda _, arguments: taken.append(arguments[1]))
        style = encode_style(models, picture, "a boat", TextureConfig(selection="all")).style
    assert set(style.provenance) == ORIGIN | {"texture", "prompt"}
    assert set(style.provenance["texture"]) == TEXTURE
    own, shuffled = seen[0].image_embeds.split(1)
    assert not torch.allclose(own, shuffled)
    assert torch.equal(taken[0], own if expected == "image_embeds" else shuffled)


class Stub(types.ModuleType):
    """Stands in for a module of ComfyUI of which nothing is used here."""

    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


@pytest.mark.parametrize(("contrastive", "metadata", "expected"), CASES)
def test_the_nodes_obey(contrastive, metadata, expected, tmp_path, monkeypatch):
    names = ("comfy", "comfy.conds", "comfy.model_management", "comfy_api", "comfy_api.latest")
    for name in names:
        monkeypatch.setitem(sys.modules, name, Stub(name))
    management = sys.modules["comfy.model_management"]
    management.get_torch_device = lambda: torch.device("cpu")
    sys.modules["comfy"].model_management = management
    path = tmp_path / "adapter.safetensors"
    weights = adapter_weights(contrastive)
    write_state_dict(path, weights, {"global_embeds": metadata} if metadata else {})
    picture = np.zeros((16, 16, 3), np.uint8)
    with node_module("style_encoding", Stub("folder_paths")) as style_encoding:
        sockets = sys.modules[f"{NAME}.nodes.sockets"]
        sys.modules[f"{NAME}.nodes.motion"] = Stub("motion")
        sys.modules[f"{NAME}.nodes.paths"] = Stub("paths")
        adapter = importlib.import_module(f"{NAME}.nodes.loaders").load_adapter(path)
        assert adapter.projector.global_embeds == expected
        embeds = {"image_embeds": torch.full((1, 6), 0.25), "shuffled_embeds": torch.ones(1, 6)}
        patches = torch.randn(1, 17, 16)
        features = sockets.StyleFeatures(
            patches, patches, *embeds.values(), None, [picture], [picture], "center", 0,
            lambda: patches,
        )  # fmt: skip
        taken = []

        def keep(module, arguments):
            taken.append(arguments[1])

        adapter.projector.register_forward_pre_hook(keep)
        style, _ = style_encoding.select_textures(
            adapter, features, [[torch.zeros(1, 3, 16), {}]], "all", drop_rate=0.5, keep=0, seed=0,
            several="mean", clip_prompt=None,
        )  # fmt: skip
    assert torch.equal(taken[0], embeds[expected])
    assert set(style.provenance) == ORIGIN | {"texture"}  # a node is not told the words
    assert set(style.provenance["texture"]) == TEXTURE


@pytest.mark.parametrize(("contrastive", "metadata", "expected"), CASES)
def test_training_goes_on_with_it(contrastive, metadata, expected):
    header = {"style_num_heads": "2"} | ({"global_embeds": metadata} if metadata else {})
    style = _as_trained(TrainConfig(), header, False).style
    assert style.num_heads == 2
    assert style_keys(style, has_contrastive=contrastive)[1] == expected


def test_what_is_asked_for_or_new_comes_before_the_header():
    header = {"global_embeds": "shuffled_embeds"}
    asked = TrainConfig(style=StyleConfig(global_embeds="plain"))
    assert _as_trained(asked, header, False).style.global_embeds == "plain"
    assert _as_trained(TrainConfig(), header, True).style.global_embeds == "auto"
