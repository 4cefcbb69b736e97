"""Model illusion on tiny pipelines: one canvas, two views, exactly the same pixels."""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

from stylemaster_core.cli.data import add_parser
from stylemaster_core.data.illusion import (
    PAINTED_VIEWS,
    PixelDiffusion,
    clip_score,
    load_pixel_diffusion,
    paint_shared_canvas,
    painted_pair,
    plan_pair,
    rearranged_pair,
)
from stylemaster_core.data.images import clip_pixels, read_image, write_image
from stylemaster_core.data.jsonl import read_jsonl
from stylemaster_core.data.pairs import (
    check_pair,
    make_pairs,
    open_pair_folder,
    read_pairs,
)
from stylemaster_core.data.views import View
from stylemaster_core.data.word_lists import MODIFIERS, OBJECTS, STYLES, prompt_of
from stylemaster_core.errors import ConfigError, LayoutError, WeightsError
from stylemaster_core.models.clip_text import ClipText
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.small import write_small_models
from stylemaster_core.writing import part_path

SIZE, TEXT = 16, 8


def unet(seed, *, size=SIZE, stage=1):
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=size,
        in_channels=3 * stage,
        out_channels=6,  # noise and variance, as IF's
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=4,
        class_embed_type="timestep" if stage == 2 else None,
    )
    return model.eval()


def scheduler():
    return DDPMScheduler(variance_type="learned_range", clip_sample=True)


class TinyPipeline(SimpleNamespace):
    """The interface of a pixel-space pipeline."""

    def encode_prompt(self, prompts, do_classifier_free_guidance, device):
        def embed(prompt):
            generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
            return torch.randn(4, TEXT, generator=generator)

        positive = torch.stack([embed(prompt) for prompt in prompts]).to(device)
        return positive, torch.zeros_like(positive) if do_classifier_free_guidance else None


@pytest.fixture(scope="module")
def diffusion():
    base = TinyPipeline(unet=unet(0), scheduler=scheduler())
    upscaler = TinyPipeline(
        unet=unet(1, size=2 * SIZE, stage=2),
        scheduler=scheduler(),
        image_noising_scheduler=DDPMScheduler(),
    )
    return PixelDiffusion(base, upscaler, num_steps=3, guidance_scale=4.0)


def test_word_lists():
    assert len(set(STYLES)) == len(STYLES) >= 60
    assert len(set(OBJECTS)) == len(OBJECTS) >= 100
    assert len(set(MODIFIERS)) == len(MODIFIERS)
    assert all(thing.split()[0] in ("a", "an") for thing in OBJECTS)
    assert prompt_of("etching", "a cat") == "an etching of a cat"
    assert prompt_of("etching", "a cat", "pale") == "a pale etching of a cat"


def test_plans_depend_on_the_number_alone():
    random.seed(1)
    plan = plan_pair(3, seed=0, views=PAINTED_VIEWS, pixel_grid=64)
    random.seed(2)
    assert plan == plan_pair(3, seed=0, views=PAINTED_VIEWS, pixel_grid=64)
    plans = [plan_pair(i, seed=0, views=PAINTED_VIEWS, pixel_grid=64) for i in range(200)]
    assert set(Counter(p.view.name for p in plans)) == set(PAINTED_VIEWS)
    assert len({p.seed for p in plans}) == len({p.prompts for p in plans}) == 200
    for p in plans:
        assert all(f"{p.style} of " in prompt for prompt in p.prompts)
        assert p.prompts[0] != p.prompts[1]
        assert p.view.grid == (64 if p.view.name == "pixels" else None)
    with pytest.raises(ConfigError):
        plan_pair(0, seed=0, views=[])


