// The GEMM for few tokens (up to 8, 16, 24 or 32), where reading the weights is most of the time there is.
//
// A warp owns one tile of 64 columns. It copies the weights of every step ahead to shared memory of its own: many bytes
// in flight, few registers, no barrier. Few registers also leave room for the blocks of the next launch, which may be
// set up meanwhile. The warps of a block share the rows, and so do the blocks of a split; nothing is summed across
// warps before the end. small_step.cuh says what a step is.
#pragma once

#include "small_step.cuh"

namespace marlin {

template <class T, int kBits, int kGroupSize, int kTokenTiles, int kStepRows, int kWarps, int kStages>
class SmallGemm {
  using L = Layout<kBits>;
  using Step = SmallStep<T, kBits, kGroupSize, kTokenTiles, kStepRows, OneRegister>;
  using Groups = typename Step::Groups;

  static_assert(kStages >= 2, "a step is on its way while another is multiplied");
  static constexpr int kTokens = Step::kTokens;
  static constexpr int kStageBytes = Step::kActBytes + Step::kWeightBytes;
  static constexpr int kRingBytes = kStages * (kStageBytes + Step::kGroupBytes);
  static constexpr int kWarpBytes = ((kRingBytes > Step::kSumBytes ? kRingBytes : Step::kSumBytes) + 127) / 128 * 128;
  static constexpr int kQuads = kTileColumns / 4;
  static constexpr int kMaxSplits = 8;  // what every GPU with clusters takes
  static constexpr int kReceivedBytes = (kTokens * kQuads + kMaxSplits) * 16;
  static constexpr int kBarrierOffset = kWarps * kWarpBytes + kReceivedBytes;

 public:
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kSharedBytes = kBarrierOffset + 16;

  // grid: (splits, tiles of 64 columns, 1); without a workspace the splits of a tile form a cluster.
  static __device__ __forceinline__ void run(const GemmArguments& args) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
    start_next_launch();
#if MARLIN_HAS_CLUSTERS
    if (splits_are_cluster(args)) {
      if (threadIdx.x == 0) expect_parts(args, shared_address(shared) + kBarrierOffset);
      cluster_arrive();
    }
#endif
    SmallGemm gemm(args, shared + warp * kWarpBytes, lane);
    gemm.prefetch(warp);
    wait_for_last_launch();
    gemm.sum_rows(warp);
    Step::deposit(gemm.sums, {reinterpret_cast<float*>(gemm.shared)}, gemm.groups, lane);
    __syncthreads();
    finish(args, shared);
  }

 private:
  __device__ __forceinline__ SmallGemm(const GemmArguments& args, unsigned char* warp_shared, int lane)
      : args(args),
        shared(warp_shared),
        lane(lane),
        weights_gl_rd(args.qweight + i64(blockIdx.y) * L::kTileWords),
        groups(args, blockIdx.y, lane),
        group_copier(args, blockIdx.y, lane) {}

  // The warp's first step of weights, into L2: all that may be done before the kernel before us is through.
  __device__ __forceinline__ void prefetch(int warp) const {
    constexpr int kLineWords = 32, kTileLines = L::kTileWords / kLineWords;
    const StepRange range = split_steps(args.size_k / kStepRows, blockIdx.x, args.num_splits);
    const int step = range.begin + warp;
    if (step < range.end)
#pragma unroll
      for (int line = lane; line < kTileLines * Step::kStepTiles; line += kWarpLanes)
        prefetch_l2(args.qweight + i64(blockIdx.y) * L::kTileWords + line % kTileLines * kLineWords +
                    (i64(step) * Step::kStepTiles + line / kTileLines) * args.qweight_stride);
  }

