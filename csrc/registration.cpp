// Operators of the compiled library, as torch.ops.dn_detr_C; their Python face is dn_detr.ops.
//
// Shapes: value (B, S, H, D); spatial_shapes (L, 2) and level_start_index (L,), int64 on the CPU;
// sampling_locations and offsets (B, Q, H, L, P, 2); attention_weights (B, Q, H, L, P); logits
// (B, Q, H, L * P); reference_points (B, Q, L, 2 or 4); padding_mask (B, S) bool, true = padding;
// output and grad_output (B, Q, H * D).
#include <torch/csrc/stable/library.h>

#include "ms_deform_attn/operators.h"

STABLE_TORCH_LIBRARY(dn_detr_C, m) {
  m.def(
      "ms_deform_attn_forward(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor sampling_locations, Tensor attention_weights) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn_fused_forward(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor reference_points, Tensor offsets, Tensor logits, Tensor? padding_mask) -> Tensor");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor reference_points, Tensor offsets, Tensor logits, "
      "Tensor? padding_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_kernels() -> str");
  m.def("use_cpu_kernels(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dn_detr_C, CPU, m) {
  m.impl("ms_deform_attn_forward", TORCH_BOX(&dn_detr::ms_deform_attn_forward_cpu));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&dn_detr::ms_deform_attn_backward_cpu));
  m.impl("ms_deform_attn_fused_forward", TORCH_BOX(&dn_detr::ms_deform_attn_fused_forward_cpu));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&dn_detr::ms_deform_attn_fused_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dn_detr_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&dn_detr::cpu_kernels));
  m.impl("use_cpu_kernels", TORCH_BOX(&dn_detr::use_cpu_kernels));
}
