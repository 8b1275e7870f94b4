// Multi-scale deformable attention for CPU tensors: memory and the division of the work.
//
// Every sum has one owner and one order, so results do not depend on the number of threads: a
// query's output and its gradients belong to one task, and so does the gradient of each cell,
// because a task walks through all queries of a head (or of a head and a level, if there are more
// threads than heads).
#include "operators.h"

#include <atomic>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "inputs.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dn_detr {

namespace {

using inputs::ScalarType;
using inputs::Sizes;
using inputs::sizes_of;
using inputs::Tensor;

// ---- choice of the instruction set ----

struct InstructionSet {
  const char* name;
  const CpuKernels* kernels;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

// The one that is named; the best one for an empty name.
const InstructionSet* find_instruction_set(const std::string& name) {
  static const InstructionSet sets[] = {
      {"avx512", has_avx512() ? avx512_kernels() : nullptr},
      {"avx2", has_avx2() ? avx2_kernels() : nullptr},
      {"portable", portable_kernels()}};
  for (const InstructionSet& set : sets) {
    if (set.kernels && (name.empty() || name == set.name)) return &set;
  }
  return nullptr;
}

std::atomic<const InstructionSet*>& active_instruction_set() {
  static std::atomic<const InstructionSet*> active([] {
    const char* wish = std::getenv("DN_DETR_CPU_KERNELS");
    const InstructionSet* set = find_instruction_set(wish ? wish : "");
    return set ? set : find_instruction_set("");
  }());
  return active;
}

// ---- arguments with the tensors that keep them alive ----

int64_t value_bytes(ValueType type) {
  if (type == ValueType::float64) return 8;
  return type == ValueType::float32 ? 4 : 2;
}

struct Call {
  MSDeformAttnArguments arguments = {};
  std::vector<Level> levels;
  std::vector<Tensor> tensors;
  bool can_pack = false;
  const CpuKernels* kernels = nullptr;

