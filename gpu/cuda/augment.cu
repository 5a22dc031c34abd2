// One pass over a row: gather the channels by `order`, quantize, quantize the residual of the last S, and write
// P … P P₀ R₀ P₁ R₁ … (weights: P₀ P₀ P₁ P₁ …), packed, with swizzled scales; what is filled up becomes zero.
//   residual = fl(x − e2m1 · e4m3 · tensor_scale), one rounding: an FMA, since e2m1 · e4m3 is exact.
// Equals emulator/augment.py: augment_activations, augment_weights, rmsnorm_augment_activations.
// Launch: grid ⌈rows filled up to 128s / rows_each⌉, and rows_each rows to a thread block, in dynamic shared memory:
// K numbers as they come (after RMSNorm: as float32, and one row). RMSNorm: 256 threads, which its additions need.
#include "blocks.cuh"

constexpr int LANES = 256;
extern __shared__ uint4 shared_row[];

// 32 blocks of one row, one a lane, from `chunk` · 32 on; `staged` bytes into shared_row the row begins.
template <bool RESIDUAL, class T>
__device__ inline void augment_chunk(u32 staged, int row, int chunk, int k, int s, const int *order,
                                     const TensorScale &tensor_scale, u32 *largest, u8 *codes, u8 *scales) {
    u32 blocks = (k + s) / BLOCK, tiles = (blocks + 3) / 4, first = (k - s) / BLOCK;
    u32 b = chunk * 32 + threadIdx.x % 32;
    if (b >= k / BLOCK) return;
    const u8 *row_of_x = reinterpret_cast<const u8 *>(shared_row);
    float x[BLOCK];
#pragma unroll
    for (int i = 0; i < BLOCK; i += 4) {
        uint4 at = *reinterpret_cast<const uint4 *>(order + b * BLOCK + i);
        const u32 channels[4] = {at.x, at.y, at.z, at.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
            x[i + j] = reinterpret_cast<const T *>(row_of_x + (staged + channels[j] * (u32)sizeof(T)))->value();
    }
    u32 amax = amax_bits(x);
    tell_non_finite(largest, amax);
    codes += (size_t)row * (k + s) / 2, scales += scale_offset(row, 0, tiles);
    u32 to = b < first ? b : 2 * b - first, last = b < first ? to : to + 1;
    Block block;
#pragma unroll 1
    for (bool again = false;; again = true, to++) {
        if (RESIDUAL || !again) block = quantize_block(x, tensor_scale, amax);
        store_codes(codes + to * (BLOCK / 2), block);
        scales[to / 4 * 512 + to % 4] = block.scale;
        if (to == last) return;
        if (RESIDUAL) {
            float scale = E4M3::positive_value(block.scale);
#pragma unroll
            for (int i = 0; i < BLOCK; i++) {
                float value = __fmul_rn(E2M1::value(block.codes[i / 8] >> 4 * (i % 8) & 0xF), scale);
                x[i] = __fmaf_rn(-value, tensor_scale.value, x[i]);
            }
            amax = amax_bits(x);
        }
    }
}

// All blocks of `rows_here` rows, shared out among warps: the last blocks first, which have a residual and take
// twice as long.
template <bool RESIDUAL, class T>
__device__ inline void augment_rows(int first_row, int rows_here, int k, int s, const int *order,
                                    const TensorScale &tensor_scale, u32 *largest, u8 *codes, u8 *scales) {
    u32 warp = threadIdx.x / 32, warps = blockDim.x / 32, more_rows = warps % rows_here, fewer = warps / rows_here;
    keep(more_rows), keep(fewer);
    int row = warp % rows_here, chunk = (k / BLOCK + 31) / 32 - 1 - warp / rows_here;
    while (chunk >= 0) {
        u32 staged = row * k * (int)sizeof(T);
        keep(staged);
        augment_chunk<RESIDUAL, T>(staged, first_row + row, chunk, k, s, order, tensor_scale, largest, codes, scales);
        row += more_rows, chunk -= fewer;
        if (row >= rows_here) row -= rows_here, chunk--;
    }
}

// Zero where no block is: in all of a row beyond the last one, else in what fills the last tile.
__device__ inline void fill_scales(int row, int rows, int blocks, u8 *scales) {
    int tiles = (blocks + 3) / 4;
    for (int c = (row < rows ? blocks : 0) + threadIdx.x; c < 4 * tiles; c += blockDim.x)
        scales[scale_offset(row, c, tiles)] = 0;
}

template <bool RESIDUAL, class T>
__device__ inline void augment(const T *x, int rows, int rows_each, int k, int s, const int *order,
                               const float *tensor_scale, u32 *largest, u8 *codes, u8 *scales) {
    int first_row = blockIdx.x * rows_each, filled = (rows + 127) / 128 * 128;
    if ((k + s) / BLOCK % 4 != 0 || first_row + rows_each > rows) // rarely
        for (int row = first_row; row < min(first_row + rows_each, filled); row++)
            fill_scales(row, rows, (k + s) / BLOCK, scales);
    int rows_here = min(rows_each, rows - first_row);
    if (rows_here <= 0) return;
    const uint4 *source = reinterpret_cast<const uint4 *>(x + (size_t)first_row * k);
    int chunks = rows_here * (k * (int)sizeof(T) / 16), i = threadIdx.x, step = blockDim.x;
    for (; i + 3 * step < chunks; i += 4 * step) // four at a time: a loop costs more than a copy
#pragma unroll
        for (int j = 0; j < 4; j++) cp_async16(shared_address(shared_row + i + j * step), source + i + j * step, 16);
    for (; i < chunks; i += step) cp_async16(shared_address(shared_row + i), source + i, 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    augment_rows<RESIDUAL, T>(first_row, rows_here, k, s, order, *tensor_scale, largest, codes, scales);
}

// lanes[t] = Σ fl(x[k]²) over k = t, t + 256, …, added in this order; then halves are added: t and t + 128, …
__device__ inline float sum_of_squares(const float *row, int k, float *lanes) {
    int t = threadIdx.x;
    float sum = 0;
    for (int i = t; i < k; i += LANES) sum = __fadd_rn(sum, __fmul_rn(row[i], row[i]));
    lanes[t] = sum;
    for (int stride = LANES / 2; stride > 0; stride /= 2) {
        __syncthreads();
        if (t < stride) lanes[t] = __fadd_rn(lanes[t], lanes[t + stride]);
    }
    __syncthreads();
    return lanes[0];
}

// y = fl(fl(x · r) · weight), r = fl(1 / fl(√fl(fl(sum / K) + ε))); rest: rows from the first on
// whose y is not finite.
template <class T>
__device__ inline void rmsnorm_augment(const T *x, int rows, int k, int s, const int *order, const float *weight,
                                       float epsilon, const float *tensor_scale, u32 *largest, u32 *rest,
                                       u8 *codes, u8 *scales) {
    __shared__ float lanes[LANES];
    fill_scales(blockIdx.x, rows, (k + s) / BLOCK, scales);
    if (blockIdx.x >= rows) return;
    float *row = reinterpret_cast<float *>(shared_row);
    for (int b = threadIdx.x; b < k / BLOCK; b += blockDim.x) {
        float values[BLOCK];
        read<BLOCK>(values, x + (size_t)blockIdx.x * k + b * BLOCK);
        tell_non_finite(largest, amax_bits(values));
#pragma unroll
        for (int i = 0; i < BLOCK; i += 4)
            reinterpret_cast<float4 *>(row)[(b * BLOCK + i) / 4] =
                make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
    __syncthreads();
    float mean = __fdiv_rn(sum_of_squares(row, k, lanes), (float)k);
    float r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, epsilon)));
    bool bad = !(mean < __uint_as_float(INF));
    for (int i = threadIdx.x; i < k; i += LANES) {
        row[i] = __fmul_rn(__fmul_rn(row[i], r), weight[i]);
        bad |= (__float_as_uint(row[i]) & MAGNITUDE) >= INF;
    }
    if (bad) atomicMax(rest, rows - blockIdx.x);
    __syncthreads();
    augment_rows<true, F32>(blockIdx.x, 1, k, s, order, *tensor_scale, largest, codes, scales);
}

