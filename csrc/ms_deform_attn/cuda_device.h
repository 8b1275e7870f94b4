// What the operators need to know about the device that they run on. Tests compile the operators
// for CPU tensors over an emulator of CUDA (DN_DETR_EMULATED), under a library name of its own.

#pragma once

#include <dlfcn.h>

#include <stdexcept>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_arguments.h"

#ifdef DN_DETR_EMULATED

#define DN_DETR_LIBRARY dn_detr_emulated
#define DN_DETR_DEVICE_KEY CPU

namespace dn_detr::cuda {

inline bool on_device(const torch::stable::Tensor&) { return true; }

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  Stream stream() const { return nullptr; }
};

}  // namespace dn_detr::cuda

#else

#define DN_DETR_LIBRARY dn_detr_C
#define DN_DETR_DEVICE_KEY CUDA

namespace dn_detr::cuda {

inline bool on_device(const torch::stable::Tensor& x) { return x.is_cuda(); }

// Makes a tensor's device the current one while it lives.
class __attribute__((visibility("hidden"))) OnDevice {  // as the guard that it holds
 public:
  explicit OnDevice(const torch::stable::Tensor& x)
      : index_(x.get_device_index()), guard_(index_) {}

  // PyTorch's current stream. Symbols that not every supported PyTorch has are looked up when they
  // are needed, so that one shared object loads everywhere, also beside a PyTorch without CUDA.
  Stream stream() const {
    StreamHandle handle = nullptr;
    void* stream = nullptr;
    using NativeHandle = AOTITorchError (*)(StreamHandle, void**);
    static const auto native_handle =
        reinterpret_cast<NativeHandle>(dlsym(RTLD_DEFAULT, "torch_stream_native_handle"));
    if (native_handle != nullptr) {  // PyTorch 2.13 and later
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(index_, &handle));
      const torch::stable::accelerator::Stream owner(handle);
      STABLE_TORCH_ERROR_CODE_CHECK(native_handle(handle, &stream));
      return stream;
    }
    using CudaStream = AOTITorchError (*)(int32_t, void**);
    static const auto cuda_stream = reinterpret_cast<CudaStream>(
        in_torch_cuda("aoti_torch_get_current_cuda_stream"));
    if (cuda_stream == nullptr) throw std::runtime_error("PyTorch has no current CUDA stream");
    STABLE_TORCH_ERROR_CODE_CHECK(cuda_stream(index_, &stream));
    return stream;
  }

 private:
  // In PyTorch's CUDA library, which is in memory whenever there are CUDA tensors.
  static void* in_torch_cuda(const char* symbol) {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : dlsym(library, symbol);
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace dn_detr::cuda

#endif
