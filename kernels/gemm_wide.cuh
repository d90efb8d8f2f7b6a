// The GEMM for hundreds of tokens and more on compute capability 9.0: wgmma over tiles of 128 columns by up to 256
// tokens, in blocks that stay.
//
// A weight is decoded once for twice the tokens that gemm_hopper.cuh has. Each of two warpgroups multiplies one tile of
// 64 columns: warp w has block w of it, and the four blocks together are the m64 operand A, in registers. Operand B is
// the tokens, in shared memory with 128-byte swizzle.
//
// A block walks over the tiles. One thread asks the hardware for boxes of activations and weights (TMA). It runs ahead
// into the next tile's first stages while the result of the current one is rounded and leaves, copied by the hardware
// too.
//
// Two mbarriers per stage: `full` counts the bytes that have arrived, `empty` the multiplying warps that are done with
// it.
#pragma once

#include "gemm_base.cuh"
#include "wgmma.cuh"

// The maps are of the activations, in boxes of 64 numbers of kTokens tokens with 128-byte swizzle, and of the weights
// in numbers of 8 bytes, in boxes of two tiles by four.
#define MARLIN_WIDE_GEMM_PARAMETERS \
  const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap qweight_map, MARLIN_GEMM_PARAMETERS
#define MARLIN_WIDE_GEMM_ARGUMENTS a_map, qweight_map, MARLIN_GEMM_ARGUMENTS

namespace marlin {

template <class T, int kBits, int kTokens, int kStages>
class WideGemm {
  using D = Decoder<T, kBits>;
  using L = Layout<kBits>;
  using Groups = GroupReader<T, kBits, 1>;
  static constexpr int kWarpgroups = 2, kWarpgroupWarps = 4;
  static constexpr int kMathWarps = kWarpgroups * kWarpgroupWarps;
  static constexpr int kMathThreads = kMathWarps * kWarpLanes;
  static constexpr int kTiles = kWarpgroups;  // of 64 columns, of a block
  static constexpr int kColumns = kTiles * kTileColumns;
  static constexpr int kStageRows = 64;
  static constexpr int kStageTiles = kStageRows / kTileRows;
  static constexpr int kBatchTiles = 32 / kTileRows;  // the smallest group
  static constexpr int kBatches = kStageTiles / kBatchTiles;
  static_assert(kHasWgmma<kTokens>, "wgmma.cuh has no instruction of this width");
  static_assert(kTokens % 16 == 0, "two octets of tokens are stored at a time");

  static constexpr int kActBytes = kTokens * kStageRows * 2;
  static constexpr int kTileBytes = L::kTileWords * 4;
  static constexpr int kStageBytes = kActBytes + kStageTiles * kTiles * kTileBytes;
  static_assert(kStageBytes % 1024 == 0 && kActBytes % 1024 == 0, "a swizzle pattern starts on 1024 bytes");
  static constexpr int kRowBytes = (kColumns + 8) * 2;  // the padding spreads the rows of a fragment over the banks
  static_assert(kTokens <= kMathThreads, "a thread sends a row");
  static constexpr int kScaleBytes = kColumns * 2, kGroupBytes = kTiles * L::kGroupBytes;  // scales, then zero points
  static constexpr int kGroupsOffset = kStages * kStageBytes;
  static constexpr int kRowsOffset = kGroupsOffset + kStages * kBatches * kGroupBytes;
  static constexpr int kBarriersOffset = kRowsOffset + kTokens * kRowBytes;

  // A multiprocessor has 65536 registers, 168 for each of 384 threads in multiples of 8. Warps that only copy give up
  // most of theirs.
  static constexpr int kCopyRegisters = 40, kMathRegisters = 232;
  static_assert(kCopyRegisters + kWarpgroups * kMathRegisters == 3 * 168, "what is given is what is taken");

 public:
  static constexpr int kThreads = kMathThreads + kWarpgroupWarps * kWarpLanes;
  static constexpr int kSharedBytes = kBarriersOffset + 2 * kStages * 8;

