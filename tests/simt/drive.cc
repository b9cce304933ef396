// Calls the CUDA kernels on the host without Python, for builds of kernels that were changed on purpose: exits with 1
// where a result differs between schedules or is wrong.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cuda/place.h"
#include "simt.h"

namespace dlkernels::simt {
CrossEntropyKernels cross_entropy_kernels();
}

namespace {

using namespace dlkernels;

// Loss, divisor and gradient of a smoothed and weighted mean over three rows.
std::vector<double> cross_entropy(int64_t classes) {
  constexpr int64_t rows = 3;
  std::vector<float> logits(rows * classes), weight(classes), grad(rows * classes), statistics(2 * rows);
  for (int64_t i = 0; i < rows * classes; ++i) logits[i] = static_cast<float>(i * 7919 % 1009) / 200;
  for (int64_t c = 0; c < classes; ++c) weight[c] = 1 + static_cast<float>(c % 5) / 4;
  const std::vector<int64_t> target = {0, classes / 2, classes - 1};
  const CrossEntropyShape shape = {DType::float32, rows,    classes,       1,    logits.data(), classes,
                                   target.data(),  nullptr, weight.data(), -100, 0.25};
  float loss = NAN;
  const float one = 1;
  double divisor = NAN;
  std::vector<std::unique_ptr<unsigned char[]>> workspaces;
  const PlaceGuard place(
      {nullptr, [&](int64_t bytes) { return workspaces.emplace_back(new unsigned char[bytes]).get(); }});
  const CrossEntropyKernels kernels = dlkernels::simt::cross_entropy_kernels();
  kernels.forward({shape, LossReduction::mean, &loss, statistics.data(), &divisor});
  kernels.backward({shape, statistics.data(), &one, 0, &divisor, grad.data(), nullptr});

  double total = 0, weights = 0;
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0, shared = 0;
    for (int64_t c = 0; c < classes; ++c) sum += std::exp(double{logits[row * classes + c]});
    for (int64_t c = 0; c < classes; ++c) {
      const double hit = c == target[row] ? 0.75 : 0;
      shared -= (hit + 0.25 / static_cast<double>(classes)) * weight[c] * (logits[row * classes + c] - std::log(sum));
    }
    total += shared, weights += weight[target[row]];
  }
  if (!(std::abs(loss - total / weights) < 1e-5)) std::printf("loss %g, expected %g\n", loss, total / weights);
  std::vector<double> results = {std::abs(loss - total / weights) < 1e-5 ? 1.0 : 0.0, loss, divisor};
  results.insert(results.end(), grad.begin(), grad.end());
  return results;
}

}  // namespace

int main() {
  using ::simt::Schedule;
  for (const int64_t classes : {40, 3001, 33001}) {
    std::vector<double> expected;
    for (auto schedule : {Schedule::forward, Schedule::reverse, Schedule::random, Schedule::warp_ahead}) {
      ::simt::set_schedule(schedule);
      const std::vector<double> results = cross_entropy(classes);
      if (expected.empty()) expected = results;
      if (results[0] != 1 || std::memcmp(results.data(), expected.data(), results.size() * sizeof(double)) != 0) {
        std::printf("%lld classes, schedule %d: another result\n", static_cast<long long>(classes),
                    static_cast<int>(schedule));
        return 1;
      }
    }
  }
}
