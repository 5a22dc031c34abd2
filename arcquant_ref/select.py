"""Which channels get a residual: calibration, the selection and its rules (docs/spec.md, section 4)."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .formats import BLOCK, NVFP4_BITS, Float32
from .tensor import load_arrays, save_arrays

TAU = 2.0**-3  # the paper's rule: 2^−(5 − 2), from the exponent bits of E5M2 and E2M1 (arXiv 2601.07475)


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """A channel order for one layer, and which of its channels carry a residual.

    order            (K,) int64, any permutation; `select` makes it ascending in channel_amax, outliers last
    num_residual     S, a multiple of 16 with 0 <= S <= K: the last S of `order` carry their activations'
    channel_amax     (K,) float32, max |x| of each channel over the calibration rows, in the original order
    weight_channels  (S_w,) int64, different channels in blocks of 16: these carry their weights' residual,
                     and their activations are stored a second time. Not part of the paper; none by default

    Raises TypeError or ValueError if these do not fit together.
    """

    order: NDArray[np.int64]
    num_residual: int
    channel_amax: Float32
    weight_channels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "order", checks.channel_order(self.order))
        set_(self, "channel_amax", checks.channel_amax(self.channel_amax, BLOCK))
        checks.selection_fits("channel_amax", len(self.channel_amax), self.K)
        set_(self, "num_residual", checks.num_residual(self.num_residual, self.K, BLOCK))
        set_(self, "weight_channels", checks.weight_channels(self.weight_channels, self.K, BLOCK))

    @property
    def K(self) -> int:
        """How many channels the layer has."""
        return len(self.order)

    @property
    def columns(self) -> NDArray[np.int64]:
        """The channels of the primary codes, (K + S_w,): `order`, the weight channels before its last S."""
        plain = self.K - self.num_residual
        return np.concatenate([self.order[:plain], self.weight_channels, self.order[plain:]])

    @property
    def augmented_K(self) -> int:
        """K' = K + S + S_w, the depth of the product."""
        return self.K + self.num_residual + len(self.weight_channels)

    @property
    def bits_per_value(self) -> float:
        """Storage for one activation: 4.5 · K' / K."""
        return NVFP4_BITS * self.augmented_K / self.K

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        arrays = {
            "order": ("int64", self.order),
            "num_residual": ("int64", np.asarray(self.num_residual)),
            "channel_amax": ("float32", self.channel_amax),
            "weight_channels": ("int64", self.weight_channels),
        }
        save_arrays(path, arrays, FILE_METADATA)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Selection":
        """Read what `save` wrote. Raises ValueError for a damaged or foreign file."""
        dtypes = {"order": "I64", "num_residual": "I64", "channel_amax": "F32", "weight_channels": "I64"}
        arrays = load_arrays(path, FILE_METADATA, dtypes)
        try:
            return Selection(
                order=arrays["order"],
                num_residual=int(arrays["num_residual"][()]),
                channel_amax=arrays["channel_amax"],
                weight_channels=arrays["weight_channels"],
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold a valid selection: {error}") from error


FILE_METADATA = {"format": "nvfp4-selection", "version": "2"}


def calibrate(batches: Iterable[ArrayLike]) -> Float32:
    """channel_amax (K,): max |x| of each channel over all rows of all (rows, K) batches, read one by one.

    Raises ValueError for no batches, batches of different K, or a batch that `quantize` would refuse.

    >>> calibrate([np.full((2, 16), -3.0), np.eye(16)]).max()
    np.float32(3.0)
    """
    if isinstance(batches, np.ndarray) and batches.ndim == 2:
        raise ValueError("batches is one matrix; pass a list of them, [x].")
    amax: Float32 | None = None
    for i, batch in enumerate(batches):
        batch_amax = np.abs(checks.matrix(f"batches[{i}]", batch, BLOCK)).max(axis=0)
        if amax is not None and len(amax) != len(batch_amax):
            raise ValueError(
                f"batches[{i}] has K={len(batch_amax)} but the batches before it have K={len(amax)}. "
                f"Calibrate each layer on its own."
            )
        amax = batch_amax if amax is None else np.maximum(amax, batch_amax)
    if amax is None:
        raise ValueError(
            "batches is empty; give at least one (rows, K) matrix. A single matrix goes in as [x]."
        )
    return amax


def select(channel_amax: ArrayLike, tau: float = TAU, multiple: int = BLOCK) -> Selection:
    """The paper's rule: channels above tau · max are outliers; S is their number, rounded up to `multiple`.

    The authors' code uses multiple = 64. S is at most K. Raises ValueError for a bad channel_amax, tau
    outside 0 … 1 or multiple not a multiple of 16.

    >>> amax = np.ones(32); amax[5] = 100
    >>> s = select(amax)
    >>> s.num_residual, int(s.order[-1])
    (16, 5)
    """
    amax = checks.channel_amax(channel_amax, BLOCK)
    multiple = checks.multiple_of("multiple", multiple, BLOCK)
    outliers = int((amax > checks.fraction("tau", tau) * np.float64(amax.max())).sum())
    return select_top(amax, min(-(-outliers // multiple) * multiple, len(amax)))


def select_top(channel_amax: ArrayLike, num_residual: int) -> Selection:
    """A fixed number S of residual channels: the largest channel_amax; of equals, the later ones.

    Raises ValueError for a bad channel_amax, or S not a multiple of 16 from 0 to K.
    """
    amax = checks.channel_amax(channel_amax, BLOCK)
    return Selection(order=np.argsort(amax, kind="stable"), num_residual=num_residual, channel_amax=amax)
