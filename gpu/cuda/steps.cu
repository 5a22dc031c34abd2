// One step D = A·Bᵀ + C for each warp, nothing else: what the model of a tensor core is compared with on hardware.
// Equals emulator/tensor_core.py: mma_m16n8k16 (on Hopper) and mma_m16n8k64 (RTX Blackwell).
// Launch: grid (steps, 1), 32 threads. Matrices are row-major, step after step; C and D (16, 8) float32.
#include "ptx.cuh"

template <class T> __device__ inline T *of_step(T *all, int size) { return all + (size_t)blockIdx.x * size; }
__device__ inline u32 word(const void *at) { return *reinterpret_cast<const u32 *>(at); }

// a (16, 16), b (8, 16) fp16
extern "C" __global__ void step_f16(const u16 *a, const u16 *b, const float *c, float *d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    a = of_step(a, 16 * 16), b = of_step(b, 8 * 16), c = of_step(c, 16 * 8), d = of_step(d, 16 * 8);
    u32 fa[4];
    float fc[4], fd[4];
    for (int r = 0; r < 4; r++) fa[r] = word(a + (g + 8 * (r & 1)) * 16 + 2 * t + 8 * (r >> 1));
    for (int e = 0; e < 4; e++) fc[e] = c[(g + 8 * (e >> 1)) * 8 + 2 * t + (e & 1)];
    mma_f16(fd, fa, word(b + g * 16 + 2 * t), word(b + g * 16 + 2 * t + 8), fc);
    for (int e = 0; e < 4; e++) d[(g + 8 * (e >> 1)) * 8 + 2 * t + (e & 1)] = fd[e];
}

#ifdef NATIVE
// a (16, 32), b (8, 32) bytes of two codes; sfa (16, 4), sfb (8, 4)
extern "C" __global__ void step_nvfp4(const u8 *a, const u8 *b, const u8 *sfa, const u8 *sfb, const float *c,
                                      float *d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    a = of_step(a, 16 * 32), b = of_step(b, 8 * 32), sfa = of_step(sfa, 16 * 4), sfb = of_step(sfb, 8 * 4);
    c = of_step(c, 16 * 8), d = of_step(d, 16 * 8);
    u32 fa[4];
    float acc[4];
    for (int r = 0; r < 4; r++) fa[r] = word(a + (g + 8 * (r & 1)) * 32 + 4 * t + 16 * (r >> 1));
    for (int e = 0; e < 4; e++) acc[e] = c[(g + 8 * (e >> 1)) * 8 + 2 * t + (e & 1)];
    mma_nvfp4(acc, fa, word(b + g * 32 + 4 * t), word(b + g * 32 + 4 * t + 16), word(sfa + (g + 8 * (t & 1)) * 4),
              word(sfb + g * 4));
    for (int e = 0; e < 4; e++) d[(g + 8 * (e >> 1)) * 8 + 2 * t + (e & 1)] = acc[e];
}
#endif
