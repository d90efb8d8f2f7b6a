// What all GEMM kernels share: the arguments, a lane's scales and zero points, and the way a finished tile leaves.
#pragma once

#include "decode.cuh"

namespace marlin {

// out[size_m, size_n] = a[size_m, size_k] @ ((q - z) * s) + bias. Strides count elements of the tensor (words for
// packed ones).
struct GemmArguments {
  const u16* a;          // [size_m, size_k]
  const u32* qweight;    // [size_k / 16, size_n * 16 / f]
  const u16* scales;     // [num_groups, size_n], in the 32-wide order when num_groups is 1
  const u32* qzeros;     // [num_groups, size_n / f], or null: every zero point is 2^(bits-1)
  const u16* bias;       // [size_n], plain order, or null
  u16* out;              // [size_m, size_n], contiguous
  float* workspace;      // partial sums that a second launch adds, or null: this launch finishes the job
  int size_m, size_n, size_k, group_size;  // group_size = size_k when there is one group
  int num_splits;        // blocks (of a cluster, without a workspace) that share K; negative: that share all tiles' K
  i64 a_stride, qweight_stride, scales_stride, qzeros_stride;
};

// The entry points take the arguments one by one: whoever launches needs to know no structure's padding.
#define MARLIN_GEMM_PARAMETERS                                                                                  \
  const u16 *a, const u32 *qweight, const u16 *scales, const u32 *qzeros, const u16 *bias, u16 *out,            \
      float *workspace, int size_m, int size_n, int size_k, int group_size, int num_splits, i64 a_stride,       \
      i64 qweight_stride, i64 scales_stride, i64 qzeros_stride
#define MARLIN_GEMM_ARGUMENTS                                                                                       \
  GemmArguments {                                                                                                   \
    a, qweight, scales, qzeros, bias, out, workspace, size_m, size_n, size_k, group_size, num_splits, a_stride,     \
        qweight_stride, scales_stride, qzeros_stride                                                                \
  }

// The scales and zero points of one lane's columns (lane/4 + 8*m) in one group and some neighbouring blocks of a tile,
// as memory has them. Where they are read long before they are needed, reading must not look at them: GroupReader::
// scales and ::zeros do, at the time of use.
template <int kBits, int kBlocks = kTileBlocks>
struct LaneGroup {
  static constexpr int kZeroWords = kBlocks * kBits > 16 ? kBlocks * kBits / 16 : 1;
  u32 scales[kBlocks];  // per block j: column c low, column c + 8 high
  u32 zeros[kZeroWords];
};

// Reads LaneGroups of one tile of columns, from `first_block` on.
//
// A single group's scales belong to whole columns: the main loop then multiplies by one and the finished sums are
// scaled, in fp32.
template <class T, int kBits, int kBlocks = kTileBlocks>
class GroupReader {
  using L = Layout<kBits>;

 public:
  using Group = LaneGroup<kBits, kBlocks>;

  __device__ __forceinline__ GroupReader(const GemmArguments& args, int tile, int lane, int first_block = 0)
      : is_single(args.group_size >= args.size_k),
        has_zeros(args.qzeros != nullptr),
        first_block(first_block),
        scales_gl_rd(args.scales + tile * kTileColumns),
        // Without zero points any address will do that can be read: the weights' first tile is large enough.
        zeros_gl_rd((has_zeros ? args.qzeros + tile * L::kTileZeroWords : args.qweight) + L::kZeroWords * (lane / 4) +
                    first_block * kBits / 16),
        scales_stride(is_single ? 0 : args.scales_stride),
        zeros_stride(is_single || !has_zeros ? 0 : args.qzeros_stride) {}

  // With a single group, any index means that one.
  __device__ __forceinline__ void read(Group& into, int group, int lane) const {
    load_cached(into.scales, scales_gl_rd + group * scales_stride + grouped_scale_position(lane, 2 * first_block));
#pragma unroll
    for (int i = 0; i < Group::kZeroWords; ++i)
      into.zeros[i] = load_cached_word(zeros_gl_rd + group * zeros_stride + i);
  }

  // The same from shared memory, where the tile's scales and zero points lie as GroupCopier puts them.
  __device__ __forceinline__ void read_shared(Group& into, u32 scales_sh, u32 zeros_sh, int lane) const {
    load_shared(into.scales, scales_sh + 2 * grouped_scale_position(lane, 2 * first_block));
#pragma unroll
    for (int i = 0; i < Group::kZeroWords; ++i)
      load_shared(reinterpret_cast<u32(&)[1]>(into.zeros[i]),
                  zeros_sh + 4 * (L::kZeroWords * (lane / 4) + first_block * kBits / 16 + i));
  }

