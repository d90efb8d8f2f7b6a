// A layer of experts for many tokens an expert, on compute capability 9.0: the dense kernel of gemm_hopper.cuh, which
// does not end with a tile.
//
// A block walks over the list of work: items times steps of columns. The copying warpgroup runs ahead, into the next
// item's first stages while this one's result still leaves. Rows are gathered by the copies' addresses.
//
// The multiplying warpgroups have half of a step's columns each and share nothing but the stages: each ends its part of
// a tile for itself, while the other may still multiply.
//
// With a gate, a step is 128 columns of the gate and the same 128 of the up projection, and a warpgroup has half of
// both. The warps of either put half of their rows, rounded, where the rows will leave from, and multiply what the
// others have put there with their own.
#pragma once

#include "experts.cuh"
#include "gemm_hopper.cuh"

namespace marlin {

// kTallest, kLower: rows of the tiles that there are, the tallest first. kScalesSums: as in HopperGemm, and for all
// heights, so that a row's bits do not depend on its tile's height, which follows from what other tokens choose.
template <class T, int kBits, int kStages, int kResidentBlocks, bool kScalesSums, Activation kActivation, int kTallest,
          int... kLower>
class HopperExperts {
  // Two blocks of a multiprocessor have few registers, too few for two sets of sums and every column's numbers twice.
  using Columns = ColumnsFor<kScalesSums && kResidentBlocks == 2>;
  using Core = HopperTile<T, kBits, kTallest, kStages, CopiedBy::kWarps, Columns>;
  static_assert(!kScalesSums || kStages % 2 == 0, "a pair of stages does not go round the ring's end");
  using L = typename Core::L;
  using Walk = RingSlot<kScalesSums ? kStages / 2 : kStages>;
  static constexpr bool kGated = kActivation != Activation::kNone;
  static constexpr int kOutColumns = kGated ? Core::kColumns / 2 : Core::kColumns;
  static constexpr int kStepTiles = kOutColumns / kTileColumns;
  static constexpr int kHeights[] = {kTallest, kLower...};
  static constexpr int kLowest = kHeights[sizeof...(kLower)];
  static constexpr int kOwnThreads = Core::kMathThreads / Core::kWarpgroups;
  static constexpr int kOwnColumns = kOutColumns / Core::kWarpgroups;
  static constexpr int kRowBytes = (kOwnColumns + 8) * 2;  // the padding spreads the rows of a fragment over the banks
  static constexpr int kListRowBytes = WorkList::kRowWords * 4;
  static constexpr int kOwnBytes = kTallest * (kRowBytes + 2 * kListRowBytes);
  static constexpr int kOutOffset = Core::kRingBytes;
  static constexpr int kBarriersOffset = kOutOffset + Core::kWarpgroups * kOwnBytes;

 public:
  static constexpr int kThreads = Core::kThreads;
  static constexpr int kSharedBytes = kBarriersOffset + Core::kBarrierBytes;
  using Registers = HopperRegisters<kResidentBlocks>;

  // grid: as many blocks as the GPU holds.
  static __device__ __forceinline__ void run(const ExpertArguments& args) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const Core core(shared, shared_address(shared) + kBarriersOffset);
    core.init_barriers();
    wait_for_last_launch();
    start_next_launch();
    __syncthreads();
    const HopperExperts experts(args, core, shared);
    if (core.warp >= Core::kMathWarps) {
      give_registers<Registers::kCopy>();
      experts.copy();
    } else {
      take_registers<Registers::kMath>();
      experts.multiply();
    }
  }

 private:
  __device__ __forceinline__ HopperExperts(const ExpertArguments& args, const Core& core, unsigned char* shared)
      : args(args),
        core(core),
        list{args.work, max_work_items(args.num_pairs, args.num_experts, kLowest)},
        columns(kGated ? args.size_n / 2 : args.size_n),
        num_steps((columns + kOutColumns - 1) / kOutColumns),
        ends(list.ends()),
        out_sh(shared_address(shared) + kOutOffset + core.warpgroup % Core::kWarpgroups * kOwnBytes),
        list_sh(out_sh + kTallest * kRowBytes) {}

