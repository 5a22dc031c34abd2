// Y = A·Bᵀ for M up to 8 or 16, as fast as B can be read. A group of 16 along K is summed by fp16 mma.m16n8k16 from
// C = 0: e2m1·e4m3 of A by e2m1 of B, exact; times B's scale it is added in float32 by one FMA. The 16 rows of an
// MMA are rows of B. A lane gets 8 codes of a row, as they lie in memory; two lanes of a quad have one group, the
// others the next one. So two MMAs take these 8 codes, and two more with the other half of A zero the other group.
// K is dealt out in pieces of 128 to eight warps, piece p to warp p mod 8; each warp chains its groups in order
// from +0, and the eight sums are added in order, rounded to nearest.
// Equals emulator/gemm.py: matmul_fma.
//
// Launch: grid (1, 4·⌈N/128⌉), 256 threads. A block takes rows 8q … 8q+7, and those 32, 64 and 96 further, of a
// tile of 128: their scales are 128 neighbouring bytes for each 64 along K. Dynamic shared memory: STAGES pieces
// for each warp, which waits for nobody but itself.
#include "tiles.cuh"

constexpr int WARPS = 8, STAGES = 3, PIECE = 128, ROWS = 32, TILES = ROWS / 16;
constexpr int ROW_BYTES = PIECE / 2, STEPS = PIECE / 64, SCALES = ROWS * 4; // of B, for one step of 64
constexpr u32 MAGNITUDES = 0x7F7F7F7F; // of four scales
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
// Instead of a row that is not there it takes row 0, what comes of it is not stored; of A and M = 8 it takes nothing,
// as most are not there. WHOLE: K is a multiple of 32; else a row starts at a multiple of 8 bytes only.
template <int M, bool WHOLE> struct Copies {
    static constexpr int COUNT = (ROWS + M) / 8;
    const u8 *b_codes, *a_codes, *b_scales, *a_scales; // of the first row
    u32 further[COUNT], to;                            // how far the others are, in pieces of a row
    u32 inside;                                        // 1 if there is a first row of A
    int k, tiles;

    __device__ Copies(const Operand &a, const Operand &b) : k(a.k), tiles(a.tiles()) {
        int lane = threadIdx.x % 32, chunk = lane % 4;
        to = chunk_offset(lane / 4, chunk);
        int row_b = row_of_b(lane / 4), row_a = lane / 4;
        b_codes = b.row(row_b < b.rows ? row_b : 0) + chunk * 16;
        a_codes = a.row(row_a < a.rows ? row_a : 0) + chunk * 16;
#pragma unroll
        for (int i = 0; i < COUNT; i++) // 32 rows of B further, 8 rows of A
            further[i] = i < ROWS / 8 ? (row_b + 32 * i < b.rows ? k / 4 * i : 0)
                                      : (row_a + 8 * i - ROWS < a.rows ? k / 16 * (i - ROWS / 8) : 0);
        inside = row_a < a.rows;
        b_scales = b.scales + (size_t)(blockIdx.y / 4) * tiles * 512 + lane / 8 * 512 + blockIdx.y % 4 * SCALES + lane % 8 * 16;
        a_scales = a.scales + lane / M * 512 + lane % M * 16; // a row's four bytes, and those of three that are not there
        keep(b_codes), keep(a_codes), keep(b_scales), keep(to), keep(inside);
#pragma unroll
        for (int i = 0; i < COUNT; i++) keep(further[i]);
    }

    __device__ void start(u32 stage, int piece) const {
        int lane = threadIdx.x % 32, step = piece * STEPS;
        int left = k / 2 - piece * ROW_BYTES - lane % 4 * 16; // bytes of a row from this chunk on
#pragma unroll
        for (int i = 0; i < COUNT; i++) { // 8 rows further the chunks are turned the same way
            u32 at = stage + to + i * 8 * ROW_BYTES;
            const u8 *from = (i < ROWS / 8 ? b_codes : a_codes) + (u64)(further[i] + piece) * ROW_BYTES;
            int bytes = M == 8 && i >= ROWS / 8 && !inside ? 0 : left;
            if (WHOLE) {
                cp_async16(at, from, bytes > 0 ? 16 : 0);
            } else {
                cp_async8(at, from, bytes > 0 ? 8 : 0), cp_async8(at + 8, from + 8, bytes > 8 ? 8 : 0);
            }
        }
        if (lane < STEPS * SCALES / 16)
            cp_async16(stage + Stage<M>::b_scales + lane * 16, b_scales + step * 512, step + lane / 8 < tiles ? 16 : 0);
        if (lane < STEPS * M)
            cp_async16(stage + Stage<M>::a_scales + lane * 16, a_scales + step * 512, step + lane / M < tiles ? 16 : 0);
    }
};

