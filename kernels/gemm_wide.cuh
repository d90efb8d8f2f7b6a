// The GEMM for a hundred tokens and more on compute capability 9.0: wgmma over tiles of 128 columns by up to 256
// tokens, in blocks that stay.
//
// A weight is decoded once for twice the tokens that gemm_hopper.cuh has. Each of two warpgroups multiplies one tile of
// 64 columns: warp w has block w of it, and the four blocks together are the m64 operand A, in registers. Operand B is
// the tokens, in shared memory with 128-byte swizzle.
//
// A block walks over the tiles. One thread asks the hardware for boxes of activations and weights (TMA). It runs ahead
// into the next tile's first stages while the result of the current one is rounded and leaves.
//
// Tiles that would fill a last wave in part only are split along K (`num_splits`). With two splits the halves of a tile
// are multiplied by a cluster of two blocks, each of which finishes half of the tokens. Otherwise the parts' sums go
// through a workspace, and a second launch adds them (`Sum`). Either way they are added in the order of K.
//
// Two mbarriers per stage: `full` counts the bytes that have arrived, `empty` the multiplying threads that are done
// with them.
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
  using D = Decoder<T, kBits, TwoRegisters>;  // with one the assembler serializes wgmma
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
  static constexpr int kScaleBytes = kColumns * 2, kGroupBytes = kTiles * L::kGroupBytes;  // scales, then zero points
  static constexpr int kGroupsOffset = kStages * kStageBytes;

  // A warpgroup's results leave in rounds, through two buffers in turn. Pairs are of octets of tokens.
  static constexpr int kPairs = kTokens / 16, kRoundPairs = 4;
  static constexpr int kRowBytes = (kTileColumns + 8) * 2;  // the padding spreads the rows of a fragment over the banks
  static constexpr int kRoundBytes = kRoundPairs * 16 * kRowBytes;
  static constexpr int kRowsOffset = kGroupsOffset + kStages * kBatches * kGroupBytes;
  static constexpr int kBarriersOffset = kRowsOffset + kWarpgroups * 2 * kRoundBytes;

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
    const WideGemm gemm(args, shared_address(shared), whole_tiles(args, gridDim.x));
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

  // The second launch when the first left sums in the workspace. grid: split tiles, pairs of octets of their tokens.
  struct Sum {
    static constexpr int kThreads = kMathThreads, kSharedBytes = kWarpgroups * 16 * kRowBytes;
    static __device__ __forceinline__ void run(const GemmArguments& args) {
      extern __shared__ __align__(1024) unsigned char shared[];
      const WideGemm gemm(args, shared_address(shared), num_tiles(args) - int(gridDim.x));
      start_next_launch();
      wait_for_last_launch();
      gemm.sum_pair(blockIdx.x, blockIdx.y);
    }
  };

 private:
  static __device__ __forceinline__ int num_tiles(const GemmArguments& args) {
    return (args.size_n + kColumns - 1) / kColumns * ((args.size_m + kTokens - 1) / kTokens);
  }

  // The first tiles, which are not split: as many as fill all waves but the last one. Blocks of a cluster have one
  // split tile each and nothing after it, as its sums meet where the ring was.
  static __device__ __forceinline__ int whole_tiles(const GemmArguments& args, int num_blocks) {
    const int tiles = num_tiles(args), last = tiles % num_blocks;
    const bool splits = args.num_splits > 1 && (args.workspace || args.num_splits * last <= num_blocks);
    return splits ? tiles - last : tiles;
  }

  __device__ __forceinline__ WideGemm(const GemmArguments& args, u32 shared, int num_whole)
      : args(args),
        shared(shared),
        warp(__shfl_sync(0xffffffffu, threadIdx.x / kWarpLanes, 0)),  // the same in all lanes, and the compiler knows
        lane(threadIdx.x % kWarpLanes),
        warpgroup(warp / kWarpgroupWarps),
        tiles_n((args.size_n + kColumns - 1) / kColumns),
        tiles_m((args.size_m + kTokens - 1) / kTokens),
        num_whole(num_whole),
        num_places(num_whole + (tiles_n * tiles_m - num_whole) * args.num_splits) {}

  __device__ __forceinline__ void init_barriers() const {
    for (int slot = 0; slot < kStages; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), kMathThreads);
    }
    fence_mbarrier_init();
  }

  using Slot = RingSlot<kStages>;

  // A tile, and a part of K. `part` counts the parts of all split tiles; negative: the tile is whole.
  struct Place {
    int first_column, first_token, part;
    StepRange range;
  };

  // Places in the order in which blocks take them. Those that are multiplied at the same time have some 1024 tokens:
  // that is when the fewest bytes must be read, as activations have four times the bytes of 4-bit weights.
  __device__ __forceinline__ Place place(int i) const {
    constexpr int kHeight = 1024 / kTokens;
    const int part = i - num_whole;
    const bool is_whole = part < 0;
    const int tile = is_whole ? i : num_whole + part / args.num_splits;
    const int split = is_whole ? 0 : part % args.num_splits, num_splits = is_whole ? 1 : args.num_splits;
    const int band = tile / (kHeight * tiles_n), in_band = tile - band * kHeight * tiles_n;
    const int height = min(kHeight, tiles_m - band * kHeight);
    return {in_band / height * kColumns, (band * kHeight + in_band % height) * kTokens, part,
            split_steps(args.size_k / kStageRows, split, num_splits)};
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
    TwoRegisters scales;
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
    if (int(blockIdx.x) >= num_places) return;
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
      if (at.part < 0)
        store_rows<0, kPairs>(sums, groups, at);
      else if (args.workspace)
        store_part(sums, at);
      else
        store_with_peer(sums, groups, at);
      at = next;
      groups = next_groups;
    }
  }

  __device__ __forceinline__ Constants prepare(const Groups& groups, const typename Groups::Group& group) const {
    return {D::offsets(groups.zeros(group, 0)), TwoRegisters(groups.scales(group, 0))};
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
        scale<T>(weight[t % 2], constants.scales);
        wgmma_fence();
        wgmma(T{}, sums, weight[t % 2], act + 2 * t);
        wgmma_commit();
        if (t == kBatchTiles - 1 && every_batch) constants = prepare(groups, group[0]);
        if (t == kStageTiles - 1 && is_end) constants = prepare(groups, group[1]);
        wgmma_wait<1>();  // the tile before is done: its registers are free, and after a stage's last its slot
        if (t == 0) {
          if (step > range.begin) mbarrier_arrive(empty(released));
          released = slot.index;
        }
      }
      slot.advance();
    }
    wgmma_wait<0>();
    if (range.begin < range.end) mbarrier_arrive(empty(released));
  }

  __device__ __forceinline__ void read_group(typename Groups::Group& into, const Groups& groups, int slot,
                                             int which) const {
    const u32 scales_sh = group_sh(slot, which) + warpgroup * kTileColumns * 2;
    const u32 zeros_sh = group_sh(slot, which) + kScaleBytes + warpgroup * L::kTileZeroWords * 4;
    groups.read_shared(into, scales_sh, zeros_sh, lane);
  }

  // ---- how sums leave: lane l holds columns l/4 and l/4 + 8 of a block, tokens 8 t + 2 (l mod 4) and + 1 ------------

  // What a lane's two columns of sums are multiplied by, and what is added.
  struct Finish {
    float scales[2], biases[2];
  };
  __device__ __forceinline__ Finish finish_of(const Groups& groups, const Place& at) const {
    const int column = at.first_column + warpgroup * kTileColumns + warp % kWarpgroupWarps * kBlockColumns + lane / 4;
    Finish finish;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      finish.scales[half] = groups.final_scale(lane, half);
      finish.biases[half] = args.bias ? low_float(T{}, args.bias[min(column + 8 * half, args.size_n - 1)]) : 0.f;
    }
    return finish;
  }

  __device__ __forceinline__ void meet_warpgroup() const {
    barrier_of<kWarpgroupWarps * kWarpLanes>(1 + warpgroup);
  }

  // Rounds pairs [kBegin, kEnd) of the tile and stores them.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void store_rows(const Sums& sums, const Groups& groups, const Place& at) const {
    const Finish finish = finish_of(groups, at);
    const u32 rows_sh = shared + kRowsOffset + warpgroup * 2 * kRoundBytes;
    meet_warpgroup();  // the rows before have left
