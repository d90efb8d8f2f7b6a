// What the kernels of a layer of experts share: the arguments, the list of work, and the way a row of a result leaves.
//
// A token's router chooses top_k experts; each choice is a pair, number token * top_k + choice. A kernel multiplies the
// activations of pairs that chose the same expert with that expert's weights, so many pairs at a time as its tiles have
// rows. Which pairs go together is the list of work that align_experts writes. For up to 32 pairs there is none: every
// warp reads the choices and sees for itself (DirectWork).
#pragma once

#include "gemm_base.cuh"

namespace marlin {

constexpr int kDirectPairs = kWarpLanes;  // the most that a warp sees at once

// What a product is multiplied with before it leaves.
enum class Activation { kNone, kSilu, kGelu, kGeluTanh };

// Strides count elements of the tensor (words for packed ones); *_expert is the way from one expert to the next.
struct ExpertArguments {
  const u16* a;              // [num_pairs / a_pairs, size_k]: a row serves a_pairs pairs that follow each other
  const u32* qweight;        // [num_experts, size_k / 16, size_n * 16 / f]
  const u16* scales;         // [num_experts, num_groups, size_n]
  const u32* qzeros;         // [num_experts, num_groups, size_n / f], or null
  const u16* bias;           // [num_experts, size_n], or null
  const float* topk_weights; // [num_pairs]: what a pair's row is multiplied with, or null
  const void* topk_ids;      // [num_pairs], int32 or int64; outside 0 .. num_experts - 1: nobody's
  const int* work;           // what align_experts wrote, or null: up to kDirectPairs pairs, seen by every warp itself
  u16* out;                  // [num_pairs, columns]; [num_pairs / top_k, size_n] where a cluster sums a token's pairs
  int num_pairs, a_pairs, top_k, num_experts, size_n, size_k, group_size;
  int num_splits;            // blocks of a cluster that share K, or have a token's pair each
  int has_long_ids;          // int64
  // The launch before ours wrote nothing but our activations, and had waited itself before it let us start: weights,
  // choices and the list of work may be read at once.
  int reads_early;
  i64 a_stride, qweight_stride, scales_stride, qzeros_stride, qweight_expert, scales_expert, qzeros_expert, bias_expert;
};

#define MARLIN_EXPERT_PARAMETERS                                                                                     \
  const u16 *a, const u32 *qweight, const u16 *scales, const u32 *qzeros, const u16 *bias, const float *topk_weights, \
      const void *topk_ids, const int *work, u16 *out, int num_pairs, int a_pairs, int top_k, int num_experts,        \
      int size_n, int size_k, int group_size, int num_splits, int has_long_ids, int reads_early, i64 a_stride,        \
      i64 qweight_stride, i64 scales_stride, i64 qzeros_stride, i64 qweight_expert, i64 scales_expert,                \
      i64 qzeros_expert, i64 bias_expert
#define MARLIN_EXPERT_ARGUMENTS                                                                                      \
  ExpertArguments {                                                                                                  \
    a, qweight, scales, qzeros, bias, topk_weights, topk_ids, work, out, num_pairs, a_pairs, top_k, num_experts,     \
        size_n, size_k, group_size, num_splits, has_long_ids, reads_early, a_stride, qweight_stride, scales_stride,   \
        qzeros_stride, qweight_expert, scales_expert, qzeros_expert, bias_expert                                     \
  }

// The expert that a pair chose, or -1 if it is nobody's here.
__device__ __forceinline__ int expert_of(const void* ids, int has_long_ids, int pair, int num_experts) {
  const i64 id = has_long_ids ? static_cast<const i64*>(ids)[pair] : i64(static_cast<const int*>(ids)[pair]);
  return id >= 0 && id < num_experts ? int(id) : -1;
}

// The same for a launch that does not wait for the one before, as are the list's fresh_item and fresh_pair.
__device__ __forceinline__ int fresh_expert_of(const void* ids, int has_long_ids, int pair, int num_experts) {
  const u32* words = static_cast<const u32*>(ids) + (has_long_ids ? 2 * pair : pair);
  const u32 low = load_fresh(words), high = has_long_ids ? load_fresh(words + 1) : 0;
  return high == 0 && low < u32(num_experts) ? int(low) : -1;
}

// How a lane keeps its columns' scales and zero points: in few registers where sums leave no others.
template <bool kHasFew>
struct ColumnsOf {
  using Type = TwoRegisters;
};
template <>
struct ColumnsOf<true> {
  using Type = OneRegister;
};
template <bool kHasFew>
using ColumnsFor = typename ColumnsOf<kHasFew>::Type;

// Up to a tile's height of pairs that chose one expert. All of an expert's tiles have one height.
struct WorkItem {
  int expert, first, count;  // `first`: of the list's rows
};

// The list of work in memory: for each height of tiles how many items have it or a taller one; the items as four words
// each, the tallest first; and the rows, expert by expert.
struct WorkList {
  static constexpr int kHeights = 3, kHeaderWords = 4, kItemWords = 4, kRowWords = 2;
  const int* words;
  int max_items;

