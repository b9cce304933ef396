#include "ops/device.h"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace dlkernels {
#if defined(DLKERNELS_CUDA)
namespace cuda {
extern const KernelTable table;
}
#endif

namespace ops {
namespace {

const KernelTable& cuda_kernels() {
#if defined(DLKERNELS_CUDA)
  return cuda::table;
#else
  TORCH_CHECK_NOT_IMPLEMENTED(false,
                              "dlkernels: this build has no CUDA kernels: with nvcc on PATH, "
                              "`DLKERNELS_CUDA=1 pip install --force-reinstall --no-deps .` builds them.");
#endif
}

}  // namespace

KernelsOn::KernelsOn(const Tensor& tensor) : table_(tensor.is_cpu() ? &kernels() : &cuda_kernels()) {
  if (!table_->on_device) return;
  void* stream = nullptr;
  if (!tensor.is_cpu()) {
    device_.reset_device(tensor.device());
    stream = c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device()).native_handle();
  }
  place_.emplace(Place{stream, [this, options = tensor.options().dtype(at::kByte)](int64_t bytes) {
                         return workspaces_.emplace_back(at::empty({bytes}, options)).mutable_data_ptr();
                       }});
}

}  // namespace ops
}  // namespace dlkernels
