// Checks of the operators' inputs, the same for all devices: every error names the argument.
//
// Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "level_size.h"

namespace dn_detr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

constexpr int64_t kMaxDim = 256;
// Cells and points are counted in 32 bits, with room for a border around packed levels.
constexpr int64_t kMaxCells = std::numeric_limits<int32_t>::max() / 4;
constexpr int64_t kMaxSamples = std::numeric_limits<int32_t>::max() / 64;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline Sizes sizes_of(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

inline std::string text(const Sizes& sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ')';
  return out.str();
}

inline void require_rank(const char* name, const Tensor& tensor, int64_t rank, const char* legend) {
  if (tensor.dim() != rank) {
    fail(name, " has the shape ", text(sizes_of(tensor)), ", expected ", legend);
  }
}

inline void require_sizes(const char* name, const Tensor& tensor, const Sizes& expected) {
  if (sizes_of(tensor) != expected) {
    fail(name, " has the shape ", text(sizes_of(tensor)), ", expected ", text(expected));
  }
}

inline void require_type(
    const char* name, const Tensor& tensor, ScalarType type, const char* type_name) {
  if (tensor.scalar_type() != type) fail(name, " must be ", type_name);
}

inline void require_beside(const char* name, const Tensor& tensor, const Tensor& value) {
  if (tensor.device() != value.device()) fail(name, " must be on the device of value");
}

// The type of the arithmetic, and so of everything but value, output and their gradients.
inline ScalarType arithmetic_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void require_coordinates(const char* name, const Tensor& tensor, const Tensor& value) {
  const bool wide = arithmetic_type(value) == ScalarType::Double;
  require_type(name, tensor, arithmetic_type(value), wide ? "float64, like value" : "float32");
  require_beside(name, tensor, value);
}

// Sizes that the arguments of a call agree on.
struct InputSizes {
  int64_t batch, cells, heads, dim, queries, levels, points;
  int64_t coordinates;  // of a reference point; 0: classic operator

  bool is_empty() const {
    return batch == 0 || heads == 0 || queries == 0 || dim == 0 || levels * points == 0;
  }
};

inline InputSizes check_value(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      break;
    default:
      fail("value must be float32, float64, float16 or bfloat16");
  }
  require_rank("value", value, 4, "(B, S, H, D)");
  InputSizes sizes = {};
  sizes.batch = value.size(0);
  sizes.cells = value.size(1);
  sizes.heads = value.size(2);
  sizes.dim = value.size(3);
  if (sizes.dim % 4 != 0 || sizes.dim > kMaxDim) {
    fail("value has head dim ", sizes.dim, ", which is not a multiple of 4 up to ", kMaxDim);
  }
  if (sizes.cells > kMaxCells) fail("value has too many cells: ", sizes.cells);
  return sizes;
}

inline Sizes integers(const char* name, const Tensor& tensor) {
  require_type(name, tensor, ScalarType::Long, "int64");
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor here =
      torch::stable::contiguous(tensor.is_cpu() ? tensor : torch::stable::to(tensor, cpu));
  const auto* first = static_cast<const int64_t*>(here.const_data_ptr());
  return {first, first + here.numel()};
}

inline std::vector<LevelSize> read_levels(
    const Tensor& spatial_shapes, const Tensor& level_start_index, int64_t cells) {
  require_rank("spatial_shapes", spatial_shapes, 2, "(L, 2)");
  const int64_t count = spatial_shapes.size(0);
  require_sizes("spatial_shapes", spatial_shapes, {count, 2});
  require_sizes("level_start_index", level_start_index, {count});
  const Sizes shapes = integers("spatial_shapes", spatial_shapes);
  const Sizes starts = integers("level_start_index", level_start_index);
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  std::vector<LevelSize> levels;
  int64_t sum = 0;
  for (int64_t l = 0; l < count; ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    if (height < 0 || width < 0 || height > limit || width > limit ||
        height * width > cells - sum) {
      fail("spatial_shapes: level ", l, " of ", height, " x ", width,
           " cells does not fit into the ", cells, " cells of value");
    }
    const bool is_empty = height * width == 0;  // then nobody walks through it in either direction
    levels.push_back({is_empty ? 0 : int32_t(height), is_empty ? 0 : int32_t(width), int32_t(sum)});
    sum += height * width;
  }
  if (sum != cells) fail("spatial_shapes add up to ", sum, " cells, but value has ", cells);
  for (int64_t l = 0; l < count; ++l) {
    if (starts[l] != levels[l].first_cell) {
      fail("level_start_index: level ", l, " must start at ", levels[l].first_cell, ", not at ",
           starts[l]);
    }
  }
  return levels;
}

