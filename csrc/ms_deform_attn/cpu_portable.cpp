// Kernels for any processor: 16-byte vectors, which x86-64 and 64-bit Arm always have.
#define DN_DETR_VECTOR_BYTES 16
#include "cpu_kernel.h"

namespace dn_detr {
const CpuKernels* portable_kernels() { return kKernels; }
}  // namespace dn_detr
