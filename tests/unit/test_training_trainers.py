"""Each trainer learns what it should, and an ablation of it does not."""

import dataclasses

import pytest
import torch

from stylemaster_core.models.small import draw_weights
from stylemaster_core.sampling.denoise import denoise
from stylemaster_core.sampling.schedules import flow_match_sigmas
from stylemaster_core.training.base_model import create_base_trainer, new_base_weights
from stylemaster_core.training.config import (
    BaseConfig,
    ControlConfig,
    FlowConfig,
    MotionConfig,
    OptimizerConfig,
    ProjectionConfig,
    RunConfig,
    StyleConfig,
    TrainConfig,
)
from stylemaster_core.training.flow_matching import FlowDraws
from stylemaster_core.training.global_projection import (
    contrastive_losses,
    create_projection_trainer,
)
from stylemaster_core.training.gray_tile_controlnet import create_control_trainer
from stylemaster_core.training.loop import train
from stylemaster_core.training.losses import flow_match_loss, flow_match_losses
from stylemaster_core.training.motion_adapter import create_motion_trainer
from stylemaster_core.training.samples import MemoryDataset, generator_of
from stylemaster_core.training.stats import read_stats
from stylemaster_core.training.style_modulation import create_style_trainer
from stylemaster_core.training.synthetic import SyntheticWorld

WORLD = SyntheticWorld(size=(4, 4, 4))
BASE = BaseConfig(width=64, ffn_width=128, num_blocks=2, text_width=10)
FLOW = FlowConfig(text_length=5, timesteps="logit_normal", weighting="none", shift=2.0)
STYLE = StyleConfig(selection="all", global_tokens=2, num_layers=1, num_heads=2)
STEPS = 120


def config_of(trainer, steps=STEPS, lr=5e-3, batch_size=16, **sections):
    run = RunConfig(num_steps=steps, batch_size=batch_size, save_every=10_000,
                    validate_every=steps, validation_draws=4)  # fmt: skip
    optimizer = OptimizerConfig(lr=lr, warmup_steps=10, schedule="cosine")
    return TrainConfig(trainer, run, optimizer, **({"flow": FLOW, "style": STYLE} | sections))


def features():
    return {key: tuple(value.shape) for key, value in WORLD.sample("x").items()}


def shuffled(dataset, *keys):
    """The samples with some tensors taken from their neighbours."""
    samples = list(dataset.samples)
    moved = [
        sample | {key: samples[i - 1][key] for key in keys} for i, sample in enumerate(samples)
    ]
    return MemoryDataset(moved, ids=dataset.ids)


def held_out(trainer, folder, data, validation, key="validation_loss"):
    """The number of held-out samples before and after training."""
    train(trainer, data, folder, validation=validation)
    lines = [line for line in read_stats(folder) if key in line]
    return lines[0][key], lines[-1][key]


def clips(count, name="train", **options):
    """Clips of no style."""
    return WORLD.dataset(count, name, style=False, **options)


