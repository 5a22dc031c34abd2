// Y = A·Bᵀ for M up to 8 or 16, as fast as B can be read. A group of 16 along K is one fp16 mma.m16n8k16 with C = 0:
// e2m1·e4m3 of A by e2m1 of B, exact; times B's scale it is added in float32 by one FMA. The 16 rows of an MMA are
// rows of B. K is dealt out in pieces of 128 to eight warps, piece p to warp p mod 8; each warp chains its groups
// in order from +0, and the eight sums are added in order, rounded to nearest.
// Equals emulator/gemm.py: matmul_fma.
//
// Launch: grid (1, 4·⌈N/128⌉), 256 threads. A block takes rows 8q … 8q+7, and those 32, 64 and 96 further, of a
// tile of 128: their scales are 128 neighbouring bytes for each 64 along K. Dynamic shared memory: STAGES pieces
// for each warp, which waits for nobody but itself.
#include "tiles.cuh"

constexpr int WARPS = 8, STAGES = 3, PIECE = 128, ROWS = 32, TILES = ROWS / 16;
constexpr int ROW_BYTES = PIECE / 2, STEPS = PIECE / 64, SCALES = ROWS * 4; // of B, for one step of 64
constexpr u32 SIGNS = 0x80008000, FIELDS = 0x0E000E00, MAGNITUDES = 0x7F7F7F7F;
constexpr float NONE[4] = {};
extern __shared__ uint4 shared[];

template <int M> struct Stage { // rows of B, rows of A, their scales
    static constexpr int a_codes = ROWS * ROW_BYTES, b_scales = a_codes + M * ROW_BYTES;
    static constexpr int a_scales = b_scales + STEPS * SCALES, bytes = a_scales + STEPS * M * 16;
};

// Four chunks of 16 bytes a row, turned so that the same chunk of 8 rows meets all 32 banks once.
__device__ inline int chunk_offset(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ row >> 1) & 3) * 16; }

__device__ inline int row_of_b(int i) { return blockIdx.y / 4 * 128 + i / 8 * 32 + blockIdx.y % 4 * 8 + i % 8; }

// What a lane copies of each piece: a chunk of every eighth row of B, then of A, and 16 bytes of scales of each.
template <int M> struct Copies {
    static constexpr int COUNT = (ROWS + M) / 8;
    const u8 *codes[COUNT], *b_scales, *a_scales;
    u32 inside = 0, to; // a bit a row
    int k, tiles;

    __device__ Copies(const Operand &a, const Operand &b) : k(a.k), tiles(a.tiles()) {
        int lane = threadIdx.x % 32, chunk = lane % 4;
        to = chunk_offset(lane / 4, chunk);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const Operand &x = i < ROWS / 8 ? b : a;
            int row = i < ROWS / 8 ? row_of_b(8 * i + lane / 4) : 8 * i - ROWS + lane / 4;
            inside |= row < x.rows ? 1u << i : 0;
            codes[i] = x.row(row < x.rows ? row : 0) + chunk * 16;
        }
        b_scales = b.scales + (size_t)(blockIdx.y / 4) * tiles * 512 + lane / 8 * 512 + blockIdx.y % 4 * SCALES + lane % 8 * 16;
        a_scales = a.scales + lane / M * 512 + lane % M * 16; // a row's four bytes, and those of three that are not there
    }

    __device__ void start(u32 stage, int piece) const {
        int lane = threadIdx.x % 32, step = piece * STEPS;
        int bytes = min(max(k / 2 - piece * ROW_BYTES - lane % 4 * 16, 0), 16);
#pragma unroll
        for (int i = 0; i < COUNT; i++) { // 8 rows further the chunks are turned the same way
            u32 at = stage + to + i * 8 * ROW_BYTES, size = inside >> i & 1 ? bytes : 0;
            const u8 *from = codes[i] + piece * ROW_BYTES;
            if (k % 32 == 0) {
                cp_async16(at, from, size);
            } else { // a row starts at a multiple of 8 bytes only
                cp_async8(at, from, min(size, 8)), cp_async8(at + 8, from + 8, max(size, 8) - 8);
            }
        }
        if (lane < STEPS * SCALES / 16)
            cp_async16(stage + Stage<M>::b_scales + lane * 16, b_scales + step * 512, step + lane / 8 < tiles ? 16 : 0);
        if (lane < STEPS * M)
            cp_async16(stage + Stage<M>::a_scales + lane * 16, a_scales + step * 512, step + lane / M < tiles ? 16 : 0);
    }
};

// Not zero if one of four scales is NaN. Their signs are ignored.
__device__ inline u32 has_nan(u32 scales) { return ((scales & MAGNITUDES) + 0x01010101) & ~MAGNITUDES; }

// Codes 4t … 4t + 3 of a block → two fp16 pairs, (0, 2) and (1, 3), each value times 2^-14: the fields moved to
// where fp16 has them. So k is permuted within a block, in both operands alike.
__device__ inline void decode(u32 (&pairs)[2], const u8 *at) {
    u32 codes = __byte_perm(*reinterpret_cast<const u16 *>(at), 0, 0x4140);
    pairs[0] = (codes << 12 & SIGNS) | (codes << 9 & FIELDS);
    pairs[1] = (codes << 8 & SIGNS) | (codes << 5 & FIELDS);
}

