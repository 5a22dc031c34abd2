// One pass over a row: gather the channels by `order`, quantize, quantize the residual of the last S, and write
// P … P P₀ R₀ P₁ R₁ … (weights: P₀ P₀ P₁ P₁ …), packed, with swizzled scales; what is filled up becomes zero.
//   residual = fl(x − e2m1 · e4m3 · tensor_scale), one rounding: an FMA, since e2m1 · e4m3 is exact.
// Equals emulator/augment.py: augment_activations, augment_weights, rmsnorm_augment_activations.
// Launch: grid (rows filled up to 128s, any), a row to a thread block or to several, which share out its blocks.
// Dynamic shared memory: K numbers as they come (after RMSNorm: as float32). RMSNorm: 256 threads, which its
// additions need.
#include "blocks.cuh"

constexpr int LANES = 256;
extern __shared__ uint4 shared_row[];

// Where the channels of a block are.
struct Gather {
    uint4 order[2];
    __device__ Gather(const u16 *of_row, int block) {
        const uint4 *from = reinterpret_cast<const uint4 *>(of_row + block * BLOCK);
        order[0] = from[0], order[1] = from[1];
    }
    template <class T> __device__ void read(float (&x)[BLOCK], u32 row) const {
        const u32 pairs[BLOCK / 2] = {order[0].x, order[0].y, order[0].z, order[0].w,
                                      order[1].x, order[1].y, order[1].z, order[1].w};
#pragma unroll
        for (int i = 0; i < BLOCK; i += 2) {
            T one, other;
            load_shared(one.bits, add_half<false>(pairs[i / 2], sizeof(T), row));
            load_shared(other.bits, add_half<true>(pairs[i / 2], sizeof(T), row));
            x[i] = one.value(), x[i + 1] = other.value();
        }
    }
};

// x to block `to` of a row, and if that is not the `last`, its residual to the next one.
template <bool RESIDUAL>
__device__ inline void augment_block(float (&x)[BLOCK], u32 to, u32 last, const TensorScale &tensor_scale,
                                     u32 *largest, u8 *codes, u8 *scales) {
    Block block;
#pragma unroll 1
    for (bool again = false;; again = true, to++) {
        if (RESIDUAL || !again) block = quantize_block(x, tensor_scale, largest);
        store_codes(codes + to * (BLOCK / 2), block);
        scales[to / 4 * 512 + to % 4] = block.scale;
        if (to == last) return;
        if (RESIDUAL) {
            u32 scale = f16x2_of_e4m3x2(block.scale * 0x0101);
#pragma unroll
            for (int i = 0; i < BLOCK; i++) {
                u32 pair = mul_f16x2(f16x2_of_e2m1x2(block.codes[i / 8], i % 4), scale); // exact
                float value = float_of_f16(i % 8 < 4 ? pair : pair >> 16);
                x[i] = __fmaf_rn(-value, tensor_scale.value, x[i]);
            }
        }
    }
}

// The row that is, or arrives, in shared memory. A warp takes 32 blocks at a time, one a lane: the last ones first,
// which have a residual and take twice as long, then forth and back, so that no warp has the longer ones always.
// Where the next channels are is loaded ahead, the first ones while the row arrives.
template <bool RESIDUAL, class T>
__device__ inline void augment_row(int row, int k, int s, const u16 *order, const float *scale_of_tensor,
                                   u32 *largest, u8 *codes, u8 *scales) {
    u32 first = (u32)(k - s) / BLOCK;
    int blocks = (u32)k / BLOCK, chunks = (u32)(blocks + 31) / 32;
    int warp = (blockIdx.y * blockDim.x + threadIdx.x) / 32, warps = gridDim.y * blockDim.x / 32;
    int b = (chunks - 1 - warp) * 32 + (int)(threadIdx.x % 32), step = (2 * (warps - warp) - 1) * 32;
    u32 shared = shared_address(shared_row);
    codes += (u64)(u32)row * ((u32)(k + s) / 2);
    scales += scale_offset(row, 0, ((u32)(k + s) / BLOCK + 3) / 4);
    keep(first), keep(shared), keep(codes), keep(scales);
    __builtin_assume(__isGlobal(codes)), __builtin_assume(__isGlobal(scales));
    Gather next(order, max(0, min(b, blocks - 1)));
    TensorScale tensor_scale(*scale_of_tensor);
    cp_async_wait<0>();
    __syncthreads();
    for (; b >= 0; b -= step, step = 64 * warps - step) {
        float x[BLOCK];
        next.read<T>(x, shared);
        next = Gather(order, max(0, b - step));
        u32 to = max(b, 2 * b - (int)first);
        if (b < blocks)
            augment_block<RESIDUAL>(x, to, b < (int)first ? to : to + 1, tensor_scale, largest, codes, scales);
    }
}

