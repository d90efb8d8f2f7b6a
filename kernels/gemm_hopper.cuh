// The GEMM for many tokens on compute capability 9.0: wgmma, fed by a warpgroup that does nothing but copy.
//
// A block computes 256 columns by 32 to 128 tokens. Each of a warpgroup's four warps takes one tile of 64 columns,
// and block j of the four tiles together is one m64 operand A, transposed and in registers: a lane's words serve
// without a shuffle. The first warpgroup multiplies blocks 0 and 1 of every tile, the second blocks 2 and 3, so each
// weight is decoded once per block. Operand B is the tokens, in shared memory with 128-byte swizzle.
//
// Two mbarriers per stage: `full` says that the copies have arrived, `empty` that all eight multiplying warps are done
// with them.
#pragma once

#include "gemm_base.cuh"
#include "wgmma.cuh"

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
template <class T, int kBits, int kTokens, int kRingStages>
class HopperTile {
  using D = Decoder<T, kBits>;

 public:
  using L = Layout<kBits>;

  static constexpr int kStages = kRingStages;
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
        mbarrier_init(full(slot), kCopyThreads);
        mbarrier_init(empty(slot), kMathWarps);
      }
  }

  using Slot = RingSlot<kStages>;

  // ---- the copying warps --------------------------------------------------------------------------------------------

  // What one copying thread fetches for every stage. Pointers move on; nothing is computed twice.
  struct Copier {
    const u16* act_gl_rd;             // its chunk of row 0
    u32 token_offsets[kActLoads];     // from there to its tokens, in chunks of eight numbers
    const u32* weights_gl_rd;         // the warp's tile
    GroupCopier<kBits> groups;        // of that tile
    GroupEnds<kStageRows> ends;
    int group, num_groups;            // `group` is copied next
  };

  // For a tile and a range of stages. `offset_of` a token in numbers, a multiple of 8; what lies past the last token is
  // a column that nobody stores.
  template <class OffsetOf>
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
    for (int i = 0; i < kActLoads; ++i) copier.token_offsets[i] = u32(offset_of(first + i * kRoundTokens) / 8);
    return copier;
  }

  // A slot that was never used counts as empty.
  __device__ __forceinline__ void wait_empty(const Slot& slot) const {
    mbarrier_wait(empty(slot.index), slot.parity ^ 1);
  }

  // Tokens from `num_tokens` on need not be copied.
  __device__ __forceinline__ void copy_stage(Copier& copier, const Slot& slot, i64 qweight_stride, int group_size,
                                             int num_tokens = kTokens) const {
    const int thread = threadIdx.x - kMathThreads, chunk = thread % kRowChunks, first = thread / kRowChunks;
    const u32 stage = shared + slot.index * kStageBytes;
    const u32 act_sh_wr = stage + (first * kRowChunks + (chunk ^ (first % 8))) * 16;
#pragma unroll
    for (int i = 0; i < kActLoads; ++i)
      if (i * kRoundTokens < num_tokens && (kTokens % kRoundTokens == 0 || first + i * kRoundTokens < kTokens))
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
      copier.groups.copy(groups_sh(slot.index, warp - kMathWarps, 0), copier.group,
                         min(count, copier.num_groups - copier.group));
      copier.group += count;
    }
    mbarrier_arrive_after_copies(full(slot.index));
  }

  // ---- the multiplying warps ----------------------------------------------------------------------------------------

  struct Sums {
    float v[kBlocks][kSums] = {};
  };

  // What turns a word of one block into weights.
  struct Constants {
    typename D::Offsets offsets[kBlocks];
    u32 scales[kBlocks][2];

    __device__ __forceinline__ void set(int b, u32 pair_of_scales, u32 pair_of_zeros) {
      offsets[b] = D::offsets(pair_of_zeros);
      scales[b][0] = low_twice(pair_of_scales);
      scales[b][1] = high_twice(pair_of_scales);
    }
  };

  // Which blocks a warp multiplies: those of its warpgroup, blocks 0 and 1 or 2 and 3 of one tile.
  class OwnBlocks {
   public:
    using Group = LaneGroup<kBits, kBlocks>;

    __device__ __forceinline__ OwnBlocks(const GemmArguments& args, const HopperTile& core, int tile_n)
        : groups(args, tile_n, core.lane, kBlocks * core.warpgroup), core(core) {}

    __device__ __forceinline__ void read(Group& into, int group) const { groups.read(into, group, core.lane); }
    // The same from shared memory, counted from where the first tile has its own.
    __device__ __forceinline__ void read_group(Group& into, u32 first_sh, int lane) const {
      const u32 group_sh = first_sh + core.warp % kWarpgroupWarps * kTileGroupBytes;
      groups.read_shared(into, group_sh, group_sh + kTileColumns * 2, lane);
    }
    __device__ __forceinline__ void prepare(Constants& constants, const Group& group) const {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) constants.set(b, groups.scales(group, b), groups.zeros(group, b));
    }
    // Where the lane's words lie in a row of tiles.
    __device__ __forceinline__ u32 words_place() const {
      return (core.warp % kWarpgroupWarps * L::kTileWords + core.lane * L::kLaneWords + core.warpgroup * kWords) * 4;
    }
    __device__ __forceinline__ void load_words(u32 (&words)[kWords], u32 row_sh) const { load_shared(words, row_sh); }
    __device__ __forceinline__ float final_scale(int b, int half) const {
      return groups.final_scale(core.lane, 2 * b + half);
    }
    // The column of its block b, of the block's 256.
    __device__ __forceinline__ int first_column(int b) const {
      return core.warp % kWarpgroupWarps * kTileColumns + (kBlocks * core.warpgroup + b) * kBlockColumns;
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
      fence_proxy_async();
      u32 words[kStageTiles][kWords];
#pragma unroll
      for (int i = 0; i < kStageTiles; ++i) blocks.load_words(words[i], tile_sh(slot.index, i, 0) + words_sh);
      const bool is_end = ends.take();
      if (is_end) blocks.read_group(group[1], groups_sh(slot.index, 0, every_batch), group_lane);
      if (every_batch) blocks.read_group(group[0], groups_sh(slot.index, 0, 0), group_lane);
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
          __syncwarp();  // all lanes have read their words
          if (step > range.begin && lane == 0) mbarrier_arrive(empty(released));
          released = slot.index;
        }
      }
      slot.advance();
    }
    wgmma_wait<0>();
    if (range.begin < range.end && lane == 0) mbarrier_arrive(empty(released));
  }

  // Puts the sums where any thread can read them. Lane l holds columns l/4 and l/4 + 8 of a block, tokens
  // 8 t + 2 (l mod 4) and + 1.
  template <class Blocks>
  __device__ __forceinline__ void deposit(const Sums& sums, const Blocks& blocks, const SumTile<kColumns>& tile) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = blocks.final_scale(b, half);
