// A layer of experts for few tokens an expert (tiles of 8, 16, 24 or 32 rows), where reading weights is the work.
//
// As in gemm_small.cuh a warp copies what it will multiply to shared memory of its own; small_step.cuh says what a step
// is. But a warp may own two tiles of 64 columns, so that activations are fetched once for both: neighbours, or the
// gate's and the up projection's, whose product then leaves in place of both. And rows are gathered: those of the pairs
// that chose the block's expert.
//
// The blocks of a cluster share K; or, where a token's pairs are summed, each takes one of them.
#pragma once

#include "experts.cuh"
#include "small_step.cuh"

namespace marlin {

// kSumsPairs: block r of a cluster multiplies choice r of a token, and the cluster writes the token's sum.
template <class T, int kBits, int kGroupSize, int kTokenTiles, int kStepRows, int kWarps, int kStages, int kTiles,
          Activation kActivation, bool kSumsPairs>
class SmallExperts {
  using L = Layout<kBits>;
  static constexpr bool kGated = kActivation != Activation::kNone;
  using Step = SmallStep<T, kBits, kGroupSize, kTokenTiles, kStepRows, ColumnsFor<(kGated && kTokenTiles == 4)>>;

  static_assert(kTiles <= 2, "sums of a lane must fit its registers");
  static_assert(!kGated || kTiles == 2, "the gate's columns and the up projection's");
  static_assert(!kSumsPairs || (kTokenTiles == 1 && !kGated), "one row, not gated");
  static_assert(kStages >= 2, "a step is on its way while another is multiplied");

  static constexpr int kTokens = Step::kTokens;
  // The first weights are on their way before it is known where the rows lie; with many there are no registers for it.
  static constexpr bool kFetchesFirst = kTokenTiles <= 2;
  static constexpr int kStageBytes = Step::kActBytes + kTiles * Step::kWeightBytes;
  static constexpr int kSumBytes = kTiles * Step::kSumBytes;
  static constexpr int kWarpBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr int kQuads = kTileColumns / 4;
  static constexpr int kMaxSplits = 8;
  // Splits send each other their parts of few rows only: with more there are blocks enough.
  static constexpr int kReceivedBytes = kTokenTiles == 1 ? (kTokens * kQuads + kMaxSplits) * kTiles * 16 : 0;
  static constexpr int kBarrierOffset = kWarps * kWarpBytes + kReceivedBytes, kPairsOffset = kBarrierOffset + 8;

 public:
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kSharedBytes = kPairsOffset + kTokens * 4;

  // grid: (splits * steps of columns, items, 1), where an item is one of the list, a pair, or (kSumsPairs) a token.
  static __device__ __forceinline__ void run(const ExpertArguments& args) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
    const int split = blockIdx.x % args.num_splits, step = blockIdx.x / args.num_splits;
    const bool is_cluster = kReceivedBytes > 0 && args.num_splits > 1;
#if MARLIN_HAS_CLUSTERS
    const u32 barrier = shared_address(shared) + kBarrierOffset;
    if (is_cluster && threadIdx.x == 0) {
      mbarrier_init(barrier, 1);
      fence_mbarrier_init();
    }
    __syncwarp();  // before the same thread arrives, so that racecheck can follow
    if (is_cluster) cluster_arrive();
#endif
    if (!args.reads_early) wait_for_last_launch();
    // Whoever comes next may be set up, but not before what chose the experts is through: it may read them at once.
    start_next_launch();
    const Rows rows = kSumsPairs  ? rows_of_pair(args, split)
                      : args.work ? listed_rows(args, lane)
                                  : seen_rows(args, lane);
#if MARLIN_HAS_CLUSTERS
    if (is_cluster && threadIdx.x == 0) {
      const int quads = quads_of(rows), splits = args.num_splits;
      mbarrier_arrive_expecting(barrier, u32(quads - split + splits - 1) / u32(splits) * splits * kTiles * 16);
    }
#endif
    int* pairs_sh = reinterpret_cast<int*>(shared + kPairsOffset);
    if (rows.count == 0 && !is_cluster) {
      wait_for_last_launch();
      return;
    }
    SmallExperts product(args, rows, shared + warp * kWarpBytes, step, lane);
    const StepRange steps = product.steps_of(warp, kSumsPairs ? 0 : split, kSumsPairs ? 1 : args.num_splits);
    if (kFetchesFirst) product.fetch_first_weights(steps);
    product.find_rows(rows.pair);
    if (warp == 0 && lane < kTokens) pairs_sh[lane] = rows.pair;
    product.sum_rows(steps);
    product.deposit();
    __syncthreads();
    finish(args, rows, shared, pairs_sh, step, split, is_cluster);
  }

