// The operators for CUDA tensors: checks, allocations, launches. Bound through LibTorch's stable
// ABI, so that one build serves several versions of PyTorch.
//
// Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points,
// C coordinates of a reference point.

#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_arguments.h"
#include "cuda_device.h"

namespace dn_detr::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// ---- Checks -------------------------------------------------------------------------------------

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "ms_deform_attn: ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

Sizes sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

std::string text(const Sizes& sizes) {
  std::string result = "(";
  for (size_t i = 0; i < sizes.size(); ++i) {
    result += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return result + ")";
}

void check_shape(const Tensor& x, const char* name, const Sizes& expected, const char* legend) {
  const Sizes sizes = sizes_of(x);
  check(sizes == expected, name, " has shape ", text(sizes), ", expected ", legend, " = ",
        text(expected));
}

void check_rank(const Tensor& x, const char* name, int64_t rank, const char* legend) {
  check(x.dim() == rank, name, " has ", x.dim(), " dimensions, expected ", legend);
}

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

void check_floating(const Tensor& x, const char* name, const Tensor& value) {
  check(is_floating(x.scalar_type()), name,
        " must have the type float32, float64, float16 or bfloat16");
  check(on_device(x) && x.get_device_index() == value.get_device_index(), name,
        " must be on the device of value");
}

// ---- Inputs as the kernels want them ------------------------------------------------------------

ValueType value_type_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Double:
      return ValueType::float64;
    case ScalarType::Half:
      return ValueType::float16;
    case ScalarType::BFloat16:
      return ValueType::bfloat16;
    default:
      return ValueType::float32;
  }
}

ScalarType real_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor converted(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

Tensor fresh_copy(const Tensor& x) {
  Tensor copy = torch::stable::new_empty(x, x.sizes());
  torch::stable::copy_(copy, x);
  return copy;
}

// Whether the last `count` dimensions lie in memory as in a contiguous tensor.
bool inner_contiguous(const Tensor& x, int64_t count) {
  int64_t expected = 1;
  for (int64_t i = x.dim() - 1; i >= x.dim() - count; --i) {
    if (x.size(i) != 1 && x.stride(i) != expected) return false;
    expected *= x.size(i);
  }
  return true;
}

Tensor with_inner_contiguous(const Tensor& x, int64_t count) {
  return inner_contiguous(x, count) ? x : fresh_copy(x);
}

// For vector loads: address and outer strides are multiples of value_alignment.
Tensor aligned(const Tensor& x, int64_t inner, int64_t dim) {
  const int64_t size = static_cast<int64_t>(x.element_size());
  const int64_t alignment = value_alignment(dim, size);
  bool fits = inner_contiguous(x, inner) &&
              reinterpret_cast<uintptr_t>(x.const_data_ptr()) % alignment == 0;
  for (int64_t i = 0; i < x.dim() - inner; ++i) {
    fits = fits && x.stride(i) * size % alignment == 0;
  }
  return fits ? x : fresh_copy(x);
}

Strides strides_of(const Tensor& x, int64_t inner_dimension) {
  return {x.stride(0), x.stride(1), x.stride(inner_dimension)};
}

std::vector<int64_t> integers(const Tensor& x, const char* name) {
  check(x.scalar_type() == ScalarType::Long, name, " must have the type int64");
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor here = torch::stable::contiguous(x.is_cpu() ? x : torch::stable::to(x, cpu));
  const auto* first = static_cast<const int64_t*>(here.const_data_ptr());
  return {first, first + here.numel()};
}

std::vector<Level> levels_of(const Tensor& spatial_shapes, const Tensor& level_start_index,
                             int64_t cells) {
  check_rank(spatial_shapes, "spatial_shapes", 2, "(L, 2)");
  const int64_t count = spatial_shapes.size(0);
  check_shape(spatial_shapes, "spatial_shapes", {count, 2}, "(L, 2)");
  check_shape(level_start_index, "level_start_index", {count}, "(L,)");
  const std::vector<int64_t> shapes = integers(spatial_shapes, "spatial_shapes");
  const std::vector<int64_t> starts = integers(level_start_index, "level_start_index");
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  check(cells < limit, "value has too many cells: ", cells);
  std::vector<Level> levels;
  int64_t start = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t height = shapes[2 * i], width = shapes[2 * i + 1];
    check(height >= 0 && width >= 0 && height < limit && width < limit, "spatial_shapes: level ",
          i, " is ", height, " x ", width);
    check(starts[i] == start, "level_start_index: level ", i, " starts at ", starts[i],
          ", expected ", start, ": levels lie one after the other");
    check(height == 0 || width <= (cells - start) / height,
          "spatial_shapes do not add up to the ", cells, " cells of value");
    levels.push_back({static_cast<int32_t>(height), static_cast<int32_t>(width),
                      static_cast<int32_t>(start)});
    start += height * width;
  }
  check(start == cells, "spatial_shapes add up to ", start, " cells, but value has ", cells);
  return levels;
}

