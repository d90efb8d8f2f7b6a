// Hopper's warpgroup matrix instruction, with operand A in registers and B in shared memory.
//
// d[64, tokens] += a[64, 16] @ b[16, tokens]; the four warps of a warpgroup hold 16 rows of a and d each, in the layout
// of mma.m16n8k16. A width is one line, at the end.
#pragma once

#include "ptx.cuh"

namespace marlin {

// Orders a thread's earlier accesses to registers before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers move between warpgroups: those that only copy give up what those that multiply need. Every warp of a
// warpgroup calls it.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Describes b: rows of 64 numbers (128 bytes) with 128-byte swizzle, eight rows every 1024 bytes. `address` is a
// multiple of 1024. Adding 2 moves on by 16 numbers of k (32 bytes in units of 16).
__device__ __forceinline__ u64 wgmma_descriptor(u32 address) {
  constexpr u64 kSwizzle128 = u64(1) << 62, kEightRows = u64(1024 / 16) << 32, kUnused = u64(1) << 16;
  return kSwizzle128 | kEightRows | kUnused | ((address & 0x3ffff) >> 4);
}

// PTX names every register, so an instruction for n tokens lists the n/2 sums of a thread: as places in its text, and
// as operands behind it.
#define MARLIN_PLACES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MARLIN_PLACES_12 MARLIN_PLACES_8 ", %8, %9, %10, %11"
#define MARLIN_PLACES_16 MARLIN_PLACES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MARLIN_PLACES_24 MARLIN_PLACES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MARLIN_PLACES_32 MARLIN_PLACES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MARLIN_PLACES_40 MARLIN_PLACES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MARLIN_PLACES_48 MARLIN_PLACES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MARLIN_PLACES_56 MARLIN_PLACES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MARLIN_PLACES_64 MARLIN_PLACES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MARLIN_PLACES_72 MARLIN_PLACES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MARLIN_PLACES_80 MARLIN_PLACES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define MARLIN_PLACES_88 MARLIN_PLACES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define MARLIN_PLACES_96 MARLIN_PLACES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define MARLIN_PLACES_104 MARLIN_PLACES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define MARLIN_PLACES_112 MARLIN_PLACES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define MARLIN_PLACES_120 MARLIN_PLACES_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define MARLIN_PLACES_128 MARLIN_PLACES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define MARLIN_EIGHT_SUMS(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),         \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MARLIN_SUMS_8 MARLIN_EIGHT_SUMS(0)
#define MARLIN_SUMS_12 MARLIN_SUMS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define MARLIN_SUMS_16 MARLIN_SUMS_8, MARLIN_EIGHT_SUMS(8)
#define MARLIN_SUMS_24 MARLIN_SUMS_16, MARLIN_EIGHT_SUMS(16)
#define MARLIN_SUMS_32 MARLIN_SUMS_24, MARLIN_EIGHT_SUMS(24)
#define MARLIN_SUMS_40 MARLIN_SUMS_32, MARLIN_EIGHT_SUMS(32)
#define MARLIN_SUMS_48 MARLIN_SUMS_40, MARLIN_EIGHT_SUMS(40)
#define MARLIN_SUMS_56 MARLIN_SUMS_48, MARLIN_EIGHT_SUMS(48)
#define MARLIN_SUMS_64 MARLIN_SUMS_56, MARLIN_EIGHT_SUMS(56)
#define MARLIN_SUMS_72 MARLIN_SUMS_64, MARLIN_EIGHT_SUMS(64)
#define MARLIN_SUMS_80 MARLIN_SUMS_72, MARLIN_EIGHT_SUMS(72)
#define MARLIN_SUMS_88 MARLIN_SUMS_80, MARLIN_EIGHT_SUMS(80)
#define MARLIN_SUMS_96 MARLIN_SUMS_88, MARLIN_EIGHT_SUMS(88)
#define MARLIN_SUMS_104 MARLIN_SUMS_96, MARLIN_EIGHT_SUMS(96)
#define MARLIN_SUMS_112 MARLIN_SUMS_104, MARLIN_EIGHT_SUMS(104)
#define MARLIN_SUMS_120 MARLIN_SUMS_112, MARLIN_EIGHT_SUMS(112)
#define MARLIN_SUMS_128 MARLIN_SUMS_120, MARLIN_EIGHT_SUMS(120)

#define MARLIN_WGMMA_OF(Type, type, tokens, sums, a0, a1, a2, a3, b_place, adds_place)                                \
  template <bool kAdds = true>                                                                                        \
  __device__ __forceinline__ void wgmma(Type, float (&d)[sums], const u32 (&a)[4], u64 b) {                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." type "." type " {" MARLIN_PLACES_##sums "}, " \
                 "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_place ", %" #adds_place ", 1, 1, 0;"                \
                 : MARLIN_SUMS_##sums                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));                                   \
  }

// wgmma for so many tokens and half as many sums. The operands behind the sums follow: four of A, B's descriptor, and
// whether the product is added to the sums or takes their place.
#define MARLIN_WGMMA(tokens, sums, a1, a2, a3, b_place, adds_place)                                          \
  static_assert(2 * sums == tokens && sums + 1 == a1 && a1 + 1 == a2 && a2 + 1 == a3 && a3 + 1 == b_place && \
                    b_place + 1 == adds_place,                                                               \
                "the places of operands are counted from the sums");                                         \
  MARLIN_WGMMA_OF(Half, "f16", tokens, sums, sums, a1, a2, a3, b_place, adds_place)                          \
  MARLIN_WGMMA_OF(Bfloat16, "bf16", tokens, sums, sums, a1, a2, a3, b_place, adds_place)                     \
  template <>                                                                                                \
  inline constexpr bool kHasWgmma<tokens> = true;

template <int kTokens>
inline constexpr bool kHasWgmma = false;

// The first of a thread's sums, for fewer tokens than there are sums of.
template <int kFirst, int kAll>
__device__ __forceinline__ float (&first_of(float (&sums)[kAll]))[kFirst] {
  static_assert(kFirst <= kAll, "there are not so many");
  return reinterpret_cast<float(&)[kFirst]>(sums);
}

MARLIN_WGMMA(16, 8, 9, 10, 11, 12, 13)
MARLIN_WGMMA(24, 12, 13, 14, 15, 16, 17)
MARLIN_WGMMA(32, 16, 17, 18, 19, 20, 21)
MARLIN_WGMMA(48, 24, 25, 26, 27, 28, 29)
MARLIN_WGMMA(64, 32, 33, 34, 35, 36, 37)
MARLIN_WGMMA(80, 40, 41, 42, 43, 44, 45)
MARLIN_WGMMA(96, 48, 49, 50, 51, 52, 53)
MARLIN_WGMMA(112, 56, 57, 58, 59, 60, 61)
MARLIN_WGMMA(128, 64, 65, 66, 67, 68, 69)
MARLIN_WGMMA(144, 72, 73, 74, 75, 76, 77)
MARLIN_WGMMA(176, 88, 89, 90, 91, 92, 93)
MARLIN_WGMMA(192, 96, 97, 98, 99, 100, 101)
MARLIN_WGMMA(208, 104, 105, 106, 107, 108, 109)
MARLIN_WGMMA(256, 128, 129, 130, 131, 132, 133)

}  // namespace marlin
