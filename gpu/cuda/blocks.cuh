// A block of 16 numbers → 8 bytes of codes and a scale, and where they go. docs/spec.md, sections 2 and 3.
// Equals emulator/quantize.py: quantize_blocks and _tensor_scale; arcquant_ref/layout.py: pack, swizzle_128x4.
#pragma once
#include "formats.cuh"

struct Block {
    u32 codes[2]; // even k in the low nibble
    u32 scale;
};

__device__ inline u32 amax_bits(const float (&x)[BLOCK]) {
    u32 amax = 0;
#pragma unroll
    for (int i = 0; i < BLOCK; i++) amax = max(amax, __float_as_uint(x[i]) & MAGNITUDE);
    return amax;
}

// fl(x / step), where E2M1 can tell: above 8 it is the largest code anyway, below 1/8 zero, with the sign of x.
// One reciprocal serves the block: a product with it is less than two ulp off, the first correction makes it
// faithful, the second correctly rounded (Markstein 1990: r is fl(1 / step), and x − q·step is exact because
// step is far from the ends of float32). Elsewhere it is the division itself.
__device__ inline void divide(float (&quotient)[BLOCK], const float (&x)[BLOCK], float step) {
    if (step >= power_of_two(-100) && step <= power_of_two(100)) {
        float r = __fdiv_rn(1, step);
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            float product = __fmul_rn(x[i], r), q = product;
            q = __fmaf_rn(__fmaf_rn(-q, step, x[i]), r, q);
            q = __fmaf_rn(__fmaf_rn(-q, step, x[i]), r, q);
            q = fabsf(product) < 8 ? q : product; // an infinite product would make q NaN
            quotient[i] = __uint_as_float((__float_as_uint(q) & MAGNITUDE) | (__float_as_uint(x[i]) & ~MAGNITUDE));
        }
    } else {
#pragma unroll
        for (int i = 0; i < BLOCK; i++) quotient[i] = __fdiv_rn(x[i], step);
    }
}

__device__ inline Block quantize_block(const float (&x)[BLOCK], float tensor_scale, u32 amax) {
    // the order of these operations is normative
    float v = __fdiv_rn(__fdiv_rn(__uint_as_float(amax), E2M1::largest), tensor_scale);
    Block block;
    block.scale = nearest_e4m3(fmaxf(v, E4M3::least_positive));
    float step = __fmul_rn(E4M3::value(block.scale), tensor_scale);
    float quotient[BLOCK];
    divide(quotient, x, step);
    block.codes[0] = nearest_e2m1x8(quotient);
    block.codes[1] = nearest_e2m1x8(quotient + 8);
    return block;
}

__device__ inline float tensor_scale_of(u32 amax) {
    if (amax == 0) return 1;
    return fmaxf(__fdiv_rn(__uint_as_float(amax), E2M1::largest * E4M3::largest), power_of_two(-126));
}

// Byte of the scale of (row, s) in tiles of 128 rows by 4 scales, `tiles` of them across.
__device__ inline size_t scale_offset(int row, int s, int tiles) {
    return ((size_t)(row / 128) * tiles + s / 4) * 512 + row % 32 * 16 + row / 32 % 4 * 4 + s % 4;
}

__device__ inline void store_codes(u8 *codes, const Block &block) {
    *reinterpret_cast<uint2 *>(codes) = make_uint2(block.codes[0], block.codes[1]);
}

// Infinity and NaN are rare: only they are told, so that the caller can be.
__device__ inline void tell_non_finite(u32 *largest, u32 amax) {
    if (amax >= INF) atomicMax(largest, amax);
}
