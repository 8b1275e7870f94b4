// The backward pass: gradients of rows, and from them those of locations, weights and references.
#pragma once

#include "cpu_sample.h"

namespace dn_detr {
namespace {

template <class A>
struct GradientRows {
  A* cells;
  int64_t stride;
  A* ignored;
};

template <bool kPacked, int N, int kVectors, class T>
DN_DETR_INLINE void scatter_block(
    const Samples<Arithmetic<T>>& samples, const Item<Arithmetic<T>>& item, ValueRows<T> values,
    GradientRows<Arithmetic<T>> gradients, const T* grad_output, int64_t channel, int64_t first,
    int64_t last) {
  using A = Arithmetic<T>;
  using V = Vector<A, N>;
  const int64_t n = samples.padded_count;
  V gradient[kVectors];
  read_block<N, kVectors>(grad_output + channel, gradient);
  for (int64_t i = first; i < last; ++i) {
    const T* rows[4];
    A* sums[4];
    corner_rows<kPacked>(values.cells, values.stride, values.zeros, item.index, n, i, rows);
    corner_rows<kPacked>(
        gradients.cells, gradients.stride, gradients.ignored, item.index, n, i, sums);
    V products[4] = {};
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const A weight = item.weight[c * n + i];
      V row[kVectors];
      read_block<N, kVectors>(rows[c] + channel, row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        A* sum = sums[c] + channel + v * N;
        products[c] += gradient[v] * row[v];
        store(sum, load<N>(sum) + weight * gradient[v]);
      }
    }
    Vector<A, 4> dots = four_sums<N>(products[0], products[1], products[2], products[3]);
    if (channel > 0) dots += load<4>(item.dots + 4 * i);
    store(item.dots + 4 * i, dots);
  }
}

// factor * number, but zero for a factor of zero even if the number is NaN.
template <bool kGuarded, class V>
DN_DETR_INLINE V product(V factor, V number) {
  if constexpr (kGuarded) return factor == 0 ? V{} : factor * number;
  return factor * number;
}

// Lanes [first, last) of a vector that belongs at `to`; of a pair of vectors likewise.
struct Lanes {
  int64_t first, last;
};
template <class A, int N>
DN_DETR_INLINE void store_lanes(A* to, Vector<A, N> vector, Lanes lanes) {
  if (lanes.first == 0 && lanes.last == N) return store(to, vector);
  memcpy(to + lanes.first, reinterpret_cast<const A*>(&vector) + lanes.first,
         sizeof(A) * (lanes.last - lanes.first));
}
template <class A, int N>
DN_DETR_INLINE void store_lanes(A* to, Vector<A, N> x, Vector<A, N> y, Lanes lanes) {
  if (lanes.first == 0 && lanes.last == N) return store_pairs<A, N>(to, x, y);
  A pairs[2 * N];
  store_pairs<A, N>(pairs, x, y);
  memcpy(to + 2 * lanes.first, pairs + 2 * lanes.first,
         sizeof(A) * 2 * (lanes.last - lanes.first));
}

template <class A, int N>
struct SampleGradients {
  Vector<A, N> weight, x, y;  // x and y in units of cells
};

template <bool kGuarded, class A, int N>
DN_DETR_INLINE SampleGradients<A, N> sample_gradients(const Item<A>& item, int64_t i) {
  using V = Vector<A, N>;
  const A* dots = item.dots + 4 * i;
  const V a = load<N>(dots), b = load<N>(dots + N), c = load<N>(dots + 2 * N),
          d = load<N>(dots + 3 * N);
  const V even_ab = even<A, N>(a, b), even_cd = even<A, N>(c, d);
  const V odd_ab = odd<A, N>(a, b), odd_cd = odd<A, N>(c, d);
  const V top_left = even<A, N>(even_ab, even_cd), bottom_left = odd<A, N>(even_ab, even_cd);
  const V top_right = even<A, N>(odd_ab, odd_cd), bottom_right = odd<A, N>(odd_ab, odd_cd);

  const V right = load<N>(item.fraction_x + i), left = 1 - right;
  const V bottom = load<N>(item.fraction_y + i), top = 1 - bottom;
  const V attention = load<N>(item.attention + i);
  constexpr auto times = product<kGuarded, V>;
  SampleGradients<A, N> result;
  result.weight = times(top, times(left, top_left) + times(right, top_right)) +
                  times(bottom, times(left, bottom_left) + times(right, bottom_right));
  const V x = times(top, top_right - top_left) + times(bottom, bottom_right - bottom_left);
  const V y = times(left, bottom_left - top_left) + times(right, bottom_right - top_right);
  result.x = times(attention, x);
  result.y = times(attention, y);
  return result;
}

// grad_logits = attention * (grad - sum(attention * grad)); the row holds `grad` on entry.
template <class A>
DN_DETR_INLINE void softmax_backward_row(const A* attention, int64_t count, A* row) {
  constexpr int N = kLanes<A>;
  using V = Vector<A, N>;
  V sum = {};
  for (int64_t i = 0; i < count; i += N) {
    const V gradient = count - i >= N ? load<N>(row + i) : load_part<N>(row + i, count - i, A(0));
    sum += load<N>(attention + i) * gradient;
  }
  sum = sum_of_lanes<A, N>(sum);
  for (int64_t i = 0; i < count; i += N) {
    const V gradient = count - i >= N ? load<N>(row + i) : load_part<N>(row + i, count - i, A(0));
    const V result = load<N>(attention + i) * (gradient - sum);
    store_lanes<A, N>(row + i, result, {0, count - i < N ? count - i : N});
  }
}

// Sums over the points of each level, of the arrays that finish_item left in the item.
template <int kReference, class A>
DN_DETR_INLINE void sum_reference_gradients(
    const Item<A>& item, int64_t n, int first_level, int last_level, int points, A* row) {
  const A* terms[4] = {item.fraction_x, item.fraction_y, item.weight, item.weight + n};
  for (int l = first_level; l < last_level; ++l) {
    A sums[kReference] = {};
    for (int64_t i = int64_t(l) * points; i < int64_t(l + 1) * points; ++i) {
      for (int r = 0; r < kReference; ++r) sums[r] += terms[r][i];
    }
    for (int r = 0; r < kReference; ++r) row[l * kReference + r] = sums[r];
  }
}

template <int kReference, bool kGuarded, class A>
DN_DETR_INLINE void finish_item(
    const MSDeformAttnArguments& arguments, const CpuTask& task, const Samples<A>& samples,
    const Item<A>& item) {
  constexpr int N = kLanes<A>;
  using V = Vector<A, N>;
  const int64_t query = item.query, head = item.head, n = samples.padded_count;
  const int64_t first = int64_t(task.first_level) * arguments.points;
  const int64_t last = int64_t(task.last_level) * arguments.points;
  A* grad_locations = sample_row<A>(
      arguments.grad_locations, arguments, task.batch, query, head, 2 * samples.count);
  A* grad_weights = sample_row<A>(
      arguments.grad_weights, arguments, task.batch, query, head, samples.count);
  for (int64_t i = first / N * N; i < last; i += N) {
    const Lanes lanes{i < first ? first - i : 0, last - i < N ? last - i : N};
    const auto gradients = sample_gradients<kGuarded, A, N>(item, i);
    const V width = load<N>(samples.width + i), height = load<N>(samples.height + i);
    const V x = gradients.x * width, y = gradients.y * height;  // of locations
    V grad_x = x, grad_y = y;
    if constexpr (kReference == 2) {
      grad_x = gradients.x;
      grad_y = gradients.y;
    }
    if constexpr (kReference == 4) {
      const A* boxes =
          row_of<A>(arguments.references, arguments.reference_strides, task.batch, query, 0);
      const auto offsets = read_pairs<A, N>(
          row_of<A>(arguments.locations, arguments.location_strides, task.batch, query, head) +
              2 * i,
          samples.count - i);
      const A share = A(0.5) / arguments.points;
      constexpr auto times = product<true, V>;  // what is not finite samples nothing
      grad_x = times(x, spread_references<A, N>(boxes, samples, i, 2) * share);
      grad_y = times(y, spread_references<A, N>(boxes, samples, i, 3) * share);
      store(item.weight + i, times(x, offsets.x * share));
      store(item.weight + n + i, times(y, offsets.y * share));
    }
    store_lanes<A, N>(grad_weights + i, gradients.weight, lanes);
    store_lanes<A, N>(grad_locations + 2 * i, grad_x, grad_y, lanes);
    if constexpr (kReference != 0) {
      store(item.fraction_x + i, x);
      store(item.fraction_y + i, y);
    }
  }
  if constexpr (kReference != 0) {
    A* grad_references = sample_row<A>(
        arguments.grad_references, arguments, task.batch, query, head,
        arguments.levels * kReference);
    sum_reference_gradients<kReference>(
        item, n, task.first_level, task.last_level, arguments.points, grad_references);
    if (task.last_level - task.first_level == arguments.levels) {
      softmax_backward_row(item.attention, samples.count, grad_weights);
    }
  }
}

template <bool kGuarded, class A>
void finish(
    const MSDeformAttnArguments& arguments, const CpuTask& task, const Samples<A>& samples,
    const Item<A>& item) {
  switch (arguments.reference_dim) {
    case 0:
      return finish_item<0, kGuarded>(arguments, task, samples, item);
    case 2:
      return finish_item<2, kGuarded>(arguments, task, samples, item);
    default:
      return finish_item<4, kGuarded>(arguments, task, samples, item);
  }
}

template <class T, int kDim, bool kPacked>
void backward_items(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  using A = Arithmetic<T>;
  const int64_t dim = kDim > 0 ? kDim : arguments.dim;
  Samples<A> samples;
  lay_out(arguments, task, samples);
  const auto values =
      value_rows<kPacked, T>(arguments, task, task.first_head, dim, samples.zero_row);
  const GradientRows<A> gradients{
      static_cast<A*>(task.grad_rows), kPacked ? dim : task.grad_row_stride, samples.ignored_row};
  const int64_t first = int64_t(task.first_level) * arguments.points;
  const int64_t last = int64_t(task.last_level) * arguments.points;
  const auto grad_output = [&](int64_t query, int64_t head) {
    return row_of<T>(
        arguments.grad_output, arguments.grad_output_strides, task.batch, query, head);
  };
  const auto fetch = [&](const Item<A>& item) __attribute__((always_inline)) {
    prefetch_corners<kPacked>(samples, item, values.cells, values.stride, dim);
  };
  for_each_item<kPacked, true, T>(arguments, task, samples, fetch, [&](const Item<A>& item) {
    for_each_block<A>(dim, [&](auto lanes, auto vectors, int64_t channel) {
      scatter_block<kPacked, decltype(lanes)::value, decltype(vectors)::value, T>(
          samples, item, values, gradients, grad_output(item.query, item.head), channel, first,
          last);
    });
    finish<!kPacked>(arguments, task, samples, item);
  });
}

template <class A>
void softmax_backward(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  Samples<A> samples;
  lay_out(arguments, task, samples);
  A* attention = samples.items[0][0].attention;
  for (int64_t query = task.first_query; query < task.last_query; ++query) {
    for (int64_t head = task.first_head; head < task.last_head; ++head) {
      softmax(
          row_of<A>(arguments.weights, arguments.weight_strides, task.batch, query, head),
          samples.count, samples.padded_count, attention);
      A* row = sample_row<A>(
          arguments.grad_weights, arguments, task.batch, query, head, samples.count);
      softmax_backward_row(attention, samples.count, row);
    }
  }
}

}  // namespace
}  // namespace dn_detr
