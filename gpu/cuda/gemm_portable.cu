// Y = A·Bᵀ on any GPU from sm_80 on, by fp16 mma.m16n8k16 on codes that are decoded into shared memory.
//
// gemm_exact: the bits of an RTX Blackwell GPU; equals emulator/gemm.py: matmul. A step of 64 along K is four
//   groups P = Σ e2m1·e2m1, exact from one fp16 MMA with C = 0, each times its two scales; then D is C and the
//   four aligned to the largest exponent, cut off at 2^(E−35), added, cut off to float32 (docs/spec.md,
//   section 5). Where nothing can be cut off before the end that is one addition toward zero, see `plain`.
// gemm_fast: e2m1·e4m3 as fp16, exact, chained over k = 0, 16, … from +0; equals emulator/gemm.py: matmul_fp16.
//
// Launch: 256 threads = 8 warps; grid (⌈M/128⌉, ⌈N/128⌉) for gemm_exact, ⌈N/256⌉ for gemm_fast. Dynamic shared
// memory: two steps of 64 fp16 numbers for each row of both operands; gemm_exact adds four float32 scales a row
// and 16 words.
#include "tiles.cuh"

constexpr int THREADS = 256, TILE_M = 128, STEP = 64, ROW_BYTES = 2 * STEP;
constexpr u32 EXACT_GROUPS = STEP / BLOCK;
extern __shared__ uint4 shared[];

// Chunk c of a row (8 numbers, 16 bytes) lies where c ^ row is: 8 rows meet all 32 banks once.
__device__ inline u32 chunk_offset(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ row) & 7) * 16; }

// One thread's part of a step: 32 codes of each of its rows, in two halves with a scale each.
template <int ROWS> struct Packed {
    u64 codes[ROWS][2];
    u32 scales[ROWS][2];
};

// What both kernels do: read packed codes two steps ahead, decode one step ahead, multiply.
template <int TILE_N, bool EXACT> struct Pipeline {
    static constexpr int ROWS = TILE_M + TILE_N, EACH = 2 * ROWS / THREADS;
    static constexpr int CODES_BYTES = ROWS * ROW_BYTES, SCALES_BYTES = EXACT ? ROWS * 16 : 0;
    static constexpr int MASKS_BYTES = EXACT ? ROWS / 16 * 4 : 0;
    static constexpr int BUFFER_BYTES = CODES_BYTES + SCALES_BYTES + MASKS_BYTES;
    Operand a, b;

    // Thread 2r + q has quarters 2q and 2q + 1 of row r, of r + 128, …: rows of A first, then of B.
    __device__ void load(Packed<EACH> &p, int step, int half) const {
        int r = threadIdx.x / 2, quarter = threadIdx.x % 2 * 2 + half, k = step * STEP + quarter * BLOCK;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const Operand &x = i == 0 ? a : b;
            int row = i == 0 ? blockIdx.x * TILE_M + r : blockIdx.y * TILE_N + (i - 1) * 128 + r;
            bool inside = row < x.rows && k < x.k;
            size_t at = ((size_t)(row / 128) * x.tiles() + step) * 512 + row % 32 * 16 + row / 32 % 4 * 4;
            p.codes[i][half] = inside ? *reinterpret_cast<const u64 *>(x.row(row) + k / 2) : 0;
            p.scales[i][half] = inside ? x.scales[at + quarter] : 0;
        }
    }

    // Eight codes of each row, chunk c of four → 16 bytes of fp16.
    __device__ void decode(const Packed<EACH> &p, int buffer, int c) const {
        u8 *to = reinterpret_cast<u8 *>(shared) + buffer * BUFFER_BYTES;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            u32 codes = (u32)(p.codes[i][c / 2] >> 32 * (c % 2)), pairs[4];
            if (EXACT) {
                fp16_pairs(pairs, codes);
            } else {
                u32 scale = f16x2_of_e4m3x2(p.scales[i][c / 2] & E4M3::magnitude);
                scaled_fp16_pairs(pairs, codes, __byte_perm(scale, 0, 0x1010));
            }
            *reinterpret_cast<uint4 *>(to + chunk_offset(i * 128 + threadIdx.x / 2, threadIdx.x % 2 * 4 + c)) =
                make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }

    __device__ void load(Packed<EACH> &p, int step) const { load(p, step, 0), load(p, step, 1); }
    __device__ void decode(const Packed<EACH> &p, int buffer) const {
#pragma unroll
        for (int c = 0; c < 4; c++) decode(p, buffer, c);
        if (EXACT) decode_scales(p, reinterpret_cast<u8 *>(shared) + buffer * BUFFER_BYTES + CODES_BYTES);
    }

    // Two scales as float32; and which exponents the 16 rows of this warp have among blocks that are not zero,
    // bit e + 6 for exponent e.
    __device__ void decode_scales(const Packed<EACH> &p, u8 *to) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int row = i * 128 + threadIdx.x / 2;
            float scales[2];
            u32 exponents = 0;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 code = p.scales[i][h] & E4M3::magnitude;
                bool nonzero = code != 0 && (p.codes[i][h] & 0x7777777777777777) != 0;
                scales[h] = E4M3::value(code);
                exponents |= nonzero ? 1u << (max(code >> E4M3::mantissa_bits, 1u) - 1) : 0;
            }
            *reinterpret_cast<float2 *>(to + row * 16 + threadIdx.x % 2 * 8) = make_float2(scales[0], scales[1]);
            exponents = __reduce_or_sync(~0u, exponents);
            if (threadIdx.x % 32 == 0) reinterpret_cast<u32 *>(to + SCALES_BYTES)[row / 16] = exponents;
        }
    }
};

