"""The gates of the small model: the true filter passes them, what has no style does not."""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from recipes.tiny import gates, run_gates
from recipes.tiny.encoder_pool import Pool
from recipes.tiny.gates import Studio
from recipes.tiny.held_out import SEED, draw_held_out, measure
from recipes.tiny.restyle import restyle, style_tokens
from recipes.tiny.styles import draw_style
from stylemaster_core.cli import evaluate, main
from stylemaster_core.metrics.baselines import reinhard
from stylemaster_core.metrics.perceptual import clip_embedder
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.patch_vae import PatchVAE, video_to_blocks
from stylemaster_core.models.style_tokens import Style
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.pipelines.tiny import SETTINGS, tiny_files
from tests.standin_tiny import write_standin

NUM, NUM_FEW = 12, 4
CONFIG = StylizeConfig("video-to-video", **SETTINGS, motion_scale=0.0)


class Judge:
    """Knows the styles of some pictures; what it makes of others is chance."""

    def __init__(self):
        self.styles = {}

    def learn(self, pictures, style):
        self.styles |= {picture.tobytes(): style for picture in pictures}

    def __call__(self, pictures):
        return torch.stack([self.embedding(picture.tobytes()) for picture in pictures])

    def embedding(self, picture):
        generator = torch.Generator().manual_seed(zlib.crc32(picture))
        chance = torch.rand(NUM, generator=generator)
        style = self.styles.get(picture)
        return chance if style is None else torch.eye(NUM)[style]


def cut(held_out, num_frames, side):
    """Smaller clips, for speed."""
    contents, true_filter = (
        [clip[:num_frames, :side, :side] for clip in clips]
        for clips in (held_out.contents, held_out.true_filter)
    )
    return replace(held_out, contents=contents, true_filter=true_filter)


def learned(num):
    held_out = cut(draw_held_out(num, Judge()), 5, 128)
    for style, clips in enumerate(zip(held_out.references, held_out.true_filter, strict=True)):
        for clip in clips:
            held_out.judge.learn(clip, style)
    return held_out


@pytest.fixture(scope="module")
def held_out():
    return learned(NUM)


@pytest.fixture(scope="module")
def noise():
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (NUM, 5, 128, 128, 3), np.uint8))


@pytest.fixture(scope="module")
def scores(held_out, noise):
    pairs = zip(held_out.contents, held_out.references, strict=True)
    clips = {
        "true filter": held_out.true_filter,
        "unchanged": held_out.contents,
        "noise": noise,
        "reinhard": [reinhard(content, reference[0]) for content, reference in pairs],
    }
    return {name: measure(of_method, held_out) for name, of_method in clips.items()}


def quality(scores, held_out, method, clips):
    """The gates that need no more clips than one for each style."""
    styled, off, noise = scores[method], scores["unchanged"], scores["noise"]
    return {
        "nearer": gates.nearer_gate(styled, off, noise),
        "retrieval": gates.retrieval_gate(styled, off, noise),
        "reinhard": gates.reinhard_gate(styled, scores["reinhard"], off, noise),
        "content": gates.content_gate(styled, noise),
        "steadiness": gates.steadiness_gate(clips, held_out),
    }


def test_the_true_filter_passes_and_no_control_does(scores, held_out):
    found = quality(scores, held_out, "true filter", held_out.true_filter)
    # Some filters leave less of the content than the gate asks of the mean of all.
    assert found.pop("content").measured[0] > 0.7
    for name, gate in found.items():
        assert gate.passed and not gate.leaks, (name, gate)


def test_noise_fails_every_gate(scores, held_out, noise):
    for gate in quality(scores, held_out, "noise", noise).values():
        assert not gate.passed, gate


def test_no_style_fails_the_gates_of_style_only(scores, held_out):
    found = quality(scores, held_out, "unchanged", held_out.contents)
    passed = {name for name, gate in found.items() if gate.passed}
    assert "content" in passed
    assert passed.isdisjoint({"nearer", "retrieval", "reinhard"})


