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

template <class T, int kBits, int kTokens, int kStages, int kResidentBlocks>
class HopperGemm {
  using L = Layout<kBits>;
  using D = Decoder<T, kBits>;

  static constexpr int kWarpgroups = 2;
  static constexpr int kWarpgroupWarps = 4;
  static constexpr int kMathWarps = kWarpgroups * kWarpgroupWarps;
  static constexpr int kMathThreads = kMathWarps * kWarpLanes;
  static constexpr int kCopyWarps = kWarpgroupWarps;
  static constexpr int kCopyThreads = kCopyWarps * kWarpLanes;
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
  static constexpr int kActLoads = kTokens / kRoundTokens;       // cp.async of a copying thread in a stage
  static_assert(kRoundTokens % 8 == 0, "the swizzle of a thread's chunk is the same in every round");
  static constexpr int kActBytes = kTokens * kStageRows * 2;
  static constexpr int kWeightBytes = kStageTiles * kWarpgroupWarps * L::kTileWords * 4;
  static constexpr int kStageBytes = kActBytes + kWeightBytes;
  static constexpr int kSumBytes = SumTile<kColumns>::bytes(kTokens);
  static constexpr int kBarriersOffset = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static_assert(kStageBytes % 1024 == 0 && kActBytes % 1024 == 0, "a swizzle pattern starts on 1024 bytes");
  static_assert(kStages >= 3, "a stage must be on its way while one is multiplied and another not yet released");

 public:
  static constexpr int kThreads = (kMathWarps + kCopyWarps) * kWarpLanes;
  // A multiprocessor has 65536 registers: 168 for each of these threads, in multiples of 8, or 80 when it holds two
  // blocks. Few sums leave room for two, whose decoding hides each other's waiting.
  static_assert(kResidentBlocks == 1 || (kResidentBlocks == 2 && kTokens == 32), "the sums must fit the registers");
  static constexpr int kEntryRegisters = kResidentBlocks == 2 ? 80 : 168;
  static constexpr int kCopyRegisters = kResidentBlocks == 2 ? 32 : 56;
  static constexpr int kMathRegisters = kResidentBlocks == 2 ? 104 : 224;
  static_assert(kCopyThreads * kCopyRegisters + kMathThreads * kMathRegisters == kThreads * kEntryRegisters,
                "what some give is what others take");
  static_assert(kThreads == 384, "the shares of registers are counted for three warpgroups");
  static constexpr int kSharedBytes = kBarriersOffset + 2 * kStages * 8;

  // grid: (splits, tiles of 256 columns, tiles of tokens); without a workspace the splits of a tile form a cluster.
  static __device__ __forceinline__ void run(const GemmArguments& args) {
    extern __shared__ __align__(1024) unsigned char shared[];
    HopperGemm gemm(args, shared);
    gemm.init_barriers();
    start_next_launch();
    wait_for_last_launch();
    __syncthreads();
    const StepRange range = split_steps(args.size_k / kStageRows, blockIdx.x, args.num_splits);
    const SumTile<kColumns> tile{reinterpret_cast<float*>(shared)};
    if (gemm.warp >= kMathWarps) {
      give_registers<kCopyRegisters>();
      gemm.copy(range);
      skip_finish(args);
    } else {
      take_registers<kMathRegisters>();
      Sums sums;
      gemm.multiply(sums, range);
      barrier_some<kMathThreads>();  // the sums go where the stages were
      gemm.deposit(sums, tile);
      barrier_some<kMathThreads>();
      finish_tile<T, kColumns>(args, tile, blockIdx.x, gemm.first_token, kTokens, blockIdx.y * kColumns, kMathThreads);
    }
  }

 private:
  struct Sums {
    float v[kBlocks][kSums] = {};
  };

  // What turns a word of one block into weights.
  struct Constants {
    typename D::Offsets offsets[kBlocks];
    u32 scales[kBlocks][2];
  };

  __device__ __forceinline__ HopperGemm(const GemmArguments& args, unsigned char* shared)
      : args(args),
        shared(shared_address(shared)),
        warp(__shfl_sync(0xffffffffu, threadIdx.x / kWarpLanes, 0)),  // the same in all lanes, and the compiler knows
        lane(threadIdx.x % kWarpLanes),
        warpgroup(warp / kWarpgroupWarps),
        first_token(blockIdx.z * kTokens) {}

