// The operators for CUDA tensors: checks, allocations, launches. Bound through LibTorch's stable
// ABI, so that one build serves several versions of PyTorch.
//
// Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points,
// C coordinates of a reference point.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_arguments.h"
#include "cuda_device.h"
#include "inputs.h"

namespace dn_detr::cuda {
namespace {

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

Tensor fresh_copy(const Tensor& x) {
  Tensor copy = torch::stable::new_empty(x, x.sizes());
  torch::stable::copy_(copy, x);
  return copy;
}

// For vector loads: address and outer strides are multiples of value_alignment.
Tensor aligned(const Tensor& x, int64_t inner, int64_t dim) {
  const int64_t size = static_cast<int64_t>(x.element_size());
  const int64_t alignment = value_alignment(dim, size);
  bool fits = has_contiguous_rows(x, inner) &&
              reinterpret_cast<uintptr_t>(x.const_data_ptr()) % alignment == 0;
  for (int64_t i = 0; i < x.dim() - inner; ++i) {
    fits = fits && x.stride(i) * size % alignment == 0;
  }
  return fits ? x : fresh_copy(x);
}

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// The tensors behind an Arguments, which must live until the kernels are launched.
struct Problem {
  Arguments arguments{};
  ValueType type = ValueType::float32;
  Tensor value, locations, weights;
  std::optional<Tensor> reference_points, padding_mask, level_table;
  Tensor grad_output;
  bool empty = false;  // nothing to sample, or nobody to sample for
};

void set_levels(Problem& problem, const std::vector<LevelSize>& levels) {
  Arguments& args = problem.arguments;
  args.levels = static_cast<int32_t>(levels.size());
  if (levels.size() <= inline_levels) {
    std::copy(levels.begin(), levels.end(), args.level);
    return;
  }
  static_assert(sizeof(LevelSize) == 3 * sizeof(int32_t));
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Sizes sizes{static_cast<int64_t>(levels.size()), 3};
  const Tensor table =
      torch::stable::empty(sizes, ScalarType::Int, std::nullopt, cpu);
  std::copy(levels.begin(), levels.end(), static_cast<LevelSize*>(table.mutable_data_ptr()));
  problem.level_table = torch::stable::to(table, problem.value.device());
  args.level_table = static_cast<const LevelSize*>(problem.level_table->const_data_ptr());
}

void set_value(Problem& problem, const Inputs& inputs) {
  Arguments& args = problem.arguments;
  const InputSizes& sizes = inputs.sizes;
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / sizeof(double);
  if (sizes.heads * sizes.dim > limit) fail("value has too many heads: ", sizes.heads);
  problem.type = value_type_of(inputs.value);
  problem.value = aligned(inputs.value, 1, sizes.dim);
  if (problem.value.stride(1) > limit) problem.value = fresh_copy(inputs.value);
  args.batch = sizes.batch;
  args.cells = sizes.cells;
  args.heads = static_cast<int32_t>(sizes.heads);
  args.dim = static_cast<int32_t>(sizes.dim);
  args.value = problem.value.const_data_ptr();
  args.value_batch_stride = problem.value.stride(0);
  args.value_cell_stride = static_cast<int32_t>(problem.value.stride(1));
  args.value_head_stride = problem.value.stride(2);
}

void set_points(Problem& problem, const Inputs& inputs) {
  Arguments& args = problem.arguments;
  const int64_t points = inputs.sizes.points;
  args.queries = inputs.sizes.queries;
  constexpr int64_t one = int64_t{1} << reciprocal_bits;
  if (points >= one || (points > 0 && points * args.levels >= one / points)) {
    fail(inputs.is_fused() ? "offsets" : "sampling_locations", " has too many points: ", points);
  }
  args.points = static_cast<int32_t>(points);
  if (points > 0) args.points_reciprocal = static_cast<uint32_t>((one + points - 1) / points);
  problem.locations = with_contiguous_rows(inputs.locations, 3);
  problem.weights = with_contiguous_rows(inputs.weights, inputs.weights.dim() - 3);
  args.locations = problem.locations.const_data_ptr();
  args.location_strides = strides_of(problem.locations);
  args.weights = problem.weights.const_data_ptr();
  args.weight_strides = strides_of(problem.weights);
}

void set_fused(Problem& problem, const Inputs& inputs) {
  Arguments& args = problem.arguments;
  problem.reference_points = with_contiguous_rows(*inputs.reference_points, 1);
  args.reference_points = problem.reference_points->const_data_ptr();
  args.reference_strides = strides_of(*problem.reference_points);
  args.reference_size = static_cast<int32_t>(inputs.sizes.coordinates);
  if (!inputs.padding_mask) return;
  problem.padding_mask = with_contiguous_rows(*inputs.padding_mask, 1);
  args.padding_mask = static_cast<const bool*>(problem.padding_mask->const_data_ptr());
  args.padding_batch_stride = problem.padding_mask->stride(0);
}

Problem problem_of(const Inputs& inputs) {
  Problem problem;
  problem.empty = inputs.sizes.is_empty() || inputs.sizes.cells == 0;
  set_value(problem, inputs);
  set_levels(problem, inputs.levels);
  set_points(problem, inputs);
  if (inputs.is_fused()) set_fused(problem, inputs);
  return problem;
}

void set_grad_output(Problem& problem, const Inputs& inputs, const Tensor& grad_output) {
  check_grad_output(inputs, grad_output);
  Arguments& args = problem.arguments;
  problem.grad_output = aligned(grad_output, 1, args.dim);
  args.grad_output = problem.grad_output.const_data_ptr();
  args.grad_output_batch_stride = problem.grad_output.stride(0);
  args.grad_output_query_stride = problem.grad_output.stride(1);
}

// ---- Passes -------------------------------------------------------------------------------------

void check_launch(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("ms_deform_attn: ") + error);
}

Tensor run_forward(const Inputs& inputs) {
  Problem problem = problem_of(inputs);
  Arguments& args = problem.arguments;
  const Sizes sizes{args.batch, args.queries, int64_t{args.heads} * args.dim};
  if (problem.empty) return torch::stable::new_zeros(inputs.value, sizes);
  const OnDevice device(inputs.value);
  const Tensor output = torch::stable::new_empty(inputs.value, sizes);
  args.output = output.mutable_data_ptr();
  check_launch(forward(args, problem.type, device.stream()));
  return output;
}

struct Gradients {
  Tensor value, reference_points, locations, weights;
};

Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return torch::stable::new_zeros(like, sizes, type);
}