  // Places are items times steps of columns. A block has one of every round; tall tiles come first and take longer, so
  // every other round goes backwards.
  __device__ __forceinline__ int place_of(int round) const {
    return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }

  // Tile w of a stage's four. Tiles past the last repeat it: what comes of them is not stored.
  __device__ __forceinline__ int tile_n(int step, int w) const {
    const int num_tiles = columns / kTileColumns;
    const int tile = min(step * kStepTiles + w % kStepTiles, num_tiles - 1);
    return kGated ? tile + w / kStepTiles * num_tiles : tile;
  }

  // Where the places of a height end, by how many lower ones there are.
  __device__ __forceinline__ int places_to(int num_lower) const {
    return ends[int(sizeof...(kLower)) - num_lower] * num_steps;
  }

  // Heights come one after the other, each in a loop of its own. Their stages follow each other in one ring, so the
  // copies run ahead into the next height, too.
  __device__ __forceinline__ void copy() const {
    typename Core::Slot slot;
    int round = 0, next = -Core::kUnpublished;
    copy_heights<kTallest, kLower...>(round, slot, next);
    core.publish_last(next);  // a block must not leave while copies to it are under way
  }

  template <int kRows, int... kOthers>
  __device__ __forceinline__ void copy_heights(int& round, typename Core::Slot& slot, int& next) const {
    const int w = core.warp - Core::kMathWarps;
    const int num_stages = args.size_k / Core::kStageRows;
    const int end = places_to(sizeof...(kOthers));
#pragma unroll 1
    for (int i = place_of(round); i < end; i = place_of(++round)) {
      const WorkItem item = list.item(i / num_steps);
      typename Core::Copier copier = core.template make_copier<kRows>(
          args.a, expert_weights(args, item.expert), tile_n(i % num_steps, w), {0, num_stages}, [&](int token) {
            const u32 pair = list.row(item.first + min(token, item.count - 1)).pair;
            return pair / u32(args.a_pairs) * args.a_stride;
          });
      copier.groups.prefetch(0);
#pragma unroll 1
      for (int stage = 0; stage < num_stages; ++stage) {
        core.wait_empty(slot);
        core.template copy_stage<kRows>(copier, slot, args.qweight_stride, args.group_size);
        slot.advance();
        core.publish(next);
      }
    }
    if constexpr (sizeof...(kOthers) > 0) copy_heights<kOthers...>(round, slot, next);
  }

  // Which blocks a warp multiplies: half of one of its warpgroup's two tiles, which are neighbours, or the gate's and
  // the up projection's. A gate is activated by warps 0 and 1 of the first warpgroup and 2 and 3 of the second, which
  // are at home in different quarters of a multiprocessor.
  class OwnBlocks {
   public:
    using Reader = GroupReader<T, kBits, Core::kBlocks>;
    using Group = typename Reader::Group;

    __device__ __forceinline__ OwnBlocks(const HopperExperts& experts, int place)
        : lane(experts.core.lane),
          w(tile_of(experts.core.warpgroup, experts.core.warp / 2 % 2)),
          tile_n(experts.tile_n(place % experts.num_steps, w)),
          first_block(experts.core.warp % 2 * Core::kBlocks),
          groups(expert_weights(experts.args, experts.list.item(place / experts.num_steps).expert), tile_n, lane,
                 first_block) {}

