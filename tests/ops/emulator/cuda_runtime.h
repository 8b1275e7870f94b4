// A small CUDA for the CPU: enough to compile the project's kernels with a C++ compiler and to run
// them thread by thread. It finds errors of logic (indices, shuffles, missing barriers between
// phases), not data races between warps, and says nothing about speed.
//
// Every CUDA thread of a block is a coroutine (ucontext) that runs until it meets a barrier. Blocks
// run one after the other. `dn_detr_emulator_shuffle(seed)` draws the order of blocks and threads.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid launch";
}

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Aligned as CUDA's types are, so that UndefinedBehaviorSanitizer sees misaligned accesses.
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace emulator {

constexpr unsigned warp_size = 32;
constexpr size_t stack_size = 64 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what);
  std::abort();
}

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  unsigned index;
  bool finished = false;
  unsigned exchanges = 0;  // shuffles so far; their parity chooses the buffer
};

struct Warp {
  Barrier barrier;
  unsigned long long buffer[2][warp_size];
};

// One running block. Threads are kept between blocks, for their stacks.
struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t scheduler;
  Thread* current = nullptr;
  unsigned long switches = 0;  // barriers passed and threads finished: progress
  std::function<void()> body;
};

inline Block block;
inline std::mt19937 random;
inline bool shuffled = false;

inline void yield() { swapcontext(&block.current->context, &block.scheduler); }

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  ++block.switches;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

inline Warp& warp() { return block.warps[block.current->index / warp_size]; }
inline unsigned lane() { return block.current->index % warp_size; }

// A thread that has returned no longer counts at barriers, as __syncthreads on current GPUs.
inline void leave(Barrier& barrier) {
  if (--barrier.expected > 0 && barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

inline void run_thread() {
  block.body();
  block.current->finished = true;
  ++block.switches;
  leave(block.barrier);
  leave(warp().barrier);
  yield();
}

inline void start(Thread& thread, unsigned index) {
  thread.index = index;
  thread.finished = false;
  thread.exchanges = 0;
  if (thread.stack.empty()) thread.stack.resize(stack_size);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, run_thread, 0);
}

inline std::vector<unsigned> order(unsigned count) {
  std::vector<unsigned> result(count);
  std::iota(result.begin(), result.end(), 0u);
  if (shuffled) std::shuffle(result.begin(), result.end(), random);
  return result;
}

inline void run_block() {
  const unsigned count = blockDim.x;
  block.threads.resize(count);
  block.warps.assign(count / warp_size, Warp());
  for (Warp& warp : block.warps) warp.barrier.expected = warp_size;
  block.barrier = Barrier();
  block.barrier.expected = count;
  for (unsigned i = 0; i < count; ++i) start(block.threads[i], i);
  const std::vector<unsigned> turns = order(count);
  for (bool running = true; running;) {
    running = false;
    const unsigned long before = block.switches;
    for (unsigned i : turns) {
      block.current = &block.threads[i];
      if (block.current->finished) continue;
      running = true;
      threadIdx = dim3(i, 0, 0);
      swapcontext(&block.scheduler, &block.current->context);
    }
    if (running && block.switches == before) fail("deadlock: threads wait at different barriers");
  }
}

inline void run_grid(dim3 grid, dim3 size) {
  if (size.x % warp_size || size.y * size.z * grid.y * grid.z != 1) {
    fail("only one-dimensional launches of whole warps");
  }
  gridDim = grid;
  blockDim = size;
  for (unsigned i : order(grid.x)) {
    blockIdx = dim3(i, 0, 0);
    run_block();
  }
}

}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  if (mask != 0xffffffffu) emulator::fail("only full warps");
  emulator::wait(emulator::warp().barrier);
}

inline void __syncthreads() { emulator::wait(emulator::block.barrier); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(unsigned long long));
  if (emulator::warp().barrier.expected != emulator::warp_size) {
    emulator::fail("a lane of the shuffle has returned");
  }
  auto& buffer = emulator::warp().buffer[emulator::block.current->exchanges++ % 2];
  std::memcpy(&buffer[emulator::lane()], &value, sizeof(T));
  __syncwarp(mask);
  std::memcpy(&value, &buffer[emulator::lane() ^ static_cast<unsigned>(lane_mask)], sizeof(T));
  return value;
}

// Threads switch only at barriers: plain additions are atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename To, typename From>
To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline double __longlong_as_double(long long x) { return emulator_bits<double>(x); }
inline long long __double_as_longlong(double x) { return emulator_bits<long long>(x); }
inline long long __float2ll_rn(float x) { return std::llrintf(x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }
using std::fma;
using std::isfinite;
using std::ldexp;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Values>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Values... values) {
  if (config->gridDim.x == 0) return cudaErrorInvalidConfiguration;
  emulator::block.body = [&] { kernel(values...); };
  emulator::run_grid(config->gridDim, config->blockDim);
  return cudaSuccess;
}