// Fragments of 16 rows (x4: two operands' worth of 8 columns) for the 16 numbers of one group.
__device__ inline void fragment_a(u32 (&f)[4], u32 codes, int row, int group) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(f, codes + chunk_offset(row + lane % 16, 2 * group + lane / 16));
}
__device__ inline void fragment_b(u32 (&f)[4], u32 codes, int row, int group) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(f, codes + chunk_offset(row + lane % 8 + lane / 16 * 8, 2 * group + (lane / 8 & 1)));
}

template <int MT, int NT, int TILE_N>
__device__ inline void store(float *y, const float (&acc)[MT][NT][4], int warp_m, int warp_n, int m, int n,
                             float scale) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                store_pair(y, blockIdx.x * TILE_M + warp_m + 16 * i + g + 8 * h,
                           blockIdx.y * TILE_N + warp_n + 8 * j + 2 * t, m, n, __fmul_rn(acc[i][j][2 * h], scale),
                           __fmul_rn(acc[i][j][2 * h + 1], scale));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gemm_fast(const u8 *a_codes, const u8 *a_scales, const float *a_tensor_scale, const u8 *b_codes,
              const u8 *b_scales, const float *b_tensor_scale, int m, int n, int k, float *y) {
    constexpr int MT = 4, NT = 8, TILE_N = 256; // warps 2 × 4 of 64 × 64 outputs
    typedef Pipeline<TILE_N, false> Pipe;
    const Pipe pipe = {{a_codes, a_scales, m, k}, {b_codes, b_scales, n, k}};
    int steps = pipe.a.tiles(), warp = threadIdx.x / 32, warp_m = warp / 4 * 64, warp_n = warp % 4 * 64;

    float acc[MT][NT][4] = {};
    Packed<Pipe::EACH> p;
    pipe.load(p, 0);
    pipe.decode(p, 0);
    pipe.load(p, 1);
    __syncthreads();
    for (int s = 0; s < steps; s++) {
        u32 codes = shared_address(shared) + s % 2 * Pipe::BUFFER_BYTES;
#pragma unroll
        for (int group = 0; group < EXACT_GROUPS; group++) {
            u32 fa[MT][4], fb[NT / 2][4];
#pragma unroll
            for (int i = 0; i < MT; i++) fragment_a(fa[i], codes, warp_m + 16 * i, group);
#pragma unroll
            for (int j = 0; j < NT / 2; j++) fragment_b(fb[j], codes, TILE_M + warp_n + 16 * j, group);
            // a quarter of the next step, while this one multiplies; nobody has read its buffer since the barrier
            pipe.decode(p, (s + 1) % 2, group);
            if (group % 2) pipe.load(p, s + 2, group / 2);
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++)
                    mma_f16(acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1], acc[i][j]);
        }
        __syncthreads();
    }
    store<MT, NT, TILE_N>(y, acc, warp_m, warp_n, m, n, __fmul_rn(*a_tensor_scale, *b_tensor_scale));
}

