"""StyleCrafter on VideoCrafter against the released code: the UNet with adapter, and sampling."""

from pathlib import Path

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from einops import rearrange
from safetensors.torch import load_file

import stylemaster_core.models.decoupled_attention as decoupled_attention
import stylemaster_core.sampling.denoise_video as denoise_module
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.sdxl_unet import StyledUNet, check_unet, cross_attentions
from stylemaster_core.models.stylecrafter_sdxl import layer_styles, load_stylecrafter_video
from stylemaster_core.models.temporal_transformer import RelativePositions, TemporalTransformer
from stylemaster_core.models.videocrafter_unet import load_videocrafter_unet
from stylemaster_core.sampling.denoise_video import denoise_video
from stylemaster_core.sampling.guidance import GuidanceWeights

GOLDEN = Path(__file__).parents[1] / "golden" / "stylecrafter"
HEADS = {"style_num_heads": "4", "scale_num_heads": "4"}
UNET_TOLERANCE = 3e-6  # shares of the largest value
SAMPLING_TOLERANCE = 1e-5


def under(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def rows(video):
    return rearrange(video, "b c t h w -> (b t) c h w")


def error(value, reference):
    assert value.shape == reference.shape, (value.shape, reference.shape)
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "v5_unet.safetensors")


@pytest.fixture
def unet(golden):
    return load_videocrafter_unet(under(golden, "unet."))


@pytest.fixture(scope="module")
def adapter(golden):
    return load_stylecrafter_video(under(golden, "adapter."), HEADS)


def style_of(golden, adapter, *, gains=True):
    tokens = adapter.encoder(golden["clip_features"])
    predicted = adapter.gains(golden["context"], tokens) if gains else None
    return StyleRegion(tokens, gains=predicted), adapter.keys_values(tokens)


@torch.no_grad()
def predict(golden, unet, style=None, num_frames=4):
    layers = None
    if style is not None:
        region, keys_values = style
        layers = [
            layer.of_rows([0] * num_frames)
            for layer in layer_styles([region], [keys_values], golden["x"])
        ]
    with StyledUNet(unet) as host:
        host.set(layers, {})
        text = golden["context"].repeat(num_frames, 1, 1)
        return unet(rows(golden["x"])[:num_frames], golden["t"], text, num_frames)


def test_a_video(golden, unet):
    assert error(predict(golden, unet), rows(golden["eps_text"])) <= UNET_TOLERANCE


@pytest.mark.parametrize(("key", "num_frames"), [("eps_text_style", 4), ("eps_image_mode", 1)])
def test_a_video_and_a_picture_in_a_style(golden, unet, adapter, key, num_frames):
    check_unet(unet, adapter)
    value = predict(golden, unet, style_of(golden, adapter), num_frames)
    assert error(value, rows(golden[key])) <= UNET_TOLERANCE
    assert error(predict(golden, unet, None, num_frames), rows(golden[key])) > 1e-2


def test_videos_of_one_batch_do_not_mix(golden, unet):
    video, text = rows(golden["x"]), golden["context"].repeat(4, 1, 1)
    with torch.no_grad():
        other = unet(video.flip(-1), golden["t"], text, 4)
        both = unet(torch.cat([video, video.flip(-1)]), golden["t"], text.repeat(2, 1, 1), 4)
    assert error(both, torch.cat([rows(golden["eps_text"]), other])) <= UNET_TOLERANCE


def test_tokens_and_scales(golden, adapter):
    region, _ = style_of(golden, adapter)
    assert error(region.tokens, golden["style_tokens"]) <= UNET_TOLERANCE
    released = golden["scale_scalar"].squeeze(-1)[:, [0, 2, 3, 1]]  # in, out, out, middle
    assert error(region.gains - 1, released) <= UNET_TOLERANCE


def test_the_adapter_goes_back_to_its_release(golden, adapter):
    released, back = under(golden, "adapter."), adapter.release_state_dict()
    assert set(back) == set(released)
    assert all(torch.equal(back[key], value) for key, value in released.items())


