// Every instruction that has no name in CUDA C++, one wrapper each. Names of sections: PTX ISA 9.0.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// x stays in its register: it is not computed again where it is used.
__device__ inline void keep(const u8 *&x) { asm volatile("" : "+l"(x)); }
__device__ inline void keep(u8 *&x) { asm volatile("" : "+l"(x)); }
__device__ inline void keep(u32 &x) { asm volatile("" : "+r"(x)); }
__device__ inline void keep(float &x) { asm volatile("" : "+f"(x)); }

// Bits of a where `mask` has ones, of b elsewhere, by one instruction. Section "lop3".
__device__ inline u32 select_bits(u32 mask, u32 a, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
    return d;
}
// c + pairs' lower or upper half times `each`, below 256. Section "dp2a".
template <bool UPPER> __device__ inline u32 add_half(u32 pairs, u32 each, u32 c) {
    u32 d;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(pairs), "r"(UPPER ? each << 8 : each), "r"(c));
    return d;
}
__device__ inline void load_shared(u16 &x, u32 address) {
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
}
__device__ inline void load_shared(u32 &x, u32 address) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
}
__device__ inline u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// 16, 8 or 4 bytes, global to shared, without registers; what lies beyond `bytes` is filled with zero. Of 16, the
// other 64 bytes of a line, which somebody copies soon, come to L2 as well.
// Section "Data movement: cp.async".
__device__ inline void cp_async16(u32 to, const void *from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// Through L1: thread blocks of the same multiprocessor find it there.
__device__ inline void cp_async16_l1(u32 to, const void *from, u32 bytes) {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void cp_async8(u32 to, const void *from, u32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void cp_async4(u32 to, const void *from, u32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four (two) 8×8 matrices of 16-bit elements: lanes 8i … 8i+7 give the addresses of the rows of matrix i, and
// lane 4r+c gets bytes 4c … 4c+3 of row r. Section "ldmatrix".
__device__ inline void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ inline void ldmatrix_x2(u32 (&r)[2], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}

// D = A·Bᵀ + C, 16×8×16. Section "Matrix fragments for mma.m16n8k16 with floating point type".
__device__ inline void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
}

#if __CUDA_ARCH__ == 900
// Four warps at once, D += A·Bᵀ, 64×N×16 of fp16: it starts, and runs while the warps go on. A and B lie in shared
// memory, rows of 128 bytes (64 numbers along K) whose 16-byte chunk c is where c ^ row % 8 is, from a multiple of
// 1024 on; a start 32 bytes further is the next 16 numbers. Warp w has rows 16w … 16w + 15 of D, columns 8j … in
// d[j], in them as mma_f16. Section "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
__device__ inline u64 wgmma_operand(u32 address) { // swizzle of 128 bytes; 8 rows are 1024 bytes
    return (u64)(address >> 4 & 0x3FFF) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
#define D_0_31 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18" \
    ", %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D_32_63 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D_64_127 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109" \
    ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123" \
    ", %124, %125, %126, %127"
#define FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define THIRTYTWO(j) FOUR(j), FOUR(j + 1), FOUR(j + 2), FOUR(j + 3), FOUR(j + 4), FOUR(j + 5), FOUR(j + 6), FOUR(j + 7)
#define WGMMA(N, D, A, B, ...)                                                                               \
    __device__ inline void wgmma(float (&d)[N / 8][4], u64 a, u64 b) {                                       \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, 1, 0;\n\t"                                        \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" D "}, " A ", " B             \
                     ", p, 1, 1, 0, 0;\n\t}"                                                                 \
                     : __VA_ARGS__                                                                           \
                     : "l"(a), "l"(b));                                                                      \
    }
WGMMA(64, D_0_31, "%32", "%33", THIRTYTWO(0))
WGMMA(128, D_0_31 D_32_63, "%64", "%65", THIRTYTWO(0), THIRTYTWO(8))
WGMMA(256, D_0_31 D_32_63 D_64_127, "%128", "%129", THIRTYTWO(0), THIRTYTWO(8), THIRTYTWO(16), THIRTYTWO(24))
// Before the first wgmma that adds to registers which other instructions have written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// What this thread has written to shared memory, wgmma may read, after a barrier. Section "membar / fence".
__device__ inline void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

#ifdef NATIVE
// D = A·Bᵀ + C, 16×8×64, E2M1 with one UE4M3 scale for 16 along K; byte-id and thread-id 0: a lane pair holds
// the four scales of row g (even lane) and g + 8 (odd lane). Section "mma with block scaling".
__device__ inline void mma_nvfp4(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, u32 sfa, u32 sfb) {
    asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {0, 0}, {%11}, {0, 0};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(sfa), "r"(sfb));
}
#endif

__device__ inline u32 mul_f16x2(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// Both times the lower (0) or the upper (1) of two numbers.
template <int WHICH> __device__ inline u32 mul_f16x2_by(u32 a, u32 two) {
    u32 d;
    asm("{\n\t.reg .b16 by<2>;\n\t.reg .b32 both;\n\t"
        "mov.b32 {by0, by1}, %2;\n\t"
        "mov.b32 both, {by%3, by%3};\n\t"
        "mul.rn.f16x2 %0, %1, both;\n\t}"
        : "=r"(d)
        : "r"(a), "r"(two), "n"(WHICH));
    return d;
}
// The larger one; NaN if one is NaN.
__device__ inline float max_nan(float a, float b) {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}
// 1 / x, rounded or a neighbour of that; subnormal numbers are zero. Section "rcp".
__device__ inline float rcp_approx(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ inline float float_of_f16(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

#if __CUDA_ARCH__ >= 1000 // the loader compiles only for targets with the suffix a, which have it
// Eight numbers → eight E2M1 codes, the first in the lowest nibble. Section "cvt".
__device__ inline u32 cvt_e2m1x8(const float *x) {
    u32 codes;
    asm("{\n\t.reg .b8 b0, b1, b2, b3;\n\t"
        "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\n\t"
        "cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n\t"
        "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\n\t"
        "cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n\t"
        "mov.b32 %0, {b0, b1, b2, b3};\n\t}"
        : "=r"(codes)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
    return codes;
}
#endif
#if __CUDA_ARCH__ >= 890
__device__ inline u32 cvt_e4m3(float x) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    return pair;
}
__device__ inline u32 cvt_f16x2_e4m3x2(u16 codes) {
    u32 pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(codes));
    return pair;
}
#endif

// As mma_f16, of bfloat16.
__device__ inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
}