#pragma unroll
        for (int t = 0; t < kTokens / 8; ++t)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            tile.at(8 * t + 2 * (lane % 4) + i, blocks.first_column(b) + lane / 4 + 8 * half) =
                scale * sums.v[b][4 * t + 2 * half + i];
      }
  }

 private:
  static __device__ __forceinline__ void decode_batch(u32 (&weight)[kBatchTiles][kBlocks][4],
                                                      const u32 (*words)[kWords], const Constants& constants) {
#pragma unroll
    for (int i = 0; i < kBatchTiles; ++i)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        D::decode(weight[i][b], words[i] + b * L::kBlockWords, constants.offsets[b]);
        scale<T>(weight[i][b], constants.scales[b][0], constants.scales[b][1]);
      }
  }

  // ---- where things are ---------------------------------------------------------------------------------------------

  __device__ __forceinline__ u32 groups_sh(int slot, int w, int which) const {
    return shared + kStages * kStageBytes + slot * kStageGroupBytes + w * kTileGroupBytes + which * L::kGroupBytes;
  }
  __device__ __forceinline__ u32 tile_sh(int slot, int tile, int w) const {
    return shared + slot * kStageBytes + kActBytes + (tile * kWarpgroupWarps + w) * (L::kTileWords * 4);
  }
  __device__ __forceinline__ u32 full(int slot) const { return barriers + 8 * slot; }
  __device__ __forceinline__ u32 empty(int slot) const { return barriers + 8 * (kStages + slot); }

  const u32 shared, barriers;
};

