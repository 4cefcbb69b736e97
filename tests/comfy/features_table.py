"""What ComfyUI offers beside our style, and what a test has shown of it: `docs/features.md`.

`python -m tests.comfy.features_table` writes the table.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.comfy.record import RECORD

DOCS = RECORD.with_name("features.md")
# Of `scripts/hooks_features.py`: what each does to a styled sampling of 12 steps.
ACTING = {
    "EasyCache": "skips",
    "LazyCache": "skips",
    "CFGZeroStar": "changes",
    "CFGNorm": "changes",
    "NAGuidance": "nothing",
    "context windows": "changes",
    "context windows with FreeNoise": "changes",
    "MultiGPU CFG Split (its clones)": "nothing",
}
_SAID = {
    "skips": "works; steps are skipped, and the style acts",
    "changes": "works; it acts, and so does the style",
    "nothing": "the style acts as without it",
}
_OWN_WORDS = {
    "NAGuidance": "no effect, as on any native Wan; the style acts as without it",
    "MultiGPU CFG Split (its clones)": "its clones give the same, with a control of their own; on "
    "several GPUs not run",
}
_OTHERS = {
    "CausalAR models": "refused in words: they keep keys and values of the text inside",
    "LoRA, fp8 storage, bfloat16": "works (`test_hooks.py`)",
    "TorchCompileModel": "works, style and control go on and off without new graphs "
    "(`test_hooks.py`)",
    "Bernini (`context_latents`), Phantom (`time_dim_concat`)": "works: style and control act on "
    "the video that is sampled (`test_hooks.py`)",
    "subgraphs": "works (`test_browser.py`)",
}
_NOT_RUN = (
    "int8, mxfp8 and nvfp4 weights",
    "GGUF",
    "`--use-ck-attention`",
    "dynamic VRAM (aimdo)",
    "several GPUs",
    "partial execution from the editor",
)


def lines() -> Iterator[str]:
    yield "# Beside other features of ComfyUI"
    yield ""
    yield "On a CPU, with small random weights of the real key layout (`tests/comfy/test_hooks.py`;"
    yield "`python -m tests.comfy.features_table` writes this). What a CPU cannot run is not run."
    yield ""
    yield "| feature | found |"
    yield "|---|---|"
    for name, kind in ACTING.items():
        yield f"| {name} | {_OWN_WORDS.get(name, _SAID[kind])} |"
    for name, said in _OTHERS.items():
        yield f"| {name} | {said} |"
    for name in _NOT_RUN:
        yield f"| {name} | not run |"


def text() -> str:
    return "\n".join(lines()) + "\n"


if __name__ == "__main__":
    DOCS.write_text(text(), encoding="utf-8")
