// From locations, or offsets and logits, to indices and weights of the corners of all samples, for a
// batch of items while the one before is worked on.
#pragma once

#include "cpu_samples.h"

namespace dn_detr {
namespace {

constexpr int kPrefetchItems = 6;  // how far ahead of `prepare` its rows are fetched

// ---- prepare ----

// Softmax of one row of logits, as torch.softmax: NaN and rows of -inf give NaN. Vectors stay in
// registers if their number is known.
template <int kVectors, class A>
DN_DETR_INLINE void softmax_of(const A* logits, int64_t count, int64_t vectors, A* result) {
  constexpr int N = kLanes<A>;
  using V = Vector<A, N>;
  if constexpr (kVectors > 0) vectors = kVectors;
  V kept[kVectors > 0 ? kVectors : 1];
  const auto put = [&](int64_t i, V x) {
    if constexpr (kVectors > 0) {
      kept[i] = x;
    } else {
      store(result + i * N, x);
    }
  };
  const auto get = [&](int64_t i) {
    if constexpr (kVectors > 0) return kept[i];
    return load<N>(result + i * N);
  };
  V largest = V{} - __builtin_inf();
  for (int64_t i = 0; i < vectors; ++i) {
    const int64_t left = count - i * N;
    const A nothing = -__builtin_inf();
    const V x = left >= N ? load<N>(logits + i * N)
                          : load_part<N>(logits + i * N, left > 0 ? left : 0, nothing);
    put(i, x);
    largest = x > largest ? x : largest;
  }
  largest = max_of_lanes<A, N>(largest);
  V sum = {};
  for (int64_t i = 0; i < vectors; ++i) {
    put(i, exp_of_negative<N>(get(i) - largest));
    sum += get(i);
  }
  const V scale = 1 / sum_of_lanes<A, N>(sum);
  for (int64_t i = 0; i < vectors; ++i) store(result + i * N, get(i) * scale);
}

template <class A>
DN_DETR_INLINE void softmax(const A* logits, int64_t count, int64_t padded_count, A* result) {
  const int64_t vectors = padded_count / kLanes<A>;
  if (vectors == 1) return softmax_of<1>(logits, count, vectors, result);
  if (vectors == 2) return softmax_of<2>(logits, count, vectors, result);
  if (vectors == 4) return softmax_of<4>(logits, count, vectors, result);
  softmax_of<0>(logits, count, vectors, result);
}

template <class A, int N>
struct Coordinates {
  Vector<A, N> x, y;
};

// x and y of N consecutive samples of a row of pairs, of which `left` exist.
template <class A, int N>
DN_DETR_INLINE Coordinates<A, N> read_pairs(const A* row, int64_t left) {
  Vector<A, N> low, high;
  if (left >= N) {
    low = load<N>(row);
    high = load<N>(row + N);
  } else {
    A pairs[2 * N] = {};
    memcpy(pairs, row, sizeof(A) * 2 * (left > 0 ? left : 0));
    low = load<N>(pairs);
    high = load<N>(pairs + N);
  }
  return {even<A, N>(low, high), odd<A, N>(low, high)};
}

// Coordinate `which` of the reference points of N consecutive samples.
template <class A, int N>
DN_DETR_INLINE Vector<A, N> spread_references(
    const A* references, const Samples<A>& samples, int64_t first, int which) {
  const auto order = load<N>(samples.reference + first) + which;
  if (samples.references <= N) {
    return permuted<A, N>(load_part<N>(references, samples.references, A(0)), order);
  }
  Vector<A, N> spread;
  for (int i = 0; i < N; ++i) spread[i] = references[order[i]];
  return spread;
}

// Locations in units of cells, as `scaled + shift` so that fractions lose no digits to the sum.
template <class A, int N>
struct Affine {
  Vector<A, N> factor, scale, shift;
  DN_DETR_INLINE Vector<A, N> at(Vector<A, N> more) const { return factor * scale + more; }
};

// Gradients with respect to offsets are those with respect to cells times this.
template <class A, int N>
DN_DETR_INLINE Vector<A, N> box_scale(Vector<A, N> box_size, Vector<A, N> size, int points) {
  return box_size * (size * (A(0.5) / points));
}

template <int kReference, class A, int N>
DN_DETR_INLINE void locate(
    const Samples<A>& samples, int64_t i, Coordinates<A, N> given, const A* references, int points,
    Affine<A, N>& x, Affine<A, N>& y) {
  using V = Vector<A, N>;
  const V width = load<N>(samples.width + i), height = load<N>(samples.height + i);
  const V half = V{} + A(0.5);
  if constexpr (kReference == 0) {
    x = {given.x, width, -half};
    y = {given.y, height, -half};
  } else {
    x = {spread_references<A, N>(references, samples, i, 0), width, given.x - half};
    y = {spread_references<A, N>(references, samples, i, 1), height, given.y - half};
    if constexpr (kReference == 4) {
      const V w = spread_references<A, N>(references, samples, i, 2);
      const V h = spread_references<A, N>(references, samples, i, 3);
      x.shift = given.x * box_scale<A, N>(w, width, points) - half;
      y.shift = given.y * box_scale<A, N>(h, height, points) - half;
    }
  }
}

// Indices and weights of the corners of N samples, of which x and y are known.
template <bool kPacked, bool kBackward, class A, int N>
DN_DETR_INLINE void prepare_corners(
    const MSDeformAttnArguments& arguments, const Samples<A>& samples, const Item<A>& item,
    int64_t i, const Affine<A, N>& x_of, const Affine<A, N>& y_of, Vector<A, N> attention) {
  using V = Vector<A, N>;
  using I = Vector<IntegerOf<A>, N>;
  const int64_t n = samples.padded_count;
  const V width = load<N>(samples.width + i), height = load<N>(samples.height + i);
  V x = x_of.at(x_of.shift), y = y_of.at(y_of.shift);
  // False for NaN. Only what is inside is converted to integers.
  const I inside = (x > -1) & (x < width) & (y > -1) & (y < height);
  x = inside ? x : V{};
  y = inside ? y : V{};
  I column = __builtin_convertvector(x, I), row = __builtin_convertvector(y, I);
  column += __builtin_convertvector(column, V) > x;  // truncated to the floor: true is -1
  row += __builtin_convertvector(row, V) > y;
  const V left = __builtin_convertvector(column, V), top = __builtin_convertvector(row, V);
  const V fraction_x = inside ? x_of.at(x_of.shift - left) : V{};
  const V fraction_y = inside ? y_of.at(y_of.shift - top) : V{};
  const V weight = inside ? attention : V{};

  const V upper = weight * (1 - fraction_y), lower = weight * fraction_y;
  V weights[4] = {upper * (1 - fraction_x), upper * fraction_x, lower * (1 - fraction_x),
                  lower * fraction_x};
  const I pitch = load<N>(samples.pitch + i);
  const I index = load<N>(samples.first + i) + row * pitch + column;
  using Index32 = Vector<int32_t, N>;
  if constexpr (kPacked) {
    const I nowhere = I{} + (arguments.packed_cells - 2);  // two zeros
    store(item.index + i, __builtin_convertvector(inside ? index : nowhere, Index32));
    store(item.index + 2 * n + i,
          __builtin_convertvector(inside ? index + pitch : nowhere, Index32));
  } else {
    const I columns = load<N>(samples.columns + i);
    const I has_left = inside & (column >= 0), has_right = inside & (column + 1 < columns);
    const I has_top = row >= 0, has_bottom = row + 1 < __builtin_convertvector(height, I);
    const I exists[4] = {has_left & has_top, has_right & has_top, has_left & has_bottom,
                         has_right & has_bottom};
    const I indices[4] = {index, index + 1, index + pitch, index + pitch + 1};
    for (int c = 0; c < 4; ++c) {
      // Forward, a corner without weight is not even read: it may be NaN.
      const I used = kBackward ? exists[c] : exists[c] & (weights[c] != 0);
      store(item.index + c * n + i, __builtin_convertvector(used ? indices[c] : I{} - 1, Index32));
    }
  }
  for (int c = 0; c < 4; ++c) store(item.weight + c * n + i, weights[c]);
  if constexpr (kBackward) {
    store(item.fraction_x + i, fraction_x);
    store(item.fraction_y + i, fraction_y);
  }
}

template <class A>
DN_DETR_INLINE void drop_masked_corners(const bool* mask, const Samples<A>& samples, int32_t* index) {
  for (int64_t i = 0; i < 4 * samples.padded_count; ++i) {
    if (index[i] >= 0 && mask[index[i]]) index[i] = -1;
  }
}

template <int kReference, bool kPacked, bool kBackward, class A>
DN_DETR_INLINE void prepare_item(
    const MSDeformAttnArguments& arguments, int64_t batch, const Samples<A>& samples,
    const Item<A>& item) {
  constexpr int N = kLanes<A>;
  const auto [query, head] = std::pair(item.query, item.head);
  const A* locations = row_of<A>(arguments.locations, arguments.location_strides, batch, query, head);
  const A* weights = row_of<A>(arguments.weights, arguments.weight_strides, batch, query, head);
  const A* references = nullptr;
  if constexpr (kReference != 0) {
    references = row_of<A>(arguments.references, arguments.reference_strides, batch, query, 0);
    softmax(weights, samples.count, samples.padded_count, item.attention);
  }
  for (int64_t i = 0; i < samples.padded_count; i += N) {
    const int64_t left = samples.count - i;
    if constexpr (kReference == 0) {
      const auto part = left >= N ? load<N>(weights + i)
                                  : load_part<N>(weights + i, left > 0 ? left : 0, A(0));
      store(item.attention + i, part);
    }
    Affine<A, N> x, y;
    locate<kReference, A, N>(
        samples, i, read_pairs<A, N>(locations + 2 * i, left), references, arguments.points, x, y);
    prepare_corners<kPacked, kBackward, A, N>(
        arguments, samples, item, i, x, y, load<N>(item.attention + i));
  }
  if (!kPacked && arguments.padding_mask) {
    const bool* mask = arguments.padding_mask + batch * arguments.padding_mask_stride;
    drop_masked_corners(mask, samples, item.index);
  }
}

template <int kReference, bool kPacked, bool kBackward, class A>
void prepare(
    const MSDeformAttnArguments& arguments, int64_t batch, const Samples<A>& samples,
    const Item<A>* items, int count) {
  for (int i = 0; i < count; ++i) {
    prepare_item<kReference, kPacked, kBackward>(arguments, batch, samples, items[i]);
  }
}

template <class A>
using Prepare = void (*)(
    const MSDeformAttnArguments&, int64_t, const Samples<A>&, const Item<A>*, int);

template <bool kPacked, bool kBackward, class A>
Prepare<A> prepare_for(int32_t reference_dim) {
  if (reference_dim == 0) return prepare<0, kPacked, kBackward, A>;
  if (reference_dim == 2) return prepare<2, kPacked, kBackward, A>;
  return prepare<4, kPacked, kBackward, A>;
}

// ---- batches of items ----

// Walks through the items of a task: all heads of a query, then the next query.
template <class A>
struct Walk {
  const MSDeformAttnArguments& arguments;
  const CpuTask& task;
  int64_t query, head;

