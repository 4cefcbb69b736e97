"""Modes of speed: against a plain loop, passes of each, what makes a step be computed, refusals."""

import itertools

import pytest
import torch

from bench import speed_modes
from stylemaster_core import (
    ConfigError,
    StyleRegion,
    combine_guidance,
    denoise,
    flow_match_sigmas,
    load_gray_tile_controlnet,
)
from stylemaster_core.data.demo_scene import demo_clip, demo_styles
from stylemaster_core.data.images import write_image
from stylemaster_core.data.videos import write_video
from stylemaster_core.models.gray_tile_controlnet import copy_from_transformer
from stylemaster_core.pipelines.stylize import StylizeConfig, check_config
from stylemaster_core.sampling import speed as speed_module
from stylemaster_core.sampling.denoise import Lead
from stylemaster_core.sampling.speed import GAPS, VelocityLine
from stylemaster_core.sampling.windows import WindowConfig
from tests.counting import Counting

STEPS, SHIFT = 12, 5.0
SCALES = 8.0, 3.0
LEVELS = flow_match_sigmas(STEPS, shift=SHIFT).double().tolist()


@pytest.fixture(scope="module")
def controlnet(tiny_weights):
    control = load_gray_tile_controlnet(copy_from_transformer(tiny_weights(2)), num_heads=2)
    for convolution in control.zero_convs:
        torch.nn.init.normal_(convolution.weight, std=0.1)
    return control


@pytest.fixture
def gap(monkeypatch):
    return lambda value: monkeypatch.setitem(speed_module.GAPS, "draft", value)


def options(inputs, controlnet=None, **changes):
    control = {"controlnet": controlnet, "control_latents": inputs.control_latents}
    return {
        "sigmas": flow_match_sigmas(STEPS, shift=SHIFT).double(),
        "text": inputs.text,
        "negative_text": inputs.negative,
        "style": inputs.tokens,
        "text_scale": SCALES[0],
        "style_scale": SCALES[1],
        "speed": "draft",
        **(control if controlnet else {}),
        **changes,
    }


def plain_loop(net, controlnet, inputs, computed=range(STEPS)):
    """Three plain passes in steps that are computed; in others the line is put in by hand."""
    latents, zero = inputs.latents, torch.zeros_like(inputs.tokens)
    known = []
    for step, (level, following) in enumerate(itertools.pairwise(LEVELS)):
        timestep = torch.tensor([level * 1000])
        if step in computed:
            states = controlnet(inputs.control_latents, timestep, inputs.text)
            texts = (inputs.negative, zero), (inputs.text, zero), (inputs.text, inputs.tokens)
            passes = (net(latents, timestep, x, style=y, control=states) for x, y in texts)
            velocity = combine_guidance(*passes, text_scale=SCALES[0], style_scale=SCALES[1])
            known.append((level, velocity))
        elif len(known) > 1:
            (first, earlier), (last, later) = known[-2:]
            velocity = later + (later - earlier) / (last - first) * (level - last)
        else:
            velocity = known[0][1]
        latents = latents + (following - level) * velocity
    return latents


# By hand: levels are 1, .982, .962, .938, .909, .875, .833, .781, .714, .625, .5, .3125.
@pytest.mark.parametrize(
    ("width", "computed"), [(0.1, {0, 5, 8, 10, 11}), (0.15, {0, 6, 9, 11}), (0.2, {0, 7, 10})]
)
@pytest.mark.parametrize("batched", [False, True])
def test_against_a_plain_loop(
    tiny_transformer, tiny_inputs, controlnet, gap, width, computed, batched
):
    gap(width)
    net, inputs = tiny_transformer(2), tiny_inputs()
    ours = denoise(net, inputs.latents, **options(inputs, controlnet, batch_branches=batched))
    plain = plain_loop(net, controlnet, inputs, computed)
    assert (ours - plain).norm() <= 1e-6 * plain.norm()
    assert (plain - plain_loop(net, controlnet, inputs)).norm() > 1e-4 * plain.norm()


def test_passes_of_each_mode(tiny_transformer, tiny_inputs, controlnet):
    """The control network runs in the same steps as the transformer's three branches."""
    inputs, calls, counts = tiny_inputs(), [], {}
    hook = controlnet.register_forward_hook(lambda *_: calls.append(1))
    for name in GAPS:
        net = Counting(tiny_transformer(1))
        calls.clear()
        denoise(net, inputs.latents, **options(inputs, controlnet, speed=name))
        counts[name] = len(calls)
        assert net.branches == [3] * len(calls)
    hook.remove()
    assert counts == {"exact": 12, "balanced": 5, "fast": 4, "draft": 3}


