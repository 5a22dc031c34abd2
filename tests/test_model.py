"""The language model behind the sample: is it really that model?"""

import pydoc_data.topics

import numpy as np
import pytest
from support import model_weights, optional

# English prose in Python's standard library (PSF licence). Its perplexity is not pinned tighter than models
# of this size differ; a wrong rotation, norm or tokenizer moves it by factors.
TEXT = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
WINDOWS, LENGTH = 4, 512


@pytest.fixture(scope="module")
def model():
    path = model_weights()
    from arcquant_ref.model import Llama

    return Llama(path)


def test_greedy_text_is_fluent(model):
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    answer = model.greedy(prompt, 8)
    print(f"greedy: {answer!r}")
    assert answer.startswith("The capital of France is Paris.")
    assert "west" in model.greedy("The sun rises in the east and sets in the", 3)


def test_perplexity_is_that_of_a_model_of_this_size(model):
    from arcquant_ref.evaluate import losses

    windows = model.encode(TEXT)[: WINDOWS * LENGTH].reshape(WINDOWS, LENGTH).numpy()
    perplexity = float(np.exp(losses(model, windows).mean()))
    print(f"perplexity on {WINDOWS} x {LENGTH} tokens of pydoc_data.topics: {perplexity:.2f}")
    assert 5 < perplexity < 25


def test_tokens_split_numbers_into_digits_and_round_trip(model):
    tokens = model.encode("In 1776, 13 colonies")
    assert model.tokenizer.decode(tokens.tolist()) == "In 1776, 13 colonies"
    assert [model.tokenizer.decode([t]) for t in tokens.tolist()[2:6]] == list("1776")


def test_a_later_token_does_not_change_an_earlier_logit(model):
    tokens = model.encode(TEXT[:200])
    np.testing.assert_allclose(model.logits(tokens)[:10], model.logits(tokens[:10]), atol=1e-3)


def test_observing_layers_changes_nothing(model):
    inputs = model.layer_inputs(TEXT, 16, ["blk.3.ffn_down", "blk.0.attn_q"])
    assert {name: x.shape for name, x in inputs.items()} == {
        "blk.3.ffn_down": (16, 1536),
        "blk.0.attn_q": (16, 576),
    }


def test_sites_are_products_that_read_one_input(model):
    found = model.sites()
    assert len(found) == 120
    assert list(found.items())[:4] == [
        ("blk.0.attn_in", ["blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"]),
        ("blk.0.attn_out", ["blk.0.attn_output"]),
        ("blk.0.ffn_in", ["blk.0.ffn_gate", "blk.0.ffn_up"]),
        ("blk.0.ffn_down", ["blk.0.ffn_down"]),
    ]


def test_forward_leaves_gradients_to_the_caller(model, monkeypatch):
    """And they are those of the loss, which a short step against the gradient lowers by what they say."""
    torch = optional("torch")
    tokens = model.encode(TEXT)[:16]
    name = "blk.3.attn_k.weight"
    w = model.weights[name].clone().requires_grad_()

    def loss():
        return torch.nn.functional.cross_entropy(model.forward(tokens)[:-1], tokens[1:])

    assert model.logits(tokens).is_inference()
    assert torch.equal(model.forward(tokens), model.logits(tokens))
    assert not model.forward(tokens).requires_grad
    monkeypatch.setitem(model.weights, name, w)
    assert not model.logits(tokens).requires_grad
    before = loss()
    (gradient,) = torch.autograd.grad(before, w)
    length = (
        0.02 / gradient.norm() ** 2
    )  # the loss falls by 0.02: far above float32's steps, and not yet bent
    monkeypatch.setitem(model.weights, name, w.detach() - length * gradient)
    fallen = float(before.detach() - loss())
    print(f"loss {before.detach():.3f}, one step against the gradient lowers it by {fallen:.4f}")
    assert 0.015 < fallen < 0.025


def test_logits_equal_transformers(model):
    """The same weights in Hugging Face's Llama; it wants rows of Q and K in halves, GGUF has pairs."""
    torch, transformers = optional("torch"), optional("transformers")
    config = transformers.LlamaConfig(
        vocab_size=int(model.field("vocab_size")),
        hidden_size=int(model.field("embedding_length")),
        intermediate_size=int(model.field("feed_forward_length")),
        num_hidden_layers=int(model.field("block_count")),
        num_attention_heads=int(model.field("attention.head_count")),
        num_key_value_heads=int(model.field("attention.head_count_kv")),
        rms_norm_eps=model.field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": model.field("rope.freq_base")},
        tie_word_embeddings=True,
    )
    other = transformers.LlamaForCausalLM(config).eval()
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for name, w in model.weights.items():
        *block, kind, _ = name.split(".")
        if kind in ("attn_q", "attn_k"):
            w = w.unflatten(0, (-1, 32, 2)).transpose(1, 2).flatten(0, 2)
        prefix = f"model.layers.{block[1]}." if block else ""
        state[f"{prefix}{names[kind]}.weight"] = w
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert (set(missing), unexpected) == ({"lm_head.weight"}, [])
    tokens = model.encode(TEXT)[:256]
    with torch.inference_mode():
        theirs = other(tokens[None]).logits[0]
    difference = (model.logits(tokens) - theirs).abs().max().item()
    print(
        f"largest logit difference to transformers {transformers.__version__}: {difference:.1e} (256 tokens)"
    )
    assert difference < 1e-3  # of logits up to 30, float32 sums in another order


def test_inputs_beyond_float16_are_refused_by_name():
    optional("torch")
    from arcquant_ref.evaluate import _refuse_beyond_float16

    _refuse_beyond_float16("blk.3.ffn_down", np.float16([[65504, -65504]]))
    with pytest.raises(ValueError, match=r"2 calibration inputs of blk\.3\.ffn_down are NaN"):
        _refuse_beyond_float16("blk.3.ffn_down", np.float16([[np.inf, 1, np.nan]]))