  int next(Item<A>* items) {
    int count = 0;
    for (; count < kCpuItems && query < task.last_query; ++count) {
      items[count].query = query;
      items[count].head = head;
      if (++head == task.last_head) {
        head = task.first_head;
        ++query;
      }
    }
    return count;
  }

  // Rows that are read and written some items later. Those of one head lie 1 KB apart, which no
  // prefetcher of the hardware follows.
  template <bool kBackward, class T>
  DN_DETR_INLINE void prefetch_rows(const Item<A>* items, int count, int64_t samples) const {
    if (!task.packed) return;
    const auto& a = arguments;
    for (int i = 0; i < count; ++i) {
      const int64_t query = items[i].query + kPrefetchItems, head = items[i].head;
      if (query >= task.last_query) return;
      const auto [b, n] = std::pair(task.batch, samples);
      prefetch(row_of<A>(a.locations, a.location_strides, b, query, head), 2 * n);
      prefetch(row_of<A>(a.weights, a.weight_strides, b, query, head), n);
      if constexpr (kBackward) {
        prefetch(row_of<T>(a.grad_output, a.grad_output_strides, b, query, head), a.dim);
        prefetch_to_write(sample_row<A>(a.grad_locations, a, b, query, head, 2 * n), 2 * n);
        prefetch_to_write(sample_row<A>(a.grad_weights, a, b, query, head, n), n);
      } else {
        prefetch_to_write(sample_row<T>(a.output, a, b, query, head, a.dim), a.dim);
      }
    }
  }
};

// Calls use(item) for all items of the task, while those of the next batch are being prepared.
template <bool kPacked, bool kBackward, class T, class Fetch, class Use>
DN_DETR_INLINE void for_each_item(
    const MSDeformAttnArguments& arguments, const CpuTask& task, Samples<Arithmetic<T>>& samples,
    Fetch fetch, Use use) {
  using A = Arithmetic<T>;
  const auto prepare = prepare_for<kPacked, kBackward, A>(arguments.reference_dim);
  Walk<A> walk{arguments, task, task.first_query, task.first_head};
  int current = 0;
  int count = walk.next(samples.items[current]);
  prepare(arguments, task.batch, samples, samples.items[current], count);
  while (count > 0) {
    Item<A>* following = samples.items[1 - current];
    const int following_count = walk.next(following);
    walk.template prefetch_rows<kBackward, T>(following, following_count, samples.count);
    prepare(arguments, task.batch, samples, following, following_count);
    for (int i = 0; i < count; ++i) {
      if (i < following_count) fetch(following[i]);
      use(samples.items[current][i]);
    }
    current = 1 - current;
    count = following_count;
  }
}

}  // namespace
}  // namespace dn_detr
