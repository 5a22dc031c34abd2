"""An NVFP4 tensor: codes, block scales and one tensor scale, all three multiplied to decode. And its file."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors

from . import checks, layout
from .formats import BLOCK, E2M1, E4M3, NVFP4_BITS, Codes


@dataclass(frozen=True, eq=False, kw_only=True)
class NVFP4Tensor:
    """An (M, K) matrix; value[m, k] = e2m1(codes[m, k]) · e4m3(block_scales[m, k // 16]) · tensor_scale.

    codes         (M, K) uint8, one E2M1 code 0 … 15 a byte
    block_scales  (M, K/16) uint8, E4M3 codes
    tensor_scale  one positive normal float32

    Raises TypeError or ValueError if these do not fit together. A NaN block scale can be held, as hardware
    does; the functions that need a value refuse it.
    """

    codes: Codes
    block_scales: Codes
    tensor_scale: np.float32

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # frozen: this is the one moment to normalise types
        set_(self, "codes", checks.codes("codes", self.codes, E2M1.bits))
        set_(self, "block_scales", checks.codes("block_scales", self.block_scales, E4M3.bits))
        set_(self, "tensor_scale", checks.tensor_scale(self.tensor_scale))
        checks.block_scales_fit(self.codes, self.block_scales, BLOCK)

    @property
    def shape(self) -> tuple[int, int]:
        rows, k = self.codes.shape
        return rows, k

    @property
    def bits_per_value(self) -> float:
        """Storage: 4 bits an element and one 8-bit scale for 16 of them. The tensor scale is not counted.

        >>> NVFP4Tensor(codes=np.zeros((1, 16), np.uint8), block_scales=np.zeros((1, 1), np.uint8),
        ...             tensor_scale=1).bits_per_value
        4.5
        """
        return NVFP4_BITS

    def map(self, f: Callable[[Any], Any]) -> "NVFP4Tensor":
        """The same tensor with `f` applied to codes and block scales: pick rows, reverse them, copy them."""
        return replace(self, codes=f(self.codes), block_scales=f(self.block_scales))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all; docs/spec.md, section 2, says what is in it.

        Raises ValueError for a block scale that is NaN or has a sign bit, or a path that is no regular file.
        """
        checks.scales_are_numbers("block_scales", self.block_scales, E4M3.nan_code)
        arrays: dict[str, tuple[str, np.ndarray]] = {
            "codes": ("uint8", layout.pack(self.codes)),
            "block_scales": ("float8_e4m3fn", self.block_scales),
            "tensor_scale": ("float32", np.asarray(self.tensor_scale)),
        }
        save_arrays(path, arrays, FILE_METADATA)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "NVFP4Tensor":
        """Read what `save` wrote. ValueError for a damaged or foreign file or an unusable block scale."""
        arrays = load_arrays(
            path, FILE_METADATA, {"codes": "U8", "block_scales": "F8_E4M3", "tensor_scale": "F32"}
        )
        try:
            checks.scales_are_numbers("block_scales", arrays["block_scales"], E4M3.nan_code)
            return NVFP4Tensor(
                codes=layout.unpack(arrays["codes"]),
                block_scales=arrays["block_scales"],
                tensor_scale=np.float32(arrays["tensor_scale"][()]),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold a valid NVFP4 tensor: {error}") from error


FILE_METADATA = {
    "format": "nvfp4",
    "version": "1",
    "value": "e2m1(codes[m, k]) * e4m3(block_scales[m, k // 16]) * tensor_scale",
    "codes": "(M, K/2) bytes: even k in the low nibble, odd k in the high nibble",
    "block_scales": "(M, K/16) E4M3, row-major, not swizzled",
    "tensor_scale": "float32, multiplies to decode",
}


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` only when the block ends without an exception."""
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} exists and is not a regular file. Write to another name.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} does not exist. Create it first.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_arrays(
    path: str | os.PathLike[str], arrays: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str]
) -> None:
    """Write named arrays with their safetensors dtypes; NumPy has none for E4M3."""
    kept = {name: np.require(a, requirements="C") for name, (_, a) in arrays.items()}  # alive while written
    specs = {
        name: safetensors.TensorSpec(
            dtype=arrays[name][0], shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes
        )
        for name, a in kept.items()
    }
    with written_whole(path) as file:
        file.write(safetensors.serialize(specs, metadata))


def load_arrays(
    path: str | os.PathLike[str], metadata: dict[str, str], dtypes: dict[str, str]
) -> dict[str, np.ndarray]:
    """Read the arrays of a file whose format, version and dtypes are these; ValueError says what differs."""
    numpy_dtypes = {"U8": np.uint8, "F8_E4M3": np.uint8, "F32": np.float32, "I64": np.int64}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            found = file.metadata() or {}
        entries = dict(safetensors.deserialize(Path(path).read_bytes()))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Write it again.") from error
    for key in ("format", "version"):
        if found.get(key) != metadata[key]:
            raise ValueError(
                f"{path} is not an {metadata['format']} file of version {metadata['version']}: its {key} is "
                f"{found.get(key)!r}. It holds {', '.join(sorted(entries)) or 'nothing'}."
            )
    held = {name: entry["dtype"] for name, entry in sorted(entries.items())}
    if held != dict(sorted(dtypes.items())):
        raise ValueError(f"{path} holds {held}; expected {dtypes}. Write it again.")
    return {
        name: np.frombuffer(entry["data"], numpy_dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries.items()
    }
