"""Models from disk: is what was read that model? Tiny random ones, against Transformers; and wrong ones."""

import json
import math
import pydoc_data.topics
import shutil

import numpy as np
import pytest
from support import optional

torch = optional("torch")
tokenizers = optional("tokenizers")
gguf = optional("gguf")
save_file = optional("safetensors.torch").save_file

from arcquant_ref import checkpoint  # noqa: E402
from arcquant_ref.model import Llama  # noqa: E402

TEXT = pydoc_data.topics.topics["for"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tensors(config):
    """Random weights under Hugging Face's names, of a size with which every part moves the logits."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv = config["num_attention_heads"], config.get("num_key_value_heads") or 4
    size = config.get("head_dim") or d // heads
    layer = {
        "self_attn.q_proj": (heads * size, d),
        "self_attn.k_proj": (kv * size, d),
        "self_attn.v_proj": (kv * size, d),
        "self_attn.o_proj": (d, heads * size),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shapes = {"model.embed_tokens": (v, d), "model.norm": (d,), "lm_head": (v, d)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if config.get("tie_word_embeddings"):
        del shapes["lm_head"]
    generator = torch.Generator().manual_seed(1)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 2 / math.sqrt(shape[-1])
        if len(shape) == 2
        else 1 + torch.randn(shape, generator=generator) / 4
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def tokenizer():
    """A BPE of 300 tokens with SmolLM's rule of splitting, trained on TEXT."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    found.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([TEXT], trainer)
    return found


@pytest.fixture
def write(tmp_path, tokenizer):
    """Writes a Hugging Face folder: config and weights changed as asked, `...` and None for absent."""

    def folder(config=None, weights=None, dtype=torch.float32, shards=1):
        settings = {key: value for key, value in (CONFIG | (config or {})).items() if value is not ...}
        path = tmp_path / "model"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        (path / "config.json").write_text(json.dumps(settings))
        tokenizer.save(str(path / "tokenizer.json"))
        held = {name: w.to(dtype) for name, w in tensors(CONFIG | settings).items()} | (weights or {})
        held = {name: w for name, w in held.items() if w is not None}
        names = sorted(held)
        files = {f"model-{i}.safetensors": names[i::shards] for i in range(shards)}
        for file, part in files.items():
            save_file({name: held[name].contiguous() for name in part}, path / file, {"format": "pt"})
        if shards > 1:
            index = {"weight_map": {name: file for file, part in files.items() for name in part}}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            (path / "model-0.safetensors").rename(path / "model.safetensors")
        return path

    return folder


def rounding(model, tokens):
    """How far two float32 computations of these logits lie apart, at most, if roundings are independent.

    A sum of K products in another order is the sum with each weight changed by about √K · 2⁻²⁴ of itself
    (Higham and Mary, SIAM J. Sci. Comput. 41, 2019); an angle of RoPE is off by less than that, two roundings
    or three. So all weights and frequencies are moved at random by that much, which moves the largest logit
    as one computation does. Both err, and 3 standard deviations are hardly exceeded.
    """
    size = int(model.field("rope.dimension_count"))
    relative = math.sqrt(max(w.shape[-1] for w in model.weights.values())) * 2.0**-24
    kept, expected = model.weights, model.logits(tokens)
    generator = torch.Generator().manual_seed(2)
    try:
        model.weights = {
            name: w * (1 + relative * torch.randn(w.shape, generator=generator))
            for name, w in ({"rope_freqs.weight": torch.ones(size // 2)} | kept).items()
        }
        return 2 * 3 * float((model.logits(tokens) - expected).abs().max())
    finally:
        model.weights = kept


VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": None},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3, Transformers 5": {"rope_parameters": LLAMA3 | {"rope_theta": 100.0}, "rope_theta": ...},
    "default base": {"rope_theta": ...},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers(write, config):
    transformers = optional("transformers")
    path = write(config)
    other = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = Llama(path)
    tokens = model.encode(TEXT)[:48]
    with torch.inference_mode():
        theirs = other(tokens[None]).logits[0]
    found, bound = float((model.logits(tokens) - theirs).abs().max()), rounding(model, tokens)
    print(
        f"largest difference {found:.1e}, rounding can make {bound:.1e}, logits to {theirs.abs().max():.1f}"
    )
    assert found <= bound
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.weight"):  # halves instead of pairs
        w = model.weights[name]
        size = int(model.field("rope.dimension_count"))
        model.weights[name] = w.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)
        assert (model.logits(tokens) - theirs).abs().max() > 100 * bound
        model.weights[name] = w


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shards_hold_the_same_values(write, dtype):
    whole = checkpoint.read(write(dtype=dtype))
    shards = checkpoint.read(write(dtype=dtype, shards=3))
    single = checkpoint.read(write())
    assert whole.weights.keys() == shards.weights.keys() == single.weights.keys()
    for name, w in whole.weights.items():
        assert w.dtype == torch.float32
        assert torch.equal(w, shards.weights[name])
        assert torch.equal(w, single.weights[name].to(dtype).float())


def test_old_buffers_are_computed_anew_and_a_tied_head_may_be_stored(write):
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    embeddings = tensors(CONFIG)["model.embed_tokens.weight"]
    plain = Llama(write({"tie_word_embeddings": True}))
    stored = Llama(write({"tie_word_embeddings": True}, frequencies | {"lm_head.weight": embeddings}))
    tokens = plain.encode(TEXT)[:16]
    assert torch.equal(plain.logits(tokens), stored.logits(tokens))


def test_a_text_is_encoded_alone_and_whole(write, tokenizer):
    path = write()
    other = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    other.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    other.enable_truncation(8)
    other.enable_padding(length=10_000)
    other.save(str(path / "tokenizer.json"))
    model = Llama(path)
    assert model.encode(TEXT).tolist() == tokenizer.encode(TEXT).ids
    assert model.encode("").shape == (0,)
    assert model.tokenizer.decode(model.encode("naïve 東京 1776").tolist()) == "naïve 東京 1776"


@pytest.fixture
def write_gguf(tmp_path, write, tokenizer):
    """Writes that model as a GGUF file: fields and weights changed as asked, `...` and None for absent."""

    def file(fields=None, weights=None, architecture="llama"):
        found = checkpoint.read(write())
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        default = {f"llama.{name}": value for name, value in found.config.items()} | {
            "llama.context_length": 64,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": vocabulary,
            "tokenizer.ggml.token_type": [3 if token == "<s>" else 1 for token in vocabulary],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
        add = {
            str: writer.add_string,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }
        for name, value in (default | (fields or {})).items():
            if value is not ...:
                add[type(value)](name, value)
        for name, w in (found.weights | (weights or {})).items():
            if w is not None:
                writer.add_tensor(name, w.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return file


def test_a_gguf_file_is_the_same_model(write, write_gguf):
    folder, file = Llama(write()), Llama(write_gguf())
    tokens = folder.encode(TEXT)
    assert torch.equal(tokens, file.encode(TEXT))
    assert torch.equal(folder.encode("<s>1776"), file.encode("<s>1776"))
    assert torch.equal(folder.logits(tokens[:32]), file.logits(tokens[:32]))
    tied = Llama(write_gguf(weights={"output.weight": None}))
    embeddings = folder.weights["token_embd.weight"]
    assert not torch.equal(folder.logits(tokens[:32]), tied.logits(tokens[:32]))
    folder.weights["output.weight"] = embeddings
    assert torch.equal(folder.logits(tokens[:32]), tied.logits(tokens[:32]))
    half = Llama(write_gguf(weights={"token_embd.weight": embeddings.half()}))
    assert torch.equal(half.weights["token_embd.weight"], embeddings.half().float())


def test_a_gguf_file_may_leave_out_what_follows(write_gguf):
    full = Llama(write_gguf({"llama.rope.freq_base": 10000.0}))
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
    left_out = {f"llama.{name}": ... for name in (*names, "vocab_size")}
    neutral = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.expert_used_count": 0}
    few = Llama(write_gguf(left_out | neutral))
    assert few.config == full.config
    factors = Llama(write_gguf(weights={"rope_freqs.weight": torch.full((4,), 2.0)}))
    tokens = full.encode(TEXT)[:32]
    assert torch.equal(few.logits(tokens), full.logits(tokens))
    assert not torch.equal(factors.logits(tokens), Llama(write_gguf()).logits(tokens))


WRONG_FOLDERS = {
    "another family": (
        {"model_type": "qwen2"},
        {},
        r"model_type='qwen2'; it must be 'llama' or 'mistral'\. ",
    ),
    "no family": ({"model_type": ...}, {}, r"model_type=None; it must be"),
    "quantized": ({"quantization_config": {"bits": 4}}, {}, r"quantization_config=.* Give the checkpoint"),
    "GELU": ({"hidden_act": "gelu"}, {}, r"hidden_act='gelu'"),
    "biases": ({"attention_bias": True}, {}, r"attention_bias=True; it must be False or None"),
    "window": ({"model_type": "mistral"}, {}, r"sliding_window=4096; it must be None\. Where no text"),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, r"scales positions by .*'linear'"),
    "llama3 in part": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {}, r"scales positions by"),
    "part of a head": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, {}, r"scales positions by"),
    "factor of nothing": ({"rope_parameters": {"factor": 2.0}}, {}, r"scales positions by"),
    "no size": ({"hidden_size": ...}, {}, r"config\.json has no 'hidden_size', which a Llama needs"),
    "no number": ({"rms_norm_eps": "1e-5"}, {}, r"layer_norm_rms_epsilon='1e-5'; a plain Llama has one"),
    "odd groups": ({"num_key_value_heads": 3}, {}, r"has 4 heads of Q and 3 of K; Q must be a multiple"),
    "odd heads": ({"head_dim": 7}, {}, r"turns 7 of them; a plain Llama turns whole heads of an even size"),
    "no head": ({}, {"lm_head.weight": None}, r"lacks lm_head\.weight, but its config does not tie"),
    "two heads": (
        {"tie_word_embeddings": True},
        {"lm_head.weight": torch.ones(300, 32)},
        r"tie_word_embeddings=True and an lm_head\.weight that is not the embeddings\. Write false",
    ),
    "missing": (
        {},
        {"model.layers.1.mlp.up_proj.weight": None},
        r"lacks tensors of its config: blk\.1\.ffn_up\.weight .* is the first of 1\. Biases",
    ),
    "left over": (
        {},
        {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
        r"has tensors that a plain Llama has not: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "shape": ({"intermediate_size": 50}, {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}, r"shape"),
    "bytes": (
        {},
        {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 16, dtype=torch.uint8)},
        r"up_proj\.weight is torch\.uint8; weights are bfloat16, float16 or float32\. Give the checkpoint",
    ),
}


@pytest.mark.parametrize(("config", "weights", "message"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS)
def test_sentences_of_a_folder(write, config, weights, message):
    with pytest.raises(ValueError, match=message):
        Llama(write(config, weights))


WRONG_FILES = {
    "family": ({}, {}, "qwen2", r"general\.architecture='qwen2'; only 'llama' is supported"),
    "experts": ({"llama.expert_count": 8}, {}, "llama", r"has llama\.expert_count=8, which a plain Llama"),
    "scaled": ({"llama.rope.scaling.type": "yarn"}, {}, "llama", r"llama\.rope\.scaling\.type='yarn'"),
    "part of a head": ({"llama.rope.dimension_count": 4}, {}, "llama", r"heads of 8 keys .* turns 4 of them"),
    "by layer": ({"llama.feed_forward_length": [48, 32]}, {}, "llama", r"feed_forward_length=\[48, 32\]; a"),
    "heads": ({"llama.attention.head_count": 0}, {}, "llama", r"has attention\.head_count=0; a plain Llama"),
    "no field": ({"llama.block_count": ...}, {}, "llama", r"has no field 'block_count'"),
    "rule": (
        {"tokenizer.ggml.pre": "llama-bpe"},
        {},
        "llama",
        r"a tokenizer of model 'gpt2' and rule 'llama-bpe'; .* Give the model as a Hugging Face folder",
    ),
    "pieces": ({"tokenizer.ggml.model": "llama"}, {}, "llama", r"a tokenizer of model 'llama' and rule"),
    "no merges": ({"tokenizer.ggml.merges": ...}, {}, "llama", r"has no field 'tokenizer\.ggml\.merges'"),
    "token types": ({"tokenizer.ggml.token_type": [1] * 299 + [4]}, {}, "llama", r"types \[1, 4\]; of GGUF"),
    "missing": ({"llama.block_count": 3}, {}, "llama", r"lacks tensors of its config: blk\.2\..* first of 9"),
    "left over": ({}, {"blk.0.attn_q.bias": torch.ones(32)}, "llama", r"has not: blk\.0\.attn_q\.bias"),
    "shape": (
        {},
        {"output_norm.weight": torch.ones(16)},
        "llama",
        r"has shape \(16,\); its config says \(32",
    ),
}


@pytest.mark.parametrize(("fields", "weights", "family", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_sentences_of_a_gguf_file(write_gguf, fields, weights, family, message):
    with pytest.raises(ValueError, match=message):
        Llama(write_gguf(fields, weights, family))


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.999])
def test_a_cut_gguf_file_is_damaged(write_gguf, part):
    path = write_gguf()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"model\.gguf is damaged or not a GGUF file .* Give a GGUF file"):
        Llama(path)


def test_sentences_of_files(write, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"absent does not exist\. Give a GGUF file, or a folder with"
    ):
        Llama(tmp_path / "absent")
    for content in (b"", b"GGUF", b"GGUF\3\0\0\0\xff\xff\0\0\0\0\0\0\xff\0\0\0\0\0\0\0", b"x" * 1000):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.gguf is damaged or not a GGUF file .* Give a GGUF file"):
            Llama(tmp_path / "x.gguf")
    for name in ("config.json", "tokenizer.json"):
        path = write()
        (path / name).write_text("{")
        with pytest.raises(ValueError, match=rf"{name} is damaged or not"):
            Llama(path)
        (path / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name} does not exist\. "):
            Llama(path)
    path = write()
    (path / "model.safetensors").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not a safetensors file"):
        Llama(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds 0 files \*\.safetensors; .* it must be one"):
        Llama(path)
    path = write(shards=2)
    (path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names model-1\.safetensors, which does not"):
        Llama(path)


def test_a_token_without_an_embedding_is_refused(write):
    model = Llama(write())
    model.tokenizer.add_tokens(["<extra>"])
    assert len(model.encode("a")) == 1
    with pytest.raises(ValueError, match=r"text has the token 300, but the model has 300 embeddings\. Give"):
        model.encode("a <extra>")


def test_factors_of_llama3_are_those_of_its_three_ranges(write):
    """In a context of 16 a wavelength below 4 stays, one above 16 is stretched by 4, others by less."""
    model = Llama(write({"rope_scaling": LLAMA3, "head_dim": 16, "rope_theta": 10.0}))
    wavelength = 2 * np.pi * 10.0 ** (np.arange(0, 16, 2) / 16)
    factors = model.weights["rope_freqs.weight"].numpy()
    assert (factors[wavelength > 16] == 4).all()
    between = (wavelength > 4) & (wavelength < 16)
    assert ((factors[between] > 1) & (factors[between] < 4)).all()
    assert between.any()
    assert (wavelength > 16).any()
