// Y = A·Bᵀ by Hopper's asynchronous wgmma: e2m1·e4m3 as fp16, exact, chained over k = 0, 16, … from +0.
// Equals emulator/gemm.py: matmul_fp16; the bits are those of gemm_fast in gemm_portable.cu. K is a multiple of 32.
// While the tensor cores multiply one step of 64 along K, the same warps decode the next one into the other buffer.
//
// Launch: grid (⌈M/64W⌉, ⌈N/TILE_N⌉), W warpgroups of four warps and 64 × TILE_N outputs each. Dynamic shared
// memory: two steps of fp16 numbers for each row of both operands, and STAGES pieces of 128 packed codes a row,
// with their scales: a warp copies what it decodes, 16 rows of A and some of B, and waits for nobody else's.
#if __CUDA_ARCH__ == 900
#include "tiles.cuh"

constexpr int STEP = 64, ROW_BYTES = 2 * STEP, BUFFERS = 2, STAGES = 3;
constexpr int PIECE_STEPS = 2, CODES = PIECE_STEPS * STEP / 2; // bytes of a row in a piece
constexpr int SIXTEEN = 16 * CODES + 16 * PIECE_STEPS * 4;     // codes of 16 rows, then their scales
extern __shared__ __align__(1024) uint4 shared[];

template <int WARPGROUPS, int TILE_N> struct Tile {
    static constexpr int TILE_M = 64 * WARPGROUPS, WARPS = 4 * WARPGROUPS, ROWS = TILE_M + TILE_N;
    static constexpr int EACH = ROWS / 16 / WARPS; // times 16 rows a warp: the first 16 of A, the others of B
    static constexpr int BUFFER_BYTES = ROWS * ROW_BYTES, STAGE_BYTES = EACH * SIXTEEN;
    const u8 *codes[EACH], *scales[EACH]; // what this lane copies of piece 0: of its first row, scales of another
    u32 further[EACH];                    // bytes to the row 8 further
    int k, steps;

    // Instead of a row that is not there it takes row 0; what comes of it is not stored.
    __device__ Tile(const Operand &a, const Operand &b) : k(a.k), steps(a.tiles()) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const Operand &x = i == 0 ? a : b;
            int first = i == 0 ? blockIdx.x * TILE_M + row_in_tile(i) : blockIdx.y * TILE_N + row_in_tile(i) - TILE_M;
            int row = first + lane / 4, other = first + lane / 2;
            codes[i] = x.row(row < x.rows ? row : 0) + lane % 4 * 16;
            further[i] = row + 8 < x.rows ? k * 4 : 0;
            size_t at = ((size_t)(other / 128) * steps + lane % 2) * 512 + other % 32 * 16 + other / 32 % 4 * 4;
            scales[i] = x.scales + (other < x.rows ? at : 0);
        }
    }

    __device__ static int row_in_tile(int i) { return 16 * (threadIdx.x / 32 + WARPS * i); }

    // Four lanes copy 64 bytes of a row, a lane the scales of a row for one step; zero beyond K.
    __device__ void copy(u32 stage, int piece) const {
        int lane = threadIdx.x % 32;
        u32 codes_left = piece * CODES + lane % 4 * 16 < k / 2 ? 16 : 0;
        u32 scales_left = piece * PIECE_STEPS + lane % 2 < steps ? 4 : 0;
#pragma unroll
        for (int i = 0; i < EACH; i++, stage += SIXTEEN) {
            const u8 *from = codes[i] + piece * CODES;
            cp_async16(stage + code_offset(lane / 4, lane % 4), from, codes_left);
            cp_async16(stage + code_offset(lane / 4 + 8, lane % 4), from + further[i], codes_left);
            cp_async4(stage + 16 * CODES + lane * 4, scales[i] + piece * PIECE_STEPS * 512, scales_left);
        }
    }

    // Rows 2, 3 of 4 have their halves swapped, so that two lanes on each of four rows meet all banks once.
    __device__ static int code_offset(int row, int chunk) { return row * CODES + (chunk ^ row & 2) * 16; }

    // Step `half` of a piece: lane 2r + q has 32 codes of row r → chunks 4q … 4q + 3 of fp16.
    __device__ void decode(const u8 *stage, u8 *buffer, int half) const {
        int lane = threadIdx.x % 32, r = lane / 2, q = lane % 2;
#pragma unroll
        for (int i = 0; i < EACH; i++, stage += SIXTEEN) {
            uint4 four = *reinterpret_cast<const uint4 *>(stage + code_offset(r, 2 * half + q));
            const u32 codes[4] = {four.x, four.y, four.z, four.w};
            const u8 *at = stage + 16 * CODES + (2 * r + half) * 4 + 2 * q;
            u32 scales = f16x2_of_e4m3x2(*reinterpret_cast<const u16 *>(at) & 0x7F7F);
            int row = row_in_tile(i) + r;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                u32 pairs[4];
                scaled_fp16_pairs(pairs, codes[c], __byte_perm(scales, 0, c < 2 ? 0x1010 : 0x3232));
                *reinterpret_cast<uint4 *>(buffer + row * ROW_BYTES + ((4 * q + c ^ row) & 7) * 16) =
                    make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
    }
};

