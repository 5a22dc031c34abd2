// E2M1, E4M3 and the numbers that come in, from and to float32. The widths E2M1_EXPONENT_BITS, … and BLOCK are
// defined by the compile command; every constant of the formats is computed from them.
// Equals emulator/formats.py: nearest_e2m1, nearest_e4m3, value_e2m1, value_e4m3 and the rule for NaN.
#pragma once
#include "ptx.cuh"

constexpr u32 MAGNITUDE = 0x7FFFFFFF, INF = 0x7F800000;
constexpr u32 NAN_BITS = 0x7FFFFFFF; // the NaN that the hardware returns
constexpr int MANTISSA = 23, BIAS = 127;

__device__ constexpr float power_of_two(int n) { // |n| < 127
    float x = 1;
    for (int i = 0; i < n; i++) x *= 2;
    for (int i = 0; i > n; i--) x /= 2;
    return x;
}

template <int EXPONENT_BITS, int MANTISSA_BITS, int NAN_CODES> struct Format {
    static constexpr int bias = (1 << (EXPONENT_BITS - 1)) - 1;
    static constexpr int mantissa_bits = MANTISSA_BITS, magnitude_bits = EXPONENT_BITS + MANTISSA_BITS;
    static constexpr u32 magnitude = (1u << magnitude_bits) - 1; // also what a NaN becomes
    static constexpr u32 largest_code = magnitude - NAN_CODES;
    static constexpr int shift = MANTISSA - MANTISSA_BITS;
    static constexpr u32 rebias = (u32)(BIAS - bias) << MANTISSA_BITS;
    static constexpr u32 largest_bits = (largest_code + rebias) << shift;
    static constexpr u32 least_normal_bits = (u32)(BIAS + 1 - bias) << MANTISSA;
    static constexpr float largest = (1 + (float)(largest_code % (1 << MANTISSA_BITS)) / (1 << MANTISSA_BITS)) *
                                     power_of_two((int)(largest_code >> MANTISSA_BITS) - bias);
    static constexpr float least_positive = power_of_two(1 - bias - MANTISSA_BITS);
    // the float32 whose last bit is worth least_positive: adding it rounds a number to a subnormal code
    static constexpr u32 magic = (u32)(BIAS + MANTISSA + 1 - bias - MANTISSA_BITS) << MANTISSA;

    // Nearest code: ties to even, saturating, the sign of zero kept, NaN → magnitude.
    __device__ static u32 nearest(float x) {
        u32 bits = __float_as_uint(x), a = min(bits & MAGNITUDE, largest_bits);
        u32 to_even = (1u << (shift - 1)) - 1 + (a >> shift & 1);
        u32 normal = ((a + to_even) >> shift) - rebias;
        u32 subnormal = __float_as_uint(__fadd_rn(__uint_as_float(a), __uint_as_float(magic))) - magic;
        u32 code = a >= least_normal_bits ? normal : subnormal;
        u32 sign = bits >> (31 - magnitude_bits) & (1u << magnitude_bits);
        return (bits & MAGNITUDE) > INF ? magnitude : code | sign;
    }

    // Moved to where float32 has the fields, a code is its value times 2^(bias − 127): exact, subnormals too.
    __device__ static float positive_value(u32 code) { // of a code without sign that is not NaN
        return __fmul_rn(__uint_as_float(code << shift), power_of_two(BIAS - bias));
    }
    __device__ static float value(u32 code) {
        float x = positive_value(code & magnitude);
        u32 bits = (code & magnitude) > largest_code ? NAN_BITS : __float_as_uint(x);
        return __uint_as_float(bits | (code >> magnitude_bits) << 31);
    }
};
typedef Format<E2M1_EXPONENT_BITS, E2M1_MANTISSA_BITS, E2M1_NAN_CODES> E2M1;
typedef Format<E4M3_EXPONENT_BITS, E4M3_MANTISSA_BITS, E4M3_NAN_CODES> E4M3;

