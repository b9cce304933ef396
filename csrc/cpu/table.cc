// Gathers the kernels of one instruction set into its table.
#include "kernels.h"
#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {

extern const KernelTable table;
const KernelTable table = {
    isa_name,
    cross_entropy_kernels(),
    linear_cross_entropy_kernels(),
};

}  // namespace dlkernels::DLKERNELS_ISA
