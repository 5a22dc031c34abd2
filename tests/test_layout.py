import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import optional

from arcquant_ref import layout

codes = st.tuples(st.integers(1, 5), st.integers(1, 9).map(lambda half: 2 * half)).flatmap(
    lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 15))
)
scales = st.tuples(st.integers(1, 300), st.integers(1, 11)).flatmap(
    lambda shape: arrays(np.uint8, shape, elements=st.integers(1, 255), fill=st.integers(1, 255))
)


@given(codes)
def test_unpack_inverts_pack(codes):
    packed = layout.pack(codes)
    assert packed.shape == (codes.shape[0], codes.shape[1] // 2)
    np.testing.assert_array_equal(layout.unpack(packed), codes)


@given(codes)
def test_even_k_is_the_low_nibble(codes):
    np.testing.assert_array_equal(layout.pack(codes) % 16, codes[:, ::2])
    np.testing.assert_array_equal(layout.pack(codes) // 16, codes[:, 1::2])


def tiled(scales):
    """The layout as a picture: tiles of 128 × 4, in a tile four groups of 32 rows side by side."""
    rows, cols = scales.shape
    padded = np.zeros((-(-rows // 128) * 128, -(-cols // 4) * 4), np.uint8)
    padded[:rows, :cols] = scales
    tiles = padded.reshape(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).ravel()


@given(scales)
def test_swizzle_is_the_published_tiling_with_zero_padding(scales):
    np.testing.assert_array_equal(layout.swizzle_128x4(scales), tiled(scales))


@given(scales)
def test_unswizzle_inverts_swizzle(scales):
    np.testing.assert_array_equal(layout.unswizzle_128x4(layout.swizzle_128x4(scales), scales.shape), scales)


def test_swizzle_equals_comfy_kitchen():
    torch, comfy = optional("torch"), optional("comfy_kitchen.float_utils")
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (32, 4), (33, 5), (128, 4), (129, 9), (300, 12)]:
        scales = rng.integers(1, 256, shape, np.uint8)
        expected = comfy.to_blocked(torch.from_numpy(scales)).numpy()
        np.testing.assert_array_equal(layout.swizzle_128x4(scales), expected)