template <int M> struct Sums {
    float acc[TILES][M / 8][4] = {}; // times 2^-28

    __device__ void add_piece(const u8 *stage, u32 address) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        int to_a = chunk_offset(lane % 8, lane / 8 % 2), to_b = chunk_offset(lane % 16, lane / 16);
#pragma unroll(M == 8 || __CUDA_ARCH__ < 1000 ? STEPS : 1) // else ptxas would spill a register
        for (int step = 0; step < STEPS; step++) {
            // of rows g, g + 8, g + 16, g + 24
            uint4 four = *reinterpret_cast<const uint4 *>(stage + Stage<M>::b_scales + step * SCALES + g * 16);
            const u32 scales_b[TILES * 2] = {four.x & MAGNITUDES, four.y & MAGNITUDES, four.z & MAGNITUDES,
                                             four.w & MAGNITUDES};
            // Of a chunk, lanes 0 and 1 of a quad have a block, 2 and 3 the next one.
            u32 scales_a[M / 8], of_a[M / 8][2]; // of row g two chunks
            u32 of_b[TILES][4];                  // of rows g and g + 8 the first chunk, then the second
#pragma unroll
            for (int i = 0; i < M / 8; i++) {
                const u8 *at = stage + Stage<M>::a_scales + (step * M + 8 * i + g) * 16;
                scales_a[i] = *reinterpret_cast<const u32 *>(at) & MAGNITUDES;
                ldmatrix_x2(of_a[i], (address + to_a ^ 32 * step) + Stage<M>::a_codes + 8 * i * ROW_BYTES);
            }
#pragma unroll
            for (int j = 0; j < TILES; j++)
                ldmatrix_x4(of_b[j], (address + to_b ^ 32 * step) + 16 * j * ROW_BYTES);
#pragma unroll
            for (int chunk = 0; chunk < 2; chunk++) {
                // A times its scale, and zero in the lanes that have the other block of a chunk
                u32 first[M / 8][4], second[M / 8][4];
#pragma unroll
                for (int i = 0; i < M / 8; i++) {
                    u32 pairs[4], scales = f16x2_of_e4m3x2(scales_a[i] >> 16 * chunk);
                    u32 of_first = __byte_perm(scales, 0, t < 2 ? 0x1010 : 0x4444);
                    u32 of_second = __byte_perm(scales, 0, t < 2 ? 0x4444 : 0x3232);
                    fp16_pairs(pairs, of_a[i][chunk]);
#pragma unroll
                    for (int p = 0; p < 4; p++) {
                        first[i][p] = mul_f16x2(pairs[p], of_first);
                        second[i][p] = mul_f16x2(pairs[p], of_second);
                    }
                }
#pragma unroll
                for (int j = 0; j < TILES; j++) {
                    u32 upper[4], lower[4];
                    fp16_pairs(upper, of_b[j][2 * chunk]), fp16_pairs(lower, of_b[j][2 * chunk + 1]);
                    const u32 scales[2] = {f16x2_of_e4m3x2(scales_b[2 * j] >> 16 * chunk),
                                           f16x2_of_e4m3x2(scales_b[2 * j + 1] >> 16 * chunk)};
#pragma unroll
                    for (int i = 0; i < M / 8; i++) {
                        add_block(acc[j][i], upper, lower, first[i], scales, 0);
                        add_block(acc[j][i], upper, lower, second[i], scales, 16);
                    }
                }
            }
        }
    }

    // The sum of 16 products is exact, and so are those of the first and of the last two pairs of each lane.
    __device__ static void add_block(float (&sum)[4], const u32 (&upper)[4], const u32 (&lower)[4],
                                     const u32 (&of_a)[4], const u32 (&scales)[2], int shift) {
        const u32 pairs0[4] = {upper[0], lower[0], upper[1], lower[1]};
        const u32 pairs1[4] = {upper[2], lower[2], upper[3], lower[3]};
        float dot[4];
        mma_f16(dot, pairs0, of_a[0], of_a[1], NONE);
        mma_f16(dot, pairs1, of_a[2], of_a[3], dot);
#pragma unroll
        for (int e = 0; e < 4; e++) sum[e] = __fmaf_rn(dot[e], float_of_f16((u16)(scales[e >> 1] >> shift)), sum[e]);
    }

    // To (ROWS, M) float32 of this warp.
    __device__ void store(float *to) const {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < M / 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    to[(16 * j + g + 8 * (e >> 1)) * M + 8 * i + 2 * t + (e & 1)] = acc[j][i][e];
    }
};