def test_a_mode_means_the_same_at_more_steps(tiny_transformer, tiny_inputs, gap):
    gap(0.1)
    inputs, counts = tiny_inputs(), []
    for steps in (25, 50, 100):
        net = Counting(tiny_transformer(1))
        sigmas = flow_match_sigmas(steps, shift=SHIFT).double()
        denoise(net, inputs.latents, **options(inputs, sigmas=sigmas))
        counts.append(len(net.branches))
        assert all(a - b >= 0.0999 for a, b in itertools.pairwise(net.levels))
    assert min(counts) >= 8 and max(counts) <= 10


def test_levels_exactly_a_gap_apart_are_computed(tiny_transformer, tiny_inputs, gap):
    gap(0.1)
    net, inputs = Counting(tiny_transformer(1)), tiny_inputs()
    sigmas = flow_match_sigmas(10, shift=1.0)
    denoise(net, inputs.latents, **options(inputs, sigmas=sigmas))
    assert len(net.branches) == 10


def test_where_a_style_or_the_control_begins_or_ends_a_step_is_computed(
    tiny_transformer, tiny_inputs, controlnet, gap
):
    gap(0.9)
    net, inputs = Counting(tiny_transformer(1)), tiny_inputs()
    style = [StyleRegion(inputs.tokens, start=0.25, end=0.5)]
    denoise(
        net,
        inputs.latents,
        **options(inputs, controlnet, style=style, control_range=(0.0, 0.75)),
    )
    at = [1.0, LEVELS[3], LEVELS[7], LEVELS[10]]
    assert net.levels == [round(level, 4) for level in at] and net.branches == [2, 3, 2, 2]


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm++"])
def test_samplers_windows_and_a_film(tiny_transformer, tiny_inputs, gap, sampler):
    """Two windows of halves that are alike give what one gives alone, with every sampler."""
    gap(0.15)
    net, one = tiny_transformer(1), tiny_inputs()
    alone = denoise(net, one.latents, **options(one, sampler=sampler))
    exact = denoise(net, one.latents, **options(one, sampler=sampler, speed="exact"))
    two = torch.cat([one.latents, one.latents], dim=2)
    both = denoise(net, two, **options(one, sampler=sampler, windows=WindowConfig(3, 0)))
    torch.testing.assert_close(both, torch.cat([alone, alone], dim=2))
    assert torch.isfinite(alone).all() and not torch.allclose(alone, exact)
    lead = Lead(one.control_latents[:, :, :1], one.latents[:, :, :1])
    film = denoise(net, one.latents, **options(one, sampler=sampler, lead=lead))
    assert torch.equal(film[:, :, :1], lead.clean)


def test_velocities_are_kept_only_with_a_gap():
    exact, line = VelocityLine(0.0), VelocityLine(0.2)
    assert exact.at(1.0) is None
    assert exact.keep(1.0, torch.tensor(3.0)) == 3 and not exact.known
    assert line.at(1.0) is None
    line.keep(1.0, torch.tensor(3.0))
    assert line.at(0.9) == 3 and line.at(0.8) is None
    line.keep(0.8, torch.tensor(4.0))
    value = line.at(0.7)
    assert value is not None and value.item() == pytest.approx(4.5)
    assert line.at(0.7, "other styles") is None and not line.known


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speed": "quick"}, "'quick' is unknown; use one of"),
        ({"speed": "fast", "num_steps": 4}, "4 steps lie too far apart.*'exact', or at least 8"),
    ],
)
def test_refusals(tiny_transformer, tiny_inputs, changes, words):
    with pytest.raises(ConfigError, match=words):
        check_config(StylizeConfig("text-to-video", **changes), None)
    inputs = tiny_inputs()
    sigmas = flow_match_sigmas(changes.get("num_steps", STEPS), shift=SHIFT)
    with pytest.raises(ConfigError, match=words):
        denoise(
            tiny_transformer(1),
            inputs.latents,
            **options(inputs, sigmas=sigmas, speed=changes["speed"]),
        )


def test_bench_prints_every_mode(tmp_path, capsys, monkeypatch):
    clip, style = tmp_path / "clip.mp4", tmp_path / "style.png"
    write_video(clip, demo_clip(1, 32, 48), fps=8)
    write_image(style, demo_styles(64)["neon"])
    docs = tmp_path / "speed.md"
    docs.write_text(f"before\n{speed_modes.BEGIN}\nold\n{speed_modes.END}\nafter\n")
    monkeypatch.setattr(speed_modes, "DOCS", docs)
    words = ["--video", str(clip), "--style", str(style), "--write"]
    assert speed_modes.main(words) == 0
    said = capsys.readouterr().out
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| clip.mp4")]
    assert [row[1] for row in rows] == list(GAPS)
    assert [row[2] for row in rows] == ["24 + 12", "10 + 5", "8 + 4", "6 + 3"]
    assert rows[0][5] == "" and all(float(row[5].split()[0]) > 10 for row in rows[1:])
    text = docs.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert speed_modes.main(words[:2]) == 2
    assert "--video and --style belong together" in capsys.readouterr().err
