// The backward kernels; the scheme and the common parts are in cuda_kernel.h.

#pragma once

#include "cuda_kernel.h"

namespace dn_detr::cuda {

// ---- Where gradients of values go ---------------------------------------------------------------

// Vector reductions exist on sm_90 and later.
__device__ __forceinline__ void add_four(float* to, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                   __cvta_generic_to_global(to)),
               "f"(a), "f"(b), "f"(c), "f"(d));
#else
  atomicAdd(to, a), atomicAdd(to + 1, b), atomicAdd(to + 2, c), atomicAdd(to + 3, d);
#endif
}

template <int WIDTH>
__device__ __forceinline__ void add_scaled(float* to, float factor, const float (&x)[WIDTH]) {
#pragma unroll
  for (int c = 0; c < WIDTH; c += 4) {
    add_four(to + c, factor * x[c], factor * x[c + 1], factor * x[c + 2], factor * x[c + 3]);
  }
}

template <int WIDTH>
__device__ __forceinline__ void add_scaled(double* to, double factor, const double (&x)[WIDTH]) {
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) atomicAdd(to + c, factor * x[c]);
}

// Sums of floating-point atomics: fast, in no fixed order.
template <typename T>
struct AtomicSums {
  T* sums;  // of one head
  unsigned stride_bytes;
  __device__ __forceinline__ AtomicSums(const Arguments& args, int64_t first, int cell_size)
      : sums(static_cast<T*>(args.grad_value) + first),
        stride_bytes(static_cast<unsigned>(cell_size * sizeof(T))) {}
  template <int WIDTH>
  __device__ __forceinline__ void add(int cell, int channel, T factor,
                                      const T (&x)[WIDTH]) const {
    add_scaled(at_cell(sums + channel, cell, stride_bytes), factor, x);
  }
};

// The power of two by which contributions are multiplied before they become integers: as large as
// keeps the largest possible sum of a cell, one contribution per query and point, below 2^62.
__device__ __forceinline__ int fixed_point_exponent(const Arguments& args, bool fused) {
  const double largest_grad = __longlong_as_double(static_cast<long long>(args.magnitude[0]));
  const double largest_weight =
      fused ? 1.0 : __longlong_as_double(static_cast<long long>(args.magnitude[1]));
  // One after the other: the product of the factors could overflow or vanish.
  int exponents = 0, exponent;
  frexp(largest_grad, &exponent), exponents += exponent;
  frexp(largest_weight, &exponent), exponents += exponent;
  frexp(static_cast<double>(args.queries) * args.points, &exponent), exponents += exponent;
  return 61 - exponents;
}

// Integer sums, the same in any order. What is not finite has no integer and is noted aside.
template <typename T>
struct FixedPointSums {
  unsigned long long* sums;  // of one head
  uint8_t* not_finite;
  int cell_size;
  int exponent;
  __device__ __forceinline__ FixedPointSums(const Arguments& args, int64_t first, int cell_size)
      : sums(reinterpret_cast<unsigned long long*>(args.fixed_point_sums) + first),
        not_finite(args.not_finite + first),
        cell_size(cell_size),
        exponent(fixed_point_exponent(args, args.reference_points != nullptr)) {}
  template <int WIDTH>
  __device__ __forceinline__ void add(int cell, int channel, T factor,
                                      const T (&x)[WIDTH]) const {
    const int64_t at = static_cast<int64_t>(cell) * cell_size + channel;
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) {
      const T contribution = factor * x[c];
      if (isfinite(contribution)) {
        const long long integer = to_integer(ldexp(contribution, exponent));
        atomicAdd(sums + at + c, static_cast<unsigned long long>(integer));
      } else {
        not_finite[at + c] = 1;
      }
    }
  }
};

// ---- Scalar products of grad_output with the four cells of each point of a tile -----------------

// Lanes whose bit BIT is clear keep `a`, the others keep `b`, each summed with the partner's half.
template <int BIT, typename T>
__device__ __forceinline__ Quad<T> exchange(const Quad<T>& a, const Quad<T>& b) {
  const bool upper = threadIdx.x & BIT;
  Quad<T> kept;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const T sent = upper ? a.x[corner] : b.x[corner];
    kept.x[corner] =
        (upper ? b.x[corner] : a.x[corner]) + __shfl_xor_sync(full_warp, sent, BIT);
  }
  return kept;
}

// Lane i of every COUNT lanes gets the products of point FIRST + i, summed over these lanes.
// `products(i)` gives a lane's own part. A tree: few partial results live at a time.
template <int FIRST, int COUNT, typename T, typename Products>
__device__ __forceinline__ Quad<T> transposed_sum(const Products& products) {
  if constexpr (COUNT == 1) {
    return products(FIRST);
  } else {
    const Quad<T> lower = transposed_sum<FIRST, COUNT / 2, T>(products);
    const Quad<T> upper = transposed_sum<FIRST + COUNT / 2, COUNT / 2, T>(products);
    return exchange<COUNT / 2>(lower, upper);
  }
}

