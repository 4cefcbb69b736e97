"""Guidance by two conditions, text and style (StyleMaster, eq. 6; StyleCrafter, eq. 2)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


def combine_guidance(
    v_negative: Tensor,
    v_text: Tensor,
    v_styled: Tensor,
    *,
    text_scale: float,
    style_scale: float,
) -> Tensor:
    """Velocity guided by two conditions.

    v(neg, no style) + text_scale (v(pos, no style) - v(neg, no style))
    + style_scale (v(pos, style) - v(pos, no style))

    Args:
        v_negative: velocity under the negative prompt without style, any shape.
        v_text: velocity under the prompt without style.
        v_styled: velocity under the prompt with style.
        text_scale: guidance scale of the text (release: 8).
        style_scale: guidance scale of the style (release: 4, video-to-video 3).

    Returns:
        the guided velocity, of the inputs' shape.
    """
    return v_negative + text_scale * (v_text - v_negative) + style_scale * (v_styled - v_text)


def combine_guidance_video(
    e_negative: Tensor,
    e_text: Tensor,
    e_styled: Tensor,
    *,
    text_scale: float,
    style_scale: float,
) -> Tensor:
    """Guidance as StyleCrafter's video code has it: it starts from the styled prediction.

    The same as `combine_guidance` with both scales one higher. Arguments as there; the code's own
    scales are 15 and 7.5, made for VideoCrafter.
    """
    return combine_guidance(
        e_negative, e_text, e_styled, text_scale=text_scale + 1, style_scale=style_scale + 1
    )


class GuidanceWeights(NamedTuple):
    """The same guidance as a weighted sum; a branch whose weight is 0 need not be run."""

    negative: float
    text: float
    styled: float

    @classmethod
    def of(cls, text_scale: float, style_scale: float) -> GuidanceWeights:
        """Weights that sum to 1. A text scale of 1 means no guidance: the styled branch alone.

        At text scale 1 the release runs the styled branch alone and ignores the style scale; so do
        we, as one pass a step is what a user of few-step models asks for by that number.
        """
        if text_scale == 1:
            return cls(0.0, 0.0, 1.0)
        return cls(1 - text_scale, text_scale - style_scale, style_scale)

    @classmethod
    def of_stylecrafter(cls, text_scale: float, style_scale: float) -> GuidanceWeights:
        """Weights of StyleCrafter's SDXL code: a style scale of 0 or less is no style guidance.

        Then the style acts through the prompt's branch, under plain guidance: the same as equal
        scales. Elsewhere `of` holds.
        """
        return cls.of(text_scale, style_scale if style_scale > 0 else text_scale)

    @classmethod
    def of_stylecrafter_video(cls, text_scale: float, style_scale: float) -> GuidanceWeights:
        """Weights of StyleCrafter's video code, as `combine_guidance_video`.

        At text scale 1 it runs the styled branch alone; without a style scale (0 or less here) it
        has plain guidance, `of_stylecrafter`.
        """
        if text_scale == 1 or style_scale <= 0:
            return cls.of_stylecrafter(text_scale, style_scale)
        return cls.of(text_scale + 1, style_scale + 1)