#ifndef NATIVE // where the hardware has the instruction, gemm_native is exact
constexpr int LEAST_EXPONENT = 1 - E4M3::bias;               // of a scale
constexpr int GROUP_UNIT = 2 * (1 + E4M3::mantissa_bits);    // a group is a multiple of 2^(exponent − 8)
constexpr int FRACTION_BITS = 35;                            // kept below the largest exponent
constexpr int ZERO_EXPONENT = -139;
constexpr int HALF_DENORM = 14;                              // an fp16 pair holds the values times 2^-14
constexpr u32 SIGNS = 0x80008000;                            // in it
// Sums of a step are carried in units of 2^(lowest exponent − 8 + 23): exact while below 2 in magnitude, which
// is bit 30 of a float32. NaN has it too.
constexpr u32 TOO_LARGE = 0x40000000;
constexpr float NONE[4] = {};

// Where nothing of a step is cut off before the last rounding, for all outputs of a warp: the exponents of
// groups lie within 27 of each other and of C's, and C has no bit below 2^(E−35) because no group so far had.
struct Range {
    int lowest_ever = 32, lowest, highest;
    float bound = 0; // of |C|
    bool empty;

    // `a`, `b`: which exponents occur, one bit each.
    __device__ void start_step(u32 a, u32 b) {
        empty = a == 0 || b == 0; // no product is nonzero: any scale would do
        lowest = empty ? 0 : __ffs(a) + __ffs(b) - 2 + 2 * LEAST_EXPONENT;
        highest = empty ? 0 : 62 - __clz(a) - __clz(b) + 2 * LEAST_EXPONENT;
        if (!empty) lowest_ever = min(lowest_ever, lowest);
    }
    __device__ bool c_is_low() const { return bound < exp2_of(lowest + FRACTION_BITS - GROUP_UNIT + 1); }
    __device__ bool plain() const {
        return empty || (highest - lowest_ever <= FRACTION_BITS - GROUP_UNIT && c_is_low());
    }
    __device__ void end_step() { // 4 · 16 · 6 · 6 · (15/8)² < 2^13
        if (!empty) bound = __fadd_ru(bound, exp2_of(highest + 13));
    }

    __device__ static float exp2_of(int n) { return __uint_as_float((u32)(n + BIAS) << MANTISSA); }
};

// The largest |C| of a warp, NaN left out: it stays NaN whatever is added.
template <int TILES> __device__ inline float largest(const float (&acc)[TILES][4]) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            u32 bits = __float_as_uint(acc[i][e]) & MAGNITUDE;
            most = max(most, bits > INF ? 0 : bits);
        }
    return __uint_as_float(__reduce_max_sync(~0u, most));
}

// A scale's significand, 0 … 15, and its exponent; subnormals have the least and no hidden one.
__device__ inline int scale_exponent(float scale) {
    return max((int)(__float_as_uint(scale) >> MANTISSA) - BIAS, LEAST_EXPONENT);
}
__device__ inline int scale_significand(float scale, int exponent) {
    return (int)__fmul_rn(scale, Range::exp2_of(E4M3::mantissa_bits - exponent));
}

// integer · 2^left, cut off toward zero.
__device__ inline long long shifted(long long x, int left) {
    if (left >= 0) return x << left;
    u64 magnitude = (u64)(x < 0 ? -x : x) >> min(-left, 63);
    return x < 0 ? -(long long)magnitude : (long long)magnitude;
}

