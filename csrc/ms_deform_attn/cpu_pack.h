// Packing the cells of a head, and unpacking their gradients.
#pragma once

#include "cpu_sample.h"

namespace dn_detr {
namespace {

constexpr int kPrefetchCells = 16;  // how far ahead cells are fetched

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

}  // namespace
}  // namespace dn_detr
