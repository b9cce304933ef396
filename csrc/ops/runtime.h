#pragma once

namespace dlkernels::ops {

// Called once, when the extension is loaded.
void install_torch_runtime();

}  // namespace dlkernels::ops