  // The scales of the j-th of these blocks as a pair (columns c and c + 8), in type T.
  __device__ __forceinline__ u32 scales(const Group& group, int j) const {
    return is_single ? ones(T{}) : group.scales[j];
  }

  // The zero points of that block as a pair of 16-bit integers.
  __device__ __forceinline__ u32 zeros(const Group& group, int j) const {
    constexpr u32 kPair = kBits == 4 ? 0x000f000fu : 0x00ff00ffu;
    const u32 zeros = has_zeros ? group.zeros[j * kBits / 16] : L::kImpliedZeros;
    return (zeros >> ((first_block + j) * kBits % 16)) & kPair;
  }

  // What finished sums of the lane's m-th column, counted from these blocks, are still to be multiplied by.
  __device__ __forceinline__ float final_scale(int lane, int m) const {
    return is_single ? low_float(T{}, scales_gl_rd[single_scale_position(lane, 2 * first_block + m)]) : 1.f;
  }

 private:
  bool is_single, has_zeros;
  int first_block;
  const u16* scales_gl_rd;
  const u32* zeros_gl_rd;
  i64 scales_stride, zeros_stride;
};

// A warp copies one or two groups of a tile to shared memory, each as [64 scales][zero points]: half of the lanes have
// one each, and a lane 16 bytes of it. What the main loop will not look at is not copied: scales of a single group.
template <int kBits>
class GroupCopier {
  using L = Layout<kBits>;
  static constexpr int kScaleChunks = kTileColumns * 2 / 16, kChunks = L::kGroupBytes / 16, kHalf = kWarpLanes / 2;
  static_assert(kChunks <= kHalf, "half a warp copies a group");

 public:
  __device__ __forceinline__ GroupCopier(const GemmArguments& args, int tile, int lane) : which(lane / kHalf) {
    const int chunk = lane % kHalf;
    const bool has_scales = chunk < kScaleChunks, is_single = args.group_size >= args.size_k;
    gl_rd = has_scales ? reinterpret_cast<const char*>(args.scales + tile * kTileColumns) + 16 * chunk
                       : reinterpret_cast<const char*>(args.qzeros + tile * L::kTileZeroWords) +
                             16 * (chunk - kScaleChunks);
    stride = is_single ? 0 : has_scales ? 2 * args.scales_stride : 4 * args.qzeros_stride;
    place = which * L::kGroupBytes + 16 * chunk;
    is_used = has_scales ? !is_single : chunk < kChunks && args.qzeros != nullptr;
  }

  // Brings a group to L2, from where it will be read otherwise.
  __device__ __forceinline__ void prefetch(int group) const {
    if (is_used && which == 0) prefetch_l2(gl_rd + group * stride);
  }

  // Copies groups from that one on: two at most.
  __device__ __forceinline__ void copy(u32 groups_sh, int group, int count) const {
    if (is_used && which < count) cp_async_16(groups_sh + place, gl_rd + (group + which) * stride);
  }

 private:
  const char* gl_rd;
  i64 stride;
  u32 place;
  const int which;
  bool is_used;
};

// A warp copies one tile of weights to shared memory just as it lies in global memory, from end to end. The two halves
// of a 32-byte sector must go to neighbouring places: otherwise each half costs a sector (seen in an H200's counters).
template <int kBits>
__device__ __forceinline__ void copy_tile(u32 tile_sh, const u32* tile_gl_rd, int lane) {
#pragma unroll
  for (int round = 0; round < Layout<kBits>::kLaneChunks; ++round)
    cp_async_16(tile_sh + (round * kWarpLanes + lane) * 16, tile_gl_rd + (round * kWarpLanes + lane) * 4);
}

// A lane's words of that tile.
template <int kBits>
__device__ __forceinline__ void load_lane_words(u32 (&words)[Layout<kBits>::kLaneWords], u32 tile_sh, int lane) {
  constexpr int kChunks = Layout<kBits>::kLaneChunks;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk)
    load_shared(reinterpret_cast<u32(&)[4]>(words[4 * chunk]), tile_sh + (lane * kChunks + chunk) * 16);
}