  // grid: as many blocks as the GPU holds.
  static __device__ __forceinline__ void run(const TensorMap& a_map, const TensorMap& qweight_map,
                                             const GemmArguments& args) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const WideGemm gemm(args, shared_address(shared));
    if (threadIdx.x == 0) gemm.init_barriers();
    start_next_launch();
    wait_for_last_launch();
    __syncthreads();
    if (gemm.warp >= kMathWarps) {
      give_registers<kCopyRegisters>();
      if (gemm.warp == kMathWarps && gemm.lane == 0) gemm.copy(a_map, qweight_map);
    } else {
      take_registers<kMathRegisters>();
      gemm.multiply();
    }
  }

 private:
  __device__ __forceinline__ WideGemm(const GemmArguments& args, u32 shared)
      : args(args),
        shared(shared),
        warp(__shfl_sync(0xffffffffu, threadIdx.x / kWarpLanes, 0)),  // the same in all lanes, and the compiler knows
        lane(threadIdx.x % kWarpLanes),
        warpgroup(warp / kWarpgroupWarps),
        tiles_n((args.size_n + kColumns - 1) / kColumns),
        tiles_m((args.size_m + kTokens - 1) / kTokens),
        num_places(tiles_n * tiles_m * args.num_splits) {}

  __device__ __forceinline__ void init_barriers() const {
    for (int slot = 0; slot < kStages; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), kMathWarps);
    }
    fence_mbarrier_init();
  }

  using Slot = RingSlot<kStages>;

  // A tile, and a part of K.
  struct Place {
    int first_column, first_token, split;
    StepRange range;
  };

  // Places in the order in which blocks take them. Those that are multiplied at the same time have some 1024 tokens:
  // that is when the fewest bytes must be read, as activations have four times the bytes of 4-bit weights.
  __device__ __forceinline__ Place place(int i) const {
    constexpr int kHeight = 1024 / kTokens;
    const int split = i % args.num_splits, tile = i / args.num_splits;
    const int band = tile / (kHeight * tiles_n), in_band = tile - band * kHeight * tiles_n;
    const int height = min(kHeight, tiles_m - band * kHeight);
    return {in_band / height * kColumns, (band * kHeight + in_band % height) * kTokens, split,
            split_steps(args.size_k / kStageRows, split, args.num_splits)};
  }

  // ---- the copying thread -------------------------------------------------------------------------------------------

  __device__ __forceinline__ void copy(const TensorMap& a_map, const TensorMap& qweight_map) const {
    Slot slot;
    const int num_groups = args.size_k / args.group_size, groups_at_once = args.group_size < kStageRows ? kBatches : 1;
#pragma unroll 1
    for (int i = blockIdx.x; i < num_places; i += gridDim.x) {
      const Place at = place(i);
      const int columns = min(kColumns, args.size_n - at.first_column);
      const u32 scale_bytes = columns * 2, zero_bytes = args.qzeros ? columns * kBits / 8 : 0;
      const u16* scales = args.scales + at.first_column;
      const u32* zeros = args.qzeros + at.first_column / L::kPackFactor;
      GroupEnds<kStageRows> ends(args.group_size, at.range);
      int group = at.range.begin * kStageRows / args.group_size + 1;
#pragma unroll 1
      for (int step = at.range.begin; step < at.range.end; ++step) {
        const u32 stage = shared + slot.index * kStageBytes, barrier = full(slot.index);
        mbarrier_wait(empty(slot.index), slot.parity ^ 1);  // a slot that was never used counts as empty
        const int count = ends.take() ? min(groups_at_once, num_groups - group) : 0;
        mbarrier_arrive_expecting(barrier, kStageBytes + count * (scale_bytes + zero_bytes));
#pragma unroll 1
        for (int i = 0; i < count; ++i, ++group) {
          const u32 to = group_sh(slot.index, i);
          bulk_load(to, scales + group * args.scales_stride, scale_bytes, barrier);
          if (zero_bytes) bulk_load(to + kScaleBytes, zeros + group * args.qzeros_stride, zero_bytes, barrier);
        }
        box_load(stage, a_map, step * kStageRows, at.first_token, barrier);
        box_load(stage + kActBytes, qweight_map, at.first_column / kTileColumns * (kTileBytes / 8), step * kStageTiles,
                 barrier);
        slot.advance();
      }
    }
  }

  // ---- the multiplying warps ----------------------------------------------------------------------------------------

  using Sums = float[kTokens / 2];

  // What turns a lane's word into weights.
  struct Constants {
    typename D::Offsets offsets;
    u32 scales[2];
  };

  __device__ __forceinline__ Groups groups_of(const Place& at) const {
    const int tile = min(at.first_column / kTileColumns + warpgroup, args.size_n / kTileColumns - 1);
    return {args, tile, lane, warp % kWarpgroupWarps};
  }
  __device__ __forceinline__ int first_group(const Place& at) const {
    return min(at.range.begin * kStageRows, args.size_k - 1) / args.group_size;
  }

  // The next place's first scales are on their way while this one's result leaves.
  __device__ __forceinline__ void multiply() const {
    Slot slot;
    Place at = place(blockIdx.x);
    Groups groups = groups_of(at);
    typename Groups::Group group;
    groups.read(group, first_group(at), lane);
#pragma unroll 1
    for (int i = blockIdx.x; i < num_places; i += gridDim.x) {
      Sums sums = {};
      sum_rows(sums, slot, groups, group, at.range);
      const Place next = place(min(i + int(gridDim.x), num_places - 1));
      const Groups next_groups = groups_of(next);
      next_groups.read(group, first_group(next), lane);
      if (args.workspace)
        store_parts(sums, groups, at);
      else
        store_rows(sums, groups, at);
      at = next;
      groups = next_groups;
    }
    bulk_wait();
  }

  __device__ __forceinline__ Constants prepare(const Groups& groups, const typename Groups::Group& group) const {
    const u32 scales = groups.scales(group, 0);
    return {D::offsets(groups.zeros(group, 0)), {low_twice(scales), high_twice(scales)}};
  }

  // One tile of 16 rows is decoded while the one before is multiplied. Meanwhile the constants are prepared of a group
  // that begins with the next: a stage brings the groups that begin within it and with the stage that follows.
  __device__ __forceinline__ void sum_rows(Sums& sums, Slot& slot, const Groups& groups,
                                           const typename Groups::Group& first_group, StepRange range) const {
    GroupEnds<kStageRows> ends(args.group_size, range);
    const bool every_batch = args.group_size < kStageRows;
    Constants constants = prepare(groups, first_group);
    typename Groups::Group group[kBatches];
    u32 weight[2][4];
    const int b = warp % kWarpgroupWarps;
    const u32 words_sh = tile_sh(0, 0, warpgroup) + (lane * L::kLaneWords + b * L::kBlockWords) * 4;
    int released = 0;
    for (int step = range.begin; step < range.end; ++step) {
      mbarrier_wait(full(slot.index), slot.parity);
      u32 words[kStageTiles][L::kBlockWords];
#pragma unroll
      for (int t = 0; t < kStageTiles; ++t)
        load_shared(words[t], words_sh + slot.index * kStageBytes + t * (kTiles * kTileBytes));
      const bool is_end = ends.take();
      if (is_end) read_group(group[1], groups, slot.index, every_batch);
      if (every_batch) read_group(group[0], groups, slot.index, 0);
      const u64 act = wgmma_descriptor(shared + slot.index * kStageBytes);
#pragma unroll
      for (int t = 0; t < kStageTiles; ++t) {
        D::decode(weight[t % 2], words[t], constants.offsets);
        scale<T>(weight[t % 2], constants.scales[0], constants.scales[1]);
        wgmma_fence();
        wgmma(T{}, sums, weight[t % 2], act + 2 * t);
        wgmma_commit();
        if (t == kBatchTiles - 1 && every_batch) constants = prepare(groups, group[0]);
        if (t == kStageTiles - 1 && is_end) constants = prepare(groups, group[1]);
        wgmma_wait<1>();  // the tile before is done: its registers are free, and after a stage's last its slot
        if (t == 0) {
          if (step > range.begin) release(released);
          released = slot.index;
        }
      }
      slot.advance();
    }
    wgmma_wait<0>();
    if (range.begin < range.end) release(released);
  }

  __device__ __forceinline__ void read_group(typename Groups::Group& into, const Groups& groups, int slot,
                                             int which) const {
    const u32 scales_sh = group_sh(slot, which) + warpgroup * kTileColumns * 2;
    const u32 zeros_sh = group_sh(slot, which) + kScaleBytes + warpgroup * L::kTileZeroWords * 4;
    groups.read_shared(into, scales_sh, zeros_sh, lane);
  }

  // The warp is done with a slot.
  __device__ __forceinline__ void release(int slot) const {
    __syncwarp();  // all lanes have read their words
    if (lane == 0) mbarrier_arrive(empty(slot));
  }

  // ---- how sums leave: lane l holds columns l/4 and l/4 + 8 of a block, tokens 8 t + 2 (l mod 4) and + 1 ------------

  __device__ __forceinline__ int block_column() const {
    return warpgroup * kTileColumns + warp % kWarpgroupWarps * kBlockColumns;
  }

  // Rounds the tile into rows in shared memory, and sends each where it belongs. The hardware copies them while the
  // next tile is multiplied. A fragment of eight columns and tokens is stored transposed.
  __device__ __forceinline__ void store_rows(const Sums& sums, const Groups& groups, const Place& at) const {
    const int column = block_column() + lane / 4;
    float scales[2], biases[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scales[half] = groups.final_scale(lane, half);
      const int n = min(at.first_column + column + 8 * half, args.size_n - 1);
      biases[half] = args.bias ? low_float(T{}, args.bias[n]) : 0.f;
    }
    const u32 rows_sh = shared + kRowsOffset;
    const u32 fragments_sh =
        rows_sh + (lane % 8 + lane / 16 * 8) * kRowBytes + (block_column() + lane / 8 % 2 * 8) * 2;
    bulk_wait_read();
    barrier_some<kMathThreads>();  // the rows before have left
#pragma unroll
    for (int t = 0; t < kTokens / 8; t += 2) {
      u32 fragments[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i % 2, first = 4 * (t + i / 2) + 2 * half;
        const float scale = scales[half], bias = biases[half];
        fragments[i] = pack2(T{}, scale * sums[first] + bias, scale * sums[first + 1] + bias);
      }
      stmatrix_x4_transposed(fragments_sh + t * 8 * kRowBytes, fragments);
    }
    fence_proxy_async();
    barrier_some<kMathThreads>();
    const int token = threadIdx.x, columns = min(kColumns, args.size_n - at.first_column);
    if (token < min(kTokens, args.size_m - at.first_token) && columns > 0)
      bulk_store(args.out + i64(at.first_token + token) * args.size_n + at.first_column, rows_sh + token * kRowBytes,
                 2 * columns);
    bulk_commit();
  }

  // Leaves a split's sums to sum_splits. Eight lanes write 32 bytes, a sector.
  __device__ __forceinline__ void store_parts(const Sums& sums, const Groups& groups, const Place& at) const {
    const int token = at.first_token + 2 * (lane % 4), column = at.first_column + block_column() + lane / 4;
    const float scales[2] = {groups.final_scale(lane, 0), groups.final_scale(lane, 1)};
    float* part = args.workspace + (i64(at.split) * args.size_m + token) * args.size_n + column;
#pragma unroll
    for (int t = 0; t < kTokens / 8; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int v = 0; v < 2; ++v)
          if (token + 8 * t + v < args.size_m && column + 8 * half < args.size_n)
            part[v * args.size_n + 8 * half] = scales[half] * sums[4 * t + 2 * half + v];
      part += 8 * i64(args.size_n);
    }
  }

  // ---- where things are ---------------------------------------------------------------------------------------------

  __device__ __forceinline__ u32 tile_sh(int slot, int tile, int w) const {
    return shared + slot * kStageBytes + kActBytes + (tile * kTiles + w) * kTileBytes;
  }
  __device__ __forceinline__ u32 group_sh(int slot, int which) const {
    return shared + kGroupsOffset + (slot * kBatches + which) * kGroupBytes;
  }
  __device__ __forceinline__ u32 full(int slot) const { return shared + kBarriersOffset + 8 * slot; }
  __device__ __forceinline__ u32 empty(int slot) const { return full(kStages + slot); }

  const GemmArguments& args;
  const u32 shared;
  const int warp, lane, warpgroup, tiles_n, tiles_m, num_places;
};

}  // namespace marlin
