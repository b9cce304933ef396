// Calls the CUDA kernels on the host without Python, for builds of kernels that were changed on purpose: exits with 1
// where a result differs between schedules or is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/batch_norm.h"
#include "cpu/cross_entropy.h"
#include "cuda/place.h"
#include "simt.h"

namespace dlkernels::simt {
BatchNormKernels batch_norm_kernels();
CrossEntropyKernels cross_entropy_kernels();
}  // namespace dlkernels::simt

namespace {

using namespace dlkernels;

using Results = std::vector<double>;

class HostPlace {
 public:
  HostPlace()
      : guard_({nullptr, [this](int64_t bytes) { return memory_.emplace_back(new unsigned char[bytes]).get(); }}) {}

 private:
  std::vector<std::unique_ptr<unsigned char[]>> memory_;
  PlaceGuard guard_;
};

// The numbers that a kernel gave, after 1 or 0: whether the first of them is as expected.
Results checked(double actual, double expected, const std::vector<float>& values) {
  Results results = {std::abs(actual - expected) < 1e-5 ? 1.0 : 0.0, actual};
  results.insert(results.end(), values.begin(), values.end());
  return results;
}

// Loss, divisor and gradient of a smoothed and weighted mean over three rows.
Results cross_entropy(int64_t classes) {
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
  const HostPlace place;
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
  grad.push_back(static_cast<float>(divisor));
  return checked(loss, total / weights, grad);
}

// Output, statistics and gradients of batch norm over the batch; the last output is compared.
Results batch_norm(int64_t batch, int64_t inner, bool channels_last) {
  constexpr int64_t channels = 3;
  const int64_t count = batch * channels * inner;
  std::vector<float> input(count), output(count), gradient(count), grad_input(count), grads(2 * channels);
  for (int64_t i = 0; i < count; ++i) input[i] = static_cast<float>(i * 7919 % 1009) / 200;
  for (int64_t i = 0; i < count; ++i) gradient[i] = static_cast<float>(i * 104729 % 997) / 500;
  double mean[channels], variance[channels];
  const BatchNormShape shape = {DType::float32, batch, channels, inner, channels_last, true, true};
  const HostPlace place;
  const BatchNormKernels kernels = dlkernels::simt::batch_norm_kernels();
  kernels.forward({shape, input.data(), nullptr, nullptr, nullptr, 0.0, mean, variance, output.data()});
  kernels.backward({shape, gradient.data(), input.data(), output.data(), nullptr, mean, variance, 0.0,
                    grad_input.data(), nullptr, grads.data(), grads.data() + channels});

  double sum = 0, squares = 0;  // of the last channel
  for (int64_t i = 0; i < count; ++i) {
    const int64_t channel = channels_last ? i % channels : i / inner % channels;
    if (channel != channels - 1) continue;
    sum += input[i], squares += double{input[i]} * input[i];
  }
  const double elements = static_cast<double>(batch * inner), center = sum / elements;
  const double expected = (input[count - 1] - center) / std::sqrt(squares / elements - center * center);
  std::vector<float> values = output;
  values.insert(values.end(), grad_input.begin(), grad_input.end());
  values.insert(values.end(), grads.begin(), grads.end());
  return checked(output[count - 1], std::max(expected, 0.0), values);
}

// Whether a call gives the right result, and the same bits, under every schedule.
template <class Call>
bool holds(const char* name, Call&& call) {
  using ::simt::Schedule;
  Results expected;
  for (auto schedule : {Schedule::forward, Schedule::reverse, Schedule::random, Schedule::warp_ahead}) {
    ::simt::set_schedule(schedule);
    const Results results = call();
    if (expected.empty()) expected = results;
    if (results[0] == 1 && std::memcmp(results.data(), expected.data(), results.size() * sizeof(double)) == 0) continue;
    std::printf("%s: another result under schedule %d\n", name, static_cast<int>(schedule));
    return false;
  }
  return true;
}

}  // namespace

int main() {
  bool all = true;
  for (const int64_t classes : {40, 3001, 33001}) {
    all &= holds("cross-entropy", [=] { return cross_entropy(classes); });
  }
  for (const bool channels_last : {false, true}) {
    all &= holds("batch norm", [=] { return batch_norm(13, 1500, channels_last); });
  }
  return all ? 0 : 1;
}
