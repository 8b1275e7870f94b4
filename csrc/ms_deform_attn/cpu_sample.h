// The rows of D channels that samples are made of, and the forward pass over them.
#pragma once

#include "cpu_prepare.h"

namespace dn_detr {
namespace {

constexpr int kMaxVectors = 4;  // accumulated at once: what AVX2's registers hold

// ---- rows of values ----

template <class T>
struct ValueRows {
  const T* cells;
  int64_t stride;
  const T* zeros;
};

template <bool kPacked, class T>
DN_DETR_INLINE ValueRows<T> value_rows(
    const MSDeformAttnArguments& arguments, const CpuTask& task, int64_t head, int64_t dim,
    const void* zero_row) {
  if constexpr (kPacked) return {static_cast<const T*>(task.packed), dim, nullptr};
  return {row_of<T>(arguments.value, arguments.value_strides, task.batch, 0, head),
          arguments.value_strides.row, static_cast<const T*>(zero_row)};
}

// The 4 corners of sample i: pointers to rows of which -1 is `nowhere`.
template <bool kPacked, class T>
DN_DETR_INLINE void corner_rows(
    T* cells, int64_t stride, T* nowhere, const int32_t* index, int64_t n, int64_t i, T* rows[4]) {
  if constexpr (kPacked) {
    rows[0] = cells + index[i] * stride;
    rows[1] = rows[0] + stride;
    rows[2] = cells + index[2 * n + i] * stride;
    rows[3] = rows[2] + stride;
  } else {
    for (int c = 0; c < 4; ++c) {
      const int64_t cell = index[c * n + i];
      rows[c] = cell < 0 ? nowhere : cells + cell * stride;
    }
  }
}

// Few queries read rows that nobody has read before: ask for all of them at once, early.
template <bool kPacked, class T, class A>
DN_DETR_INLINE void prefetch_corners(
    const Samples<A>& samples, const Item<A>& item, const T* cells, int64_t stride, int64_t dim) {
  if constexpr (!kPacked) {
    for (int64_t c = 0; c < 4; ++c) {
      const int32_t* index = item.index + c * samples.padded_count;
      for (int64_t i = 0; i < samples.count; ++i) {
        prefetch<kSecondCache>(cells + (index[i] < 0 ? 0 : index[i]) * stride, dim);
      }
    }
  }
}

// Calls block<lanes, vectors>(first channel) until all channels are covered.
template <class A, class Block>
DN_DETR_INLINE void for_each_block(int64_t dim, Block block) {
  constexpr int N = kLanes<A>;
  using std::integral_constant;
  int64_t channel = 0;
  for (; dim - channel >= kMaxVectors * N; channel += kMaxVectors * N) {
    block(integral_constant<int, N>(), integral_constant<int, kMaxVectors>(), channel);
  }
  for (; dim - channel >= 2 * N; channel += 2 * N) {
    block(integral_constant<int, N>(), integral_constant<int, 2>(), channel);
  }
  for (; dim - channel >= N; channel += N) {
    block(integral_constant<int, N>(), integral_constant<int, 1>(), channel);
  }
  if constexpr (N > 4) {
    for (; channel < dim; channel += 4) {
      block(integral_constant<int, 4>(), integral_constant<int, 1>(), channel);
    }
  }
}

// ---- forward ----

template <bool kPacked, int N, int kVectors, class T>
DN_DETR_INLINE void sample_block(
    const Samples<Arithmetic<T>>& samples, const Item<Arithmetic<T>>& item, ValueRows<T> values,
    int64_t channel, T* output) {
  using A = Arithmetic<T>;
  using V = Vector<A, N>;
  constexpr int kSets = 4 / kVectors > 1 ? 4 / kVectors : 1;  // independent chains of additions
  const int64_t n = samples.padded_count;
  V sums[kSets][kVectors] = {};
  for (int64_t i = 0; i < samples.count; ++i) {
    const T* rows[4];
    corner_rows<kPacked>(values.cells, values.stride, values.zeros, item.index, n, i, rows);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const A weight = item.weight[c * n + i];
      V row[kVectors];
      read_block<N, kVectors>(rows[c] + channel, row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[c % kSets][v] += weight * row[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int s = 1; s < kSets; ++s) sums[0][v] += sums[s][v];
  }
  write_block<N, kVectors>(output + channel, sums[0]);
}

template <class T, int kDim, bool kPacked>
void forward_items(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  using A = Arithmetic<T>;
  const int64_t dim = kDim > 0 ? kDim : arguments.dim;
  Samples<A> samples;
  lay_out(arguments, task, samples);
  const auto rows = [&](int64_t head) {
    return value_rows<kPacked, T>(arguments, task, head, dim, samples.zero_row);
  };
  const auto fetch = [&](const Item<A>& item) __attribute__((always_inline)) {
    prefetch_corners<kPacked>(
        samples, item, rows(item.head).cells, rows(item.head).stride, dim);
  };
  for_each_item<kPacked, false, T>(arguments, task, samples, fetch, [&](const Item<A>& item) {
    T* output = sample_row<T>(arguments.output, arguments, task.batch, item.query, item.head, dim);
    for_each_block<A>(dim, [&](auto lanes, auto vectors, int64_t channel) {
      sample_block<kPacked, decltype(lanes)::value, decltype(vectors)::value, T>(
          samples, item, rows(item.head), channel, output);
    });
  });
}

}  // namespace
}  // namespace dn_detr
