// Which instruction set this process runs the kernels with, and the table of kernels built for it.
#pragma once

#include <vector>

namespace dlkernels {

struct KernelTable;  // kernels.h

// The table in use: the widest instruction set that the processor, the operating system and this build all have, or the
// one that DLKERNELS_ISA names. Throws std::runtime_error when DLKERNELS_ISA names one that cannot be had.
const KernelTable& kernels();

// Puts another instruction set in use, for tests and measurements; false when it cannot be had in this process.
bool select_isa(const char* name);

// Names of the instruction sets that can be used in this process, narrowest first; emulated ones come last.
std::vector<const char*> available_isas();

}  // namespace dlkernels
