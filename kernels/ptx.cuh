// Thin names for the PTX instructions that the kernels use. No logic here.
#pragma once

#include "marlin_layout.cuh"

namespace marlin {

struct Half {};      // tags: which 16-bit type a 32-bit register holds two of
struct Bfloat16 {};

struct alignas(16) U32x4 {
  u32 x, y, z, w;
};
struct alignas(16) F32x4 {
  float x, y, z, w;
};

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// The same value, of which the compiler knows nothing: what follows from it is reckoned here, not kept in registers.
__device__ __forceinline__ int reckoned_here(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- global memory ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_cached(u32 (&v)[4], const void* p) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p));
}
__device__ __forceinline__ void load_cached(u32 (&v)[2], const void* p) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(p));
}
__device__ __forceinline__ void load_cached(u32 (&v)[1], const void* p) {
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v[0]) : "l"(p));
}

__device__ __forceinline__ u32 load_cached_word(const u32* p) {
  u32 v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// Past L1, which may still hold what was there before an earlier kernel wrote.
__device__ __forceinline__ u32 load_fresh(const u32* p) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ U32x4 load_fresh(const U32x4* p) {
  U32x4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// ---- asynchronous copies, global to shared (generic proxy) ----------------------------------------------------------

__device__ __forceinline__ void cp_async_16(u32 dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
// Eight bytes, which stay in L1.
__device__ __forceinline__ void cp_async_8(u32 dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- shared memory --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void ldmatrix_x4(u32 (&v)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(u32 (&v)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}
// Of 8 x 8 numbers of 16 bits, of which a lane has two of a row, the transposed.
__device__ __forceinline__ u32 transpose_8x8(u32 v) {
  u32 d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}

__device__ __forceinline__ void load_shared(u32 (&v)[4], u32 address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_shared(u32 (&v)[2], u32 address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared(u32 (&v)[1], u32 address) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v[0]) : "r"(address) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, F32x4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
__device__ __forceinline__ F32x4 load_shared_quad(u32 address) {
  F32x4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// A barrier among the first kThreads threads of a block that has others.
template <int kThreads>
__device__ __forceinline__ void barrier_some() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// One of a block's other barriers, which have numbers: so many threads meet there.
template <int kThreads>
__device__ __forceinline__ void barrier_of(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}

// ---- functions in fp32, to a unit or two; subnormal numbers count as zero -------------------------------------------

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- arithmetic on two 16-bit numbers in a register -----------------------------------------------------------------

// One half of a register, meant twice. Instructions have that for nothing, where the one that uses it doubles it:
// written apart it would be an instruction of its own, and a register.
struct LowTwice {
  u32 v;
};
struct HighTwice {
  u32 v;
};

#define MARLIN_PAIR_OPERATION(name, Type, instruction)                                                               \
  __device__ __forceinline__ u32 name(Type, u32 a, u32 b) {                                                          \
    u32 d;                                                                                                           \
    asm("{.reg .b32 b; mov.b32 b, %2; " instruction ";}" : "=r"(d) : "r"(a), "r"(b));                                \
    return d;                                                                                                        \
  }                                                                                                                  \
  MARLIN_PAIR_OPERATION_TWICE(name, Type, instruction, LowTwice, "low")                                              \
  MARLIN_PAIR_OPERATION_TWICE(name, Type, instruction, HighTwice, "high")
#define MARLIN_PAIR_OPERATION_TWICE(name, Type, instruction, Twice, half)                                            \
  __device__ __forceinline__ u32 name(Type, u32 a, Twice b) {                                                        \
    u32 d;                                                                                                           \
    asm("{.reg .b16 low, high; .reg .b32 b; mov.b32 {low, high}, %2; mov.b32 b, {" half ", " half "}; " instruction  \
        ";}"                                                                                                         \
        : "=r"(d)                                                                                                    \
        : "r"(a), "r"(b.v));                                                                                         \
    return d;                                                                                                        \
  }

MARLIN_PAIR_OPERATION(add2, Half, "add.rn.f16x2 %0, %1, b")
MARLIN_PAIR_OPERATION(mul2, Half, "mul.rn.f16x2 %0, %1, b")
// A sixteenth of a, plus b.
MARLIN_PAIR_OPERATION(add2_sixteenth, Half, ".reg .b32 s; mov.b32 s, 0x2c002c00; fma.rn.f16x2 %0, %1, s, b")
// Compute capability 8.x has no addition or product of bf16 pairs: a fused multiply-add rounds once, so it is the same.
MARLIN_PAIR_OPERATION(add2, Bfloat16, ".reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 %0, %1, one, b")
MARLIN_PAIR_OPERATION(mul2, Bfloat16, ".reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 %0, %1, b, none")

__device__ __forceinline__ u32 pack2(Half, float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ u32 pack2(Bfloat16, float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ float low_float(Half, u32 v) {
  float f;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(v));
  return f;
}
__device__ __forceinline__ float high_float(Half, u32 v) {
  float f;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(v));
  return f;
}
__device__ __forceinline__ float low_float(Bfloat16, u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_float(Bfloat16, u32 v) { return __uint_as_float(v & 0xffff0000u); }

__host__ __device__ constexpr u32 ones(Half) { return 0x3c003c00u; }
__host__ __device__ constexpr u32 ones(Bfloat16) { return 0x3f803f80u; }

__device__ __forceinline__ u32 low_twice(u32 v) { return __byte_perm(v, v, 0x1010); }
__device__ __forceinline__ u32 high_twice(u32 v) { return __byte_perm(v, v, 0x3232); }

// ---- tensor cores, any compute capability from 8.0 ------------------------------------------------------------------

// d[16, 8] += a[16, 16] @ b[16, 8]
__device__ __forceinline__ void mma(Half, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(Bfloat16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- thread block clusters, compute capability 9.0 and newer --------------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MARLIN_HAS_CLUSTERS 1
__device__ __forceinline__ u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// Every thread of every block of the cluster; orders shared memory across the blocks.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address, in the block of that rank, of what lies at `address` in ours.
__device__ __forceinline__ u32 cluster_address(u32 address, u32 rank) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
__device__ __forceinline__ F32x4 load_cluster(u32 address) {
  F32x4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ int load_cluster_word(u32 address) {
  int v;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// That a block of the cluster runs at all must be known before its memory is written: say so early, ask late.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// A last barrier before blocks leave: it orders no memory.
__device__ __forceinline__ void cluster_leave() {
  cluster_arrive();
  cluster_wait();
}
__device__ __forceinline__ void store_cluster(u32 address, F32x4 v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

// The same without waiting: a barrier in the block that has the address hears of the 16 bytes, which then can be seen.
__device__ __forceinline__ void store_cluster_async(u32 address, F32x4 v, u32 barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               :
               : "r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
               : "memory");
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(barrier) : "memory");
}
// Arrives, and says how many bytes the phase waits for beside arrivals.
__device__ __forceinline__ void mbarrier_arrive_expecting(u32 barrier, u32 bytes) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
// What init wrote can be seen by copies that the hardware makes, once a barrier among the block's threads has followed.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives once all copies that this thread has started are there.
__device__ __forceinline__ void mbarrier_arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Returns once the phase of that parity is complete.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra through;\n"
      "bra again;\n"
      "through:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- copies that the hardware makes by itself, compute capability 9.0 and newer -------------------------------------

// What the driver says about a matrix, so that the hardware finds a box of it; 128 bytes that only it understands.
struct alignas(64) TensorMap {
  u64 words[16];
};
// Of a box that begins at a row and a column; the barrier hears of its bytes. What lies outside the matrix is zero.
__device__ __forceinline__ void box_load(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Of neighbouring bytes: addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Stores four 8 x 8 fragments of 16-bit numbers transposed: lane l says where row l % 8 of fragment l / 8 goes.
__device__ __forceinline__ void stmatrix_x4_transposed(u32 address, const u32 (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// What this thread wrote to shared memory, or saw written, becomes visible to its wgmma, which read through another
// proxy.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
#define MARLIN_HAS_CLUSTERS 0
#endif

// ---- programmatic dependent launch: no-ops before compute capability 9.0, or when the launch did not ask for it -----

// The next kernel of the stream may be set up while this one still runs.
__device__ __forceinline__ void start_next_launch() {
#if MARLIN_HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernel before us is through and its writes can be seen. Earlier nothing may be written, and only what is
// known to be through already may be read; anything may be prefetched.
__device__ __forceinline__ void wait_for_last_launch() {
#if MARLIN_HAS_CLUSTERS
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

}  // namespace marlin
