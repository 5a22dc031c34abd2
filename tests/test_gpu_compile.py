"""The CUDA sources without a GPU: they compile for every target, fit registers, hold the instructions they
are about; the cache, and what a user reads when something is missing."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path

import pytest
from support import cuda_compiler

from arcquant_ref import backends
from emulator.ptx import Text
from gpu import launch, load
from gpu.device import SHARED_KIB

cuda_compiler()
ARCHS = ["80", "90a", "120a", "121a"]
SOURCES = sorted(path.stem for path in load.SOURCES.glob("*.cu"))
ROOT = Path(__file__).parent.parent
TEXTS = dict(load._sources())


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARCQUANT_GPU_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def sass(name: str, arch: str, folder: Path) -> str:
    """The machine code of one source, disassembled."""
    places = util.find_spec("nvidia").submodule_search_locations
    tools = [tool for place in places for tool in Path(place).rglob("nvdisasm")]
    assert tools, "nvidia-cuda-nvdisasm is part of the extra test"
    cubin = folder / "kernels.cubin"
    cubin.write_bytes(load.compiled(name, arch).cubin)
    return subprocess.run([tools[0], "-c", cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arch", [*ARCHS, "86", "89", "100a", "103a", "120f"])
@pytest.mark.parametrize("name", SOURCES)
def test_it_compiles_and_nothing_spills(name, arch):
    made = load.compiled(name, arch)
    assert f".target sm_{arch}" in made.ptx
    assert made.cubin.startswith(b"\x7fELF")
    expected = re.findall(r"\.entry (\w+)", made.ptx)
    assert sorted(made.kernels) == sorted(expected)
    only_there = {"gemm_native": load.is_native(arch), "gemm_hopper": arch == "90a"}
    assert bool(expected) == only_there.get(name, True)
    for kernel, taken in made.kernels.items():
        assert taken.spilled_bytes == taken.stack_bytes == 0, kernel
        assert taken.registers <= 255
    assert "warning" not in made.log, made.log
    for entry in Text(made.ptx).kernels.values():  # and the interpreter knows every instruction
        assert not {s.opcode for s in entry.statements if s.function is None}


@pytest.mark.parametrize("arch", ["120a", "121a"])
def test_the_native_product_is_one_instruction_a_step(arch, tmp_path):
    """4 · 8 tiles of 16×8 outputs a warp, one MMA for 64 along K each."""
    code = sass("gemm_native", arch, tmp_path)
    assert len(re.findall(r"\bOMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3\.4X\b", code)) == 32
    assert "HMMA" not in code


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["gemm_portable", "gemm_small"])
def test_the_portable_products_are_fp16_mmas(name, arch, tmp_path):
    code = sass(name, arch, tmp_path)
    assert "HMMA.16816.F32" in code
    assert "OMMA" not in code


def test_the_fast_products_of_hopper_are_asynchronous(tmp_path):
    """Four steps of 16 along K; ptxas would say so if it let the products wait for each other."""
    code, log = sass("gemm_hopper", "90a", tmp_path), load.compiled("gemm_hopper", "90a").log
    for plan in launch.HOPPER:
        assert len(re.findall(rf"\bHGMMA\.64x{plan.tile_n}x16\.F32\b", code)) >= 4
    assert "serialized" not in log
    assert max(plan.shared_bytes for plan in launch.HOPPER) <= SHARED_KIB["90a"] * 1024


def test_conversions_are_instructions_where_the_gpu_has_them(tmp_path):
    for arch, e2m1, e4m3 in (("80", False, False), ("89", False, True), ("120a", True, True)):
        code = sass("quantize", arch, tmp_path)
        assert ("F2FP.SATFINITE.E2M1.F32" in code) == e2m1
        assert ("F2FP.SATFINITE.E4M3.F32" in code) == e4m3


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_contracted_or_flushed(arch, tmp_path):
    """What is fused was written as fma; FTZ would lose subnormals. Only a reciprocal of normal numbers begins
    with a guess."""
    for name in SOURCES:
        ptx = load.compiled(name, arch).ptx.replace("rcp.approx.ftz.f32", "")
        assert ".ftz" not in ptx, name
        assert "approx" not in ptx, name
    for name in ("quantize", "augment"):
        assert set(re.findall(r"fma\.\w+\.f32", load.compiled(name, arch).ptx)) == {"fma.rn.f32"}


def test_tiles_are_as_large_as_leaves_many_of_them():
    for (m, n), kernel in {
        (4096, 4096): "gemm_hopper_128x256",
        (65, 28672): "gemm_hopper_128x256",
        (64, 28672): "gemm_hopper_64x128",  # a second half of 128 rows would be empty
        (256, 4096): "gemm_hopper_64x128",
        (128, 2880): "gemm_hopper_64x64",
        (16, 28672): "gemm_small_16_1",
        (8, 4097): "gemm_small_8_1",  # more tiles than half of the blocks that there are at once
        (9, 4096): "gemm_small_16_2",
        (1, 4096): "gemm_small_8_2",
    }.items():
        assert launch.product("90a", m, n, 4096, exact=False).kernel == kernel
    assert launch.product("90a", 64, 64, 4112, exact=False) == launch.FAST
    assert launch.product("100a", 64, 64, 4096, exact=False) == launch.FAST
    assert launch.product("120a", 64, 64, 4096, exact=True) == launch.NATIVE
    assert launch.product("90a", 64, 64, 4096, exact=True) == launch.EXACT


def test_shared_memory_fits_the_smallest_gpu():
    """99 KiB is what sm_86, sm_89 and sm_120 have; two blocks of gemm_native fit one multiprocessor."""
    plans = [launch.NATIVE, launch.EXACT, launch.FAST, *launch.SMALL]
    assert max(plan.shared_bytes for plan in plans) <= min(SHARED_KIB.values()) * 1024
    assert 2 * (launch.NATIVE.shared_bytes + 1024) <= 100 * 1024


@pytest.mark.parametrize("arch", [arch for arch in SHARED_KIB if int(arch.rstrip("a")) >= 90])
def test_ptxas_knows_the_same_most_shared_memory(arch, tmp_path):
    """Before sm_90 it gives a block 48 KiB, the limit without opting in."""
    text = """extern "C" __global__ void k(int *x) {
        __shared__ int all[ELEMENTS];
        all[x[0]] = x[1];
        __syncthreads();
        x[2] = all[x[3]];
    }"""
    elements = SHARED_KIB[arch] * 1024 // 4
    sources = {"k.cu": text.replace("ELEMENTS", str(elements))}
    assert load.compile_text("k", sources, arch, tmp_path).kernels["k"].shared_bytes == 4 * elements
    with pytest.raises(RuntimeError, match=rf"too much shared data .*{hex(4 * elements)} max"):
        load.compile_text("k", {"k.cu": text.replace("ELEMENTS", str(elements + 1))}, arch, tmp_path)


def test_the_constants_of_the_formats_are_computed():
    """From the widths that the compile command states; and PTX stands in one file, without headers."""
    for name, text in TEXTS.items():
        code = re.sub(r"//.*", "", text)
        assert not re.search(r"\b(6\.|448|2688|464|480)", code), name
        assert ("asm" in code) == (name == "ptx.cuh"), name
        assert set(re.findall(r"#include (\S+)", code)) <= {f'"{header}"' for header in TEXTS}, name
        assert text.startswith(("//", "#ifdef")), name


def test_each_source_says_what_it_equals_and_how_it_is_launched():
    for name in SOURCES:
        head = TEXTS[f"{name}.cu"].split("#include")[0]
        assert "Equals emulator/" in head or "equals emulator/" in head, name
        assert "Launch:" in head, name


@pytest.mark.parametrize(
    ("broken", "place"), [("convert.cu", r"convert\.cu\(1\)"), ("formats.cuh", r"formats\.cuh\(1\)")]
)
def test_an_error_shows_file_and_line(broken, place, tmp_path):
    sources = TEXTS | {broken: "__device__ int x = undefined_name;\n" + TEXTS[broken]}
    with pytest.raises(
        RuntimeError, match=rf"convert\.cu does not compile for sm_80:\n{place}: error: .*undefin"
    ):
        load.compile_text("convert", sources, "80", tmp_path)
    assert not list(tmp_path.iterdir())


def counted(monkeypatch) -> list[str]:
    """Names of the sources that NVRTC compiles from now on."""
    compiler, version = load.nvrtc()
    names: list[str] = []

    class Counting:
        def __getattr__(self, name):
            return getattr(compiler, name)

        def createProgram(self, text, name, *rest):
            names.append(name)
            return compiler.createProgram(text, name, *rest)

    monkeypatch.setattr(load, "nvrtc", lambda: (Counting(), version))
    return names


def test_the_cache_is_keyed_by_source_options_and_compiler(monkeypatch, tmp_path):
    names = counted(monkeypatch)
    first = load.compile_text("convert", TEXTS, "80", tmp_path / "new folder")
    assert load.compile_text("convert", TEXTS, "80", tmp_path / "new folder") == first
    assert len(names) == 1
    changed = TEXTS | {"formats.cuh": TEXTS["formats.cuh"] + "\n"}
    load.compile_text("convert", changed, "80", tmp_path / "new folder")
    load.compile_text("convert", TEXTS, "86", tmp_path / "new folder")
    assert len(names) == 3
    monkeypatch.setattr(load, "OPTIONS", (*load.OPTIONS, "-DSOMETHING"))
    load.compile_text("convert", TEXTS, "80", tmp_path / "new folder")
    assert len(names) == 4
    compiler, _ = load.nvrtc()
    monkeypatch.setattr(load, "nvrtc", lambda: (compiler, (99, 0)))
    load.compile_text("convert", TEXTS, "80", tmp_path / "new folder")
    assert len(names) == 5
    assert not list(tmp_path.rglob("*.partial"))


def test_half_a_cache_entry_is_none(monkeypatch, tmp_path):
    names = counted(monkeypatch)
    first = load.compile_text("convert", TEXTS, "80", tmp_path)
    next(tmp_path.glob("*.log")).unlink()
    assert load.compile_text("convert", TEXTS, "80", tmp_path).ptx == first.ptx
    assert len(names) == 2


def test_without_a_cache_it_compiles_all_the_same(tmp_path):
    (tmp_path / "file").write_text("where a folder would be")
    made = load.compile_text("convert", TEXTS, "80", tmp_path / "file")
    assert made.kernels["tensor_scale"].registers > 0


def test_the_cubin_is_whole(tmp_path):
    """With its last byte, which CuPy drops; a tool that reads it to the end is the witness."""
    made = load.compiled("convert", "90a")
    assert load._whole(made.cubin) == made.cubin
    assert load._whole(made.cubin[:-1]) == made.cubin
    assert "encode_e2m1_f32" in sass("convert", "90a", tmp_path)


def test_targets_by_compute_capability():
    expected = {(8, 0): "80", (8, 6): "86", (8, 9): "89", (9, 0): "90a", (10, 0): "100a", (12, 0): "120a"}
    assert {capability: load.arch_of(capability) for capability in expected} == expected
    assert [load.is_native(arch) for arch in ("90a", "100a", "120a", "121a")] == [False, False, True, True]


def test_a_gpu_that_is_too_old_is_named():
    assert load.too_old((8, 0)) is None
    assert load.too_old((7, 5)) == (
        "the GPU has compute capability 7.5, and the kernels need 8.0 (A100) or higher"
    )


def test_a_missing_cupy_is_named(monkeypatch):
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    assert re.fullmatch(r"CuPy cannot be imported \(.*\); pip install .* brings it", load.why_not())


def test_a_missing_nvrtc_is_named(monkeypatch):
    def fail():
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr("cupy.cuda.nvrtc.getVersion", fail)
    assert re.fullmatch(
        r"NVRTC, the CUDA compiler, is missing \(libnvrtc.* file\); .* brings it", load.why_not()
    )


def test_a_missing_driver_or_gpu_is_named(monkeypatch):
    import cupy

    def fail():
        raise cupy.cuda.runtime.CUDARuntimeError(35)

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", fail)
    assert re.fullmatch(r"no NVIDIA driver with a GPU answers \(cudaErrorInsuffi.*\)", load.why_not())
    reason = backends.available()["gpu"]
    assert re.fullmatch(r"backend 'gpu' is not usable here: no NVIDIA driver .*\)\.", reason)
    assert "\n" not in reason
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    assert load.why_not() == "the NVIDIA driver finds no GPU"
    import gpu

    with pytest.raises(ImportError, match=r"gpu\.quantize needs a GPU: the NVIDIA driver finds no GPU\."):
        gpu.quantize([[1.0] * 16])
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        gpu.quantise  # noqa: B018


def test_resources_are_read_from_the_log():
    made = load.compiled("augment", "80")
    assert made.kernels["rmsnorm_augment_activations_f32"].shared_bytes == 4 * launch.THREADS
    spilled = replace(made, log=made.log.replace(" 0 bytes spill stores", " 24 bytes spill stores"))
    assert spilled.kernels["augment_weights_f32"].spilled_bytes == 24
