// Vectors of N numbers on GCC's vector extensions, for one instruction set per translation unit.
//
// Everything lies in an unnamed namespace: the same source is compiled for several instruction
// sets, and the linker must not merge the results. For the same reason nothing here instantiates
// functions of the standard library. DN_DETR_VECTOR_BYTES is 16 (any processor), 32 (AVX2, FMA and
// F16C) or 64 (AVX-512); GCC's own macros do not follow its target pragma.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if DN_DETR_VECTOR_BYTES >= 32
#include <immintrin.h>
#endif

namespace dn_detr {
namespace {

#define DN_DETR_INLINE inline __attribute__((always_inline))

template <int kBytes>
struct SignedInteger;
template <>
struct SignedInteger<2> {
  using type = int16_t;
};
template <>
struct SignedInteger<4> {
  using type = int32_t;
};
template <>
struct SignedInteger<8> {
  using type = int64_t;
};

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
  typedef E unaligned __attribute__((vector_size(sizeof(E) * N), aligned(sizeof(E)), may_alias));
};
template <class E, int N>
using Vector = typename VectorOf<E, N>::type;
template <class E>
using IntegerOf = typename SignedInteger<sizeof(E)>::type;

template <class E>
constexpr int kLanes = DN_DETR_VECTOR_BYTES / int(sizeof(E));

template <int N, class E>
DN_DETR_INLINE Vector<E, N> load(const E* from) {
  return *reinterpret_cast<const typename VectorOf<E, N>::unaligned*>(from);
}

template <class V, class E>
DN_DETR_INLINE void store(E* to, V vector) {
  *reinterpret_cast<typename VectorOf<E, sizeof(V) / sizeof(E)>::unaligned*>(to) = vector;
}

// The first `count` elements of a row, the rest `fill`; never reads beyond the row.
template <int N, class E>
DN_DETR_INLINE Vector<E, N> load_part(const E* from, int64_t count, E fill) {
#if DN_DETR_VECTOR_BYTES == 64
  if constexpr (N == 16 && sizeof(E) == 4) {
    const auto mask = __mmask16((1u << count) - 1);
    return (Vector<E, N>)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, from);
  }
#elif DN_DETR_VECTOR_BYTES == 32
  if constexpr (N == 8 && sizeof(E) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lane);
    return (Vector<E, N>)_mm256_blendv_ps(
        _mm256_set1_ps(fill), _mm256_maskload_ps(from, mask), _mm256_castsi256_ps(mask));
  }
#endif
  E padded[N];
  for (int i = 0; i < N; ++i) padded[i] = fill;
  memcpy(padded, from, sizeof(E) * count);
  return load<N>(padded);
}

// Element order[i] of `from` in lane i.
template <class E, int N>
DN_DETR_INLINE Vector<E, N> permuted(Vector<E, N> from, Vector<IntegerOf<E>, N> order) {
#if defined(__clang__)
  Vector<E, N> result;
  for (int i = 0; i < N; ++i) result[i] = from[order[i]];
  return result;
#else
  return __builtin_shuffle(from, order);
#endif
}

template <class To, class From>
DN_DETR_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

#if defined(__clang__)
#define DN_DETR_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DN_DETR_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

// Elements 0, 2, 4, ... (or 1, 3, 5, ...) of a and b, one after the other.
template <int kOdd, class E, int N, int... I>
DN_DETR_INLINE Vector<E, N> every_second(
    Vector<E, N> a, Vector<E, N> b, std::integer_sequence<int, I...>) {
  using Indices = Vector<IntegerOf<E>, N>;
  return DN_DETR_SHUFFLE(Indices, a, b, (2 * I + kOdd)...);
}
template <class E, int N>
DN_DETR_INLINE Vector<E, N> even(Vector<E, N> a, Vector<E, N> b) {
  return every_second<0, E, N>(a, b, std::make_integer_sequence<int, N>());
}
template <class E, int N>
DN_DETR_INLINE Vector<E, N> odd(Vector<E, N> a, Vector<E, N> b) {
  return every_second<1, E, N>(a, b, std::make_integer_sequence<int, N>());
}

// a0, b0, a1, b1, ...: the lower (kFirst 0) or upper (N / 2) halves of both.
template <int kFirst, class E, int N, int... I>
DN_DETR_INLINE Vector<E, N> alternate(
    Vector<E, N> a, Vector<E, N> b, std::integer_sequence<int, I...>) {
  using Indices = Vector<IntegerOf<E>, N>;
  return DN_DETR_SHUFFLE(Indices, a, b, (kFirst + I / 2 + (I % 2) * N)...);
}
template <class E, int N>
DN_DETR_INLINE void store_pairs(E* to, Vector<E, N> a, Vector<E, N> b) {
  store(to, alternate<0, E, N>(a, b, std::make_integer_sequence<int, N>()));
  store(to + N, alternate<N / 2, E, N>(a, b, std::make_integer_sequence<int, N>()));
}

