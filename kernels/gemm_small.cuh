// The GEMM for few tokens (up to 8, 16, 24 or 32), where reading the weights is most of the time there is.
//
// The transposed weight is operand A of mma.m16n8k16, eight tokens are its columns. A warp owns one tile of 64 columns.
// It copies the weights of every step ahead to shared memory that no other warp looks at, and a lane reads from there
// what the tensor core wants: many bytes in flight, few registers, no barrier. Few registers also leave room for the
// blocks of the next launch, which may be set up meanwhile. The warps of a block share the rows, and so do the blocks
// of a split; nothing is summed across warps before the end.
//
// Up to 16 tokens scales are not applied to weights but, in fp32, to a group's sum: cheaper, as a group has more rows
// than a lane has sums. With more tokens there are no registers for two sets of sums, and nothing to gain.
#pragma once

#include "gemm_base.cuh"

namespace marlin {

template <class T, int kBits, int kGroupSize, int kTokenTiles, int kStepRows, int kWarps, int kStages>
class SmallGemm {
  using L = Layout<kBits>;
  using D = Decoder<T, kBits>;

  static_assert(kGroupSize == 32 || kGroupSize == 64 || kGroupSize == 128, "a single group is read as one of these");
  static_assert(kTokenTiles <= 4, "more tokens want shared weights: see gemm_portable.cuh");

  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr bool kScalesSums = kTokenTiles <= 2;
  static_assert(kStepRows == 64 || kStepRows == 128, "rows of a step, which must divide K");
  static_assert(kStages >= 2, "a step is on its way while another is multiplied");
  static constexpr int kStepTiles = kStepRows / kTileRows;
  static constexpr int kScaledRows = kGroupSize < kStepRows ? kGroupSize : kStepRows;  // rows summed before scaling
  static constexpr int kScaledTiles = kScaledRows / kTileRows;
  static constexpr int kStepGroups = kStepRows / kScaledRows;

  // Activations of a step wait in shared memory, rows of tokens, 16-byte chunks XOR-swizzled for ldmatrix.
  static constexpr int kRowChunks = kStepRows / 8;
  static constexpr int kActBytes = kTokens * kStepRows * 2;
  static constexpr int kActLoads = kTokens * kRowChunks / kWarpLanes;  // cp.async of a lane in a step
  static constexpr int kSumBytes = SumTile<kTileColumns>::bytes(kTokens);
  static constexpr int kWeightBytes = kStepTiles * L::kTileWords * 4;
  static constexpr int kStageBytes = kActBytes + kWeightBytes;
  static constexpr int kWarpBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr int kQuads = kTileColumns / 4;
  static constexpr int kMaxSplits = 8;  // what every GPU with clusters takes
  static constexpr int kReceivedBytes = (kTokens * kQuads + kMaxSplits) * 16;
  static_assert(kTokens * kRowChunks % kWarpLanes == 0, "the lanes of a warp copy whole rounds of chunks");
  static_assert(kRowChunks >= 8, "the swizzle permutes eight chunks");

 public:
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kSharedBytes = kWarps * kWarpBytes + kReceivedBytes;

  // grid: (splits, tiles of 64 columns, 1); without a workspace the splits of a tile form a cluster.
  static __device__ __forceinline__ void run(const GemmArguments& args) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
    start_next_launch();
#if MARLIN_HAS_CLUSTERS
    if (splits_are_cluster(args)) cluster_arrive();
#endif
    SmallGemm gemm(args, shared + warp * kWarpBytes, lane);
    gemm.prefetch(warp);
    wait_for_last_launch();
    gemm.sum_rows(warp);
    gemm.deposit();
    __syncthreads();
    finish(args, shared);
  }

 private:
  struct Groups {
    LaneGroup<kBits> of[kStepGroups];
  };

  __device__ __forceinline__ SmallGemm(const GemmArguments& args, unsigned char* warp_shared, int lane)
      : args(args),
        shared(warp_shared),
        lane(lane),
        weights_gl_rd(args.qweight + i64(blockIdx.y) * L::kTileWords),
        groups(args, blockIdx.y, lane) {}

  // The warp's first step of weights, into L2: all that may be done before the kernel before us is through.
  __device__ __forceinline__ void prefetch(int warp) const {
    constexpr int kLineWords = 32, kTileLines = L::kTileWords / kLineWords;
    const StepRange range = split_steps(args.size_k / kStepRows, blockIdx.x, args.num_splits);
    const int step = range.begin + warp;
    if (step < range.end)
#pragma unroll
      for (int line = lane; line < kTileLines * kStepTiles; line += kWarpLanes)
        prefetch_l2(args.qweight + i64(blockIdx.y) * L::kTileWords + line % kTileLines * kLineWords +
                    (i64(step) * kStepTiles + line / kTileLines) * args.qweight_stride);
  }

