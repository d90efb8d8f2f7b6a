// From packed integers to 16-bit floating point, exactly.
//
// An unsigned integer ORed into the mantissa of a power of two is that power plus the integer: no conversion
// instruction is needed. Subtracting (power + zero point) leaves q - z. Both sides are integers below 2048 (fp16) or
// 256 (bf16), so the difference is exact, whatever the zero point. (Kim, Henry, Fahim, Awadalla: "Who says elephants
// can't run", 2022.)
#pragma once

#include "ptx.cuh"

namespace marlin {

// (word & kMask) | kBits in one instruction, which compilers do not find by themselves when both are constants.
template <u32 kMask, u32 kBits>
__device__ __forceinline__ u32 and_or(u32 word) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "n"(kMask), "n"(kBits));
  return d;
}

// A number for each of a lane's two columns of a block, c and c + 8, as an operand for the pairs of a column. One
// register is enough. With two the number is there twice: more registers, but the assembler is freer.
struct OneRegister {
  u32 pair;
  __device__ __forceinline__ OneRegister() {}
  __device__ __forceinline__ explicit OneRegister(u32 pair) : pair(pair) {}
  __device__ __forceinline__ LowTwice first() const { return {pair}; }
  __device__ __forceinline__ HighTwice second() const { return {pair}; }
};
struct TwoRegisters {
  u32 twice[2];
  __device__ __forceinline__ TwoRegisters() {}
  __device__ __forceinline__ explicit TwoRegisters(u32 pair) : twice{low_twice(pair), high_twice(pair)} {}
  __device__ __forceinline__ u32 first() const { return twice[0]; }
  __device__ __forceinline__ u32 second() const { return twice[1]; }
};

// Decoder<T, kBits, Columns> turns a lane's word(s) of one block into the four registers of an m16n8k16 operand A:
// rows r, r+1 of column c; the same of column c+8; rows r+8, r+9 of column c; the same of column c+8.
template <class T, int kBits, class Columns>
struct Decoder;

template <class Columns>
struct Decoder<Half, 4, Columns> {
  struct Offsets {
    Columns low;   // -(1024 + z)
    Columns high;  // -(64 + z)
  };

  // `zeros` has the zero point of column c in its low half and that of column c + 8 in its high half.
  static __device__ __forceinline__ Offsets offsets(u32 zeros) {
    // -1024 is 0xe400, whose last bit counts 1; -64 is 0xd400, whose last bit counts 1/16.
    return {Columns(zeros | 0xe400e400u), Columns((zeros << 4) | 0xd400d400u)};
  }

  static __device__ __forceinline__ void decode(u32 (&frag)[4], const u32* words, const Offsets& z) {
    const u32 w = words[0], w8 = words[0] >> 8;  // nibbles 1 and 5 are read in place, as 1024 + 16 q
    frag[0] = add2(Half{}, and_or<0x000f000fu, 0x64006400u>(w), z.low.first());
    frag[2] = add2_sixteenth(Half{}, and_or<0x00f000f0u, 0x64006400u>(w), z.high.first());
    frag[1] = add2(Half{}, and_or<0x000f000fu, 0x64006400u>(w8), z.low.second());
    frag[3] = add2_sixteenth(Half{}, and_or<0x00f000f0u, 0x64006400u>(w8), z.high.second());
  }
};

template <class Columns>
struct Decoder<Bfloat16, 4, Columns> {
  struct Offsets {
    Columns low;  // -(128 + z)
  };

  static __device__ __forceinline__ Offsets offsets(u32 zeros) {
    return {Columns(zeros | 0xc300c300u)};  // -128 is 0xc300, whose last bit counts 1
  }

  static __device__ __forceinline__ void decode(u32 (&frag)[4], const u32* words, const Offsets& z) {
    const u32 w = words[0];
    frag[0] = add2(Bfloat16{}, and_or<0x000f000fu, 0x43004300u>(w), z.low.first());
    frag[2] = add2(Bfloat16{}, and_or<0x000f000fu, 0x43004300u>(w >> 4), z.low.first());
    frag[1] = add2(Bfloat16{}, and_or<0x000f000fu, 0x43004300u>(w >> 8), z.low.second());
    frag[3] = add2(Bfloat16{}, and_or<0x000f000fu, 0x43004300u>(w >> 12), z.low.second());
  }
};

template <class Columns>
struct Decoder<Half, 8, Columns> {
  struct Offsets {
    Columns low;  // -(1024 + z)
  };

  static __device__ __forceinline__ Offsets offsets(u32 zeros) { return {Columns(zeros | 0xe400e400u)}; }

  static __device__ __forceinline__ void decode(u32 (&frag)[4], const u32* words, const Offsets& z) {
    const u32 k1024 = 0x64646464u;  // bytes 0 and 2, then 1 and 3, each under the high byte of 1024
    frag[0] = add2(Half{}, __byte_perm(words[0], k1024, 0x4240), z.low.first());
    frag[2] = add2(Half{}, __byte_perm(words[0], k1024, 0x4341), z.low.first());
    frag[1] = add2(Half{}, __byte_perm(words[1], k1024, 0x4240), z.low.second());
    frag[3] = add2(Half{}, __byte_perm(words[1], k1024, 0x4341), z.low.second());
  }
};

template <class Columns>
struct Decoder<Bfloat16, 8, Columns> {
  // Eight bits do not fit beside a power of two in bf16's seven: the way goes through fp32. |q - z| <= 255 is exact in
  // bf16.
  struct Offsets {
    float low[2];  // 2^23 + z for columns c and c + 8
  };

  static __device__ __forceinline__ Offsets offsets(u32 zeros) {
    return {{__uint_as_float(0x4b000000u | (zeros & 0xffffu)), __uint_as_float(0x4b000000u | (zeros >> 16))}};
  }

  static __device__ __forceinline__ void decode(u32 (&frag)[4], const u32* words, const Offsets& z) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const u32 word = words[column];
      const float zero = z.low[column];
      frag[column] = pack2(Bfloat16{}, value<0>(word, zero), value<2>(word, zero));
      frag[column + 2] = pack2(Bfloat16{}, value<1>(word, zero), value<3>(word, zero));
    }
  }

 private:
  template <int kByte>
  static __device__ __forceinline__ float value(u32 word, float zero) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + kByte)) - zero;
  }
};

template <class T, class Columns>
__device__ __forceinline__ void scale(u32 (&frag)[4], const Columns& scales) {
  frag[0] = mul2(T{}, frag[0], scales.first());
  frag[2] = mul2(T{}, frag[2], scales.first());
  frag[1] = mul2(T{}, frag[1], scales.second());
  frag[3] = mul2(T{}, frag[3], scales.second());
}

}  // namespace marlin
