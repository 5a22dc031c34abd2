// Y = A·Bᵀ for M up to 8 or 16, as fast as B can be read: e2m1·e4m3 as fp16, exact, chained by mma.m16n8k16. Its 16
// rows are rows of B. A lane gets 8 codes of a row, as they lie in memory, and moves their fields to where fp16 has
// them: each is its value times 2^-14, and times its scale still exact, a subnormal number where the product is
// below 1. Of 32 along K one MMA takes the even ones, a second one the odd ones.
// K is dealt out in pieces of 128 to eight warps, piece p to warp p mod 8; each warp chains its pieces in order
// from +0, and the eight sums are added in order, rounded to nearest.
// Equals emulator/gemm.py: matmul_fp16_split_k.
//
// Launch: grid (1, 128/ROWS · ⌈N/128⌉), 256 threads. A block takes ROWS/4 rows of B, and as many 32, 64 and 96
// further, of a tile of 128: their scales are neighbouring bytes for each 64 along K. Dynamic shared memory: STAGES
// pieces for each warp, which waits for nobody but itself.
#include "tiles.cuh"

constexpr int WARPS = 8, PIECE = 128, ROW_BYTES = PIECE / 2, STEPS = PIECE / 64;
constexpr u32 MAGNITUDES = 0x7F7F7F7F; // of four scales
extern __shared__ uint4 shared[];

template <int M, int ROWS> struct Stage { // rows of B, rows of A, their scales
    static constexpr int SCALES = ROWS * 4; // of B, for one step of 64
    static constexpr int a_codes = ROWS * ROW_BYTES, b_scales = a_codes + M * ROW_BYTES;
    static constexpr int a_scales = b_scales + STEPS * SCALES, bytes = a_scales + STEPS * M * 16;
    static constexpr int STAGES = ROWS == 32 ? 3 : 2;
};

// Four chunks of 16 bytes a row, turned so that the same chunk of 8 rows meets all 32 banks once.
__device__ inline int chunk_offset(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ row >> 1) & 3) * 16; }

template <int ROWS> struct Tile { // of B: LINES rows in each quarter of 128
    static constexpr int LINES = ROWS / 4, PARTS = 32 / LINES;
    __device__ static int row(int i) {
        return blockIdx.y / PARTS * 128 + i / LINES * 32 + blockIdx.y % PARTS * LINES + i % LINES;
    }
    __device__ static int further(int i) { return i / LINES * 32 + i % LINES; } // than row 0 of it
};

// What a lane copies of each piece: a chunk of every eighth row of B, then of A, and 16 bytes of scales of each.
// Instead of a row that is not there it takes row 0, what comes of it is not stored; of A and M = 8 it takes nothing,
// as most are not there. WHOLE: K is a multiple of 32; else a row starts at a multiple of 8 bytes only.
template <int M, int ROWS, bool WHOLE> struct Copies {
    typedef Stage<M, ROWS> S;
    typedef Tile<ROWS> T;
    static constexpr int COUNT = (ROWS + M) / 8;
    const u8 *b_codes, *a_codes, *b_scales, *a_scales; // of the first row
    u32 further[COUNT], to;                            // how far the others are, in pieces of a row
    u32 inside;                                        // 1 if there is a first row of A
    int k, tiles;

    __device__ Copies(const Operand &a, const Operand &b) : k(a.k), tiles(a.tiles()) {
        int lane = threadIdx.x % 32, chunk = lane % 4;
        to = chunk_offset(lane / 4, chunk);
        int row_b = T::row(lane / 4), row_a = lane / 4;
        b_codes = b.row(row_b < b.rows ? row_b : 0) + chunk * 16;
        a_codes = a.row(row_a < a.rows ? row_a : 0) + chunk * 16;
#pragma unroll
        for (int i = 0; i < COUNT; i++) { // 8 rows are k / 16 pieces
            int rows = i < ROWS / 8 ? T::further(8 * i) : 8 * i - ROWS;
            bool there = i < ROWS / 8 ? row_b + rows < b.rows : row_a + rows < a.rows;
            further[i] = there ? k / 16 * (rows / 8) : 0;
        }
        inside = row_a < a.rows;
        b_scales = b.scales + (size_t)(blockIdx.y / T::PARTS) * tiles * 512 + lane / T::LINES * 512 +
                   blockIdx.y % T::PARTS * S::SCALES + lane % T::LINES * 16;
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
            if (!WHOLE) {
                cp_async8(at, from, bytes > 0 ? 8 : 0), cp_async8(at + 8, from + 8, bytes > 8 ? 8 : 0);
            } else if (i < ROWS / 8) {
                cp_async16(at, from, bytes > 0 ? 16 : 0);
            } else {
                cp_async16_l1(at, from, bytes > 0 ? 16 : 0);
            }
        }
        if (lane < STEPS * S::SCALES / 16)
            cp_async16(stage + S::b_scales + lane * 16, b_scales + step * 512, step + lane / T::LINES < tiles ? 16 : 0);
        if (lane < STEPS * M)
            cp_async16_l1(stage + S::a_scales + lane * 16, a_scales + step * 512, step + lane / M < tiles ? 16 : 0);
    }
};