  const void* hold(Tensor tensor) {
    tensors.push_back(tensor);
    return tensor.const_data_ptr();
  }
  bool is_fused() const { return arguments.reference_dim != 0; }
  int64_t heads() const { return arguments.batch * arguments.heads; }
  int64_t samples() const { return int64_t(arguments.levels) * arguments.points; }
  bool is_empty() const {
    return heads() == 0 || arguments.queries == 0 || arguments.dim == 0 || samples() == 0;
  }
  int64_t arithmetic_bytes() const {
    return arguments.value_type == ValueType::float64 ? 8 : 4;
  }
};

// Positions of cells in a head that is packed with a border of zeros around every level: one
// cell before each row, which also ends the row above, and one row above and below.
void place_packed_levels(Call& call) {
  int64_t first = 0;
  for (Level& level : call.levels) {
    const int64_t pitch = int64_t(level.width) + 1;
    const int64_t cells = (int64_t(level.height) + 2) * pitch + 1;
    if (cells > INT_MAX / 4 - first) return;
    level.packed_pitch = int32_t(pitch);
    level.packed_origin = int32_t(first + pitch + 1);
    first += cells;
  }
  call.arguments.packed_cells = int32_t(first + 2);
  // Worth its cost when cells are read about four times or more; not for levels that are all
  // border.
  call.can_pack = call.arguments.queries >= call.arguments.cells / 4 &&
                  first < 4 * call.arguments.cells + 1024;
}

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void set_value(Call& call, const Tensor& value, const std::vector<inputs::LevelExtent>& levels) {
  MSDeformAttnArguments& a = call.arguments;
  a.value_type = inputs::value_type_of(value);
  a.batch = value.size(0);
  a.cells = value.size(1);
  a.heads = value.size(2);
  a.dim = value.size(3);
  for (const auto& level : levels) {
    call.levels.push_back({level.height, level.width, level.first_cell, 0, 0});
  }
  a.level = call.levels.data();
  a.levels = int32_t(levels.size());
  const Tensor rows = inputs::with_inner_contiguous(value, 1);
  a.value = call.hold(rows);
  a.value_strides = strides_of(rows);
  call.kernels = active_instruction_set().load()->kernels + int(a.value_type);
}

// `inner`: dimensions of the weights of one query and head.
void set_samples(Call& call, const Tensor& locations, const Tensor& weights, int64_t inner) {
  MSDeformAttnArguments& a = call.arguments;
  a.queries = locations.size(1);
  a.points = int32_t(locations.size(4));
  const Tensor location_rows = inputs::with_inner_contiguous(locations, 3);
  const Tensor weight_rows = inputs::with_inner_contiguous(weights, inner);
  a.locations = call.hold(location_rows);
  a.location_strides = strides_of(location_rows);
  a.weights = call.hold(weight_rows);
  a.weight_strides = strides_of(weight_rows);
  place_packed_levels(call);
}

void set_references(Call& call, const Tensor& references) {
  MSDeformAttnArguments& a = call.arguments;
  a.reference_dim = int32_t(references.size(3));
  const Tensor rows = inputs::with_inner_contiguous(references, 2);
  a.references = call.hold(rows);
  a.reference_strides = {rows.stride(0), rows.stride(1), 0};
}

void set_padding_mask(Call& call, const std::optional<Tensor>& padding_mask) {
  if (!padding_mask) return;
  MSDeformAttnArguments& a = call.arguments;
  const Tensor rows = inputs::with_inner_contiguous(*padding_mask, 1);
  a.padding_mask = static_cast<const bool*>(call.hold(rows));
  a.padding_mask_stride = rows.stride(0);
}

void set_grad_output(
    Call& call, const Tensor& grad_output, const Tensor& value, const Tensor& locations) {
  inputs::check_grad_output(grad_output, value, locations);
  MSDeformAttnArguments& a = call.arguments;
  const Tensor rows = inputs::with_inner_contiguous(grad_output, 1);
  a.grad_output = call.hold(rows);
  a.grad_output_strides = {rows.stride(0), rows.stride(1), a.dim};
}

// ---- division of the work ----

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGap = 64;
void forbid(const char* memory, int64_t bytes) { __asan_poison_memory_region(memory, bytes); }
#else
constexpr int64_t kGap = 0;
void forbid(const char*, int64_t) {}
#endif

// Memory for temporary use, in `count` equal parts, each aligned to 64 bytes. AddressSanitizer sees
// it as one piece: to find who leaves a part, it is told of what lies between them.
class Parts {
 public:
  Parts(const Tensor& like, int64_t count, int64_t bytes) : bytes_(round_up(bytes) + kGap) {
    if (bytes == 0) return;
    memory_ = torch::stable::new_empty(like, {count * bytes_ + 64}, ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(memory_.mutable_data_ptr());
    first_ = reinterpret_cast<char*>((address + 63) / 64 * 64);
    for (int64_t i = 0; i < count; ++i) forbid((*this)[i] + bytes, bytes_ - bytes);
  }
  char* operator[](int64_t i) const { return first_ ? first_ + i * bytes_ : nullptr; }

 private:
  int64_t bytes_;
  Tensor memory_;
  char* first_ = nullptr;
};

// Calls work(worker, task) for all tasks, on at most `workers` threads; every worker takes
// neighbouring tasks, one after the other.
template <class Work>
void share(int64_t workers, int64_t tasks, const Work& work) {
  workers = workers < tasks ? workers : tasks;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      const int64_t end = (worker + 1) * tasks / workers;
      for (int64_t task = worker * tasks / workers; task < end; ++task) work(worker, task);
    }
  });
}

// What lay_out() in cpu_samples.h takes: 6 arrays and two rows for all items, and for each item of
// two batches 4 arrays of indices and 11 of numbers; every piece is rounded up to 64 bytes.
int64_t scratch_bytes(const Call& call) {
  const int64_t padded_samples = (call.samples() + 15) / 16 * 16;
  const int64_t element = call.arithmetic_bytes();
  const int64_t shared = 6 * padded_samples * element + 2 * call.arguments.dim * 8 + 8 * 64;
  const int64_t item = padded_samples * (4 * 4 + 11 * element) + 6 * 64;
  return shared + 2 * kCpuItems * item;
}

// All queries and levels of head `head` of all batches' heads.
CpuTask whole_head(const Call& call, int64_t head, char* scratch) {
  const MSDeformAttnArguments& a = call.arguments;
  CpuTask task = {};
  task.batch = head / a.heads;
  task.first_head = head % a.heads;
  task.last_head = task.first_head + 1;
  task.last_query = a.queries;
  task.last_level = a.levels;
  task.scratch = scratch;
  return task;
}

