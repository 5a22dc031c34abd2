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

// |x| / step up to its last bit, with the reciprocal correctly rounded: one correction leaves an error below 2^-45
// of it, and no quotient of float32 numbers that decides a code comes so near to where float32 or E2M1 would round
// otherwise (tests/test_gpu.py tries all of them: test_the_short_division_decides_every_code_alike).
__device__ inline float quotient_of(float x, float step, float reciprocal) {
    float q = __fmul_rn(fabsf(x), reciprocal);
    return __fmaf_rn(__fmaf_rn(-q, step, fabsf(x)), reciprocal, q);
}

__device__ inline Block quantize_block(const float (&x)[BLOCK], float tensor_scale, u32 amax) {
    // the order of these operations is normative
    float v = __fdiv_rn(__fdiv_rn(__uint_as_float(amax), E2M1::largest), tensor_scale);
    Block block;
    block.scale = nearest_e4m3(fmaxf(v, E4M3::least_positive));
    float step = __fmul_rn(E4M3::value(block.scale), tensor_scale), quotient[BLOCK];
    // Not so: scales near the ends of float32, NaN, infinity, a static tensor scale that saturates
    bool ordinary = step > power_of_two(-100) && step < power_of_two(100) &&
                    __uint_as_float(amax) < __fmul_rn(step, E2M1::largest + 0.5f);
    if (ordinary) {
        float reciprocal = __frcp_rn(step);
#pragma unroll
        for (int i = 0; i < BLOCK; i++) quotient[i] = quotient_of(x[i], step, reciprocal);
        block.codes[0] = nearest_e2m1x8(x, quotient);
        block.codes[1] = nearest_e2m1x8(x + 8, quotient + 8);
    } else {
#pragma unroll
        for (int i = 0; i < BLOCK; i++) quotient[i] = __fdiv_rn(x[i], step);
        block.codes[0] = nearest_e2m1x8(quotient);
        block.codes[1] = nearest_e2m1x8(quotient + 8);
    }
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