template <int M, int ROWS> struct Sums {
    typedef Stage<M, ROWS> S;
    static constexpr int TILES = ROWS / 16, LINE = ROWS + 4; // floats in a line of sums: no two lanes meet in a bank
    float acc[TILES][M / 8][4] = {};                         // times 2^-28

    __device__ void add_piece(const u8 *stage, u32 address) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        int to_a = chunk_offset(lane % 8, lane / 8 % 2), to_b = chunk_offset(lane % 16, lane / 16);
        // Of a chunk, lanes 0 and 1 of a quad have a block, 2 and 3 the next one: of four scales, those of this lane.
        u32 mine = t < 2 ? 0x4420 : 0x4431;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 of_a[M / 8][2][4]; // of row g, two chunks
#pragma unroll
            for (int i = 0; i < M / 8; i++) {
                u32 codes[2];
                ldmatrix_x2(codes, (address + to_a ^ 32 * step) + S::a_codes + 8 * i * ROW_BYTES);
                u32 scales = my_scales(stage + S::a_scales + (step * M + 8 * i + g) * 16, mine);
                decode(of_a[i][0], of_a[i][1], codes[0], codes[1], scales);
            }
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                u32 codes[4], upper[2][4], lower[2][4]; // of rows g and g + 8, two chunks
                ldmatrix_x4(codes, (address + to_b ^ 32 * step) + 16 * j * ROW_BYTES);
                const u8 *scales = stage + S::b_scales + step * S::SCALES;
                decode(upper[0], upper[1], codes[0], codes[2], my_scales(scales + scale_offset(16 * j + g), mine));
                decode(lower[0], lower[1], codes[1], codes[3], my_scales(scales + scale_offset(16 * j + g + 8), mine));
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const u32 even[4] = {upper[c][0], lower[c][0], upper[c][1], lower[c][1]};
                    const u32 odd[4] = {upper[c][2], lower[c][2], upper[c][3], lower[c][3]};
#pragma unroll
                    for (int i = 0; i < M / 8; i++) {
                        mma_f16(acc[j][i], even, of_a[i][c][0], of_a[i][c][1], acc[j][i]);
                        mma_f16(acc[j][i], odd, of_a[i][c][2], of_a[i][c][3], acc[j][i]);
                    }
                }
            }
        }
    }

    __device__ static int scale_offset(int row) { return row % Tile<ROWS>::LINES * 16 + row / Tile<ROWS>::LINES * 4; }

    // fp16, the scale for the first chunk and for the second.
    __device__ static u32 my_scales(const u8 *four, u32 mine) {
        return f16x2_of_e4m3x2(__byte_perm(*reinterpret_cast<const u32 *>(four) & MAGNITUDES, 0, mine));
    }

    // Eight codes of each chunk times their scale, times 2^-14: pairs of even k, then of odd k.
    __device__ static void decode(u32 (&first)[4], u32 (&second)[4], u32 codes0, u32 codes1, u32 scales) {
        fp16_pairs(first, codes0), fp16_pairs(second, codes1);
#pragma unroll
        for (int p = 0; p < 4; p++) {
            first[p] = mul_f16x2_by<0>(first[p], scales);
            second[p] = mul_f16x2_by<1>(second[p], scales);
        }
    }

    // To (M, LINE) float32 of this warp.
    __device__ void store(float *to) const {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < M / 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    to[(8 * i + 2 * t + (e & 1)) * LINE + 16 * j + g + 8 * (e >> 1)] = acc[j][i][e];
    }
};

