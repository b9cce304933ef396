// Gathers the kernels of the device into its table.
#include "cpu/kernels.h"
#include "cuda/device.cuh"

namespace dlkernels::DLKERNELS_ISA {

#define DLKERNELS_NAME_OF(name) #name
#define DLKERNELS_NAME(name) DLKERNELS_NAME_OF(name)

extern const KernelTable table;
const KernelTable table = [] {
  KernelTable kernels = {};
  kernels.isa = DLKERNELS_NAME(DLKERNELS_ISA);
  kernels.on_device = true;
  kernels.attention = attention_kernels();
  kernels.batch_norm = batch_norm_kernels();
  kernels.conv2d = conv2d_kernels();
  kernels.cross_entropy = cross_entropy_kernels();
  kernels.linear = linear_kernels();
  kernels.linear_cross_entropy = linear_cross_entropy_kernels();
  kernels.lstm = lstm_kernels();
  return kernels;
}();

}  // namespace dlkernels::DLKERNELS_ISA
