// The GEMM for more than a few tokens on compute capability 9.0: wgmma, fed by copies that the hardware makes.
//
// A block computes 256 columns by 32 to 128 tokens. Each of a warpgroup's four warps takes one tile of 64 columns,
// and block j of the four tiles together is one m64 operand A, transposed and in registers: a lane's words serve
// without a shuffle. The first warpgroup multiplies blocks 0 and 1 of every tile, the second blocks 2 and 3, so each
// weight is decoded once per block. Operand B is the tokens, in shared memory with 128-byte swizzle. The hardware
// copies boxes of them and of the weights (TMA) when threads of a third warpgroup say so. Scales and zero points are
// few bytes, which a warp copies faster itself (kernels/README.md). Where nearly all the time goes into memory (8 bits,
// scales on sums), the third warpgroup's warps copy everything.
//
// Two mbarriers per stage: `full` counts what has arrived, `empty` the multiplying threads that are done with it. All
// of them arrive. A lane of each warp, behind a __syncwarp, would do, but is no faster, and compute-sanitizer's
// racecheck does not follow it.
//
// Scales are applied to weights, or, where groups are long and sums few, to a group's sums: that takes fewer
// instructions and more registers.
#pragma once

#include "hopper_patches.cuh"
#include "wgmma.cuh"

// The maps are of the activations, in boxes of 64 numbers of kTokens tokens with 128-byte swizzle, and of the weights
// in numbers of 8 bytes, in boxes of 256 by four: four tiles in a row with 4 bits, two with 8.
#define MARLIN_HOPPER_GEMM_PARAMETERS \
  const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap qweight_map, MARLIN_GEMM_PARAMETERS
#define MARLIN_HOPPER_GEMM_ARGUMENTS a_map, qweight_map, MARLIN_GEMM_ARGUMENTS

namespace marlin {

// The threads of a block, and which registers they have. A multiprocessor has 65536: 168 for each of 384 threads, in
// multiples of 8, or 80 when it holds two blocks. Few sums leave room for two, whose decoding hides each other's
// waiting.
template <int kResidentBlocks>
struct HopperRegisters {
  static_assert(kResidentBlocks == 1 || kResidentBlocks == 2, "the shares are counted for these");
  static constexpr int kEntry = kResidentBlocks == 2 ? 80 : 168;
  static constexpr int kCopy = kResidentBlocks == 2 ? 32 : 56;
  static constexpr int kMath = kResidentBlocks == 2 ? 104 : 224;
  static_assert(kCopy + 2 * kMath == 3 * kEntry, "what one warpgroup gives is what the two others take");
};

// A tile of 256 columns by kTokens tokens: how stages are copied and multiplied, whoever says which.
//
// Either the warps of the third warpgroup copy, or the hardware does at their word. wgmma reads through the hardware's
// proxy. Copies of warps go through another: those that copy wait for their copies and fence the two, which costs
// nothing there. No argument has a default: one that is lost must not compile.
enum class CopiedBy { kWarps, kHardware };
template <class T, int kBits, int kTokens, int kRingStages, CopiedBy kCopiedBy, class Columns>
class HopperTile {
 public:
  using D = Decoder<T, kBits, Columns>;
  using L = Layout<kBits>;

  static constexpr int kStages = kRingStages;
  static constexpr bool kByHardware = kCopiedBy == CopiedBy::kHardware;
  static constexpr int kWarpgroups = 2;
  static constexpr int kWarpgroupWarps = 4;
  static constexpr int kMathWarps = kWarpgroups * kWarpgroupWarps;
  static constexpr int kMathThreads = kMathWarps * kWarpLanes;
  static constexpr int kCopyWarps = kWarpgroupWarps;
  static constexpr int kCopyThreads = kCopyWarps * kWarpLanes;
  static constexpr int kThreads = (kMathWarps + kCopyWarps) * kWarpLanes;
  static_assert(kThreads == 384, "the shares of registers are counted for three warpgroups");
  static constexpr int kColumns = kWarpgroupWarps * kTileColumns;
  static constexpr int kBlocks = kTileBlocks / kWarpgroups;      // blocks j of a warpgroup
  static constexpr int kWords = L::kLaneWords / kWarpgroups;     // a lane's words in them
  static constexpr int kStageRows = 64;
  static constexpr int kStageTiles = kStageRows / kTileRows;
  static constexpr int kBatchRows = 32;                          // decoded and multiplied at once: the smallest group
  static constexpr int kBatchTiles = kBatchRows / kTileRows;
  static constexpr int kBatches = kStageRows / kBatchRows;
  static constexpr int kSums = kTokens / 2;                      // accumulators of a lane in one m64 operand
  static_assert(kBatches == 2, "registers of one batch are free once the next is under way");
  static_assert(kHasWgmma<kTokens>, "wgmma.cuh has no instruction of this width");
  static_assert(kStageRows * 2 == 128, "a row of tokens is one 128-byte swizzle line");

