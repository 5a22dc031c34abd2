"""gpu.bench without a GPU: the plan, its floor times, tables, the record; and its checks, on a stand-in for
the GPU that computes with the emulator in torch's CPU tensors. No time is asserted anywhere."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import optional

import emulator
from arcquant_ref import NVFP4Tensor, layout
from gpu import bench, launch, verify
from gpu.device import Array

ROOT = Path(__file__).parent.parent

optional("cupy")


def test_the_plan_covers_the_shapes():
    cases = bench.plan(bench.LAYERS, bench.ROWS)
    assert len(set(cases)) == len(cases)
    assert bench.ROWS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    found = {(c.operation, c.m, c.n, c.k, c.s) for c in cases}
    for m in bench.ROWS:
        for n, k in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)):
            assert {(o, m, n, k, 0) for o in ("torch fp16", "torch bf16")} <= found
            assert {(o, m, n, k, s) for o in ("exact", "fast") for s in (0, 64, 128, 512)} <= found
            assert {(f"quantize + {o}", m, n, k, s) for o in ("exact", "fast") for s in (0, 512)} <= found
            assert {("torch nvfp4", m, n, k, s) for s in (0, 512)} | {("read weights", m, n, k, 0)} <= found
        for k in (4096, 14336):
            assert {("copy", m, 0, k, 0), ("quantize", m, 0, k, 0), ("augment", m, 0, k, 512)} <= found
            assert ("RMSNorm + augment", m, 0, k, 512) in found
    parts = [bench.plan(bench.LAYERS, bench.ROWS, only) for only in ("quantize", "gemm")]
    assert parts[0] + parts[1] == cases


def test_stated_peaks():
    """As in the data sheets, in TFLOP/s: 989.4; 209.5 and 1676; 503.8 and 2015."""
    stated = {"H100 SXM": (989.4, None), "RTX 5090": (209.5, 1676), "RTX PRO 6000": (503.8, 2015)}
    for name, (fp16, fp4) in stated.items():
        assert bench.GPUS[name].fp16 / 1e12 == pytest.approx(fp16, rel=1e-3)
        assert fp4 is None or bench.GPUS[name].fp4 / 1e12 == pytest.approx(fp4, rel=1e-3)


@pytest.mark.parametrize(
    ("case", "moved", "flops"),
    [
        (("torch fp16", 2, 256, 512), 2 * (2 * 512 + 256 * 512 + 2 * 256), 2 * 2 * 256 * 512),
        # 32 scales a row; scales of 2 rows fill a tile of 128 rows
        (("exact", 2, 256, 512), (2 + 256) * 256 + (128 + 256) * 32 + 4 * 2 * 256, 2 * 2 * 256 * 512),
        (("fast", 128, 128, 512, 512), 2 * 128 * (512 + 64) + 4 * 128**2, 2 * 128**2 * 1024),
        # x, its quantized form written and read, the weights, y
        (
            ("quantize + fast", 128, 128, 512),
            2 * 128 * 512 + 3 * 128 * (256 + 32) + 4 * 128**2,
            2 * 128**2 * 512,
        ),
        (("torch nvfp4", 128, 128, 512), 2 * 128 * (256 + 32) + 2 * 128**2, 2 * 128**2 * 512),
        (("read weights", 2, 256, 512), 256 * (256 + 32), 0),
        (("copy", 128, 0, 512), 2 * 2 * 128 * 512, 0),
        (("quantize", 128, 0, 512), 128 * (1024 + 256 + 32), 0),
        (("quantize, dynamic scale", 128, 0, 512), 128 * (2048 + 256 + 32), 0),
        (("augment", 128, 0, 512, 512), 128 * (1024 + 512 + 64) + 4 * 512, 0),
        (("RMSNorm + augment", 128, 0, 512, 512), 128 * (1024 + 512 + 64) + 8 * 512, 0),
    ],
)
def test_bytes_and_operations(case, moved, flops):
    case = bench.Case(*case)
    assert (case.bytes, case.flops) == (moved, flops)


def test_floor_times():
    gpu = bench.Gpu(bytes_per_second=1e12, fp16=1e14, fp4=4e14, source="", multiprocessors=1, clock=1e9)
    small, large = (bench.Case("exact", m, 4096, 4096) for m in (1, 8192))
    assert small.floor(gpu) == small.bytes / 1e12
    assert large.floor(gpu) == large.flops / 4e14
    assert replace(large, operation="fast").floor(gpu) == large.flops / 1e14
    assert large.floor(gpu._replace(fp4=None)) == large.flops / 1e14
    assert replace(large, operation="torch nvfp4").floor(gpu._replace(fp4=None)) is None


def test_dry_run_prints_the_plan_without_a_gpu(capsys):
    assert bench.main(["--dry-run", "--layers", "4096x4096", "--rows", "1", "256"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("44 cases")
    for name in bench.GPUS:
        assert f"\n{name}: floor times, from bytes and operations over " in out
    h100 = out.split("\nRTX 5090")[0]
    assert "torch nvfp4" not in h100
    assert "torch nvfp4" in out
    line = next(line for line in h100.split("N=4096 K=4096")[1].splitlines() if line.startswith("     1 "))
    seconds = bench.Case("torch fp16", 1, 4096, 4096).bytes / 3.35e12
    assert line.split()[1] == f"{1e6 * seconds:.3g}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layers 4096", "'4096' is not NxK, such as 4096x14336"),
        ("--layers 64x500", "K must be a multiple of 16, at least 512"),
        ("--rows 0", "--rows 0: a product has at least one row"),
        ("--only nothing", "invalid choice"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--dry-run", *arguments.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys):
    import gpu

    if gpu.why_not() is None:
        pytest.skip("there is a GPU")
    assert bench.main([]) == 2
    assert re.match(r"gpu\.bench: .* --dry-run needs no GPU\.", capsys.readouterr().err)


def test_figures_tables_and_record():
    cases = [bench.Case("torch fp16", 8, 1024, 512), bench.Case("fast", 8, 1024, 512)]
    cases += [bench.Case("fast", 8, 1024, 512, 512), bench.Case("exact", 8, 1024, 512)]
    results = {
        case: bench.Result(case, t, t / 2, 2 * t, 99, 0.25) for case, t in zip(cases, (4e-6, 1e-6, 3e-6))
    }
    results[cases[3]] = bench.Result(cases[3], reason="RuntimeError: no memory", failed=True)
    peak = bench.Peak(flops_per_second=1e14, bytes_per_second=1e12)
    found = bench.figures(results[cases[2]], results, peak)
    assert found["over S = 0"] == pytest.approx(3)
    assert found["expected over S = 0"] == 2
    assert found["times the first"] == pytest.approx(4 / 3)
    assert found["TFLOP/s"] == pytest.approx(cases[2].flops / 3e-6 / 1e12)
    assert found["of peak FLOP/s"] == pytest.approx(cases[2].flops / 3e-6 / 1e14)
    assert found["of copy bandwidth"] == pytest.approx(cases[2].bytes / 3e-6 / 1e12)
    assert found["weight bytes of fp16"] == 2 * 4.5 / 16
    text = "\n\n".join(bench.grids(results, peak))
    lines = text.splitlines()
    assert lines[1].split() == ["M", "torch", "fp16", "fast", "S=0", "fast", "S=512", "exact", "S=0"]
    assert lines[2].split() == ["8", "4", "1", "3", "FAILED"]
    assert "3.00/2.00" in text
    record = json.loads(json.dumps(bench.report(results, peak, {"gpu": None})))
    assert set(record) == {"program", "machine", "peak", "rows"}
    assert [row["operation"] for row in record["rows"]] == ["torch fp16", "fast", "fast", "exact"]
    keys = {
        "operation",
        "m",
        "n",
        "k",
        "s",
        "median",
        "best",
        "worst",
        "compared",
        "error",
        "reason",
        "failed",
    }
    assert all(keys <= set(row) for row in record["rows"])
    assert record["rows"][2]["GB/s"] == pytest.approx(found["GB/s"])
    assert record["rows"][3]["reason"] == "RuntimeError: no memory"


class OnTheCpu:
    """Stands in for gpu.arrays and launch.unpack: torch's CPU tensors, the emulator's arithmetic."""

    def __init__(self, torch):
        self.torch, self.wrong = torch, 0

    def _numbers(self, x):
        return x.view(self.torch.int16).numpy().view(np.uint16)

    def _packed(self, q: NVFP4Tensor) -> launch.PackedTensor:
        def held(array):
            return Array(0, array.shape, "uint8", self.torch.from_numpy(np.array(array)))

        scale = Array(0, (1,), "float32", self.torch.tensor([float(q.tensor_scale)]))
        codes = layout.pack(q.codes)
        codes[0, 0] ^= self.wrong
        scales = held(layout.swizzle_128x4(q.block_scales))
        return launch.PackedTensor(
            codes=held(codes), scales=scales, tensor_scale=scale, largest=scale, shape=q.shape
        )

    def as_array(self, name, x):
        return Array(0, tuple(x.shape), "uint8", x)

    def empty(self, shape, dtype):
        return Array(0, shape, dtype, self.torch.zeros(shape, dtype=getattr(self.torch, dtype)))

    def launch(self, source, kernel, grid, threads, args):
        assert (source, kernel) == ("probe", "add_words")
        words, count, sums = args
        whole = np.add.reduce(words.owner.numpy()[: 16 * count].view(np.uint32), dtype=np.uint32)
        sums.owner.numpy()[:2] = whole // 2, whole - whole // 2 + np.uint32(self.wrong)

    def order_of(self, selection, like):
        self.selection = selection
        return selection.order

    def quantize(self, x, scale=None):
        return self._packed(emulator.quantize(self._numbers(x), None if scale is None else scale.numpy()[0]))

    def augment_activations(self, x, order, s, scale):
        selection = replace(self.selection, num_residual=s)
        return self._packed(emulator.augment_activations(self._numbers(x), selection, scale.numpy()[0]))

    def rmsnorm_augment_activations(self, x, weight, epsilon, order, s, scale):
        selection, numbers = replace(self.selection, num_residual=s), self._numbers(x)
        q = emulator.rmsnorm_augment_activations(
            numbers, weight.numpy(), epsilon, selection, scale.numpy()[0]
        )
        return self._packed(q)

    def augment_weights(self, w, order, s):
        return self._packed(
            emulator.augment_weights(self._numbers(w), replace(self.selection, num_residual=s))
        )

    def unpack(self, device, q):
        rows, k = q.shape
        scales = layout.unswizzle_128x4(q.scales.owner.numpy(), (rows, k // 16))
        arrays = layout.unpack(q.codes.owner.numpy()), scales
        return tuple(Array(0, array.shape, "uint8", self.torch.from_numpy(array)) for array in arrays)

    def download(self, array):
        return array.owner.numpy()

    def matmul(self, a, b, exact):
        a, b = (
            NVFP4Tensor(
                codes=codes.owner.numpy(),
                block_scales=scales.owner.numpy(),
                tensor_scale=q.tensor_scale.owner.item(),
            )
            for q in (a, b)
            for codes, scales in [self.unpack(None, q)]
        )
        y = emulator.matmul(a, b) if exact else verify.fast_product(a, b, a.shape[0])
        return self.torch.from_numpy(y)


@pytest.fixture
def on_the_cpu(monkeypatch):
    torch = optional("torch")

    class Timer:
        l2_bytes = 2**16

        def __init__(self, torch):
            pass

        def __call__(self, call):
            call(0), call(1)
            return [3e-6, 1e-6, 2e-6]

        copies = bench.Timer.copies

    fake = OnTheCpu(torch)
    fake.arch = "90a"
    monkeypatch.setattr(bench, "CUDA", "cpu")
    monkeypatch.setattr(bench, "Timer", Timer)
    monkeypatch.setattr(bench, "CudaTorch", lambda: fake)
    monkeypatch.setattr(bench, "arrays", fake)
    monkeypatch.setattr(bench.launch, "unpack", fake.unpack)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=132)
    )
    return fake


def test_every_case_is_compared_and_timed(on_the_cpu):
    cases = bench.plan([(48, 512)], [1, 20])
    made = bench.Bench(on_the_cpu.torch, 20)
    results = {case: made.run(case) for case in cases}
    for case, result in results.items():
        assert not result.failed, (case, result.reason)
        if case.operation == "torch nvfp4":
            assert result.reason == "compute capability (9, 0): cuBLAS has NVFP4 from 10.0 on"
            continue
        assert (result.median, result.best, result.worst) == (2e-6, 1e-6, 3e-6)
        assert (result.compared > 0) == (case.operation not in ("copy", "torch fp16", "torch bf16"))
        assert (result.error is None) == (case.n == 0 or case.operation == "read weights")
    error = {(c.operation, c.s): r.error for c, r in results.items() if c.m == 20}
    assert error["torch fp16", 0] < 1e-3 < error["exact", 512] < error["exact", 0] < 0.2
    assert all(value is None or value == value for row in bench.report(results, bench.Peak(1, 1), {})["rows"]
               for value in row.values())  # fmt: skip


@pytest.mark.parametrize("operation", ["quantize", "exact", "quantize + fast"])
def test_what_differs_is_reported_and_not_timed(operation, on_the_cpu):
    made = bench.Bench(on_the_cpu.torch, 4)
    on_the_cpu.wrong = 1
    result = made.run(bench.Case(operation, 4, 48 if operation != "quantize" else 0, 512))
    assert (result.failed, result.median) == (True, None)
    assert re.match(
        r"Wrong: 1 of \d+ codes differ, first at \(0, 0\): got 0x\w+, expected 0x\w+", result.reason
    )


def test_a_wrong_sum_of_the_words_that_are_read_is_reported(on_the_cpu):
    on_the_cpu.wrong = 1
    result = bench.Bench(on_the_cpu.torch, 4).run(bench.Case(bench.READ, 4, 48, 512))
    assert result.failed
    assert result.reason.startswith("Wrong: 1 of 1 sums of all words differ"), result.reason


def test_a_wrong_product_is_reported(on_the_cpu, monkeypatch):
    matmul = on_the_cpu.matmul

    def wrong(a, b, exact):
        y = matmul(a, b, exact)
        y.view(on_the_cpu.torch.int32)[0, 0] ^= 1
        return y

    monkeypatch.setattr(on_the_cpu, "matmul", wrong)
    for operation in ("exact", "fast"):
        result = bench.Bench(on_the_cpu.torch, 4).run(bench.Case(operation, 4, 48, 512))
        assert result.reason.startswith("Wrong: 1 of "), result.reason
        assert "y differ, first at (0, 0)" in result.reason


def test_the_timer_fills_l2_before_each_call_and_lets_the_host_get_ahead():
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 5.0  # milliseconds

    def zeros(count=1, *, dtype, device):
        return np.zeros(count, dtype)

    def read(other, dim, out):
        assert other.nbytes >= 2 * 50e6
        log.append("flush")

    cuda = SimpleNamespace(
        Event=Event,
        synchronize=lambda: log.append("wait"),
        _sleep=lambda cycles: log.append("sleep"),
        current_device=lambda: 0,
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=50_000_000),
    )
    timer = bench.Timer(SimpleNamespace(cuda=cuda, zeros=zeros, sum=read, float32=np.float32))
    times = timer(lambda i: log.append(f"call {i}"))
    assert times == [5e-3] * 20  # as many as fit 0.1 s
    once = [step for i in range(20) for step in ("flush", "event", f"call {i}", "event")]
    assert log[: bench.WARM] == ["call 0", "call 1", "call 2"]
    assert log[-83:] == ["wait", "sleep", *once, "wait"]
    assert [timer.copies(nbytes) for nbytes in (10**6, 40_000_000, 10**9)] == [bench.COPIES, 3, 1]


def test_a_record_prints_its_tables_again(capsys, tmp_path):
    record = ROOT / "docs/results/bench_h100.json"
    layer = ["--rows", "1", "4096", "--layers", "28672x4096"]
    assert bench.main(["--show", str(record), *layer]) == 0
    out = capsys.readouterr().out
    assert "N=28672 K=4096: median, microseconds\n     M  torch fp16" in out
    assert "K=4096: part of a copy's bandwidth" in out
    assert "N=6144" not in out
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"rows": [{}]}')
    assert bench.main(["--show", str(wrong)]) == 2
    assert "wrong.json is not a record of gpu.bench --json" in capsys.readouterr().err
    assert bench.main(["--show", str(tmp_path / "absent.json")]) == 2
