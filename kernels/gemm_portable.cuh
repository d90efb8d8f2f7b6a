// The GEMM for any number of tokens on any GPU from compute capability 8.0: mma.m16n8k16 and cp.async.
//
// As in gemm_small.cuh the transposed weight is operand A. A block computes 256 columns by 32 or 64 tokens: four warps
// side by side own a tile of 64 columns each, and two such rows of warps share the rows of every stage. So a weight is
// decoded once for all tokens of the block. Activations are shared by the block, weights by no two warps.
#pragma once

#include "gemm_base.cuh"

namespace marlin {

template <class T, int kBits, int kTokenTiles, int kStages>
class PortableGemm {
  using L = Layout<kBits>;
  using D = Decoder<T, kBits, TwoRegisters>;

  static constexpr int kWarpsN = 4, kWarpsK = 2;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kColumns = kWarpsN * kTileColumns;
  static constexpr int kStageRows = 64;
  static constexpr int kWarpRows = kStageRows / kWarpsK;  // one group at most, as 32 is the smallest
  static constexpr int kWarpTiles = kWarpRows / kTileRows;
  static_assert(kWarpRows == 32, "a warp reads the scales of one group per stage");
  static_assert(kWarpTiles == 2, "one ldmatrix.x4 holds the activations of two tiles");

  // A row of activations is 64 numbers, eight 16-byte chunks, XOR-swizzled for ldmatrix.
  static constexpr int kRowChunks = kStageRows / 8;
  static constexpr int kActBytes = kTokens * kStageRows * 2;
  static constexpr int kWeightBytes = kWarpsN * kWarpsK * kWarpTiles * L::kTileWords * 4;
  static constexpr int kStageBytes = kActBytes + kWeightBytes;
  static constexpr int kSumBytes = SumTile<kColumns>::bytes(kTokens);

 public:
  static constexpr int kThreads = kWarpsN * kWarpsK * kWarpLanes;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr int kActLoads = kTokens * kRowChunks / kThreads;  // cp.async of a thread in a stage
  static_assert(kTokens * kRowChunks % kThreads == 0, "the threads copy whole rounds of chunks");
  static_assert(kThreads / kRowChunks % 8 == 0, "the swizzle of a thread's chunk is the same in every round");

  // grid: (splits, tiles of 256 columns, tiles of tokens).
  static __device__ __forceinline__ void run(const GemmArguments& args) {
    extern __shared__ __align__(128) unsigned char shared[];
    start_next_launch();
    PortableGemm gemm(args, shared);
    wait_for_last_launch();
    gemm.sum_rows();
    const SumTile<kColumns> tile{reinterpret_cast<float*>(shared)};
    gemm.deposit(tile);
    finish_tile<T, kColumns>(args, tile, blockIdx.x, gemm.first_token, kTokens, blockIdx.y * kColumns,
                             kThreads);
  }

 private:
  __device__ __forceinline__ PortableGemm(const GemmArguments& args, unsigned char* shared)
      : args(args),
        lane(threadIdx.x % kWarpLanes),
        warp_n(threadIdx.x / kWarpLanes % kWarpsN),
        warp_k(threadIdx.x / kWarpLanes / kWarpsN),
        // Warps past the last column repeat the last tile: they load and multiply what is there and store nothing.
        tile_n(min(int(blockIdx.y * kWarpsN) + warp_n, args.size_n / kTileColumns - 1)),
        first_token(blockIdx.z * kTokens),
        groups(args, tile_n, lane),
        weights_gl_rd(args.qweight + i64(warp_k * kWarpTiles) * args.qweight_stride + i64(tile_n) * L::kTileWords),
        weights_sh(shared_address(shared) + kActBytes + threadIdx.x / kWarpLanes * kWarpTiles * L::kTileWords * 4),
        act_sh_wr(shared_address(shared) + act_offset(threadIdx.x / kRowChunks, threadIdx.x % kRowChunks)),
        act_sh_rd(shared_address(shared) + act_offset(lane % 8, 4 * warp_k + lane / 8)) {
#pragma unroll
    for (int i = 0; i < kActLoads; ++i) {
      // Tokens past the last repeat it: they are columns of the product that nobody stores.
      const int token = min(first_token + int(threadIdx.x) / kRowChunks + i * (kThreads / kRowChunks), args.size_m - 1);
      act_gl_rd[i] = args.a + token * args.a_stride + threadIdx.x % kRowChunks * 8;
    }
  }

