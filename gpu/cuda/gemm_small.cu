// Y = A·Bᵀ for M up to 8 or 16, as fast as B can be read: e2m1·e4m3 as fp16, exact, chained by mma.m16n8k16. Its 16
// rows are rows of B. A lane gets 8 codes of a row, as they lie in memory, and moves their fields to where fp16 has
// them: each is its value times 2^-14, and times its scale still exact, a subnormal number where the product is
// below 1. Of 32 along K one MMA takes the even ones, a second one the odd ones.
// K is dealt out in pieces of 128 to eight warps, piece p to warp p mod 8; each warp chains its pieces in order
// from +0, and the eight sums are added in order, rounded to nearest.
// Equals emulator/gemm.py: matmul_fp16_split_k.
//
// Launch: grid (1, any), 256 threads. A thread block takes every gridDim.y-th tile of 32 rows of B: of 128 rows, eight
// in each quarter, as their scales are neighbouring bytes for each 64 along K. Dynamic shared memory: AHEAD pieces for
// each warp, the next tile's before this one is done, and its sums: warps wait for each other only to add these up.
#include "tiles.cuh"

constexpr int WARPS = 8, ROWS = 32, PIECE = 128, ROW_BYTES = PIECE / 2, STEPS = PIECE / 64;
constexpr int LINE = ROWS + 4;         // floats in a line of sums: no two lanes meet in a bank
constexpr u32 MAGNITUDES = 0x7F7F7F7F; // of four scales
extern __shared__ __align__(64) uint4 shared[];

template <int M> struct Piece { // rows of B, rows of A, their scales
    static constexpr int SCALES = ROWS * 4; // of B, for one step of 64
    static constexpr int a_codes = ROWS * ROW_BYTES, b_scales = a_codes + M * ROW_BYTES;
    static constexpr int a_scales = b_scales + STEPS * SCALES, bytes = a_scales + STEPS * M * 16;
};

// Four chunks of 16 bytes a row, turned so that the same chunk of 8 rows meets all 32 banks once.
__device__ inline int chunk_offset(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ row >> 1) & 3) * 16; }

__device__ inline int row_of(int tile, int i) { return tile / 4 * 128 + i / 8 * 32 + tile % 4 * 8 + i % 8; }
__device__ inline int count_tiles(int rows) { return (rows + 127) / 128 * 4; }

// As fp16_pairs, but (2, 6), (0, 4), (3, 7), (1, 5), and by logic instead of byte permutations. A shift to the left is
// a multiplication to the machine: where there are few others, as here, it costs less than what it saves.
__device__ inline void fp16_pairs_by_logic(u32 (&pairs)[4], u32 codes) {
    constexpr u32 fields = 0x0E0E0E0E, both = 0x8E008E00;
    u32 even = select_bits(fields, codes << 1, codes << 4), odd = select_bits(fields, codes >> 3, codes);
    pairs[0] = even & both, pairs[1] = even << 8 & both;
    pairs[2] = odd & both, pairs[3] = odd << 8 & both;
}