  static constexpr int kRowChunks = kStageRows / 8;              // of 16 bytes, XOR-swizzled as wgmma wants
  static constexpr int kRoundTokens = kCopyThreads / kRowChunks;
  static constexpr int kActLoads = (kTokens + kRoundTokens - 1) / kRoundTokens;  // cp.async of a thread in a stage
  static_assert(kRoundTokens % 8 == 0, "the swizzle of a thread's chunk is the same in every round");
  static constexpr int kActBytes = kTokens * kStageRows * 2;
  static constexpr int kWeightBytes = kStageTiles * kWarpgroupWarps * L::kTileWords * 4;
  static constexpr int kStageBytes = kActBytes + kWeightBytes;
  static constexpr int kTileGroupBytes = kBatches * L::kGroupBytes;  // of one tile: groups may be as short as a batch
  static constexpr int kStageGroupBytes = kWarpgroupWarps * kTileGroupBytes;
  static constexpr int kRingBytes = kStages * (kStageBytes + kStageGroupBytes);
  static_assert(kStageBytes % 1024 == 0 && kActBytes % 1024 == 0, "a swizzle pattern starts on 1024 bytes");
  static_assert(kStages >= 3, "a stage must be on its way while one is multiplied and another not yet released");
  static constexpr int kBarrierBytes = 2 * kStages * 8;

  const int warp, lane, warpgroup;

  // The stages lie where the block's shared memory begins, on 1024 bytes.
  __device__ __forceinline__ HopperTile(unsigned char* stages, u32 barriers)
      : warp(__shfl_sync(0xffffffffu, threadIdx.x / kWarpLanes, 0)),  // the same in all lanes, and the compiler knows
        lane(threadIdx.x % kWarpLanes),
        warpgroup(warp / kWarpgroupWarps),
        shared(shared_address(stages)),
        barriers(barriers) {}

  __device__ __forceinline__ void init_barriers() const {
    if (threadIdx.x == 0)
      for (int slot = 0; slot < kStages; ++slot) {
        mbarrier_init(full(slot), kByHardware ? kCopyArrivals : kCopyThreads);
        mbarrier_init(empty(slot), kMathThreads);
      }
    if (kByHardware && threadIdx.x == 0) fence_mbarrier_init();
  }

  using Slot = RingSlot<kStages>;
  static constexpr int kBoxTiles = kByHardware ? 16 / kBits : kWarpgroupWarps;  // side by side in shared memory

  // A slot that was never used counts as empty.
  __device__ __forceinline__ void wait_empty(const Slot& slot) const {
    mbarrier_wait(empty(slot.index), slot.parity ^ 1);
  }

  // ---- copies that the hardware makes ------------------------------------------------------------------------------

  // A thread each asks for the tokens and for every box of weights. A warp copies scales and zero points.
  static constexpr int kWeightBoxes = kWarpgroupWarps / kBoxTiles;
  static constexpr int kTokenWarp = kMathWarps, kGroupWarp = kTokenWarp + 1, kFirstWeightWarp = kTokenWarp + 2;
  static constexpr int kCopyArrivals = 1 + kWeightBoxes + kWarpLanes;
  static_assert(2 + kWeightBoxes <= kCopyWarps, "a warp for each");
  __device__ __forceinline__ bool copies() const {
    return !kByHardware || warp == kGroupWarp || (lane == 0 && warp < kFirstWeightWarp + kWeightBoxes);
  }

  // What lies past the last column is not copied, or zero, and what comes of it is not stored.
  struct Boxes {
    static_assert(kByHardware, "the barriers count other arrivals when warps copy");
    static_assert(kBoxTiles * L::kTileWords == 2 * 256 && kStageTiles == 4, "a box of weights is 256 by 4 by 8 bytes");
    using Groups = StageGroups<kBits, kWarpgroupWarps, kStageRows>;
    static_assert(kBatches * Groups::kBytes == kStageGroupBytes, "a stage has room for the groups that it brings");
    Groups groups;
    int first_tile, end_tile, first_token, stage;
  };
  __device__ __forceinline__ Boxes make_boxes(const GemmArguments& args, int first_tile, int first_token,
                                              StepRange range) const {
    const int end_tile = min(first_tile + kWarpgroupWarps, args.size_n / kTileColumns);
    return {{args, first_tile, end_tile - first_tile, lane, range}, first_tile, end_tile, first_token, range.begin};
  }

