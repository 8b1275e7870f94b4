// CUDA kernels of multi-scale deformable attention (Zhu et al., "Deformable DETR", 2021).
//
// A team of LANES neighbouring threads of a warp computes one (batch, query, head); each lane owns
// WIDTH neighbouring channels, 16 bytes of a value cell. Points are taken TILE at a time: each lane
// prepares one point (location, the four cells around it, their shares) into shared memory, then
// the team walks over the prepared points together. Teams never wait for each other, only for their
// warp. A block holds neighbouring queries of one head, whose samples share cache lines.
//
// Lanes of a team past the last query compute with the last query's inputs and write nothing, so
// that shuffles always see the full warp. The legend of sizes is in cuda_arguments.h.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda_arguments.h"
#include "cuda_vector.h"

namespace dn_detr::cuda {

constexpr int max_threads = 256;
constexpr unsigned full_warp = 0xffffffffu;

// ---- Teams --------------------------------------------------------------------------------------

template <int LANES>
struct Team {
  int64_t batch;
  int64_t query;
  int head;
  int lane;    // within the team
  int slot;    // the team's number within the block
  bool active;  // false past the last query
};

// Blocks run over (batch, tile of queries, head), the head fastest.
template <int LANES>
__device__ __forceinline__ Team<LANES> find_team(const Arguments& args) {
  const unsigned teams = blockDim.x / LANES;
  const unsigned tiles = static_cast<unsigned>((args.queries + teams - 1) / teams);
  const unsigned block = blockIdx.x / args.heads;
  Team<LANES> team;
  team.head = static_cast<int>(blockIdx.x % args.heads);
  team.batch = block / tiles;
  team.lane = static_cast<int>(threadIdx.x % LANES);
  team.slot = static_cast<int>(threadIdx.x / LANES);
  const int64_t query = static_cast<int64_t>(block % tiles) * teams + team.slot;
  team.active = query < args.queries;
  team.query = team.active ? query : args.queries - 1;
  return team;
}

template <int LANES, typename T>
__device__ __forceinline__ T team_sum(T x) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(full_warp, x, mask);
  return x;
}

template <int LANES, typename T>
__device__ __forceinline__ T team_max(T x) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) {
    x = larger(x, __shfl_xor_sync(full_warp, x, mask));
  }
  return x;
}

// ---- Points -------------------------------------------------------------------------------------

// The inputs of one (batch, query, head).
template <typename T>
struct Row {
  const T* locations;
  const T* weights;
  const T* reference;
  const bool* padding;
};

__device__ __forceinline__ int64_t offset(const Strides& strides, int64_t batch, int64_t query,
                                          int inner) {
  return batch * strides.batch + query * strides.query + inner * strides.inner;
}

template <typename T, int LANES>
__device__ __forceinline__ Row<T> row_of(const Arguments& args, const Team<LANES>& team) {
  Row<T> row{};
  row.locations = static_cast<const T*>(args.locations) +
                  offset(args.location_strides, team.batch, team.query, team.head);
  row.weights = static_cast<const T*>(args.weights) +
                offset(args.weight_strides, team.batch, team.query, team.head);
  if (args.reference_points != nullptr) {
    row.reference = static_cast<const T*>(args.reference_points) +
                    offset(args.reference_strides, team.batch, team.query, 0);
  }
  if (args.padding_mask != nullptr) {
    row.padding = args.padding_mask + team.batch * args.padding_batch_stride;
  }
  return row;
}

__device__ __forceinline__ Level level_of(const Arguments& args, int index) {
  return args.level_table == nullptr ? args.level[index] : args.level_table[index];
}

// A coordinate in units of cells, with cell centres at integers, as whole + rest. Kept apart, the
// shares of neighbouring cells keep their digits at the far end of a large map.
template <typename T>
struct Coordinate {
  T whole;  // an integer
  T rest;   // small for sensible inputs
};

// location * size + offset - 0.5, with the product's rounding error carried along.
template <typename T>
__device__ __forceinline__ Coordinate<T> coordinate(T location, int size, T offset) {
  const T product = location * size;
  const T whole = floor_of(product);
  const T error = fma(location, T(size), -product);
  return {whole, (product - whole) + (error + (offset - T(0.5)))};
}

template <typename T, bool FUSED>
__device__ __forceinline__ Coordinate<T> coordinate_of(const Arguments& args, const Row<T>& row,
                                                       int point, int level_index, int axis,
                                                       int size) {
  const T location = row.locations[2 * point + axis];
  if constexpr (!FUSED) return coordinate(location, size, T(0));
  const T* reference = row.reference + level_index * args.reference_strides.inner;
  if (args.reference_size == 2) return coordinate(reference[axis], size, location);
  // Offsets from the centre of a box count half box sizes, divided by the number of points.
  const T offset = location / args.points * reference[2 + axis] * T(0.5) * size;
  return coordinate(reference[axis], size, offset);
}

