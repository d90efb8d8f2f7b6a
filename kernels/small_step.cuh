// A warp's step in the kernels for few tokens: some rows of one tile of 64 columns, by up to 32 tokens.
//
// The transposed weight is operand A of mma.m16n8k16, eight tokens are its columns. Weights and activations of a step
// lie in shared memory that no other warp looks at, copied there some steps ago; a lane reads what the tensor core
// wants.
// Up to 16 tokens scales are not applied to weights but, in fp32, to a group's sum: cheaper, as a group has more rows
// than a lane has sums. With more tokens there are no registers for two sets of sums, and nothing to gain.
#pragma once

#include "gemm_base.cuh"

namespace marlin {

template <class T, int kBits, int kGroupSize, int kTokenTiles, int kStepRows, class Columns>
struct SmallStep {
  using L = Layout<kBits>;
  using D = Decoder<T, kBits, Columns>;
  using Reader = GroupReader<T, kBits>;

  static_assert(kGroupSize == 32 || kGroupSize == 64 || kGroupSize == 128, "a single group is read as one of these");
  static_assert(kTokenTiles <= 4, "more tokens want shared weights: see gemm_portable.cuh");
  static_assert(kStepRows == 64 || kStepRows == 128, "rows of a step, which must divide K");

  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr bool kScalesSums = kTokenTiles <= 2;
  static constexpr int kStepTiles = kStepRows / kTileRows;
  static constexpr int kScaledRows = kGroupSize < kStepRows ? kGroupSize : kStepRows;  // rows summed before scaling
  static constexpr int kScaledTiles = kScaledRows / kTileRows;
  static constexpr int kStepGroups = kStepRows / kScaledRows;

  // Activations are rows of tokens, 16-byte chunks XOR-swizzled for ldmatrix.
  static constexpr int kRowChunks = kStepRows / 8;
  static constexpr int kActBytes = kTokens * kStepRows * 2;
  static constexpr int kActLoads = kTokens * kRowChunks / kWarpLanes;  // cp.async of a lane
  static constexpr int kWeightBytes = kStepTiles * L::kTileWords * 4;
  static constexpr int kSumBytes = SumTile<kTileColumns>::bytes(kTokens);
  static_assert(kTokens * kRowChunks % kWarpLanes == 0, "the lanes of a warp copy whole rounds of chunks");
  static_assert(kRowChunks >= 8, "the swizzle permutes eight chunks");

  // Block j's columns lane/4 + 16 j and + 8 of tokens 8 t + 2 (lane mod 4) and + 1.
  using Sums = float[kTokenTiles][kTileBlocks][4];

  struct Groups {
    LaneGroup<kBits> of[kStepGroups];
  };

  static __device__ __forceinline__ void read_groups(Groups& into, const Reader& groups, int step, int lane) {
#pragma unroll
    for (int i = 0; i < kStepGroups; ++i)
      groups.read(into.of[i], (step * kStepRows + i * kScaledRows) / kGroupSize, lane);
  }

  // The same by way of shared memory, where a step's groups take so many bytes.
  static constexpr int kGroupBytes = kStepGroups * L::kGroupBytes;
  static __device__ __forceinline__ void copy_groups(u32 groups_sh, const GroupCopier<kBits>& groups, int step) {
#pragma unroll
    for (int i = 0; i < kStepGroups; i += 2)
      groups.copy(groups_sh + i * L::kGroupBytes, step * kStepRows / kGroupSize + i, min(kStepGroups - i, 2));
  }
  static __device__ __forceinline__ void load_groups(Groups& into, const Reader& groups, u32 groups_sh, int lane) {
#pragma unroll
    for (int i = 0; i < kStepGroups; ++i) {
      const u32 group_sh = groups_sh + i * L::kGroupBytes;
      groups.read_shared(into.of[i], group_sh, group_sh + kTileColumns * 2, lane);
    }
  }

  static __device__ __forceinline__ void copy_weights(u32 weights_sh, const u32* tile_gl_rd, i64 qweight_stride,
                                                      int lane) {
#pragma unroll
    for (int i = 0; i < kStepTiles; ++i) {
      copy_tile<kBits>(weights_sh + i * (L::kTileWords * 4), tile_gl_rd, lane);
      tile_gl_rd += qweight_stride;
    }
  }

  // The token and the chunk that a lane copies in a round, and where the chunk lies.
  static __device__ __forceinline__ int token_of(int round, int lane) {
    return (lane + round * kWarpLanes) / kRowChunks;
  }
  static __device__ __forceinline__ int chunk_of(int round, int lane) {
    return (lane + round * kWarpLanes) % kRowChunks;
  }
  static __device__ __forceinline__ u32 chunk_place(int token, int chunk) {
    return (token * kRowChunks + (chunk ^ (token % 8))) * 16;
  }

  static __device__ __forceinline__ void multiply(Sums& sums, u32 act_sh, u32 weights_sh, const Reader& groups,
                                                  const Groups& step_groups, int lane) {
    Sums partial;
    u32 act[kTokenTiles][4];  // operand B of two tiles
#pragma unroll
    for (int i = 0; i < kStepTiles; ++i) {
      if (kScalesSums && i % kScaledTiles == 0) clear(partial);
      if (i % 2 == 0) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t)
          ldmatrix_x4(act[t], act_sh + chunk_place(8 * t + lane % 8, 2 * i + lane / 8));
      }
      u32 words[L::kLaneWords];
      load_lane_words<kBits>(words, weights_sh + i * (L::kTileWords * 4), lane);
      const LaneGroup<kBits>& group = step_groups.of[i / kScaledTiles];
#pragma unroll
      for (int j = 0; j < kTileBlocks; ++j) {
        u32 weight[4];
        D::decode(weight, words + j * L::kBlockWords, D::offsets(groups.zeros(group, j)));
        if (!kScalesSums) scale<T>(weight, Columns(groups.scales(group, j)));
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t)
          mma(T{}, (kScalesSums ? partial : sums)[t][j], weight, act[t][2 * (i % 2)], act[t][2 * (i % 2) + 1]);
      }
      if (kScalesSums && i % kScaledTiles == kScaledTiles - 1) add_scaled(sums, partial, groups, group);
    }
  }

  // Puts the sums where any thread can read them.
  static __device__ __forceinline__ void deposit(const Sums& sums, const SumTile<kTileColumns>& tile,
                                                 const Reader& groups, int lane) {
#pragma unroll
    for (int m = 0; m < kLaneColumns; ++m) {
      const float scale = groups.final_scale(lane, m);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          tile.at(8 * t + 2 * (lane % 4) + i, lane / 4 + 8 * m) = scale * sums[t][m / 2][2 * (m % 2) + i];
    }
  }

 private:
  static __device__ __forceinline__ void clear(Sums& partial) {
#pragma unroll
    for (int i = 0; i < kTokenTiles * kTileBlocks * 4; ++i) (&partial[0][0][0])[i] = 0.f;
  }

  static __device__ __forceinline__ void add_scaled(Sums& sums, const Sums& partial, const Reader& groups,
                                                    const LaneGroup<kBits>& group) {
#pragma unroll
    for (int j = 0; j < kTileBlocks; ++j) {
      const u32 scales = groups.scales(group, j);
      const float first = low_float(T{}, scales), second = high_float(T{}, scales);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[t][j][i] += partial[t][j][i] * (i < 2 ? first : second);
    }
  }
};

}  // namespace marlin
