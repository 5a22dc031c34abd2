"""What the real packages make of a matrix: one function for each; emulator.recipes.pack must equal it."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np

Bytes = tuple[np.ndarray, np.ndarray, np.float32]  # packed codes, block scales as stored, tensor scale


def torch_of(x: np.ndarray) -> Any:
    """The matrix as a torch tensor; bfloat16 comes as its bits in uint16."""
    import torch

    if x.dtype == np.uint16:
        return torch.from_numpy(x.astype(np.int32).copy()).to(torch.int16).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def _bytes(codes: Any, scales: Any, tensor_scale: Any) -> Bytes:
    import torch

    scale = np.float32(tensor_scale.float().reshape(-1)[0].item())
    return codes.numpy(), scales.view(torch.uint8).numpy(), scale


def torchao(x: np.ndarray) -> Bytes:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    t = torch_of(x)
    scale = per_tensor_amax_to_scale(t.abs().max())
    q = NVFP4Tensor.to_nvfp4(t, per_tensor_scale=scale)
    return _bytes(q.qdata, q.scale, scale)


def modelopt(x: np.ndarray) -> Bytes:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    q, scales, scale = NVFP4QTensor.quantize(torch_of(x), 16)
    return _bytes(q._quantized_data, scales, scale)


def _compressed(x: np.ndarray) -> dict[str, Any]:
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4A16
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight, scheme = torch_of(x), QuantizationScheme(targets=["Linear"], **NVFP4A16)
    global_scale = generate_gparam(weight.min(), weight.max())
    blocks = weight.reshape(len(weight), -1, 16)
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    return NVFP4PackedCompressor.compress(state, scheme)


def compressed_tensors(x: np.ndarray) -> Bytes:
    out = _compressed(x)
    return _bytes(out["weight_packed"], out["weight_scale"], out["weight_global_scale"])


def comfy_kitchen(x: np.ndarray) -> Bytes:
    import comfy_kitchen
    from comfy_kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout

    with comfy_kitchen.use_backend("eager"):
        codes, params = TensorCoreNVFP4Layout.quantize(torch_of(x))
    packed, scales, scale = _bytes(codes, params.block_scale, params.scale)
    return packed[: len(x), : x.shape[1] // 2], scales.reshape(-1), scale


def fouroversix(scale_rule: str) -> Callable[[np.ndarray], Bytes]:
    def quantize(x: np.ndarray) -> Bytes:
        from fouroversix import QuantizationConfig, quantize_to_fp4

        config = QuantizationConfig(backend="pytorch", scale_rule=scale_rule)
        q = quantize_to_fp4(torch_of(x), config)
        packed, scales, scale = _bytes(q.values, q.scale_factors, q.amax)
        return packed[: len(x), : x.shape[1] // 2], scales.reshape(-1), scale

    return quantize


@cache
def _transformer_engine_reference() -> Any:
    folder, name = _folder("transformer_engine") / "pytorch/custom_recipes", "transformer_engine.pytorch"
    reference = _load(
        folder / "reference_nvfp4.py",
        {
            f"{name}.custom_recipes.gemm": MagicMock(),
            f"{name}.custom_recipes.reference_utils": _load(folder / "reference_utils.py", {}),
            f"{name}.quantized_tensor": SimpleNamespace(QuantizedTensorStorage=object, Quantizer=object),
        },
    )
    return reference.NVFP4QuantizerRef._quantize_blockwise_reference


def transformer_engine(x: np.ndarray) -> Bytes:
    """Its reference is PyTorch, in a package that a GPU is needed to import: the file is loaded alone."""
    t = torch_of(x)
    amax = t.abs().max().float()
    packed, scales = _transformer_engine_reference()(t, amax, 16, 1, pow_2_scales=False, eps=0.0)
    return _bytes(packed, scales, amax)


@cache
def _vllm_reference() -> Any:
    triton = SimpleNamespace(jit=lambda f: f)
    scalar_types = SimpleNamespace(float4_e2m1f=SimpleNamespace(max=lambda: 6.0))
    return _load(
        _folder("vllm") / "model_executor/layers/quantization/utils/nvfp4_emulation_utils.py",
        {
            "vllm.platforms": SimpleNamespace(current_platform=None),
            "vllm.scalar_type": SimpleNamespace(scalar_types=scalar_types),
            "vllm.triton_utils": SimpleNamespace(triton=triton, tl=SimpleNamespace(constexpr=int)),
            "vllm.utils.torch_utils": SimpleNamespace(direct_register_custom_op=lambda **_: None),
        },
    )


def vllm(x: np.ndarray) -> Bytes:
    """Its reference returns values, which are packed here by sign and magnitude. Also loaded alone."""
    import torch

    from arcquant_ref import formats, layout

    t = torch_of(x)
    global_scale = 2688 / t.abs().max().float()
    values, scales = (part.numpy() for part in _vllm_reference().ref_nvfp4_quant(t, global_scale, 16))
    codes = np.where(np.isnan(values), 7, formats.encode(formats.E2M1, values)).astype(np.uint8)
    packed, e4m3 = layout.pack(codes), torch.from_numpy(scales).to(torch.float8_e4m3fn)
    return packed, e4m3.view(torch.uint8).numpy(), np.float32(global_scale)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"No module named {package!r}")
    return Path(spec.submodule_search_locations[0])


def _load(path: Path, stand_ins: dict[str, Any]) -> ModuleType:
    """One file as a module; what it imports from its package is replaced meanwhile."""
    parents = {".".join(name.split(".")[:i]) for name in stand_ins for i in range(1, name.count(".") + 1)}
    replaced = {parent: ModuleType(parent) for parent in parents} | stand_ins
    for name, module in replaced.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(replaced[parent], child, module)
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


@dataclass(frozen=True)
class Peer:
    distribution: str
    run: Callable[[np.ndarray], Bytes]
    dtypes: tuple[str, ...] = ("float32", "float16", "uint16")
    in_the_extra: bool = True  # what CI installs

    @property
    def module(self) -> str:
        return {"nvidia-modelopt": "modelopt"}.get(self.distribution, self.distribution.replace("-", "_"))


PEERS = {
    "torchao": Peer("torchao", torchao, ("float32", "uint16")),
    "ModelOpt": Peer("nvidia-modelopt", modelopt),
    "compressed-tensors": Peer("compressed-tensors", compressed_tensors),
    "comfy-kitchen": Peer("comfy-kitchen", comfy_kitchen),
    "fouroversix (static 6)": Peer("fouroversix", fouroversix("static_6"), in_the_extra=False),
    "fouroversix (4/6)": Peer("fouroversix", fouroversix("mse"), in_the_extra=False),
    "Transformer Engine reference": Peer("transformer-engine", transformer_engine),
    "vLLM reference": Peer("vllm", vllm, in_the_extra=False),
}


def checkpoint_torchao(x: np.ndarray) -> tuple[dict[str, Any], dict[str, str]]:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    t = torch_of(x)
    q = NVFP4Tensor.to_nvfp4(t, per_tensor_scale=per_tensor_amax_to_scale(t.abs().max()))
    return flatten_tensor_state_dict({"layer.weight": q})


def checkpoint_modelopt(x: np.ndarray) -> tuple[dict[str, Any], dict[str, str]]:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    q, scales, scale = NVFP4QTensor.quantize(torch_of(x), 16)
    names = ("layer.weight", "layer.weight_scale", "layer.weight_scale_2")
    return dict(zip(names, (q._quantized_data, scales, scale))), {}


def checkpoint_compressed_tensors(x: np.ndarray) -> tuple[dict[str, Any], dict[str, str]]:
    return {f"layer.{name}": tensor for name, tensor in _compressed(x).items()}, {}


def checkpoint_comfy_kitchen(x: np.ndarray) -> tuple[dict[str, Any], dict[str, str]]:
    import comfy_kitchen
    from comfy_kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout

    with comfy_kitchen.use_backend("eager"):
        tensors = TensorCoreNVFP4Layout.state_dict_tensors(*TensorCoreNVFP4Layout.quantize(torch_of(x)))
    return {f"layer.weight{suffix}": tensor for suffix, tensor in tensors.items()}, {}


def checkpoint_fouroversix(x: np.ndarray) -> tuple[dict[str, Any], dict[str, str]]:
    from fouroversix import QuantizationConfig, quantize_to_fp4

    q = quantize_to_fp4(torch_of(x), QuantizationConfig(backend="pytorch"))
    parts = {"values": q.values, "scale_factors": q.scale_factors, "amax": q.amax}
    return {f"layer.quantized_weight_{name}": tensor for name, tensor in parts.items()}, {}


CHECKPOINTS = {  # what these libraries save, under the names that they save it
    "torchao": checkpoint_torchao,
    "ModelOpt": checkpoint_modelopt,
    "compressed-tensors": checkpoint_compressed_tensors,
    "comfy-kitchen": checkpoint_comfy_kitchen,
    "fouroversix (4/6)": checkpoint_fouroversix,
}

NotInstalled = metadata.PackageNotFoundError


def version(distribution: str) -> str:
    return metadata.version(distribution)