#pragma unroll
    for (int pair = kBegin; pair < kEnd; pair += kRoundPairs) {
      const u32 round_sh = rows_sh + (pair - kBegin) / kRoundPairs % 2 * kRoundBytes;
#pragma unroll
      for (int i = 0; i < kRoundPairs; ++i)
        if (pair + i < kEnd) round_pair(round_sh + i * 16 * kRowBytes, sums + 8 * (pair + i), finish);
      meet_warpgroup();
#pragma unroll
      for (int i = 0; i < kRoundPairs; ++i)
        if (pair + i < kEnd) send_pair(round_sh + i * 16 * kRowBytes, at, pair + i);
    }
  }

  // Rounds the sums of 16 tokens into rows in shared memory. A fragment of eight columns and tokens is stored
  // transposed.
  __device__ __forceinline__ void round_pair(u32 rows_sh, const float* sums, const Finish& finish) const {
    u32 fragments[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i % 2, first = 4 * (i / 2) + 2 * half;
      const float scale = finish.scales[half], bias = finish.biases[half];
      fragments[i] = pack2(T{}, scale * sums[first] + bias, scale * sums[first + 1] + bias);
    }
    const int column = warp % kWarpgroupWarps * kBlockColumns + lane / 8 % 2 * 8;
    stmatrix_x4_transposed(rows_sh + (lane % 8 + lane / 16 * 8) * kRowBytes + column * 2, fragments);
  }

  // Stores those rows: eight threads have one.
  __device__ __forceinline__ void send_pair(u32 rows_sh, const Place& at, int pair) const {
    const int thread = threadIdx.x % (kWarpgroupWarps * kWarpLanes), row = thread / 8, chunk = thread % 8;
    const int token = at.first_token + 16 * pair + row, column = at.first_column + warpgroup * kTileColumns + 8 * chunk;
    u32 v[4];
    load_shared(v, rows_sh + row * kRowBytes + chunk * 16);
    if (token < args.size_m && column < args.size_n)
      *reinterpret_cast<U32x4*>(args.out + i64(token) * args.size_n + column) = {v[0], v[1], v[2], v[3]};
  }

  // Sums on their way: a thread's four of an octet of tokens lie side by side, and so do threads.
  static constexpr int kOctetBytes = kMathThreads * 16;

  // Gives the other block of the cluster, which has the other half of K, the sums of its tokens, and finishes ours.
  __device__ __forceinline__ void store_with_peer(Sums& sums, const Groups& groups, const Place& at) const {
    constexpr int kMiddle = (kPairs + 1) / 2;
    cluster_sync();  // both blocks are done with their rings
    if (at.part % 2 == 0)
      share<0, kMiddle>(sums, groups, at);
    else
      share<kMiddle, kPairs>(sums, groups, at);
  }
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void share(Sums& sums, const Groups& groups, const Place& at) const {
    const u32 ours = shared + threadIdx.x * 16, theirs = cluster_address(ours, at.part % 2 ^ 1);
#pragma unroll
    for (int octet = 0; octet < 2 * kPairs; ++octet) {
      constexpr int kTheirs = kBegin == 0 ? 2 * kEnd : 0;  // the first octet that the other block finishes
      if (octet < 2 * kBegin || octet >= 2 * kEnd)
        store_cluster(theirs + (octet - kTheirs) * kOctetBytes, quad(sums, octet));
    }
    cluster_sync();
#pragma unroll
    for (int octet = 2 * kBegin; octet < 2 * kEnd; ++octet) {
      u32 v[4];
      load_shared(v, ours + (octet - 2 * kBegin) * kOctetBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[4 * octet + i] += __uint_as_float(v[i]);
    }
    store_rows<kBegin, kEnd>(sums, groups, at);
  }
  static __device__ __forceinline__ F32x4 quad(const Sums& sums, int octet) {
    return {sums[4 * octet], sums[4 * octet + 1], sums[4 * octet + 2], sums[4 * octet + 3]};
  }

  // The workspace has a tile for each part, in the same order.
  __device__ __forceinline__ F32x4* part_octet(int part, int octet) const {
    return reinterpret_cast<F32x4*>(args.workspace) + (i64(part) * 2 * kPairs + octet) * kMathThreads + threadIdx.x;
  }
  __device__ __forceinline__ void store_part(const Sums& sums, const Place& at) const {
#pragma unroll
    for (int octet = 0; octet < 2 * kPairs; ++octet) *part_octet(at.part, octet) = quad(sums, octet);
  }
  __device__ __forceinline__ void sum_pair(int split_tile, int pair) const {
    const int first_part = split_tile * args.num_splits;
    const Place at = place(num_whole + first_part);
    F32x4 sums[2] = {};
    for (int split = 0; split < args.num_splits; ++split)
#pragma unroll
      for (int i = 0; i < 2; ++i) accumulate(sums[i], *part_octet(first_part + split, 2 * pair + i));
    const u32 rows_sh = shared + warpgroup * 16 * kRowBytes;
    round_pair(rows_sh, reinterpret_cast<const float*>(sums), finish_of(groups_of(at), at));
    meet_warpgroup();
    send_pair(rows_sh, at, pair);
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
  const int warp, lane, warpgroup, tiles_n, tiles_m, num_whole, num_places;
};

}  // namespace marlin
