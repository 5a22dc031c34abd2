"""A Llama-family model from disk: a GGUF file or a Hugging Face folder. Needs the extra `model`.

Both come out alike: GGUF's names, float32, and GGUF's order of rows in Q and K, where the two numbers that
RoPE turns together are neighbours. Hugging Face keeps them half a head apart. What would make the model
another one (biases, experts, scaled positions, quantized weights) is refused.
Sources: Llama 2 (arXiv 2307.09288), the GGUF specification, Transformers' Llama and its `llama3` RoPE.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

WANTED = "Give a GGUF file, or a folder with config.json, tokenizer.json and *.safetensors."
ROPE_BASE = 10000.0  # where a file names none: llama.cpp and Transformers agree


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """config: GGUF's keys without `llama.`; weights: GGUF's names, float32, (outputs, inputs); tokenizer."""

    config: dict[str, float]
    weights: dict[str, Tensor]
    tokenizer: Tokenizer


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """The model in a GGUF file or a Hugging Face folder; nothing is downloaded.

    Raises FileNotFoundError for what is not there, ValueError for a damaged file, another architecture, or
    tensors that are missing, left over or of another shape.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. {WANTED}")
    found = read_folder(path) if path.is_dir() else read_gguf(path)
    _check_tensors(path, found)
    return found


def _head_size(width: Any, heads: Any) -> Any:
    """Of one head; None where one of these is no positive integer, which `_check_config` refuses."""
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else None


def _check_config(path: Path, config: dict[str, Any]) -> dict[str, float]:
    """Positive numbers, heads that share keys evenly, and RoPE over whole heads."""
    for key, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{path} has {key}={value!r}; a plain Llama has one positive number. {WANTED}")
    heads, kv, size = (
        config[key] for key in ("attention.head_count", "attention.head_count_kv", "rope.dimension_count")
    )
    if heads % kv:
        raise ValueError(f"{path} has {heads} heads of Q and {kv} of K; Q must be a multiple. {WANTED}")
    keys, values = (config[f"attention.{part}_length"] for part in ("key", "value"))
    if size % 2 or {keys, values} != {size}:
        raise ValueError(
            f"{path} has heads of {keys} keys and {values} values and turns {size} of them; a plain Llama "
            f"turns whole heads of an even size. {WANTED}"
        )
    return config