def test_one_view_is_ordinary_sampling():
    """With the identity alone, or twice, the canvas is what the plain loop makes."""
    model, steps = unet(0), 4
    embeds = torch.randn(2, 4, TEXT)

    def predict(seen, t):
        with torch.no_grad():
            return model(seen, t, encoder_hidden_states=embeds[: len(seen)] * 0).sample[:, :3]

    plain = DDPMScheduler(variance_type="fixed_small", clip_sample=True)
    plain.set_timesteps(steps)
    generator = torch.Generator().manual_seed(5)
    canvas = torch.randn(3, SIZE, SIZE, generator=generator)
    for t in plain.timesteps:
        noise = predict(canvas[None], t)
        canvas = plain.step(noise, t, canvas[None], generator=generator).prev_sample[0]
    for views in ([View("identity")], [View("identity")] * 2):
        made = paint_shared_canvas(
            predict, scheduler(), views, (3, SIZE, SIZE), num_steps=steps, seed=5
        )
        assert torch.allclose(made, canvas, atol=1e-5)


@pytest.mark.parametrize("name", ["patches", "jigsaw", "rotate90", "pixels"])
def test_predictions_are_turned_back_and_averaged(name):
    """One deterministic step, against the average written out."""
    view, shape = View(name, 3), (3, 8, 8)
    ddim = DDIMScheduler(clip_sample=False)
    bias = torch.randn(2, *shape)
    seen_by_model = []

    def predict(seen, t):
        seen_by_model.append(seen)
        return seen * 0.1 + bias

    made = paint_shared_canvas(predict, ddim, [View("identity"), view], shape, num_steps=1, seed=0)
    canvas = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen_by_model[0], torch.stack([canvas, view.apply(canvas)]))
    noise = (canvas * 0.1 + bias[0] + canvas * 0.1 + view.invert(bias[1])) / 2
    ddim.set_timesteps(1)
    expected = ddim.step(noise, ddim.timesteps[0], canvas).prev_sample
    assert torch.allclose(made, expected, atol=1e-5)


def test_swapping_the_views_swaps_the_pictures():
    """Nothing prefers the first picture: its view and prompt exchanged, the canvas is the same."""
    model = unet(0)
    base = TinyPipeline(unet=model, scheduler=scheduler())
    diffusion = PixelDiffusion(base, None, num_steps=2, guidance_scale=3.0)
    views = (View("identity"), View("rotate180"))
    canvas = diffusion.paint(("a cat", "a dog"), views, 1)
    swapped = diffusion.paint(("a dog", "a cat"), views[::-1], 1)
    other = diffusion.paint(("a dog", "a cat"), views, 1)
    assert np.abs(canvas.astype(int) - swapped).max() <= 1
    assert np.abs(canvas.astype(int) - other).max() > 1


def test_guidance_and_second_stage(diffusion):
    prompts, views = ("a cat", "a dog"), (View("identity"), View("patches", 1))
    large = diffusion.paint(prompts, views, 0)
    assert large.shape == (2 * SIZE, 2 * SIZE, 3) and large.dtype == np.uint8
    small = PixelDiffusion(diffusion.base, None, 3, 4.0).paint(prompts, views, 0)
    unguided = PixelDiffusion(diffusion.base, None, 3, 1.0).paint(prompts, views, 0)
    assert small.shape == (SIZE, SIZE, 3)
    assert not np.array_equal(small, unguided)
    assert np.array_equal(
        small, PixelDiffusion(diffusion.base, None, 3, 4.0).paint(prompts, views, 0)
    )


def test_noise_is_guided_and_variance_dropped(diffusion):
    model, seen, embeds = (
        diffusion.base.unet,
        torch.randn(2, 3, SIZE, SIZE),
        torch.randn(4, 4, TEXT),
    )
    with torch.no_grad():
        made = diffusion._predict(model, seen, torch.tensor(500), embeds)
        uncond, cond = (
            model(seen, 500, encoder_hidden_states=part).sample[:, :3] for part in embeds.chunk(2)
        )
    assert torch.allclose(made, uncond + 4 * (cond - uncond), atol=1e-4)


