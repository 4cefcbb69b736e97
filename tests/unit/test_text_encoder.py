import io
import json
import random

import pytest
import torch
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from stylemaster_core.errors import ConfigError, LayoutError, WeightsError
from stylemaster_core.models.text_encoder import (
    HashedWordsTextEncoder,
    _config,
    clean_prompt,
    load_text_encoder,
)
from stylemaster_core.weights.state_dict import shapes_of

CAT = [0.611763, 0.693702, -0.047756, -0.35084]
PROMPTS = ["a cat in the rain", "a house"]


@pytest.fixture(scope="module")
def pieces():
    """A sentencepiece model with UMT5's special tokens: 0 pads, 1 ends."""
    import sentencepiece

    words = [
        "a",
        "an",
        "the",
        "style",
        "of",
        "watercolor",
        "oil",
        "painting",
        "cat",
        "dog",
        "city",
        "rain",
        "snow",
        "house",
        "tree",
    ]
    random.seed(0)
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(random.choices(words, k=8)) for _ in range(500)),
        model_writer=buffer,
        vocab_size=50,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return buffer.getvalue()


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=64,
        d_model=48,
        d_kv=8,
        d_ff=40,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = UMT5EncoderModel(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def expected(model, pieces, length=512):
    """Encode as Wan does: padded to the full length, masked, zero after the prompt."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    ids = torch.zeros(len(PROMPTS), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        tokens = [*processor.encode(prompt), 1]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    with torch.no_grad():
        features = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return features * mask[..., None]


def hf_weights(model):
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    weights.pop("encoder.embed_tokens.weight", None)
    return weights


def native_weights(model):
    """The same weights under Wan's own names, written out by hand."""
    source = model.state_dict()
    result = {
        "token_embedding.weight": source["shared.weight"],
        "norm.weight": source["encoder.final_layer_norm.weight"],
    }
    names = {
        "norm1.weight": "layer.0.layer_norm.weight",
        "norm2.weight": "layer.1.layer_norm.weight",
        "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
        "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
        "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
        "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
        **{f"attn.{n}.weight": f"layer.0.SelfAttention.{n}.weight" for n in "qkvo"},
    }
    for block in range(3):
        for theirs, ours in names.items():
            result[f"blocks.{block}.{theirs}"] = source[f"encoder.block.{block}.{ours}"]
    return result


@pytest.mark.parametrize("kind", ["root", "folder", "comfy", "native"])
def test_every_format_gives_the_same_features(kind, reference, pieces, tmp_path):
    tokenizer = None
    if kind in ("root", "folder"):
        reference.save_pretrained(tmp_path / "text_encoder")
        (tmp_path / "tokenizer").mkdir()
        (tmp_path / "tokenizer" / "spiece.model").write_bytes(pieces)
        path = tmp_path if kind == "root" else tmp_path / "text_encoder"
    elif kind == "comfy":
        path = tmp_path / "umt5.safetensors"
        blob = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
        save_file(hf_weights(reference) | {"spiece_model": blob}, path)
    else:
        path = tmp_path / "umt5.pth"
        torch.save(native_weights(reference), path)
        tokenizer = tmp_path / "my.model"
        tokenizer.write_bytes(pieces)
    encoder = load_text_encoder(path, tokenizer, dtype=torch.float32)
    features = encoder.encode(PROMPTS)
    assert features.shape == (2, 512, 48)
    assert torch.allclose(features, expected(reference, pieces), atol=1e-4)
    assert features[1, 20:].abs().max() == 0
    assert encoder.width == 48


def test_scaled_fp8_is_multiplied_out(reference, pieces, tmp_path):
    weights = {}
    for key, value in hf_weights(reference).items():
        weights[key] = value
        if "SelfAttention.q" in key or "wo.weight" in key:
            scale = value.abs().max() / 448
            weights[key] = (value / scale).to(torch.float8_e4m3fn)
            weights[key.removesuffix(".weight") + ".scale_weight"] = scale
    weights["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    weights["spiece_model"] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    save_file(weights, tmp_path / "fp8.safetensors")
    encoder = load_text_encoder(tmp_path / "fp8.safetensors", dtype=torch.float32)
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    exact, loaded = reference.state_dict()[key], encoder.model.state_dict()[key]
    assert 0 < (exact - loaded).abs().max() < 0.07 * exact.abs().max()
    reached = encoder.encode(PROMPTS)
    assert (
        torch.nn.functional.cosine_similarity(
            reached.flatten(), expected(reference, pieces).flatten(), dim=0
        )
        > 0.95
    )


def test_sizes_of_umt5_xxl_are_read_off_its_shapes():
    real = {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "relative_attention_num_buckets": 32,
    }
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**real, feed_forward_proj="gated-gelu"))
    config = _config(shapes_of(model.state_dict()))
    assert {key: getattr(config, key) for key in real} == real


