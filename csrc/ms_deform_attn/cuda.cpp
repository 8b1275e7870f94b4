// The operators for CUDA tensors: allocations and launches. Bound through LibTorch's stable
// ABI, so that one build serves several versions of PyTorch.
//
// Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points,
// C coordinates of a reference point.

#include <cstdint>
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

using inputs::inner_contiguous;
using inputs::LevelExtent;
using inputs::real_type;
using inputs::ScalarType;
using inputs::Sizes;
using inputs::sizes_of;
using inputs::Tensor;
using inputs::with_inner_contiguous;

// ---- Inputs as the kernels want them ------------------------------------------------------------

Tensor converted(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
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

void set_levels(Problem& problem, const std::vector<LevelExtent>& levels) {
  Arguments& args = problem.arguments;
  args.levels = static_cast<int32_t>(levels.size());
  const auto write = [&](Level* to) {
    for (const LevelExtent& from : levels) *to++ = {from.height, from.width, from.first_cell};
  };
  if (levels.size() <= inline_levels) return write(args.level);
  static_assert(sizeof(Level) == 3 * sizeof(int32_t));
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Sizes sizes{static_cast<int64_t>(levels.size()), 3};
  const Tensor table =
      torch::stable::empty(sizes, ScalarType::Int, std::nullopt, cpu);
  write(static_cast<Level*>(table.mutable_data_ptr()));
  problem.level_table = torch::stable::to(table, problem.value.device());
  args.level_table = static_cast<const Level*>(problem.level_table->const_data_ptr());
}

void set_value(Problem& problem, const Tensor& value) {
  Arguments& args = problem.arguments;
  const int64_t dim = value.size(3);
  problem.type = inputs::value_type_of(value);
  problem.value = aligned(value, 1, dim);
  if (problem.value.stride(1) > inputs::kMaxChannels) problem.value = fresh_copy(value);
  args.batch = value.size(0);
  args.cells = value.size(1);
  args.heads = static_cast<int32_t>(value.size(2));
  args.dim = static_cast<int32_t>(dim);
  args.value = problem.value.const_data_ptr();
  args.value_batch_stride = problem.value.stride(0);
  args.value_cell_stride = static_cast<int32_t>(problem.value.stride(1));
  args.value_head_stride = problem.value.stride(2);
}

void set_samples(Problem& problem, const Tensor& locations, const Tensor& weights) {
  Arguments& args = problem.arguments;
  args.queries = locations.size(1);
  const int64_t points = locations.size(4);
  args.points = static_cast<int32_t>(points);
  constexpr int64_t one = int64_t{1} << reciprocal_bits;
  if (points > 0) args.points_reciprocal = static_cast<uint32_t>((one + points - 1) / points);
  problem.locations = with_inner_contiguous(locations, 3);
  problem.weights = with_inner_contiguous(weights, weights.dim() - 3);
  args.locations = problem.locations.const_data_ptr();
  args.location_strides = strides_of(problem.locations, 2);
  args.weights = problem.weights.const_data_ptr();
  args.weight_strides = strides_of(problem.weights, 2);
}

void set_reference_points(Problem& problem, const Tensor& reference_points) {
  Arguments& args = problem.arguments;
  problem.reference_points = with_inner_contiguous(reference_points, 1);
  args.reference_points = problem.reference_points->const_data_ptr();
  args.reference_strides = strides_of(*problem.reference_points, 2);
  args.reference_size = static_cast<int32_t>(reference_points.size(3));
}

void set_padding_mask(Problem& problem, const std::optional<Tensor>& padding_mask) {
  if (!padding_mask.has_value()) return;
  Arguments& args = problem.arguments;
  problem.padding_mask = with_inner_contiguous(*padding_mask, 1);
  args.padding_mask = static_cast<const bool*>(problem.padding_mask->const_data_ptr());
  args.padding_batch_stride = problem.padding_mask->stride(0);
}

// The dispatcher comes here as soon as one tensor, whichever, is on the device.
void check_on_device(const Tensor& value) {
  if (!on_device(value)) {
    inputs::fail("spatial_shapes or level_start_index is not on the device of value");
  }
}

Problem classic_problem(const Tensor& value, const Tensor& spatial_shapes,
                        const Tensor& level_start_index, const Tensor& sampling_locations,
                        const Tensor& attention_weights) {
  Problem problem;
  const auto levels = inputs::check_classic(value, spatial_shapes, level_start_index,
                                            sampling_locations, attention_weights);
  check_on_device(value);
  set_value(problem, value);
  set_levels(problem, levels);
  set_samples(problem, sampling_locations, attention_weights);
  return problem;
}

Problem fused_problem(const Tensor& value, const Tensor& spatial_shapes,
                      const Tensor& level_start_index, const Tensor& reference_points,
                      const Tensor& offsets, const Tensor& logits,
                      const std::optional<Tensor>& padding_mask) {
  Problem problem;
  const auto levels = inputs::check_fused(value, spatial_shapes, level_start_index,
                                          reference_points, offsets, logits, padding_mask);
  check_on_device(value);
  set_value(problem, value);
  set_levels(problem, levels);
  set_samples(problem, offsets, logits);
  set_reference_points(problem, reference_points);
  set_padding_mask(problem, padding_mask);
  return problem;
}

void set_grad_output(Problem& problem, const Tensor& grad_output) {
  Arguments& args = problem.arguments;
  inputs::check_grad_output(grad_output, problem.value, problem.locations);
  problem.grad_output = aligned(grad_output, 1, args.dim);
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
  return {converted(gradients.value, value.scalar_type()), gradients.locations,
          gradients.weights};
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
  return {converted(gradients.value, value.scalar_type()), *gradients.reference_points,
          gradients.locations, gradients.weights};
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