def make_some(folder, diffusion, num, process=(0, 1), score=None, min_score=0.0, **settings):
    def make(index):
        plan = plan_pair(index, seed=0, views=PAINTED_VIEWS, pixel_grid=SIZE)
        return painted_pair(index, diffusion.paint, plan, score=score, min_score=min_score)

    finished = open_pair_folder(folder, {"seed": 0} | settings)
    return list(make_pairs(folder, num, make, finished, process=process))


def test_pairs_are_the_same_pixels_whoever_makes_them(diffusion, tmp_path):
    make_some(tmp_path / "one", diffusion, 6)
    for number in (1, 0):
        made = make_some(tmp_path / "two", diffusion, 6, process=(number, 2))
        assert [record["index"] % 2 for record in made] == [number] * 3
    pairs, others = read_pairs(tmp_path / "one"), read_pairs(tmp_path / "two")
    assert [pair.index for pair in others] == list(range(6))
    for pair, other in zip(pairs, others, strict=True):
        first, second = read_image(pair.first), read_image(pair.second)
        assert np.array_equal(pair.view.apply_image(first), second)
        assert not np.array_equal(first, second)
        assert check_pair(pair) is None
        assert np.array_equal(first, read_image(other.first))
        assert np.array_equal(second, read_image(other.second))
    write_image(pairs[0].second, 255 - read_image(pairs[0].second), overwrite=True)
    assert "000000_b.png" in check_pair(pairs[0])


def test_resume(diffusion, tmp_path):
    make_some(tmp_path, diffusion, 2)
    before = (tmp_path / "000000_a.png").stat().st_mtime_ns
    # A killed process: pictures without a record, half a record, a picture that is gone.
    (tmp_path / "000002_a.png").write_bytes(b"half")
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    part = part_path(tmp_path / "000002_b.png")
    part.with_name(part.name.replace(str(os.getpid()), str(killed.pid))).write_bytes(b"half")
    with (tmp_path / "pairs.jsonl").open("a") as stream:
        stream.write('{"index": 2, "kept": tr')
    (tmp_path / "000001_b.png").unlink()
    assert [record["index"] for record in make_some(tmp_path, diffusion, 3)] == [1, 2]
    assert (tmp_path / "000000_a.png").stat().st_mtime_ns == before
    assert [pair.index for pair in read_pairs(tmp_path)] == [0, 1, 2]
    assert all(check_pair(pair) is None for pair in read_pairs(tmp_path))
    assert make_some(tmp_path, diffusion, 3) == []
    assert not list(tmp_path.glob(".*.png"))