// The tensors behind an Arguments, which must live until the kernels are launched.
struct Problem {
  Arguments arguments{};
  ValueType type = ValueType::float32;
  Tensor value, locations, weights;
  std::optional<Tensor> reference_points, padding_mask, level_table;
  Tensor grad_output;

  // Nothing to sample, or nobody to sample for.
  bool empty() const {
    const Arguments& a = arguments;
    return a.batch * a.queries * a.heads * a.dim * a.cells * a.levels * a.points == 0;
  }
};

void set_levels(Problem& problem, const std::vector<Level>& levels) {
  Arguments& args = problem.arguments;
  args.levels = static_cast<int32_t>(levels.size());
  if (levels.size() <= inline_levels) {
    std::copy(levels.begin(), levels.end(), args.level);
    return;
  }
  static_assert(sizeof(Level) == 3 * sizeof(int32_t));
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Sizes sizes{static_cast<int64_t>(levels.size()), 3};
  const Tensor table =
      torch::stable::empty(sizes, ScalarType::Int, std::nullopt, cpu);
  std::copy(levels.begin(), levels.end(), static_cast<Level*>(table.mutable_data_ptr()));
  problem.level_table = torch::stable::to(table, problem.value.device());
  args.level_table = static_cast<const Level*>(problem.level_table->const_data_ptr());
}

void set_value(Problem& problem, const Tensor& value) {
  check_rank(value, "value", 4, "(B, S, H, D)");
  check_floating(value, "value", value);
  Arguments& args = problem.arguments;
  const int64_t dim = value.size(3), heads = value.size(2);
  check(dim % 4 == 0 && dim <= 256, "value: head dim ", dim, " is no multiple of 4 up to 256");
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / sizeof(double);
  check(heads * dim <= limit, "value has too many heads: ", heads);
  problem.type = value_type_of(value);
  problem.value = aligned(value, 1, dim);
  if (problem.value.stride(1) > limit) problem.value = fresh_copy(value);
  args.batch = value.size(0);
  args.cells = value.size(1);
  args.heads = static_cast<int32_t>(heads);
  args.dim = static_cast<int32_t>(dim);
  args.value = problem.value.const_data_ptr();
  args.value_batch_stride = problem.value.stride(0);
  args.value_cell_stride = static_cast<int32_t>(problem.value.stride(1));
  args.value_head_stride = problem.value.stride(2);
}