  __device__ __forceinline__ void init_barriers() const {
    if (threadIdx.x == 0)
      for (int slot = 0; slot < kStages; ++slot) {
        mbarrier_init(full(slot), kCopyThreads);
        mbarrier_init(empty(slot), kMathWarps);
      }
  }

  // Which slot of the ring a step uses, and the parity of the barriers' phase in that round.
  struct Place {
    int slot = 0;
    u32 parity = 0;
    __device__ __forceinline__ void advance() {
      if (++slot == kStages) slot = 0, parity ^= 1;
    }
  };

  // ---- the copying warps --------------------------------------------------------------------------------------------

  // What one copying thread fetches for every stage. Pointers move on; nothing is computed twice.
  struct Copier {
    const u16* act_gl_rd;             // its chunk of the block's first token
    int token_offsets[kActLoads];     // from there to its tokens
    const u32* weights_gl_rd;         // the warp's tile
    u32 act_sh_wr, weights_sh_wr;     // in slot 0
  };

  __device__ __forceinline__ Copier make_copier(StepRange range) const {
    const int thread = threadIdx.x - kMathThreads, chunk = thread % kRowChunks, first = thread / kRowChunks;
    const int w = warp - kMathWarps;
    Copier copier;
    copier.act_gl_rd = args.a + i64(first_token) * args.a_stride + i64(range.begin) * kStageRows + 8 * chunk;
#pragma unroll
    for (int i = 0; i < kActLoads; ++i)
      // Tokens past the last repeat it: they are columns of the product that nobody stores.
      copier.token_offsets[i] = min(first + i * kRoundTokens, args.size_m - 1 - first_token) * int(args.a_stride);
    copier.weights_gl_rd = args.qweight + i64(range.begin) * kStageTiles * args.qweight_stride +
                           i64(tile_n(w)) * L::kTileWords;
    copier.act_sh_wr = shared + (first * kRowChunks + (chunk ^ (first % 8))) * 16;
    copier.weights_sh_wr = tile_sh(0, 0, w);
    return copier;
  }

  __device__ __forceinline__ void copy(StepRange range) const {
    Copier copier = make_copier(range);
    Place place;
#pragma unroll 1  // there are few registers here
    for (int step = range.begin; step < range.end; ++step) {
      if (step >= range.begin + kStages) mbarrier_wait(empty(place.slot), place.parity ^ 1);
      copy_stage(copier, place.slot * kStageBytes);
      mbarrier_arrive_after_copies(full(place.slot));
      place.advance();
    }
    cp_async_wait_all();  // a block must not leave while copies to it are under way
  }

  __device__ __forceinline__ void copy_stage(Copier& copier, u32 slot_offset) const {
#pragma unroll
    for (int i = 0; i < kActLoads; ++i)
      cp_async_16(copier.act_sh_wr + slot_offset + i * (kRoundTokens * kRowChunks * 16),
                  copier.act_gl_rd + copier.token_offsets[i]);
    copier.act_gl_rd += kStageRows;
#pragma unroll
    for (int i = 0; i < kStageTiles; ++i) {
      copy_tile<kBits>(copier.weights_sh_wr + slot_offset + i * (kWarpgroupWarps * L::kTileWords * 4),
                       copier.weights_gl_rd, lane);
      copier.weights_gl_rd += args.qweight_stride;
    }
  }

  // ---- the multiplying warps ----------------------------------------------------------------------------------------