  __device__ __forceinline__ void load_stage(Boxes& boxes, const Slot& slot, const TensorMap& a_map,
                                             const TensorMap& qweight_map) const {
    const u32 barrier = full(slot.index);
    if (warp == kTokenWarp) {
      mbarrier_arrive_expecting(barrier, kActBytes);
      box_load(shared + slot.index * kStageBytes, a_map, boxes.stage * kStageRows, boxes.first_token, barrier);
    } else if (warp == kGroupWarp) {
      boxes.groups.copy(groups_sh(slot.index));
      mbarrier_arrive_after_copies(barrier);
    } else {
      const int w = (warp - kFirstWeightWarp) * kBoxTiles, tile = boxes.first_tile + w;
      mbarrier_arrive_expecting(barrier, tile < boxes.end_tile ? kStageTiles * kBoxTiles * L::kTileWords * 4 : 0);
      if (tile < boxes.end_tile)
        box_load(tile_sh(slot.index, 0, w), qweight_map, tile * (L::kTileWords / 2), boxes.stage * kStageTiles,
                 barrier);
    }
    ++boxes.stage;
  }

  // ---- copies that the copying warps make ---------------------------------------------------------------------------

  // What one copying thread fetches for every stage. Pointers move on; nothing is computed twice.
  struct Copier {
    static_assert(!kByHardware, "the barriers count other arrivals when the hardware copies");
    const u16* act_gl_rd;             // its chunk of row 0
    u32 token_offsets[kActLoads];     // from there to its tokens, in chunks of eight numbers
    const u32* weights_gl_rd;         // the warp's tile
    GroupCopier<kBits> groups;        // of that tile
    GroupEnds<kStageRows> ends;
    int group, num_groups;            // `group` is copied next
  };

  // For the first kRows tokens of a tile and a range of stages. `offset_of` a token in numbers, a multiple of 8; what
  // lies past the last token is a column that nobody stores.
  template <int kRows = kTokens, class OffsetOf>
  __device__ __forceinline__ Copier make_copier(const u16* act_gl_rd, const GemmArguments& args, int tile,
                                                StepRange range, OffsetOf offset_of) const {
    const int thread = threadIdx.x - kMathThreads, chunk = thread % kRowChunks, first = thread / kRowChunks;
    Copier copier = {act_gl_rd + i64(range.begin) * kStageRows + 8 * chunk,
                     {},
                     args.qweight + i64(range.begin) * kStageTiles * args.qweight_stride + i64(tile) * L::kTileWords,
                     {args, tile, lane},
                     {args.group_size, range},
                     range.begin * kStageRows / args.group_size + 1,
                     args.size_k / args.group_size};
#pragma unroll
    for (int i = 0; i < kActLoads; ++i)
      if (i * kRoundTokens < kRows) copier.token_offsets[i] = u32(offset_of(first + i * kRoundTokens) / 8);
    return copier;
  }

  // Brings a stage with the first kRows tokens.
  template <int kRows = kTokens>
  __device__ __forceinline__ void copy_stage(Copier& copier, const Slot& slot, i64 qweight_stride,
                                             int group_size) const {
    const int thread = threadIdx.x - kMathThreads, chunk = thread % kRowChunks, first = thread / kRowChunks;
    const u32 stage = shared + slot.index * kStageBytes;
    const u32 act_sh_wr = stage + (first * kRowChunks + (chunk ^ (first % 8))) * 16;
#pragma unroll
    for (int i = 0; i < kActLoads; ++i)
      if (i * kRoundTokens < kRows && (kRows % kRoundTokens == 0 || first + i * kRoundTokens < kRows))
        cp_async_16(act_sh_wr + i * (kRoundTokens * kRowChunks * 16),
                    copier.act_gl_rd + 8 * i64(copier.token_offsets[i]));
    copier.act_gl_rd += kStageRows;
#pragma unroll
    for (int i = 0; i < kStageTiles; ++i) {
      copy_tile<kBits>(tile_sh(slot.index, i, warp - kMathWarps), copier.weights_gl_rd, lane);
      copier.weights_gl_rd += qweight_stride;
    }
    if (copier.ends.take()) {
      const int count = group_size < kStageRows ? kBatches : 1;
      copier.groups.copy(groups_sh(slot.index) + (warp - kMathWarps) * kTileGroupBytes, copier.group,
                         min(count, copier.num_groups - copier.group));
      copier.group += count;
    }
    cp_async_commit();
  }

