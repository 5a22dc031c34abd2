"""gpu.resources: occupancy by hand, every kernel in the table, and the page that shows what it prints."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from support import cuda_compiler

from gpu import bench, launch, load, resources

cuda_compiler()
ROOT = Path(__file__).parent.parent
RECORD = ROOT / "docs/results/bench_h100.json"


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared_bytes", "blocks"),
    [
        ("90a", 254, 256, 0, 1),  # 8192 registers a warp: two in each of four partitions, one block of eight
        ("90a", 128, 256, 0, 2),
        ("90a", 64, 256, 0, 4),  # what __launch_bounds__(256, 4) asks for
        ("90a", 65, 256, 0, 3),  # 72 · 32 are allocated: seven warps a partition
        ("90a", 32, 256, 0, 8),  # all 64 warps
        ("90a", 16, 32, 0, 32),  # no more blocks than 32
        ("90a", 16, 256, 73728, 3),  # 3 · (72 + 1) KiB of 228
        ("120a", 32, 256, 0, 6),  # 48 warps
        ("120a", 16, 32, 0, 24),
        ("120a", 16, 256, 49 * 1024, 2),  # 2 · 50 KiB of 100
        ("120a", 16, 256, 49 * 1024 + 1, 1),
    ],
)
def test_occupancy(arch, registers, threads, shared_bytes, blocks):
    assert resources.blocks_at_once(arch, registers, threads, shared_bytes) == blocks


def test_the_best_of_a_design_counts_its_last_round():
    gpu = bench.Gpu(bytes_per_second=1e12, fp16=1e14, fp4=None, source="", multiprocessors=10, clock=1e9)
    case = bench.Case("fast", 4096, 28672, 4096)
    floor = case.flops / 1e14
    assert resources.least(case, 0, gpu, places=10, blocks=20) == (floor, floor)
    assert resources.least(case, 0, gpu, places=10, blocks=15) == (floor, pytest.approx(floor * 2 / 1.5))
    few = bench.Case("fast", 1, 28672, 4096)
    assert resources.least(few, 0, gpu, 10, 15) == (few.bytes / 1e12, few.bytes / 1e12)
    assert resources.least(2_000_000, 0, gpu, 1, 1) == (2e-6, 2e-6)


def test_the_best_of_a_design_counts_its_float32_operations():
    """128 a clock in each of 10 multiprocessors."""
    gpu = bench.Gpu(bytes_per_second=1e12, fp16=1e14, fp4=None, source="", multiprocessors=10, clock=1e9)
    assert resources.least(2_000_000, 1.28e6, gpu, 10, 10) == (2e-6, 2e-6)
    assert resources.least(2_000_000, 1.28e7, gpu, 10, 10) == (2e-6, pytest.approx(1e-5))
    case = bench.Case("fast", 4096, 28672, 4096)
    floor, best = resources.least(case, 1.28e12 * 0.02, gpu, 10, 10)
    assert (floor, best) == (case.flops / 1e14, pytest.approx(0.02))


@pytest.mark.parametrize("arch", resources.ON)
def test_operations_are_those_of_the_formulas(arch):
    m, _, k, s = resources.SHAPE
    found = resources.operations(arch)
    assert set(found) == {of.kernel for of in resources.launches(arch)}
    float_ = {kernel: counted.float_ for kernel, counted in found.items()}
    assert float_["pack"] == float_["unpack"] == 0
    assert float_["amax_bf16"] == m * k * 15 / 16
    assert float_["tensor_scale"] == 2  # a division, and the least scale
    assert float_["decode_e2m1"] == float_["decode_e4m3"] == m * k  # one product, exact
    assert float_["dequantize"] == m * k * (1 + 1 + 1 + 1 / 16)  # a code, times a scale, times another
    of_a_code = 1 / 2 if arch == "120a" else 2  # and 2 of a quotient
    of_a_block = 27 if arch == "120a" else 26  # scale, reciprocals, limits
    assert float_["quantize_bf16"] == m * k * (2 + of_a_code + 15 / 16 + of_a_block / 16)
    for plan in launch.SMALL:  # two codes are scaled at a time: B's once, A's for each tile
        rows = resources.SHAPE.n * (1 + {8: resources.FEWER, 16: resources.FEW}[plan.tile_m] / plan.tile_n)
        assert rows * (k + s) / 2 < float_[plan.kernel] < rows * (k + s) * 0.7, plan.kernel
    assert all(counted.every >= counted.float_ for counted in found.values())


def test_a_product_of_more_rows_than_a_grid_has_is_refused():
    device, parts = resources.Recorder("80"), dict.fromkeys(("codes", "scales", "tensor_scale", "largest"))
    few, a, most, more = (
        launch.PackedTensor(**parts, shape=(n, 16)) for n in (16, 17, 65535 * 256, 65535 * 256 + 1)
    )
    launch.matmul(device, a, most, exact=False)
    with pytest.raises(ValueError, match=r"b has 16776961 rows; gemm_fast takes up to 16776960\. Split b\."):
        launch.matmul(device, a, more, exact=False)
    launch.matmul(device, few, more, exact=False)  # its thread blocks stay
    assert [of.blocks for of in device.launches] == [65535, launch.AT_ONCE]


@pytest.mark.parametrize("exact", [True, False])
def test_a_product_of_a_longer_k_than_an_index_reaches_is_refused(exact):
    parts = dict.fromkeys(("codes", "scales", "tensor_scale", "largest"))
    fits, longer = (launch.PackedTensor(**parts, shape=(1, k)) for k in (2**28, 2**28 + 16))
    launch.matmul(resources.Recorder("80"), fits, fits, exact)
    with pytest.raises(
        ValueError, match=r"a and b have K=268435472; a product takes up to 268435456\. Split K"
    ):
        launch.matmul(resources.Recorder("80"), longer, longer, exact)


@pytest.mark.parametrize("arch", resources.ON)
def test_every_kernel_but_the_probes_is_in_the_table_for_bfloat16(arch):
    shown = [of.kernel for of in resources.launches(arch)]
    assert len(set(shown)) == len(shown)
    assert set(shown) <= set(resources.WORK)
    sources = {path.stem for path in load.SOURCES.glob("*.cu")} - {"probe"}
    kernels = {k for source in sources for k in load.compiled(source, arch).kernels}
    missing = kernels - set(shown)
    if arch == "90a":  # there it is for K that is no multiple of 32
        missing.remove("gemm_fast")
    assert {re.sub("_f(16|32)$", "_bf16", name) for name in missing} <= set(shown)
    for of in resources.launches(arch):
        assert of.kernel in load.compiled(of.source, arch).kernels


def test_the_page_shows_what_the_command_prints(capsys):
    page = (ROOT / "docs/performance.md").read_text()
    stated = re.search(r"compiled by NVRTC ([\d.]+)\.", page)[1]
    version = ".".join(map(str, load.nvrtc()[1]))
    if stated != version:
        pytest.skip(f"the page is of NVRTC {stated}, here is {version}: it allocates registers otherwise")
    assert resources.main(["--measured", str(RECORD)]) == 0
    assert f"```\n{capsys.readouterr().out}```" in page


def test_a_log_without_kernels_is_named():
    made = load.compiled("quantize", "80")
    with pytest.raises(RuntimeError, match=r"log of quantize.cu for sm_80 says nothing of its kernels"):
        _ = replace(made, log="").kernels
    assert load.Compiled("empty", "80", "", b"", "").kernels == {}


def test_a_file_that_is_no_record_is_named(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert resources.main(["--measured", str(path)]) == 2
    assert f"gpu.resources: {path} is not a record of gpu.bench --json" in capsys.readouterr().err
