// What the operators demand of their inputs, on every device, in the words of dn_detr/ops/eager.py.
//
// A failed check throws std::invalid_argument, a ValueError in Python, that begins with the name of
// the argument. What passes lies within the limits below, so that kernels need not fear overflows.
//
// Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "value_type.h"

namespace dn_detr::inputs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

constexpr int64_t kInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxDim = 256;
constexpr int64_t kMaxChannels = kInt32 / 8;  // H * D: a row of float64 counts its bytes in 32 bits
constexpr int64_t kMaxCells = kInt32 / 4;     // packed cells, more by a border, fit into 32 bits
constexpr int64_t kMaxSide = 1 << 24;         // whole numbers up to here are exact in float32
constexpr int64_t kMaxLevels = 1 << 16;
constexpr int64_t kMaxIndices = kInt32;  // L * P * P, for a division by multiplication

// ---- complaints ----

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline std::string text(const Sizes& sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "the CPU";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another kind of device";
}

// ---- single tensors ----

inline void check_device(const char* name, const Tensor& tensor, const Tensor& value) {
  if (tensor.device() != value.device()) {
    fail(name, " is on ", device_text(tensor), ", but value on ", device_text(value));
  }
}

inline void check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* legend) {
  if (tensor.dim() != rank) {
    fail(name, " has the shape ", text(sizes_of(tensor)), ", expected ", legend);
  }
}

inline void check_shape(const char* name, const Tensor& tensor, const Sizes& expected) {
  if (sizes_of(tensor) != expected) {
    fail(name, " has the shape ", text(sizes_of(tensor)), ", expected ", text(expected));
  }
}

// A tensor whose storage has been resized since may count more elements than it has.
inline void check_memory(const char* name, const Tensor& tensor) {
  int64_t last = 0, offset = 0, bytes = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) return;
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  if ((offset + last + 1) * int64_t(tensor.element_size()) > bytes) {
    fail(name, " reaches past the end of its storage");
  }
}

inline ValueType value_type_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Float:
      return ValueType::float32;
    case ScalarType::Double:
      return ValueType::float64;
    case ScalarType::BFloat16:
      return ValueType::bfloat16;
    case ScalarType::Half:
      return ValueType::float16;
    default:
      fail("value must be float32, float64, float16 or bfloat16");
  }
}

// The type of the arithmetic, and of everything that is no value.
inline ScalarType real_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_real(const char* name, const Tensor& tensor, const Tensor& value) {
  check_device(name, tensor, value);
  if (tensor.scalar_type() != real_type(value)) {
    fail(name, " must be ",
         real_type(value) == ScalarType::Double ? "float64, like value" : "float32");
  }
  check_memory(name, tensor);
}

inline void check_value(const Tensor& value) {
  check_rank("value", value, 4, "(B, S, H, D)");
  value_type_of(value);
  const int64_t dim = value.size(3), heads = value.size(2), cells = value.size(1);
  if (dim % 4 != 0 || dim > kMaxDim) {
    fail("value has head dim ", dim, ", which is not a multiple of 4 up to ", kMaxDim);
  }
  if (cells > kMaxCells) fail("value has too many cells: ", cells);
  if (heads > kMaxChannels / kMaxDim) fail("value has too many heads: ", heads);
  if (value.size(0) > kInt32) fail("value has too large a batch: ", value.size(0));
  check_memory("value", value);
}

// ---- levels ----

struct LevelExtent {
  int32_t height;
  int32_t width;
  int32_t first_cell;
};

inline std::vector<int64_t> integers_of(const char* name, const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Long) fail(name, " must be int64");
  check_memory(name, tensor);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  Tensor here = tensor.is_cpu() ? tensor : torch::stable::to(tensor, cpu);
  if (!here.is_contiguous()) here = torch::stable::contiguous(here);
  const auto* first = static_cast<const int64_t*>(here.const_data_ptr());
  return {first, first + here.numel()};
}

