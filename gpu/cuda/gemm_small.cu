// Y = A·Bᵀ for M up to 8 or 16, as fast as B can be read: e2m1·e4m3 as fp16, exact, in fp16 mma.m16n8k16 whose
// 16 rows are rows of B. K is dealt out in pieces of 128 to eight warps, piece p to warp p mod 8; each warp
// chains its pieces over k = 0, 16, … from +0, and the eight sums are added in order, rounded to nearest.
// Equals emulator/gemm.py: matmul_fp16(a, b, chains=8).
//
// Launch: grid (1, 8·⌈N/128⌉), 256 threads. A block takes rows 4q … 4q+3, and those 32, 64 and 96 further, of a
// tile of 128: their scales are 64 neighbouring bytes for each 64 along K. Dynamic shared memory: STAGES pieces
// for each warp, which waits for nobody but itself.
#include "tiles.cuh"

constexpr int WARPS = 8, STAGES = 4, PIECE = 128, ROWS = 16;
constexpr int ROW_BYTES = PIECE / 2, STEPS = PIECE / 64, SCALES = 64; // of B, for one step of 64
constexpr u32 SIGNS = 0x80008000, FIELDS = 0x0E000E00;
extern __shared__ uint4 shared[];

template <int M> struct Stage {
    static constexpr int b_scales = ROWS * ROW_BYTES, a_codes = b_scales + STEPS * SCALES;
    static constexpr int a_scales = a_codes + M * ROW_BYTES, bytes = a_scales + STEPS * M * 16;
};

// Four chunks of 16 bytes a row, turned so that the same chunk of 8 rows meets all 32 banks once.
__device__ inline int chunk_offset(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ row >> 1) & 3) * 16; }

__device__ inline int row_of_b(int i) { return blockIdx.y / 8 * 128 + i / 4 * 32 + blockIdx.y % 8 * 4 + i % 4; }

template <int M> __device__ inline void load_piece(u32 stage, const Operand &a, const Operand &b, int piece) {
    int lane = threadIdx.x % 32, chunk = lane % 4, k = piece * PIECE + chunk * 32;
#pragma unroll
    for (int i = lane / 4; i < ROWS; i += 8)
        copy_codes(stage + chunk_offset(i, chunk), b, row_of_b(i), k);
#pragma unroll
    for (int i = lane / 4; i < M; i += 8)
        copy_codes(stage + Stage<M>::a_codes + chunk_offset(i, chunk), a, i, k);
    if (lane < STEPS * 4) { // 64 bytes a step
        int step = piece * STEPS + lane / 4;
        bool inside = step < b.tiles();
        size_t tile = (size_t)(blockIdx.y / 8) * b.tiles() + (inside ? step : 0);
        cp_async16(stage + Stage<M>::b_scales + lane * 16, b.scales + tile * 512 + blockIdx.y % 8 * SCALES + chunk * 16,
                   inside ? 16 : 0);
    }
    if (lane < STEPS * M) { // a row's four bytes, and those of three rows that are not there
        int step = piece * STEPS + lane / M;
        bool inside = step < a.tiles();
        cp_async16(stage + Stage<M>::a_scales + lane * 16, a.scales + (inside ? step : 0) * 512 + lane % M * 16,
                   inside ? 16 : 0);
    }
}

// The four scales of a row for 64 along K, each as an fp16 pair times 2^7; NaN is told apart, the sign dropped.
struct Scales {
    u32 pairs[4], nan;
    __device__ explicit Scales(const u8 *at) {
        u32 magnitudes = *reinterpret_cast<const u32 *>(at) & 0x7F7F7F7F;
        nan = (magnitudes + 0x01010101) & 0x80808080;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 two = __byte_perm(magnitudes, 0, h == 0 ? 0x4140 : 0x4342) << 7; // fields where fp16 has them
            two = mul_f16x2(two, 0x78007800);                                    // · 2^15
            pairs[2 * h] = __byte_perm(two, 0, 0x1010), pairs[2 * h + 1] = __byte_perm(two, 0, 0x3232);
        }
    }
};

// Codes 4t … 4t + 3 of a block → two fp16 pairs, (0, 2) and (1, 3), times the scale. So k is permuted within a
// block, in both operands alike.
__device__ inline void decode(u32 (&pairs)[2], const u8 *at, u32 scale) {
    u32 codes = __byte_perm(*reinterpret_cast<const u16 *>(at), 0, 0x4140);
    pairs[0] = (codes << 12 & SIGNS) | (codes << 9 & FIELDS);
    pairs[1] = (codes << 8 & SIGNS) | (codes << 5 & FIELDS);
#pragma unroll
    for (int i = 0; i < 2; i++) pairs[i] = mul_f16x2(mul_f16x2(pairs[i], 0x58005800), scale); // 2^-14 · 2^7 · 2^7
}

