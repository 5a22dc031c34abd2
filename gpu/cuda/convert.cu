// Numbers ↔ codes, one code a byte; max |x| of a tensor; its tensor scale.
// Equals emulator/formats.py: encode_e2m1, encode_e4m3, decode_e2m1, decode_e4m3; emulator/quantize.py: _amax,
// _tensor_scale. Launch: blocks of 256 threads, one thread a number (amax: 16 numbers at a time, any grid).
#include "blocks.cuh"

__device__ inline long long thread_index() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }

#define ENCODE(name, T)                                                                                      \
    extern "C" __global__ void encode_e2m1_##name(const T *x, u8 *codes, long long n) {                      \
        long long i = thread_index();                                                                        \
        if (i >= n) return;                                                                                  \
        codes[i] = nearest_e2m1(x[i].value());                                                               \
    }                                                                                                        \
    extern "C" __global__ void encode_e4m3_##name(const T *x, u8 *codes, long long n) {                      \
        long long i = thread_index();                                                                        \
        if (i < n) codes[i] = nearest_e4m3(x[i].value());                                                    \
    }
FOR_EACH_INPUT(ENCODE)

extern "C" __global__ void decode_e2m1(const u8 *codes, float *x, long long n) {
    long long i = thread_index();
    if (i < n) x[i] = E2M1::value(codes[i]);
}

extern "C" __global__ void decode_e4m3(const u8 *codes, float *x, long long n) {
    long long i = thread_index();
    if (i < n) x[i] = E4M3::value(codes[i]);
}

// As integers, magnitudes sort as the numbers do, infinity and NaN above all: *amax starts at 0.
template <class T> __device__ inline void amax_of(const T *x, long long blocks, u32 *amax) {
    u32 most = 0;
    for (long long b = thread_index(); b < blocks; b += (long long)gridDim.x * blockDim.x) {
        float values[BLOCK];
        read<BLOCK>(values, x + b * BLOCK);
        most = max(most, amax_bits(values));
    }
    most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) atomicMax(amax, most);
}
#define AMAX(name, T)                                                                                        \
    extern "C" __global__ void amax_##name(const T *x, long long blocks, u32 *amax) {                        \
        amax_of(x, blocks, amax);                                                                            \
    }
FOR_EACH_INPUT(AMAX)

extern "C" __global__ void tensor_scale(const u32 *amax, float *scale) { *scale = tensor_scale_of(*amax); }