// Eight numbers below 7, and the signs of others → eight codes, the first in the lowest nibble.
__device__ inline u32 nearest_e2m1x8(const float *signs, const float *numbers) {
#if __CUDA_ARCH__ >= 1000
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = copysignf(numbers[i], signs[i]);
    return cvt_e2m1x8(x);
#else
    // A code counts halves up to 2, ones up to 4, twos up to 6. A sum whose last bit is worth a half up to 2^23, a
    // one from there on, rounds to halves or ones; of another one the last bit is worth two. The lesser counts.
    constexpr float below = (1 << MANTISSA) - 2, twos = 3 << MANTISSA;
    constexpr u32 below_bits = ((BIAS + MANTISSA) << MANTISSA) - 4;
    constexpr u32 twos_bits = ((BIAS + MANTISSA + 1) << MANTISSA) + (1 << (MANTISSA - 1));
    u32 codes = 0, sign = 0;
#pragma unroll
    for (int i = 7; i >= 0; i--) {
        u32 low = __float_as_uint(__fadd_rn(fabsf(numbers[i]), below));
        u32 high = __float_as_uint(__fadd_rn(fabsf(numbers[i]), twos)) - (twos_bits - 4 - below_bits);
        codes = (codes << 4) + min(high, low);
        sign = __funnelshift_l(__float_as_uint(signs[i]), sign, 4);
    }
    return codes - below_bits * 0x11111111u | sign & 0x88888888;
#endif
}

__device__ inline u32 nearest_e2m1(float x) {
#if __CUDA_ARCH__ >= 1000
    const float alone[8] = {x};
    return cvt_e2m1x8(alone) & 0xF;
#else
    return E2M1::nearest(x);
#endif
}

__device__ inline u32 nearest_e4m3(float x) {
#if __CUDA_ARCH__ >= 890
    return cvt_e4m3(x);
#else
    return E4M3::nearest(x);
#endif
}

// Two codes, signs cleared, in the lower half → an fp16 pair, exact. NaN stays NaN.
__device__ inline u32 f16x2_of_e4m3x2(u32 codes) {
#if __CUDA_ARCH__ >= 890
    return cvt_f16x2_e4m3x2((u16)codes);
#else
    u32 fields = __byte_perm(codes, 0, 0x1404), nan = (fields + 0x01000100) >> 15 & 0x00010001;
    return mul_f16x2(fields >> 1, 0x5C005C00) | nan * 0x7FFF; // moved to where fp16 has them, times 2^8
#endif
}

// Codes i and i + 4 of eight → an fp16 pair: their fields, moved to where fp16 has them, times 2^14.
__device__ inline u32 f16x2_of_e2m1x2(u32 codes, int i) {
    u32 fields = i < 3 ? codes << (9 - 4 * i) : codes >> (4 * i - 9), signs = codes << (12 - 4 * i);
    return mul_f16x2(fields & 0x0E000E00 | signs & 0x80008000, 0x74007400);
}

// What a matrix may hold: float32, float16, bfloat16. `read` widens N neighbours, 16 bytes at a time.
struct F32 {
    u32 bits;
    __device__ float value() const { return __uint_as_float(bits); }
};
struct F16 {
    u16 bits;
    __device__ float value() const { return float_of_f16(bits); }
};
struct BF16 {
    u16 bits;
    __device__ float value() const { return __uint_as_float((u32)bits << 16); }
};

template <int N, class T> __device__ inline void read(float *x, const T *from) {
    constexpr int each = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < N / each; i++) {
        uint4 words = reinterpret_cast<const uint4 *>(from)[i];
        const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < each; j++) {
            T one;
            one.bits = sizeof(T) == 4 ? w[j] : w[j / 2] >> 16 * (j % 2);
            x[i * each + j] = one.value();
        }
    }
}

// One kernel for each kind of number.
#define FOR_EACH_INPUT(KERNEL) KERNEL(f32, F32) KERNEL(f16, F16) KERNEL(bf16, BF16)
