// x (rows, K) → packed codes (rows, K/2), swizzled block scales: codes = E2M1(fl(x / step)),
// step = fl(scale · tensor_scale), scale = E4M3(fl(fl(amax / 6) / tensor_scale)) floored at 2⁻⁹; and back.
// Equals emulator/quantize.py: quantize, dequantize. Launch: grid (rows filled up to 128s, ⌈columns / threads⌉),
// one thread a block of 16; columns is K/16 filled up to 4s, and what is filled up becomes zero.
#include "blocks.cuh"

template <class T>
__device__ inline void quantize(const T *x, int rows, int k, const float *tensor_scale, u32 *largest, u8 *codes,
                                u8 *scales) {
    int row = blockIdx.x, s = blockIdx.y * blockDim.x + threadIdx.x, tiles = (k / BLOCK + 3) / 4;
    if (s >= 4 * tiles) return;
    u32 scale = 0;
    if (row < rows && s < k / BLOCK) {
        size_t first = (size_t)row * k + s * BLOCK;
        float values[BLOCK];
        read<BLOCK>(values, x + first);
        Block block = quantize_block(values, *tensor_scale, largest);
        store_codes(codes + first / 2, block);
        scale = block.scale;
    }
    scales[scale_offset(row, s, tiles)] = scale;
}
#define QUANTIZE(name, T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256, 5)                                                     \
        quantize_##name(const T *x, int rows, int k, const float *tensor_scale, u32 *largest, u8 *codes,     \
                        u8 *scales) {                                                                        \
        quantize(x, rows, k, tensor_scale, largest, codes, scales);                                          \
    }
FOR_EACH_INPUT(QUANTIZE)

// value = fl(e2m1 · e4m3 · tensor_scale): the first product is exact. Grid (rows, ⌈K/16 / threads⌉).
extern "C" __global__ void dequantize(const u8 *codes, const u8 *scales, const float *tensor_scale, int k,
                                      float *values) {
    int row = blockIdx.x, s = blockIdx.y * blockDim.x + threadIdx.x;
    if (s >= k / BLOCK) return;
    size_t first = (size_t)row * k + s * BLOCK;
    float scale = E4M3::value(scales[scale_offset(row, s, (k / BLOCK + 3) / 4)]);
    u64 packed = *reinterpret_cast<const u64 *>(codes + first / 2);
#pragma unroll
    for (int i = 0; i < BLOCK; i++)
        values[first + i] = __fmul_rn(__fmul_rn(E2M1::value(packed >> 4 * i & 0xF), scale), *tensor_scale);
}

// One code a byte and row-major scales ↔ packed and swizzled, with zeros where rows and columns are filled up.
// Equals arcquant_ref/layout.py. Grids as in quantize and dequantize.
extern "C" __global__ void pack(const u8 *codes, const u8 *block_scales, int rows, int k, u8 *packed,
                                u8 *scales) {
    int row = blockIdx.x, s = blockIdx.y * blockDim.x + threadIdx.x, tiles = (k / BLOCK + 3) / 4;
    if (s >= 4 * tiles) return;
    bool inside = row < rows && s < k / BLOCK;
    if (inside) {
        size_t first = (size_t)row * k + s * BLOCK;
        for (int i = 0; i < BLOCK / 2; i++)
            packed[first / 2 + i] = codes[first + 2 * i] | codes[first + 2 * i + 1] << 4;
    }
    scales[scale_offset(row, s, tiles)] = inside ? block_scales[(size_t)row * (k / BLOCK) + s] : 0;
}

extern "C" __global__ void unpack(const u8 *packed, const u8 *scales, int k, u8 *codes, u8 *block_scales) {
    int row = blockIdx.x, s = blockIdx.y * blockDim.x + threadIdx.x;
    if (s >= k / BLOCK) return;
    size_t first = (size_t)row * k + s * BLOCK;
    for (int i = 0; i < BLOCK; i++) codes[first + i] = packed[(first + i) / 2] >> 4 * (i % 2) & 0xF;
    block_scales[(size_t)row * (k / BLOCK) + s] = scales[scale_offset(row, s, (k / BLOCK + 3) / 4)];
}