  // The warp's share of the block's share of K. Copies run kStages - 1 steps ahead.
  __device__ __forceinline__ void sum_rows(int warp) {
    const StepRange range = split_steps(args.size_k / kStepRows, blockIdx.x, args.num_splits);
    int step = range.begin + warp;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(step + i * kWarps, range.end, i);
    for (int slot = 0; step < range.end; step += kWarps) {
      cp_async_wait<kStages - 2>();
      // The step is there for all lanes, and all are done with the one before, the next to be overwritten.
      __syncwarp();
      fetch(step + (kStages - 1) * kWarps, range.end, slot == 0 ? kStages - 1 : slot - 1);
      const u32 act_sh = stage_sh(slot), weights_sh = act_sh + Step::kActBytes;
      Groups step_groups;
      Step::load_groups(step_groups, groups, groups_sh(slot), lane);
      Step::multiply(sums, act_sh, weights_sh, groups, step_groups, lane);
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    __syncwarp();  // the sums go where the steps were
  }

  __device__ __forceinline__ void fetch(int step, int end, int slot) const {
    if (step < end) {
      const u32 act_sh = stage_sh(slot), weights_sh = act_sh + Step::kActBytes;
      Step::copy_weights(weights_sh, weights_gl_rd + i64(step) * Step::kStepTiles * args.qweight_stride,
                         args.qweight_stride, lane);
      Step::copy_groups(groups_sh(slot), group_copier, step);
#pragma unroll
      for (int i = 0; i < Step::kActLoads; ++i) {
        const int token = Step::token_of(i, lane), chunk = Step::chunk_of(i, lane);
        // Absent tokens are columns of the product that nobody stores: whatever lies there may stay.
        if (token < args.size_m)
          cp_async_16(act_sh + Step::chunk_place(token, chunk),
                      args.a + token * args.a_stride + step * kStepRows + 8 * chunk);
      }
    }
    cp_async_commit();
  }

  static __device__ __forceinline__ F32x4 sum_warps(unsigned char* shared, int token, int column) {
    F32x4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      accumulate(sum, SumTile<kTileColumns>{reinterpret_cast<float*>(shared + warp * kWarpBytes)}.quad(token, column));
    return sum;
  }

  // The warps' sums, and those of the blocks that share the columns, added up in the order of K: out, or to the
  // workspace. Within a cluster block r finishes every num_splits-th four columns from the r-th on; the others write
  // their parts of those into its shared memory, each to a place of its own, and its barrier counts the bytes.
  static __device__ __forceinline__ void finish(const GemmArguments& args, unsigned char* shared) {
    const int split = blockIdx.x, first_column = blockIdx.y * kTileColumns;
    const int quads = min(args.size_m, kTokens) * kQuads;
#if MARLIN_HAS_CLUSTERS
    if (splits_are_cluster(args)) {
      const u32 received = shared_address(shared) + kWarps * kWarpBytes;
      const u32 barrier = shared_address(shared) + kBarrierOffset;
      const int quads_each = (quads + args.num_splits - 1) / args.num_splits;
      cluster_wait();
      for (int i = threadIdx.x; i < quads; i += kThreads)
        store_cluster_async(
            cluster_address(received + (split * quads_each + i / args.num_splits) * 16, i % args.num_splits),
            sum_warps(shared, i / kQuads, 4 * (i % kQuads)), cluster_address(barrier, i % args.num_splits));
      mbarrier_wait(barrier, 0);
      for (int i = threadIdx.x; i * args.num_splits + split < quads; i += kThreads) {
        F32x4 sum = {0.f, 0.f, 0.f, 0.f};
        for (int rank = 0; rank < args.num_splits; ++rank)
          accumulate(sum, *reinterpret_cast<const F32x4*>(shared + kWarps * kWarpBytes + (rank * quads_each + i) * 16));
        const int quad = i * args.num_splits + split;
        store_quad<T>(args, quad / kQuads, first_column + 4 * (quad % kQuads), sum);
      }
      return;
    }
#endif
    for (int i = threadIdx.x; i < quads; i += kThreads) {
      const int token = i / kQuads, column = 4 * (i % kQuads);
      const F32x4 sum = sum_warps(shared, token, column);
      if (args.workspace)
        store_partial(args, split, token, first_column + column, sum);
      else
        store_quad<T>(args, token, first_column + column, sum);
    }
  }

#if MARLIN_HAS_CLUSTERS
  // What comes from all blocks of the cluster for this one's quads; before the cluster_arrive that allows it.
  static __device__ __forceinline__ void expect_parts(const GemmArguments& args, u32 barrier) {
    const int quads = min(args.size_m, kTokens) * kQuads, splits = args.num_splits;
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expecting(barrier, u32(quads - int(blockIdx.x) + splits - 1) / u32(splits) * splits * 16);
  }
#endif

  // A stage's activations; its weights lie behind them. Groups lie apart: a copy of weights begins on 128 bytes.
  __device__ __forceinline__ u32 stage_sh(int slot) const { return shared_address(shared) + slot * kStageBytes; }
  __device__ __forceinline__ u32 groups_sh(int slot) const {
    return shared_address(shared) + kStages * kStageBytes + slot * Step::kGroupBytes;
  }

  const GemmArguments& args;
  unsigned char* shared;
  const int lane;
  const u32* weights_gl_rd;
  const GroupReader<T, kBits> groups;
  const GroupCopier<kBits> group_copier;
  typename Step::Sums sums = {};
};

}  // namespace marlin