// Zero where no block is: in all of a row beyond the last one, else in what fills the last tile.
__device__ inline void fill_scales(int row, int rows, int blocks, u8 *scales) {
    if (blockIdx.y > 0 || row < rows && blocks % 4 == 0) return;
    int tiles = (blocks + 3) / 4;
    for (int c = (row < rows ? blocks : 0) + threadIdx.x; c < 4 * tiles; c += blockDim.x)
        scales[scale_offset(row, c, tiles)] = 0;
}

template <bool RESIDUAL, class T>
__device__ inline void augment(const T *x, int rows, int k, int s, const u16 *order, const float *tensor_scale,
                               u32 *largest, u8 *codes, u8 *scales) {
    int row = blockIdx.x, chunks = k * (u32)sizeof(T) / 16;
    fill_scales(row, rows, (u32)(k + s) / BLOCK, scales);
    if (row >= rows) return;
    const uint4 *from = reinterpret_cast<const uint4 *>(x + (u64)(u32)row * (u32)k);
    // A warp copies 128 · 16 bytes in turn: together, so that one address serves four copies.
    int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32 * 128; i < chunks; i += 4 * blockDim.x) {
        u32 to = shared_address(shared_row + i + lane);
        if (i + 128 <= chunks) {
#pragma unroll
            for (int j = 0; j < 128; j += 32) cp_async16(to + 16 * j, from + i + lane + j, 16);
        } else {
#pragma unroll 1
            for (int j = i + lane; j < chunks; j += 32, to += 512) cp_async16(to, from + j, 16);
        }
    }
    cp_async_commit();
    augment_row<RESIDUAL, T>(row, k, s, order, tensor_scale, largest, codes, scales);
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
__device__ inline void rmsnorm_augment(const T *x, int rows, int k, int s, const u16 *order, const float *weight,
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
    augment_row<true, F32>(blockIdx.x, k, s, order, tensor_scale, largest, codes, scales);
}

#define AUGMENT(name, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(LANES, 4)                                                   \
        augment_activations_##name(const T *x, int rows, int k, int s, const u16 *order,                     \
                                   const float *tensor_scale, u32 *largest, u8 *codes, u8 *scales) {         \
        augment<true>(x, rows, k, s, order, tensor_scale, largest, codes, scales);                           \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LANES, 3)                                                   \
        augment_weights_##name(const T *x, int rows, int k, int s, const u16 *order,                         \
                               const float *tensor_scale, u32 *largest, u8 *codes, u8 *scales) {             \
        augment<false>(x, rows, k, s, order, tensor_scale, largest, codes, scales);                          \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LANES, 4) rmsnorm_augment_activations_##name(               \
        const T *x, int rows, int k, int s, const u16 *order, const float *weight, float epsilon,            \
        const float *tensor_scale, u32 *largest, u32 *rest, u8 *codes, u8 *scales) {                         \
        rmsnorm_augment(x, rows, k, s, order, weight, epsilon, tensor_scale, largest, rest, codes, scales);  \
    }
FOR_EACH_INPUT(AUGMENT)