// A block's part of K, in whole steps: [begin, end). Shares differ by one step at most.
struct StepRange {
  int begin, end;
};
__device__ __forceinline__ StepRange split_steps(int num_steps, int split, int num_splits) {
  return {int(u32(num_steps * split) / u32(num_splits)), int(u32(num_steps * (split + 1)) / u32(num_splits))};
}

// Tells the stages at whose end a group ends. Groups shorter than a stage end with every one.
template <int kStageRows>
class GroupEnds {
 public:
  __device__ __forceinline__ GroupEnds(int group_size, StepRange range)
      : period(max(group_size, kStageRows)), rows_left(period - range.begin * kStageRows % period) {}

  // Of the next stage.
  __device__ __forceinline__ bool take() {
    rows_left -= kStageRows;
    const bool ends = rows_left == 0;
    if (ends) rows_left = period;
    return ends;
  }

 private:
  const int period;
  int rows_left;
};

// A warp copies the groups of neighbouring tiles to shared memory, each as [scales of all tiles][zero points of all
// tiles]. A stage brings those that begin after its first 32 rows and with the next stage: two at most.
template <int kBits, int kTiles, int kStageRows>
class StageGroups {
  using L = Layout<kBits>;
  static constexpr int kScaleBytes = kTileColumns * 2, kZeroBytes = L::kTileZeroWords * 4;  // of a tile

 public:
  static constexpr int kBytes = kTiles * L::kGroupBytes;

  // `tiles` are there, of kTiles.
  __device__ __forceinline__ StageGroups(const GemmArguments& args, int first_tile, int tiles, int lane,
                                         StepRange range)
      : scales{reinterpret_cast<const char*>(args.scales + first_tile * kTileColumns), 2 * args.scales_stride,
               tiles * kScaleBytes},
        zeros{reinterpret_cast<const char*>(args.qzeros + first_tile * L::kTileZeroWords), 4 * args.qzeros_stride,
              args.qzeros ? tiles * kZeroBytes : 0},
        lane(lane),
        at_once(args.group_size < kStageRows ? 2 : 1),
        num_groups(args.size_k / args.group_size),
        ends(args.group_size, range),
        next(range.begin * kStageRows / args.group_size + 1) {}

  // Copies what the next stage brings.
  __device__ __forceinline__ void copy(u32 groups_sh) {
    if (!ends.take()) return;
    const int count = min(at_once, num_groups - next);
    copy<kTiles * kScaleBytes>(scales, groups_sh + scales_place(0), count);
    copy<kTiles * kZeroBytes>(zeros, groups_sh + zeros_place(0), count);
    next += count;
  }

  // Where a tile's scales and zero points lie in a group.
  static __device__ __forceinline__ u32 scales_place(int tile) { return tile * kScaleBytes; }
  static __device__ __forceinline__ u32 zeros_place(int tile) { return kTiles * kScaleBytes + tile * kZeroBytes; }

 private:
  struct Rows {
    const char* gl_rd;
    i64 stride;
    int bytes;
  };

  // Of `count` groups. Half of the lanes have one each, if they are enough.
  template <int kMaxBytes>
  __device__ __forceinline__ void copy(const Rows& rows, u32 place_sh, int count) const {
    constexpr int kLanes = kMaxBytes / 16 <= kWarpLanes / 2 ? kWarpLanes / 2 : kWarpLanes;
    static_assert(kMaxBytes <= 16 * kLanes, "a lane copies 16 bytes of a group");
    const int chunk = lane % kLanes * 16;
#pragma unroll
    for (int i = 0; i < 2; i += kWarpLanes / kLanes) {
      const int which = i + lane / kLanes;
      if (which < count && chunk < rows.bytes)
        cp_async_16(place_sh + which * kBytes + chunk, rows.gl_rd + (next + which) * rows.stride + chunk);
    }
  }

  const Rows scales, zeros;
  const int lane, at_once, num_groups;
  GroupEnds<kStageRows> ends;
  int next;  // group
};

// Which slot of a ring in shared memory a step uses, and the parity of the barriers' phase in that round.
template <int kStages>
struct RingSlot {
  int index = 0;
  u32 parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

// ---- a finished tile ------------------------------------------------------------------------------------------------

// Sums wait in shared memory as [tokens][columns] in fp32. The padding spreads a warp's stores over all banks: in an
// accumulator fragment lane l holds column l/4 and tokens 2*(l%4), +1, and 2 * (columns + 4) = 8 modulo 32.
template <int kColumns>
struct SumTile {
  static_assert(kColumns % 16 == 0, "a row must start on 16 bytes and two rows lie 8 banks apart");
  static constexpr int kStride = kColumns + 4;
  float* sums;

