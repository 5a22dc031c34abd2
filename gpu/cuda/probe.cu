// What the hardware alone does. D = A·Bᵀ + C, one MMA instruction a warp on given operands, which gpu.verify compares
// with the emulator; and reading bytes, next to which gpu.bench sets the products that read as many.
// Equals emulator/tensor_core.py: half_warps on a Hopper GPU, nvfp4_warps on an RTX Blackwell GPU.
// A (steps, 16 rows), B (steps, 8 rows): a row is 8 words, of 16 numbers or of 64 packed codes; C and D
// (steps, 16, 8). Launch: 256 threads = 8 steps; grid ⌈steps / 8⌉. add_words: blocks of whole warps, any grid.
#include "ptx.cuh"

// Registers of one lane. Both kinds of MMA have their words at the same places.
struct Step {
    u32 a[4], b[2];
    float d[4]; // C to begin with
    int index, g, t;

    __device__ Step(const u32 *of_a, const u32 *of_b, const float *of_c) {
        index = (blockIdx.x * blockDim.x + threadIdx.x) / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (int r = 0; r < 4; r++) a[r] = of_a[(index * 16 + g + 8 * (r & 1)) * 8 + t + 4 * (r >> 1)];
        for (int r = 0; r < 2; r++) b[r] = of_b[(index * 8 + g) * 8 + t + 4 * r];
        for (int e = 0; e < 4; e++) d[e] = of_c[at(e)];
    }
    __device__ int at(int e) const { return (index * 16 + g + 8 * (e >> 1)) * 8 + 2 * t + (e & 1); }
    __device__ void store(float *to) const {
        for (int e = 0; e < 4; e++) to[at(e)] = d[e];
    }
};

__device__ inline bool beyond(int steps) { return (blockIdx.x * blockDim.x + threadIdx.x) / 32 >= steps; }

#define HALF(name)                                                                                           \
    extern "C" __global__ void mma_m16n8k16_##name(const u32 *a, const u32 *b, const float *c, int steps,    \
                                                   float *d) {                                               \
        if (beyond(steps)) return;                                                                           \
        Step step(a, b, c);                                                                                  \
        mma_##name(step.d, step.a, step.b[0], step.b[1], step.d);                                            \
        step.store(d);                                                                                       \
    }
HALF(f16)
HALF(bf16)

#ifdef NATIVE
// Scales: sfa (steps, 16), sfb (steps, 8), a word of four bytes for each row.
extern "C" __global__ void mma_m16n8k64(const u32 *a, const u32 *b, const u32 *sfa, const u32 *sfb,
                                        const float *c, int steps, float *d) {
    if (beyond(steps)) return;
    Step step(a, b, c);
    u32 of_a = sfa[step.index * 16 + step.g + 8 * (step.t & 1)], of_b = sfb[step.index * 8 + step.g];
    mma_nvfp4(step.d, step.a, step.b[0], step.b[1], of_a, of_b);
    step.store(d);
}
#endif

// The sum of all words modulo 2^32, in parts: one for each warp. Four loads are under way at a time.
extern "C" __global__ void add_words(const uint4 *words, long long n, u32 *sums) {
    long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x, all = (long long)gridDim.x * blockDim.x;
    u32 sum = 0;
#pragma unroll 4
    for (long long i = thread; i < n; i += all) {
        uint4 four = words[i];
        sum += four.x + four.y + four.z + four.w;
    }
    sum = __reduce_add_sync(~0u, sum);
    if (threadIdx.x % 32 == 0) sums[thread / 32] = sum;
}