 private:
  // The pairs whose rows this block multiplies, and their expert. Lane r of a warp holds the r-th pair.
  struct Rows {
    int expert, count, pair;
  };
  struct Groups {
    typename Step::Groups of[kTiles];
  };

  static __device__ __forceinline__ Rows rows_of_pair(const ExpertArguments& args, int choice) {
    const int pair = blockIdx.y * args.top_k + choice;
    const int expert = fresh_expert_of(args.topk_ids, args.has_long_ids, pair, args.num_experts);
    return {expert, expert >= 0, pair};
  }

  static __device__ __forceinline__ Rows listed_rows(const ExpertArguments& args, int lane) {
    const WorkList list{args.work, max_work_items(args.num_pairs, args.num_experts, kTokens)};
    const WorkItem item = list.fresh_item(blockIdx.y);  // both are read at once, if there is such an item or not
    if (int(blockIdx.y) >= list.num_items()) return {-1, 0, 0};
    return {item.expert, item.count, list.fresh_pair(item.first + min(lane, item.count - 1))};
  }

  // Without a list: a pair leads if so many whole tiles of its expert's pairs come before it.
  static __device__ __forceinline__ Rows seen_rows(const ExpertArguments& args, int lane) {
    const int own =
        lane < args.num_pairs ? fresh_expert_of(args.topk_ids, args.has_long_ids, lane, args.num_experts) : -1;
    const int expert = __shfl_sync(0xffffffffu, own, blockIdx.y);
    u32 same = __ballot_sync(0xffffffffu, own == expert);
    const int before = __popc(same & ((1u << blockIdx.y) - 1));
    if (expert < 0 || before % kTokens != 0) return {-1, 0, 0};
    same &= ~((1u << blockIdx.y) - 1);
    const int count = min(__popc(same), kTokens);
    int pair = blockIdx.y;
    for (int row = 0; row < count; ++row, same &= same - 1)
      if (row <= lane) pair = __ffs(same) - 1;
    return {expert, count, pair};
  }

  __device__ __forceinline__ SmallExperts(const ExpertArguments& args, const Rows& rows, unsigned char* warp_shared,
                                          int step, int lane)
      : args(args),
        weights(expert_weights(args, max(rows.expert, 0))),
        count(rows.count),
        shared(warp_shared),
        lane(lane) {
#pragma unroll
    for (int p = 0; p < kTiles; ++p) tiles[p] = tile_of(args, step, p);
  }

  // Tiles past the last repeat it: what comes of them is not stored.
  static __device__ __forceinline__ int tile_of(const ExpertArguments& args, int step, int p) {
    const int num_tiles = args.size_n / kTileColumns;
    if (kGated) return step + p * (num_tiles / 2);
    return min(step * kTiles + p, num_tiles - 1);
  }

  // The warp's steps: from the first on every kWarps-th.
  __device__ __forceinline__ StepRange steps_of(int warp, int split, int num_splits) const {
    const StepRange range = split_steps(args.size_k / kStepRows, split, num_splits);
    return {range.begin + warp, count ? range.end : range.begin};
  }

  // The weights of the first steps need not wait for who computes the activations.
  __device__ __forceinline__ void fetch_first_weights(StepRange steps) const {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch_weights(steps.begin + i * kWarps, steps.end, i);
  }