    __device__ __forceinline__ void read(Group& into, int group) const { groups.read(into, group, lane); }
    __device__ __forceinline__ void read_group(Group& into, u32 groups_sh, int which, int lane) const {
      const u32 group_sh = groups_sh + w * Core::kTileGroupBytes + which * L::kGroupBytes;
      groups.read_shared(into, group_sh, group_sh + kTileColumns * 2, lane);
    }
    __device__ __forceinline__ void prepare(typename Core::Constants& constants, const Group& group) const {
#pragma unroll
      for (int b = 0; b < Core::kBlocks; ++b) constants.set(b, groups.scales(group, b), groups.zeros(group, b));
    }
    __device__ __forceinline__ void prepare(typename Core::D::Offsets (&offsets)[Core::kBlocks],
                                            const Group& group) const {
#pragma unroll
      for (int b = 0; b < Core::kBlocks; ++b) offsets[b] = Core::D::offsets(groups.zeros(group, b));
    }
    __device__ __forceinline__ u32 scales(const Group& group, int b) const { return groups.scales(group, b); }
    __device__ __forceinline__ u32 words_place() const {
      return (w * L::kTileWords + lane * L::kLaneWords + first_block * L::kBlockWords) * 4;
    }
    __device__ __forceinline__ void load_words(u32 (&words)[Core::kWords], u32 row_sh) const {
      load_shared(words, row_sh);
    }
    __device__ __forceinline__ float final_scale(int b, int half) const {
      return groups.final_scale(lane, 2 * b + half);
    }
    // The first column of its block b: of all, and of the warpgroup's.
    __device__ __forceinline__ int column_n(int b) const {
      return tile_n * kTileColumns + (first_block + b) * kBlockColumns;
    }
    __device__ __forceinline__ int own_column(int b) const {
      return (kGated ? 0 : w % 2 * kTileColumns) + (first_block + b) * kBlockColumns;
    }
    __device__ __forceinline__ bool is_gate() const { return kGated && w < kStepTiles; }

   private:
    // Which of a stage's four tiles.
    static __device__ __forceinline__ int tile_of(int warpgroup, int which) {
      return kGated ? warpgroup + kStepTiles * (which ^ warpgroup) : 2 * warpgroup + which;
    }

    const int lane, w, tile_n, first_block;
    const Reader groups;
  };

  __device__ __forceinline__ void multiply() const {
    Walk slot;
    int round = 0;
    multiply_heights<kTallest, kLower...>(round, slot);
  }

  template <int kRows, int... kOthers>
  __device__ __forceinline__ void multiply_heights(int& round, Walk& slot) const {
    const int end = places_to(sizeof...(kOthers));
#pragma unroll 1
    for (int i = place_of(round); i < end; i = place_of(++round)) multiply_tile<kRows>(i, round % 2, slot);
    if constexpr (sizeof...(kOthers) > 0) multiply_heights<kOthers...>(round, slot);
  }

  template <int kRows>
  __device__ __forceinline__ void multiply_tile(int place, int buffer, Walk& slot) const {
    const OwnBlocks blocks(*this, place);
    fetch_rows<kRows>(list.item(place / num_steps), buffer);
    typename Core::Sums sums;
    add_product<kRows>(sums, slot, blocks);

    cp_async_wait_all();
    own_barrier();  // the rows of the list are there, and the last result has left
    // Read once more rather than kept: there are no registers to spare.
    const WorkItem item = list.item(place / num_steps);
    if constexpr (kGated) {
      constexpr int kHalf = kRows / 16 * 8;
      if (blocks.is_gate())
        deposit<true, false, kHalf, kRows>(sums, blocks, item, buffer);
      else
        deposit<false, false, 0, kHalf>(sums, blocks, item, buffer);
      own_barrier();
      if (blocks.is_gate())
        deposit<true, true, 0, kHalf>(sums, blocks, item, buffer);
      else
        deposit<false, true, kHalf, kRows>(sums, blocks, item, buffer);
    } else {
      deposit<false, false, 0, kRows>(sums, blocks, item, buffer);
    }
    own_barrier();
    leave(item.count, buffer, place % num_steps);
  }

  template <int kRows>
  __device__ __forceinline__ void add_product(typename Core::Sums& sums, Walk& slot, const OwnBlocks& blocks) const {
    const StepRange stages = {0, args.size_k / Core::kStageRows};
    if constexpr (kScalesSums)
      core.template multiply_pairs<kRows>(sums, slot, blocks, args.group_size >= args.size_k, stages);
    else
      core.template multiply<kRows>(sums, slot, blocks, args.group_size, stages);
  }

  __device__ __forceinline__ void own_barrier() const { barrier_of<kOwnThreads>(1 + core.warpgroup); }
  // A thread's number in its warpgroup, where it is used.
  static __device__ __forceinline__ int own_thread() { return reckoned_here(threadIdx.x % kOwnThreads); }

  // ---- the end of a tile --------------------------------------------------------------------------------------------

  __device__ __forceinline__ u32 row_sh(int row, int buffer) const {
    return list_sh + (buffer * kTallest + row) * kListRowBytes;
  }