// Locations and weights, or offsets and logits.
inline void check_samples(
    InputSizes& sizes, const Tensor& value, const char* location_name, const Tensor& locations,
    const char* weight_name, const Tensor& weights, bool flat_weights) {
  require_coordinates(location_name, locations, value);
  require_coordinates(weight_name, weights, value);
  require_rank(location_name, locations, 6, "(B, Q, H, L, P, 2)");
  sizes.queries = locations.size(1);
  sizes.points = locations.size(4);
  Sizes expected{sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2};
  require_sizes(location_name, locations, expected);
  if (sizes.levels > 0 && sizes.points > kMaxSamples / sizes.levels) {
    fail(location_name, " has too many points: ", sizes.points);
  }
  expected.pop_back();
  if (flat_weights) {
    expected = {sizes.batch, sizes.queries, sizes.heads, sizes.levels * sizes.points};
  }
  require_sizes(weight_name, weights, expected);
}

inline void check_references(
    InputSizes& sizes, const Tensor& value, const Tensor& reference_points) {
  require_coordinates("reference_points", reference_points, value);
  require_rank("reference_points", reference_points, 4, "(B, Q, L, 2 or 4)");
  sizes.coordinates = reference_points.size(3);
  if (sizes.coordinates != 2 && sizes.coordinates != 4) {
    fail("reference_points have ", sizes.coordinates, " coordinates, not 2 or 4");
  }
  require_sizes("reference_points", reference_points,
                {sizes.batch, sizes.queries, sizes.levels, sizes.coordinates});
}

inline void check_padding_mask(
    const InputSizes& sizes, const Tensor& value, const Tensor& padding_mask) {
  require_type("padding_mask", padding_mask, ScalarType::Bool, "bool");
  require_beside("padding_mask", padding_mask, value);
  require_sizes("padding_mask", padding_mask, {sizes.batch, sizes.cells});
}

// The inputs of either operator: sampling_locations and attention_weights of the classic one are
// called locations and weights here, and so are offsets and logits of the fused one.
struct Inputs {
  InputSizes sizes;
  std::vector<LevelSize> levels;
  Tensor value, locations, weights;
  std::optional<Tensor> reference_points, padding_mask;

  bool is_fused() const { return reference_points.has_value(); }
};

inline Inputs classic_inputs(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  InputSizes sizes = check_value(value);
  std::vector<LevelSize> levels = read_levels(spatial_shapes, level_start_index, sizes.cells);
  sizes.levels = int64_t(levels.size());
  check_samples(sizes, value, "sampling_locations", sampling_locations, "attention_weights",
                attention_weights, false);
  return {sizes, std::move(levels), value, sampling_locations, attention_weights, {}, {}};
}

inline Inputs fused_inputs(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& reference_points, const Tensor& offsets, const Tensor& logits,
    const std::optional<Tensor>& padding_mask) {
  InputSizes sizes = check_value(value);
  std::vector<LevelSize> levels = read_levels(spatial_shapes, level_start_index, sizes.cells);
  sizes.levels = int64_t(levels.size());
  check_samples(sizes, value, "offsets", offsets, "logits", logits, true);
  check_references(sizes, value, reference_points);
  if (padding_mask) check_padding_mask(sizes, value, *padding_mask);
  return {sizes, std::move(levels), value, offsets, logits, reference_points, padding_mask};
}

inline void check_grad_output(const Inputs& inputs, const Tensor& grad_output) {
  if (grad_output.scalar_type() != inputs.value.scalar_type()) {
    fail("grad_output must have the type of value");
  }
  require_beside("grad_output", grad_output, inputs.value);
  const InputSizes& sizes = inputs.sizes;
  require_sizes("grad_output", grad_output, {sizes.batch, sizes.queries, sizes.heads * sizes.dim});
}

// Whether the last `count` dimensions lie in memory one after the other.
inline bool has_contiguous_rows(const Tensor& tensor, int64_t count) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= tensor.dim() - count; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

inline Tensor with_contiguous_rows(const Tensor& tensor, int64_t count) {
  return has_contiguous_rows(tensor, count) ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace dn_detr
