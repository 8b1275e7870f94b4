// The CPU kernels, compiled once per instruction set (cpu_portable.cpp, cpu_avx2.cpp, ...).
//
// The work is a list of items (query, head). Each is done in stages, a batch of items at a time:
//   prepare   softmax and location arithmetic, vectorised over the L * P samples of an item
//   sample    forward: weighted sum of 4 rows of D channels per sample
//   scatter   backward: 4 dot products and 4 row updates per sample
//   finish    backward: gradients of locations and weights from the dot products
// Only sample and scatter depend on D; only prepare and finish on the kind of operator.
//
// Rows are read either from `value` as it lies ("direct") or from a packed copy of one head, in
// which cells follow each other without other heads between them and every level has a border of
// zeros. Packed is faster when there are many queries: no test for corners outside, one index for
// two corners, and no 1 KB stride that uses an eighth of the cache's sets. It multiplies rows by
// weights of zero, so it is used only if all cells are finite.
#pragma once

#include "arguments.h"
#include "cpu_value.h"

namespace dn_detr {
namespace {

constexpr int kMaxVectors = 4;    // accumulated at once: what AVX2's registers hold
constexpr int kPrefetchItems = 6;   // how far ahead of `prepare` its rows are fetched
constexpr int kPrefetchCells = 16;  // the same for packing and unpacking

DN_DETR_INLINE int64_t padded(int64_t samples) { return (samples + 15) / 16 * 16; }

// ---- memory of a task ----

// Samples of one item; arrays of padded(L * P) elements, those of 4 corners one after the other
// except `dots`, where the 4 corners of a sample lie together.
template <class A>
struct Item {
  int64_t query, head;
  int32_t* index;  // [4]; packed: 0 and 2 only; direct: -1 for corners that read zeros
  A* weight;       // [4]
  A* attention;
  A* fraction_x;
  A* fraction_y;
  A* dots;
};

// What is the same for all items: the level of each sample, spread over the samples.
template <class A>
struct Samples {
  using I = IntegerOf<A>;
  int64_t count, padded_count;
  A* width;  // of padding: -1, so that no location is inside
  A* height;
  I* columns;  // the width again, as an integer
  I* first;    // direct: first cell; packed: index of cell (0, 0)
  I* pitch;
  int64_t references;  // coordinates of the reference points of a query, L * R
  I* reference;        // where the sample's begin in that row
  void* zero_row;
  A* ignored_row;  // takes gradients of cells that do not exist
  Item<A> items[2][kCpuItems];
};

template <class E>
DN_DETR_INLINE E* take(char*& memory, int64_t count) {
  E* taken = reinterpret_cast<E*>(memory);
  memory += (count * int64_t(sizeof(E)) + 63) / 64 * 64;
  return taken;
}

template <class A>
void describe_samples(const MSDeformAttnArguments& arguments, bool packed, Samples<A>& samples) {
  int64_t i = 0;
  for (int l = 0; l < arguments.levels; ++l) {
    const Level& level = arguments.level[l];
    for (int p = 0; p < arguments.points; ++p, ++i) {
      samples.width[i] = level.width;
      samples.height[i] = level.height;
      samples.columns[i] = level.width;
      samples.first[i] = packed ? level.packed_origin : level.first_cell;
      samples.pitch[i] = packed ? level.packed_pitch : level.width;
      samples.reference[i] = l * arguments.reference_dim;
    }
  }
  for (; i < samples.padded_count; ++i) {
    samples.width[i] = samples.height[i] = -1;
    samples.columns[i] = samples.first[i] = samples.pitch[i] = samples.reference[i] = 0;
  }
}

template <class A>
void lay_out(const MSDeformAttnArguments& arguments, const CpuTask& task, Samples<A>& samples) {
  using I = IntegerOf<A>;
  char* memory = task.scratch;
  samples.count = int64_t(arguments.levels) * arguments.points;
  const int64_t n = samples.padded_count = padded(samples.count);
  samples.references = int64_t(arguments.levels) * arguments.reference_dim;
  samples.width = take<A>(memory, n);
  samples.height = take<A>(memory, n);
  samples.columns = take<I>(memory, n);
  samples.first = take<I>(memory, n);
  samples.pitch = take<I>(memory, n);
  samples.reference = take<I>(memory, n);
  samples.zero_row = take<double>(memory, arguments.dim);
  memset(samples.zero_row, 0, sizeof(double) * arguments.dim);
  samples.ignored_row = take<A>(memory, arguments.dim);
  memset(samples.ignored_row, 0, sizeof(A) * arguments.dim);
  for (auto& batch : samples.items) {
    for (auto& item : batch) {
      item.index = take<int32_t>(memory, 4 * n);
      item.weight = take<A>(memory, 4 * n);
      item.attention = take<A>(memory, n);
      item.fraction_x = take<A>(memory, n);
      item.fraction_y = take<A>(memory, n);
      item.dots = take<A>(memory, 4 * n);
      memset(item.dots, 0, sizeof(A) * 4 * n);
    }
  }
  describe_samples(arguments, task.packed != nullptr, samples);
}

// ---- rows ----

template <class E>
DN_DETR_INLINE const E* row_of(
    const void* data, const Strides& strides, int64_t batch, int64_t row, int64_t head) {
  return static_cast<const E*>(data) + batch * strides.batch + row * strides.row +
         head * strides.head;
}

template <class E>
DN_DETR_INLINE E* sample_row(
    void* data, const MSDeformAttnArguments& arguments, int64_t batch, const int64_t query,
    int64_t head, int64_t elements) {
  const int64_t item = (batch * arguments.queries + query) * arguments.heads + head;
  return static_cast<E*>(data) + item * elements;
}

// How near to the processor a prefetch brings its line. The first cache has few buffers for misses;
// with many at once, fetching into the second one is almost twice as fast.
enum Cache { kSecondCache = 2, kFirstCache = 3 };

// Always inline: GCC takes a function that only prefetches for one without effect, and drops calls.
template <Cache kCache = kFirstCache, class E>
DN_DETR_INLINE void prefetch(const E* row, int64_t count) {
  const char* line = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < count * int64_t(sizeof(E)); i += 64) {
    __builtin_prefetch(line + i, 0, kCache);
  }
}
// Stores leave the processor in order: one that misses the cache holds up all that follow.
template <class E>
DN_DETR_INLINE void prefetch_to_write(E* row, int64_t count) {
  char* line = reinterpret_cast<char*>(row);
  for (int64_t i = 0; i < count * int64_t(sizeof(E)); i += 64) __builtin_prefetch(line + i, 1);
}

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

// ---- backward ----

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

// ---- packing ----

template <class T, int kDim>
bool pack_head(const MSDeformAttnArguments& arguments, int64_t batch, int64_t head, void* packed) {
  using A = Arithmetic<T>;
  constexpr int N = kLanes<A>;
  const int64_t dim = kDim > 0 ? kDim : arguments.dim;
  const bool* mask = arguments.padding_mask
                         ? arguments.padding_mask + batch * arguments.padding_mask_stride
                         : nullptr;
  Vector<A, N> wide_check = {};
  Vector<A, 4> check = {};  // stays zero while all is finite
  T* to = static_cast<T*>(packed);
  const auto fill = [&](int64_t cells) {
    memset(to, 0, sizeof(T) * dim * cells);
    to += dim * cells;
  };
  for (int l = 0; l < arguments.levels; ++l) {
    const Level& level = arguments.level[l];
    fill(level.packed_pitch);
    for (int64_t y = 0; y < level.height; ++y) {
      fill(1);
      for (int64_t x = 0; x < level.width; ++x, to += dim) {
        const int64_t cell = level.first_cell + y * level.width + x;
        if (mask && mask[cell]) {
          memset(to, 0, sizeof(T) * dim);
          continue;
        }
        const T* from = row_of<T>(arguments.value, arguments.value_strides, batch, cell, head);
        prefetch(from + kPrefetchCells * arguments.value_strides.row, dim);
        int64_t channel = 0;
        for (; channel + N <= dim; channel += N) {
          wide_check += read<N>(from + channel) * 0;
          memcpy(to + channel, from + channel, N * sizeof(T));
        }
        for (; channel < dim; channel += 4) {
          check += read<4>(from + channel) * 0;
          memcpy(to + channel, from + channel, 4 * sizeof(T));
        }
      }
    }
    fill(level.packed_pitch + 1);
  }
  fill(2);
  return sum_of_lanes<A, N>(wide_check)[0] + sum_of_lanes<A, 4>(check)[0] == 0;
}

template <class T, int kDim>
void unpack_head(
    const MSDeformAttnArguments& arguments, int64_t batch, int64_t head, const void* grad_rows,
    bool is_packed) {
  using A = Arithmetic<T>;
  const int64_t dim = kDim > 0 ? kDim : arguments.dim;
  const bool* mask = arguments.padding_mask
                         ? arguments.padding_mask + batch * arguments.padding_mask_stride
                         : nullptr;
  const int64_t stride = arguments.heads * dim;
  T* to = static_cast<T*>(arguments.grad_value) + batch * arguments.cells * stride + head * dim;
  for (int l = 0; l < arguments.levels; ++l) {
    const Level& level = arguments.level[l];
    const int64_t origin = is_packed ? level.packed_origin : level.first_cell;
    const int64_t pitch = is_packed ? level.packed_pitch : level.width;
    for (int64_t y = 0; y < level.height; ++y) {
      const A* from = static_cast<const A*>(grad_rows) + (origin + y * pitch) * dim;
      int64_t cell = level.first_cell + y * level.width;
      for (int64_t x = 0; x < level.width; ++x, ++cell, from += dim, to += stride) {
        if (mask && mask[cell]) {
          memset(to, 0, sizeof(T) * dim);
          continue;
        }
        for_each_block<A>(dim, [&](auto lanes, auto vectors, int64_t channel) {
          constexpr int kLanes = decltype(lanes)::value, kVectors = decltype(vectors)::value;
          Vector<A, kLanes> block[kVectors];
          for (int v = 0; v < kVectors; ++v) block[v] = load<kLanes>(from + channel + v * kLanes);
          write_block<kLanes, kVectors>(to + channel, block);
        });
      }
    }
  }
}

// ---- dispatch on the head dim ----

template <class T, int kDim>
void forward_dim(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  if (task.packed) return forward_items<T, kDim, true>(arguments, task);
  return forward_items<T, kDim, false>(arguments, task);
}
template <class T, int kDim>
void backward_dim(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  if (task.packed) return backward_items<T, kDim, true>(arguments, task);
  return backward_items<T, kDim, false>(arguments, task);
}

// float64 serves gradient checks: one general version is enough.
template <class T>
constexpr bool kHasFastDims = sizeof(T) < sizeof(double);

template <class T>
void forward(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  if constexpr (kHasFastDims<T>) {
    if (arguments.dim == 16) return forward_dim<T, 16>(arguments, task);
    if (arguments.dim == 32) return forward_dim<T, 32>(arguments, task);
    if (arguments.dim == 64) return forward_dim<T, 64>(arguments, task);
  }
  forward_dim<T, 0>(arguments, task);
}
template <class T>
void backward(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  if constexpr (kHasFastDims<T>) {
    if (arguments.dim == 16) return backward_dim<T, 16>(arguments, task);
    if (arguments.dim == 32) return backward_dim<T, 32>(arguments, task);
    if (arguments.dim == 64) return backward_dim<T, 64>(arguments, task);
  }
  backward_dim<T, 0>(arguments, task);
}
template <class T>
bool pack(const MSDeformAttnArguments& arguments, int64_t batch, int64_t head, void* packed) {
  if (arguments.dim == 32) return pack_head<T, 32>(arguments, batch, head, packed);
  return pack_head<T, 0>(arguments, batch, head, packed);
}
template <class T>
void unpack(
    const MSDeformAttnArguments& arguments, int64_t batch, int64_t head, const void* grad_rows,
    bool is_packed) {
  if (arguments.dim == 32) return unpack_head<T, 32>(arguments, batch, head, grad_rows, is_packed);
  unpack_head<T, 0>(arguments, batch, head, grad_rows, is_packed);
}

template <class T>
constexpr CpuKernels kKernelsOf{
    pack<T>, forward<T>, backward<T>, unpack<T>, softmax_backward<Arithmetic<T>>};
constexpr CpuKernels kKernels[kValueTypes] = {
    kKernelsOf<float>, kKernelsOf<double>, kKernelsOf<BFloat16>, kKernelsOf<Float16>};

}  // namespace
}  // namespace dn_detr