// Scale `block` of four as an fp16 pair, times 2^7: its fields moved, times 2^15, exactly.
__device__ inline u32 fp16_scale(u32 scales, int block) {
    u32 one = scales >> 8 * block & E4M3::magnitude;
    return mul_f16x2((one << 7) * 0x10001, 0x78007800);
}

// The same as float32, exactly: the fields moved, times 2^120.
__device__ inline float scale_of(u32 scales, int block) {
    u32 fields = block < 3 ? scales << (20 - 8 * block) : scales >> 4;
    return __fmul_rn(__uint_as_float(fields & E4M3::magnitude << E4M3::shift), power_of_two(BIAS - E4M3::bias));
}

template <int M> struct Sums {
    float acc[TILES][M / 8][4] = {}; // times 2^-14
    u32 nan_b[TILES][2] = {}, nan_a[M / 8] = {};

    __device__ void add_piece(const u8 *stage) {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            // of rows g, g + 8, g + 16, g + 24
            uint4 four = *reinterpret_cast<const uint4 *>(stage + Stage<M>::b_scales + step * SCALES + g * 16);
            const u32 of_b[TILES][2] = {{four.x, four.y}, {four.z, four.w}};
            u32 of_a[M / 8];
#pragma unroll
            for (int i = 0; i < M / 8; i++) {
                const u8 *at = stage + Stage<M>::a_scales + (step * M + 8 * i + g) * 16;
                of_a[i] = *reinterpret_cast<const u32 *>(at);
                nan_a[i] |= has_nan(of_a[i]);
            }
#pragma unroll
            for (int j = 0; j < TILES; j++) nan_b[j][0] |= has_nan(of_b[j][0]), nan_b[j][1] |= has_nan(of_b[j][1]);
#pragma unroll
            for (int block = 0; block < 4; block++) {
                int chunk = 2 * step + block / 2, inside = block % 2 * 8 + 2 * t;
                u32 fa[M / 8][2];
#pragma unroll
                for (int i = 0; i < M / 8; i++) {
                    u32 scale = fp16_scale(of_a[i], block);
                    decode(fa[i], stage + Stage<M>::a_codes + chunk_offset(8 * i + g, chunk) + inside);
#pragma unroll
                    for (int p = 0; p < 2; p++) fa[i][p] = mul_f16x2(mul_f16x2(fa[i][p], 0x58005800), scale); // · 2^7
                }
#pragma unroll
                for (int j = 0; j < TILES; j++) {
                    u32 upper[2], lower[2];
                    decode(upper, stage + chunk_offset(16 * j + g, chunk) + inside);
                    decode(lower, stage + chunk_offset(16 * j + g + 8, chunk) + inside);
                    const u32 fb[4] = {upper[0], lower[0], upper[1], lower[1]};
                    const float scales[2] = {scale_of(of_b[j][0], block), scale_of(of_b[j][1], block)};
#pragma unroll
                    for (int i = 0; i < M / 8; i++) {
                        float dot[4];
                        mma_f16(dot, fb, fa[i][0], fa[i][1], NONE);
#pragma unroll
                        for (int e = 0; e < 4; e++) acc[j][i][e] = __fmaf_rn(dot[e], scales[e >> 1], acc[j][i][e]);
                    }
                }
            }
        }
    }

    // To (ROWS, M) float32 of this warp, NaN where a scale was.
    __device__ void store(float *to) const {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < M / 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    u32 nan = nan_b[j][e >> 1] | __shfl_sync(~0u, nan_a[i], (2 * t + (e & 1)) * 4);
                    to[(16 * j + g + 8 * (e >> 1)) * M + 8 * i + 2 * t + (e & 1)] =
                        nan ? __uint_as_float(NAN_BITS) : acc[j][i][e];
                }
    }
};

template <int M>
__device__ inline void small(const Operand &a, const Operand &b, float scale, float *y) {
    int pieces = (a.tiles() + STEPS - 1) / STEPS, warp = threadIdx.x / 32;
    int mine = warp * STAGES * Stage<M>::bytes;
    const u8 *stages = reinterpret_cast<const u8 *>(shared) + mine;
    u32 to = shared_address(shared) + mine;

    const Copies<M> copies(a, b);
    Sums<M> warp_sums;
    for (int s = 0; s < STAGES - 1; s++) {
        if (warp + WARPS * s < pieces) copies.start(to + s * Stage<M>::bytes, warp + WARPS * s);
        cp_async_commit();
    }
    for (int s = 0, piece = warp; piece < pieces; s++, piece += WARPS) {
        cp_async_wait<STAGES - 2>(); // this piece has arrived, of this lane's copies
        __syncwarp();                // of all; and no lane reads the piece before any more
        int next = piece + WARPS * (STAGES - 1);
        if (next < pieces) copies.start(to + (s + STAGES - 1) % STAGES * Stage<M>::bytes, next);
        cp_async_commit();
        warp_sums.add_piece(stages + s % STAGES * Stage<M>::bytes);
    }
    cp_async_wait<0>();
    __syncthreads(); // the stages are free for the sums

    float *sums = reinterpret_cast<float *>(shared); // (WARPS, ROWS, M)
    warp_sums.store(sums + warp * ROWS * M);
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * M; i += WARPS * 32) {
        float sum = sums[i];
        for (int w = 1; w < WARPS; w++) sum = __fadd_rn(sum, sums[w * ROWS * M + i]);
        int row = row_of_b(i / M);
        sum = __fmul_rn(sum, power_of_two(14));
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
