// What the product kernels share: where operands lie, codes as fp16 numbers, the end of an output.
#pragma once
#include "formats.cuh"

// One operand: `rows` rows of K codes, packed; scales in swizzled tiles; its tensor scale.
struct Operand {
    const u8 *codes, *scales;
    int rows, k;
    __device__ int tiles() const { return (k / BLOCK + 3) / 4; } // of scales, across: one for 64 along K
    __device__ const u8 *row(int r) const { return codes + (size_t)r * (k / 2); }
};

// 32 codes of a row from k on → 16 bytes of shared memory, zero where row or k are beyond the operand.
// A row starts at a multiple of 8 bytes; only if K is a multiple of 32 it is one of 16.
__device__ inline void copy_codes(u32 to, const Operand &x, int row, int k) {
    bool inside = row < x.rows;
    const u8 *from = x.codes + (inside ? (size_t)row * (x.k / 2) : 0);
    bool first = inside && k < x.k, second = inside && k + BLOCK < x.k;
    if (x.k % 32 == 0) {
        cp_async16(to, from + (first ? k / 2 : 0), first ? 16 : 0);
    } else {
        cp_async8(to, from + (first ? k / 2 : 0), first ? 8 : 0);
        cp_async8(to + 8, from + (second ? k / 2 + 8 : 0), second ? 8 : 0);
    }
}

// Eight codes → fp16 pairs (0, 2), (4, 6), (1, 3), (5, 7), each value times 2^-14: the fields moved to where fp16
// has them. So k is permuted within 8, in both operands alike.
__device__ inline void fp16_pairs(u32 (&pairs)[4], u32 codes) {
    constexpr u32 signs = 0x80808080, fields = 0x0E0E0E0E; // in the upper bytes of four fp16 numbers
    u32 even = (codes << 1 & fields) | (codes << 4 & signs), odd = (codes >> 3 & fields) | (codes & signs);
    pairs[0] = __byte_perm(even, 0, 0x1404), pairs[1] = __byte_perm(even, 0, 0x3424);
    pairs[2] = __byte_perm(odd, 0, 0x1404), pairs[3] = __byte_perm(odd, 0, 0x3424);
}

// The same times 2^14 and a scale, given as an fp16 pair: e2m1·e4m3, exact.
__device__ inline void scaled_fp16_pairs(u32 (&pairs)[4], u32 codes, u32 scale) {
    fp16_pairs(pairs, codes);
#pragma unroll
    for (int p = 0; p < 4; p++) pairs[p] = mul_f16x2(mul_f16x2(pairs[p], 0x74007400), scale);
}

// The epilogue of all products is y = fl(acc · fl(tensor_scale_a · tensor_scale_b)), emulator/gemm.py: _epilogue.
// A NaN that mul.f32 returns is 0x7FFFFFFF: PTX ISA, "Floating Point Instructions".

// Two neighbours of row m, at an even column n.
__device__ inline void store_pair(float *y, int m, int n, int rows, int columns, float y0, float y1) {
    if (m >= rows || n >= columns) return;
    float *to = y + (size_t)m * columns + n;
    if (columns % 2 == 0) {
        *reinterpret_cast<float2 *>(to) = make_float2(y0, y1);
    } else {
        to[0] = y0;
        if (n + 1 < columns) to[1] = y1;
    }
}