// Thread blocks at once: 48 registers a thread, where ptxas manages that without spilling.
constexpr int AT_ONCE = __CUDA_ARCH__ < 1000 ? 5 : 4;

#define AUGMENT(name, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(LANES, AT_ONCE)                                             \
        augment_activations_##name(const T *x, int rows, int rows_each, int k, int s, const int *order,      \
                                   const float *tensor_scale, u32 *largest, u8 *codes, u8 *scales) {         \
        augment<true>(x, rows, rows_each, k, s, order, tensor_scale, largest, codes, scales);                \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LANES, 4)                                                   \
        augment_weights_##name(const T *x, int rows, int rows_each, int k, int s, const int *order,          \
                               const float *tensor_scale, u32 *largest, u8 *codes, u8 *scales) {             \
        augment<false>(x, rows, rows_each, k, s, order, tensor_scale, largest, codes, scales);               \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LANES, 4) rmsnorm_augment_activations_##name(               \
        const T *x, int rows, int k, int s, const int *order, const float *weight, float epsilon,            \
        const float *tensor_scale, u32 *largest, u32 *rest, u8 *codes, u8 *scales) {                         \
        rmsnorm_augment(x, rows, k, s, order, weight, epsilon, tensor_scale, largest, rest, codes, scales);  \
    }
FOR_EACH_INPUT(AUGMENT)