  // Says that a stage has arrived; so many stages may still be under way. At least two must be published beside those:
  // a stage is released while the next one is multiplied.
  static constexpr int kUnpublished = kStages > 4 ? kStages - 4 : 1;
  static_assert(kUnpublished <= kStages - 2, "what is not yet published must leave the others a slot to release");
  // `next` is the slot that comes next; it begins with -kUnpublished.
  template <int kPending = kUnpublished>
  __device__ __forceinline__ void publish(int& next) const {
    if (next >= 0) {
      cp_async_wait<kPending>();
      fence_proxy_async();
      mbarrier_arrive(full(next));
    }
    if (++next == kStages) next = 0;
  }
  // The same for the last stages.
  template <int kPending = kUnpublished - 1>
  __device__ __forceinline__ void publish_last(int& next) const {
    publish<kPending>(next);
    if constexpr (kPending > 0) publish_last<kPending - 1>(next);
  }

  // ---- the multiplying warps ----------------------------------------------------------------------------------------

  struct Sums {
    float v[kBlocks][kSums] = {};
  };

  // What turns a word of one block into weights.
  struct Constants {
    typename D::Offsets offsets[kBlocks];
    Columns scales[kBlocks];

    __device__ __forceinline__ void set(int b, u32 pair_of_scales, u32 pair_of_zeros) {
      offsets[b] = D::offsets(pair_of_zeros);
      scales[b] = Columns(pair_of_scales);
    }
  };

  // Which blocks a warp multiplies: those of its warpgroup, blocks 0 and 1 or 2 and 3 of one tile.
  class OwnBlocks {
   public:
    using Group = LaneGroup<kBits, kBlocks>;

    __device__ __forceinline__ OwnBlocks(const GemmArguments& args, const HopperTile& core, int tile_n)
        : groups(args, tile_n, core.lane, kBlocks * core.warpgroup), core(core) {}

    __device__ __forceinline__ void read(Group& into, int group) const { groups.read(into, group, core.lane); }
    // The same from shared memory, of the groups that a stage brought.
    __device__ __forceinline__ void read_group(Group& into, u32 groups_sh, int which, int lane) const {
      using Copied = StageGroups<kBits, kWarpgroupWarps, kStageRows>;
      const int w = core.warp % kWarpgroupWarps;
      if constexpr (kByHardware) {
        const u32 group_sh = groups_sh + which * Copied::kBytes;
        groups.read_shared(into, group_sh + Copied::scales_place(w), group_sh + Copied::zeros_place(w), lane);
      } else {
        const u32 group_sh = groups_sh + w * kTileGroupBytes + which * L::kGroupBytes;
        groups.read_shared(into, group_sh, group_sh + kTileColumns * 2, lane);
      }
    }
    __device__ __forceinline__ void prepare(Constants& constants, const Group& group) const {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) constants.set(b, groups.scales(group, b), groups.zeros(group, b));
    }
    __device__ __forceinline__ void prepare(typename D::Offsets (&offsets)[kBlocks], const Group& group) const {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) offsets[b] = D::offsets(groups.zeros(group, b));
    }
    __device__ __forceinline__ u32 scales(const Group& group, int b) const { return groups.scales(group, b); }
    // Where the lane's words lie, counted from a row of tiles.
    __device__ __forceinline__ u32 words_place() const {
      return core.tile_sh(0, 0, core.warp % kWarpgroupWarps) - core.tile_sh(0, 0, 0) +
             (core.lane * L::kLaneWords + core.warpgroup * kWords) * 4;
    }
    __device__ __forceinline__ void load_words(u32 (&words)[kWords], u32 row_sh) const { load_shared(words, row_sh); }
    __device__ __forceinline__ float final_scale(int b, int half) const {
      return groups.final_scale(core.lane, 2 * b + half);
    }