template <int WARPGROUPS, int TILE_N>
__device__ inline void multiply(const Operand &a, const Operand &b, float scale, float *y) {
    typedef Tile<WARPGROUPS, TILE_N> T;
    const T tile(a, b);
    int steps = tile.steps, pieces = (steps + PIECE_STEPS - 1) / PIECE_STEPS, warp = threadIdx.x / 32;
    u8 *buffers = reinterpret_cast<u8 *>(shared);
    u8 *stage = buffers + BUFFERS * T::BUFFER_BYTES + warp * STAGES * T::STAGE_BYTES;
    u32 base = shared_address(buffers), copied = shared_address(stage);

    float acc[TILE_N / 8][4] = {};
    for (int piece = 0; piece < STAGES; piece++) {
        if (piece < pieces) tile.copy(copied + piece * T::STAGE_BYTES, piece);
        cp_async_commit();
    }
    cp_async_wait<STAGES - 1>(); // piece 0 has arrived, of this lane's copies
    __syncwarp();                // of all
    tile.decode(stage, buffers, 0);
    fence_for_wgmma();
    __syncthreads();
    int read = 0; // the stage of the piece that is decoded
    for (int s = 0; s < steps; s++) {
        u32 buffer = base + s % BUFFERS * T::BUFFER_BYTES;
        u64 of_a = wgmma_operand(buffer + warp / 4 * 64 * ROW_BYTES);
        u64 of_b = wgmma_operand(buffer + T::TILE_M * ROW_BYTES);
        wgmma_fence();
#pragma unroll
        for (int group = 0; group < STEP / BLOCK; group++) wgmma(acc, of_a + 2 * group, of_b + 2 * group);
        wgmma_commit();

        int next = s + 1, piece = next / PIECE_STEPS;
        if (next % PIECE_STEPS == 0) {
            // nobody reads the piece before any more
            if (piece - 1 + STAGES < pieces) tile.copy(copied + read * T::STAGE_BYTES, piece - 1 + STAGES);
            cp_async_commit();
            read = read == STAGES - 1 ? 0 : read + 1;
            cp_async_wait<STAGES - 1>();
            __syncwarp();
        }
        if (next < steps) // nobody reads that buffer any more: its products were waited for
            tile.decode(stage + read * T::STAGE_BYTES, buffers + next % BUFFERS * T::BUFFER_BYTES,
                        next % PIECE_STEPS);
        fence_for_wgmma();
        wgmma_wait<0>();
        __syncthreads();
    }
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < TILE_N / 8; j++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            store_pair(y, blockIdx.x * T::TILE_M + 16 * warp + g + 8 * h, blockIdx.y * TILE_N + 8 * j + 2 * t,
                       a.rows, b.rows, __fmul_rn(acc[j][2 * h], scale), __fmul_rn(acc[j][2 * h + 1], scale));
}

#define HOPPER(WARPGROUPS, TILE_M, TILE_N)                                                                   \
    extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS, WARPGROUPS == 1 ? 2 : 1)                  \
        gemm_hopper_##TILE_M##x##TILE_N(const u8 *a_codes, const u8 *a_scales, const float *a_tensor_scale,  \
                                        const u8 *b_codes, const u8 *b_scales, const float *b_tensor_scale,  \
                                        int m, int n, int k, float *y) {                                     \
        const Operand a = {a_codes, a_scales, m, k}, b = {b_codes, b_scales, n, k};                          \
        multiply<WARPGROUPS, TILE_N>(a, b, __fmul_rn(*a_tensor_scale, *b_tensor_scale), y);                  \
    }
HOPPER(1, 64, 64)
HOPPER(1, 64, 128)
HOPPER(2, 128, 256)
#endif