// Locations and weights, or offsets and logits, by the names that the caller knows them by.
void set_points(Problem& problem, const Tensor& locations, const char* locations_name,
                const Tensor& weights) {
  Arguments& args = problem.arguments;
  check_rank(locations, locations_name, 6, "(B, Q, H, L, P, 2)");
  check_floating(locations, locations_name, problem.value);
  args.queries = locations.size(1);
  const int64_t points = locations.size(4);
  check_shape(locations, locations_name,
              {args.batch, args.queries, args.heads, args.levels, points, 2},
              "(B, Q, H, L, P, 2)");
  constexpr int64_t one = int64_t{1} << reciprocal_bits;
  check(points < one && (points == 0 || points * args.levels < one / points), locations_name,
        " has too many points: ", points);
  args.points = static_cast<int32_t>(points);
  if (points > 0) args.points_reciprocal = static_cast<uint32_t>((one + points - 1) / points);
  const ScalarType real = real_type(problem.value);
  problem.locations = with_inner_contiguous(converted(locations, real), 3);
  problem.weights = with_inner_contiguous(converted(weights, real), weights.dim() - 3);
  args.locations = problem.locations.const_data_ptr();
  args.location_strides = strides_of(problem.locations, 2);
  args.weights = problem.weights.const_data_ptr();
  args.weight_strides = strides_of(problem.weights, 2);
}

void set_reference_points(Problem& problem, const Tensor& reference_points) {
  Arguments& args = problem.arguments;
  check_rank(reference_points, "reference_points", 4, "(B, Q, L, 2 or 4)");
  check_floating(reference_points, "reference_points", problem.value);
  const int64_t size = reference_points.size(3);
  check(size == 2 || size == 4, "reference_points have ", size, " coordinates, not 2 or 4");
  check_shape(reference_points, "reference_points", {args.batch, args.queries, args.levels, size},
              "(B, Q, L, 2 or 4)");
  problem.reference_points =
      with_inner_contiguous(converted(reference_points, real_type(problem.value)), 1);
  args.reference_points = problem.reference_points->const_data_ptr();
  args.reference_strides = strides_of(*problem.reference_points, 2);
  args.reference_size = static_cast<int32_t>(size);
}

void set_padding_mask(Problem& problem, const std::optional<Tensor>& padding_mask) {
  if (!padding_mask.has_value()) return;
  Arguments& args = problem.arguments;
  check(padding_mask->scalar_type() == ScalarType::Bool, "padding_mask must have the type bool");
  check(on_device(*padding_mask) &&
            padding_mask->get_device_index() == problem.value.get_device_index(),
        "padding_mask must be on the device of value");
  check_shape(*padding_mask, "padding_mask", {args.batch, args.cells}, "(B, S)");
  problem.padding_mask = with_inner_contiguous(*padding_mask, 1);
  args.padding_mask = static_cast<const bool*>(problem.padding_mask->const_data_ptr());
  args.padding_batch_stride = problem.padding_mask->stride(0);
}

Problem classic_problem(const Tensor& value, const Tensor& spatial_shapes,
                        const Tensor& level_start_index, const Tensor& sampling_locations,
                        const Tensor& attention_weights) {
  Problem problem;
  set_value(problem, value);
  set_levels(problem, levels_of(spatial_shapes, level_start_index, value.size(1)));
  check_rank(attention_weights, "attention_weights", 5, "(B, Q, H, L, P)");
  check_floating(attention_weights, "attention_weights", value);
  check_rank(sampling_locations, "sampling_locations", 6, "(B, Q, H, L, P, 2)");
  Sizes expected = sizes_of(sampling_locations);
  expected.pop_back();
  check_shape(attention_weights, "attention_weights", expected, "(B, Q, H, L, P)");
  set_points(problem, sampling_locations, "sampling_locations", attention_weights);
  return problem;
}

Problem fused_problem(const Tensor& value, const Tensor& spatial_shapes,
                      const Tensor& level_start_index, const Tensor& reference_points,
                      const Tensor& offsets, const Tensor& logits,
                      const std::optional<Tensor>& padding_mask) {
  Problem problem;
  set_value(problem, value);
  set_levels(problem, levels_of(spatial_shapes, level_start_index, value.size(1)));
  check_rank(logits, "logits", 4, "(B, Q, H, L * P)");
  check_floating(logits, "logits", value);
  check_rank(offsets, "offsets", 6, "(B, Q, H, L, P, 2)");
  const Sizes sizes = sizes_of(offsets);
  check_shape(logits, "logits", {sizes[0], sizes[1], sizes[2], sizes[3] * sizes[4]},
              "(B, Q, H, L * P)");
  set_points(problem, offsets, "offsets", logits);
  set_reference_points(problem, reference_points);
  set_padding_mask(problem, padding_mask);
  return problem;
}