   private:
    const GroupReader<T, kBits, kBlocks> groups;
    const HopperTile& core;
  };

  // Adds the product of a range of stages, from `slot` on, with the first kWidth tokens. While a batch is multiplied,
  // the constants are prepared of a group that begins with the next: a stage brings the groups that begin within it and
  // with the stage that follows.
  template <int kWidth = kTokens, class Blocks>
  __device__ __forceinline__ void multiply(Sums& sums, Slot& slot, const Blocks& blocks, int group_size,
                                           StepRange range) const {
    GroupEnds<kStageRows> ends(group_size, range);
    const bool every_batch = group_size < kStageRows;
    const int group_lane = reckoned_here(lane);
    typename Blocks::Group group[kBatches];
    blocks.read(group[0], range.begin * kStageRows / group_size);
    Constants constants;
    blocks.prepare(constants, group[0]);

    u32 weight[kBatches][kBatchTiles][kBlocks][4];  // one batch is multiplied while the next is decoded
    const u32 words_sh = blocks.words_place();
    int released = 0;
    for (int step = range.begin; step < range.end; ++step) {
      mbarrier_wait(full(slot.index), slot.parity);
      u32 words[kStageTiles][kWords];
#pragma unroll
      for (int i = 0; i < kStageTiles; ++i) blocks.load_words(words[i], tile_sh(slot.index, i, 0) + words_sh);
      const bool is_end = ends.take();
      if (is_end) blocks.read_group(group[1], groups_sh(slot.index), every_batch, group_lane);
      if (every_batch) blocks.read_group(group[0], groups_sh(slot.index), 0, group_lane);
      const u64 act = wgmma_descriptor(shared + slot.index * kStageBytes);
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch) {
        decode_batch(weight[batch], words + batch * kBatchTiles, constants);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBatchTiles; ++i)
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
            wgmma(T{}, first_of<kWidth / 2>(sums.v[b]), weight[batch][i][b], act + 2 * (batch * kBatchTiles + i));
        wgmma_commit();
        if (batch == 0 ? every_batch : is_end) blocks.prepare(constants, group[batch]);
        // The batch before is done: its registers are free, and after a stage's last batch so is its slot.
        wgmma_wait<1>();
        if (batch == 0) {
          if (step > range.begin) mbarrier_arrive(empty(released));
          released = slot.index;
        }
      }
      slot.advance();
    }
    wgmma_wait<0>();
    if (range.begin < range.end) mbarrier_arrive(empty(released));
  }

  // The same for groups of two stages, or a single group, and whole pairs of stages. Weights are not scaled. A group's
  // sums are, when the next group's first weights are decoded.
  template <int kWidth = kTokens, class Blocks>
  __device__ __forceinline__ void multiply_pairs(Sums& sums, RingSlot<kStages / 2>& pair, const Blocks& blocks,
                                                 bool is_single, StepRange range) const {
    static_assert(kStages % 2 == 0, "pairs of stages");
    typename Blocks::Group group;
    blocks.read(group, is_single ? 0 : range.begin / 2);
    typename D::Offsets offsets[kBlocks];
    blocks.prepare(offsets, group);
    u32 scales[kBlocks];
    Sums group_sums;

    u32 weight[kBatches][kBatchTiles][kBlocks][4];  // one batch is multiplied while the next is decoded
    const u32 words_sh = blocks.words_place();
    const u64 first_act = wgmma_descriptor(shared);
    int released = 0;
#pragma unroll 1
    for (int step = range.begin; step < range.end; step += 2) {
      const bool is_first = step == range.begin;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int slot = 2 * pair.index + which;
        mbarrier_wait(full(slot), pair.parity);
        u32 words[kStageTiles][kWords];
#pragma unroll
        for (int i = 0; i < kStageTiles; ++i) blocks.load_words(words[i], tile_sh(slot, i, 0) + words_sh);
        const u64 act = first_act + u32(slot * (kStageBytes / 16));
        decode_batch(weight[0], words, offsets);
        if (which == 0) {
          wgmma_wait<0>();
          if (!is_first) add_scaled<kWidth>(sums, group_sums, scales);
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) scales[b] = blocks.scales(group, b);
          issue_batch<kWidth, false>(group_sums, weight[0], act);
        } else {
          issue_batch<kWidth, true>(group_sums, weight[0], act);
          if (!is_single) blocks.read_group(group, groups_sh(slot), 0, lane);
        }
        wgmma_wait<1>();  // the stage before is done
        if (!(is_first && which == 0)) mbarrier_arrive(empty(released));
        released = slot;
        decode_batch(weight[1], words + kBatchTiles, offsets);
        issue_batch<kWidth, true>(group_sums, weight[1], act + 2 * kBatchTiles);
        if (which == 1 && !is_single) blocks.prepare(offsets, group);
        wgmma_wait<1>();  // the first batch is done: its registers are free
      }
      pair.advance();
    }
    wgmma_wait<0>();
    if (range.begin < range.end) {
      mbarrier_arrive(empty(released));
      add_scaled<kWidth>(sums, group_sums, scales);
    }
  }

  // A single group's scales belong to whole columns: they are applied at the end.
  template <class Blocks>
  __device__ __forceinline__ void apply_final_scales(Sums& sums, const Blocks& blocks) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const float scales[2] = {blocks.final_scale(b, 0), blocks.final_scale(b, 1)};
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums.v[b][i] *= scales[i / 2 % 2];
    }
  }

 private:
  // Multiplies a batch. If it does not add, it takes the place of the sums.
  template <int kWidth, bool kAdds>
  static __device__ __forceinline__ void issue_batch(Sums& sums, const u32 (&weight)[kBatchTiles][kBlocks][4],
                                                     u64 act) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBatchTiles; ++i)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
        if (kAdds || i > 0)
          wgmma(T{}, first_of<kWidth / 2>(sums.v[b]), weight[i][b], act + 2 * i);
        else
          wgmma<false>(T{}, first_of<kWidth / 2>(sums.v[b]), weight[i][b], act);
    wgmma_commit();
  }

  template <int kWidth>
  static __device__ __forceinline__ void add_scaled(Sums& sums, const Sums& group_sums, const u32 (&scales)[kBlocks]) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const float pair[2] = {low_float(T{}, scales[b]), high_float(T{}, scales[b])};
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) sums.v[b][i] += group_sums.v[b][i] * pair[i / 2 % 2];
    }
  }

  static __device__ __forceinline__ void decode_batch(u32 (&weight)[kBatchTiles][kBlocks][4],
                                                      const u32 (*words)[kWords],
                                                      const typename D::Offsets (&offsets)[kBlocks]) {
#pragma unroll
    for (int i = 0; i < kBatchTiles; ++i)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) D::decode(weight[i][b], words[i] + b * L::kBlockWords, offsets[b]);
  }

  static __device__ __forceinline__ void decode_batch(u32 (&weight)[kBatchTiles][kBlocks][4],
                                                      const u32 (*words)[kWords], const Constants& constants) {
#pragma unroll
    for (int i = 0; i < kBatchTiles; ++i)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        D::decode(weight[i][b], words[i] + b * L::kBlockWords, constants.offsets[b]);
        scale<T>(weight[i][b], constants.scales[b]);
      }
  }

  // ---- where things are ---------------------------------------------------------------------------------------------

  // Two groups of all tiles side by side where tokens and weights come in boxes; else two groups tile by tile.
  __device__ __forceinline__ u32 groups_sh(int slot) const {
    return shared + kStages * kStageBytes + slot * kStageGroupBytes;
  }
  __device__ __forceinline__ u32 tile_sh(int slot, int tile, int w) const {
    const int place = (w / kBoxTiles * kStageTiles + tile) * kBoxTiles + w % kBoxTiles;
    return shared + slot * kStageBytes + kActBytes + place * (L::kTileWords * 4);
  }
  __device__ __forceinline__ u32 full(int slot) const { return barriers + 8 * slot; }
  __device__ __forceinline__ u32 empty(int slot) const { return barriers + 8 * (kStages + slot); }

  const u32 shared, barriers;
};