// What a lane copies of each piece: a chunk of every eighth row of B, then of A, and 16 bytes of scales of each.
// Instead of a row that is not there it takes another one, what comes of it is not stored; of A and M = 8 it takes
// nothing, as most are not there. WHOLE: K is a multiple of 32; else a row starts at a multiple of 8 bytes only.
template <int M, bool WHOLE> struct Copies {
    typedef Piece<M> P;
    static constexpr int OF_B = ROWS / 8, COUNT = OF_B + M / 8;
    const Operand &b;
    const u8 *b_codes, *a_codes, *b_scales, *a_scales; // of the first row
    u32 further[COUNT];                                // how far the others are, in pieces of a row
    u32 to, inside;                                    // the first one's place in a stage; 1 if A has it
    int k, steps, pieces;
    int tile, piece; // the next ones to copy

    __device__ Copies(const Operand &a, const Operand &b)
        : b(b), k(a.k), steps(a.tiles()), pieces((steps + STEPS - 1) / STEPS), tile(blockIdx.y),
          piece(threadIdx.x / 32) {
        int lane = threadIdx.x % 32, row = lane / 4;
        to = chunk_offset(row, lane % 4);
        a_codes = a.row(row < a.rows ? row : 0) + lane % 4 * 16;
        a_scales = a.scales + lane / M * 512 + lane % M * 16; // of each row, with those of three that are not there
        inside = row < a.rows;
#pragma unroll
        for (int i = 0; i < M / 8; i++) further[OF_B + i] = row + 8 * i < a.rows ? k / 16 * i : 0;
        aim();
        keep(a_codes), keep(a_scales), keep(to), keep(inside);
    }

    __device__ void aim() { // at this tile
        int lane = threadIdx.x % 32, row = row_of(tile, lane / 4);
        b_codes = b.row(row < b.rows ? row : 0) + lane % 4 * 16;
#pragma unroll
        for (int i = 0; i < OF_B; i++) further[i] = row + 32 * i < b.rows ? k / 16 * (4 * i) : 0; // 8 rows: k / 16
        b_scales = b.scales + ((size_t)(tile / 4) * steps + lane / 8) * 512 + tile % 4 * P::SCALES + lane % 8 * 16;
    }

    __device__ void start(u32 stage) {
        if (tile < count_tiles(b.rows)) {
            int lane = threadIdx.x % 32, step = piece * STEPS;
            int left = k / 2 - piece * ROW_BYTES - lane % 4 * 16; // bytes of a row from this chunk on
#pragma unroll
            for (int i = 0; i < COUNT; i++) { // 8 rows further the chunks are turned the same way
                u32 at = stage + to + i * 8 * ROW_BYTES;
                const u8 *from = (i < OF_B ? b_codes : a_codes) + (u64)(further[i] + piece) * ROW_BYTES;
                int bytes = M == 8 && i >= OF_B && !inside ? 0 : left;
                if (!WHOLE) {
                    cp_async8(at, from, bytes > 0 ? 8 : 0), cp_async8(at + 8, from + 8, bytes > 8 ? 8 : 0);
                } else if (i < OF_B) {
                    cp_async16(at, from, bytes > 0 ? 16 : 0);
                } else {
                    cp_async16_l1(at, from, bytes > 0 ? 16 : 0);
                }
            }
            if (lane < STEPS * P::SCALES / 16)
                cp_async16(stage + P::b_scales + lane * 16, b_scales + step * 512, step + lane / 8 < steps ? 16 : 0);
            if (lane < STEPS * M)
                cp_async16_l1(stage + P::a_scales + lane * 16, a_scales + step * 512, step + lane / M < steps ? 16 : 0);
            piece += WARPS;
            if (piece >= pieces) tile += gridDim.y, piece = threadIdx.x / 32, aim();
        }
        cp_async_commit();
    }
};

// A piece in registers. Of A: codes of row g of two chunks; of B: of rows g and g + 8 of a chunk, then of the next one.
// And the four scales of each of these rows.
template <int M> struct Fragments {
    typedef Piece<M> P;
    static constexpr int TILES = ROWS / 16;
    u32 a_codes[STEPS][M / 8][2], a_scales[STEPS][M / 8], b_codes[STEPS][TILES][4], b_scales[STEPS][TILES][2];

    __device__ Fragments(const u8 *stage, u32 address) {
        int lane = threadIdx.x % 32, g = lane / 4;
        int to_a = chunk_offset(lane % 8, lane / 8 % 2), to_b = chunk_offset(lane % 16, lane / 16);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int i = 0; i < M / 8; i++) {
                ldmatrix_x2(a_codes[step][i], (address + to_a ^ 32 * step) + P::a_codes + 8 * i * ROW_BYTES);
                a_scales[step][i] = word(stage + P::a_scales + (step * M + 8 * i + g) * 16);
            }
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                ldmatrix_x4(b_codes[step][j], (address + to_b ^ 32 * step) + 16 * j * ROW_BYTES);
                const u8 *scales = stage + P::b_scales + step * P::SCALES + g * 16 + 8 * j; // of two quarters
                b_scales[step][j][0] = word(scales), b_scales[step][j][1] = word(scales + 4);
            }
        }
    }
    __device__ static u32 word(const u8 *from) { return *reinterpret_cast<const u32 *>(from); }
};