  __device__ __forceinline__ float& at(int token, int column) const { return sums[token * kStride + column]; }
  __device__ __forceinline__ F32x4& quad(int token, int column) const {
    return *reinterpret_cast<F32x4*>(sums + token * kStride + column);
  }
  static __host__ __device__ constexpr int bytes(int tokens) { return tokens * kStride * 4; }
};

__device__ __forceinline__ void accumulate(F32x4& sum, const F32x4& v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

template <class T>
__device__ __forceinline__ void store_quad(const GemmArguments& args, i64 row, int column, F32x4 v) {
  if (args.bias) {
    const uint2 b = *reinterpret_cast<const uint2*>(args.bias + column);
    accumulate(v, {low_float(T{}, b.x), high_float(T{}, b.x), low_float(T{}, b.y), high_float(T{}, b.y)});
  }
  const uint2 packed = make_uint2(pack2(T{}, v.x, v.y), pack2(T{}, v.z, v.w));
  *reinterpret_cast<uint2*>(args.out + row * args.size_n + column) = packed;
}

// A split's sums of four columns, for sum_splits to add up.
__device__ __forceinline__ void store_partial(const GemmArguments& args, int split, i64 row, int column, F32x4 v) {
  *reinterpret_cast<F32x4*>(args.workspace + (i64(split) * args.size_m + row) * args.size_n + column) = v;
}

__device__ __forceinline__ bool splits_are_cluster(const GemmArguments& args) {
  return args.num_splits > 1 && !args.workspace;
}

// Writes the block's tile out, or sums it with those of the blocks that share its columns. The order of summation is
// that of K, whoever comes first: two runs give the same bits. `num_threads` threads call it, all of the block, after a
// barrier among them.
template <class T, int kColumns>
__device__ __forceinline__ void finish_tile(const GemmArguments& args, SumTile<kColumns> tile, int split,
                                            int first_token, int num_tokens, int first_column, int num_threads) {
  constexpr int kQuads = kColumns / 4;
  const int tokens = min(num_tokens, args.size_m - first_token);
  const int columns = min(kColumns, args.size_n - first_column);

  if (args.workspace) {
    for (int i = threadIdx.x; i < tokens * kQuads; i += num_threads) {
      const int token = i / kQuads, column = 4 * (i % kQuads);
      if (column < columns)
        store_partial(args, split, first_token + token, first_column + column, tile.quad(token, column));
    }
    return;
  }

#if MARLIN_HAS_CLUSTERS
  if (splits_are_cluster(args)) {
    cluster_sync();
    for (int i = threadIdx.x + num_threads * split; i < tokens * kQuads; i += num_threads * args.num_splits) {
      const int token = i / kQuads, column = 4 * (i % kQuads);
      const u32 address = shared_address(&tile.quad(token, column));
      F32x4 sum = load_cluster(cluster_address(address, 0));
      for (int rank = 1; rank < args.num_splits; ++rank) accumulate(sum, load_cluster(cluster_address(address, rank)));
      if (column < columns) store_quad<T>(args, first_token + token, first_column + column, sum);
    }
    cluster_leave();  // a block's shared memory must outlive its readers
    return;
  }
#endif

  for (int i = threadIdx.x; i < tokens * kQuads; i += num_threads) {
    const int token = i / kQuads, column = 4 * (i % kQuads);
    if (column < columns) store_quad<T>(args, first_token + token, first_column + column, tile.quad(token, column));
  }
}

// The second launch when the first left partial sums in the workspace: one thread for four columns of a row.
template <class T>
__device__ __forceinline__ void sum_splits(const GemmArguments& args) {
  start_next_launch();
  wait_for_last_launch();
  const i64 size = i64(args.size_m) * args.size_n;
  for (i64 i = 4 * (i64(blockIdx.x) * blockDim.x + threadIdx.x); i < size; i += i64(4) * gridDim.x * blockDim.x) {
    F32x4 sum = *reinterpret_cast<const F32x4*>(args.workspace + i);
    for (int split = 1; split < args.num_splits; ++split)
      accumulate(sum, *reinterpret_cast<const F32x4*>(args.workspace + split * size + i));
    store_quad<T>(args, i / args.size_n, int(i % args.size_n), sum);
  }
}

}  // namespace marlin