template <int LANES, int COUNT, typename T>
__device__ __forceinline__ Quad<T> sum_across(Quad<T> x) {
#pragma unroll
  for (int mask = COUNT; mask < LANES; mask *= 2) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      x.x[corner] += __shfl_xor_sync(full_warp, x.x[corner], mask);
    }
  }
  return x;
}

// ---- Backward -----------------------------------------------------------------------------------

// Gradients of one sample (without its attention weight), from the four scalar products.
template <typename T>
struct SampleGradient {
  T weight, x, y;
  __device__ __forceinline__ SampleGradient(const Footprint<T>& around, const Quad<T>& product)
      : weight(0) {
    const T right = around.right, lower = around.lower;
    T at[4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      // Cells outside and padding were read at some other place.
      at[corner] = around.cell[corner] < 0 ? T(0) : product.x[corner];
      weight += weighted(around.share(corner), at[corner]);
    }
    x = weighted(1 - lower, at[1] - at[0]) + weighted(lower, at[3] - at[2]);
    y = weighted(1 - right, at[2] - at[0]) + weighted(right, at[3] - at[1]);
  }
};

// With FUSED, grad_locations get the gradients of points in units of cells, which
// `reference_points_kernel` completes. `Sums` says how the gradients of values are added up.
template <typename Value, int WIDTH, int LANES, bool WHOLE, bool FUSED,
          template <typename> class Sums>
__global__ void __launch_bounds__(max_threads)
    backward_kernel(const __grid_constant__ Arguments args) {
  using T = Real<Value>;
  constexpr int tile = tile_of<LANES>;
  const Team<LANES> team = find_team<LANES>(args);
  const Row<T> row = row_of<T>(args, team);
  const int samples = args.levels * args.points;
  auto& prepared = prepared_of<T, LANES>(team.slot);
  T largest = 0, scale = 1;
  if constexpr (FUSED) {
    largest = largest_logit<T, LANES>(row, samples, team.lane);
    scale = 1 / exp_sum<T, LANES>(row, samples, team.lane, largest);
  }

  const int dim = WHOLE ? WIDTH * LANES : args.dim;
  const int cell_size = args.heads * dim;  // of grad_value
  const Value* value = static_cast<const Value*>(args.value) +
                       team.batch * args.value_batch_stride + team.head * args.value_head_stride;
  const Value* grad_output = static_cast<const Value*>(args.grad_output) +
                             team.batch * args.grad_output_batch_stride +
                             team.query * args.grad_output_query_stride + team.head * dim;
  const int64_t first_sample =
      ((team.batch * args.queries + team.query) * args.heads + team.head) * samples;
  T* grad_locations = static_cast<T*>(args.grad_locations) + 2 * first_sample;
  T* grad_weights = static_cast<T*>(args.grad_weights) + first_sample;
  const Sums<T> sums(args, team.batch * args.cells * cell_size + team.head * dim, cell_size);
  const unsigned stride_bytes = args.value_cell_stride * sizeof(Value);
  T grad[WIDTH] = {};
  if constexpr (WHOLE) load(grad_output + team.lane * WIDTH, grad);

  // Both go over a lane's channels; without WHOLE, over its part of grad_output as well.
  const auto products = [&](int slot) {
    const int4 at = prepared.cells[slot];
    const int cells[4] = {at.x, at.y, at.z, at.w};
    Quad<T> product{};
#pragma unroll 1
    for (int channel = team.lane * WIDTH; channel < dim; channel += WIDTH * LANES) {
      if constexpr (!WHOLE) load(grad_output + channel, grad);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        T x[WIDTH];
        load(at_cell(value + channel, cells[corner], stride_bytes), x);
#pragma unroll
        for (int c = 0; c < WIDTH; ++c) product.x[corner] += grad[c] * x[c];
      }
    }
    return product;
  };
  const auto scatter = [&](int slot) {
    const Quad<T> coefficients = prepared.coefficients[slot];
    const int4 at = prepared.cells[slot];
    const int cells[4] = {at.x, at.y, at.z, at.w};
#pragma unroll 1
    for (int channel = team.lane * WIDTH; channel < dim; channel += WIDTH * LANES) {
      if constexpr (!WHOLE) load(grad_output + channel, grad);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (coefficients.x[corner] == T(0)) continue;
        sums.add(cells[corner], channel, coefficients.x[corner], grad);
      }
    }
  };

  T weighted_sum = 0;  // of the weights' gradients, for the softmax
  for (int first = 0; first < samples; first += tile) {
    const Point<T> point = point_of<T, FUSED>(args, row, team, first + team.lane % tile);
    T weight = row.weights[point.index];
    if constexpr (FUSED) weight = exp_of(weight - largest) * scale;
    const auto readable = [&](int corner) { return larger(point.around.cell[corner], 0); };
    const int my_cells[4] = {readable(0), readable(1), readable(2), readable(3)};
    __syncwarp();  // the tile before has been read
    if (team.lane < tile) {
      write_prepared(prepared, team.lane, coefficients_of(point.around, weight), my_cells);
    }
    __syncwarp();
    // First all loads, whose latency counts; nobody waits for the additions.
    const Quad<T> product = sum_across<LANES, tile>(transposed_sum<0, tile, T>(products));
    if (team.lane < tile && point.exists && team.active) {
      const SampleGradient<T> gradient(point.around, product);
      const T x = weighted(weight, gradient.x), y = weighted(weight, gradient.y);
      grad_locations[2 * point.index] = FUSED ? x : x * point.level.width;
      grad_locations[2 * point.index + 1] = FUSED ? y : y * point.level.height;
      grad_weights[point.index] = gradient.weight;
      weighted_sum += weighted(weight, gradient.weight);
    }
#pragma unroll 1
    for (int i = 0; i < tile; ++i) scatter(i);
  }
  if constexpr (FUSED) {
    weighted_sum = team_sum<LANES>(weighted_sum);
    if (team.lane >= tile || !team.active) return;
    for (int i = team.lane; i < samples; i += tile) {  // this lane's own points
      const T weight = exp_of(row.weights[i] - largest) * scale;
      grad_weights[i] = weighted(weight, grad_weights[i] - weighted_sum);
    }
  }
}