def _shapes(config: dict[str, float]) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the tensors that a model must have, and of those that it may have."""
    size = int(config["rope.dimension_count"])
    q, kv = (int(config[f"attention.head_count{end}"]) * size for end in ("", "_kv"))
    d, f, v = (int(config[key]) for key in ("embedding_length", "feed_forward_length", "vocab_size"))
    layer: dict[str, tuple[int, ...]] = {"attn_norm": (d,), "ffn_norm": (d,)}
    layer |= {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q)}
    layer |= {"ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f)}
    needed: dict[str, tuple[int, ...]] = {"token_embd.weight": (v, d), "output_norm.weight": (d,)}
    for i in range(int(config["block_count"])):
        needed |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return needed, {"output.weight": (v, d), "rope_freqs.weight": (size // 2,)}


def _check_tensors(path: Path, found: Checkpoint) -> None:
    needed, allowed = _shapes(found.config)
    for what, names in {
        "lacks tensors of its config": needed.keys() - found.weights.keys(),
        "has tensors that a plain Llama has not": found.weights.keys() - needed.keys() - allowed.keys(),
    }.items():
        if names:
            raise ValueError(
                f"{path} {what}: {min(names)} (a GGUF name where there is one) is the first of {len(names)}. "
                f"Biases, experts and parts of a file are not supported; give all of one Llama model."
            )
    for name, w in found.weights.items():
        shape = (needed | allowed)[name]
        if w.shape != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(w.shape)}; its config says {shape}. {WANTED}")


# Further keys of GGUF's that leave a plain Llama what it is, and with which values
HARMLESS: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none",),
}
UNUSED = {"context_length", "tensor_data_layout"}
NORMAL, CONTROL = 1, 3  # types of tokens


def read_gguf(path: Path) -> Checkpoint:
    """The model in a GGUF file of the architecture `llama`, dequantized. Errors as in `read`."""
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError) as error:  # its reader maps what it is given
        raise ValueError(f"{path} is damaged or not a GGUF file ({error}). {WANTED}") from error
    config = _gguf_config(path, fields)
    tokenizer = _gguf_tokenizer(path, fields)
    try:
        weights = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    except NotImplementedError as error:
        raise ValueError(f"{path}: {error} in gguf. Give the model in Q8_0, F16 or BF16.") from error
    return Checkpoint(config=config, weights=weights, tokenizer=tokenizer)


def _gguf_config(path: Path, fields: dict[str, Any]) -> dict[str, float]:
    if fields.get("general.architecture") != "llama":
        raise ValueError(
            f"{path} has general.architecture={fields.get('general.architecture')!r}; only 'llama' is "
            f"supported. Give a model of the Llama family."
        )
    given = {key.removeprefix("llama."): v for key, v in fields.items() if key.startswith("llama.")}
    try:
        heads = given["attention.head_count"]
        size = _head_size(given["embedding_length"], heads)
        config = {
            "block_count": given["block_count"],
            "embedding_length": given["embedding_length"],
            "feed_forward_length": given["feed_forward_length"],
            "vocab_size": given.get("vocab_size", len(fields["tokenizer.ggml.tokens"])),
            "attention.head_count": heads,
            "attention.head_count_kv": given.get("attention.head_count_kv", heads),
            "attention.key_length": given.get("attention.key_length", size),
            "attention.value_length": given.get("attention.value_length", size),
            "attention.layer_norm_rms_epsilon": given["attention.layer_norm_rms_epsilon"],
            "rope.dimension_count": given.get("rope.dimension_count", size),
            "rope.freq_base": given.get("rope.freq_base", ROPE_BASE),
        }
    except KeyError as error:
        raise ValueError(f"{path} has no field {error}, which a Llama needs. {WANTED}") from error
    for key in sorted(given.keys() - config.keys()):
        if key not in UNUSED and given[key] not in HARMLESS.get(key, ()):
            raise ValueError(f"{path} has llama.{key}={given[key]!r}, which a plain Llama has not. {WANTED}")
    return _check_config(path, config)


def _gguf_tokenizer(path: Path, fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE that splits numbers into digits first: llama.cpp's rule `smollm`."""
    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"{path} has a tokenizer of model {kind[0]!r} and rule {kind[1]!r}; of GGUF's only 'gpt2' with "
            f"'smollm' is supported. Give the model as a Hugging Face folder: its tokenizer.json says it all."
        )
    names = [f"tokenizer.ggml.{part}" for part in ("tokens", "merges", "token_type")]
    for name in names:
        if name not in fields:
            raise ValueError(f"{path} has no field {name!r}, which its tokenizer needs. {WANTED}")
    tokens, merges, types = (fields[name] for name in names)
    if set(types) - {NORMAL, CONTROL}:
        raise ValueError(
            f"{path} has tokens of types {sorted(set(types))}; of GGUF's only {NORMAL} (normal) and "
            f"{CONTROL} (control) are supported. Give the model as a Hugging Face folder."
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.add_special_tokens([token for token, type_ in zip(tokens, types) if type_ == CONTROL])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# What a config says of a plain Llama (None: nothing, or null), and the way out
PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_type": (("llama", "mistral"), "Give a model of the Llama family; qwen2, for one, has biases."),
    "quantization_config": ((None,), "Give the checkpoint that it was quantized from."),
    "hidden_act": (("silu", None), "Give a model of the Llama family."),
    "attention_bias": ((False, None), "Give a model without biases."),
    "mlp_bias": ((False, None), "Give a model without biases."),
    "partial_rotary_factor": ((1, None), "Give a model that turns whole heads."),
    "sliding_window": ((None,), "Where no text is longer than the window, write null there."),
    "layer_types": ((None,), "Give a model whose layers are all alike."),
}
UNSAID = {
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8}
}  # what Transformers reads into absence


def read_folder(folder: Path) -> Checkpoint:
    """The model in a folder with config.json, tokenizer.json and *.safetensors. Errors as in `read`."""
    settings = _read_json(folder / "config.json")
    settings = UNSAID.get(str(settings.get("model_type")), {}) | settings
    for key, (allowed, way_out) in PLAIN.items():
        if settings.get(key) not in allowed:
            raise ValueError(
                f"{folder / 'config.json'} has {key}={settings.get(key)!r}; it must be "
                f"{' or '.join(map(repr, allowed))}. {way_out}"
            )
    config = _folder_config(folder, settings)
    weights = {_gguf_name(name): w for name, w in _folder_tensors(folder)}
    size = int(config["rope.dimension_count"])
    for name, w in weights.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")) and len(w) % size == 0:
            weights[name] = (
                w.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)
            )  # halves to pairs
    _check_head(folder, settings.get("tie_word_embeddings", False), weights)
    factors = _rope_factors(folder, settings, size, config["rope.freq_base"])
    if factors is not None:
        weights["rope_freqs.weight"] = factors
    return Checkpoint(config=config, weights=weights, tokenizer=_folder_tokenizer(folder))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. {WANTED}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON or not UTF-8
        raise ValueError(f"{path} is damaged or not JSON ({error}). {WANTED}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object. {WANTED}")
    return found


