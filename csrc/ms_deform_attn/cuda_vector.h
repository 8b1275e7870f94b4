// Scalars of the CUDA kernels, and how a lane loads and stores WIDTH neighbouring channels at once.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

namespace dn_detr::cuda {

template <typename Value>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <typename Value>
using Real = typename RealOf<Value>::type;

__device__ __forceinline__ float floor_of(float x) { return floorf(x); }
__device__ __forceinline__ double floor_of(double x) { return floor(x); }
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ long long to_integer(float x) { return __float2ll_rn(x); }
__device__ __forceinline__ long long to_integer(double x) { return __double2ll_rn(x); }

__device__ __forceinline__ float as_real(float x) { return x; }
__device__ __forceinline__ double as_real(double x) { return x; }
__device__ __forceinline__ float as_real(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_real(__nv_bfloat16 x) { return __bfloat162float(x); }

// A zero factor wins over NaN and infinity: what has no weight cannot leak.
template <typename T>
__device__ __forceinline__ T weighted(T weight, T x) {
  return weight == T(0) ? T(0) : weight * x;
}

// ---- Vectors of WIDTH channels ------------------------------------------------------------------

__device__ __forceinline__ void unpack(unsigned bits, float* out, __half) {
  out[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  out[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)));
}

__device__ __forceinline__ void unpack(unsigned bits, float* out, __nv_bfloat16) {
  out[0] = __uint_as_float(bits << 16);
  out[1] = __uint_as_float(bits & 0xffff0000u);
}

__device__ __forceinline__ unsigned short bits_of(float x, __half) {
  return __half_as_ushort(__float2half_rn(x));
}

__device__ __forceinline__ unsigned short bits_of(float x, __nv_bfloat16) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

template <typename Value>
__device__ __forceinline__ unsigned pack(const float* x) {
  return bits_of(x[0], Value()) | static_cast<unsigned>(bits_of(x[1], Value())) << 16;
}

__device__ __forceinline__ void load(const float* from, float (&out)[4]) {
  const float4 x = __ldg(reinterpret_cast<const float4*>(from));
  out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
}

__device__ __forceinline__ void load(const double* from, double (&out)[2]) {
  const double2 x = __ldg(reinterpret_cast<const double2*>(from));
  out[0] = x.x, out[1] = x.y;
}

template <typename Half>
__device__ __forceinline__ void load(const Half* from, float (&out)[4]) {
  const uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
  unpack(x.x, out, Half()), unpack(x.y, out + 2, Half());
}

template <typename Half>
__device__ __forceinline__ void load(const Half* from, float (&out)[8]) {
  const uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
  unpack(x.x, out, Half()), unpack(x.y, out + 2, Half());
  unpack(x.z, out + 4, Half()), unpack(x.w, out + 6, Half());
}

__device__ __forceinline__ void store(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void store(double* to, const double (&x)[2]) {
  *reinterpret_cast<double2*>(to) = make_double2(x[0], x[1]);
}

template <typename Half>
__device__ __forceinline__ void store(Half* to, const float (&x)[4]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack<Half>(x), pack<Half>(x + 2));
}

template <typename Half>
__device__ __forceinline__ void store(Half* to, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(pack<Half>(x), pack<Half>(x + 2), pack<Half>(x + 4), pack<Half>(x + 6));
}

}  // namespace dn_detr::cuda
