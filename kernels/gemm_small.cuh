// The GEMM for few tokens (up to 8, or 16), where reading the weights is all the time there is.
//
// The transposed weight is operand A of mma.m16n8k16, the tokens are its 8 columns. A warp owns one tile of 64 columns and
// reads its weights straight from global memory into the registers that the tensor core wants: no shared memory, no barrier.
// The warps of a block share the rows, and so do the blocks of a split; nothing is summed across warps before the end.
//
// Scales are not applied to weights but, in fp32, to a group's sum: cheaper, as a group has more rows than a lane has sums.
#pragma once

#include "gemm_common.cuh"

namespace marlin {

template <class T, int kBits, int kGroupSize, int kTokenTiles, int kStepRows, int kWarps>
class SmallGemm {
  using L = Layout<kBits>;
  using D = Decoder<T, kBits>;

  static_assert(kGroupSize == 32 || kGroupSize == 64 || kGroupSize == 128, "a single group is read as one of these");
  static_assert(kTokenTiles == 1 || kTokenTiles == 2, "more tokens want shared weights: see gemm_portable.cuh");

  static constexpr int kTokens = 8 * kTokenTiles;
  static_assert(kStepRows == 64 || kStepRows == 128, "rows that a warp has in flight; they must divide K");
  static constexpr int kStepTiles = kStepRows / kTileRows;
  static constexpr int kScaledRows = kGroupSize < kStepRows ? kGroupSize : kStepRows;  // rows summed before scaling
  static constexpr int kScaledTiles = kScaledRows / kTileRows;
  static constexpr int kStepGroups = kStepRows / kScaledRows;
  static constexpr int kLoads = L::kLaneWords / 4;  // 16-byte loads of a lane in a tile

  // Activations of a step wait in shared memory, rows of tokens, 16-byte chunks XOR-swizzled for ldmatrix.
  static constexpr int kRowChunks = kStepRows / 8;
  static constexpr int kActBytes = kTokens * kStepRows * 2;
  static constexpr int kActLoads = kTokens * kRowChunks / kWarpLanes;  // cp.async of a lane in a step
  static constexpr int kSumBytes = SumTile<kTileColumns>::bytes(kTokens);
  static constexpr int kWarpBytes = 2 * kActBytes > kSumBytes ? 2 * kActBytes : kSumBytes;
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
  struct Stage {
    U32x4 weights[kStepTiles][kLoads];
    LaneGroup<kBits> groups[kStepGroups];
  };

  __device__ __forceinline__ SmallGemm(const GemmArguments& args, unsigned char* warp_shared, int lane)
      : args(args),
        shared(warp_shared),
        lane(lane),
        weights_gl_rd(args.qweight + i64(blockIdx.y) * L::kTileWords + lane * L::kLaneWords),
        groups(args, blockIdx.y, lane) {}

  // The warp's share of the block's share of K, one step loading while another is multiplied.
  __device__ __forceinline__ void sum_rows(int warp) {
    const StepRange range = split_steps(args.size_k / kStepRows, blockIdx.x, args.num_splits);
    int step = range.begin + warp;
    fetch<0>(step, range.end);
    while (step < range.end) {
      fetch<1>(step + kWarps, range.end);
      multiply<0>();
      step += kWarps;
      if (step >= range.end) break;
      fetch<0>(step + kWarps, range.end);
      multiply<1>();
      step += kWarps;
    }
    cp_async_wait<0>();
    __syncwarp();  // the sums go where the activations were
  }

  // The warp's first step of weights, into L2: all that may be done before the kernel before us is through.
  __device__ __forceinline__ void prefetch(int warp) const {
    constexpr int kLineWords = 32, kLines = L::kTileWords / kLineWords * kStepTiles;
    const StepRange range = split_steps(args.size_k / kStepRows, blockIdx.x, args.num_splits);
    const int step = range.begin + warp;
    if (step < range.end)
      for (int line = lane; line < kLines; line += kWarpLanes)
        prefetch_l2(args.qweight + i64(blockIdx.y) * L::kTileWords + line % (L::kTileWords / kLineWords) * kLineWords +
                    (i64(step) * kStepTiles + line / (L::kTileWords / kLineWords)) * args.qweight_stride);
  }