template <class T, int kBits, int kTokens, int kStages, int kResidentBlocks>
class HopperGemm {
  using Core = HopperTile<T, kBits, kTokens, kStages>;
  static constexpr int kColumns = Core::kColumns;
  static constexpr int kSumBytes = SumTile<kColumns>::bytes(kTokens);
  static constexpr int kBarriersOffset = Core::kRingBytes > kSumBytes ? Core::kRingBytes : kSumBytes;
  static_assert(kResidentBlocks == 1 || kTokens == 32, "the sums must fit the registers");
  using Registers = HopperRegisters<kResidentBlocks>;

 public:
  static constexpr int kThreads = Core::kThreads;
  static constexpr int kSharedBytes = kBarriersOffset + Core::kBarrierBytes;

  // grid: (splits, tiles of 256 columns, tiles of tokens); without a workspace the splits of a tile form a cluster.
  static __device__ __forceinline__ void run(const GemmArguments& args) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const Core core(shared, shared_address(shared) + kBarriersOffset);
    core.init_barriers();
    start_next_launch();
    wait_for_last_launch();
    __syncthreads();
    const StepRange range = split_steps(args.size_k / Core::kStageRows, blockIdx.x, args.num_splits);
    if (core.warp >= Core::kMathWarps) {
      give_registers<Registers::kCopy>();
      copy(args, core, range);
      skip_finish(args);
    } else {
      take_registers<Registers::kMath>();
      multiply(args, core, range, {reinterpret_cast<float*>(shared)});
    }
  }

 private:
  // Tiles past the last column repeat the last: what comes of them is not stored.
  static __device__ __forceinline__ int tile_n(const GemmArguments& args, int w) {
    return min(int(blockIdx.y) * Core::kWarpgroupWarps + w, args.size_n / kTileColumns - 1);
  }

  static __device__ __forceinline__ void copy(const GemmArguments& args, const Core& core, StepRange range) {
    const int first_token = blockIdx.z * kTokens;
    typename Core::Copier copier =
        core.make_copier(args.a + i64(first_token) * args.a_stride, args, tile_n(args, core.warp - Core::kMathWarps),
                         range, [&](int token) { return min(token, args.size_m - 1 - first_token) * args.a_stride; });
    typename Core::Slot slot;
#pragma unroll 1  // there are few registers here
    for (int step = range.begin; step < range.end; ++step) {
      core.wait_empty(slot);
      core.copy_stage(copier, slot, args.qweight_stride, args.group_size);
      slot.advance();
    }
    cp_async_wait_all();  // a block must not leave while copies to it are under way
  }

  static __device__ __forceinline__ void multiply(const GemmArguments& args, const Core& core, StepRange range,
                                                  const SumTile<kColumns>& tile) {
    const typename Core::OwnBlocks blocks(args, core, tile_n(args, core.warp % Core::kWarpgroupWarps));
    typename Core::Sums sums;
    typename Core::Slot slot;
    core.multiply(sums, slot, blocks, args.group_size, range);
    barrier_some<Core::kMathThreads>();  // the sums go where the stages were
    core.deposit(sums, blocks, tile);
    barrier_some<Core::kMathThreads>();
    finish_tile<T, kColumns>(args, tile, blockIdx.x, blockIdx.z * kTokens, kTokens, blockIdx.y * kColumns,
                             Core::kMathThreads);
  }
};

}  // namespace marlin