// kScalesSums: scales are applied to a group's sums, and a group has two stages or is the only one.
template <class T, int kBits, int kTokens, int kStages, bool kScalesSums>
class HopperGemm {
  // With 8 bits, where memory takes nearly all the time, and scales on sums copies by warps are up to 3 % faster.
  // Otherwise the hardware's are (H100 80GB HBM3, 2026-11-26).
  static constexpr CopiedBy kCopiedBy = kBits == 8 && kScalesSums ? CopiedBy::kWarps : CopiedBy::kHardware;
  using Core = HopperTile<T, kBits, kTokens, kStages, kCopiedBy, OneRegister>;
  using Tile = Patches<T, kTokens, Core::kColumns>;
  static constexpr int kStepStages = kScalesSums ? 2 : 1;  // of a step, in which splits and runs are counted
  static_assert(!kScalesSums || kTokens <= 64, "two sets of sums must fit the registers");
  static_assert(!kScalesSums || kStages % kStepStages == 0, "a step does not go round the ring's end");
  static_assert(Tile::kReceivedBytes <= Core::kRingBytes, "parts of sums come where the stages were");
  using Registers = HopperRegisters<1>;
  static constexpr int kStepRows = kStepStages * Core::kStageRows;

 public:
  static constexpr int kThreads = Core::kThreads;
  static constexpr int kSharedBytes = Core::kRingBytes + Core::kBarrierBytes + 8;