  // A row of a product: the pair that it belongs to, and what it is multiplied with before a token's are summed.
  struct Row {
    int pair;
    float weight;
  };

  // By height, 0 is the tallest. Heights that a kernel does not have end with the last one.
  struct Ends {
    int tall, middle, low;
    __device__ __forceinline__ int operator[](int height) const {
      return height == 0 ? tall : height == 1 ? middle : low;
    }
  };
  __device__ __forceinline__ Ends ends() const {
    const U32x4 v = load_fresh(reinterpret_cast<const U32x4*>(words));
    return {int(v.x), int(v.y), int(v.z)};
  }
  __device__ __forceinline__ int num_items() const {
    return load_fresh(reinterpret_cast<const u32*>(words) + kHeights - 1);
  }
  __device__ __forceinline__ WorkItem item(int i) const {
    const int4 v = *reinterpret_cast<const int4*>(words + kHeaderWords + kItemWords * i);
    return {v.x, v.y, v.z};
  }
  __device__ __forceinline__ const int2* row_at(int i) const {
    return reinterpret_cast<const int2*>(words + kHeaderWords + kItemWords * max_items + kRowWords * i);
  }
  __device__ __forceinline__ WorkItem fresh_item(int i) const {
    const U32x4 v = load_fresh(reinterpret_cast<const U32x4*>(words + kHeaderWords + kItemWords * i));
    return {int(v.x), int(v.y), int(v.z)};
  }
  __device__ __forceinline__ int fresh_pair(int i) const { return load_fresh(reinterpret_cast<const u32*>(row_at(i))); }
  __device__ __forceinline__ Row row(int i) const { return {row_at(i)->x, __int_as_float(row_at(i)->y)}; }
};

// Never more than so many items of a tile's height: each expert that is chosen at all has one that is not full.
__host__ __device__ constexpr int max_work_items(int num_pairs, int num_experts, int tile_rows) {
  return (num_pairs < num_experts ? num_pairs : num_experts) + num_pairs / tile_rows;
}

// An expert's weights as the dense kernels know them.
__device__ __forceinline__ GemmArguments expert_weights(const ExpertArguments& args, int expert) {
  GemmArguments one{};
  one.qweight = args.qweight + expert * args.qweight_expert;
  one.scales = args.scales + expert * args.scales_expert;
  one.qzeros = args.qzeros ? args.qzeros + expert * args.qzeros_expert : nullptr;
  one.size_n = args.size_n, one.size_k = args.size_k, one.group_size = args.group_size;
  one.qweight_stride = args.qweight_stride;
  one.scales_stride = args.scales_stride;
  one.qzeros_stride = args.qzeros_stride;
  return one;
}

template <class T>
__device__ __forceinline__ F32x4 load_quad(const u16* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  return {low_float(T{}, v.x), high_float(T{}, v.x), low_float(T{}, v.y), high_float(T{}, v.y)};
}

template <class T>
__device__ __forceinline__ void put_quad(u16* p, F32x4 v) {
  *reinterpret_cast<uint2*>(p) = make_uint2(pack2(T{}, v.x, v.y), pack2(T{}, v.z, v.w));
}

__device__ __forceinline__ F32x4 times(F32x4 v, float factor) {
  return {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
}

template <Activation kActivation>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kActivation == Activation::kSilu) return x * fast_reciprocal(1.f + fast_exp2(-1.4426950f * x));
  if constexpr (kActivation == Activation::kGelu) return 0.5f * x * (1.f + erff(x * 0.70710678f));
  if constexpr (kActivation == Activation::kGeluTanh)
    return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
  return x;
}

template <Activation kActivation>
__device__ __forceinline__ F32x4 gated(F32x4 gate, F32x4 up) {
  return {activate<kActivation>(gate.x) * up.x, activate<kActivation>(gate.y) * up.y,
          activate<kActivation>(gate.z) * up.z, activate<kActivation>(gate.w) * up.w};
}

template <class T>
__device__ __forceinline__ void add_bias(F32x4& sum, const ExpertArguments& args, int expert, int column) {
  if (args.bias) accumulate(sum, load_quad<T>(args.bias + expert * args.bias_expert + column));
}

__device__ __forceinline__ float weight_of(const ExpertArguments& args, int pair) {
  return args.topk_weights ? args.topk_weights[pair] : 1.f;
}

// ---- the list of work, and what its blocks say to each other --------------------------------------------------------