  template <int kStage>
  __device__ __forceinline__ void fetch(int step, int end) {
    if (step < end) {
      const int row = step * kStepRows;
      const u32* tile_gl_rd = weights_gl_rd + i64(row / kTileRows) * args.qweight_stride;
#pragma unroll
      for (int i = 0; i < kStepTiles; ++i)
#pragma unroll
        for (int part = 0; part < kLoads; ++part)
          // A lane's 32 bytes of 8-bit weights are two loads from one sector: let L1 keep it in between.
          stages[kStage].weights[i][part] = kLoads == 1 ? load_streaming(tile_gl_rd + i * args.qweight_stride)
                                                        : load_cached(tile_gl_rd + i * args.qweight_stride + 4 * part);
#pragma unroll
      for (int i = 0; i < kStepGroups; ++i) groups.read(stages[kStage].groups[i], (row + i * kScaledRows) / kGroupSize, lane);
#pragma unroll
      for (int i = 0; i < kActLoads; ++i) {
        const int token = (lane + i * kWarpLanes) / kRowChunks, chunk = (lane + i * kWarpLanes) % kRowChunks;
        // Absent tokens are columns of the product that nobody stores: whatever lies there may stay.
        if (token < args.size_m) cp_async_16(act_sh<kStage>(token, chunk), args.a + token * args.a_stride + row + 8 * chunk);
      }
    }
    cp_async_commit();
  }

  template <int kStage>
  __device__ __forceinline__ void multiply() {
    cp_async_wait<1>();
    __syncwarp();
    Stage& stage = stages[kStage];
    float partial[kTokenTiles][kTileBlocks][4];
    u32 act[kTokenTiles][4];  // operand B of two tiles
#pragma unroll
    for (int i = 0; i < kStepTiles; ++i) {
      if (i % kScaledTiles == 0) clear(partial);
      if (i % 2 == 0) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) ldmatrix_x4(act[t], act_sh<kStage>(8 * t + lane % 8, 2 * i + lane / 8));
      }
      const LaneGroup<kBits>& group = stage.groups[i / kScaledTiles];
#pragma unroll
      for (int j = 0; j < kTileBlocks; ++j) {
        u32 weight[4];
        D::decode(weight, reinterpret_cast<const u32*>(stage.weights[i]) + j * L::kBlockWords,
                  D::offsets(groups.zeros(group, j)));
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) mma(T{}, partial[t][j], weight, act[t][2 * (i % 2)], act[t][2 * (i % 2) + 1]);
      }
      if (i % kScaledTiles == kScaledTiles - 1) add_scaled(partial, group);
    }
    __syncwarp();  // before anyone refills these activations
  }

  static __device__ __forceinline__ void clear(float (&partial)[kTokenTiles][kTileBlocks][4]) {
#pragma unroll
    for (int i = 0; i < kTokenTiles * kTileBlocks * 4; ++i) (&partial[0][0][0])[i] = 0.f;
  }

  __device__ __forceinline__ void add_scaled(const float (&partial)[kTokenTiles][kTileBlocks][4], const LaneGroup<kBits>& group) {
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

  // The warps' sums, and those of the blocks that share the columns, added up in the order of K: out, or to the workspace.
  // Within a cluster block r finishes every num_splits-th four columns from the r-th on; the others write their parts of
  // those into its shared memory, each to a place of its own, so that one barrier is enough.
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

  template <int kStage>
  __device__ __forceinline__ u32 act_sh(int token, int chunk) const {
    return shared_address(shared) + kStage * kActBytes + (token * kRowChunks + (chunk ^ (token % 8))) * 16;
  }

  const GemmArguments& args;
  unsigned char* shared;
  const int lane;
  const u32* weights_gl_rd;
  const GroupReader<T, kBits> groups;
  Stage stages[2];
  float sums[kTokenTiles][kTileBlocks][4] = {};
};

}  // namespace marlin