// One thread per (batch, query, level) of the fused operator: sums the gradients of points in units
// of cells over heads and points, in a fixed order, and turns them into gradients of offsets.
template <typename T>
__global__ void __launch_bounds__(max_threads)
    reference_points_kernel(const __grid_constant__ Arguments args) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= args.batch * args.queries * args.levels) return;
  const int level_index = static_cast<int>(thread % args.levels);
  const int64_t query = thread / args.levels % args.queries;
  const int64_t batch = thread / args.levels / args.queries;
  const Level level = level_of(args, level_index);
  const T size[2] = {T(level.width), T(level.height)};
  const bool boxes = args.reference_size == 4;
  const T* reference = static_cast<const T*>(args.reference_points) +
                       offset(args.reference_strides, batch, query, level_index);
  T sum[4] = {};
  for (int head = 0; head < args.heads; ++head) {
    const T* offsets = static_cast<const T*>(args.locations) +
                       offset(args.location_strides, batch, query, head) +
                       2 * level_index * args.points;
    T* grad_offsets =
        static_cast<T*>(args.grad_locations) +
        2 * ((((batch * args.queries + query) * args.heads + head) * args.levels + level_index) *
             args.points);
    for (int point = 0; point < args.points; ++point) {
#pragma unroll
      for (int axis = 0; axis < 2; ++axis) {
        const int i = 2 * point + axis;
        const T location_gradient = grad_offsets[i] * size[axis];
        sum[axis] += location_gradient;
        if (!boxes) continue;
        const T per_half_size = location_gradient / args.points * T(0.5);
        sum[2 + axis] += weighted(per_half_size, offsets[i]);
        grad_offsets[i] = weighted(per_half_size, reference[2 + axis]);
      }
    }
  }
  T* out = static_cast<T*>(args.grad_reference_points) + thread * args.reference_size;
  out[0] = sum[0], out[1] = sum[1];
  if (boxes) out[2] = sum[2], out[3] = sum[3];
}

// ---- Before and after a deterministic backward --------------------------------------------------

// Raises `*largest`, the bits of a double, to the largest finite magnitude of a tensor of
// (batch, query, head) rows of `width` elements.
template <typename Value>
__global__ void __launch_bounds__(max_threads)
    magnitude_kernel(const Value* x, Strides strides, int64_t queries, int heads, int width,
                     int64_t count, unsigned long long* largest) {
  double mine = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / width;
    const int head = static_cast<int>(row % heads);
    const Value* from = x + offset(strides, row / heads / queries, row / heads % queries, head);
    const double size = fabs(static_cast<double>(as_real(from[i % width])));
    if (isfinite(size)) mine = larger(mine, size);
  }
  mine = team_max<32>(mine);
  // Bits of positive doubles are ordered as the numbers are.
  if (threadIdx.x % 32 == 0) {
    atomicMax(largest, static_cast<unsigned long long>(__double_as_longlong(mine)));
  }
}

template <typename T>
__global__ void __launch_bounds__(max_threads)
    from_fixed_point_kernel(const __grid_constant__ Arguments args) {
  const int64_t count = args.batch * args.cells * args.heads * args.dim;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int exponent = fixed_point_exponent(args, args.reference_points != nullptr);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const double sum = ldexp(static_cast<double>(args.fixed_point_sums[i]), -exponent);
    static_cast<T*>(args.grad_value)[i] = static_cast<T>(args.not_finite[i] ? NAN : sum);
  }
}

}  // namespace dn_detr::cuda