  __device__ __forceinline__ void multiply(Sums& sums, StepRange range) const {
    const GroupReader<T, kBits> groups(args, tile_n(warp % kWarpgroupWarps), lane);
    const int first_row = range.begin * kStageRows, last_group = (args.size_k - 1) / args.group_size;
    int group = first_row / args.group_size;
    int rows_left = 0;                                                // of the group whose constants we hold
    int next_rows = args.group_size - first_row % args.group_size;    // of the group that is on its way
    LaneGroup<kBits> next_group;
    groups.read(next_group, min(group, last_group), lane);
    Constants constants;

    u32 weight[kBatches][kBatchTiles][kBlocks][4];  // one batch is multiplied while the next is decoded
    const u32 words_sh = words_place();
    Place place;
    int released = 0;
    for (int step = range.begin; step < range.end; ++step) {
      mbarrier_wait(full(place.slot), place.parity);
      fence_proxy_async();
      u32 words[kStageTiles][kWords];
      load_words(words, place.slot, words_sh);
      const u64 act = wgmma_descriptor(shared + place.slot * kStageBytes);
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch) {
        if (rows_left == 0) {
          constants = prepare(groups, next_group);
          rows_left = next_rows;
          next_rows = args.group_size;
          groups.read(next_group, min(++group, last_group), lane);
        }
        rows_left -= kBatchRows;
        decode_batch(weight[batch], words + batch * kBatchTiles, constants);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBatchTiles; ++i)
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
            wgmma(T{}, sums.v[b], weight[batch][i][b], act + 2 * (batch * kBatchTiles + i));
        wgmma_commit();
        // The batch before is done: its registers are free, and after a stage's last batch so is its slot.
        wgmma_wait<1>();
        if (batch == 0) {
          __syncwarp();  // all lanes have read their words
          if (step > range.begin && lane == 0) mbarrier_arrive(empty(released));
          released = place.slot;
        }
      }
      place.advance();
    }
    wgmma_wait<0>();
  }

  // Where the lane's words of its warpgroup's blocks lie in a row of tiles.
  __device__ __forceinline__ u32 words_place() const {
    return (warp % kWarpgroupWarps * L::kTileWords + lane * L::kLaneWords + warpgroup * kWords) * 4;
  }

  __device__ __forceinline__ void load_words(u32 (&words)[kStageTiles][kWords], int slot, u32 place) const {
#pragma unroll
    for (int i = 0; i < kStageTiles; ++i) load_shared(words[i], tile_sh(slot, i, 0) + place);
  }

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

  __device__ __forceinline__ Constants prepare(const GroupReader<T, kBits>& groups,
                                               const LaneGroup<kBits>& group) const {
    Constants constants;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const u32 scales = warpgroup == 0 ? groups.scales(group, b) : groups.scales(group, kBlocks + b);
      const u32 zeros = warpgroup == 0 ? groups.zeros(group, b) : groups.zeros(group, kBlocks + b);
      constants.offsets[b] = D::offsets(zeros);
      constants.scales[b][0] = low_twice(scales);
      constants.scales[b][1] = high_twice(scales);
    }
    return constants;
  }

  // Lane l holds columns l/4 + 8 m of its warp's tile, tokens 8 t + 2 (l mod 4) and + 1.
  __device__ __forceinline__ void deposit(const Sums& sums, const SumTile<kColumns>& tile) const {
    const int w = warp % kWarpgroupWarps;
    const GroupReader<T, kBits> groups(args, tile_n(w), lane);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = 2 * (kBlocks * warpgroup + b) + half;
        const float scale = groups.final_scale(lane, m);
#pragma unroll
        for (int t = 0; t < kTokens / 8; ++t)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            tile.at(8 * t + 2 * (lane % 4) + i, w * kTileColumns + lane / 4 + 8 * m) =
                scale * sums.v[b][4 * t + 2 * half + i];
      }
  }

  // ---- where things are ---------------------------------------------------------------------------------------------

  // Tiles past the last column repeat the last: what comes of them is not stored.
  __device__ __forceinline__ int tile_n(int w) const {
    return min(int(blockIdx.y) * kWarpgroupWarps + w, args.size_n / kTileColumns - 1);
  }
  __device__ __forceinline__ u32 tile_sh(int slot, int tile, int w) const {
    return shared + slot * kStageBytes + kActBytes + (tile * kWarpgroupWarps + w) * (L::kTileWords * 4);
  }
  __device__ __forceinline__ u32 full(int slot) const { return shared + kBarriersOffset + 8 * slot; }
  __device__ __forceinline__ u32 empty(int slot) const { return shared + kBarriersOffset + 8 * (kStages + slot); }

  const GemmArguments& args;
  const u32 shared;
  const int warp, lane, warpgroup, first_token;
};

}  // namespace marlin
