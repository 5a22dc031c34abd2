"""Matrices on which any two recipes differ: bfloat16 numbers on midpoints, small scales, zeros.

`python tests/stress.py` runs the peers that are installed on them and writes tests/golden/recipes/*.npz.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np

from arcquant_ref.formats import BLOCK, E2M1, E4M3
from emulator.recipes import RECIPES, quantize

GOLDEN = Path(__file__).parent / "golden/recipes"
SAVED = "scales between two, amax 1792, bfloat16"  # the matrix in the libraries' own files
DIFFERENCES = GOLDEN.with_name("recipe_differences.csv")
SHAPE = (32, 64)
BLOCKS = (32, 4, BLOCK)
POINTS = np.concatenate(
    [E2M1.midpoints, E2M1.magnitudes[1:]]
)  # where a recipe can change its mind, and between
STEP = np.float64(E4M3.least_positive)


def _blocks(rng: np.random.Generator, scales: np.ndarray, amax: float) -> np.ndarray:
    """Blocks of 6 · scale and elements on midpoints of E2M1 · scale; one element of the matrix is `amax`."""
    x = rng.choice(POINTS, BLOCKS) * rng.choice([-1, 1], BLOCKS)
    x[..., 3] = E2M1.max * rng.choice([-1, 1], BLOCKS[:2])
    x = (x * scales.reshape(*BLOCKS[:2], 1)).reshape(SHAPE)
    x[0, 0] = amax
    return x


def _significands(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    size = BLOCKS[:2]
    return (1 + rng.integers(0, 8, size) / 8) * np.exp2(rng.integers(low, high, size))


def matrices() -> dict[str, np.ndarray]:
    """By name, (32, 64): float32, float16, or bfloat16 as its bits in uint16."""
    rng = np.random.default_rng(7)
    top = E2M1.max * E4M3.max  # the tensor amax at which the tensor scale is 1
    gaussian = rng.standard_normal(SHAPE)
    ties = _blocks(rng, _significands(rng, -6, 8), top)
    near = _blocks(rng, _significands(rng, -6, 6) * (3008 / top), -3008)
    between = (1 + (2 * rng.integers(0, 8, BLOCKS[:2]) + 1) / 16) * np.exp2(rng.integers(-6, 8, BLOCKS[:2]))
    subnormal = rng.choice([0.25, 0.5, 0.75, 1, 1.4, 1.5, 1.6, 2.5, 3.5, 7.5, 20, 60], BLOCKS[:2]) * STEP
    holes = rng.choice([0.0, -0.0, 1.0, 1.0], SHAPE)
    zeros = np.where(rng.random(BLOCKS[:2])[..., None] < 0.5, 0, gaussian.reshape(BLOCKS)).reshape(SHAPE)
    spread = gaussian * np.exp2(rng.integers(-30, 1, (SHAPE[0], 1)))
    one_huge = gaussian.copy()
    one_huge[5, 17] = 1e30
    bf16 = {
        "ties": ties,
        "near ties": near,
        "scales between two": _blocks(rng, between, top),
        "scales between two, amax 1120": _blocks(rng, between * (1120 / top), 1120),
        "scales between two, amax 1792": _blocks(rng, between * (1792 / top), 1792),
        "subnormal scales": _blocks(rng, subnormal, top) * holes,
        "subnormal scales, other amax": _blocks(rng, subnormal / 7, top / 7) * holes,
        "zero blocks": zeros * holes,
        "spread over binades": spread,
        "one huge value": one_huge,
        "negative maxima": -np.abs(gaussian) * 3,
        "heavy tails": rng.standard_t(1.2, SHAPE),
        "tiny": (gaussian + np.copysign(0.01, gaussian)) * 1e-37,
        "largest": np.where(gaussian > 2, 3.3e38, gaussian * 1e37),
    }
    float32 = {"gaussian": gaussian, "near ties": np.nextafter(near.astype(np.float32), np.float32(0))}
    float16 = {"ties": ties, "other amax": near, "small": gaussian / 200, "spread over binades": spread}
    return (
        {f"{name}, bfloat16": to_bf16(x) for name, x in bf16.items()}
        | {f"{name}, float32": x.astype(np.float32) for name, x in float32.items()}
        | {f"{name}, float16": x.astype(np.float16) for name, x in float16.items()}
        | {"all zero, bfloat16": np.zeros(SHAPE, np.uint16)}
    )


def to_bf16(x: np.ndarray) -> np.ndarray:
    import ml_dtypes

    with np.errstate(over="ignore", under="ignore"):
        return x.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def inputs() -> dict[str, np.ndarray]:
    """The matrices as committed."""
    with np.load(GOLDEN / "inputs.npz") as file:
        return dict(file)


def golden(recipe: str) -> tuple[dict[str, str], dict[str, tuple[np.ndarray, ...]]]:
    """What the package made of them: its version, and (packed codes, scales, tensor scale) by matrix."""
    with np.load(GOLDEN / f"{file_name(recipe)}.npz") as file:
        parts = zip(file["codes"], file["scales"], file["tensor_scale"])
        return json.loads(str(file["about"])), dict(zip(file["names"].tolist(), parts))


def differences() -> list[list[str]]:
    """A table: how many block scales and codes two recipes disagree in, over all matrices."""
    made = {name: [quantize(recipe, x) for x in inputs().values()] for name, recipe in RECIPES.items()}

    def count(a: str, b: str) -> int:
        parts = [(p.codes != q.codes, p.block_scales != q.block_scales) for p, q in zip(made[a], made[b])]
        return sum(int(codes.sum() + scales.sum()) for codes, scales in parts)

    return [["", *made], *([a, *(str(count(a, b)) for b in made)] for a in made)]


def file_name(recipe: str) -> str:
    return re.sub("[^a-z0-9]+", "-", recipe.replace("/", "over").lower()).strip("-")


def checkpoint(recipe: str) -> Path:
    return GOLDEN / f"{file_name(recipe)}.safetensors"


def write() -> None:
    import peers
    import torch
    from safetensors.torch import save_file

    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN / "inputs.npz", **matrices())
    for recipe, peer in peers.PEERS.items():
        try:
            version = peers.version(peer.distribution)
        except peers.NotInstalled as reason:
            print(f"{recipe}: kept, {reason}")
            continue
        about = {"recipe": recipe, peer.distribution: version, "torch": torch.__version__}
        taken = {name: x for name, x in inputs().items() if x.dtype.name in peer.dtypes}
        codes, scales, tensor_scales = zip(*(peer.run(x) for x in taken.values()))
        np.savez_compressed(
            GOLDEN / f"{file_name(recipe)}.npz",
            about=json.dumps(about),
            names=list(taken),
            codes=codes,
            scales=scales,
            tensor_scale=tensor_scales,
        )
        print(f"{recipe}: written, {about}")
        if recipe in peers.CHECKPOINTS:
            tensors, metadata = peers.CHECKPOINTS[recipe](inputs()[SAVED])
            save_file(tensors, checkpoint(recipe), metadata)
    with open(DIFFERENCES, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(differences())


if __name__ == "__main__":
    write()
