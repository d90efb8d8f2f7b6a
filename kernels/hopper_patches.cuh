// How the sums of gemm_hopper.cuh leave: in patches of 32 columns by 8 tokens.
//
// A warp has the sums of one patch for every 8 tokens of the block's tile. Lane l holds columns l/4 + 8 m and tokens
// 2 (l mod 4), + 1: four numbers for each of two blocks of columns. Where blocks share K, parts of a patch travel in
// just this order, 16 bytes a lane, and are not rearranged before: to the block of the cluster that finishes the patch,
// or to the workspace.
#pragma once

#include "gemm_base.cuh"

namespace marlin {

// Blocks that share the K of all tiles evenly: each has a run of steps, of whatever tiles they are. Of the first and of
// the last it may have a part only, which goes to the workspace.
struct Runs {
  int tile_steps, num_steps, num_blocks;

  __device__ __forceinline__ StepRange of(int block) const { return split_steps(num_steps, block, num_blocks); }
  // The block whose run has that step.
  __device__ __forceinline__ int block_with(int step) const {
    int block = u32(step * num_blocks) / u32(num_steps);
    while (of(block).end <= step) ++block;
    return block;
  }
  // Where a block leaves its part of a tile that begins at that step: two are possible.
  static __device__ __forceinline__ int place(int block, StepRange run, int tile_begin) {
    return 2 * block + (run.begin < tile_begin);
  }
};

template <class T, int kTokens, int kColumns>
class Patches {
 public:
  static constexpr int kPatchColumns = 32, kPatchTokens = 8, kHalves = 2;  // a half is a block of 16 columns
  static constexpr int kRow = kColumns / kPatchColumns;                    // patches of the same tokens
  static constexpr int kOctets = kTokens / kPatchTokens;
  static constexpr int kHalfBytes = kWarpLanes * 16, kPatchBytes = kHalves * kHalfBytes;
  static constexpr int kMaxSplits = 8;  // what every GPU with clusters takes
  // What comes to a block of a cluster, however many they are.
  static constexpr int kReceivedBytes = (kRow * kOctets + kMaxSplits - 1) * kPatchBytes;

  using Sums = float[kHalves][kTokens / 2];  // of a lane, by blocks of columns, then tokens
  struct Quads {
    F32x4 half[kHalves];
  };

  __device__ __forceinline__ Patches(const GemmArguments& args, int tile_n, int tile_m, int lane)
      : args(args),
        lane(lane),
        first_token(tile_m * kTokens),
        first_column(tile_n * kColumns),
        tokens(min(kTokens, args.size_m - first_token)),
        count((tokens + kPatchTokens - 1) / kPatchTokens * kRow) {}

  // Stores what nobody else has a part of: a warp's patches, which are kRow apart.
  __device__ __forceinline__ void store_whole(const Sums& sums, int first_patch) const {
#pragma unroll
    for (int t = 0; t < kOctets; ++t)
      if (t * kPatchTokens < tokens) store(quads_of(sums, t), first_patch + t * kRow);
  }

  // ---- through a cluster: of every num_splits patches each block finishes one ---------------------------------------

  // What comes to the block of that rank from the others.
  __device__ __forceinline__ u32 expected_bytes(int rank) const {
    return u32(count - rank + args.num_splits - 1) / u32(args.num_splits) * (args.num_splits - 1) * kPatchBytes;
  }

  // Sends a warp's parts to where they are finished. The block's own do not go through the cluster's network, which is
  // slow: a barrier among the block's warps must follow.
  __device__ __forceinline__ void send(const Sums& sums, int first_patch, u32 received, u32 barrier) const {
    const u32 splits = args.num_splits;
    u32 rank = u32(first_patch) % splits, place = u32(first_patch) / splits;
    received += blockIdx.x * places() * kPatchBytes + lane * 16;
#pragma unroll
    for (int t = 0; t < kOctets; ++t) {
      if (t * kPatchTokens >= tokens) break;
      const Quads quads = quads_of(sums, t);
      const u32 own = received + place * kPatchBytes, remote = cluster_address(own, rank);
      const u32 remote_barrier = cluster_address(barrier, rank);
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        if (rank == blockIdx.x)
          store_shared(own + half * kHalfBytes, quads.half[half]);
        else
          store_cluster_async(remote + half * kHalfBytes, quads.half[half], remote_barrier);
      rank += kRow % splits, place += kRow / splits;
      if (rank >= splits) rank -= splits, ++place;
    }
  }

  // Adds up the parts of the block's patches, in the order of K, and stores them.
  template <int kWarps>
  __device__ __forceinline__ void finish_received(u32 received, int warp) const {
    const int splits = args.num_splits, part_bytes = places() * kPatchBytes;
    for (int place = warp; place * splits + int(blockIdx.x) < count; place += kWarps) {
      u32 from = received + place * kPatchBytes + lane * 16;
      Quads sum = {};
      for (int split = 0; split < splits; ++split, from += part_bytes)
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
          accumulate(sum.half[half], load_shared_quad(from + half * kHalfBytes));
      store(sum, place * splits + blockIdx.x);
    }
  }