  // The warp's share of the block's share of K. Copies run kStages - 1 steps ahead, scales and zero points one.
  __device__ __forceinline__ void sum_rows(int warp) {
    const StepRange range = split_steps(args.size_k / kStepRows, blockIdx.x, args.num_splits);
    int step = range.begin + warp;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(step + i * kWarps, range.end, i);
    Groups now, next;
    if (step < range.end) read_groups(next, step);

    for (int slot = 0; step < range.end; step += kWarps) {
      now = next;
      if (step + kWarps < range.end) read_groups(next, step + kWarps);
      cp_async_wait<kStages - 2>();
      // The step is there for all lanes, and all are done with the one before, the next to be overwritten.
      __syncwarp();
      fetch(step + (kStages - 1) * kWarps, range.end, slot == 0 ? kStages - 1 : slot - 1);
      multiply(slot, now);
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    __syncwarp();  // the sums go where the steps were
  }

  __device__ __forceinline__ void read_groups(Groups& into, int step) const {
#pragma unroll
    for (int i = 0; i < kStepGroups; ++i)
      groups.read(into.of[i], (step * kStepRows + i * kScaledRows) / kGroupSize, lane);
  }

  __device__ __forceinline__ void fetch(int step, int end, int slot) const {
    if (step < end) {
      const u32* tile_gl_rd = weights_gl_rd + i64(step) * kStepTiles * args.qweight_stride;
#pragma unroll
      for (int i = 0; i < kStepTiles; ++i) {
        copy_tile<kBits>(tile_sh(slot, i), tile_gl_rd, lane);
        tile_gl_rd += args.qweight_stride;
      }
#pragma unroll
      for (int i = 0; i < kActLoads; ++i) {
        const int token = (lane + i * kWarpLanes) / kRowChunks, chunk = (lane + i * kWarpLanes) % kRowChunks;
        // Absent tokens are columns of the product that nobody stores: whatever lies there may stay.
        if (token < args.size_m)
          cp_async_16(act_sh(slot, token, chunk), args.a + token * args.a_stride + step * kStepRows + 8 * chunk);
      }
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void multiply(int slot, const Groups& step_groups) {
    float partial[kTokenTiles][kTileBlocks][4];
    u32 act[kTokenTiles][4];  // operand B of two tiles
#pragma unroll
    for (int i = 0; i < kStepTiles; ++i) {
      if (kScalesSums && i % kScaledTiles == 0) clear(partial);
      if (i % 2 == 0) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) ldmatrix_x4(act[t], act_sh(slot, 8 * t + lane % 8, 2 * i + lane / 8));
      }
      u32 words[L::kLaneWords];
      load_lane_words<kBits>(words, tile_sh(slot, i), lane);
      const LaneGroup<kBits>& group = step_groups.of[i / kScaledTiles];
#pragma unroll
      for (int j = 0; j < kTileBlocks; ++j) {
        u32 weight[4];
        D::decode(weight, words + j * L::kBlockWords, D::offsets(groups.zeros(group, j)));
        if (!kScalesSums) scale<T>(weight, low_twice(groups.scales(group, j)), high_twice(groups.scales(group, j)));
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t)
          mma(T{}, (kScalesSums ? partial : sums)[t][j], weight, act[t][2 * (i % 2)], act[t][2 * (i % 2) + 1]);
      }
      if (kScalesSums && i % kScaledTiles == kScaledTiles - 1) add_scaled(partial, group);
    }
  }

  static __device__ __forceinline__ void clear(float (&partial)[kTokenTiles][kTileBlocks][4]) {
#pragma unroll
    for (int i = 0; i < kTokenTiles * kTileBlocks * 4; ++i) (&partial[0][0][0])[i] = 0.f;
  }

  __device__ __forceinline__ void add_scaled(const float (&partial)[kTokenTiles][kTileBlocks][4],
                                             const LaneGroup<kBits>& group) {
#pragma unroll
    for (int j = 0; j < kTileBlocks; ++j) {
      const u32 scales = groups.scales(group, j);
      const float first = low_float(T{}, scales), second = high_float(T{}, scales);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[t][j][i] += partial[t][j][i] * (i < 2 ? first : second);
    }
  }

  // Lane l holds columns l/4 + 8 m, tokens 8 t + 2 (l mod 4) and + 1.
  __device__ __forceinline__ void deposit() {
    const SumTile<kTileColumns> tile{reinterpret_cast<float*>(shared)};
#pragma unroll
    for (int m = 0; m < kLaneColumns; ++m) {
      const float scale = groups.final_scale(lane, m);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          tile.at(8 * t + 2 * (lane % 4) + i, lane / 4 + 8 * m) = scale * sums[t][m / 2][2 * (m % 2) + i];
    }
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
  // their parts of those into its shared memory, each to a place of its own, so that one barrier is enough.
  static __device__ __forceinline__ void finish(const GemmArguments& args, unsigned char* shared) {
    const int split = blockIdx.x, first_column = blockIdx.y * kTileColumns;
    const int quads = min(args.size_m, kTokens) * kQuads;
#if MARLIN_HAS_CLUSTERS
    if (splits_are_cluster(args)) {
      const u32 received = shared_address(shared) + kWarps * kWarpBytes;
      const int quads_each = (quads + args.num_splits - 1) / args.num_splits;
      cluster_wait();
      for (int i = threadIdx.x; i < quads; i += kThreads)
        store_cluster(cluster_address(received + (split * quads_each + i / args.num_splits) * 16, i % args.num_splits),
                      sum_warps(shared, i / kQuads, 4 * (i % kQuads)));
      cluster_sync();
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

  __device__ __forceinline__ u32 act_sh(int slot, int token, int chunk) const {
    return shared_address(shared) + slot * kStageBytes + (token * kRowChunks + (chunk ^ (token % 8))) * 16;
  }
  __device__ __forceinline__ u32 tile_sh(int slot, int tile) const {
    return shared_address(shared) + slot * kStageBytes + kActBytes + tile * (L::kTileWords * 4);
  }

  const GemmArguments& args;
  unsigned char* shared;
  const int lane;
  const u32* weights_gl_rd;
  const GroupReader<T, kBits> groups;
  float sums[kTokenTiles][kTileBlocks][4] = {};
};

}  // namespace marlin
