// The operators that registration.cpp makes known to PyTorch; only the stable ABI is used.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace dn_detr {

using StableTensor = torch::stable::Tensor;

StableTensor ms_deform_attn_forward_cpu(
    StableTensor value, StableTensor spatial_shapes, StableTensor level_start_index,
    StableTensor sampling_locations, StableTensor attention_weights);

std::tuple<StableTensor, StableTensor, StableTensor> ms_deform_attn_backward_cpu(
    StableTensor grad_output, StableTensor value, StableTensor spatial_shapes,
    StableTensor level_start_index, StableTensor sampling_locations,
    StableTensor attention_weights);

StableTensor ms_deform_attn_fused_forward_cpu(
    StableTensor value, StableTensor spatial_shapes, StableTensor level_start_index,
    StableTensor reference_points, StableTensor offsets, StableTensor logits,
    std::optional<StableTensor> padding_mask);

std::tuple<StableTensor, StableTensor, StableTensor, StableTensor>
ms_deform_attn_fused_backward_cpu(
    StableTensor grad_output, StableTensor value, StableTensor spatial_shapes,
    StableTensor level_start_index, StableTensor reference_points, StableTensor offsets,
    StableTensor logits, std::optional<StableTensor> padding_mask);

// Which instruction set the CPU kernels use, and the choice of another one ("" for the best).
std::string cpu_kernels();
void use_cpu_kernels(std::string name);

}  // namespace dn_detr
