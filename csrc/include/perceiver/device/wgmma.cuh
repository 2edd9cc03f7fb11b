// Warpgroup matrix products (wgmma, sm_90a): D [64, N] += A [64, 16] B [16, N], fp32 sums of 16-bit operands.
//
// B comes from shared memory, A from there or from registers. D stays in registers: thread t of the warpgroup holds, for
// i < N / 2, row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2. A pair of 16-bit values so
// converted is A's operand of the next product. (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions")
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace perceiver {

// How the bytes of a row lie in a tile: 16-byte units exchanged within 8 rows of 128 bytes, or of 32.
enum class Swizzle : uint64_t { k128Bytes = 1, k32Bytes = 3 };

// A tile in shared memory as wgmma reads it. K-major (the summed index is contiguous): kStride is the distance between groups
// of 8 rows, kLeading is unused. MN-major: kLeading is the distance between slabs of 64 columns, kStride that of groups of 8
// summed rows. The address alone varies, in the low half: moving it is one addition.
template <int kLeading, int kStride, Swizzle kSwizzle>
struct OperandTile {
  uint32_t low;

  __device__ __forceinline__ explicit OperandTile(uint32_t address) : low(address >> 4 | kLeading >> 4 << 16) {}

  __device__ __forceinline__ uint64_t at(int bytes) const {
    constexpr uint64_t kHigh = static_cast<uint64_t>(kStride >> 4) | static_cast<uint64_t>(kSwizzle) << 30;
    return kHigh << 32 | (low + (bytes >> 4));
  }
};

// A value that all threads of a warp have alike, in a register of the warp: addresses that come from it cost no thread's.
__device__ __forceinline__ int of_warp(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Between register accesses of operands or sums and the products that use them.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads of sums before the wait, or writes behind the next product.
template <int kCount>
__device__ __forceinline__ void pin(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Products of 64 rows and kColumns columns, A and B of Element. kTransposedA, kTransposedB: A, B is MN-major.
template <class Element, int kColumns>
struct Product;

#define PK_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PK_D16 PK_D8 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define PK_D24 PK_D16 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define PK_D32 PK_D24 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define PK_D40 PK_D32 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define PK_D48 PK_D40 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define PK_D56 PK_D48 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define PK_D64 PK_D56 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define PK_D72 PK_D64 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define PK_D80 PK_D72 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define PK_D88 PK_D80 ", " "%80, %81, %82, %83, %84, %85, %86, %87"
#define PK_D96 PK_D88 ", " "%88, %89, %90, %91, %92, %93, %94, %95"
#define PK_D104 PK_D96 ", " "%96, %97, %98, %99, %100, %101, %102, %103"
#define PK_D112 PK_D104 ", " "%104, %105, %106, %107, %108, %109, %110, %111"
#define PK_D120 PK_D112 ", " "%112, %113, %114, %115, %116, %117, %118, %119"
#define PK_D128 PK_D120 ", " "%120, %121, %122, %123, %124, %125, %126, %127"

#define PK_SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PK_R8 PK_SUMS(0)
#define PK_R16 PK_R8, PK_SUMS(8)
#define PK_R24 PK_R16, PK_SUMS(16)
#define PK_R32 PK_R24, PK_SUMS(24)
#define PK_R40 PK_R32, PK_SUMS(32)
#define PK_R48 PK_R40, PK_SUMS(40)
#define PK_R56 PK_R48, PK_SUMS(48)
#define PK_R64 PK_R56, PK_SUMS(56)
#define PK_R72 PK_R64, PK_SUMS(64)
#define PK_R80 PK_R72, PK_SUMS(72)
#define PK_R88 PK_R80, PK_SUMS(80)
#define PK_R96 PK_R88, PK_SUMS(88)
#define PK_R104 PK_R96, PK_SUMS(96)
#define PK_R112 PK_R104, PK_SUMS(104)
#define PK_R120 PK_R112, PK_SUMS(112)
#define PK_R128 PK_R120, PK_SUMS(120)

// N columns are R = N / 2 sums a thread; the operands after them are numbered R, R + 1, ...
#define PK_PRODUCT(Element, TYPE, N, R, O1, O2, O3, O4, O5, O6)                                                      \
  template <>                                                                                                        \
  struct Product<Element, N> {                                                                                       \
    template <bool kTransposedB, bool kTransposedA = false>                                                          \
    __device__ __forceinline__ static void add(float (&d)[R], uint64_t a, uint64_t b, bool accumulate = true) {      \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2 ", 0;\n"                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PK_D##R "}, %" #R ", %" #O1    \
                   ", p, 1, 1, %" #O4 ", %" #O3 ";\n}"                                                               \
                   : PK_R##R                                                                                         \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposedB), "n"(kTransposedA));       \
    }                                                                                                                \
    template <bool kTransposedB>                                                                                     \
    __device__ __forceinline__ static void add(float (&d)[R], const uint32_t (&a)[4], uint64_t b,                    \
                                               bool accumulate = true) {                                             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O5 ", 0;\n"                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PK_D##R "}, {%" #R ", %" #O1   \
                   ", %" #O2 ", %" #O3 "}, %" #O4 ", p, 1, 1, %" #O6 ";\n}"                                          \
                   : PK_R##R                                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),          \
                     "n"(kTransposedB));                                                                             \
    }                                                                                                                \
  };
#define PK_PRODUCTS(N, R, ...)                       \
  PK_PRODUCT(__nv_bfloat16, "bf16", N, R, __VA_ARGS__) \
  PK_PRODUCT(__half, "f16", N, R, __VA_ARGS__)

PK_PRODUCTS(16, 8, 9, 10, 11, 12, 13, 14)
PK_PRODUCTS(32, 16, 17, 18, 19, 20, 21, 22)
PK_PRODUCTS(48, 24, 25, 26, 27, 28, 29, 30)
PK_PRODUCTS(64, 32, 33, 34, 35, 36, 37, 38)
PK_PRODUCTS(80, 40, 41, 42, 43, 44, 45, 46)
PK_PRODUCTS(96, 48, 49, 50, 51, 52, 53, 54)
PK_PRODUCTS(128, 64, 65, 66, 67, 68, 69, 70)
PK_PRODUCTS(192, 96, 97, 98, 99, 100, 101, 102)
PK_PRODUCTS(256, 128, 129, 130, 131, 132, 133, 134)

#undef PK_PRODUCTS
#undef PK_PRODUCT
#undef PK_SUMS
#undef PK_D8
#undef PK_R8
#undef PK_D16
#undef PK_R16
#undef PK_D24
#undef PK_R24
#undef PK_D32
#undef PK_R32
#undef PK_D40
#undef PK_R40
#undef PK_D48
#undef PK_R48
#undef PK_D56
#undef PK_R56
#undef PK_D64
#undef PK_R64
#undef PK_D72
#undef PK_R72
#undef PK_D80
#undef PK_R80
#undef PK_D88
#undef PK_R88
#undef PK_D96
#undef PK_R96
#undef PK_D104
#undef PK_R104
#undef PK_D112
#undef PK_R112
#undef PK_D120
#undef PK_R120
#undef PK_D128
#undef PK_R128

}  // namespace perceiver