void set_grad_output(Problem& problem, const Tensor& grad_output) {
  Arguments& args = problem.arguments;
  check_floating(grad_output, "grad_output", problem.value);
  check_shape(grad_output, "grad_output",
              {args.batch, args.queries, int64_t{args.heads} * args.dim}, "(B, Q, H * D)");
  problem.grad_output =
      aligned(converted(grad_output, problem.value.scalar_type()), 1, args.dim);
  args.grad_output = problem.grad_output.const_data_ptr();
  args.grad_output_batch_stride = problem.grad_output.stride(0);
  args.grad_output_query_stride = problem.grad_output.stride(1);
}

// ---- Passes -------------------------------------------------------------------------------------

void check_launch(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("ms_deform_attn: ") + error);
}

Tensor run_forward(Problem& problem) {
  Arguments& args = problem.arguments;
  const Sizes sizes{args.batch, args.queries, int64_t{args.heads} * args.dim};
  if (problem.empty()) return torch::stable::new_zeros(problem.value, sizes);
  const OnDevice device(problem.value);
  const Tensor output = torch::stable::new_empty(problem.value, sizes);
  args.output = output.mutable_data_ptr();
  check_launch(forward(args, problem.type, device.stream()));
  return output;
}

struct Gradients {
  Tensor value, locations, weights;
  std::optional<Tensor> reference_points;
};

Tensor zeros(const Problem& problem, const Sizes& sizes, ScalarType type) {
  return torch::stable::new_zeros(problem.value, sizes, type);
}

// Every element of these gets written, unless there is nothing to launch.
Tensor gradient_like(const Problem& problem, const Tensor& x) {
  if (problem.empty()) return torch::stable::new_zeros(x, x.sizes());
  return torch::stable::new_empty(x, x.sizes());
}

void launch_backward(Problem& problem, bool deterministic) {
  Arguments& args = problem.arguments;
  const OnDevice device(problem.value);
  if (!deterministic) return check_launch(backward(args, problem.type, device.stream()));
  const Sizes sizes = sizes_of(problem.value);
  const Tensor sums = zeros(problem, sizes, ScalarType::Long);
  const Tensor not_finite = zeros(problem, sizes, ScalarType::Byte);
  const Tensor magnitude = zeros(problem, {2}, ScalarType::Long);
  args.fixed_point_sums = static_cast<int64_t*>(sums.mutable_data_ptr());
  args.not_finite = static_cast<uint8_t*>(not_finite.mutable_data_ptr());
  args.magnitude = static_cast<unsigned long long*>(magnitude.mutable_data_ptr());
  check_launch(deterministic_backward(args, problem.type, device.stream()));
}

Gradients run_backward(Problem& problem, const Tensor& grad_output, bool deterministic) {
  set_grad_output(problem, grad_output);
  Arguments& args = problem.arguments;
  Gradients gradients;
  // Half types have too few digits to sum in.
  gradients.value = zeros(problem, sizes_of(problem.value), real_type(problem.value));
  gradients.locations = gradient_like(problem, problem.locations);
  gradients.weights = gradient_like(problem, problem.weights);
  args.grad_value = gradients.value.mutable_data_ptr();
  args.grad_locations = gradients.locations.mutable_data_ptr();
  args.grad_weights = gradients.weights.mutable_data_ptr();
  if (problem.reference_points.has_value()) {
    gradients.reference_points = gradient_like(problem, *problem.reference_points);
    args.grad_reference_points = gradients.reference_points->mutable_data_ptr();
  }
  if (!problem.empty()) launch_backward(problem, deterministic);
  return gradients;
}