const void* pack_if_finite(const Call& call, int64_t head, char* buffer) {
  const MSDeformAttnArguments& a = call.arguments;
  return call.kernels->pack(a, head / a.heads, head % a.heads, buffer) ? buffer : nullptr;
}

int64_t packed_value_bytes(const Call& call) {
  if (!call.can_pack) return 0;
  const MSDeformAttnArguments& a = call.arguments;
  return a.packed_cells * a.dim * value_bytes(a.value_type);
}

// Few queries: every thread takes some of them, with all heads, and reads `value` as it lies.
void forward_direct(const Call& call, const Tensor& value) {
  const MSDeformAttnArguments& a = call.arguments;
  const int64_t workers = torch::stable::get_num_threads();
  const Parts scratch(value, workers, scratch_bytes(call));
  const int64_t chunks = workers < a.queries ? workers : a.queries;
  share(workers, a.batch * chunks, [&](int64_t worker, int64_t i) {
    CpuTask task = {};
    task.batch = i / chunks;
    task.last_head = a.heads;
    task.first_query = (i % chunks) * a.queries / chunks;
    task.last_query = (i % chunks + 1) * a.queries / chunks;
    task.last_level = a.levels;
    task.scratch = scratch[worker];
    call.kernels->forward(a, task);
  });
}

// Many queries: heads are packed. As long as there are enough heads for all threads, each thread
// packs its next head into the same small buffer.
void forward_packed(const Call& call, const Tensor& value) {
  const MSDeformAttnArguments& a = call.arguments;
  const int64_t workers = torch::stable::get_num_threads();
  const Parts scratch(value, workers, scratch_bytes(call));
  if (workers <= call.heads()) {
    const Parts buffers(value, workers, packed_value_bytes(call));
    share(workers, call.heads(), [&](int64_t worker, int64_t head) {
      CpuTask task = whole_head(call, head, scratch[worker]);
      task.packed = pack_if_finite(call, head, buffers[worker]);
      call.kernels->forward(a, task);
    });
    return;
  }
  const Parts buffers(value, call.heads(), packed_value_bytes(call));
  std::vector<const void*> packed(call.heads());
  share(workers, call.heads(), [&](int64_t, int64_t head) {
    packed[head] = pack_if_finite(call, head, buffers[head]);
  });
  const int64_t chunks = workers < a.queries ? workers : a.queries;
  share(workers, call.heads() * chunks, [&](int64_t worker, int64_t i) {
    CpuTask task = whole_head(call, i / chunks, scratch[worker]);
    task.first_query = (i % chunks) * a.queries / chunks;
    task.last_query = (i % chunks + 1) * a.queries / chunks;
    task.packed = packed[i / chunks];
    call.kernels->forward(a, task);
  });
}

Tensor forward(Call& call, const Tensor& value) {
  MSDeformAttnArguments& a = call.arguments;
  const Sizes sizes{a.batch, a.queries, a.heads * a.dim};
  if (call.is_empty()) return torch::stable::new_zeros(value, sizes);
  Tensor output = torch::stable::new_empty(value, sizes);
  a.output = output.mutable_data_ptr();
  if (call.can_pack) {
    forward_packed(call, value);
  } else {
    forward_direct(call, value);
  }
  return output;
}

// Where the values of a head are read and the gradients of its cells summed.
struct HeadBuffers {
  const void* packed;
  char* gradients;
};

class Backward {
 public:
  Backward(const Call& call, const Tensor& value)
      : call_(call),
        workers_(torch::stable::get_num_threads()),
        one_worker_per_head_(workers_ <= call.heads()),
        // Half types are summed in float32; packed values come with packed gradients.
        buffers_gradients_(call.can_pack || value_bytes(call.arguments.value_type) == 2),
        gradient_bytes_(
            buffers_gradients_ ? (call.can_pack ? int64_t(call.arguments.packed_cells)
                                                : call.arguments.cells) *
                                     call.arguments.dim * call.arithmetic_bytes()
                               : 0),
        scratch_(value, workers_, scratch_bytes(call)),
        values_(value, one_worker_per_head_ ? workers_ : call.heads(), packed_value_bytes(call)),
        gradients_(value, one_worker_per_head_ ? workers_ : call.heads(), gradient_bytes_) {}

