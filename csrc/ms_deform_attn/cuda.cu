// Chooses and launches the CUDA kernels of multi-scale deformable attention. No PyTorch here, so
// that this file compiles fast; cuda.cpp binds it.

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda_backward_kernel.h"

namespace dn_detr::cuda {
namespace {

template <typename... Parameters, typename... Values>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads,
                   cudaStream_t stream, Values... values) {
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, values...);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One team per (batch, query, head), in blocks of one head.
template <int LANES>
cudaError_t launch_teams(void (*kernel)(Arguments), const Arguments& args, cudaStream_t stream) {
  const auto blocks = [&](int threads) {
    return args.batch * args.heads * divide_up(args.queries, threads / LANES);
  };
  // Large blocks share more cache lines; few queries need small ones to reach all processors.
  constexpr int enough_blocks = 512;
  const int threads = blocks(max_threads) >= enough_blocks ? max_threads : 64;
  return launch(kernel, blocks(threads), threads, stream, args);
}

template <typename Value, int WIDTH, int LANES, bool WHOLE>
struct Forward {
  static cudaError_t run(const Arguments& args, cudaStream_t stream) {
    const bool fused = args.reference_points != nullptr;
    return launch_teams<LANES>(fused ? forward_kernel<Value, WIDTH, LANES, WHOLE, true>
                                     : forward_kernel<Value, WIDTH, LANES, WHOLE, false>,
                               args, stream);
  }
};

template <typename Value>
cudaError_t launch_reference_points(const Arguments& args, cudaStream_t stream) {
  constexpr int threads = 128;
  const int64_t count = args.batch * args.queries * args.levels;
  return launch(reference_points_kernel<Real<Value>>, divide_up(count, threads), threads, stream,
                args);
}

template <template <typename> class Sums, typename Value, int WIDTH, int LANES, bool WHOLE>
cudaError_t launch_backward(const Arguments& args, cudaStream_t stream) {
  const bool fused = args.reference_points != nullptr;
  const cudaError_t error =
      launch_teams<LANES>(fused ? backward_kernel<Value, WIDTH, LANES, WHOLE, true, Sums>
                                : backward_kernel<Value, WIDTH, LANES, WHOLE, false, Sums>,
                          args, stream);
  if (error != cudaSuccess || !fused) return error;
  return launch_reference_points<Value>(args, stream);
}

template <typename Value, int WIDTH, int LANES, bool WHOLE>
struct Backward {
  static cudaError_t run(const Arguments& args, cudaStream_t stream) {
    return launch_backward<AtomicSums, Value, WIDTH, LANES, WHOLE>(args, stream);
  }
};

// Blocks of kernels that step through all elements.
int64_t sweep_blocks(int64_t count) {
  constexpr int64_t most = 1024;
  return std::min(most, divide_up(count, max_threads));
}

template <typename Value>
cudaError_t launch_magnitude(const void* x, const Strides& strides, int width,
                             const Arguments& args, unsigned long long* largest,
                             cudaStream_t stream) {
  const int64_t count = args.batch * args.queries * args.heads * width;
  return launch(magnitude_kernel<Value>, sweep_blocks(count), max_threads, stream,
                static_cast<const Value*>(x), strides, args.queries, args.heads, width, count,
                largest);
}

template <typename Value, int WIDTH>
cudaError_t launch_deterministic(const Arguments& args, cudaStream_t stream) {
  const Strides grad_strides{args.grad_output_batch_stride, args.grad_output_query_stride,
                             args.dim};
  cudaError_t error = launch_magnitude<Value>(args.grad_output, grad_strides, args.dim, args,
                                              args.magnitude, stream);
  if (error == cudaSuccess && args.reference_points == nullptr) {
    error = launch_magnitude<Real<Value>>(args.weights, args.weight_strides,
                                          args.levels * args.points, args, args.magnitude + 1,
                                          stream);
  }
  if (error == cudaSuccess) {
    error = launch_backward<FixedPointSums, Value, WIDTH, 8, false>(args, stream);
  }
  if (error != cudaSuccess) return error;
  const int64_t count = args.batch * args.cells * args.heads * args.dim;
  return launch(from_fixed_point_kernel<Real<Value>>, sweep_blocks(count), max_threads, stream,
                args);
}

// Half types take 8 channels per lane, 16 bytes.
template <template <typename, int, int, bool> class Pass, typename Value>
cudaError_t choose_width(const Arguments& args, cudaStream_t stream) {
  constexpr int width = sizeof(Value) == 4 ? 4 : 8;
  switch (args.dim) {
    case 16:
      return Pass<Value, width, 16 / width, true>::run(args, stream);
    case 32:
      return Pass<Value, width, 32 / width, true>::run(args, stream);
    case 64:
      return Pass<Value, width, 64 / width, true>::run(args, stream);
    default:
      return Pass<Value, 4, 8, false>::run(args, stream);
  }
}

template <template <typename, int, int, bool> class Pass>
cudaError_t choose_type(const Arguments& args, ValueType type, cudaStream_t stream) {
  switch (type) {
    case ValueType::float32:
      return choose_width<Pass, float>(args, stream);
    case ValueType::float16:
      return choose_width<Pass, __half>(args, stream);
    case ValueType::bfloat16:
      return choose_width<Pass, __nv_bfloat16>(args, stream);
    case ValueType::float64:  // for checking gradients: no fast path
      return Pass<double, 2, 8, false>::run(args, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t choose_deterministic(const Arguments& args, ValueType type, cudaStream_t stream) {
  switch (type) {
    case ValueType::float32:
      return launch_deterministic<float, 4>(args, stream);
    case ValueType::float16:
      return launch_deterministic<__half, 4>(args, stream);
    case ValueType::bfloat16:
      return launch_deterministic<__nv_bfloat16, 4>(args, stream);
    case ValueType::float64:
      return launch_deterministic<double, 2>(args, stream);
  }
  return cudaErrorInvalidValue;
}

const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* forward(const Arguments& args, ValueType type, Stream stream) {
  return message(choose_type<Forward>(args, type, static_cast<cudaStream_t>(stream)));
}

const char* backward(const Arguments& args, ValueType type, Stream stream) {
  return message(choose_type<Backward>(args, type, static_cast<cudaStream_t>(stream)));
}

const char* deterministic_backward(const Arguments& args, ValueType type, Stream stream) {
  return message(choose_deterministic(args, type, static_cast<cudaStream_t>(stream)));
}

}  // namespace dn_detr::cuda
