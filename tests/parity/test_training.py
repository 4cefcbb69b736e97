"""Training numbers of the released code."""

import torch

from stylemaster_core import load_gray_tile_controlnet, load_style_projector, load_transformer
from stylemaster_core.models.gray_tile_controlnet import copy_from_transformer
from stylemaster_core.sampling.schedules import add_noise
from stylemaster_core.training.losses import flow_match_loss, training_schedule


def test_schedule(golden):
    case, schedule = golden("06_training"), training_schedule(shift=5.0)
    torch.testing.assert_close(schedule.sigmas, case["train.sigmas"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(schedule.timesteps, case["train.timesteps"], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(schedule.weights, case["train.weights"], atol=1e-5, rtol=1e-5)
    assert schedule.weights[0] == 0 and schedule.weights.argmax() == 833


def loss_at(case, schedule, index, velocity_of):
    noisy = add_noise(case["in.latents"], case["in.noise"], schedule.sigmas[index])
    if f"out.id{index}.noisy_latents" in case.tensors:
        torch.testing.assert_close(
            noisy, case[f"out.id{index}.noisy_latents"], atol=1e-6, rtol=1e-5
        )
    velocity = velocity_of(noisy, schedule.timesteps[index : index + 1])
    weight = schedule.weights[index : index + 1]
    return flow_match_loss(velocity, case["in.latents"], case["in.noise"], weight)


def test_style_losses_and_gradients(golden):
    case, schedule = golden("06_training"), training_schedule(shift=5.0)
    weights = golden("weights_dit_a")
    net = load_transformer(weights.tensors)
    projector = load_style_projector(weights.group("style_model."), num_heads=4)
    net.style_attention.requires_grad_(True)
    projector.requires_grad_(True)
    text = case["in.context"][0]
    torch.testing.assert_close(
        case["in.noise"] - case["in.latents"], case["out.training_target"], atol=0, rtol=0
    )

    def velocity(noisy, timestep):
        tokens = projector(case["in.last_hidden_state"], case["in.image_embeds_ps"], text).tokens
        return net(noisy, timestep, text, style=tokens)

    for recorded in case.meta["style_mode"]:
        loss = loss_at(case, schedule, recorded["timestep_id"], velocity)
        assert abs(loss.item() - recorded["weighted_loss"]) <= 1e-5 * recorded["weighted_loss"]
        if "grad_norms" not in recorded:
            continue
        loss.backward()
        named = {name: p.grad for name, p in net.style_attention.named_parameters()}
        parameters = dict(projector.named_parameters())
        release = projector.release_state_dict()
        by_pointer = {p.data_ptr(): p.grad for p in parameters.values()}
        named |= {f"style_model.{k}": by_pointer[v.data_ptr()] for k, v in release.items()}
        for key, norm in recorded["grad_norms"].items():
            assert abs(named[key].norm().item() - norm) <= 1e-4 * norm, key
        for key, gradient in named.items():
            if f"out.grad.{key}" in case.tensors:
                case.check(f"out.grad.{key}", gradient)
        total = torch.stack([g.norm() for g in named.values()]).norm().item()
        assert abs(total - recorded["total_grad_norm"]) <= 1e-4 * total


def test_control_loss_and_gradients(golden):
    case, schedule = golden("06_training"), training_schedule(shift=5.0)
    recorded = case.meta["controlnet_mode"]
    weights = golden("weights_dit_a").tensors
    zero_convs = golden("03_controlnet_a").group("weights.")
    net = load_transformer(weights)
    control = load_gray_tile_controlnet(copy_from_transformer(weights) | zero_convs)
    projector = load_style_projector(golden("weights_dit_a").group("style_model."), num_heads=4)
    control.requires_grad_(True)
    text = case["in.context"][0]
    tokens = projector(case["in.last_hidden_state"], case["in.image_embeds_ps"], text).tokens

    def velocity(noisy, timestep):
        states = control(case["in.control_latents"], timestep, text)
        return net(noisy, timestep, text, style=tokens, control=states)

    loss = loss_at(case, schedule, recorded["timestep_id"], velocity)
    assert abs(loss.item() - recorded["weighted_loss"]) <= 1e-5 * recorded["weighted_loss"]
    loss.backward()
    gradients = {name: p.grad for name, p in control.named_parameters()}
    for key, norm in recorded["grad_norms"].items():
        prefix, *rest = key.split(".", 2)
        if prefix == "control_blocks":
            key = f"{prefix}.{rest[0]}.{control.host.block_key(rest[1])}"
        assert abs(gradients[key].norm().item() - norm) <= 1e-4 * norm, key
    assert not any(p.requires_grad for p in net.parameters())
