// Kernels for x86 with AVX-512 (F, BW, DQ and VL).
#include "arguments.h"

#if defined(__x86_64__)

// What other translation units share must be compiled for every processor: include it first.
#include <immintrin.h>

#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prfchw")
#endif

#define DN_DETR_VECTOR_BYTES 64
#include "cpu_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace dn_detr {
const CpuKernels* avx512_kernels() { return kKernels; }
}  // namespace dn_detr

#else

namespace dn_detr {
const CpuKernels* avx512_kernels() { return nullptr; }
}  // namespace dn_detr

#endif