  // Copies run kStages - 1 ahead. One barrier a stage: behind it the stage has arrived for all, and all are done with
  // the one before, which is the next to be filled.
  __device__ __forceinline__ void sum_rows() {
    const StepRange range = split_steps(args.size_k / kStageRows, blockIdx.x, args.num_splits);
    LaneGroup<kBits> group, next_group;
    if (range.begin < range.end) read_group(next_group, range.begin);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(range.begin + i, range.end, i);

    int slot = 0;
    for (int step = range.begin; step < range.end; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      fetch(step + kStages - 1, range.end, slot == 0 ? kStages - 1 : slot - 1);
      group = next_group;
      if (step + 1 < range.end) read_group(next_group, step + 1);
      multiply(slot, group);
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    __syncthreads();  // the sums go where the stages were
  }

  __device__ __forceinline__ void read_group(LaneGroup<kBits>& group, int step) const {
    groups.read(group, (step * kStageRows + warp_k * kWarpRows) / args.group_size, lane);
  }

  __device__ __forceinline__ void fetch(int step, int end, int slot) const {
    if (step < end) {
#pragma unroll
      for (int i = 0; i < kActLoads; ++i)
        cp_async_16(act_sh_wr + slot * kStageBytes + i * (kThreads * 16), act_gl_rd[i] + step * kStageRows);
      const u32* tile_gl_rd = weights_gl_rd + i64(step) * (kStageRows / kTileRows) * args.qweight_stride;
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i)
        copy_tile<kBits>(tile_sh(slot, i), tile_gl_rd + i * args.qweight_stride, lane);
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void multiply(int slot, const LaneGroup<kBits>& group) {
    u32 act[kTokenTiles][4];  // operand B of both tiles
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
      ldmatrix_x4(act[t], act_sh_rd + slot * kStageBytes + t * (8 * kRowChunks * 16));
    u32 words[kWarpTiles][L::kLaneWords];
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) load_lane_words<kBits>(words[i], tile_sh(slot, i), lane);
#pragma unroll
    for (int j = 0; j < kTileBlocks; ++j) {
      const auto offsets = D::offsets(groups.zeros(group, j));
      const TwoRegisters scales(groups.scales(group, j));
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        u32 weight[4];
        D::decode(weight, words[i] + j * L::kBlockWords, offsets);
        scale<T>(weight, scales);
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) mma(T{}, sums[t][j], weight, act[t][2 * i], act[t][2 * i + 1]);
      }
    }
  }

  // The rows of warps add up one after the other, in the order of K. Lane l holds columns l/4 + 8 m, tokens 8 t + 2 (l
  // mod 4), + 1.
  __device__ __forceinline__ void deposit(const SumTile<kColumns>& tile) const {
#pragma unroll
    for (int turn = 0; turn < kWarpsK; ++turn) {
      if (turn == warp_k) {
#pragma unroll
        for (int m = 0; m < kLaneColumns; ++m) {
          const float scale = groups.final_scale(lane, m);
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& sum = tile.at(8 * t + 2 * (lane % 4) + i, warp_n * kTileColumns + lane / 4 + 8 * m);
              const float ours = scale * sums[t][m / 2][2 * (m % 2) + i];
              sum = turn == 0 ? ours : sum + ours;
            }
        }
      }
      __syncthreads();
    }
  }

  static __device__ __forceinline__ u32 act_offset(int token, int chunk) {
    return (token * kRowChunks + (chunk ^ (token % 8))) * 16;
  }
  __device__ __forceinline__ u32 tile_sh(int slot, int tile) const {
    return weights_sh + slot * kStageBytes + tile * (L::kTileWords * 4);
  }

  const GemmArguments& args;
  const int lane, warp_n, warp_k, tile_n, first_token;
  const GroupReader<T, kBits> groups;
  const u32* weights_gl_rd;
  const u16* act_gl_rd[kActLoads];
  const u32 weights_sh, act_sh_wr, act_sh_rd;
  float sums[kTokenTiles][kTileBlocks][4] = {};
};

}  // namespace marlin
