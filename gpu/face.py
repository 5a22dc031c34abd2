"""The face of arcquant_ref on a device: NumPy in, NumPy or NVFP4Tensor out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arcquant_ref import checks
from arcquant_ref.formats import BLOCK, E2M1, E4M3, Codes, Float32
from arcquant_ref.select import Selection
from arcquant_ref.tensor import NVFP4Tensor

from . import launch
from .device import Array, Device, numpy_dtype


@dataclass(frozen=True)
class Face:
    """The functions of `arcquant_ref.backends.Backend`, each one upload, launches, and one download."""

    device: Device

    def encode_e2m1(self, x: ArrayLike) -> Codes:
        """Nearest E2M1 codes of `x`, any shape; NaN and infinity as in `emulator.encode_e2m1`."""
        return self._encode("e2m1", x)

    def encode_e4m3(self, x: ArrayLike) -> Codes:
        """Nearest E4M3 codes of `x`, any shape; NaN and infinity as in `emulator.encode_e4m3`."""
        return self._encode("e4m3", x)

    def decode_e2m1(self, codes: ArrayLike) -> Float32:
        """Values of E2M1 codes. Raises TypeError unless uint8, ValueError above 15."""
        return self._decode("e2m1", checks.codes("codes", codes, E2M1.bits))

    def decode_e4m3(self, codes: ArrayLike) -> Float32:
        """Values of E4M3 codes; 0x7F and 0xFF are NaN. Raises TypeError unless uint8."""
        return self._decode("e4m3", checks.codes("codes", codes, E4M3.bits))

    def quantize(self, x: ArrayLike, tensor_scale: float | np.float32 | None = None) -> NVFP4Tensor:
        """The bytes of `arcquant_ref.quantize`, and its errors."""
        held = self._matrix("x", x)
        scale = self._scale(tensor_scale)
        return self._finite("x", x, launch.quantize(self.device, held, scale))

    def dequantize(self, q: NVFP4Tensor) -> Float32:
        """The bits of `arcquant_ref.dequantize`, and its errors."""
        checks.is_a("q", q, NVFP4Tensor, "quantize(x) makes one.")
        checks.scales_are_numbers("q.block_scales", q.block_scales, 2**E4M3.magnitude_bits - E4M3.nan_codes)
        return self.device.download(launch.dequantize(self.device, self.pack(q)))

    def augment_activations(
        self, x: ArrayLike, selection: Selection, tensor_scale: float | np.float32 | None = None
    ) -> NVFP4Tensor:
        """The bytes of `arcquant_ref.augment_activations`, and its errors."""
        held, order, s = self._matrix("x", x), *self._order("x", x, selection)
        scale = self._scale(tensor_scale)
        return self._finite("x", x, launch.augment_activations(self.device, held, order, s, scale))

    def augment_weights(self, w: ArrayLike, selection: Selection) -> NVFP4Tensor:
        """The bytes of `arcquant_ref.augment_weights`, and its errors."""
        held, order, s = self._matrix("w", w), *self._order("w", w, selection)
        return self._finite("w", w, launch.augment_weights(self.device, held, order, s))

    def rmsnorm_augment_activations(
        self,
        x: ArrayLike,
        weight: ArrayLike,
        epsilon: float,
        selection: Selection,
        tensor_scale: float | np.float32,
    ) -> NVFP4Tensor:
        """The bytes of `arcquant_ref.rmsnorm_augment_activations`, and its errors."""
        held, order, s = self._matrix("x", x), *self._order("x", x, selection)
        factors = checks.norm_weight(weight, selection.K)
        scale = self._upload(np.array([checks.tensor_scale(tensor_scale)]))
        q, rest = launch.rmsnorm_augment_activations(
            self.device, held, self._upload(factors), checks.epsilon(epsilon), order, s, scale
        )
        bad = q.shape[0] - int(self.device.download(rest)[0])
        if bad < q.shape[0]:
            checks.floats("x", x)
            checks.normalized_rows(np.arange(q.shape[0]) != bad)
        return self._finite("x", x, q)

    def matmul(self, a: NVFP4Tensor, b: NVFP4Tensor, exact: bool = True) -> Float32:
        """a bᵀ, (M, K) and (N, K) → (M, N) float32.

        `exact`: the bits of `emulator.matmul`, those of an RTX Blackwell GPU, on any GPU. Otherwise what is
        fast: codes times scales become fp16 numbers, exactly, and are multiplied as such. On a Hopper GPU
        these are the bits of `emulator.matmul_fp16`, and for M up to 16 of `emulator.matmul_fp16_split_k`.
        Errors as in `emulator.matmul`, and ValueError for K beyond 2^28.
        """
        for name, q in (("a", a), ("b", b)):
            checks.is_a(name, q, NVFP4Tensor, "quantize(x) makes one.")
        checks.same_depth("a", a.shape[1], "b", b.shape[1])
        return self.device.download(launch.matmul(self.device, self.pack(a), self.pack(b), exact))

    def pack(self, q: NVFP4Tensor) -> launch.PackedTensor:
        """`q` in the device's memory."""
        codes, block_scales = self._upload(q.codes), self._upload(q.block_scales)
        return launch.pack(self.device, codes, block_scales, self._upload(np.array([q.tensor_scale])))

    def unpack(self, q: launch.PackedTensor) -> NVFP4Tensor:
        """The inverse of `pack`."""
        codes, block_scales = (self.device.download(part) for part in launch.unpack(self.device, q))
        scale = self.device.download(q.tensor_scale)[0]
        return NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=scale)

    def _encode(self, name: str, x: ArrayLike) -> Codes:
        return self.device.download(launch.encode(self.device, name, self._floats("x", x)))

    def _decode(self, name: str, codes: Codes) -> Float32:
        return self.device.download(launch.decode(self.device, name, self._upload(codes)))

    def _matrix(self, name: str, x: ArrayLike) -> Array:
        return self._floats(name, checks.matrix_shape(name, x, BLOCK))

    def _floats(self, name: str, x: ArrayLike) -> Array:
        """float32, float16 and bfloat16 as they are; float64 is rounded once to float32."""
        x = checks.float_array(name, x)
        if x.dtype.name == "float64":
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                x = x.astype(np.float32)
        return self._upload(x)

    def _upload(self, x: NDArray[Any]) -> Array:
        name = x.dtype.name
        return self.device.upload(np.require(x, x.dtype.newbyteorder("="), "C").view(numpy_dtype(name)), name)

    def _scale(self, tensor_scale: float | np.float32 | None) -> Array | None:
        return None if tensor_scale is None else self._upload(np.array([checks.tensor_scale(tensor_scale)]))

    def _order(self, name: str, x: ArrayLike, selection: Selection) -> tuple[Array, int]:
        checks.is_a("selection", selection, Selection, "select(calibrate([x])) makes one.")
        checks.selection_fits(name, np.shape(x)[1], selection.K)
        checks.no_weight_channels("gpu", len(selection.weight_channels))
        return self._upload(selection.order.astype(np.uint16)), selection.num_residual

    def _finite(self, name: str, x: ArrayLike, q: launch.PackedTensor) -> NVFP4Tensor:
        """The tensor, or the error of a matrix that holds NaN or infinity."""
        if self.device.download(q.largest)[0] >= np.float32(np.inf).view(np.uint32):
            checks.floats(name, x)
        return self.unpack(q)