// The 2x2 cells around a point, row by row.
template <typename T>
struct Footprint {
  int cell[4];  // within S; -1: nothing to read
  T right;      // share of the right column, in [0, 1]
  T lower;      // share of the lower row
  __device__ __forceinline__ T share(int corner) const {
    return (corner % 2 ? right : 1 - right) * (corner / 2 ? lower : 1 - lower);
  }
};

template <typename T>
struct Point {
  int index;    // within the row, clamped to the last one
  bool exists;  // false past the last one
  int level_index;
  Level level;
  Footprint<T> around;
};

template <typename T>
__device__ __forceinline__ bool within(const Coordinate<T>& x, int size) {
  const T position = x.whole + x.rest;
  return position >= -1 && position < size;  // false for NaN
}

template <typename T, bool FUSED>
__device__ __forceinline__ Footprint<T> footprint(const Level& level, Coordinate<T> x,
                                                  Coordinate<T> y, bool wanted,
                                                  const bool* padding) {
  wanted = wanted && within(x, level.width) && within(y, level.height);
  if (!wanted) x = y = {T(-1), T(0)};  // keeps the conversions to int in range
  const T left = floor_of(x.rest), top = floor_of(y.rest);
  const int first_column = static_cast<int>(x.whole + left);
  const int first_line = static_cast<int>(y.whole + top);
  Footprint<T> result;
  result.right = x.rest - left;
  result.lower = y.rest - top;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const int column = first_column + corner % 2;
    const int line = first_line + corner / 2;
    const int cell = level.start + line * level.width + column;
    bool readable = wanted && column >= 0 && line >= 0 && column < level.width &&
                    line < level.height;
    if (FUSED && readable && padding != nullptr) readable = !padding[cell];
    result.cell[corner] = readable ? cell : -1;
  }
  return result;
}

template <typename T, bool FUSED, int LANES>
__device__ __forceinline__ Point<T> point_of(const Arguments& args, const Row<T>& row,
                                             const Team<LANES>& team, int index) {
  const int samples = args.levels * args.points;
  Point<T> point;
  point.exists = index < samples;
  point.index = point.exists ? index : samples - 1;
  point.level_index = static_cast<int>(
      (static_cast<uint64_t>(point.index) * args.points_reciprocal) >> reciprocal_bits);
  point.level = level_of(args, point.level_index);
  const auto along = [&](int axis, int size) {
    return coordinate_of<T, FUSED>(args, row, point.index, point.level_index, axis, size);
  };
  const bool wanted = point.exists && team.active;
  point.around = footprint<T, FUSED>(point.level, along(0, point.level.width),
                                     along(1, point.level.height), wanted, row.padding);
  return point;
}

template <typename T>
struct alignas(16) Quad {
  T x[4];
};

// Points that a team has prepared. The additional cell keeps small teams of a quarter warp from
// meeting in the same shared-memory banks.
template <typename T, int TILE>
struct Prepared {
  Quad<T> coefficients[TILE];
  int4 cells[TILE + (TILE < 8 ? 1 : 0)];
};

template <int LANES>
constexpr int tile_of = LANES < 8 ? LANES : 8;

template <typename T, int LANES>
__device__ __forceinline__ Prepared<T, tile_of<LANES>>& prepared_of(int slot) {
  __shared__ Prepared<T, tile_of<LANES>> prepared[max_threads / LANES];
  return prepared[slot];
}

template <typename T, int LANES>
__device__ __forceinline__ T largest_logit(const Row<T>& row, int samples, int lane) {
  T largest = -INFINITY;
  for (int i = lane; i < samples; i += LANES) largest = larger(largest, row.weights[i]);
  return team_max<LANES>(largest);
}

template <typename T, int LANES>
__device__ __forceinline__ T exp_sum(const Row<T>& row, int samples, int lane, T largest) {
  T sum = 0;
  for (int i = lane; i < samples; i += LANES) sum += exp_of(row.weights[i] - largest);
  return team_sum<LANES>(sum);
}

template <typename T, int TILE>
__device__ __forceinline__ void write_prepared(Prepared<T, TILE>& prepared, int slot,
                                               const Quad<T>& coefficients, const int (&cells)[4]) {
  prepared.coefficients[slot] = coefficients;
  prepared.cells[slot] = make_int4(cells[0], cells[1], cells[2], cells[3]);
}

