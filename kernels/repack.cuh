// AWQ -> Marlin: the same values, spread the way README.md shows. Reads and writes every byte once, 16 at a time.
//
// A thread serves the four rows 2q, 2q+1, 2q+8, 2q+9 of a tile (q = 0..3), from which the lanes 4i + q (i = 0..7) take
// all that they own. Within 16 columns (4 bits), the eight words that it read and the eight that it writes are an 8x8
// matrix of nibbles and its transpose; with 8 bits, 4x4 bytes.
#pragma once

#include "ptx.cuh"

namespace marlin {

constexpr int kRowsOfThread = 4;
constexpr int kThreadsOfTile = kTileRows / kRowsOfThread;

__device__ __forceinline__ int row_of_thread(int q, int i) { return 2 * q + i % 2 + 8 * (i / 2); }

// Swaps the upper half of x's bytes (or 16-bit halves) with the lower of y's: one round of a transpose.
template <u32 kLowSelector, u32 kHighSelector>
__device__ __forceinline__ void exchange(u32& x, u32& y) {
  const u32 low = __byte_perm(x, y, kLowSelector), high = __byte_perm(x, y, kHighSelector);
  x = low, y = high;
}
__device__ __forceinline__ void exchange_halves(u32& x, u32& y) { exchange<0x5410, 0x7632>(x, y); }
__device__ __forceinline__ void exchange_bytes(u32& x, u32& y) { exchange<0x6240, 0x7351>(x, y); }
__device__ __forceinline__ void exchange_nibbles(u32& x, u32& y) {
  const u32 low = (x & 0x0f0f0f0fu) | ((y & 0x0f0f0f0fu) << 4), high = ((x >> 4) & 0x0f0f0f0fu) | (y & 0xf0f0f0f0u);
  x = low, y = high;
}

// Row f of the matrix is the word m[f], its column p the word's field p.
__device__ __forceinline__ void transpose_nibbles(u32 (&m)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) exchange_halves(m[i], m[i + 4]);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i % 4 < 2) exchange_bytes(m[i], m[i + 2]);
#pragma unroll
  for (int i = 0; i < 8; i += 2) exchange_nibbles(m[i], m[i + 1]);
}
__device__ __forceinline__ void transpose_bytes(u32 (&m)[4]) {
  exchange_halves(m[0], m[2]);
  exchange_halves(m[1], m[3]);
  exchange_bytes(m[0], m[1]);
  exchange_bytes(m[2], m[3]);
}

// awq: [size_k, size_n / f], rows awq_stride words apart. marlin: [size_k / 16, size_n * 16 / f], contiguous.
template <int kBits>
struct Repack {
  using L = Layout<kBits>;
  static constexpr int kRowWords = kTileColumns / L::kPackFactor;  // of a source row in a tile

  static __device__ __forceinline__ void run(const u32* awq, u32* marlin, int size_k, int size_n, i64 awq_stride) {
    const int tiles_n = size_n / kTileColumns;
    const i64 tile = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / kThreadsOfTile;
    const int q = threadIdx.x % kThreadsOfTile;
    if (tile >= i64(size_k / kTileRows) * tiles_n) return;

    const u32* awq_gl_rd = awq + tile / tiles_n * kTileRows * awq_stride + tile % tiles_n * kRowWords;
    u32 words[kRowsOfThread][kRowWords];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i)
#pragma unroll
      for (int w = 0; w < kRowWords; w += 4)
        load_cached(reinterpret_cast<u32(&)[4]>(words[i][w]), awq_gl_rd + row_of_thread(q, i) * awq_stride + w);
    spread(words, marlin + tile * L::kTileWords + q * L::kLaneWords);
  }

 private:
  // Field f of a target word is value kInterleave[f]: of the rows' values v0, v1, v2, v3 (and v4 .. v7, eight columns
  // on).
  static __device__ __forceinline__ void spread(const u32 (&words)[4][8], u32* lane_gl_wr) {
    u32 out[8][kTileBlocks];
#pragma unroll
    for (int j = 0; j < kTileBlocks; ++j) {
      u32 m[8];
#pragma unroll
      for (int f = 0; f < 8; ++f) m[f] = words[kInterleave4[f] % 4][2 * j + kInterleave4[f] / 4];
      transpose_nibbles(m);
#pragma unroll
      for (int p = 0; p < 8; ++p) out[kAwqOrder4[p]][j] = m[p];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) store(lane_gl_wr + i * kThreadsOfTile * L::kLaneWords, out[i]);
  }

  static __device__ __forceinline__ void spread(const u32 (&words)[4][16], u32* lane_gl_wr) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {  // columns 4e .. 4e + 3 of every eight
      u32 out[4][8];
#pragma unroll
      for (int octet = 0; octet < 8; ++octet) {
        u32 m[4];
#pragma unroll
        for (int f = 0; f < 4; ++f) m[f] = words[kInterleave8[f]][2 * octet + e];
        transpose_bytes(m);
#pragma unroll
        for (int p = 0; p < 4; ++p) out[kAwqOrder8[p]][octet] = m[p];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32* to = lane_gl_wr + (4 * e + i) * kThreadsOfTile * L::kLaneWords;
        store(to, reinterpret_cast<const u32(&)[4]>(out[i][0]));
        store(to + 4, reinterpret_cast<const u32(&)[4]>(out[i][4]));
      }
    }
  }

  static __device__ __forceinline__ void store(u32* to, const u32 (&v)[4]) {
    *reinterpret_cast<U32x4*>(to) = {v[0], v[1], v[2], v[3]};
  }
};

}  // namespace marlin