template <int M, int ROWS, bool WHOLE>
__device__ inline void small(const Operand &a, const Operand &b, float scale, float *y) {
    typedef Stage<M, ROWS> S;
    constexpr int STAGES = S::STAGES, LINE = Sums<M, ROWS>::LINE;
    int pieces = (a.tiles() + STEPS - 1) / STEPS, warp = threadIdx.x / 32;
    int mine = warp * STAGES * S::bytes;
    const u8 *stages = reinterpret_cast<const u8 *>(shared) + mine;
    u32 to = shared_address(shared) + mine;

    const Copies<M, ROWS, WHOLE> copies(a, b);
    Sums<M, ROWS> warp_sums;
    for (int s = 0; s < STAGES - 1; s++) {
        if (warp + WARPS * s < pieces) copies.start(to + s * S::bytes, warp + WARPS * s);
        cp_async_commit();
    }
    constexpr u32 last = (STAGES - 1) * S::bytes;
    u32 read = 0, filled = last; // stages
    for (int piece = warp; piece < pieces; piece += WARPS) {
        cp_async_wait<STAGES - 2>(); // this piece has arrived, of this lane's copies
        __syncwarp();                // of all; and no lane reads the piece before any more
        int next = piece + WARPS * (STAGES - 1);
        if (next < pieces) copies.start(to + filled, next);
        cp_async_commit();
        warp_sums.add_piece(stages + read, to + read);
        filled = read, read = read == last ? 0 : read + S::bytes;
    }
    cp_async_wait<0>();
    __syncthreads(); // the stages are free for the sums

    float *sums = reinterpret_cast<float *>(shared); // (WARPS, M, LINE)
    warp_sums.store(sums + warp * M * LINE);
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * M; i += WARPS * 32) {
        int m = i / ROWS, at = m * LINE + i % ROWS, row = Tile<ROWS>::row(i % ROWS);
        float sum = sums[at];
        for (int w = 1; w < WARPS; w++) sum = __fadd_rn(sum, sums[w * M * LINE + at]);
        sum = __fmul_rn(sum, power_of_two(28));
        if (row < b.rows && m < a.rows) y[(size_t)m * b.rows + row] = __fmul_rn(sum, scale);
    }
}

#define SMALL(M, ROWS)                                                                                       \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)                                              \
        gemm_small_##M##x##ROWS(const u8 *a_codes, const u8 *a_scales, const float *a_tensor_scale,          \
                                const u8 *b_codes, const u8 *b_scales, const float *b_tensor_scale, int m,   \
                                int n, int k, float *y) {                                                    \
        const Operand a = {a_codes, a_scales, m, k}, b = {b_codes, b_scales, n, k};                          \
        float scale = __fmul_rn(*a_tensor_scale, *b_tensor_scale);                                           \
        if (k % 32 == 0) {                                                                                   \
            small<M, ROWS, true>(a, b, scale, y);                                                            \
        } else {                                                                                             \
            small<M, ROWS, false>(a, b, scale, y);                                                           \
        }                                                                                                    \
    }
SMALL(8, 32)
SMALL(16, 32)
SMALL(8, 64)
SMALL(16, 64)