template <int M> struct Sums {
    static constexpr int TILES = ROWS / 16;
    float acc[TILES][M / 8][4] = {}; // times 2^-28

    __device__ void add(const Fragments<M> &piece) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 of_a[M / 8][2][4]; // of row g, two chunks
#pragma unroll
            for (int i = 0; i < M / 8; i++) {
                const u32 (&codes)[2] = piece.a_codes[step][i];
                decode(of_a[i][0], of_a[i][1], codes[0], codes[1], piece.a_scales[step][i]);
            }
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                const u32 (&codes)[4] = piece.b_codes[step][j], (&scales)[2] = piece.b_scales[step][j];
                u32 upper[2][4], lower[2][4]; // of rows g and g + 8, two chunks
                decode(upper[0], upper[1], codes[0], codes[2], scales[0]);
                decode(lower[0], lower[1], codes[1], codes[3], scales[1]);
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

    // Eight codes of each chunk times their scale, times 2^-14: pairs of even k, then of odd k. Of a chunk, lanes 0 and
    // 1 of a quad have a block, 2 and 3 the next one: of the four scales, those of this lane.
    __device__ static void decode(u32 (&first)[4], u32 (&second)[4], u32 codes0, u32 codes1, u32 four) {
        u32 mine = threadIdx.x % 4 < 2 ? 0x4420 : 0x4431;
        u32 scales = f16x2_of_e4m3x2(__byte_perm(four & MAGNITUDES, 0, mine));
        fp16_pairs_by_logic(first, codes0), fp16_pairs_by_logic(second, codes1);
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

template <int M, int AHEAD, bool WHOLE>
__device__ inline void small(const Operand &a, const Operand &b, float scale, float *y) {
    static_assert(AHEAD <= 2, "there are two stages at most");
    constexpr int OF_WARP = AHEAD * Piece<M>::bytes;
    int pieces = (a.tiles() + STEPS - 1) / STEPS, warp = threadIdx.x / 32;
    const u8 *stages = reinterpret_cast<const u8 *>(shared) + warp * OF_WARP;
    u32 to = shared_address(shared) + warp * OF_WARP, read = 0;
    float *sums = reinterpret_cast<float *>(reinterpret_cast<u8 *>(shared) + WARPS * OF_WARP); // (WARPS, M, LINE)

    Copies<M, WHOLE> copies(a, b);
    for (int s = 0; s < AHEAD; s++) copies.start(to + s * Piece<M>::bytes);
    for (int tile = blockIdx.y; tile < count_tiles(b.rows); tile += gridDim.y) {
        Sums<M> of_warp;
        for (int piece = warp; piece < pieces; piece += WARPS) {
            cp_async_wait<AHEAD - 1>(); // this piece has arrived, of this lane's copies
            __syncwarp();               // of all
            const Fragments<M> fragments(stages + read, to + read);
            __syncwarp(); // all have read it: another one may come here
            copies.start(to + read);
            if (AHEAD > 1) read = read ? 0 : Piece<M>::bytes;
            of_warp.add(fragments);
        }
        __syncthreads(); // the sums of the tile before are read
        of_warp.store(sums + warp * M * LINE);
        __syncthreads();
        int lane = threadIdx.x % 32, row = row_of(tile, lane);
        for (int m = warp; m < M && m < a.rows; m += WARPS) {
            const float *from = sums + m * LINE + lane;
            float sum = from[0];
            for (int w = 1; w < WARPS; w++) sum = __fadd_rn(sum, from[w * M * LINE]);
            sum = __fmul_rn(sum, power_of_two(28));
            if (row < b.rows) y[(size_t)m * b.rows + row] = __fmul_rn(sum, scale);
        }
    }
}

#define SMALL(M, AHEAD)                                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)                                              \
        gemm_small_##M##_##AHEAD(const u8 *a_codes, const u8 *a_scales, const float *a_tensor_scale,         \
                                 const u8 *b_codes, const u8 *b_scales, const float *b_tensor_scale, int m,  \
                                 int n, int k, float *y) {                                                   \
        const Operand a = {a_codes, a_scales, m, k}, b = {b_codes, b_scales, n, k};                          \
        float scale = __fmul_rn(*a_tensor_scale, *b_tensor_scale);                                           \
        if (k % 32 == 0) {                                                                                   \
            small<M, AHEAD, true>(a, b, scale, y);                                                           \
        } else {                                                                                             \
            small<M, AHEAD, false>(a, b, scale, y);                                                          \
        }                                                                                                    \
    }
SMALL(8, 1)
SMALL(16, 1)
SMALL(8, 2)
SMALL(16, 2)