template <int kBlocks>
__device__ __forceinline__ void all_blocks() {
#if MARLIN_HAS_CLUSTERS
  if (kBlocks > 1) return cluster_sync();
#endif
  __syncthreads();
}

template <int kBlocks>
__device__ __forceinline__ int count_of_block(const int* count, int block) {
#if MARLIN_HAS_CLUSTERS
  if (kBlocks > 1) return load_cluster_word(cluster_address(shared_address(count), block));
#endif
  return *count;
}

struct AlignArguments {
  const void* topk_ids;
  const float* topk_weights;  // or null: 1
  int* work;
  int num_pairs, num_experts;
  int tall, middle, low;  // rows of tiles, as far as there are so many heights
  int max_items, has_long_ids;
};

// The tiles that take the least time for all pairs of an expert.
struct BestTiles {
  int height, rows, items, cost;  // height: 0 is the tallest

  template <int kHeights>
  static __device__ __forceinline__ BestTiles of(const AlignArguments& args, int pairs) {
    BestTiles best(0, args.tall, pairs);
    if (kHeights > 1) best.take_if_better({1, args.middle, pairs});
    if (kHeights > 2) best.take_if_better({2, args.low, pairs});
    return best;
  }

 private:
  static constexpr int kRowsMore = 64;  // a tile takes as long as so many rows more would by themselves

  __device__ __forceinline__ BestTiles(int height, int rows, int pairs)
      : height(height), rows(rows), items((pairs + rows - 1) / rows), cost(items * (rows + kRowsMore)) {}
  __device__ __forceinline__ void take_if_better(const BestTiles& other) {
    if (other.cost < cost) *this = other;
  }
};

// How many pairs there are, and how many items of every height.
template <int kHeights>
struct Tally {
  int pairs, tall, middle, low;

  static __device__ __forceinline__ Tally of(int pairs, const BestTiles& best) {
    return {pairs, best.height == 0 ? best.items : 0, best.height == 1 ? best.items : 0,
            best.height == 2 ? best.items : 0};
  }

  __device__ __forceinline__ int items(int height) const { return height == 0 ? tall : height == 1 ? middle : low; }
  // Of that height or a taller one.
  __device__ __forceinline__ int items_to(int height) const {
    return tall + (height > 0 ? middle : 0) + (height > 1 ? low : 0);
  }
  __device__ __forceinline__ void add(const Tally& other) {
    pairs += other.pairs, tall += other.tall, middle += other.middle, low += other.low;
  }
  // That of the lane so far below.
  __device__ __forceinline__ Tally from_below(int distance) const {
    constexpr u32 kAll = 0xffffffffu;
    Tally below = {};
    below.pairs = __shfl_up_sync(kAll, pairs, distance);
    below.tall = __shfl_up_sync(kAll, tall, distance);
    if (kHeights > 1) below.middle = __shfl_up_sync(kAll, middle, distance);
    if (kHeights > 2) below.low = __shfl_up_sync(kAll, low, distance);
    return below;
  }
};

constexpr int kMaxExperts = 1024;

// Blocks of align_experts that a multiprocessor must have room for. Left to itself (0) the compiler takes 32 registers,
// so that there is room for two; on 10.0 these are too few, and it spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10
constexpr int kAlignBlocks = 1;
#else
constexpr int kAlignBlocks = 0;
#endif