template <typename T>
__device__ __forceinline__ Quad<T> coefficients_of(const Footprint<T>& around, T weight) {
  Quad<T> result;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    result.x[corner] =
        around.cell[corner] < 0 ? T(0) : weighted(around.share(corner), weight);
  }
  return result;
}

// The row of a cell: one multiplication of 32 bits, added to an address of 64 bits.
template <typename Element>
__device__ __forceinline__ Element* at_cell(Element* base, int cell, unsigned stride_bytes) {
  using Byte = std::conditional_t<std::is_const_v<Element>, const char, char>;
  const uint64_t bytes = static_cast<uint64_t>(static_cast<unsigned>(cell)) * stride_bytes;
  return reinterpret_cast<Element*>(reinterpret_cast<Byte*>(base) + bytes);
}

// ---- Forward ------------------------------------------------------------------------------------

// Loads without conditions are a third fewer instructions. So cells that do not count are replaced
// by a cell that does, in this tile and thus in the same sum: the coefficient of the replacement is
// zero, and if it is NaN, then so is the sum anyhow. Returns false when no cell of the tile counts.
template <int LANES, typename T>
__device__ __forceinline__ bool replace_idle_cells(const Quad<T>& coefficients, int (&cells)[4]) {
  int mine = -1;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    mine = coefficients.x[corner] == T(0) ? mine : cells[corner];
  }
  const int any = team_max<LANES>(mine);
  mine = mine < 0 ? any : mine;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    cells[corner] = coefficients.x[corner] == T(0) ? mine : cells[corner];
  }
  return any >= 0;
}

// With FUSED, `weights` are logits: samples are summed with exp(logit - largest) and divided by
// the sum of these at the end. Without WHOLE, heads are wider than a team and take several rounds.
template <typename Value, int WIDTH, int LANES, bool WHOLE, bool FUSED>
__global__ void __launch_bounds__(max_threads)
    forward_kernel(const __grid_constant__ Arguments args) {
  using T = Real<Value>;
  constexpr int tile = tile_of<LANES>;
  const Team<LANES> team = find_team<LANES>(args);
  const Row<T> row = row_of<T>(args, team);
  const int samples = args.levels * args.points;
  auto& prepared = prepared_of<T, LANES>(team.slot);
  T largest = 0;
  if constexpr (FUSED) largest = largest_logit<T, LANES>(row, samples, team.lane);

  const Value* head = static_cast<const Value*>(args.value) +
                      team.batch * args.value_batch_stride + team.head * args.value_head_stride;
  const unsigned stride_bytes = args.value_cell_stride * sizeof(Value);
  const int dim = WHOLE ? WIDTH * LANES : args.dim;
  for (int round = 0; round < dim; round += WIDTH * LANES) {
    const int channel = round + team.lane * WIDTH;
    const bool owns_channels = WHOLE || channel < dim;
    const Value* value = head + (owns_channels ? channel : 0);
    T sum[WIDTH] = {};
    T weight_sum = 0;
    for (int first = 0; first < samples; first += tile) {
      // Lanes past the tile repeat the work of others, and do not write it.
      const Point<T> point = point_of<T, FUSED>(args, row, team, first + team.lane % tile);
      T weight = row.weights[point.index];
      if constexpr (FUSED) {
        weight = exp_of(weight - largest);
        weight_sum += point.exists && team.lane < tile ? weight : T(0);
      }
      const Quad<T> mine = coefficients_of(point.around, weight);
      int my_cells[4] = {point.around.cell[0], point.around.cell[1], point.around.cell[2],
                         point.around.cell[3]};
      const bool counts = replace_idle_cells<LANES>(mine, my_cells);
      __syncwarp();  // the tile before has been read (shuffles order no memory)
      if (team.lane < tile) write_prepared(prepared, team.lane, mine, my_cells);
      __syncwarp();
      if (!counts) continue;
#pragma unroll
      for (int i = 0; i < tile; ++i) {
        const Quad<T> coefficients = prepared.coefficients[i];
        const int4 at = prepared.cells[i];
        const int cells[4] = {at.x, at.y, at.z, at.w};
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          T x[WIDTH];
          load(at_cell(value, cells[corner], stride_bytes), x);
#pragma unroll
          for (int c = 0; c < WIDTH; ++c) sum[c] += coefficients.x[corner] * x[c];
        }
      }
    }
    if constexpr (FUSED) {
      const T scale = 1 / team_sum<LANES>(weight_sum);
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) sum[c] *= scale;
    }
    if (team.active && owns_channels) {
      Value* output = static_cast<Value*>(args.output) +
                      ((team.batch * args.queries + team.query) * args.heads + team.head) * dim;
      store(output + channel, sum);
    }
  }
}

}  // namespace dn_detr::cuda