def test_layers_stand_where_the_adapter_counts_them(unet, adapter):
    names = {name: unet.get_submodule(name) for name in cross_attentions(unet)}
    places = [name.split(".")[0] for name in names]
    assert places == ["down_blocks", "up_blocks", "up_blocks", "mid_block"]
    assert [layer.to_q.out_features for layer in names.values()] == adapter.layer_widths


# ---- mistakes that must be seen ----


def no_scale_on_logits(unet, monkeypatch):
    real = decoupled_attention.attend

    def unscaled(query, keys, values, num_heads):
        return real(query * (query.shape[-1] // num_heads) ** 0.5, keys, values, num_heads)

    monkeypatch.setattr(decoupled_attention, "attend", unscaled)


def norm_per_frame(unet, monkeypatch):
    for module in temporal_of(unet):
        norm = module.norm.forward
        module.norm.forward = lambda x, norm=norm: rearrange(
            norm(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=x.shape[2]
        )


def positions_off_by_one(unet, monkeypatch):
    real = RelativePositions.forward

    def shifted(self, num_frames, like):
        return real(self, num_frames + 1, like)[:-1, 1:]

    monkeypatch.setattr(RelativePositions, "forward", shifted)


def positions_reversed(unet, monkeypatch):
    real = RelativePositions.forward
    monkeypatch.setattr(RelativePositions, "forward", lambda *a: real(*a).transpose(0, 1))


def temporal_after_upsampling(unet, monkeypatch):
    block = unet.up_blocks[0]
    temporal = block.attentions[-1].temporal
    monkeypatch.setattr(block.attentions[-1], "forward", without_temporal(block.attentions[-1]))
    block.register_forward_hook(lambda module, args, output: temporal(output, 4))


def without_temporal(attention):
    def forward(x, *, cross_attention_kwargs=None, **options):
        parent = super(type(attention), attention).forward
        return parent(x, cross_attention_kwargs={}, **options)

    return forward


def no_init_attn(unet, monkeypatch):
    monkeypatch.setattr(unet.init_attn[0], "forward", lambda x, num_frames: x)


def temporal_of(unet):
    return [module for module in unet.modules() if isinstance(module, TemporalTransformer)]


@pytest.mark.parametrize(
    "mistake",
    [
        no_scale_on_logits,
        norm_per_frame,
        positions_off_by_one,
        positions_reversed,
        temporal_after_upsampling,
        no_init_attn,
    ],
)
def test_mistakes_in_the_unet_are_seen(golden, unet, adapter, mistake, monkeypatch):
    mistake(unet, monkeypatch)
    value = predict(golden, unet, style_of(golden, adapter))
    assert error(value, rows(golden["eps_text_style"])) > 1e-4


def test_a_scale_left_out_is_seen(golden, unet, adapter):
    value = predict(golden, unet, style_of(golden, adapter, gains=False))
    assert error(value, rows(golden["eps_text_style"])) > 1e-3


def test_frames_further_apart_than_the_table_share_its_ends():
    positions = RelativePositions(2, 3)
    torch.nn.init.normal_(positions.embeddings_table)
    made = positions(5, torch.zeros(1))
    for frame in range(5):
        for other in range(5):
            clipped = min(max(other - frame, -2), 2)
            assert torch.equal(made[frame, other], positions.embeddings_table[clipped + 2])
    # Unclipped, the farthest would be read from the other end of the table.
    assert not torch.equal(made[0, 4], positions.embeddings_table[(4 + 2) % 5])


# ---- v6: whole sampling ----

SCALES = {"text_scale": 15.0, "style_scale": 7.5}
NUM_STEPS = 4


@pytest.fixture(scope="module")
def ddim():
    return load_file(GOLDEN / "v6_guidance_ddim.safetensors")


def schedule(num_steps):
    """Times, and alphas of them and of where each step ends, from the last step to the first."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    times = torch.arange(0, 1000, 1000 // num_steps)[:num_steps] + 1
    return times, alphas[times].float(), alphas[torch.cat([torch.tensor([0]), times[:-1]])].float()


def test_the_schedule_is_the_recorded_one(ddim):
    times, alphas, before = schedule(50)
    assert torch.equal(times, ddim["ddim_timesteps"])
    assert error(alphas, ddim["ddim_alphas"]) <= 1e-6
    assert error(before, ddim["ddim_alphas_prev"]) <= 1e-6
    sigmas = ((1 - before) / (1 - alphas) * (1 - alphas / before)).sqrt()
    assert error(sigmas, ddim["ddim_sigmas"]) <= 1e-4
    scheduler = denoise_module.create_ddim()
    scheduler.set_timesteps(50)
    assert torch.equal(scheduler.timesteps.flip(0), times)


def sampled(golden, unet, adapter, eta):
    region, keys_values = style_of(golden, adapter)
    seen = []
    latents = denoise_video(
        unet,
        rows(golden["x"]),
        num_steps=NUM_STEPS,
        text=golden["context"],
        negative_text=golden["context"].flip(1),
        regions=[region],
        keys_values=[keys_values],
        eta=eta,
        generator=torch.Generator().manual_seed(5),
        callback=lambda step, denoised: seen.append(denoised),
        **SCALES,
    )
    assert len(seen) == NUM_STEPS
    return latents


def reference(golden, unet, adapter, eta):
    """The released code's loop; the UNet is this one's."""
    noise = torch.Generator().manual_seed(5)
    style = style_of(golden, adapter)
    x = rows(golden["x"])
    for time, alpha, before in reversed(list(zip(*schedule(NUM_STEPS), strict=True))):
        step = {**golden, "x": rearrange(x, "t c h w -> 1 c t h w"), "t": time}
        styled, text = predict(step, unet, style), predict(step, unet)
        negative = predict({**step, "context": golden["context"].flip(1)}, unet)
        eps = styled + 7.5 * (styled - text) + 15.0 * (text - negative)
        sigma = eta * ((1 - before) / (1 - alpha) * (1 - alpha / before)).sqrt()
        clean = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        x = before.sqrt() * clean + (1 - before - sigma**2).sqrt() * eps
        if eta:
            x = x + sigma * torch.randn(x.shape, generator=noise)
    return x


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_whole_sampling(golden, unet, adapter, eta, monkeypatch):
    value, expected = (make(golden, unet, adapter, eta) for make in (sampled, reference))
    assert error(value, expected) <= SAMPLING_TOLERANCE
    if eta:
        ends_at_one = DDIMScheduler.from_config(
            denoise_module.create_ddim().config, set_alpha_to_one=True
        )
        monkeypatch.setattr(denoise_module, "create_ddim", lambda: ends_at_one)
        mistaken = sampled(golden, unet, adapter, eta)
        assert error(mistaken, expected) > 10 * SAMPLING_TOLERANCE


def test_another_base_of_the_guidance_is_seen(ddim):
    branches = [ddim[f"eps_{name}"] for name in ("uncond", "text", "text_style")]

    def total(weights):
        return sum(w * b for w, b in zip(weights, branches, strict=True))

    ours = total(GuidanceWeights.of_stylecrafter_video(15.0, 7.5))
    assert error(ours, ddim["expect.video_code"]) <= SAMPLING_TOLERANCE
    from_negative = total(GuidanceWeights.of_stylecrafter(15.0, 7.5))
    assert error(from_negative, ddim["expect.paper_eq2"]) <= SAMPLING_TOLERANCE
    assert error(from_negative, ddim["expect.video_code"]) > 1e-2
    assert GuidanceWeights.of_stylecrafter_video(1.0, 7.5) == (0.0, 0.0, 1.0)
    assert GuidanceWeights.of_stylecrafter_video(6.0, 0.0) == (-5.0, 0.0, 6.0)
