"""How codes and scales lie in memory for kernels and files. The method itself does not need this page."""

import numpy as np
from numpy.typing import NDArray

from . import checks
from .formats import E2M1, E4M3, Codes

TILE_ROWS, TILE_COLS = 128, 4  # one tile of scale factors: 512 bytes


def pack(codes: Codes) -> Codes:
    """(M, K) uint8 codes → (M, K/2) uint8: even k in the low nibble, odd k in the high one.

    Raises TypeError unless uint8, ValueError for codes above 15, another rank or an odd K.

    >>> pack(np.uint8([[1, 2, 3, 4]]))
    array([[33, 67]], dtype=uint8)
    """
    codes = checks.pairs_of_codes("codes", codes, E2M1.bits)
    pairs = np.ascontiguousarray(codes).view("<u2")  # even k in the low byte, odd k in the high one
    return np.bitwise_or(pairs, pairs >> E2M1.bits, dtype=np.uint8, casting="unsafe")


def unpack(packed: Codes) -> Codes:
    """(M, K/2) uint8 → (M, K) uint8 codes; the inverse of `pack`. Errors as there.

    >>> unpack(np.uint8([[0x21, 0x43]]))
    array([[1, 2, 3, 4]], dtype=uint8)
    """
    packed = checks.codes("packed", packed, 2 * E2M1.bits)
    if packed.ndim != 2:
        raise ValueError(f"packed has shape {packed.shape}; it must be (M, K/2) bytes.")
    low_high = np.stack([packed & (2**E2M1.bits - 1), packed >> E2M1.bits], axis=-1)
    return low_high.reshape(packed.shape[0], 2 * packed.shape[1])


def swizzle_128x4(block_scales: Codes) -> Codes:
    """(M, K/16) scale bytes → the flat tiled buffer that cuBLAS, CUTLASS and torch read, zeros where it pads.

    uint8, length ⌈M/128⌉ · ⌈K/16/4⌉ · 512. Raises TypeError unless uint8, ValueError for another rank.
    Source: cuBLAS, "1D block scaling factors layout".

    >>> swizzle_128x4(np.uint8([[10, 11], [20, 21]]))[:20]
    array([10, 11,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0, 20,
           21,  0,  0], dtype=uint8)
    """
    block_scales = checks.codes("block_scales", block_scales, E4M3.bits)
    if block_scales.ndim != 2:
        raise ValueError(f"block_scales has shape {block_scales.shape}; it must be (M, K/16).")
    offset, size = _offsets(*block_scales.shape)
    swizzled = np.zeros(size, np.uint8)
    swizzled[offset] = block_scales
    return swizzled


def unswizzle_128x4(swizzled: Codes, shape: tuple[int, int]) -> Codes:
    """The (M, K/16) scale bytes of a swizzled buffer; `shape` is (M, K/16). The padding is dropped.

    Raises TypeError unless uint8, ValueError for a buffer that `shape` does not fill.

    >>> scales = np.arange(10, dtype=np.uint8).reshape(2, 5)
    >>> bool((unswizzle_128x4(swizzle_128x4(scales), (2, 5)) == scales).all())
    True
    """
    if np.shape(shape) != (2,):
        raise ValueError(f"shape={shape} must be (M, K/16), the shape of the scales before swizzling.")
    offset, size = _offsets(*shape)
    if np.shape(swizzled) != (size,):
        raise ValueError(
            f"swizzled has shape {np.shape(swizzled)}; scales of shape {shape} fill {size} bytes. "
            f"Pass the flat buffer and the unpadded (M, K/16)."
        )
    return checks.codes("swizzled", swizzled, E4M3.bits)[offset]


def _offsets(rows: int, cols: int) -> tuple[NDArray[np.int64], int]:
    """Byte offset of the scale at (row, s), and the size of the buffer."""
    tiles_across = -(-cols // TILE_COLS)
    row, s = np.arange(rows)[:, None], np.arange(cols)
    tile = (row // TILE_ROWS) * tiles_across + s // TILE_COLS
    inside = (row % 32) * 16 + (row % TILE_ROWS // 32) * 4 + s % TILE_COLS
    tile_bytes = TILE_ROWS * TILE_COLS
    return tile * tile_bytes + inside, -(-rows // TILE_ROWS) * tiles_across * tile_bytes
