#include "cuda/place.h"

#include <stdexcept>
#include <utility>

namespace dlkernels {
namespace {
thread_local const Place* current_place = nullptr;
}

const Place& Place::current() {
  if (current_place == nullptr) throw std::logic_error("kernels of a device were called without a PlaceGuard");
  return *current_place;
}

PlaceGuard::PlaceGuard(Place place) : place_(std::move(place)), outer_(current_place) {
  current_place = &place_;
}

PlaceGuard::~PlaceGuard() {
  current_place = outer_;
}

}  // namespace dlkernels
