// Gathers the kernels of one instruction set into its table.
#include "kernels.h"
#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {

extern const KernelTable table;
const KernelTable table = {
    isa_name,
    /*on_device=*/false,
    arithmetic_rate_kernels(),
    attention_kernels(),
    batch_norm_kernels(),
    conv2d_kernels(),
    cross_entropy_kernels(),
    elementary_kernels(),
    linear_kernels(),
    linear_cross_entropy_kernels(),
    lstm_kernels(),
};

}  // namespace dlkernels::DLKERNELS_ISA
