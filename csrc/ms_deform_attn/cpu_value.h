// Reading and writing values of the four types as vectors of the type of the arithmetic.
#pragma once

#include "cpu_vector.h"

namespace dn_detr {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

template <int N>
DN_DETR_INLINE Vector<float, N> widen_half(Vector<uint16_t, N> half) {
#if DN_DETR_VECTOR_BYTES == 64
  if constexpr (N == 16) return (Vector<float, N>)_mm512_maskz_cvtph_ps(-1, (__m256i)half);
#endif
#if DN_DETR_VECTOR_BYTES >= 32
  if constexpr (N == 8) return (Vector<float, N>)_mm256_cvtph_ps((__m128i)half);
#endif
  using U = Vector<uint32_t, N>;
  const U bits = __builtin_convertvector(half, U);
  // Shifted into place, the exponent is 112 too small; the product also normalises subnormals.
  const U finite = bits_as<U>(bits_as<Vector<float, N>>((bits & 0x7fff) << 13) * 0x1p112f);
  const U magnitude = (bits & 0x7c00) == 0x7c00 ? finite | 0x7f800000 : finite;
  return bits_as<Vector<float, N>>(magnitude | ((bits & 0x8000) << 16));
}

// Rounds to nearest, ties to even.
DN_DETR_INLINE uint16_t narrow_half(float number) {
  const uint32_t bits = bits_as<uint32_t>(number);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more
  if (magnitude < 0x38800000) {  // below 2^-14: the sum puts the subnormal into the low bits
    return sign | (bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000);
  }
  return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

template <int N>
DN_DETR_INLINE Vector<uint16_t, N> narrow_halves(Vector<float, N> numbers) {
#if DN_DETR_VECTOR_BYTES == 64
  if constexpr (N == 16) return (Vector<uint16_t, N>)_mm512_maskz_cvtps_ph(-1, (__m512)numbers, 0);
#endif
#if DN_DETR_VECTOR_BYTES >= 32
  if constexpr (N == 8) return (Vector<uint16_t, N>)_mm256_cvtps_ph((__m256)numbers, 0);
#endif
  Vector<uint16_t, N> halves;
  for (int i = 0; i < N; ++i) halves[i] = narrow_half(numbers[i]);
  return halves;
}

// The bfloat16 is in the upper half of each result.
template <int N>
DN_DETR_INLINE Vector<uint32_t, N> round_to_bfloat16(Vector<float, N> numbers) {
  using U = Vector<uint32_t, N>;
  const U bits = bits_as<U>(numbers);
  const U rounded = bits + 0x7fff + (bits >> 16 & 1);
  return numbers == numbers ? rounded : bits | 0x400000;  // NaN stays NaN
}
template <int N>
DN_DETR_INLINE Vector<uint16_t, N> narrow_bfloat16(Vector<float, N> numbers) {
  return __builtin_convertvector(round_to_bfloat16<N>(numbers) >> 16, Vector<uint16_t, N>);
}

template <int N>
DN_DETR_INLINE Vector<float, N> read(const float* from) {
  return load<N>(from);
}
template <int N>
DN_DETR_INLINE Vector<double, N> read(const double* from) {
  return load<N>(from);
}
template <int N>
DN_DETR_INLINE Vector<float, N> read(const BFloat16* from) {
  using U = Vector<uint32_t, N>;
  return bits_as<Vector<float, N>>(__builtin_convertvector(load<N>(&from->bits), U) << 16);
}
template <int N>
DN_DETR_INLINE Vector<float, N> read(const Float16* from) {
  return widen_half<N>(load<N>(&from->bits));
}

template <int N>
DN_DETR_INLINE void write(float* to, Vector<float, N> numbers) {
  store(to, numbers);
}
template <int N>
DN_DETR_INLINE void write(double* to, Vector<double, N> numbers) {
  store(to, numbers);
}
template <int N>
DN_DETR_INLINE void write(BFloat16* to, Vector<float, N> numbers) {
  store(&to->bits, narrow_bfloat16<N>(numbers));
}
template <int N>
DN_DETR_INLINE void write(Float16* to, Vector<float, N> numbers) {
  store(&to->bits, narrow_halves<N>(numbers));
}

// A block is kVectors vectors of neighbouring channels. Blocks of bfloat16 are read two numbers at a
// time, the lower and the upper half of 32 bits: numbers 0, 2, 4, ... of every 2 N become one vector,
// 1, 3, 5, ... the next. The order matters to nobody who adds and multiplies whole blocks, and
// write_block() restores it.
template <class T, int kVectors>
constexpr bool kPaired = false;
template <int kVectors>
constexpr bool kPaired<BFloat16, kVectors> = kVectors % 2 == 0;

template <int N, int kVectors, class T>
DN_DETR_INLINE void read_block(const T* from, Vector<Arithmetic<T>, N>* block) {
  if constexpr (kPaired<T, kVectors>) {
    using V = Vector<float, N>;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2) {
      Vector<uint32_t, N> pairs;
      memcpy(&pairs, from + v * N, sizeof(pairs));
      block[v] = bits_as<V>(pairs << 16);
      block[v + 1] = bits_as<V>(pairs & 0xffff0000);
    }
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) block[v] = read<N>(from + v * N);
  }
}

template <int N, int kVectors, class T>
DN_DETR_INLINE void write_block(T* to, const Vector<Arithmetic<T>, N>* block) {
  if constexpr (kPaired<T, kVectors>) {
    for (int v = 0; v < kVectors; v += 2) {
      const auto lower = round_to_bfloat16<N>(block[v]), upper = round_to_bfloat16<N>(block[v + 1]);
      const Vector<uint32_t, N> pairs = lower >> 16 | (upper & 0xffff0000);
      memcpy(to + v * N, &pairs, sizeof(pairs));
    }
  } else {
    for (int v = 0; v < kVectors; ++v) write<N>(to + v * N, block[v]);
  }
}

}  // namespace
}  // namespace dn_detr
