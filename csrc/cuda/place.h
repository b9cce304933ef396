// Where the kernels of a device run: a stream, and memory that lives as long as the call.
#pragma once

#include <cstdint>
#include <functional>

namespace dlkernels {

struct Place {
  void* stream = nullptr;                        // a cudaStream_t
  std::function<void*(int64_t bytes)> allocate;  // memory in the stream's order, held by the caller

  // That of the calling thread: set while a PlaceGuard lives.
  static const Place& current();
};

class PlaceGuard {
 public:
  explicit PlaceGuard(Place place);
  ~PlaceGuard();
  PlaceGuard(const PlaceGuard&) = delete;
  PlaceGuard& operator=(const PlaceGuard&) = delete;

 private:
  Place place_;
  const Place* outer_;
};

}  // namespace dlkernels
