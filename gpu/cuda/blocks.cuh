// A block of 16 numbers → 8 bytes of codes and a scale, and where they go. docs/spec.md, sections 2 and 3.
// Equals emulator/quantize.py: quantize_blocks and _tensor_scale; arcquant_ref/layout.py: pack, swizzle_128x4.
#pragma once
#include "formats.cuh"

// 1 / y = high · (1 + e + e² + …) = high + low, for y far from the ends of float32. From a guess within two ulps one
// correction leads to high, next to 1 / y. A little more than e² stands for what comes after it: if y is 2 - 2^-23,
// low would make a tie without it.
struct Reciprocal {
    float high, low;
    __device__ constexpr Reciprocal(float high, float low) : high(high), low(low) {}
    __device__ Reciprocal(float y) {
        float guess = rcp_approx(y);
        high = __fmaf_rn(guess, __fmaf_rn(-y, guess, 1), guess);
        float e = __fmaf_rn(-y, high, 1);
        low = __fmul_rn(high, __fmaf_rn(e, __fmul_rn(e, 1.125f), e));
    }
};

// x / y up to its last bit: it is rounded once from what differs by less than 2^-46 of it, and no quotient of
// float32 numbers that decides a code comes so near to where float32, E2M1 or E4M3 would round otherwise
// (tests/test_gpu.py tries all of them: test_the_short_division_decides_every_code_alike). Where a product is
// subnormal more is lost; such quotients are far below the least code, and below the least scale.
__device__ inline float quotient_of(float x, const Reciprocal &y) {
    return __fmaf_rn(x, y.high, __fmul_rn(x, y.low));
}

// A tensor scale, and what all blocks need of it.
struct TensorScale {
    float value;
    Reciprocal reciprocal;
    float limit; // of amax / step, for codes by the short division; 0 near the ends of float32
    __device__ TensorScale(float x) : value(x), reciprocal(x), limit(0) {
        if (x > power_of_two(-90) && x < power_of_two(90)) limit = E2M1::largest + 0.5f;
        keep(limit);
    }
};

constexpr Reciprocal SIXTH(1 / E2M1::largest, (float)(1.0 / E2M1::largest - 1 / E2M1::largest));

struct Block {
    u32 codes[2]; // even k in the low nibble
    u32 scale;
};

// Bits of the largest |x|, or of a NaN if there is one: above those of infinity.
__device__ inline u32 amax_bits(const float (&x)[BLOCK]) {
    float amax[BLOCK / 2];
#pragma unroll
    for (int i = 0; i < BLOCK / 2; i++) amax[i] = max_nan(fabsf(x[2 * i]), fabsf(x[2 * i + 1]));
#pragma unroll
    for (int n = BLOCK / 4; n > 0; n /= 2)
#pragma unroll
        for (int i = 0; i < n; i++) amax[i] = max_nan(amax[i], amax[i + n]);
    return __float_as_uint(amax[0]);
}

__device__ inline u32 nearest_scale(float v) { return nearest_e4m3(fmaxf(v, E4M3::least_positive)); }

// By division and from the bits, whatever the numbers are; one after the other, as this is rare.
__device__ inline Block quantize_any_block(float (&x)[BLOCK], float tensor_scale, u32 amax) {
    // the order of these operations is normative
    float v = __fdiv_rn(__fdiv_rn(__uint_as_float(amax), E2M1::largest), tensor_scale);
    Block block = {};
    block.scale = nearest_scale(v);
    float step = __fmul_rn(E4M3::positive_value(block.scale), tensor_scale);
#pragma unroll 1
    for (int i = 0; i < BLOCK; i++) { // after 16 turns everything is where it was
        u32 code = nearest_e2m1(__fdiv_rn(x[0], step));
        block.codes[0] = block.codes[0] >> 4 | block.codes[1] << 28;
        block.codes[1] = block.codes[1] >> 4 | code << 28;
        float first = x[0];
#pragma unroll
        for (int j = 1; j < BLOCK; j++) x[j - 1] = x[j];
        x[BLOCK - 1] = first;
    }
    return block;
}

// Infinity and NaN are rare: only they are told, so that the caller can be.
__device__ inline void tell_non_finite(u32 *largest, u32 amax) {
    if (amax >= INF) atomicMax(largest, amax);
}

__device__ inline Block quantize_block(float (&x)[BLOCK], const TensorScale &tensor_scale, u32 *largest) {
    u32 amax = amax_bits(x);
    float a = __uint_as_float(amax), sixth = quotient_of(a, SIXTH);
    float v = quotient_of(sixth, tensor_scale.reciprocal);
    Block block;
    block.scale = nearest_scale(v);
    float step = __fmul_rn(E4M3::positive_value(block.scale), tensor_scale.value);
    bool beyond = !(a < __fmul_rn(step, tensor_scale.limit));
    if (beyond && !(a < __fmul_rn(step, tensor_scale.limit * power_of_two(27)))) { // also NaN, infinity
        tell_non_finite(largest, amax);
        return quantize_any_block(x, tensor_scale.value, amax);
    }
    Reciprocal reciprocal(step);
    float quotient[BLOCK];
#pragma unroll
    for (int i = 0; i < BLOCK; i++) quotient[i] = quotient_of(x[i], reciprocal);
    if (beyond) { // a static tensor scale saturates
#pragma unroll
        for (int i = 0; i < BLOCK; i++) quotient[i] = fminf(fabsf(quotient[i]), E2M1::largest);
    }
    block.codes[0] = nearest_e2m1x8(x, quotient);
    block.codes[1] = nearest_e2m1x8(x + 8, quotient + 8);
    return block;
}

__device__ inline float tensor_scale_of(u32 amax) {
    if (amax == 0) return 1;
    return fmaxf(__fdiv_rn(__uint_as_float(amax), E2M1::largest * E4M3::largest), power_of_two(-126));
}

// Byte of the scale of (row, s) in tiles of 128 rows by 4 scales, `tiles` of them across.
__device__ inline size_t scale_offset(u32 row, u32 s, u32 tiles) {
    return ((u64)(row / 128) * tiles + s / 4) * 512 + row % 32 * 16 + row / 32 % 4 * 4 + s % 4;
}

__device__ inline void store_codes(u8 *codes, const Block &block) {
    *reinterpret_cast<uint2 *>(codes) = make_uint2(block.codes[0], block.codes[1]);
}