def base_trainer(steps):
    flow = dataclasses.replace(FLOW, drop_text=0.0)
    config = config_of("base", steps=steps, base=BASE, flow=flow)
    return create_base_trainer(config, num_heads=2, null_text=WORLD.null_text)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base that knows texts and motion, and no style."""
    trainer = base_trainer(500)
    before, after = held_out(
        trainer, tmp_path_factory.mktemp("base"), clips(512), clips(24, "held out")
    )
    report("base, 500 steps", before, after)
    assert after < 0.4 * before
    return trainer.outputs()[0].tensors


def test_base(tmp_path):
    data, validation = clips(256), clips(24, "held out")
    before, after = held_out(base_trainer(STEPS), tmp_path / "base", data, validation)
    ablated = shuffled(data, "text")
    _, other = held_out(base_trainer(STEPS), tmp_path / "other", ablated, validation)
    report("base", before, after, text_of_another=other)
    assert after < 0.8 * before and after < 0.95 * other


def test_style(base, tmp_path):
    data, validation = WORLD.dataset(256), WORLD.dataset(24, "held out")

    def run(name, dataset, frozen=False):
        config = config_of("style", lr=1e-2)
        trainer = create_style_trainer(
            config, base, features(), num_heads=2, null_text=WORLD.null_text
        )
        if frozen:
            # Only the biases of v_img learn: a constant shift, the same for every style.
            for key, parameter in trainer.named_parameters():
                parameter.requires_grad_(key.endswith("v_img.bias"))
        return held_out(trainer, tmp_path / name, dataset, validation)

    before, after = run("style", data)
    keys = ("patch_features", "image_embeds", "shuffled_embeds")
    _, other = run("other", shuffled(data, *keys))
    _, constant = run("constant", data, frozen=True)
    report("style", before, after, style_of_another=other, constant=constant)
    assert after < 0.85 * before and after < 0.9 * min(other, constant)


def test_control(base, tmp_path):
    data, validation = clips(256), clips(24, "held out")

    def run(name, dataset, frozen=False):
        # What is frozen at 0 adds nothing after 3 steps or after all of them.
        steps = 3 if frozen else STEPS
        config = config_of("control", steps, control=ControlConfig(drop_control=0.1))
        trainer = create_control_trainer(
            config, base, features(), num_heads=2, null_text=WORLD.null_text
        )
        if frozen:
            trainer.controlnet.zero_convs.requires_grad_(False)
        return held_out(trainer, tmp_path / name, dataset, validation)

    before, after = run("control", data)
    _, other = run("other", shuffled(data, "control_latents"))
    _, frozen = run("frozen", data, frozen=True)
    report("control", before, after, control_of_another=other, zero_convs_frozen=frozen)
    assert frozen == pytest.approx(before, rel=1e-6)
    assert after < 0.85 * before and after < 0.9 * other


def test_motion(base, tmp_path):
    validation = clips(24, "held out", still=True)

    def run(name, still):
        flow = dataclasses.replace(FLOW, drop_text=0.0)
        config = config_of("motion", 150, lr=1e-2, motion=MotionConfig(rank=8), flow=flow)
        trainer = create_motion_trainer(config, base, num_heads=2, null_text=WORLD.null_text)
        data = clips(256, still=still)
        return trainer, held_out(trainer, tmp_path / name, data, validation)

    trainer, (before, after) = run("still", True)
    _, (_, moving) = run("moving", False)
    changes = [frame_difference(trainer, scale) for scale in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    report("motion", before, after, moving_clips=moving, frame_differences=changes)
    assert after < 0.98 * before and after < 0.985 * moving
    assert changes == sorted(changes, reverse=True), "more scale, less motion"
    assert changes[-1] < 0.95 * changes[2] and changes[0] > 1.03 * changes[2]


def frame_difference(trainer, scale):
    """Mean absolute difference of successive frames of generated latents."""
    trainer.adapter.scale = scale
    text = torch.stack([WORLD.texts[i % len(WORLD.texts)] for i in range(24)])
    noise = torch.randn(24, 16, *WORLD.size, generator=generator_of("frame difference"))
    latents = denoise(
        trainer.transformer, noise, sigmas=flow_match_sigmas(10, shift=FLOW.shift), text=text,
        negative_text=None, style=None, text_scale=1.0, style_scale=0.0,
    )  # fmt: skip
    trainer.adapter.scale = 1.0
    return round((latents[:, :, 1:] - latents[:, :, :-1]).abs().mean().item(), 4)


@pytest.mark.parametrize("loss", ["triplet", "infonce"])
def test_global_projection(tmp_path, loss):
    world = SyntheticWorld(embed_width=32)
    data, validation = world.pairs(512), world.pairs(64, "held out")

    def run(name, dataset):
        projection = ProjectionConfig(loss=loss, num_negatives=8, hidden_width=64)
        config = config_of("global-projection", steps=150, lr=3e-3, projection=projection)
        widths = {key: tuple(value.shape) for key, value in data[0].items()}
        trainer = create_projection_trainer(config, widths)
        folder = tmp_path / name
        losses = held_out(trainer, folder, dataset, validation)
        lines = [x["retrieval_at_1"] for x in read_stats(folder) if "retrieval_at_1" in x]
        return losses, (lines[0], lines[-1])

    (before, after), (found_before, found_after) = run("pairs", data)
    (_, other), (_, found_other) = run("other", shuffled(data, "second_embeds"))
    report(f"projection {loss}", before, after, pair_of_another=other,
           retrieval=(found_before, found_after, found_other))  # fmt: skip
    assert after < 0.8 * before and after < 0.8 * other
    assert found_after > found_before + 0.2 and found_after > found_other + 0.2


def report(name, before, after, **ablations):
    others = ", ".join(f"{key} {value}" for key, value in ablations.items())
    print(f"\n{name}: {before:.4f} -> {after:.4f}; {others}")


# ---- the release's faults ----


def test_nothing_in_the_style_branch_is_stuck(tmp_path):
    weights = new_base_weights(BASE, 0)
    head = weights["head.head.weight"]
    weights["head.head.weight"] = draw_weights({"head.head.weight": tuple(head.shape)}, 0)[
        "head.head.weight"
    ].float()
    config = config_of("style", steps=20, batch_size=4)
    trainer = create_style_trainer(
        config, weights, features(), num_heads=2, null_text=WORLD.null_text
    )
    attention = trainer.transformer.style_attention
    before = {name: p.detach().clone() for name, p in trainer.trained().items()}
    for module in attention.modules():
        if hasattr(module, "k_img"):
            assert module.norm_k_img.weight.eq(1).all() and module.k_img.weight.std() > 0
            assert module.v_img.weight.eq(0).all() and module.v_img.bias.eq(0).all()
    train(trainer, WORLD.dataset(32), tmp_path, validation=WORLD.dataset(2))
    # A key's bias shifts all scores of a query alike only without the norm; here all must move.
    still = [name for name, p in trainer.trained().items() if torch.equal(p, before[name])]
    assert still == []
    moved = {}
    for part in ("k_img.weight", "v_img.weight", "norm_k_img.weight"):
        for name, p in trainer.trained().items():
            if name.endswith(f"cross_attn.{part}"):
                moved[name] = (p - before[name]).abs().max().item()
    assert len(moved) == 3 * BASE.num_blocks and min(moved.values()) > 1e-3, moved


def test_a_release_style_start_would_be_stuck(tmp_path):
    """The test above can fail: with all three at 0, k_img and norm_k_img never move."""
    trainer = create_style_trainer(
        config_of("style", steps=5, batch_size=4), draw_base(), features(),
        num_heads=2, null_text=WORLD.null_text,
    )  # fmt: skip
    with torch.no_grad():
        for p in trainer.transformer.style_attention.parameters():
            p.zero_()
    train(trainer, WORLD.dataset(32), tmp_path, validation=WORLD.dataset(2))
    named = dict(trainer.transformer.style_attention.named_parameters())
    assert all(p.eq(0).all() for name, p in named.items() if "k_img" in name)
    assert not all(p.eq(0).all() for name, p in named.items() if "v_img" in name)


def draw_base():
    from stylemaster_core.weights.shapes import WanSizes, expected_base_shapes

    sizes = WanSizes(width=32, ffn_width=64, num_blocks=2, text_width=10, freq_width=16)
    return {k: v.float() for k, v in draw_weights(expected_base_shapes(sizes), 0).items()}


def test_dropout_rates_and_what_dropping_does():
    style = dataclasses.replace(STYLE, drop_style=0.2, drop_both=0.15)
    flow = dataclasses.replace(FLOW, drop_text=0.25)
    config = config_of("style", style=style, flow=flow)
    draws = FlowDraws(config, ("latents", "text"), drop_style=True)
    data = WORLD.dataset(1)
    flags = [draws(data, 0, generator_of("drop", i), None) for i in range(2000)]
    text = torch.stack([f["drop_text"] for f in flags])
    gone = torch.stack([f["drop_style"] for f in flags])
    for rate, found in ((0.25, text & ~gone), (0.2, gone & ~text), (0.15, text & gone)):
        assert found.float().mean().item() == pytest.approx(rate, abs=0.03)
    validation = [draws(data, 0, generator_of(i), 0.5) for i in range(50)]
    assert not any(f["drop_text"] or f["drop_style"] for f in validation)
    motion = FlowDraws(config, ("latents", "text"), drop_style=False)
    assert not any(motion(data, 0, generator_of(i), None)["drop_style"] for i in range(100))


def test_the_same_noise_in_every_frame_changes_no_other_draw():
    data = WORLD.dataset(1)
    frames = data[0]["latents"].shape[1]
    assert frames > 1

    def draw(share, position=None):
        config = config_of("style", flow=dataclasses.replace(FLOW, same_noise=share))
        draws = FlowDraws(config, ("latents", "text"), drop_style=True)
        return [draws(data, 0, generator_of("same", i), position) for i in range(400)]

    plain, half = draw(0.0), draw(0.5)
    same = [bool((s["noise"] == s["noise"][:, :1]).all()) for s in half]
    assert sum(same) / len(same) == pytest.approx(0.5, abs=0.07)
    for one, other, repeated in zip(plain, half, same, strict=True):
        assert torch.equal(one["noise"][:, 0], other["noise"][:, 0])
        assert torch.equal(one["noise"], other["noise"]) != repeated
        assert all(torch.equal(one[key], other[key]) for key in one if key != "noise")
    validation = zip(draw(0.0, 0.5), draw(1.0, 0.5), strict=True)
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in validation)


def test_dropped_conditions_are_the_null_branches_of_guidance():
    config = config_of("style")
    trainer = create_style_trainer(
        config, draw_base(), features(), num_heads=2, null_text=WORLD.null_text
    )
    net = trainer.transformer
    with torch.no_grad():
        for p in net.style_attention.parameters():
            p.add_(0.1)
    data = WORLD.dataset(4)
    drawn = [trainer.draws(data, i, generator_of(i), 0.1 + 0.2 * i) for i in range(4)]
    for i, sample in enumerate(drawn):
        sample["drop_text"] = torch.tensor(i in (1, 3))
        sample["drop_style"] = torch.tensor(i in (2, 3))
    batch = {key: torch.stack([s[key] for s in drawn]) for key in drawn[0]}
    losses = trainer(batch)
    null = torch.zeros(1, 5, 10)
    null[:, :1] = WORLD.null_text
    for i, sample in enumerate(drawn):
        level = sample["level"]
        noisy = torch.lerp(sample["latents"], sample["noise"], trainer.sigmas[level])[None]
        text = null if i in (1, 3) else sample["text"][None]
        tokens = trainer.projector(
            sample["patch_features"][None], sample["shuffled_embeds"][None], selection="all"
        ).tokens
        tokens = tokens * 0 if i in (2, 3) else tokens
        velocity = net(noisy, trainer.timesteps[level][None], text, style=tokens)
        loss = (velocity - (sample["noise"] - sample["latents"])[None]).square().mean()
        torch.testing.assert_close(losses[i], loss, rtol=1e-4, atol=1e-5)


def test_losses_per_sample_average_to_the_release_loss():
    draw = generator_of("loss")
    velocity, clean, noise = torch.randn(3, 4, 16, 2, 4, 4, generator=draw)
    weight = torch.rand(4, generator=draw)
    each = flow_match_losses(velocity, clean, noise, weight)
    torch.testing.assert_close(each.mean(), flow_match_loss(velocity, clean, noise, weight))
    alone = flow_match_loss(velocity[2:3], clean[2:3], noise[2:3], weight[2:3])
    torch.testing.assert_close(each[2], alone)


def test_contrastive_losses():
    config = ProjectionConfig(margin=0.5, mse_weight=2.0)
    same = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]])  # equal pair, other at 90 degrees
    assert contrastive_losses(same, config).item() == pytest.approx(0.0, abs=1e-3)
    apart = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    near, far = 2**0.5, (0.0, 2**0.5)
    triplet = sum(max(0, near - x + 0.5) for x in far) / 2
    assert contrastive_losses(apart, config).item() == pytest.approx(triplet + 2 * 2, abs=1e-3)
    infonce = ProjectionConfig(loss="infonce", temperature=0.5)
    expected = sum(torch.tensor([0.0, c]).div(0.5).log_softmax(0)[0] for c in (1.0, 0.0)) / -2
    torch.testing.assert_close(contrastive_losses(apart, infonce)[0], expected)


def test_negatives_are_never_of_the_same_group():
    data = SyntheticWorld().pairs(20)
    data.groups = ["a"] * 10 + ["b"] * 10
    from stylemaster_core.training.global_projection import PairDraws

    drawn = PairDraws(64)(data, 3, generator_of(0), None)["negatives"]
    own = torch.stack([data[i][k] for i in range(10) for k in ("first_embeds", "second_embeds")])
    assert torch.cdist(drawn, own).min() > 0
    data.groups = ["a"] * 20
    with pytest.raises(ValueError, match="pairs of several styles"):
        PairDraws(1)(data, 3, generator_of(0), None)
