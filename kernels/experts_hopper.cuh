// A layer of experts for many tokens an expert, on compute capability 9.0: the dense kernel of gemm_hopper.cuh, which
// does not end with a tile.
//
// A block walks over the list of work: items times steps of columns. The copying warpgroup runs ahead, into the next
// item's first stages while this one's result still leaves: a short K costs little to start and to drain. Rows are
// gathered by the copies' addresses. The result goes to shared memory of its own, rounded, and from there row by row to
// where its pair lives, copied by the hardware while the next tile is multiplied.
//
// With a gate, a step is 128 columns of the gate and the same 128 of the up projection. The warps of either put half of
// their rows, rounded, where the rows will leave from, and multiply what the others have put there with their own.
#pragma once

#include "experts.cuh"
#include "gemm_hopper.cuh"

namespace marlin {

template <class T, int kBits, int kTokens, int kStages, int kResidentBlocks, Activation kActivation>
class HopperExperts {
  using Core = HopperTile<T, kBits, kTokens, kStages>;
  using L = typename Core::L;
  static constexpr bool kGated = kActivation != Activation::kNone;
  static constexpr int kOutColumns = kGated ? Core::kColumns / 2 : Core::kColumns;
  static constexpr int kStepTiles = kOutColumns / kTileColumns;
  static constexpr int kRowBytes = (kOutColumns + 8) * 2;  // the padding spreads the rows of a fragment over the banks
  static constexpr int kOutOffset = kStages * Core::kStageBytes;
  static constexpr int kBarriersOffset = kOutOffset + kTokens * kRowBytes;
  static constexpr int kWeightsOffset = kBarriersOffset + Core::kBarrierBytes;
  static_assert(kTokens % 8 == 0 && kTokens <= Core::kMathThreads, "a thread sends a row");

 public:
  static constexpr int kThreads = Core::kThreads;
  static constexpr int kSharedBytes = kWeightsOffset + kTokens * 4;
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
        list{args.work, max_work_items(args.num_pairs, args.num_experts, kTokens)},
        columns(kGated ? args.size_n / 2 : args.size_n),
        num_steps((columns + kOutColumns - 1) / kOutColumns),
        num_places(list.num_items() * num_steps),
        out_sh(shared_address(shared) + kOutOffset),
        weights_sh(reinterpret_cast<float*>(shared + kWeightsOffset)) {}

  // Tile w of a stage's four. Tiles past the last repeat it: what comes of them is not stored.
  __device__ __forceinline__ int tile_n(int step, int w) const {
    const int num_tiles = columns / kTileColumns;
    const int tile = min(step * kStepTiles + w % kStepTiles, num_tiles - 1);
    return kGated ? tile + w / kStepTiles * num_tiles : tile;
  }

  __device__ __forceinline__ void copy() const {
    typename Core::Place place;
    const int w = core.warp - Core::kMathWarps;
    const int num_stages = args.size_k / Core::kStageRows;
#pragma unroll 1
    for (int i = blockIdx.x; i < num_places; i += gridDim.x) {
      const WorkItem item = list.item(i / num_steps);
      const GemmArguments weights = expert_weights(args, item.expert);
      typename Core::Copier copier = core.make_copier(
          args.a, weights.qweight + i64(tile_n(i % num_steps, w)) * L::kTileWords, [&](int token) {
            const u32 pair = list.row(item.first + min(token, item.count - 1)).pair;
            return pair / u32(args.a_pairs) * args.a_stride;
          });
#pragma unroll 1
      for (int stage = 0; stage < num_stages; ++stage) {
        core.wait_empty(place);
        core.copy_stage(copier, place, args.qweight_stride);
        place.advance();
      }
    }
    cp_async_wait_all();  // a block must not leave while copies to it are under way
  }

