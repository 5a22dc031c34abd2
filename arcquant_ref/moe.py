"""A small mixture of experts with Llama's layers: trained here, since no package ships one. Extra `model`.

Byte by byte: 256 tokens, UTF-8. Each token goes to 2 of 8 experts; all of K is 256, so that every scheme of
`arcquant model` applies. Sources: Mixtral (arXiv 2401.04088); the loss that balances the experts is Switch
Transformer's (arXiv 2101.03961, equation 4). Names are GGUF's, with a matrix for each expert.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .model import SITES, Llama
from .tensor import load_arrays, save_arrays

CONFIG: dict[str, float] = {
    "block_count": 4,
    "embedding_length": 256,
    "expert_feed_forward_length": 256,
    "expert_count": 8,
    "expert_used_count": 2,
    "vocab_size": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 64,
    "rope.freq_base": 10000.0,
}
FILE_METADATA = {"format": "expert-mixture", "version": "1"}
Router = Callable[[str, Tensor, Tensor], Tensor]


class MixtureOfExperts(Llama):
    """A decoder of Llama's layers with experts in the place of each MLP, one sequence at a time.

    Its linear layers go through `linear` as in `Llama`, those of an expert with the tokens routed to it, and
    not at all if there are none. The router's logits are `router(name, x, w)`: replace it to observe or to
    set where tokens go.
    """

    def __init__(self, config: dict[str, float], weights: dict[str, Tensor]) -> None:
        """Weights of `shapes(config)`, float32. Raises ValueError for other names or shapes."""
        found = {name: tuple(w.shape) for name, w in weights.items()}
        if found != shapes(config):
            different = {name for name, _ in found.items() ^ shapes(config).items()}
            raise ValueError(
                f"weights differ from shapes(config) in {min(different)}, the first of {len(different)}. "
                f"`arcquant moe` trains a whole model."
            )
        self.config, self.weights = config, weights
        self.linear = lambda name, x, w: x @ w.T
        self.router: Router = lambda name, x, w: x @ w.T

    def encode(self, text: str) -> Tensor:
        """(T,) token ids, int64: the bytes of the text in UTF-8."""
        return torch.tensor(list(text.encode()), dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        return bytes(tokens.tolist()).decode(errors="replace")

    def sites(self) -> dict[str, list[str]]:
        """As in `Llama`; the inputs of two experts are two sites, even where they hold the same token."""
        found: dict[str, list[str]] = {}
        for i in range(int(self.field("block_count"))):
            for site in ("attn_in", "attn_out"):
                found[f"blk.{i}.{site}"] = [f"blk.{i}.{name}" for name in SITES[site]]
            for e in range(self.experts):
                found[f"blk.{i}.expert_in.{e}"] = [f"blk.{i}.ffn_gate.{e}", f"blk.{i}.ffn_up.{e}"]
                found[f"blk.{i}.expert_down.{e}"] = [f"blk.{i}.ffn_down.{e}"]
        return found

    @property
    def experts(self) -> int:
        return int(self.field("expert_count"))

    def chosen(self, logits: Tensor) -> Tensor:
        """(T, experts) router logits → (T, used) int64: the experts of each token, the best first."""
        return logits.topk(int(self.field("expert_used_count"))).indices

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        name = f"blk.{layer}.ffn_gate_inp"
        logits = self.router(name, x, self.weights[f"{name}.weight"])
        chosen = self.chosen(logits)
        shares = F.softmax(logits.gather(1, chosen), dim=1)
        y = torch.zeros_like(x)
        for expert in range(self.experts):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            if len(token):
                mixed = self._expert(layer, expert, x[token]) * shares[token, place, None]
                y = y.index_add(0, token, mixed)
        return y

    def _expert(self, layer: int, expert: int, x: Tensor) -> Tensor:
        def apply(kind: str, x: Tensor) -> Tensor:
            return self._apply(f"blk.{layer}.ffn_{kind}.{expert}", x)

        return apply("down", F.silu(apply("gate", x)) * apply("up", x))

    def fingerprint(self) -> str:
        """Of the weights, so that results say what they were found with."""
        digest = hashlib.sha256()
        for _, w in sorted(self.weights.items()):
            digest.update(w.numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        arrays = {name: ("float32", w.detach().numpy()) for name, w in self.weights.items()}
        save_arrays(path, arrays, FILE_METADATA | {"config": json.dumps(self.config)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "MixtureOfExperts":
        """Read what `save` wrote. Raises ValueError for a damaged or foreign file."""
        try:
            with safetensors.safe_open(path, framework="np") as file:
                config = json.loads((file.metadata() or {})["config"])
            arrays = load_arrays(path, FILE_METADATA, dict.fromkeys(shapes(config), "F32"))
            return MixtureOfExperts(config, {n: torch.from_numpy(w.copy()) for n, w in arrays.items()})
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{path} is not a file of `arcquant moe -o` ({error}). Of a Hugging Face model give the "
                f"folder."
            ) from error


def shapes(config: dict[str, float]) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, (outputs, inputs), by its name."""
    d, f, experts = (
        int(config[key]) for key in ("embedding_length", "expert_feed_forward_length", "expert_count")
    )
    size = int(config["rope.dimension_count"])
    q, kv = (int(config[f"attention.head_count{end}"]) * size for end in ("", "_kv"))
    layer: dict[str, tuple[int, ...]] = {"attn_norm": (d,), "ffn_norm": (d,), "ffn_gate_inp": (experts, d)}
    layer |= {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q)}
    for e in range(experts):
        layer |= {f"ffn_gate.{e}": (f, d), f"ffn_up.{e}": (f, d), f"ffn_down.{e}": (d, f)}
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (int(config["vocab_size"]), d),
        "output_norm.weight": (d,),
    }
    for i in range(int(config["block_count"])):
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