def test_other_settings_are_not_mixed(diffusion, tmp_path):
    make_some(tmp_path, diffusion, 2, steps=3)
    with pytest.raises(ConfigError, match=r"steps 3 against 4.*another folder.*overwritten"):
        open_pair_folder(tmp_path, {"seed": 0, "steps": 4})
    assert open_pair_folder(tmp_path, {"seed": 0, "steps": 3}, overwrite=True) == {0, 1}
    assert open_pair_folder(tmp_path, {"seed": 0, "steps": 4}, overwrite=True) == set()
    assert not list(tmp_path.glob("*.png"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        open_pair_folder(tmp_path / "other", {}, overwrite=True)


def test_clip_filter_looks_at_each_picture_with_its_prompt(diffusion, tmp_path):
    seen = []

    def score(pictures, prompts):
        seen.append((pictures, prompts))
        return [0.5, 0.1 if len(seen) == 2 else 0.4]

    records = make_some(tmp_path, diffusion, 3, score=score, min_score=0.3)
    assert [record["kept"] for record in records] == [True, False, True]
    assert [pair.index for pair in read_pairs(tmp_path)] == [0, 2]
    assert not (tmp_path / "000001_a.png").exists()
    for index, (pictures, prompts) in enumerate(seen):
        plan = plan_pair(index, seed=0, views=PAINTED_VIEWS, pixel_grid=SIZE)
        assert prompts == plan.prompts
        assert np.array_equal(plan.view.apply_image(pictures[0]), pictures[1])
    # A rejected pair counts as done.
    assert make_some(tmp_path, diffusion, 3, score=score, min_score=0.3) == []
    with pytest.raises(WeightsError, match="scores"):
        make_some(tmp_path / "nan", diffusion, 1, score=lambda *_: [float("nan"), 1.0])


def test_clip_score_is_a_cosine(tmp_path):
    small = write_small_models(tmp_path)
    encoder = load_image_encoder(small.image_encoder)
    pictures = [np.full((20, 30, 3), level, np.uint8) for level in (10, 200)]
    texts = torch.randn(2, 48)
    own = encoder.encode(torch.stack([clip_pixels(p) for p in pictures])).image_embeds
    score = clip_score(encoder, ClipText(lambda prompts: own.clone()))
    assert score(pictures, ["a", "b"]) == pytest.approx([1, 1], abs=1e-5)
    expected = torch.nn.functional.cosine_similarity(own, texts).tolist()
    other = clip_score(encoder, ClipText(lambda prompts: texts))
    assert other(pictures, ["a", "b"]) == pytest.approx(expected, abs=1e-5)


def save_clip(folder):
    """A whole random CLIP whose tokenizer knows every word of the lists."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = {"<start>", "<end>", "?", "a", "an", "of"}
    words |= {word for part in (*STYLES, *OBJECTS, *MODIFIERS) for word in part.split()}
    vocabulary = {word: i for i, word in enumerate(sorted(words))}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, vocabulary[word]) for word in ("<start>", "<end>")]
    tokens.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<end>").save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    text = tower | {"vocab_size": len(vocabulary), "max_position_embeddings": 16,
                    "bos_token_id": ends[0][1], "eos_token_id": ends[1][1]}  # fmt: skip
    torch.manual_seed(3)
    vision = tower | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # its own start is too small for scores to differ
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model, tokens


def illusion(capsys, *arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", "illusion", *map(str, arguments), "--json"])
    capsys.readouterr()
    assert args.run(args) == 0
    return json.loads(capsys.readouterr().out)


def test_clip_filter_with_a_whole_clip_from_the_command_line(tmp_path, capsys, caplog):
    save_deepfloyd(tmp_path)
    model, tokens = save_clip(tmp_path / "clip")
    common = ["--base", tmp_path / "I", "--steps", 2, "--device", "cpu"]
    report = illusion(capsys, tmp_path / "all", "--num", 8, *common)
    assert report["kept"] == 8
    worst = []  # of each pair, by CLIPModel itself
    for pair in read_pairs(tmp_path / "all"):
        pictures = [clip_pixels(read_image(path), size=32) for path in (pair.first, pair.second)]
        ids = [tokens.encode(prompt).ids for prompt in pair.record["prompts"]]
        with torch.no_grad():
            scores = [
                model(input_ids=torch.tensor([i]), pixel_values=pixels[None]).logits_per_image
                / model.logit_scale.exp()
                for i, pixels in zip(ids, pictures, strict=True)
            ]
        worst.append(min(score.item() for score in scores))
    ordered = sorted(worst)
    threshold = (ordered[3] + ordered[4]) / 2
    assert ordered[4] - ordered[3] > 1e-3
    kept = [i for i, score in enumerate(worst) if score >= threshold]
    clip = ["--image-encoder", tmp_path / "clip", "--clip-text", tmp_path / "clip"]
    chosen = [tmp_path / "chosen", *common, *clip, f"--min-score={threshold}"]
    caplog.set_level("INFO", "stylemaster")
    first = illusion(capsys, *chosen, "--num", 5)
    early = sum(i < 5 for i in kept)
    assert (first["kept"], first["rejected"]) == (early, 5 - early)
    again = illusion(capsys, *chosen, "--num", 8)
    assert (again["kept"], again["rejected"], again["done_earlier"]) == (4 - early, early - 1, 5)
    assert [pair.index for pair in read_pairs(tmp_path / "chosen")] == kept
    for index, score in enumerate(worst):
        pictures = [(tmp_path / "chosen" / f"{index:06d}_{side}.png").is_file() for side in "ab"]
        assert pictures == [index in kept] * 2
        assert (f"left out pair {index}: CLIP gives" in caplog.text) == (index not in kept)
        record = read_jsonl(tmp_path / "chosen" / "pairs.jsonl")[index]
        assert min(record["scores"]) == pytest.approx(score, abs=2e-5)
    with pytest.raises(ConfigError, match="min_score"):
        illusion(capsys, *chosen[:-1], "--num", 8, "--min-score=0.9")


def test_rearranged_pictures(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for index in range(2):
        paths.append(tmp_path / f"style_{index}.png")
        write_image(paths[-1], rng.integers(0, 256, (40, 60, 3), np.uint8))
    paths.append(tmp_path / "damaged.png")
    paths[-1].write_bytes(b"no picture")
    folder = tmp_path / "pairs"
    finished = open_pair_folder(folder, {})

    def make(index):
        return rearranged_pair(index, paths, size=32, seed=0, views=["patches", "jigsaw"])

    records = list(make_pairs(folder, 6, make, finished))
    assert [record["kept"] for record in records] == [True, True, False] * 2
    assert "damaged.png" in records[2]["error"]
    pairs = read_pairs(folder)
    assert [pair.group for pair in pairs] == [str(paths[i % 3]) for i in (0, 1, 3, 4)]
    assert all(check_pair(pair) is None for pair in pairs)
    assert read_image(pairs[0].first).shape == (32, 32, 3)
    with pytest.raises(LayoutError, match="damaged"):
        make(2)


def test_folders_without_pairs(tmp_path):
    with pytest.raises(ConfigError, match="no pairs.jsonl"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"index": 0, "kept": False}) + "\n")
    with pytest.raises(ConfigError, match="1 were left out"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"number": 0}) + "\n")
    with pytest.raises(ConfigError, match="no pair"):
        read_pairs(tmp_path)


def test_deepfloyd_pipelines_load_and_paint(tmp_path):
    """Diffusers' own IF classes, with a T5 of two blocks: written, loaded, painted with."""
    save_deepfloyd(tmp_path)
    diffusion = load_pixel_diffusion(tmp_path / "I", tmp_path / "II", num_steps=2)
    assert type(diffusion.base).__name__ == "IFPipeline"
    assert type(diffusion.upscaler).__name__ == "IFSuperResolutionPipeline"
    plan = plan_pair(0, seed=0, views=["pixels"], pixel_grid=diffusion.size)
    pair = painted_pair(0, diffusion.paint, plan)
    assert pair.canvas.shape == (2 * SIZE, 2 * SIZE, 3)
    with pytest.raises(WeightsError, match="absent"):
        load_pixel_diffusion(tmp_path / "absent")
    with pytest.raises(WeightsError, match="text_encoder"):
        load_pixel_diffusion(tmp_path / "II")
    with pytest.raises(ConfigError, match="steps"):
        load_pixel_diffusion(tmp_path / "I", num_steps=0)


def save_deepfloyd(folder):
    from diffusers import IFPipeline, IFSuperResolutionPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "of": 4}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(
        vocab_size=len(words), d_model=TEXT, d_kv=4, d_ff=8, num_layers=2, num_heads=2
    )
    rest = {"safety_checker": None, "feature_extractor": None, "watermarker": None}
    IFPipeline(
        tokenizer,
        T5EncoderModel(config),
        unet(0),
        scheduler(),
        **rest,
        requires_safety_checker=False,
    ).save_pretrained(folder / "I")
    IFSuperResolutionPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=unet(1, size=2 * SIZE, stage=2),
        scheduler=scheduler(),
        image_noising_scheduler=DDPMScheduler(),
        **rest,
        requires_safety_checker=False,
    ).save_pretrained(folder / "II")