template <int kStep, class E, int N, int... I>
DN_DETR_INLINE Vector<E, N> rotated(Vector<E, N> a, std::integer_sequence<int, I...>) {
  using Indices = Vector<IntegerOf<E>, N>;
  return DN_DETR_SHUFFLE(Indices, a, a, ((I + kStep) % N)...);
}
// Sum (or maximum) over all lanes, in every lane.
template <class E, int N, int kStep = N / 2>
DN_DETR_INLINE Vector<E, N> sum_of_lanes(Vector<E, N> a) {
  a += rotated<kStep, E, N>(a, std::make_integer_sequence<int, N>());
  if constexpr (kStep > 1) return sum_of_lanes<E, N, kStep / 2>(a);
  return a;
}
template <class E, int N, int kStep = N / 2>
DN_DETR_INLINE Vector<E, N> max_of_lanes(Vector<E, N> a) {
  const Vector<E, N> b = rotated<kStep, E, N>(a, std::make_integer_sequence<int, N>());
  a = a > b ? a : b;
  if constexpr (kStep > 1) return max_of_lanes<E, N, kStep / 2>(a);
  return a;
}

// The two (or so) halves of a vector are added until 4 lanes are left.
template <class E, int N>
DN_DETR_INLINE Vector<E, 4> fold_to_four(Vector<E, N> a) {
  if constexpr (N == 4) {
    return a;
  } else {
    Vector<E, N / 2> halves[2];
    memcpy(halves, &a, sizeof(a));
    return fold_to_four<E, N / 2>(halves[0] + halves[1]);
  }
}

// Index of the neighbour that SSE's shufps takes: pairs (2 i, 2 i + 1) of a, then of b, within
// each group of four lanes.
template <int kOdd, int N, int... I>
DN_DETR_INLINE Vector<float, N> pairs_in_fours(
    Vector<float, N> a, Vector<float, N> b, std::integer_sequence<int, I...>) {
  using Indices = Vector<int32_t, N>;
  return DN_DETR_SHUFFLE(
      Indices, a, b, (I / 4 * 4 + I % 2 * 2 + kOdd + (I % 4 >= 2 ? N : 0))...);
}
template <int N>
DN_DETR_INLINE Vector<float, N> add_pairs(Vector<float, N> a, Vector<float, N> b) {
  constexpr auto sequence = std::make_integer_sequence<int, N>();
  return pairs_in_fours<0, N>(a, b, sequence) + pairs_in_fours<1, N>(a, b, sequence);
}

// (sum of a, sum of b, sum of c, sum of d): 6 shuffles and some halving instead of 4 sums.
template <int N>
DN_DETR_INLINE Vector<float, 4> four_sums(
    Vector<float, N> a, Vector<float, N> b, Vector<float, N> c, Vector<float, N> d) {
  return fold_to_four<float, N>(add_pairs<N>(add_pairs<N>(a, b), add_pairs<N>(c, d)));
}
template <int N>
DN_DETR_INLINE Vector<double, 4> four_sums(
    Vector<double, N> a, Vector<double, N> b, Vector<double, N> c, Vector<double, N> d) {
  Vector<double, 4> sums = {a[0], b[0], c[0], d[0]};
  for (int i = 1; i < N; ++i) sums += Vector<double, 4>{a[i], b[i], c[i], d[i]};
  return sums;
}

// exp(x) for x <= 0 to 1e-7 of the result; 0 below -87, NaN for NaN.
template <int N>
DN_DETR_INLINE Vector<float, N> exp_of_negative(Vector<float, N> x) {
  using V = Vector<float, N>;
  using U = Vector<uint32_t, N>;  // overflows for x below -87, where it is not used
  constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
  const V shifted = x * 1.44269504f + round_to_integer;
  const V n = shifted - round_to_integer;
  const V r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  V series = 1.0f / 5040 * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const V power = bits_as<V>((bits_as<U>(shifted) << 23) + 0x3f800000);
  return x < -87.0f ? V{} : series * power;
}
template <int N>
DN_DETR_INLINE Vector<double, N> exp_of_negative(Vector<double, N> x) {
  for (int i = 0; i < N; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace
}  // namespace dn_detr
