"""What several test files need: backends, optional packages, comparison of tensors byte by byte."""

import importlib
import os
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from arcquant_ref import NVFP4Tensor, backends
from arcquant_ref.baselines import ExponentRule, ceiling_exponent
from gpu import load

REQUIRED = set(filter(None, os.environ.get("ARCQUANT_REQUIRE", "").split(",")))


def optional(name: str) -> ModuleType:
    """The module, or a skip with the reason; a failure under ARCQUANT_REQUIRE=torch, where all extras are."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if "torch" in REQUIRED:
            pytest.fail(f"ARCQUANT_REQUIRE=torch, but {error}")
        pytest.skip(f"{name} is not installed")


def model_weights() -> Path:
    """The GGUF file of the language model, or a skip; a failure under ARCQUANT_REQUIRE=torch."""
    for name in ("torch", "gguf", "tokenizers"):
        optional(name)
    from arcquant_ref.model import find_weights

    try:
        return find_weights()
    except FileNotFoundError as error:
        if "torch" in REQUIRED:
            raise
        pytest.skip(str(error))


def cuda_compiler() -> None:
    """Skip a whole file where CuPy or NVRTC is missing; a failure under ARCQUANT_REQUIRE=gpu."""
    try:
        load.nvrtc()
    except ImportError as error:
        if "gpu" in REQUIRED:
            raise
        pytest.skip(str(error), allow_module_level=True)


def usable_backends() -> list[str]:
    return [name for name, reason in backends.available().items() if reason is None or name in REQUIRED]


every_backend = pytest.mark.parametrize(
    "backend", [backends.get(name) for name in usable_backends()], ids=usable_backends()
)


# What knows residuals of weights and searched block scales; gpu knows residuals of activations only
TWO_SIDED = [name for name in usable_backends() if hasattr(backends.get(name), "quantize_weighted")]
every_two_sided_backend = pytest.mark.parametrize(
    "backend", [backends.get(name) for name in TWO_SIDED], ids=TWO_SIDED
)


def assert_same_tensor(got: NVFP4Tensor, expected: NVFP4Tensor) -> None:
    """Codes, block scales and tensor scale equal as bytes; a mismatch prints index, got, expected."""
    for part in ("codes", "block_scales"):
        a, b = getattr(got, part), getattr(expected, part)
        assert a.shape == b.shape, f"{part}: shape {a.shape}, expected {b.shape}"
        different = np.argwhere(a != b)
        if len(different):
            i = tuple(different[0])
            pytest.fail(f"{part}: {len(different)} differ, first at {i}: got {a[i]:#x}, expected {b[i]:#x}")
    assert got.tensor_scale.tobytes() == expected.tensor_scale.tobytes()


def all_bf16() -> NDArray[np.float32]:
    """All 65,536 bfloat16 bit patterns as float32, NaN and inf included."""
    return (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)


def finite_bf16() -> NDArray[np.float32]:
    x = all_bf16()
    return x[np.isfinite(x)]


def in_bfloat16(constant: Fraction, rule: ExponentRule) -> float:
    """What bfloat16 attains of an MX constant. The ceiling rule's is a midpoint of few bits: all of it. The
    floor rule's is the limit 1 − max / 2p, as amax goes to 2p: bfloat16 goes to 2p (1 − 2⁻⁸)."""
    return float(constant if rule is ceiling_exponent else 1 - (1 - constant) / (1 - Fraction(1, 256)))


def neighbours(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every value, the float32 just below and the one just above."""
    return np.concatenate([x, np.nextafter(x, np.float32(-np.inf)), np.nextafter(x, np.float32(np.inf))])