template <int M>
__device__ inline void multiply_piece(float (&acc)[M / 8][4], u32 (&nan_b)[2], u32 (&nan_a)[M / 8],
                                      const u8 *stage) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const u8 *of_b = stage + Stage<M>::b_scales + step * SCALES + g % 4 * 16 + g / 4 * 4;
        const Scales upper(of_b), lower(of_b + 8); // of rows g and g + 8
        nan_b[0] |= upper.nan, nan_b[1] |= lower.nan;
        u32 of_a[M / 8][4];
#pragma unroll
        for (int i = 0; i < M / 8; i++) {
            const Scales row(stage + Stage<M>::a_scales + (step * M + 8 * i + g) * 16);
            nan_a[i] |= row.nan;
#pragma unroll
            for (int block = 0; block < 4; block++) of_a[i][block] = row.pairs[block];
        }
#pragma unroll
        for (int block = 0; block < 4; block++) {
            int chunk = 2 * step + block / 2, inside = block % 2 * 8 + 2 * t;
            u32 b_upper[2], b_lower[2];
            decode(b_upper, stage + chunk_offset(g, chunk) + inside, upper.pairs[block]);
            decode(b_lower, stage + chunk_offset(g + 8, chunk) + inside, lower.pairs[block]);
            const u32 fb[4] = {b_upper[0], b_lower[0], b_upper[1], b_lower[1]};
#pragma unroll
            for (int i = 0; i < M / 8; i++) {
                u32 fa[2];
                decode(fa, stage + Stage<M>::a_codes + chunk_offset(8 * i + g, chunk) + inside, of_a[i][block]);
                mma_f16(acc[i], fb, fa[0], fa[1], acc[i]);
            }
        }
    }
}

template <int M>
__device__ inline void small(const Operand &a, const Operand &b, float scale, float *y) {
    int pieces = (a.tiles() + STEPS - 1) / STEPS, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    int t = threadIdx.x % 4, mine = warp * STAGES * Stage<M>::bytes;
    const u8 *stages = reinterpret_cast<const u8 *>(shared) + mine;
    u32 to = shared_address(shared) + mine;

    float acc[M / 8][4] = {};
    u32 nan_b[2] = {}, nan_a[M / 8] = {};
    for (int s = 0; s < STAGES - 1; s++) {
        if (warp + WARPS * s < pieces) load_piece<M>(to + s * Stage<M>::bytes, a, b, warp + WARPS * s);
        cp_async_commit();
    }
    for (int s = 0, piece = warp; piece < pieces; s++, piece += WARPS) {
        cp_async_wait<STAGES - 2>(); // this piece has arrived, of this lane's copies
        __syncwarp();                // of all; and no lane reads the piece before any more
        int next = piece + WARPS * (STAGES - 1);
        if (next < pieces) load_piece<M>(to + (s + STAGES - 1) % STAGES * Stage<M>::bytes, a, b, next);
        cp_async_commit();
        multiply_piece<M>(acc, nan_b, nan_a, stages + s % STAGES * Stage<M>::bytes);
    }
    cp_async_wait<0>();
    __syncthreads(); // the stages are free for the sums

    float *sums = reinterpret_cast<float *>(shared); // (WARPS, ROWS, M)
#pragma unroll
    for (int i = 0; i < M / 8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            u32 nan = nan_b[e >> 1] | __shfl_sync(~0u, nan_a[i], (2 * t + (e & 1)) * 4);
            sums[(warp * ROWS + g + 8 * (e >> 1)) * M + 8 * i + 2 * t + (e & 1)] =
                nan ? __uint_as_float(NAN_BITS) : acc[i][e];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * M; i += WARPS * 32) {
        float sum = sums[i];
        for (int w = 1; w < WARPS; w++) sum = __fadd_rn(sum, sums[w * ROWS * M + i]);
        int row = row_of_b(i / M);
        if (row < b.rows && i % M < a.rows) y[(size_t)(i % M) * b.rows + row] = __fmul_rn(sum, scale);
    }
}

#define SMALL(M)                                                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)                                              \
        gemm_small_##M(const u8 *a_codes, const u8 *a_scales, const float *a_tensor_scale,                   \
                       const u8 *b_codes, const u8 *b_scales, const float *b_tensor_scale, int m, int n,     \
                       int k, float *y) {                                                                    \
        small<M>({a_codes, a_scales, m, k}, {b_codes, b_scales, n, k},                                       \
                 __fmul_rn(*a_tensor_scale, *b_tensor_scale), y);                                            \
    }
SMALL(8)
SMALL(16)