def _folder_config(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    try:
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        size = settings.get("head_dim") or _head_size(hidden, heads)
        config = {
            "block_count": settings["num_hidden_layers"],
            "embedding_length": hidden,
            "feed_forward_length": settings["intermediate_size"],
            "vocab_size": settings["vocab_size"],
            "attention.head_count": heads,
            "attention.head_count_kv": settings.get("num_key_value_heads") or heads,
            "attention.key_length": size,
            "attention.value_length": size,
            "attention.layer_norm_rms_epsilon": settings["rms_norm_eps"],
            "rope.dimension_count": size,
            "rope.freq_base": _rope(settings).get("rope_theta", settings.get("rope_theta", ROPE_BASE)),
        }
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} has no {error}, which a Llama needs. {WANTED}") from error
    return _check_config(folder / "config.json", config)


def _rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Since Transformers 5 `rope_parameters`, before `rope_scaling`; null or absent without scaling."""
    return settings.get("rope_parameters") or settings.get("rope_scaling") or {}


def _rope_factors(folder: Path, settings: dict[str, Any], size: int, base: float) -> Tensor | None:
    """What divides the frequency of each pair, (size / 2,), as GGUF stores it; None where nothing does.

    `llama3`: wavelengths beyond the first context are stretched by `factor`, short ones stay, between them
    the frequency is interpolated.
    """
    rope = _rope(settings)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind == "default" and rope.keys() <= known and rope.get("partial_rotary_factor", 1) == 1:
        return None
    if kind != "llama3" or not set(llama3) <= rope.keys() <= known | set(llama3):
        raise ValueError(
            f"{folder / 'config.json'} scales positions by {rope}; supported are rope_type 'default' and "
            f"'llama3' with {', '.join(llama3)}. Give a model without that scaling."
        )
    factor, low, high, context = (float(rope[key]) for key in llama3)
    turns = context / (2 * math.pi) * base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / factor)).float()


def _folder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and float32 values of all tensors, shard by shard."""
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it cannot be iterated)
                    if not name.endswith("rotary_emb.inv_freq"):  # computed; old checkpoints hold it
                        yield name, _as_float32(path, name, file.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}).") from error


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        paths = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{index} names {path.name}, which does not exist. Fetch it too.")
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != 1:
        raise ValueError(
            f"{folder} holds {len(paths)} files *.safetensors; without model.safetensors.index.json it must "
            f"be one. Weights in *.bin are not read: save them again with safe_serialization=True."
        )
    return paths


def _as_float32(path: Path, name: str, w: Tensor) -> Tensor:
    if w.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"{path}: {name} is {w.dtype}; weights are bfloat16, float16 or float32. "
            f"Give the checkpoint that it was quantized from."
        )
    return w.float()


def _gguf_name(name: str) -> str:
    """GGUF's name of a tensor; its own where GGUF has none for a plain Llama."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match and match[2] in GGUF_NAMES:
        return f"blk.{match[1]}.{GGUF_NAMES[match[2]]}.weight"
    stem = name.removesuffix(".weight")
    return f"{GGUF_NAMES[stem]}.weight" if stem in GGUF_NAMES else name


def _check_head(folder: Path, tied: bool, weights: dict[str, Tensor]) -> None:
    """An untied head is there; a tied one, if it is, holds the embeddings."""
    head, embeddings = weights.get("output.weight"), weights.get("token_embd.weight")
    if not tied and head is None:
        raise ValueError(f"{folder} lacks lm_head.weight, but its config does not tie the embeddings.")
    if tied and head is not None and embeddings is not None and not torch.equal(head, embeddings):
        raise ValueError(
            f"{folder} has tie_word_embeddings=True and an lm_head.weight that is not the embeddings. "
            f"Write false in config.json to use it, or take it out of the file."
        )


def _folder_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. From other formats Transformers writes it: "
            f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is damaged or not a tokenizer ({error}).") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
