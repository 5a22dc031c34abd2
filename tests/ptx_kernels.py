"""Small kernels for the tests of the PTX interpreter: CUDA for NVRTC, and PTX of one instruction."""

from functools import cache

import numpy as np
from support import optional

from emulator.ptx import Memory, Module

ARCHS = ("80", "90a", "120a")
OPTIONS = ("-ftz=false", "-fmad=false", "-lineinfo", "-std=c++17")
THREADS = 64


@cache
def compiled(source: str, arch: str = "80") -> Module:
    """CUDA source → its kernels, the PTX unmodified; a skip without CuPy."""
    nvrtc = optional("cupy").cuda.nvrtc
    program = nvrtc.createProgram(source, "k.cu", [], [])
    try:
        nvrtc.compileProgram(program, [f"-arch=sm_{arch}", *OPTIONS])
    except nvrtc.NVRTCError as error:
        raise AssertionError(nvrtc.getProgramLog(program)) from error
    return Module(nvrtc.getPTX(program).decode())


def outputs(module, kernel, arguments, results, grid=1, block=THREADS, shared_bytes=0):
    """Launch with arrays uploaded, then buffers for `results`, (dtype, shape) each, that the kernel fills."""
    memory = Memory()
    given = [memory.upload(x) if isinstance(x, np.ndarray) else x for x in arguments]
    made = [memory.empty(np.dtype(dtype).itemsize * int(np.prod(shape))) for dtype, shape in results]
    module.launch(kernel, (grid, 1, 1), (block, 1, 1), [*given, *made], memory, shared_bytes)
    return [buffer.download(dtype, shape) for buffer, (dtype, shape) in zip(made, results)]


def output(module, kernel, arguments, dtype, shape, **how):
    return outputs(module, kernel, arguments, [(dtype, shape)], **how)[0]


def ptx_of(instructions: str, sources: list[int], result: int) -> str:
    """A kernel that runs `instructions` in each thread: a, b, c are its operands, of so many bits, d is the
    result. Predicates p and q, scratch x (32 bits) and y (64 bits) are declared."""
    names = "abc"[: len(sources)]
    parameters = ", ".join(f".param .u64 p_{name}" for name in (*names, "d"))
    declared = "".join(f".reg .b{bits} {name}; " for name, bits in zip((*names, "d"), (*sources, result)))
    loads = "".join(
        f"ld.param.u64 base, [p_{name}]; mad.wide.u32 at, i, {bits // 8}, base;\n"
        f"ld.global.b{bits} {name}, [at];\n"
        for name, bits in zip(names, sources)
    )
    return f"""
.version 9.0
.target sm_120a
.address_size 64
.visible .entry k({parameters})
{{
.reg .b32 i, n, t; .reg .b64 base, at; .reg .pred p, q; .reg .b32 x; .reg .b64 y; {declared}
mov.u32 i, %ctaid.x; mov.u32 n, %ntid.x; mov.u32 t, %tid.x; mad.lo.u32 i, i, n, t;
{loads}{{
{instructions}
}}
ld.param.u64 base, [p_d]; mad.wide.u32 at, i, {result // 8}, base; st.global.b{result} [at], d;
ret;
}}
"""


def one(instructions: str, *sources: np.ndarray, dtype) -> np.ndarray:
    """`instructions` for each element of the sources, all of one length, a multiple of 32."""
    bits = [x.dtype.itemsize * 8 for x in sources]
    module = module_of(ptx_of(instructions, bits, np.dtype(dtype).itemsize * 8))
    block = THREADS if len(sources[0]) % THREADS == 0 else 32
    return output(
        module, "k", list(sources), dtype, len(sources[0]), grid=len(sources[0]) // block, block=block
    )


@cache
def module_of(ptx: str) -> Module:
    return Module(ptx)