class FilterStudio(Studio):
    """Mixes the true filters by their weights, which stand for tokens: an ideal model."""

    def __init__(self, held_out):
        self.models: Any = None
        self.held_out, self.tokens = held_out, torch.eye(len(held_out))[:, None]
        rngs = [np.random.default_rng([SEED, index]) for index in range(len(held_out))]
        self.styles = [draw_style(rng, held_out=True) for rng in rngs]

    def make(self, styles, motion_scale=0.0, control_scale=1.0, same_noise=True):
        del control_scale, same_noise
        regions = [StyleRegion(styles)] if isinstance(styles, torch.Tensor) else styles
        results = []
        for index, content in enumerate(self.held_out.contents[: len(regions[0].tokens)]):
            clip = np.zeros(content.shape)
            for region in regions:
                mask = torch.ones(1, 2) if region.mask is None else region.mask
                wide = mask[:1].repeat_interleave(content.shape[2] // 2, dim=1).numpy()
                clip += wide[..., None] * self.mixed(content, region.tokens[index, 0])
            results.append(self.moved(clip.astype(np.uint8), motion_scale))
        return results

    def mixed(self, content, weights):
        pairs = zip(self.styles, weights.tolist(), strict=True)
        return sum(weight * style.apply(content) for style, weight in pairs if weight)

    def moved(self, clip, motion_scale):
        places = np.arange(len(clip)) * (1 - motion_scale) * 0.75
        return clip[places.round().astype(int)]


def test_an_ideal_model_passes_the_gates_of_mechanism(monkeypatch):
    def selected(models, pictures, mode):
        return studio.tokens.roll(0 if mode == "release" else -1, 0)

    studio = FilterStudio(cut(learned(NUM_FEW), 5, 128))
    monkeypatch.setattr(gates, "_selected_tokens", selected)
    results = studio.make(studio.tokens)
    found = [
        gates.motion_gate(studio),
        gates.selection_gate(studio),
        gates.blend_gate(studio, results),
        gates.mask_gate(studio, results),
    ]
    for gate in found:
        assert gate.passed and not gate.leaks, gate


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    return write_standin(tmp_path_factory.mktemp("tiny") / "tiny")


def test_random_weights_fail_every_gate_of_quality(standin):
    models = Models(tiny_files(standin), device="cpu", keep_loaded=True)
    encoder = load_image_encoder(standin / "image_encoder")
    few = cut(draw_held_out(3, clip_embedder(encoder)), 5, 64)
    made = []
    studio = Studio(models, few, replace(CONFIG, num_steps=1), made.append)
    clips = run_gates.all_clips(studio)
    scored = {name: measure(of_method, few) for name, of_method in clips.items()}
    found = list(run_gates.quality_gates(studio, clips, scored))
    assert len(found) == 9
    assert not [gate.name for gate in found if gate.passed]
    assert sum(made) == run_gates.num_clips(3)


def test_many_clips_at_once_are_what_stylize_gives(standin):
    models = Models(tiny_files(standin), device="cpu", dtype="float32", keep_loaded=True)
    few = learned(2)
    small = [clip[:5, :48, :64] for clip in few.contents]
    tokens = style_tokens(models, few.references, few.captions)
    config = replace(CONFIG, num_steps=3, motion_scale=0.5, seed=7)
    together = restyle(models, small, few.captions, [StyleRegion(tokens)], config)
    alone = replace(config, prompt=few.captions[1], seed=8)
    expected = stylize(models, Style(tokens[1:]), alone, frames=small[1]).frames
    assert np.abs(together[1].astype(int) - expected).max() <= 1
    assert np.abs(together[0].astype(int) - expected).mean() > 1


def test_vae_is_judged_by_its_kind(held_out):
    clips = torch.from_numpy(np.stack(held_out.true_filter)).permute(0, 4, 1, 2, 3) / 127.5 - 1
    blocks = video_to_blocks(clips).movedim(1, -1).flatten(0, 2)
    vae = PatchVAE()
    vae.set_linear(blocks.mean(0), torch.cov(blocks.T))
    gate = gates.vae_gate(vae, held_out)
    assert gate.bound == ">= 22"
    assert gate.measured[0] > gate.controls["untrained weights"][0] + 4
    assert not gate.leaks


def test_a_control_that_passes_is_told(standin):
    """Pictures of one colour for each family: even random weights tell these apart."""
    families = np.repeat(np.arange(11), 4)
    pictures = np.zeros((44, 2, 128, 128, 3), np.uint8)
    pictures[:] = (families * 23)[:, None, None, None, None]
    pictures[..., 1] = 255 - pictures[..., 1]
    pool = Pool(pictures, families, np.empty(0), np.empty(0))
    gate = gates.texture_gate(load_image_encoder(standin / "image_encoder"), (pool, pool))
    assert gate.passed
    assert gate.leaks == ["untrained weights"]
    assert "but so does: untrained weights" in run_gates.table_row(gate)


def test_report_says_what_was_missed(scores, held_out):
    found = list(quality(scores, held_out, "unchanged", held_out.contents).values())
    summary = {name: of_method.summary() for name, of_method in scores.items()}
    text = run_gates.to_markdown(found, summary, {"seed": 1})
    assert text.count("**NO**") == len([gate for gate in found if not gate.passed]) >= 3
    assert "| luma correlation to the content / to another content | 1 / " in text
    content = run_gates.to_json(found, summary, {"seed": 1})
    listed = json.loads(json.dumps(content))["gates"]
    assert [gate["passed"] for gate in listed] == [gate.passed for gate in found]


def test_time_and_memory_of_a_command(tmp_path):
    allocate = "x = bytearray(300_000_000); x[::4096] = b'1' * len(x[::4096])"
    seconds, memory, processor = gates.run_timed([sys.executable, "-c", allocate], tmp_path, 60)
    assert 0.3 < memory < 0.5
    assert 0 < processor < seconds + 1
    endless = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert 1 <= gates.run_timed(endless, tmp_path, 1)[0] < 20
    with pytest.raises(RuntimeError, match="ended with 3"):
        gates.run_timed([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, 60)


def test_command_line(standin, tmp_path, monkeypatch, capfd):
    (standin / "vae.safetensors").rename(tmp_path / "vae.safetensors")
    asked = ["evaluate", "--gates", "--out", str(tmp_path / "out")]
    assert main([*asked, "--weights", str(standin)]) == 2
    assert "judge" in capfd.readouterr().err
    assert run_gates.main(["--num", "2", "--out", str(tmp_path / "out")]) == 2
    assert "at least 3" in capfd.readouterr().err
    assert main(["evaluate", "--pairs", "x.csv", "--num", "4", "--out", str(tmp_path)]) == 2
    assert "--num" in capfd.readouterr().err
    monkeypatch.setattr(evaluate, "CLONE", tmp_path)
    assert main(asked) == 2
    assert "clone" in capfd.readouterr().err