template <int M, bool WHOLE>
__device__ inline void small(const Operand &a, const Operand &b, float scale, float *y) {
    int pieces = (a.tiles() + STEPS - 1) / STEPS, warp = threadIdx.x / 32;
    int mine = warp * STAGES * Stage<M>::bytes;
    const u8 *stages = reinterpret_cast<const u8 *>(shared) + mine;
    u32 to = shared_address(shared) + mine;

    const Copies<M, WHOLE> copies(a, b);
    Sums<M> warp_sums;
    for (int s = 0; s < STAGES - 1; s++) {
        if (warp + WARPS * s < pieces) copies.start(to + s * Stage<M>::bytes, warp + WARPS * s);
        cp_async_commit();
    }
    constexpr u32 last = (STAGES - 1) * Stage<M>::bytes;
    u32 read = 0, filled = last; // stages
    for (int piece = warp; piece < pieces; piece += WARPS) {
        cp_async_wait<STAGES - 2>(); // this piece has arrived, of this lane's copies
        __syncwarp();                // of all; and no lane reads the piece before any more
        int next = piece + WARPS * (STAGES - 1);
        if (next < pieces) copies.start(to + filled, next);
        cp_async_commit();
        warp_sums.add_piece(stages + read, to + read);
        filled = read, read = read == last ? 0 : read + Stage<M>::bytes;
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
        sum = __fmul_rn(sum, power_of_two(28));
        if (row < b.rows && i % M < a.rows) y[(size_t)(i % M) * b.rows + row] = __fmul_rn(sum, scale);
    }
}

#define SMALL(M)                                                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)                                              \
        gemm_small_##M(const u8 *a_codes, const u8 *a_scales, const float *a_tensor_scale,                   \
                       const u8 *b_codes, const u8 *b_scales, const float *b_tensor_scale, int m, int n,     \
                       int k, float *y) {                                                                    \
        const Operand a = {a_codes, a_scales, m, k}, b = {b_codes, b_scales, n, k};                          \
        float scale = __fmul_rn(*a_tensor_scale, *b_tensor_scale);                                           \
        if (k % 32 == 0) {                                                                                   \
            small<M, true>(a, b, scale, y);                                                                  \
        } else {                                                                                             \
            small<M, false>(a, b, scale, y);                                                                 \
        }                                                                                                    \
    }
SMALL(8)
SMALL(16)