  __device__ __forceinline__ void sum_rows(StepRange steps) {
    const int end = steps.end;
    int step = steps.begin;
    if (!kFetchesFirst) fetch_first_weights(steps);
    Groups now, next;
    if (step < end) read_groups(next, step);
    wait_for_last_launch();
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      fetch_activations(step + i * kWarps, end, i);
      cp_async_commit();
    }
    for (int slot = 0; step < end; step += kWarps) {
      now = next;
      if (step + kWarps < end) read_groups(next, step + kWarps);
      cp_async_wait<kStages - 2>();
      __syncwarp();
      const int ahead = step + (kStages - 1) * kWarps, free = slot == 0 ? kStages - 1 : slot - 1;
      fetch_weights(ahead, end, free);
      fetch_activations(ahead, end, free);
      cp_async_commit();
      multiply(slot, now);
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    __syncwarp();  // the sums go where the steps were
  }

  // Where the rows lie, of which lane r has the r-th pair.
  __device__ __forceinline__ void find_rows(int own_pair) {
#pragma unroll
    for (int i = 0; i < Step::kActLoads; ++i) {
      const u32 pair = __shfl_sync(0xffffffffu, own_pair, Step::token_of(i, lane));
      rows_gl_rd[i] = u32(pair / u32(args.a_pairs) * args.a_stride / 8);
    }
  }

  __device__ __forceinline__ GroupReader<T, kBits> reader(int p) const { return {weights, tiles[p], lane}; }

  __device__ __forceinline__ void read_groups(Groups& into, int step) const {
#pragma unroll
    for (int p = 0; p < kTiles; ++p) Step::read_groups(into.of[p], reader(p), step, lane);
  }

  __device__ __forceinline__ void fetch_weights(int step, int end, int slot) const {
    if (step >= end) return;
#pragma unroll
    for (int p = 0; p < kTiles; ++p)
      Step::copy_weights(
          weights_sh(slot, p),
          weights.qweight + i64(tiles[p]) * L::kTileWords + i64(step) * Step::kStepTiles * args.qweight_stride,
          args.qweight_stride, lane);
  }

  __device__ __forceinline__ void fetch_activations(int step, int end, int slot) const {
    if (step >= end) return;
#pragma unroll
    for (int i = 0; i < Step::kActLoads; ++i) {
      const int token = Step::token_of(i, lane), chunk = Step::chunk_of(i, lane);
      // Absent rows are columns of the product that nobody stores: whatever lies there may stay.
      if (token < count)
        cp_async_16(stage_sh(slot) + Step::chunk_place(token, chunk),
                    args.a + 8 * (i64(rows_gl_rd[i]) + step * Step::kRowChunks + chunk));
    }
  }

  __device__ __forceinline__ void multiply(int slot, const Groups& groups) {
#pragma unroll
    for (int p = 0; p < kTiles; ++p)
      Step::multiply(sums[p], stage_sh(slot), weights_sh(slot, p), reader(p), groups.of[p], lane);
  }

  __device__ __forceinline__ void deposit() const {
#pragma unroll
    for (int p = 0; p < kTiles; ++p) Step::deposit(sums[p], sum_tile(shared, p), reader(p), lane);
  }

  // Sums of four columns of a row that leave the block, of each of its tiles.
  static __device__ __forceinline__ int quads_of(const Rows& rows) { return (kSumsPairs ? 1 : rows.count) * kQuads; }

  static __device__ __forceinline__ SumTile<kTileColumns> sum_tile(unsigned char* warp_shared, int p) {
    return {reinterpret_cast<float*>(warp_shared + p * Step::kSumBytes)};
  }

  // Four columns of a row, of each of the block's tiles.
  struct Quads {
    F32x4 of[kTiles];
  };

  static __device__ __forceinline__ Quads sum_warps(unsigned char* shared, int row, int column) {
    Quads quads{};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
#pragma unroll
      for (int p = 0; p < kTiles; ++p)
        accumulate(quads.of[p], sum_tile(shared + warp * kWarpBytes, p).quad(row, column));
    return quads;
  }

