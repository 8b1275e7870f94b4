// The CPU kernels, compiled once per instruction set (cpu_portable.cpp, cpu_avx2.cpp, ...).
//
// The work is a list of items (query, head). Each is done in stages, a batch of items at a time:
//   prepare   softmax and location arithmetic, vectorised over the L * P samples of an item
//   sample    forward: weighted sum of 4 rows of D channels per sample
//   scatter   backward: 4 dot products and 4 row updates per sample
//   finish    backward: gradients of locations and weights from the dot products
// Only sample and scatter depend on D; only prepare and finish on the kind of operator.
//
// Rows are read either from `value` as it lies ("direct") or from a packed copy of one head, in
// which cells follow each other without other heads between them and every level has a border of
// zeros. Packed is faster when there are many queries: no test for corners outside, one index for
// two corners, and no 1 KB stride that uses an eighth of the cache's sets. It multiplies rows by
// weights of zero, so it is used only if all cells are finite.
#pragma once

#include "cpu_pack.h"
#include "cpu_sample.h"
#include "cpu_scatter.h"

namespace dn_detr {
namespace {

// ---- dispatch on the head dim ----

template <class T, int kDim>
void forward_dim(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  if (task.packed) return forward_items<T, kDim, true>(arguments, task);
  return forward_items<T, kDim, false>(arguments, task);
}
template <class T, int kDim>
void backward_dim(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  if (task.packed) return backward_items<T, kDim, true>(arguments, task);
  return backward_items<T, kDim, false>(arguments, task);
}

// float64 serves gradient checks: one general version is enough.
template <class T>
constexpr bool kHasFastDims = sizeof(T) < sizeof(double);

template <class T>
void forward(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  if constexpr (kHasFastDims<T>) {
    if (arguments.dim == 16) return forward_dim<T, 16>(arguments, task);
    if (arguments.dim == 32) return forward_dim<T, 32>(arguments, task);
    if (arguments.dim == 64) return forward_dim<T, 64>(arguments, task);
  }
  forward_dim<T, 0>(arguments, task);
}
template <class T>
void backward(const MSDeformAttnArguments& arguments, const CpuTask& task) {
  if constexpr (kHasFastDims<T>) {
    if (arguments.dim == 16) return backward_dim<T, 16>(arguments, task);
    if (arguments.dim == 32) return backward_dim<T, 32>(arguments, task);
    if (arguments.dim == 64) return backward_dim<T, 64>(arguments, task);
  }
  backward_dim<T, 0>(arguments, task);
}
template <class T>
bool pack(const MSDeformAttnArguments& arguments, int64_t batch, int64_t head, void* packed) {
  if (arguments.dim == 32) return pack_head<T, 32>(arguments, batch, head, packed);
  return pack_head<T, 0>(arguments, batch, head, packed);
}
template <class T>
void unpack(
    const MSDeformAttnArguments& arguments, int64_t batch, int64_t head, const void* grad_rows,
    bool is_packed) {
  if (arguments.dim == 32) return unpack_head<T, 32>(arguments, batch, head, grad_rows, is_packed);
  unpack_head<T, 0>(arguments, batch, head, grad_rows, is_packed);
}

template <class T>
constexpr CpuKernels kKernelsOf{
    pack<T>, forward<T>, backward<T>, unpack<T>, softmax_backward<Arithmetic<T>>};
constexpr CpuKernels kKernels[kValueTypes] = {
    kKernelsOf<float>, kKernelsOf<double>, kKernelsOf<BFloat16>, kKernelsOf<Float16>};

}  // namespace
}  // namespace dn_detr
