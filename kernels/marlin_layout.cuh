// The Marlin layout in numbers. README.md beside this file explains them, with pictures.
//
// awq2marlin holds the same constants in Python; tests/gemm/test_layout_header.py compares the two.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

namespace marlin {

constexpr int kTileRows = 16;     // rows (k) of a tile
constexpr int kTileColumns = 64;  // columns (n) of a tile
constexpr int kBlockColumns = 16; // columns of a block j, four of which make a tile
constexpr int kTileBlocks = kTileColumns / kBlockColumns;
constexpr int kWarpLanes = 32;
constexpr int kLaneColumns = kTileColumns / 8;  // a lane owns columns lane/4 + 8*m of a tile, m = 0..7

// Field i of a word holds value kInterleave[i] (weights) or position kInterleave[i] (zero points).
__device__ constexpr int kInterleave4[8] = {0, 2, 4, 6, 1, 3, 5, 7};
__device__ constexpr int kInterleave8[4] = {0, 2, 1, 3};

// Field i of an AWQ word holds column kAwqOrder[i] of the word's columns: the same numbers, another meaning.
__device__ constexpr int kAwqOrder4[8] = {0, 2, 4, 6, 1, 3, 5, 7};
__device__ constexpr int kAwqOrder8[4] = {0, 2, 1, 3};

template <int kBits>
struct Layout {
  static_assert(kBits == 4 || kBits == 8, "Marlin weights have 4 or 8 bits");
  static constexpr int kPackFactor = 32 / kBits;                               // values in a word
  static constexpr int kTileWords = kTileRows * kTileColumns / kPackFactor;    // words of a tile
  static constexpr int kLaneWords = kTileWords / kWarpLanes;                   // words of a lane in a tile
  static constexpr int kBlockWords = kLaneWords / kTileBlocks;                 // words of a lane in a block
  static constexpr int kLaneChunks = kLaneWords / 4;                           // 16-byte chunks of a lane in a tile
  static constexpr int kZeroWords = kLaneColumns / kPackFactor;                // zero-point words of a lane
  static constexpr int kTileZeroWords = kTileColumns / kPackFactor;            // zero-point words of a tile
  static constexpr int kGroupBytes = kTileColumns * 2 + kTileZeroWords * 4;    // a tile's scales and zero points
  static constexpr u32 kImpliedZeros = kBits == 4 ? 0x88888888u : 0x80808080u; // without qzeros
};

// Where `scales` holds the scale of the lane's m-th column, as an offset into the tile's 64 scales.
__host__ __device__ constexpr int grouped_scale_position(int lane, int m) { return 8 * (lane / 4) + m; }

// The same when there is a single group (blocks of 32).
__host__ __device__ constexpr int single_scale_position(int lane, int m) {
  const int b = lane / 4;
  return 32 * (m / 4) + 8 * (b / 2) + 2 * (m % 4) + b % 2;
}

}  // namespace marlin