  static bool needs_zeroed_output(const Call& call) {
    return !call.can_pack && value_bytes(call.arguments.value_type) != 2;
  }

  void run() {
    if (one_worker_per_head_) {
      share(workers_, call_.heads(), [&](int64_t worker, int64_t head) {
        const HeadBuffers buffers = begin(head, worker);
        scatter(head, 0, call_.arguments.levels, buffers, worker);
        end(head, buffers);
      });
    } else {
      run_by_level();
    }
  }

 private:
  HeadBuffers begin(int64_t head, int64_t part) const {
    HeadBuffers buffers = {nullptr, gradients_[part]};
    if (call_.can_pack) buffers.packed = pack_if_finite(call_, head, values_[part]);
    if (buffers.gradients) memset(buffers.gradients, 0, gradient_bytes_);
    return buffers;
  }

  void scatter(int64_t head, int32_t first_level, int32_t last_level, const HeadBuffers& buffers,
               int64_t worker) const {
    const MSDeformAttnArguments& a = call_.arguments;
    CpuTask task = whole_head(call_, head, scratch_[worker]);
    task.first_level = first_level;
    task.last_level = last_level;
    task.packed = buffers.packed;
    task.grad_rows = buffers.gradients;
    task.grad_row_stride = a.dim;
    if (!buffers.gradients) {
      const int64_t first = (task.batch * a.cells * a.heads + task.first_head) * a.dim;
      task.grad_rows = static_cast<char*>(a.grad_value) + first * call_.arithmetic_bytes();
      task.grad_row_stride = a.heads * a.dim;
    }
    call_.kernels->backward(a, task);
  }

  void end(int64_t head, const HeadBuffers& buffers) const {
    const MSDeformAttnArguments& a = call_.arguments;
    if (!buffers.gradients) return;
    call_.kernels->unpack(
        a, head / a.heads, head % a.heads, buffers.gradients, buffers.packed != nullptr);
  }

  // More threads than heads: levels of a head are done at the same time.
  void run_by_level() const {
    const int32_t levels = call_.arguments.levels;
    std::vector<HeadBuffers> buffers(call_.heads());
    share(workers_, call_.heads(), [&](int64_t, int64_t head) {
      buffers[head] = begin(head, head);
    });
    share(workers_, call_.heads() * levels, [&](int64_t worker, int64_t i) {
      const auto level = int32_t(i % levels);
      scatter(i / levels, level, level + 1, buffers[i / levels], worker);
    });
    share(workers_, call_.heads(), [&](int64_t, int64_t head) { end(head, buffers[head]); });
    if (call_.is_fused() && levels > 1) finish_softmax();
  }

  void finish_softmax() const {
    const MSDeformAttnArguments& a = call_.arguments;
    const int64_t chunks = workers_ < a.queries ? workers_ : a.queries;
    share(workers_, call_.heads() * chunks, [&](int64_t worker, int64_t i) {
      CpuTask task = whole_head(call_, i / chunks, scratch_[worker]);
      task.first_query = (i % chunks) * a.queries / chunks;
      task.last_query = (i % chunks + 1) * a.queries / chunks;
      call_.kernels->softmax_backward(a, task);
    });
  }

  const Call& call_;
  int64_t workers_;
  bool one_worker_per_head_;
  bool buffers_gradients_;
  int64_t gradient_bytes_;
  Parts scratch_, values_, gradients_;
};

// Sums (rows, heads, columns) over the heads.
template <class A>
void sum_over_heads(const void* from, void* to, int64_t rows, int64_t heads, int64_t columns) {
  torch::stable::parallel_for(0, rows, 256, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const A* terms = static_cast<const A*>(from) + row * heads * columns;
      A* sums = static_cast<A*>(to) + row * columns;
      for (int64_t c = 0; c < columns; ++c) sums[c] = terms[c];
      for (int64_t h = 1; h < heads; ++h) {
        for (int64_t c = 0; c < columns; ++c) sums[c] += terms[h * columns + c];
      }
    }
  });
}

struct Gradients {
  Tensor value, references, locations, weights;
};

