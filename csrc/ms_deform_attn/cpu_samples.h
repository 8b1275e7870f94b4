// The samples of the items (query, head) of a task, and where in its memory they are described.
#pragma once

#include "arguments.h"
#include "cpu_value.h"

namespace dn_detr {
namespace {

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

}  // namespace
}  // namespace dn_detr