def test_long_prompts_are_cut_before_the_end_token(reference, pieces, tmp_path):
    reference.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(pieces)
    encoder = load_text_encoder(tmp_path, dtype=torch.float32)
    ids = encoder.tokenizer("a cat " * 100, 8)
    assert len(ids) == 8
    assert ids[-1] == 1
    assert encoder.encode(["a cat " * 100], max_length=8).shape == (1, 8, 48)
    assert encoder.encode([""]).abs().sum(-1).count_nonzero() == 1


def test_a_tokenizer_json_serves_too(reference, pieces, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "</s>": 1, "?": 2, "a": 3, "house": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reference.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path, dtype=torch.float32)
    assert encoder.tokenizer("a house burns", 512) == [3, 4, 2, 1]


def test_bad_files_are_refused(reference, pieces, tmp_path):
    weights = hf_weights(reference)
    path = tmp_path / "umt5.safetensors"
    save_file(weights, path)
    with pytest.raises(WeightsError, match="no tokenizer for UMT5"):
        load_text_encoder(path)
    with pytest.raises(ConfigError, match="overflows"):
        load_text_encoder(path, dtype=torch.float16)
    (tmp_path / "bad.model").write_bytes(b"nonsense" * 9)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_text_encoder(path, tmp_path / "bad.model")
    del weights["encoder.block.2.layer.1.layer_norm.weight"]
    save_file(weights, path)
    with pytest.raises(WeightsError, match="1 missing"):
        load_text_encoder(path, tmp_path)
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match="expected a UMT5"):
        load_text_encoder(path)


def test_prompts_are_cleaned_as_wan_does():
    assert clean_prompt("  a &amp;amp; b \n c&#39;s  ") == "a & b c's"
    assert clean_prompt("the Mona Lisa doesnÃ¢â‚¬â„¢t") == "the Mona Lisa doesn't"


def test_hashed_words_need_no_weights():
    encoder = HashedWordsTextEncoder(width=64, max_length=8, seed=0)
    features = encoder.encode(["A cat, a dog", "dog", "", "a b c d e f g h i j"])
    assert features.shape == (4, 8, 64)
    assert features.dtype == torch.float32
    assert torch.equal(features[0, 0], features[0, 3])  # "A" and "a"
    assert torch.equal(features[0, 4], features[1, 0])  # "dog"
    assert not torch.equal(features[0, 1], features[1, 0])
    assert torch.equal(features[0, 5], features[2, 0])  # the end token
    assert torch.equal(features[3, 7], features[2, 0])
    assert features[1, 2:].abs().max() == 0
    assert encoder.encode(["dog"], max_length=512).shape == (1, 512, 64)
    assert not torch.equal(HashedWordsTextEncoder(64, seed=1).encode(["dog"])[0, 0], features[1, 0])
    with pytest.raises(LayoutError, match="list"):
        encoder.encode("a string")


def test_hashed_words_are_the_same_everywhere():
    vector = HashedWordsTextEncoder(width=4, seed=0).encode(["cat"])[0, 0]
    assert vector.tolist() == pytest.approx(CAT, abs=1e-5)


def test_hashed_words_are_loaded_from_their_description(tmp_path):
    path = tmp_path / "text_encoder.json"
    path.write_text(json.dumps({"kind": "hashed_words", "width": 12, "seed": 3}))
    encoder = load_text_encoder(path)
    assert torch.equal(encoder.encode(["x"]), HashedWordsTextEncoder(12, seed=3).encode(["x"]))
    for content in ("{", "[]", '{"kind": "other"}', '{"kind": "hashed_words"}'):
        path.write_text(content)
        with pytest.raises(WeightsError, match="expected"):
            load_text_encoder(path)
