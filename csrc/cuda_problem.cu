// Tells whether the kernels can run here before the first of them is launched.

#include <cuda_runtime.h>

namespace {
__global__ void nothing() {}
}  // namespace

// CUDA's words for why a kernel of this library cannot run on the current device, or null: a driver
// that is older than the toolkit, an architecture that was not compiled for.
extern "C" __attribute__((visibility("default"))) const char* dn_detr_cuda_problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // not to be found by whoever asks next
  return cudaGetErrorString(error);
}