  // Brings the tile's rows of the list; those past the last repeat it.
  template <int kRows>
  __device__ __forceinline__ void fetch_rows(const WorkItem& item, int buffer) const {
    for (int row = own_thread(); row < kRows; row += kOwnThreads)
      cp_async_8(row_sh(row, buffer), list.row_at(item.first + min(row, item.count - 1)));
  }

  // Rounds rows of the warp's part of the result into those that leave, or multiplies it with what lies there. Lane l
  // holds columns l/4 and l/4 + 8 of a block, tokens 8 t + 2 (l mod 4) and + 1: a fragment for every eight columns and
  // tokens, stored transposed. With a gate both factors are rounded, so that it does not matter which of them is put.
  template <bool kActivates, bool kMultiplies, int kFirst, int kEnd>
  __device__ __forceinline__ void deposit(const typename Core::Sums& sums, const OwnBlocks& blocks,
                                          const WorkItem& item, int buffer) const {
    const int lane = reckoned_here(core.lane), row = lane % 8 + lane / 16 * 8, half_of_row = lane / 8 % 2;
#pragma unroll
    for (int b = 0; b < Core::kBlocks; ++b) {
      const int first_column = blocks.own_column(b);
      float scales[2], biases[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[half] = blocks.final_scale(b, half);
        const int column = blocks.column_n(b) + lane / 4 + 8 * half;
        biases[half] = args.bias ? low_float(T{}, args.bias[item.expert * args.bias_expert + column]) : 0.f;
      }
#pragma unroll
      for (int t = kFirst / 8; t < kEnd / 8; t += 2) {  // an odd last octet is stored twice
        const bool has_two = t + 1 < kEnd / 8;
        const u32 place =
            out_sh + (8 * t + (has_two ? row : row % 8)) * kRowBytes + (first_column + 8 * half_of_row) * 2;
        u32 fragments[4], factors[4];
        if (kMultiplies) ldmatrix_x4_transposed(factors, place);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int octet = has_two ? t + i / 2 : t, half = i % 2, first = 4 * octet + 2 * half;
          u32 rows[4];  // two of the list: pair and weight of each
          if (!kGated) load_shared(rows, row_sh(8 * octet + 2 * (lane % 4), buffer));
          float values[2];
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            values[v] = scales[half] * sums.v[b][first + v] + biases[half];
            if (kActivates) values[v] = activate<kActivation>(values[v]);
            if (!kGated) values[v] *= __uint_as_float(rows[2 * v + 1]);
          }
          fragments[i] = pack2(T{}, values[0], values[1]);
          if (kMultiplies) fragments[i] = mul2(T{}, fragments[i], factors[i]);
        }
        stmatrix_x4_transposed(place, fragments);
      }
    }
  }

  // Sends the rows to their pairs: a thread eight columns of either half of a tile.
  __device__ __forceinline__ void leave(int count, int buffer, int step) const {
    constexpr int kHalf = Core::kBlocks * kBlockColumns, kHalfChunks = kHalf / 8, kUnits = kOwnColumns / 8 / 2;
    const int thread = own_thread(), unit = thread % kUnits;
    const int column = unit / kHalfChunks * kTileColumns + unit % kHalfChunks * 8;
    const int out_column = step * kOutColumns + core.warpgroup * kOwnColumns + column;
    if (out_column >= columns) return;
#pragma unroll 2
    for (int row = thread / kUnits; row < count; row += kOwnThreads / kUnits) {
      u32 eight[2][4], pair[1];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_shared(eight[half], out_sh + row * kRowBytes + (column + half * kHalf) * 2);
      load_shared(pair, row_sh(row, buffer));
      u16* out = args.out + i64(pair[0]) * columns + out_column;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<U32x4*>(out + half * kHalf) = {eight[half][0], eight[half][1], eight[half][2],
                                                         eight[half][3]};
    }
  }

  const ExpertArguments& args;
  const Core& core;
  const WorkList list;
  const int columns, num_steps;
  const WorkList::Ends ends;
  const u32 out_sh, list_sh;  // the warpgroup's: where its rows leave from, and its rows of the list
};

}  // namespace marlin
