// The kernels that serve a tensor's device, and where they run.
#pragma once

#include <optional>
#include <vector>

#include "cuda/place.h"
#include "ops/common.h"

namespace dlkernels::ops {

// The table of kernels for a tensor. While it lives, CUDA kernels run on the tensor's device, on torch's current stream
// there, with workspaces from torch's allocator.
class KernelsOn {
 public:
  explicit KernelsOn(const Tensor& tensor);
  const KernelTable* operator->() const { return table_; }

 private:
  const KernelTable* table_;
  std::vector<Tensor> workspaces_;
  c10::OptionalDeviceGuard device_;
  std::optional<PlaceGuard> place_;
};

}  // namespace dlkernels::ops
