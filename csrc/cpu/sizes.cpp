#include "sizes.h"

#include <stdexcept>
#include <string>

namespace dlkernels {

void refuse_size(const char* what) {
  throw std::runtime_error(std::string(what) + " is too large: it does not fit into 64 bits");
}

}  // namespace dlkernels