@contextmanager
def routed(model: MixtureOfExperts, router: Router) -> Iterator[None]:
    """The model with this in the place of its router."""
    plain, model.router = model.router, router
    try:
        yield
    finally:
        model.router = plain


WINDOWS, LENGTH = 2, 512  # of a step
PEAK, WARMUP, DECAY, BALANCE = 3e-3, 50, 0.1, 0.01


def train(
    documents: Iterable[str], steps: int, config: dict[str, float] = CONFIG, seed: int = 0
) -> MixtureOfExperts:
    """A model trained on windows from random places of these texts: AdamW, a cosine, balanced experts.

    The same seed, machine and number of threads give the same weights. Raises ValueError for steps below 1 or
    a text that is no longer than a window.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    chance = torch.Generator().manual_seed(seed)
    model = initial(config, chance)
    ids = model.encode("\n\n".join(documents))
    if len(ids) <= LENGTH:
        raise ValueError(f"documents have {len(ids)} bytes; windows of {LENGTH} need more text.")
    weights = list(model.weights.values())
    matrices = [w for w in weights if w.ndim == 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step in (progress := tqdm(range(steps), "training", disable=None)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1, (step + 1) / WARMUP) * (1 + np.cos(np.pi * step / steps)) / 2
        starts = torch.randint(len(ids) - LENGTH, (WINDOWS,), generator=chance)
        with _repeatable():
            found = [_descend(model, ids[start : start + LENGTH]) for start in starts.tolist()]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{np.mean(found):.3f}", refresh=False)
    for w in weights:
        w.requires_grad_(False)
    return model


def initial(config: dict[str, float], chance: torch.Generator) -> MixtureOfExperts:
    """Norms of 1, matrices normal with deviation 0.02, those that write to the residual stream smaller."""
    weights = {}
    for name, shape in shapes(config).items():
        last = ".attn_output." in name or ".ffn_down." in name
        deviation = 0.02 / (2 * config["block_count"]) ** 0.5 if last else 0.02
        normal = torch.randn(shape, generator=chance) * deviation
        weights[name] = (normal if len(shape) == 2 else torch.ones(shape)).requires_grad_()
    return MixtureOfExperts(config, weights)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Sums over indices in a fixed order: without it two threads add them as they come."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _descend(model: MixtureOfExperts, ids: Tensor) -> float:
    """Add a window's part of the gradient; returns its loss without the balance."""
    balance: list[Tensor] = []

    def observe(name: str, x: Tensor, w: Tensor) -> Tensor:
        logits = x @ w.T
        balance.append(imbalance(logits, model.chosen(logits)))
        return logits

    with routed(model, observe):
        loss = F.cross_entropy(model.forward(ids)[:-1], ids[1:])
    ((loss + BALANCE * torch.stack(balance).mean()) / WINDOWS).backward()
    return float(loss.detach())


def imbalance(logits: Tensor, chosen: Tensor) -> Tensor:
    """experts · Σ_e (part of the calls) · (mean probability) of expert e: 1 where all are used alike."""
    experts = logits.shape[1]
    calls = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    return experts * (calls * logits.softmax(dim=1).mean(dim=0)).sum()
