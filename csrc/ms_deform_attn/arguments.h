// What the kernels of multi-scale deformable attention get: pointers, sizes and strides, no tensors.
//
// Zhu et al., "Deformable DETR", 2021, equation 3 (https://arxiv.org/abs/2010.04159).
// Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points,
// R coordinates of a reference point. All strides count elements.
#pragma once

#include <cstdint>

#include "value_type.h"

namespace dn_detr {

// One feature level: cell (y, x) is cell first_cell + y * width + x of `value`, and cell
// packed_origin + y * packed_pitch + x of a head packed with a border of zeros.
struct Level {
  int32_t height;
  int32_t width;
  int32_t first_cell;
  int32_t packed_origin;
  int32_t packed_pitch;
};

struct Strides {
  int64_t batch;
  int64_t row;  // a cell of `value`, a query of everything else
  int64_t head;
};

// Coordinates and weights have the type of the arithmetic: double for float64 values, else float.
// Classic operator: `locations` are sampling_locations and `weights` attention_weights. Fused
// operator: they are offsets and logits, and `references` are reference_points.
struct MSDeformAttnArguments {
  ValueType value_type;
  int64_t batch;
  int64_t cells;
  int64_t heads;
  int64_t dim;
  int64_t queries;
  int32_t levels;
  int32_t points;
  int32_t reference_dim;  // 0: classic, 2: reference points, 4: reference boxes (cx, cy, w, h)
  const Level* level;     // (L,)
  int32_t packed_cells;   // of one head with its borders

  const void* value;  // (B, S, H, D)
  Strides value_strides;
  const void* locations;  // (B, Q, H, L, P, 2)
  Strides location_strides;
  const void* weights;  // (B, Q, H, L, P)
  Strides weight_strides;
  const void* references;  // (B, Q, L, R), or null
  Strides reference_strides;
  const bool* padding_mask;  // (B, S), true: the cell reads as zeros; or null
  int64_t padding_mask_stride;

  void* output;  // (B, Q, H, D), contiguous

  const void* grad_output;  // (B, Q, H, D)
  Strides grad_output_strides;
  void* grad_value;       // (B, S, H, D), contiguous
  void* grad_locations;   // (B, Q, H, L, P, 2), contiguous
  void* grad_weights;     // (B, Q, H, L, P), contiguous
  void* grad_references;  // (B, Q, H, L, R), contiguous: to be summed over the heads; or null
};

// Items (query, head) that a CPU kernel prepares together; there are two such batches.
constexpr int kCpuItems = 2;

// The part of the work that one call of a CPU kernel does, and the memory that it may use.
struct CpuTask {
  int64_t batch;
  int64_t first_head, last_head;    // [first, last)
  int64_t first_query, last_query;  // [first, last)
  int32_t first_level, last_level;  // [first, last); forward always takes all levels
  const void* packed;               // head (batch, first_head), packed; null: read `value`
  void* grad_rows;                  // where gradients of the cells of this head are summed
  int64_t grad_row_stride;
  char* scratch;  // aligned to 64; cpu.cpp says how much
};

// The same functions compiled for one instruction set and one value type.
struct CpuKernels {
  // Copies one head's cells into `packed`, masked ones as zeros. False: not all are finite.
  bool (*pack)(const MSDeformAttnArguments&, int64_t batch, int64_t head, void* packed);
  void (*forward)(const MSDeformAttnArguments&, const CpuTask&);
  void (*backward)(const MSDeformAttnArguments&, const CpuTask&);
  // Writes summed gradients of one head's cells to `grad_value`, in its type.
  void (*unpack)(
      const MSDeformAttnArguments&, int64_t batch, int64_t head, const void* grad_rows,
      bool is_packed);
  // Turns gradients of attention weights into gradients of logits, for a range of queries.
  void (*softmax_backward)(const MSDeformAttnArguments&, const CpuTask&);
};

const CpuKernels* portable_kernels();  // (kValueTypes,), in the order of ValueType
const CpuKernels* avx2_kernels();      // null where the processor family has no such instructions
const CpuKernels* avx512_kernels();

}  // namespace dn_detr