  // grid: (splits, tiles of 256 columns, tiles of tokens); without a workspace the splits of a tile form a cluster. If
  // blocks share all tiles evenly (num_splits is negative): (blocks).
  static __device__ __forceinline__ void run(const TensorMap& a_map, const TensorMap& qweight_map,
                                             const GemmArguments& args) {
    static_assert(Core::kByHardware, "warps copy without maps");
    run_from(Maps{a_map, qweight_map}, args);
  }
  static __device__ __forceinline__ void run(const GemmArguments& args) {
    static_assert(!Core::kByHardware, "the hardware copies with maps");
    run_from(NoMaps{}, args);
  }

 private:
  struct Maps {
    const TensorMap &a, &qweight;
  };
  struct NoMaps {};

  template <class Source>
  static __device__ __forceinline__ void run_from(const Source& maps, const GemmArguments& args) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 barriers = shared_address(shared) + Core::kRingBytes;
    const Core core(shared, barriers);
    const HopperGemm gemm{args, core, barriers + Core::kBarrierBytes, args.size_k / kStepRows, share_of(args)};
    core.init_barriers();
    if (threadIdx.x == 0 && splits_are_cluster(args)) gemm.expect_parts();
    start_next_launch();
    if (core.warp >= Core::kMathWarps) gemm.prefetch();
    wait_for_last_launch();
    __syncthreads();
    if (core.warp >= Core::kMathWarps) {
      give_registers<Registers::kCopy>();
      if (core.copies()) gemm.copy(maps);
      __syncwarp();
      if (splits_are_cluster(args)) cluster_leave();  // with the warps that multiply
    } else {
      take_registers<Registers::kMath>();
      gemm.multiply(shared_address(shared));
    }
  }

  // The block's steps, counted through all tiles of columns.
  static __device__ __forceinline__ StepRange share_of(const GemmArguments& args) {
    const int tile_steps = args.size_k / kStepRows, first = blockIdx.y * tile_steps;
    const int tiles_n = (args.size_n + Core::kColumns - 1) / Core::kColumns;
    if (args.num_splits < 0) return Runs{tile_steps, tiles_n * tile_steps, -args.num_splits}.of(blockIdx.x);
    const StepRange range = split_steps(tile_steps, blockIdx.x, args.num_splits);
    return {first + range.begin, first + range.end};
  }

  // What the block has of one tile; it may be nothing, if there are more splits than steps.
  struct Segment {
    int tile;
    StepRange steps;  // counted through all tiles

    __device__ __forceinline__ int num_steps() const { return steps.end - steps.begin; }
  };
  __device__ __forceinline__ Segment segment(int begin) const {
    const int tile = u32(begin) / u32(tile_steps);
    return {tile, {begin, min(share.end, (tile + 1) * tile_steps)}};
  }
  __device__ __forceinline__ StepRange stages_of(const Segment& segment) const {
    const int first = segment.tile * tile_steps;
    return {(segment.steps.begin - first) * kStepStages, (segment.steps.end - first) * kStepStages};
  }

  // Tiles past the last column repeat the last: what comes of them is not stored.
  __device__ __forceinline__ int tile_n(const Segment& segment) const {
    return min(segment.tile * Core::kWarpgroupWarps + core.warp % Core::kWarpgroupWarps,
               args.size_n / kTileColumns - 1);
  }

  // What is needed first, into L2: all that may be done before the kernel before us is through.
  __device__ __forceinline__ void prefetch() const {
    constexpr int kLineWords = 32, kTileLines = Core::L::kTileWords / kLineWords;
    const Segment first = segment(share.begin);
    const StepRange stages = stages_of(first);
    const int rows = min(stages.end - stages.begin, kStages) * Core::kStageTiles;
    const u32* tile = args.qweight + i64(stages.begin) * Core::kStageTiles * args.qweight_stride +
                      i64(tile_n(first)) * Core::L::kTileWords;
    for (int line = core.lane; line < rows * kTileLines; line += kWarpLanes)
      prefetch_l2(tile + line / kTileLines * args.qweight_stride + line % kTileLines * kLineWords);
    const i64 group = args.group_size < args.size_k ? stages.begin * Core::kStageRows / args.group_size : 0;
    if (core.lane == 0) prefetch_l2(args.scales + group * args.scales_stride + tile_n(first) * kTileColumns);
    if (core.lane == 1 && args.qzeros)
      prefetch_l2(args.qzeros + group * args.qzeros_stride + tile_n(first) * Core::L::kTileZeroWords);
  }

  // What a part of a tile is copied from.
  __device__ __forceinline__ auto source_of(const Segment& now) const {
    const int first_token = blockIdx.z * kTokens;
    if constexpr (Core::kByHardware)
      return core.make_boxes(args, now.tile * Core::kWarpgroupWarps, first_token, stages_of(now));
    else
      return core.make_copier(args.a + i64(first_token) * args.a_stride, args, tile_n(now), stages_of(now),
                              [&](int token) { return min(token, args.size_m - 1 - first_token) * args.a_stride; });
  }

  template <class Source>
  __device__ __forceinline__ void copy(const Source& maps) const {
    typename Core::Slot slot;
    int next = -Core::kUnpublished;
#pragma unroll 1
    for (int step = share.begin; step < share.end;) {
      const Segment now = segment(step);
      const int num_stages = now.num_steps() * kStepStages;
      auto source = source_of(now);
#pragma unroll 1
      for (int stage = 0; stage < num_stages; ++stage, slot.advance()) {
        core.wait_empty(slot);
        if constexpr (Core::kByHardware) {
          core.load_stage(source, slot, maps.a, maps.qweight);
        } else {
          core.copy_stage(source, slot, args.qweight_stride, args.group_size);
          core.publish(next);
        }
      }
      step = now.steps.end;
    }
    if constexpr (!Core::kByHardware) core.publish_last(next);
  }

  __device__ __forceinline__ void multiply(u32 shared) const {
    RingSlot<kStages / kStepStages> slot;
    int step = share.begin;
#pragma unroll 1
    do {
      const Segment now = segment(step);
      const typename Core::OwnBlocks blocks(args, core, tile_n(now));
      const bool is_single = args.group_size >= args.size_k;
      typename Core::Sums sums;
      if constexpr (kScalesSums)
        core.multiply_pairs(sums, slot, blocks, is_single, stages_of(now));
      else
        core.multiply(sums, slot, blocks, args.group_size, stages_of(now));
      if (is_single) core.apply_final_scales(sums, blocks);
      finish(sums, now, shared);
      step = now.steps.end;
    } while (step < share.end);
  }

  __device__ __forceinline__ void finish(const typename Core::Sums& sums, const Segment& now, u32 shared) const {
    const Tile patches(args, now.tile, blockIdx.z, core.lane);
    const int first_patch = core.warp % Core::kWarpgroupWarps * Core::kWarpgroups + core.warpgroup;
    if (splits_are_cluster(args)) {
      // All blocks of the cluster are done with their stages, where parts may go now. What they read has arrived, so
      // this barrier has no memory to order.
      cluster_leave();
      patches.send(sums.v, first_patch, shared, parts_barrier);
      barrier_some<Core::kMathThreads>();
      mbarrier_wait(parts_barrier, 0);
      patches.template finish_received<Core::kMathWarps>(shared, core.warp);
    } else if (args.num_splits > 1) {
      patches.store_parts(sums.v, first_patch, patches.place_of(blockIdx.x));
    } else if (now.num_steps() < tile_steps) {
      patches.store_parts(sums.v, first_patch, Runs::place(blockIdx.x, share, now.tile * tile_steps));
    } else {
      patches.store_whole(sums.v, first_patch);
    }
  }

  // Before any block of the cluster sends: cluster_leave lies between.
  __device__ __forceinline__ void expect_parts() const {
    mbarrier_init(parts_barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expecting(parts_barrier, Tile(args, blockIdx.y, blockIdx.z, 0).expected_bytes(blockIdx.x));
  }

 public:
  const GemmArguments& args;
  const Core& core;
  const u32 parts_barrier;
  const int tile_steps;
  const StepRange share;
};

// The second launch when parts of tiles were left in the workspace.
template <class T, int kTokens, int kStepRows>
class HopperSum {
 public:
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 0;

  // grid: (eights of tokens, tiles of 256 columns, tiles of tokens); a warp finishes a patch.
  static __device__ __forceinline__ void run(const GemmArguments& args) {
    start_next_launch();
    wait_for_last_launch();
    const Patches<T, kTokens, 256> patches(args, blockIdx.y, blockIdx.z, threadIdx.x % kWarpLanes);
    const int patch = (blockIdx.x * kThreads + threadIdx.x) / kWarpLanes, tile_steps = args.size_k / kStepRows;
    if (args.num_splits > 0)
      patches.finish_parts(patch);
    else
      patches.finish_parts(patch, {tile_steps, int(gridDim.y) * tile_steps, -args.num_splits}, blockIdx.y);
  }
};

}  // namespace marlin
