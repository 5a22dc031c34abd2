// Y = A·Bᵀ on RTX Blackwell: mma.m16n8k64 mxf4nvf4 chained over k = 0, 64, … from +0, then the epilogue.
// Equals emulator/gemm.py: matmul. Launch: grid (⌈M/128⌉, ⌈N/128⌉), 128 threads = 4 warps of 64×64 outputs;
// dynamic shared memory: STAGES steps of 64 along K in flight, each 9 KB, two blocks a multiprocessor.
#ifdef NATIVE
#include "tiles.cuh"

constexpr int TILE = 128, THREADS = 128, STAGES = 4, ROW_BYTES = 32, SCALES = 512;
constexpr int OPERAND_BYTES = TILE * ROW_BYTES, STAGE_BYTES = 2 * (OPERAND_BYTES + SCALES);
extern __shared__ uint4 shared[];

// A row has two chunks of 16 bytes; rows 4 … 7 of 8 have them swapped, so that 8 rows meet all 32 banks once.
__device__ inline u32 chunk_offset(int row, int chunk) { return row * ROW_BYTES + (chunk ^ (row >> 2 & 1)) * 16; }

__device__ inline void load_stage(u32 stage, const Operand &x, int tile, int step) {
    for (int i = threadIdx.x; i < TILE * 2; i += THREADS)
        copy_codes(stage + chunk_offset(i / 2, i % 2), x, tile * TILE + i / 2, step * 64 + i % 2 * 32);
    if (threadIdx.x < SCALES / 16)
        cp_async16(stage + OPERAND_BYTES + threadIdx.x * 16,
                   x.scales + ((size_t)tile * x.tiles() + step) * SCALES + threadIdx.x * 16, 16);
}

// Four swizzled bytes: the scales of one row for 64 along K.
__device__ inline u32 scales_of_row(u32 stage, int row) {
    const u8 *at = reinterpret_cast<const u8 *>(shared) + stage + OPERAND_BYTES + row % 32 * 16 + row / 32 * 4;
    return *reinterpret_cast<const u32 *>(at);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    gemm_native(const u8 *a_codes, const u8 *a_scales, const float *a_tensor_scale, const u8 *b_codes,
                const u8 *b_scales, const float *b_tensor_scale, int m, int n, int k, float *y) {
    const Operand a = {a_codes, a_scales, m, k}, b = {b_codes, b_scales, n, k};
    int steps = a.tiles(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int warp_m = warp / 2 * 64, warp_n = warp % 2 * 64, g = lane / 4, t = lane % 4;
    u32 base = shared_address(shared);

    float acc[4][8][4] = {};
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) {
            load_stage(base + s * STAGE_BYTES, a, blockIdx.x, s);
            load_stage(base + s * STAGE_BYTES + STAGE_BYTES / 2, b, blockIdx.y, s);
        }
        cp_async_commit();
    }
    for (int s = 0; s < steps; s++) {
        cp_async_wait<STAGES - 2>(); // step s has arrived, of this thread's copies
        __syncthreads();             // of all; and no one reads step s − 1 any more
        int next = s + STAGES - 1;
        if (next < steps) {
            u32 to = base + next % STAGES * STAGE_BYTES;
            load_stage(to, a, blockIdx.x, next);
            load_stage(to + STAGE_BYTES / 2, b, blockIdx.y, next);
        }
        cp_async_commit();

        u32 of_a = s % STAGES * STAGE_BYTES, of_b = of_a + STAGE_BYTES / 2;
        u32 fa[4][4], sfa[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // rows 0–7 and 8–15 of bytes 0–15, then of bytes 16–31
            ldmatrix_x4(fa[i], base + of_a + chunk_offset(warp_m + 16 * i + lane % 16, lane / 16));
            sfa[i] = scales_of_row(of_a, warp_m + 16 * i + g + 8 * (t & 1));
        }
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            u32 fb[4]; // columns 0–7, bytes 0–15 and 16–31, then columns 8–15
            int column = warp_n + 8 * j + lane % 8 + lane / 16 * 8;
            ldmatrix_x4(fb, base + of_b + chunk_offset(column, lane / 8 & 1));
            u32 sfb[2] = {scales_of_row(of_b, warp_n + 8 * j + g), scales_of_row(of_b, warp_n + 8 * j + 8 + g)};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mma_nvfp4(acc[i][j], fa[i], fb[0], fb[1], sfa[i], sfb[0]);
                mma_nvfp4(acc[i][j + 1], fa[i], fb[2], fb[3], sfa[i], sfb[1]);
            }
        }
    }
    cp_async_wait<0>();

    float scale = __fmul_rn(*a_tensor_scale, *b_tensor_scale);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                store_pair(y, blockIdx.x * TILE + warp_m + 16 * i + g + 8 * h,
                           blockIdx.y * TILE + warp_n + 8 * j + 2 * t, m, n, __fmul_rn(acc[i][j][2 * h], scale),
                           __fmul_rn(acc[i][j][2 * h + 1], scale));
}
#endif
