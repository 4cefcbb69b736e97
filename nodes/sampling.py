"""Guidance by text and style: a GUIDER for stock samplers, and one node with all in it."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
from comfy_api.latest import io

from ..stylemaster_core.sampling.schedules import same_in_every_frame
from .conditionings import Conditioning
from .guider import Schedule, StyleGuider
from .layouts import Latent, latent_video_size
from .number_lists import guidance_schedule
from .paths import check_choice
from .sockets import schema


def create_guider(
    model: Any,
    styled: Conditioning,
    positive: Conditioning,
    negative: Conditioning,
    text: Schedule,
    style: Schedule,
) -> StyleGuider:
    """A GUIDER over the three branches."""
    guider = StyleGuider(model)
    guider.set_conds(styled, positive, negative)
    guider.set_cfg(text, style)
    return guider


def with_shift(model: Any, shift: float) -> Any:
    """A clone of a MODEL with a shifted schedule, as the stock ModelSamplingSD3 makes it."""

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    sampling = Sampling(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone


def sample(
    guider: StyleGuider,
    latent: Latent,
    *,
    seed: int,
    steps: int,
    sampler: str,
    scheduler: str,
    denoise: float,
    same_noise: bool = False,
) -> Latent:
    """Sample as the stock KSampler does, with another guider, and the same noise if asked to."""
    import latent_preview  # ComfyUI's; heavy to import

    latent_video_size(latent)
    model = guider.model_patcher
    options = {"sampler": sampler, "scheduler": scheduler, "denoise": denoise}
    sigmas = comfy.samplers.KSampler(
        model, steps=steps, device=model.load_device, model_options=model.model_options, **options
    ).sigmas
    clean = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(clean, seed, latent.get("batch_index"))
    if same_noise:
        noise = same_in_every_frame(noise)
    samples = guider.sample(
        noise,
        clean,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": samples.to(comfy.model_management.intermediate_device())}


def _branches() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="From Apply Style (or Gray-Tile Control after it)."),
        io.Conditioning.Input("styled", tooltip="The prompt with style."),
        io.Conditioning.Input("positive", tooltip="The prompt without style."),
        io.Conditioning.Input("negative", tooltip="The negative prompt without style."),
    ]


def _scales(style_cfg: float) -> list[io.Input]:
    return [
        io.Float.Input(
            "text_cfg",
            default=8.0,
            min=0.1,
            max=30.0,
            step=0.1,
            tooltip="Guidance by the prompt; the release has 8. Exactly 1 is no guidance: one pass "
            "a step, with style, for few-step models.",
        ),
        io.Float.Input(
            "style_cfg",
            default=style_cfg,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="Guidance by the style: more is more style; 0 ignores it. The release has 4, "
            "for video to video 3.",
        ),
    ]


class StyleGuiderNode(io.ComfyNode):
    """MODEL and three conditionings -> GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterGuider",
            display_name="Style Guider",
            description="Guides by text and by style, for SamplerCustomAdvanced with any sampler "
            "and scheduler.",
            search_aliases=["dual cfg", "cfg guider", "style guidance"],
            inputs=[
                *_branches(),
                *_scales(4.0),
                io.String.Input(
                    "text_schedule",
                    default="",
                    optional=True,
                    tooltip="Text cfg over the sampling in place of the number, e.g. 0:8, 0.5:4 is "
                    "8 at first and 4 from half of the way on. Empty: the number.",
                ),
                io.String.Input(
                    "style_schedule",
                    default="",
                    optional=True,
                    tooltip="The same for the style cfg.",
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        styled: Conditioning,
        positive: Conditioning,
        negative: Conditioning,
        text_cfg: float,
        style_cfg: float,
        text_schedule: str = "",
        style_schedule: str = "",
    ) -> io.NodeOutput:
        text = guidance_schedule(text_schedule, text_cfg)
        style = guidance_schedule(style_schedule, style_cfg)
        return io.NodeOutput(create_guider(model, styled, positive, negative, text, style))


class StyleSampler(io.ComfyNode):
    """MODEL, three conditionings and LATENT -> LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterSampler",
            display_name="Style Sampler",
            description="Samples with guidance by text and style: shift, guider and sampler in one "
            "node, with the settings of the release.",
            search_aliases=["ksampler", "stylemaster sampler", "wan sampler"],
            inputs=[
                *_branches(),
                io.Latent.Input("latent", tooltip="From StyleMaster Latent."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Steps of the sampling; the release has 50.",
                ),
                *_scales(3.0),
                io.Combo.Input(
                    "sampler_name",
                    options=list(comfy.samplers.SAMPLER_NAMES),
                    default="euler",
                    tooltip="The release uses euler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(comfy.samplers.SCHEDULER_NAMES),
                    default="simple",
                    tooltip="simple is the schedule of the release.",
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    tooltip="Moves the steps towards high noise; the release has 5. Takes the "
                    "place of a ModelSamplingSD3 before it.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from noise; below 1 starts from the latent, which must then "
                    "be an encoded video, with that much noise.",
                ),
                io.Boolean.Input(
                    "same_noise",
                    default=False,
                    optional=True,  # workflows from before it do not name it
                    tooltip="Begin every frame from the same noise: less flicker in a restyled "
                    "video, from models that learned it, such as stylemaster-tiny.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        styled: Conditioning,
        positive: Conditioning,
        negative: Conditioning,
        latent: Latent,
        seed: int,
        steps: int,
        text_cfg: float,
        style_cfg: float,
        sampler_name: str,
        scheduler: str,
        shift: float,
        denoise: float,
        same_noise: bool = False,
    ) -> io.NodeOutput:
        check_choice(sampler_name, comfy.samplers.SAMPLER_NAMES, "sampler_name")
        check_choice(scheduler, comfy.samplers.SCHEDULER_NAMES, "scheduler")
        shifted = with_shift(model, shift)
        guider = create_guider(shifted, styled, positive, negative, text_cfg, style_cfg)
        sampled = sample(
            guider,
            latent,
            seed=seed,
            steps=steps,
            sampler=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
            same_noise=same_noise,
        )
        return io.NodeOutput(sampled)


NODES = [StyleGuiderNode, StyleSampler]