// Writes the list of work: one block, or a cluster whose blocks share the pairs. Counts, places and then lists the
// pairs of each expert. In which order an expert's pairs come is up to chance and does not matter: a row's numbers are
// the same wherever in a tile it is.
template <int kThreads, int kBlocks, int kHeights>
__device__ __forceinline__ void align_experts(const AlignArguments& args) {
  constexpr int kWarps = kThreads / kWarpLanes;
  __shared__ int counts[kMaxExperts], places[kMaxExperts];  // this block's pairs of an expert; where its next goes
  __shared__ Tally<kHeights> of_warps[kWarps];
  static_assert(kMaxExperts <= kThreads, "a thread for each");
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int first_pair = blockIdx.x * kThreads + threadIdx.x;
  start_next_launch();
  for (int e = threadIdx.x; e < args.num_experts; e += kThreads) counts[e] = 0;
  wait_for_last_launch();
  __syncthreads();
  for (int p = first_pair; p < args.num_pairs; p += kThreads * kBlocks) {
    const int expert = expert_of(args.topk_ids, args.has_long_ids, p, args.num_experts);
    if (expert >= 0) atomicAdd(counts + expert, 1);
    if (args.topk_weights) prefetch_l2(args.topk_weights + p);
  }
  all_blocks<kBlocks>();

  // Experts in order, a thread each: the sums of all before it say where its pairs and items begin.
  const int expert = threadIdx.x;
  int pairs = 0, of_earlier_blocks = 0;
  if (expert < args.num_experts)
    for (int block = 0; block < kBlocks; ++block) {
      if (block == int(blockIdx.x)) of_earlier_blocks = pairs;
      pairs += count_of_block<kBlocks>(counts + expert, block);
    }
  const BestTiles best = BestTiles::of<kHeights>(args, pairs);
  Tally<kHeights> to_here = Tally<kHeights>::of(pairs, best);
#pragma unroll
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    const Tally<kHeights> below = to_here.from_below(distance);
    if (lane >= distance) to_here.add(below);
  }
  if (lane == kWarpLanes - 1) of_warps[warp] = to_here;
  __syncthreads();
  Tally<kHeights> all = {};  // in the end
  const int used_warps = (args.num_experts + kWarpLanes - 1) / kWarpLanes;
  for (int w = 0; w < used_warps; ++w) {
    if (w == warp) to_here.add(all);
    all.add(of_warps[w]);
  }
  const int place = to_here.pairs - pairs;
  if (expert < args.num_experts) places[expert] = place + of_earlier_blocks;
  int item = all.items_to(best.height) - all.items(best.height) + to_here.items(best.height) - best.items;
  for (int done = 0; done < pairs; done += best.rows, ++item)
    if (item % kBlocks == int(blockIdx.x))
      *reinterpret_cast<int4*>(args.work + WorkList::kHeaderWords + WorkList::kItemWords * item) =
          make_int4(expert, place + done, min(best.rows, pairs - done), 0);
  if (blockIdx.x == 0 && threadIdx.x < WorkList::kHeights) args.work[threadIdx.x] = all.items_to(threadIdx.x);
  __syncthreads();
  int2* rows = reinterpret_cast<int2*>(args.work + WorkList::kHeaderWords + WorkList::kItemWords * args.max_items);
  for (int p = first_pair; p < args.num_pairs; p += kThreads * kBlocks) {
    const int expert = expert_of(args.topk_ids, args.has_long_ids, p, args.num_experts);
    const float weight = args.topk_weights ? args.topk_weights[p] : 1.f;
    if (expert >= 0) rows[atomicAdd(places + expert, 1)] = make_int2(p, __float_as_int(weight));
  }
  all_blocks<kBlocks>();  // a block's counts must outlive their readers
}

// ---- the sum over a token's experts ---------------------------------------------------------------------------------

struct SumArguments {
  const u16* rows;  // [num_tokens * top_k, size_n]: multiplied with their weights already
  const void* topk_ids;
  u16* out;         // [num_tokens, size_n]
  int num_tokens, top_k, num_experts, size_n, has_long_ids;
};

// A bit for each of a token's choices that is somebody's.
__device__ __forceinline__ u32 known_choices(const SumArguments& args, int token) {
  u32 known = 0;
#pragma unroll 8
  for (int choice = 0; choice < args.top_k; ++choice) {
    const int pair = token * args.top_k + choice;
    known |= u32(fresh_expert_of(args.topk_ids, args.has_long_ids, pair, args.num_experts) >= 0) << choice;
  }
  return known;
}

// Adds up each token's rows in the order of its choices, in fp32: a thread for eight columns. Rows that are nobody's
// were never written. Choices were there before the products began, so they are read before the last has ended.
template <class T>
__device__ __forceinline__ void sum_experts(const SumArguments& args) {
  constexpr int kAtOnce = 8;  // rows on their way
  start_next_launch();
  const int chunks = args.size_n / 8;
  const i64 size = i64(args.num_tokens) * chunks;
  for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += i64(gridDim.x) * blockDim.x) {
    const int token = int(i / chunks), column = 8 * int(i % chunks);
    u32 known = known_choices(args, token);
    wait_for_last_launch();
    const u16* row = args.rows + i64(token) * args.top_k * args.size_n + column;
    F32x4 low = {0.f, 0.f, 0.f, 0.f}, high = low;
    for (; known; known >>= kAtOnce, row += i64(kAtOnce) * args.size_n) {
      U32x4 rows[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (known >> j & 1) rows[j] = *reinterpret_cast<const U32x4*>(row + i64(j) * args.size_n);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (!(known >> j & 1)) continue;
        const U32x4 v = rows[j];
        accumulate(low, {low_float(T{}, v.x), high_float(T{}, v.x), low_float(T{}, v.y), high_float(T{}, v.y)});
        accumulate(high, {low_float(T{}, v.z), high_float(T{}, v.z), low_float(T{}, v.w), high_float(T{}, v.w)});
      }
    }
    u16* out = args.out + i64(token) * args.size_n + column;
    *reinterpret_cast<U32x4*>(out) = {pack2(T{}, low.x, low.y), pack2(T{}, low.z, low.w), pack2(T{}, high.x, high.y),
                                      pack2(T{}, high.z, high.w)};
  }
}

}  // namespace marlin