// ---- Operators ----------------------------------------------------------------------------------

using Optional = std::optional<Tensor>;

Tensor classic_forward(const Tensor& value, const Tensor& spatial_shapes,
                       const Tensor& level_start_index, const Tensor& sampling_locations,
                       const Tensor& attention_weights) {
  Problem problem = classic_problem(value, spatial_shapes, level_start_index, sampling_locations,
                                    attention_weights);
  return run_forward(problem);
}

template <bool DETERMINISTIC>
std::tuple<Tensor, Tensor, Tensor> classic_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const Tensor& level_start_index, const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  Problem problem = classic_problem(value, spatial_shapes, level_start_index, sampling_locations,
                                    attention_weights);
  const Gradients gradients = run_backward(problem, grad_output, DETERMINISTIC);
  return {converted(gradients.value, value.scalar_type()),
          converted(gradients.locations, sampling_locations.scalar_type()),
          converted(gradients.weights, attention_weights.scalar_type())};
}

Tensor fused_forward(const Tensor& value, const Tensor& spatial_shapes,
                     const Tensor& level_start_index, const Tensor& reference_points,
                     const Tensor& offsets, const Tensor& logits, const Optional& padding_mask) {
  Problem problem = fused_problem(value, spatial_shapes, level_start_index, reference_points,
                                  offsets, logits, padding_mask);
  return run_forward(problem);
}

template <bool DETERMINISTIC>
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const Tensor& level_start_index, const Tensor& reference_points, const Tensor& offsets,
    const Tensor& logits, const Optional& padding_mask) {
  Problem problem = fused_problem(value, spatial_shapes, level_start_index, reference_points,
                                  offsets, logits, padding_mask);
  const Gradients gradients = run_backward(problem, grad_output, DETERMINISTIC);
  return {converted(gradients.value, value.scalar_type()),
          converted(*gradients.reference_points, reference_points.scalar_type()),
          converted(gradients.locations, offsets.scalar_type()),
          converted(gradients.weights, logits.scalar_type())};
}

}  // namespace
}  // namespace dn_detr::cuda

#define CLASSIC                                                                            \
  "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, " \
  "Tensor attention_weights"
#define FUSED                                                                             \
  "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor reference_points, " \
  "Tensor offsets, Tensor logits, Tensor? padding_mask"

// Only CUDA needs these: on the CPU every backward is deterministic. The stable ABI does not say
// whether torch.use_deterministic_algorithms is on, so that the caller in Python chooses.
STABLE_TORCH_LIBRARY_FRAGMENT(DN_DETR_LIBRARY, m) {
#ifdef DN_DETR_EMULATED
  m.def("ms_deform_attn_forward(" CLASSIC ") -> Tensor");
  m.def("ms_deform_attn_backward(Tensor grad_output, " CLASSIC ") -> (Tensor, Tensor, Tensor)");
  m.def("ms_deform_attn_fused_forward(" FUSED ") -> Tensor");
  m.def("ms_deform_attn_fused_backward(Tensor grad_output, " FUSED
        ") -> (Tensor, Tensor, Tensor, Tensor)");
#endif
  m.def("ms_deform_attn_backward_deterministic(Tensor grad_output, " CLASSIC
        ") -> (Tensor, Tensor, Tensor)");
  m.def("ms_deform_attn_fused_backward_deterministic(Tensor grad_output, " FUSED
        ") -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(DN_DETR_LIBRARY, DN_DETR_DEVICE_KEY, m) {
  using namespace dn_detr::cuda;
  m.impl("ms_deform_attn_forward", TORCH_BOX(&classic_forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&classic_backward<false>));
  m.impl("ms_deform_attn_backward_deterministic", TORCH_BOX(&classic_backward<true>));
  m.impl("ms_deform_attn_fused_forward", TORCH_BOX(&fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&fused_backward<false>));
  m.impl("ms_deform_attn_fused_backward_deterministic", TORCH_BOX(&fused_backward<true>));
}