// The step as it is defined, in integers: emulator/tensor_core.py: nvfp4_in_integers. `dots`: the four P times
// 2^-28, `occupied`: bit g if group g has a product that is not zero. C is a number or NaN, never infinite: a
// chain that starts at zero has no such sum.
__device__ inline float add_step(float c, const float (&dots)[4], u32 occupied, const float (&scales_a)[4],
                                 const float (&scales_b)[4]) {
    long long terms[4], total;
    int exponents[4], c_bits = __float_as_uint(c) & MAGNITUDE, c_exponent = max(c_bits >> MANTISSA, 1) - BIAS;
    bool nan = c != c;
    int top = c_bits == 0 ? ZERO_EXPONENT : c_exponent;
#pragma unroll
    for (int g = 0; g < 4; g++) {
        float sa = scales_a[g], sb = scales_b[g];
        nan |= sa != sa || sb != sb;
        int ea = scale_exponent(sa), eb = scale_exponent(sb);
        int quarters = (int)__fmul_rn(dots[g], Range::exp2_of(2 * HALF_DENORM + 2));
        terms[g] = quarters * (scale_significand(sa, ea) * scale_significand(sb, eb));
        exponents[g] = (occupied >> g & 1) && sa != 0 && sb != 0 ? ea + eb : ZERO_EXPONENT;
        top = max(top, exponents[g]);
    }
    if (nan) return __uint_as_float(NAN_BITS);
    int significand = (c_bits & ((1 << MANTISSA) - 1)) | (c_bits >> MANTISSA ? 1 << MANTISSA : 0);
    total = shifted(c < 0 ? -significand : significand, FRACTION_BITS - MANTISSA - (top - c_exponent));
#pragma unroll
    for (int g = 0; g < 4; g++) total += shifted(terms[g], FRACTION_BITS - GROUP_UNIT - (top - exponents[g]));
    if (total == 0) return 0;
    return __fmul_rn(__ll2float_rz(total), Range::exp2_of(top - FRACTION_BITS)); // a power of two: exact
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gemm_exact(const u8 *a_codes, const u8 *a_scales, const float *a_tensor_scale, const u8 *b_codes,
               const u8 *b_scales, const float *b_tensor_scale, int m, int n, int k, float *y) {
    constexpr int MT = 2, NT = 8, TILE_N = 128; // warps 4 × 2 of 32 × 64 outputs
    typedef Pipeline<TILE_N, true> Pipe;
    const Pipe pipe = {{a_codes, a_scales, m, k}, {b_codes, b_scales, n, k}};
    int steps = pipe.a.tiles(), warp = threadIdx.x / 32, warp_m = warp / 2 * 32, warp_n = warp % 2 * 64;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

    float acc[MT * NT][4] = {}; // tile i + MT·j
    Range range;
    Packed<Pipe::EACH> p;
    pipe.load(p, 0);
    pipe.decode(p, 0);
    pipe.load(p, 1);
    __syncthreads();
    for (int s = 0; s < steps; s++) {
        u32 codes = shared_address(shared) + s % 2 * Pipe::BUFFER_BYTES;
        const u8 *buffer = reinterpret_cast<const u8 *>(shared) + s % 2 * Pipe::BUFFER_BYTES;
        const float4 *scales = reinterpret_cast<const float4 *>(buffer + Pipe::CODES_BYTES);
        const u32 *masks = reinterpret_cast<const u32 *>(scales + Pipe::ROWS);
        pipe.decode(p, (s + 1) % 2); // nobody has read that buffer since the last barrier
        pipe.load(p, s + 2);

        u32 of_a = 0, of_b = 0, undone = 0; // a bit a tile: it takes the general way
#pragma unroll
        for (int i = 0; i < MT; i++) of_a |= masks[warp_m / 16 + i];
#pragma unroll
        for (int j = 0; j < NT / 2; j++) of_b |= masks[(TILE_M + warp_n) / 16 + j];
        range.start_step(of_a, of_b);
        if (!range.c_is_low()) range.bound = largest(acc); // a sum of bounds grows faster than a sum
        if (range.plain()) {
            float to_unit = Range::exp2_of(2 * HALF_DENORM - MANTISSA + GROUP_UNIT - range.lowest);
            float from_unit = Range::exp2_of(MANTISSA - GROUP_UNIT + range.lowest);
            u32 fa[MT][EXACT_GROUPS][4];
            float sa[MT][2][4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
#pragma unroll
                for (int group = 0; group < EXACT_GROUPS; group++)
                    fragment_a(fa[i][group], codes, warp_m + 16 * i, group);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float4 four = scales[warp_m + 16 * i + g + 8 * h];
                    sa[i][h][0] = four.x, sa[i][h][1] = four.y, sa[i][h][2] = four.z, sa[i][h][3] = four.w;
                }
            }
#pragma unroll
            for (int j = 0; j < NT; j++) {
                __syncwarp(); // or ptxas loads for later columns here, more than registers hold
                u32 fb[EXACT_GROUPS / 2][4]; // of groups 0 and 1, then 2 and 3
#pragma unroll
                for (int pair = 0; pair < EXACT_GROUPS / 2; pair++) {
                    int lane = threadIdx.x % 32, row = TILE_M + warp_n + 8 * j + lane % 8;
                    ldmatrix_x4(fb[pair], codes + chunk_offset(row, 4 * pair + lane / 8));
                }
                float sb[2][4];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float4 four = scales[TILE_M + warp_n + 8 * j + 2 * t + h];
                    sb[h][0] = __fmul_rn(four.x, to_unit), sb[h][1] = __fmul_rn(four.y, to_unit);
                    sb[h][2] = __fmul_rn(four.z, to_unit), sb[h][3] = __fmul_rn(four.w, to_unit);
                }
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    float sum[4];
                    u32 seen = 0;
#pragma unroll
                    for (int group = 0; group < EXACT_GROUPS; group++) {
                        float dot[4];
                        mma_f16(dot, fa[i][group], fb[group / 2][group % 2 * 2], fb[group / 2][group % 2 * 2 + 1],
                                NONE);
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            float scale = __fmul_rn(sa[i][e >> 1][group], sb[e & 1][group]);
                            sum[e] = group == 0 ? __fmul_rn(dot[e], scale) : __fmaf_rn(dot[e], scale, sum[e]);
                            if (group > 0) seen |= __float_as_uint(sum[e]);
                        }
                    }
                    if (__any_sync(~0u, seen & TOO_LARGE)) {
                        undone |= 1u << (i + MT * j);
                    } else {
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            acc[i + MT * j][e] = __fmaf_rz(sum[e], from_unit, acc[i + MT * j][e]);
                    }
                }
            }
        } else {
            undone = (1u << MT * NT) - 1;
        }

        range.end_step();

        if (undone) { // the accumulators turn round, so that this stands here once and needs no index into them
#pragma unroll 1
            for (int tile = 0; tile < MT * NT; tile++) {
                float first[4];
#pragma unroll
                for (int e = 0; e < 4; e++) first[e] = acc[0][e];
                if (undone >> tile & 1) {
                    int row = warp_m + tile % MT * 16, column = TILE_M + warp_n + tile / MT * 8;
                    float dots[4][4]; // of output e, group
                    u32 occupied = 0; // bit 4e + group: a product is not zero
#pragma unroll
                    for (int group = 0; group < EXACT_GROUPS; group++) {
                        u32 fa[4], fb[2];
                        float dot[4];
                        int lane = threadIdx.x % 32;
                        fragment_a(fa, codes, row, group);
                        ldmatrix_x2(fb, codes + chunk_offset(column + lane % 8, 2 * group + (lane / 8 & 1)));
                        mma_f16(dot, fa, fb[0], fb[1], NONE);
#pragma unroll
                        for (int e = 0; e < 4; e++) dots[e][group] = dot[e], fa[e] &= ~SIGNS;
                        mma_f16(dot, fa, fb[0] & ~SIGNS, fb[1] & ~SIGNS, NONE);
#pragma unroll
                        for (int e = 0; e < 4; e++) occupied |= dot[e] != 0 ? 1u << (4 * e + group) : 0;
                    }
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float4 of_row = scales[row + g + 8 * (e >> 1)], of_column = scales[column + 2 * t + (e & 1)];
                        const float sa[4] = {of_row.x, of_row.y, of_row.z, of_row.w};
                        const float sb[4] = {of_column.x, of_column.y, of_column.z, of_column.w};
                        first[e] = add_step(first[e], dots[e], occupied >> 4 * e, sa, sb);
                    }
                }
#pragma unroll
                for (int i = 0; i < MT * NT; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[i][e] = i + 1 < MT * NT ? acc[i + 1][e] : first[e];
            }
        }
        __syncthreads();
    }

    float scale = __fmul_rn(*a_tensor_scale, *b_tensor_scale), tiles[MT][NT][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) tiles[i][j][e] = acc[i + MT * j][e];
    store<MT, NT, TILE_N>(y, tiles, warp_m, warp_n, m, n, scale);
}
#endif
