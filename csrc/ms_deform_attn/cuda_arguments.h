// What the CUDA kernels of multi-scale deformable attention get: plain pointers, sizes, strides.
//
// Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points,
// C coordinates of a reference point (2 or 4). Strides count elements, not bytes.
// No CUDA header is needed, so that the binding compiles without a toolkit.

#pragma once

#include <cstdint>

#include "value_type.h"

namespace dn_detr::cuda {

struct Level {
  int32_t height;
  int32_t width;
  int32_t start;  // first cell within S
};

// Levels travel with the kernel's parameters; only unusual models have more than fit.
constexpr int inline_levels = 16;

// Exact for indices below L * P while L * P * P < 2^31.
constexpr int reciprocal_bits = 31;

struct Strides {
  int64_t batch;
  int64_t query;
  int64_t inner;  // head, or level for reference points; what lies further in is contiguous
};

// The classic operator has locations and weights; the fused one has offsets, logits,
// reference_points and perhaps a padding_mask. "Real" is double with float64 values, else float.
struct Arguments {
  int64_t batch;
  int64_t queries;
  int64_t cells;
  int32_t heads;
  int32_t dim;
  int32_t levels;
  int32_t points;
  uint32_t points_reciprocal;  // ceil(2^reciprocal_bits / P): division by a multiplication

  Level level[inline_levels];
  const Level* level_table;  // on the device, all levels; null when they fit into `level`

  const void* value;  // (B, S, H, D), D contiguous, see `value_alignment`
  int64_t value_batch_stride;
  int64_t value_head_stride;
  int32_t value_cell_stride;

  const void* locations;  // Real (B, Q, H, L, P, 2): locations, or offsets when fused
  Strides location_strides;
  const void* weights;  // Real (B, Q, H, L, P): weights, or logits when fused
  Strides weight_strides;

  const void* reference_points;  // Real (B, Q, L, C); null for the classic operator
  Strides reference_strides;
  int32_t reference_size;  // C

  const bool* padding_mask;  // (B, S), S contiguous, or null; true: the cell reads as zeros
  int64_t padding_batch_stride;

  void* output;  // (B, Q, H * D) contiguous, in the type of the values

  // Backward only.
  const void* grad_output;  // (B, Q, H * D) in the type of the values, H * D contiguous
  int64_t grad_output_batch_stride;
  int64_t grad_output_query_stride;
  void* grad_value;             // Real (B, S, H, D) contiguous, zeros; written, not read, by
                                // the deterministic backward
  void* grad_locations;         // Real (B, Q, H, L, P, 2) contiguous
  void* grad_weights;           // Real (B, Q, H, L, P) contiguous
  void* grad_reference_points;  // Real (B, Q, L, C) contiguous; fused only

  // Deterministic backward only: zeros before the launch.
  int64_t* fixed_point_sums;      // (B, S, H, D)
  uint8_t* not_finite;            // (B, S, H, D)
  unsigned long long* magnitude;  // (2,) largest |grad_output| and |weight|, as bits of a double
};

// Pointers and strides of values and grad_output must be multiples of so many bytes.
constexpr int64_t value_alignment(int64_t dim, int64_t element_size) {
  return dim * element_size % 16 == 0 ? 16 : 8;
}

using Stream = void*;  // a cudaStream_t

// Each launches on `stream` and returns null, or CUDA's words for why it could not.

const char* forward(const Arguments& arguments, ValueType type, Stream stream);

// Adds to grad_value in whatever order the threads arrive: the last bits vary between runs.
const char* backward(const Arguments& arguments, ValueType type, Stream stream);

// The same bits on every run: grad_value is summed as 64-bit integers, whose order is immaterial.
const char* deterministic_backward(const Arguments& arguments, ValueType type, Stream stream);

}  // namespace dn_detr::cuda