  __device__ __forceinline__ void multiply() const {
    typename Core::Place place;
#pragma unroll 1
    for (int i = blockIdx.x; i < num_places; i += gridDim.x) {
      const int step = i % num_steps, tile = tile_n(step, core.warp % Core::kWarpgroupWarps);
      const GemmArguments weights = expert_weights(args, list.item(i / num_steps).expert);
      const typename Core::OwnBlocks blocks(weights, core, tile);
      typename Core::Sums sums;
      core.multiply(sums, place, blocks, args.group_size, args.size_k, {0, args.size_k / Core::kStageRows});

      // Read once more rather than kept: there are no registers to spare, and the copying warps have them in the cache.
      const WorkItem item = list.item(i / num_steps);
      const WorkList::Row row = list.row(item.first + min(int(threadIdx.x), item.count - 1));
      bulk_wait_read();
      math_barrier();  // the last rows have left
      if (!kGated && threadIdx.x < kTokens) weights_sh[threadIdx.x] = row.weight;
      if constexpr (kGated) {
        const bool is_gate = core.warp % Core::kWarpgroupWarps < kStepTiles;
        constexpr int kHalf = kTokens / 16 * 8;
        if (is_gate)
          deposit<true, false, kHalf, kTokens>(sums, blocks, item.expert, tile);
        else
          deposit<false, false, 0, kHalf>(sums, blocks, item.expert, tile);
        math_barrier();
        if (is_gate)
          deposit<true, true, 0, kHalf>(sums, blocks, item.expert, tile);
        else
          deposit<false, true, kHalf, kTokens>(sums, blocks, item.expert, tile);
      } else {
        math_barrier();
        deposit<false, false, 0, kTokens>(sums, blocks, item.expert, tile);
      }
      fence_proxy_async();
      math_barrier();
      leave(item.count, row.pair, step);
    }
    bulk_wait();
  }

  static __device__ __forceinline__ void math_barrier() { barrier_some<Core::kMathThreads>(); }

  // Rounds rows of the warp's part of the result into those that leave, or multiplies it with what lies there. Lane l
  // holds columns l/4 and l/4 + 8 of a block, tokens 8 t + 2 (l mod 4) and + 1: a fragment for every eight columns and
  // tokens, stored transposed. With a gate both factors are rounded, so that it does not matter which of them is put.
  template <bool kActivates, bool kMultiplies, int kFirst, int kEnd>
  __device__ __forceinline__ void deposit(const typename Core::Sums& sums, const typename Core::OwnBlocks& blocks,
                                          int expert, int tile) const {
    const int row = core.lane % 8 + core.lane / 16 * 8, half_of_row = core.lane / 8 % 2;
#pragma unroll
    for (int b = 0; b < Core::kBlocks; ++b) {
      // A step's columns are those of four tiles, or of two: the up projection's lie where the gate's do.
      const int first_column = blocks.first_column(b) % kOutColumns;
      float scales[2], biases[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[half] = blocks.final_scale(b, half);
        const int column = tile * kTileColumns + first_column % kTileColumns + core.lane / 4 + 8 * half;
        biases[half] = args.bias ? low_float(T{}, args.bias[expert * args.bias_expert + column]) : 0.f;
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
          float values[2];
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            values[v] = scales[half] * sums.v[b][first + v] + biases[half];
            if (kActivates) values[v] = activate<kActivation>(values[v]);
            if (!kGated) values[v] *= weights_sh[8 * octet + 2 * (core.lane % 4) + v];
          }
          fragments[i] = pack2(T{}, values[0], values[1]);
          if (kMultiplies) fragments[i] = mul2(T{}, fragments[i], factors[i]);
        }
        stmatrix_x4_transposed(place, fragments);
      }
    }
  }

  // Sends the rows to their pairs. The hardware copies them; bulk_wait_read waits.
  __device__ __forceinline__ void leave(int count, int pair, int step) const {
    const int bytes = 2 * min(kOutColumns, columns - step * kOutColumns);
    if (int(threadIdx.x) < count)
      bulk_store(args.out + i64(pair) * columns + step * kOutColumns, out_sh + threadIdx.x * kRowBytes, bytes);
    bulk_commit();
  }

  const ExpertArguments& args;
  const Core& core;
  const WorkList list;
  const int columns, num_steps, num_places;
  const u32 out_sh;
  float* const weights_sh;  // what the rows are multiplied with
};

}  // namespace marlin
