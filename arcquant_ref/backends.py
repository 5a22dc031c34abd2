"""The implementations behind one face, by name."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from numpy.typing import ArrayLike

from .formats import Codes, Float32
from .select import Selection
from .tensor import NVFP4Tensor

MODULES = {"reference": "arcquant_ref", "emulator": "emulator", "gpu": "gpu"}
ROOT = Path(__file__).resolve().parent.parent


class Backend(Protocol):
    """The face: NumPy in, NumPy or NVFP4Tensor out, the same signatures in every backend."""

    def encode_e2m1(self, x: ArrayLike) -> Codes: ...
    def encode_e4m3(self, x: ArrayLike) -> Codes: ...
    def decode_e2m1(self, codes: ArrayLike) -> Float32: ...
    def decode_e4m3(self, codes: ArrayLike) -> Float32: ...
    def quantize(self, x: ArrayLike, tensor_scale: float | None = None) -> NVFP4Tensor: ...
    def dequantize(self, q: NVFP4Tensor) -> Float32: ...
    def augment_activations(
        self, x: ArrayLike, selection: Selection, tensor_scale: float | None = None
    ) -> NVFP4Tensor: ...
    def rmsnorm_augment_activations(
        self, x: ArrayLike, weight: ArrayLike, epsilon: float, selection: Selection, tensor_scale: float
    ) -> NVFP4Tensor: ...
    def augment_weights(self, w: ArrayLike, selection: Selection) -> NVFP4Tensor: ...
    def matmul(self, a: NVFP4Tensor, b: NVFP4Tensor) -> Float32: ...


def get(name: str) -> Backend:
    """The backend called `name`: reference, emulator or gpu; never another one instead.

    Raises ValueError for another name, ImportError with the reason for one that cannot be used here.
    """
    if name not in MODULES:
        raise ValueError(f"backend={name!r} is not one of {', '.join(MODULES)}.")
    try:
        module = importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        if error.name != MODULES[name]:
            raise ImportError(f"backend {name!r} is not usable here: {error}.") from error
        raise ImportError(f"backend {name!r}: this version has no package {MODULES[name]!r}.") from error
    except Exception as error:  # whatever a broken installation raises is the reason
        raise ImportError(f"backend {name!r} is not usable here: {error}.") from error
    _refuse_a_stranger(module)
    reason = getattr(module, "why_not", lambda: None)()  # gpu can be imported where no GPU is
    if reason:
        raise ImportError(f"backend {name!r} is not usable here: {reason}.")
    return cast(Backend, module)


def available() -> dict[str, str | None]:
    """Each backend's name → None if it can be used here, else the reason why not."""
    reasons: dict[str, str | None] = {}
    for name in MODULES:
        try:
            get(name)
            reasons[name] = None
        except ImportError as error:
            reasons[name] = str(error)
    return reasons


def _refuse_a_stranger(module: ModuleType) -> None:
    """`emulator` and `gpu` are common folder names: only the ones beside this package are ours."""
    path = module.__file__ or next(iter(module.__path__), "an unknown place")
    if Path(path).resolve().parent.parent != ROOT:
        raise ImportError(
            f"the package {module.__name__!r} found at {path} is not the one of arcquant_ref, which would be "
            f"in {ROOT}. Run from another folder or rename it."
        )