  // Everything is summed in the order of K, or of a token's choices, whoever comes first.
  static __device__ __forceinline__ void finish(const ExpertArguments& args, const Rows& rows, unsigned char* shared,
                                                const int* pairs_sh, int step, int split, bool is_cluster) {
    const int quads = quads_of(rows);
#if MARLIN_HAS_CLUSTERS
    if (is_cluster) {
      unsigned char* received_sh = shared + kWarps * kWarpBytes;
      const u32 received = shared_address(received_sh), barrier = shared_address(shared) + kBarrierOffset;
      const int quads_each = (quads + args.num_splits - 1) / args.num_splits;
      cluster_wait();
      for (int i = threadIdx.x; i < quads; i += kThreads) {
        Quads sum = sum_warps(shared, i / kQuads, 4 * (i % kQuads));
        if (kSumsPairs)
#pragma unroll
          for (int p = 0; p < kTiles; ++p)
            sum.of[p] = weighted(args, rows.expert, rows.pair, tile_of(args, step, p), 4 * (i % kQuads), sum.of[p]);
#pragma unroll
        for (int p = 0; p < kTiles; ++p)
          store_cluster_async(
              cluster_address(received + ((split * quads_each + i / args.num_splits) * kTiles + p) * 16,
                              i % args.num_splits),
              sum.of[p], cluster_address(barrier, i % args.num_splits));
      }
      mbarrier_wait(barrier, 0);
      for (int i = threadIdx.x; i * args.num_splits + split < quads; i += kThreads) {
        Quads sum{};
        for (int rank = 0; rank < args.num_splits; ++rank)
#pragma unroll
          for (int p = 0; p < kTiles; ++p)
            accumulate(sum.of[p], reinterpret_cast<const F32x4*>(received_sh)[(rank * quads_each + i) * kTiles + p]);
        const int quad = i * args.num_splits + split, column = 4 * (quad % kQuads);
        if (kSumsPairs)
          store_sum(args, step, column, sum);
        else
          store(args, rows.expert, pairs_sh[quad / kQuads], step, column, sum);
      }
      return;
    }
#endif
    for (int i = threadIdx.x; i < quads; i += kThreads) {
      const int row = i / kQuads, column = 4 * (i % kQuads);
      store(args, rows.expert, pairs_sh[row], step, column, sum_warps(shared, row, column));
    }
  }

  // (sum + bias) * the pair's weight; nothing for a pair that is nobody's.
  static __device__ __forceinline__ F32x4 weighted(const ExpertArguments& args, int expert, int pair, int tile,
                                                   int column, F32x4 sum) {
    if (expert < 0) return {0.f, 0.f, 0.f, 0.f};
    add_bias<T>(sum, args, expert, tile * kTileColumns + column);
    return times(sum, weight_of(args, pair));
  }

  static __device__ __forceinline__ void store(const ExpertArguments& args, int expert, int pair, int step, int column,
                                               Quads sum) {
    if constexpr (kGated) {
      const int inner = args.size_n / 2, place = step * kTileColumns + column;
      add_bias<T>(sum.of[0], args, expert, place);
      add_bias<T>(sum.of[1], args, expert, inner + place);
      put_quad<T>(args.out + i64(pair) * inner + place, gated<kActivation>(sum.of[0], sum.of[1]));
    } else {
#pragma unroll
      for (int p = 0; p < kTiles; ++p) {
        const int tile = step * kTiles + p;
        if (tile * kTileColumns < args.size_n)
          put_quad<T>(args.out + i64(pair) * args.size_n + tile * kTileColumns + column,
                      weighted(args, expert, pair, tile, column, sum.of[p]));
      }
    }
  }

  static __device__ __forceinline__ void store_sum(const ExpertArguments& args, int step, int column,
                                                   const Quads& sum) {
#pragma unroll
    for (int p = 0; p < kTiles; ++p) {
      const int tile = step * kTiles + p;
      if (tile * kTileColumns < args.size_n)
        put_quad<T>(args.out + i64(blockIdx.y) * args.size_n + tile * kTileColumns + column, sum.of[p]);
    }
  }

  // A stage's activations, and behind them its weights.
  __device__ __forceinline__ u32 stage_sh(int slot) const { return shared_address(shared) + slot * kStageBytes; }
  __device__ __forceinline__ u32 weights_sh(int slot, int p) const {
    return stage_sh(slot) + Step::kActBytes + p * Step::kWeightBytes;
  }

  const ExpertArguments& args;
  const GemmArguments weights;
  const int count;
  unsigned char* shared;
  const int lane;
  int tiles[kTiles];
  u32 rows_gl_rd[Step::kActLoads];  // in units of eight numbers
  typename Step::Sums sums[kTiles] = {};
};

}  // namespace marlin