Gradients zero_gradients(
    const Tensor& value, const Tensor* references, const Tensor& locations, const Tensor& weights) {
  const auto zeros = [](const Tensor& like) {
    return torch::stable::new_zeros(like, sizes_of(like));
  };
  return {zeros(value), references ? zeros(*references) : Tensor(), zeros(locations),
          zeros(weights)};
}

Gradients backward(
    Call& call, const Tensor& value, const Tensor* references, const Tensor& locations,
    const Tensor& weights) {
  if (call.is_empty()) return zero_gradients(value, references, locations, weights);
  MSDeformAttnArguments& a = call.arguments;
  Gradients gradients;
  gradients.value = Backward::needs_zeroed_output(call)
                        ? torch::stable::new_zeros(value, sizes_of(value))
                        : torch::stable::new_empty(value, sizes_of(value));
  gradients.locations = torch::stable::new_empty(locations, sizes_of(locations));
  gradients.weights = torch::stable::new_empty(weights, sizes_of(weights));
  a.grad_value = gradients.value.mutable_data_ptr();
  a.grad_locations = gradients.locations.mutable_data_ptr();
  a.grad_weights = gradients.weights.mutable_data_ptr();
  Tensor per_head;
  const int64_t columns = int64_t(a.levels) * a.reference_dim;
  if (references) {
    gradients.references = torch::stable::new_empty(*references, sizes_of(*references));
    per_head = torch::stable::new_empty(*references, {a.batch, a.queries, a.heads, columns});
    a.grad_references = per_head.mutable_data_ptr();
  }
  Backward(call, value).run();
  if (references) {
    const auto sum = a.value_type == ValueType::float64 ? sum_over_heads<double>
                                                        : sum_over_heads<float>;
    sum(a.grad_references, gradients.references.mutable_data_ptr(), a.batch * a.queries, a.heads,
        columns);
  }
  return gradients;
}

Call classic_call(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  Call call;
  set_value(call, value,
            inputs::check_classic(value, spatial_shapes, level_start_index, sampling_locations,
                                  attention_weights));
  set_samples(call, sampling_locations, attention_weights, 2);
  return call;
}

Call fused_call(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& reference_points, const Tensor& offsets, const Tensor& logits,
    const std::optional<Tensor>& padding_mask) {
  Call call;
  set_value(call, value,
            inputs::check_fused(value, spatial_shapes, level_start_index, reference_points,
                                offsets, logits, padding_mask));
  set_samples(call, offsets, logits, 1);
  set_references(call, reference_points);
  set_padding_mask(call, padding_mask);
  return call;
}

}  // namespace

// ---- operators ----

Tensor ms_deform_attn_forward_cpu(
    Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations,
    Tensor attention_weights) {
  Call call = classic_call(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  return forward(call, value);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward_cpu(
    Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor level_start_index,
    Tensor sampling_locations, Tensor attention_weights) {
  Call call = classic_call(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  set_grad_output(call, grad_output, value, sampling_locations);
  const Gradients gradients =
      backward(call, value, nullptr, sampling_locations, attention_weights);
  return {gradients.value, gradients.locations, gradients.weights};
}

Tensor ms_deform_attn_fused_forward_cpu(
    Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor reference_points,
    Tensor offsets, Tensor logits, std::optional<Tensor> padding_mask) {
  Call call = fused_call(
      value, spatial_shapes, level_start_index, reference_points, offsets, logits, padding_mask);
  return forward(call, value);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward_cpu(
    Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor level_start_index,
    Tensor reference_points, Tensor offsets, Tensor logits, std::optional<Tensor> padding_mask) {
  Call call = fused_call(
      value, spatial_shapes, level_start_index, reference_points, offsets, logits, padding_mask);
  set_grad_output(call, grad_output, value, offsets);
  const Gradients gradients = backward(call, value, &reference_points, offsets, logits);
  return {gradients.value, gradients.references, gradients.locations, gradients.weights};
}

std::string cpu_kernels() { return active_instruction_set().load()->name; }

void use_cpu_kernels(std::string name) {
  const InstructionSet* set = find_instruction_set(name);
  if (!set) inputs::fail("name: this processor has no kernels called ", name);
  active_instruction_set().store(set);
}

}  // namespace dn_detr