// Every element of these gets written, unless there is nothing to launch.
Tensor gradient_like(const Problem& problem, const Tensor& x) {
  if (problem.empty) return torch::stable::new_zeros(x, x.sizes());
  return torch::stable::new_empty(x, x.sizes());
}

void launch_backward(Problem& problem, const Tensor& value, bool deterministic) {
  Arguments& args = problem.arguments;
  const OnDevice device(value);
  if (!deterministic) return check_launch(backward(args, problem.type, device.stream()));
  const Sizes sizes = sizes_of(value);
  const Tensor sums = zeros(value, sizes, ScalarType::Long);
  const Tensor not_finite = zeros(value, sizes, ScalarType::Byte);
  const Tensor magnitude = zeros(value, {2}, ScalarType::Long);
  args.fixed_point_sums = static_cast<int64_t*>(sums.mutable_data_ptr());
  args.not_finite = static_cast<uint8_t*>(not_finite.mutable_data_ptr());
  args.magnitude = static_cast<unsigned long long*>(magnitude.mutable_data_ptr());
  check_launch(deterministic_backward(args, problem.type, device.stream()));
}

Gradients run_backward(const Tensor& grad_output, const Inputs& inputs, bool deterministic) {
  Problem problem = problem_of(inputs);
  set_grad_output(problem, inputs, grad_output);
  Arguments& args = problem.arguments;
  const Tensor& value = inputs.value;
  Gradients gradients;
  // Half types have too few digits to sum in.
  gradients.value = zeros(value, sizes_of(value), arithmetic_type(value));
  gradients.locations = gradient_like(problem, inputs.locations);
  gradients.weights = gradient_like(problem, inputs.weights);
  args.grad_value = gradients.value.mutable_data_ptr();
  args.grad_locations = gradients.locations.mutable_data_ptr();
  args.grad_weights = gradients.weights.mutable_data_ptr();
  if (inputs.is_fused()) {
    gradients.reference_points = gradient_like(problem, *inputs.reference_points);
    args.grad_reference_points = gradients.reference_points.mutable_data_ptr();
  }
  if (!problem.empty) launch_backward(problem, value, deterministic);
  if (gradients.value.scalar_type() != value.scalar_type()) {
    gradients.value = torch::stable::to(gradients.value, value.scalar_type());
  }
  return gradients;
}

// ---- Operators ----------------------------------------------------------------------------------

using Optional = std::optional<Tensor>;

Tensor classic_forward(const Tensor& value, const Tensor& spatial_shapes,
                       const Tensor& level_start_index, const Tensor& sampling_locations,
                       const Tensor& attention_weights) {
  return run_forward(classic_inputs(value, spatial_shapes, level_start_index, sampling_locations,
                                    attention_weights));
}

template <bool DETERMINISTIC>
std::tuple<Tensor, Tensor, Tensor> classic_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const Tensor& level_start_index, const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  const Gradients gradients =
      run_backward(grad_output,
                   classic_inputs(value, spatial_shapes, level_start_index, sampling_locations,
                                  attention_weights),
                   DETERMINISTIC);
  return {gradients.value, gradients.locations, gradients.weights};
}

Tensor fused_forward(const Tensor& value, const Tensor& spatial_shapes,
                     const Tensor& level_start_index, const Tensor& reference_points,
                     const Tensor& offsets, const Tensor& logits, const Optional& padding_mask) {
  return run_forward(fused_inputs(value, spatial_shapes, level_start_index, reference_points,
                                  offsets, logits, padding_mask));
}

template <bool DETERMINISTIC>
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const Tensor& level_start_index, const Tensor& reference_points, const Tensor& offsets,
    const Tensor& logits, const Optional& padding_mask) {
  const Gradients gradients =
      run_backward(grad_output,
                   fused_inputs(value, spatial_shapes, level_start_index, reference_points,
                                offsets, logits, padding_mask),
                   DETERMINISTIC);
  return {gradients.value, gradients.reference_points, gradients.locations, gradients.weights};
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
