// Kernels for x86 with AVX2, FMA and F16C (since 2013).
#include "arguments.h"

#if defined(__x86_64__)

// What other translation units share must be compiled for every processor: include it first.
#include <immintrin.h>

#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,prfchw")
#endif

#define DN_DETR_VECTOR_BYTES 32
#include "cpu_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace dn_detr {
const CpuKernels* avx2_kernels() { return kKernels; }
}  // namespace dn_detr

#else

namespace dn_detr {
const CpuKernels* avx2_kernels() { return nullptr; }
}  // namespace dn_detr

#endif