  // ---- through the workspace, which has whole tiles: [places][patches][halves][lanes][4] ----------------------------

  // Where a split leaves its part of the tile.
  __device__ __forceinline__ int place_of(int split) const {
    const int tiles_n = (args.size_n + kColumns - 1) / kColumns, tiles_m = (args.size_m + kTokens - 1) / kTokens;
    return (split * tiles_m + first_token / kTokens) * tiles_n + first_column / kColumns;
  }

  __device__ __forceinline__ void store_parts(const Sums& sums, int first_patch, int place) const {
    float* to = part(place, first_patch);
#pragma unroll
    for (int t = 0; t < kOctets; ++t) {
      if (t * kPatchTokens >= tokens) break;
      const Quads quads = quads_of(sums, t);
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        *reinterpret_cast<F32x4*>(to + (t * kRow * kPatchBytes + half * kHalfBytes) / 4) = quads.half[half];
    }
  }

  // The second launch: a warp adds up a patch's parts, in the order of K, and stores it.
  __device__ __forceinline__ void finish_parts(int patch) const {
    if (patch >= count) return;
    Quads sum = {};
#pragma unroll 4
    for (int split = 0; split < args.num_splits; ++split) add_part(sum, place_of(split), patch);
    store(sum, patch);
  }
  __device__ __forceinline__ void finish_parts(int patch, const Runs& runs, int tile) const {
    const int begin = tile * runs.tile_steps, end = begin + runs.tile_steps;
    int block = runs.block_with(begin);
    if (patch >= count || runs.of(block).end >= end) return;  // one block had all of the tile
    Quads sum = {};
    for (StepRange run = runs.of(block); run.begin < end; run = runs.of(++block))
      add_part(sum, Runs::place(block, run, begin), patch);
    store(sum, patch);
  }

 private:
  static __device__ __forceinline__ Quads quads_of(const Sums& sums, int t) {
    Quads quads;
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      quads.half[half] = {sums[half][4 * t], sums[half][4 * t + 1], sums[half][4 * t + 2], sums[half][4 * t + 3]};
    return quads;
  }

  // Patches of a block of the cluster, at most.
  __device__ __forceinline__ u32 places() const { return u32(count + args.num_splits - 1) / u32(args.num_splits); }

  __device__ __forceinline__ float* part(int place, int patch) const {
    return args.workspace + (i64(place) * (kRow * kOctets) + patch) * (kPatchBytes / 4) + lane * 4;
  }
  __device__ __forceinline__ void add_part(Quads& sum, int place, int patch) const {
    const float* from = part(place, patch);
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      accumulate(sum.half[half], *reinterpret_cast<const F32x4*>(from + half * kHalfBytes / 4));
  }

  // Rounds a patch whose sums are complete and stores it: 64 bytes of every token, 16 of them by a lane.
  __device__ __forceinline__ void store(const Quads& sums, int patch) const {
    const int column = first_column + patch % kRow * kPatchColumns;
    const int token = patch / kRow * kPatchTokens + lane / 4;
    if (column >= args.size_n) return;  // the same for all lanes, as 64 columns divide N
    u32 words[2 * kHalves];             // by eights of columns, two columns of the lane's token
#pragma unroll
    for (int m = 0; m < 2 * kHalves; ++m) {
      const F32x4& quad = sums.half[m / 2];
      const float bias = args.bias ? low_float(T{}, args.bias[column + 8 * m + lane / 4]) : 0.f;
      words[m] = transpose_8x8(m % 2 == 0 ? pack2(T{}, quad.x + bias, quad.y + bias)
                                          : pack2(T{}, quad.z + bias, quad.w + bias));
    }
    transpose_among_four(words);
    if (token < tokens)
      *reinterpret_cast<U32x4*>(args.out + i64(first_token + token) * args.size_n + column + 8 * (lane % 4)) = {
          words[0], words[1], words[2], words[3]};
  }

  // Of four neighbouring lanes the i-th gets what all had as their i-th word.
  __device__ __forceinline__ void transpose_among_four(u32 (&words)[4]) const {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int other = i + distance;
        if (i & distance) continue;
        const bool is_upper = lane & distance;
        const u32 received = __shfl_xor_sync(0xffffffffu, is_upper ? words[i] : words[other], distance);
        words[i] = is_upper ? received : words[i];
        words[other] = is_upper ? words[other] : received;
      }
  }

  const GemmArguments& args;
  const int lane, first_token, first_column;
  const int tokens, count;  // that are there; patches of the tile with such tokens
};

}  // namespace marlin