inline std::vector<LevelExtent> read_levels(
    const Tensor& spatial_shapes, const Tensor& level_start_index, const Tensor& value) {
  check_rank("spatial_shapes", spatial_shapes, 2, "(L, 2)");
  const int64_t count = spatial_shapes.size(0), cells = value.size(1);
  check_shape("spatial_shapes", spatial_shapes, {count, 2});
  check_shape("level_start_index", level_start_index, {count});
  if (count > kMaxLevels) fail("spatial_shapes has too many levels: ", count);
  const std::vector<int64_t> shapes = integers_of("spatial_shapes", spatial_shapes);
  const std::vector<int64_t> starts = integers_of("level_start_index", level_start_index);
  std::vector<LevelExtent> levels;
  int64_t first = 0;
  for (int64_t l = 0; l < count; ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    if (height < 0 || width < 0 || height > kMaxSide || width > kMaxSide) {
      fail("spatial_shapes: level ", l, " has ", height, " x ", width,
           " cells, not 0 to 2^24 along each side");
    }
    if (height * width > cells - first) {
      fail("spatial_shapes add up to more than the ", cells, " cells of value");
    }
    if (starts[l] != first) {
      fail("level_start_index: level ", l, " starts at ", starts[l], ", expected ", first,
           ": levels lie one after the other");
    }
    const bool is_empty = height * width == 0;  // then nobody walks through it in either direction
    levels.push_back(
        {is_empty ? 0 : int32_t(height), is_empty ? 0 : int32_t(width), int32_t(first)});
    first += height * width;
  }
  if (first != cells) {
    fail("spatial_shapes add up to ", first, " cells, but value has ", cells);
  }
  return levels;
}

// ---- all inputs of an operator ----

// Locations and weights, or offsets and logits, by the names that the caller knows them by.
inline void check_samples(
    const Tensor& value, int64_t levels, const char* locations_name, const Tensor& locations,
    const char* weights_name, const Tensor& weights, bool flat_weights) {
  check_real(locations_name, locations, value);
  check_real(weights_name, weights, value);
  check_rank(locations_name, locations, 6, "(B, Q, H, L, P, 2)");
  const int64_t batch = value.size(0), queries = locations.size(1), heads = value.size(2);
  const int64_t points = locations.size(4);
  check_shape(locations_name, locations, {batch, queries, heads, levels, points, 2});
  if (queries > kInt32) fail(locations_name, " has too many queries: ", queries);
  if (levels > 0 && points > 0 && points > kMaxIndices / levels / points) {
    fail(locations_name, " has too many points: ", points);
  }
  Sizes expected{batch, queries, heads, levels, points};
  if (flat_weights) expected = {batch, queries, heads, levels * points};
  check_shape(weights_name, weights, expected);
}

inline std::vector<LevelExtent> check_classic(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  check_value(value);
  auto levels = read_levels(spatial_shapes, level_start_index, value);
  check_samples(value, int64_t(levels.size()), "sampling_locations", sampling_locations,
                "attention_weights", attention_weights, false);
  return levels;
}

inline std::vector<LevelExtent> check_fused(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& reference_points, const Tensor& offsets, const Tensor& logits,
    const std::optional<Tensor>& padding_mask) {
  check_value(value);
  auto levels = read_levels(spatial_shapes, level_start_index, value);
  const auto count = int64_t(levels.size());
  check_samples(value, count, "offsets", offsets, "logits", logits, true);
  check_real("reference_points", reference_points, value);
  check_rank("reference_points", reference_points, 4, "(B, Q, L, 2 or 4)");
  const int64_t coordinates = reference_points.size(3);
  if (coordinates != 2 && coordinates != 4) {
    fail("reference_points have ", coordinates, " coordinates, not 2 or 4");
  }
  check_shape("reference_points", reference_points,
              {value.size(0), offsets.size(1), count, coordinates});
  if (padding_mask) {
    if (padding_mask->scalar_type() != ScalarType::Bool) fail("padding_mask must be bool");
    check_device("padding_mask", *padding_mask, value);
    check_shape("padding_mask", *padding_mask, {value.size(0), value.size(1)});
    check_memory("padding_mask", *padding_mask);
  }
  return levels;
}

// `locations` are the offsets of the fused operator. To be called after the checks above.
inline void check_grad_output(
    const Tensor& grad_output, const Tensor& value, const Tensor& locations) {
  check_device("grad_output", grad_output, value);
  if (grad_output.scalar_type() != value.scalar_type()) {
    fail("grad_output must have the type of value");
  }
  check_memory("grad_output", grad_output);
  check_shape("grad_output", grad_output,
              {value.size(0), locations.size(1), value.size(2) * value.size(3)});
}

// ---- strides ----

// Whether the last `count` dimensions lie in memory one after the other.
inline bool inner_contiguous(const Tensor& tensor, int64_t count) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= tensor.dim() - count; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

inline Tensor with_inner_contiguous(const Tensor& tensor, int64_t count) {
  return inner_contiguous(tensor, count) ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace dn_detr::inputs
