// Calls the CUDA kernels of one column on the host without Python, for builds of kernels that were changed on purpose:
// exits with 1 where a result differs between schedules or is wrong. Compiled with DRIVE_<column>.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/batch_norm.h"
#include "cpu/conv2d.h"
#include "cpu/cross_entropy.h"
#include "cpu/linear.h"
#include "cpu/lstm.h"
#include "cuda/place.h"
#include "simt.h"

namespace dlkernels::simt {
AttentionKernels attention_kernels();
BatchNormKernels batch_norm_kernels();
Conv2dKernels conv2d_kernels();
CrossEntropyKernels cross_entropy_kernels();
LinearKernels linear_kernels();
LstmKernels lstm_kernels();
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
  Results results = {std::abs(actual - expected) < 1e-5 * (1 + std::abs(expected)) ? 1.0 : 0.0, actual};
  results.insert(results.end(), values.begin(), values.end());
  return results;
}

std::vector<float> numbers(int64_t count, int64_t seed) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>((i + seed) * 7919 % 1009) / 504 - 1;
  return values;
}

#if defined(DRIVE_cross_entropy)
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

#endif

#if defined(DRIVE_batch_norm)
// Output, statistics and gradients of batch norm over the batch; the last output is compared.
Results batch_norm(int64_t batch, int64_t inner, bool channels_last) {
  const int64_t channels = channels_last ? 8 : 3;  // side by side, two threads have four each
  const int64_t count = batch * channels * inner;
  std::vector<float> input(count), output(count), gradient(count), grad_input(count), grads(2 * channels);
  for (int64_t i = 0; i < count; ++i) input[i] = static_cast<float>(i * 7919 % 1009) / 200;
  for (int64_t i = 0; i < count; ++i) gradient[i] = static_cast<float>(i * 104729 % 997) / 500;
  std::vector<double> mean(channels), variance(channels);
  const BatchNormShape shape = {DType::float32, batch, channels, inner, channels_last, Activation::relu, true};
  const HostPlace place;
  const BatchNormKernels kernels = dlkernels::simt::batch_norm_kernels();
  kernels.forward({shape, input.data(), nullptr, nullptr, nullptr, 0.0, mean.data(), variance.data(), output.data()});
  kernels.backward({shape, gradient.data(), input.data(), output.data(), nullptr, nullptr, mean.data(), variance.data(),
                    0.0, grad_input.data(), nullptr, grads.data(), grads.data() + channels});

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

#endif

#if defined(DRIVE_linear)
// A product of operands that have to be laid out, and the sum of one's rows.
Results linear() {
  constexpr int64_t rows = 70, columns = 66, depth = 601;
  const std::vector<float> a = numbers(rows * depth, 1), b = numbers(columns * depth, 2);
  std::vector<float> product(rows * columns), sums(depth);
  const HostPlace place;
  const LinearKernels kernels = dlkernels::simt::linear_kernels();
  kernels.product(
      {DType::float32, rows, columns, depth, a.data(), depth, 1, b.data(), depth, 1, true, nullptr, product.data()});
  kernels.sum({DType::float32, rows, depth, a.data(), depth, 1, sums.data()});
  double expected = 0;
  for (int64_t k = 0; k < depth; ++k) expected += double{a[depth + k]} * b[k];
  product.insert(product.end(), sums.begin(), sums.end());
  return checked(product[columns], expected, product);
}

// Whole numbers of bfloat16 on Hopper's instructions: tiles for each of four blocks or two, more steps than stages.
Results linear_on_hopper(int64_t rows, int64_t columns, bool left_along_depth, bool right_along_depth) {
  constexpr int64_t depth = 456;
  auto whole_numbers = [](int64_t count, int64_t seed) {
    std::vector<uint16_t> bits(count);
    for (int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>((i + seed) * 7919 % 9 - 4);
      uint32_t word;
      std::memcpy(&word, &value, sizeof word);
      bits[i] = static_cast<uint16_t>(word >> 16);
    }
    return bits;
  };
  auto value_of = [](uint16_t bits) {
    const uint32_t word = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  };
  const std::vector<uint16_t> a = whole_numbers(rows * depth, 1), b = whole_numbers(columns * depth, 2);
  std::vector<uint16_t> product(rows * columns);
  const HostPlace place;
  ::simt::use_hopper(true);
  dlkernels::simt::linear_kernels().product(
      {DType::bfloat16, rows, columns, depth, a.data(), left_along_depth ? depth : 1, left_along_depth ? 1 : rows,
       b.data(), right_along_depth ? depth : 1, right_along_depth ? 1 : columns, true, nullptr, product.data()});
  ::simt::use_hopper(false);
  double all_right = 1;
  std::vector<float> values;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      values.push_back(value_of(product[i * columns + j]));
      if ((i + j) % 5 != 0) continue;  // the others are in the same fragments
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) {
        sum += double{value_of(a[left_along_depth ? i * depth + k : k * rows + i])} *
               value_of(b[right_along_depth ? j * depth + k : k * columns + j]);
      }
      if (!(std::abs(values.back() - sum) <= std::abs(sum) / 256)) all_right = 0;
    }
  }
  return checked(all_right, 1, values);
}
#endif

#if defined(DRIVE_conv2d)
// The gradient of a depthwise weight over channels_last images.
Results depthwise(bool channels_last) {
  constexpr int64_t C = 40, H = 20, W = 20, count = C * H * W;
  const std::vector<float> input = numbers(count, 1), gradient = numbers(count, 2), weight = numbers(C * 9, 3);
  std::vector<float> grad_weight(C * 9);
  const Conv2dGeometry geometry = {
      1, C, H, W, C, H, W, 3, 3, 1, 1, 1, 1, 1, 1, C, channels_last, count, count, {9, 9, 3, 1}, {9, 9, 3, 1}};
  const HostPlace place;
  dlkernels::simt::conv2d_kernels().backward(
      {DType::float32, geometry, gradient.data(), input.data(), weight.data(), nullptr, grad_weight.data(), nullptr});
  double expected = 0;  // of the first channel's middle tap
  for (int64_t i = 0; i < H * W; ++i) {
    const int64_t at = channels_last ? i * C : i;
    expected += double{input[at]} * gradient[at];
  }
  return checked(grad_weight[4], expected, grad_weight);
}
#endif

#if defined(DRIVE_lstm)
// Three steps forward and backward; the first unit's cell after one step is compared.
Results lstm() {
  constexpr int64_t steps = 3, batch = 70, inputs = 4, H = 37, rows = steps * batch;
  const std::vector<float> input = numbers(rows * inputs, 1), h0 = numbers(batch * H, 2), c0 = numbers(batch * H, 3),
                           w_ih = numbers(4 * H * inputs, 4), w_hh = numbers(4 * H * H, 5);
  std::vector<float> output(rows * H), h_n(batch * H), c_n(batch * H), gates(rows * 4 * H), cells(rows * H);
  std::vector<float> grad_input(rows * inputs), grad_w_hh(4 * H * H), grad_h0(batch * H);
  const LstmLayer layer = {DType::float32, steps,   batch,        rows,   inputs,    H,         0,
                           false,          nullptr, input.data(), inputs, h0.data(), c0.data(), w_ih.data(),
                           w_hh.data(),    nullptr, nullptr,      nullptr};
  const HostPlace place;
  const LstmKernels kernels = dlkernels::simt::lstm_kernels();
  kernels.forward({layer, output.data(), h_n.data(), c_n.data(), gates.data(), cells.data()});
  kernels.backward({layer, output.data(), nullptr, nullptr, output.data(), gates.data(), cells.data(),
                    grad_input.data(), grad_h0.data(), nullptr, nullptr, grad_w_hh.data(), nullptr, nullptr});
  double gate[4];
  for (int64_t g = 0; g < 4; ++g) {
    double sum = 0;
    for (int64_t k = 0; k < inputs; ++k) sum += double{input[k]} * w_ih[g * H * inputs + k];
    for (int64_t k = 0; k < H; ++k) sum += double{h0[k]} * w_hh[g * H * H + k];
    gate[g] = g == 2 ? std::tanh(sum) : 1 / (1 + std::exp(-sum));
  }
  for (const auto* more : {&grad_input, &grad_w_hh, &grad_h0}) output.insert(output.end(), more->begin(), more->end());
  return checked(cells[0], gate[1] * c0[0] + gate[0] * gate[2], output);
}
#endif

#if defined(DRIVE_attention)
// Output and gradients of one head, of a mask that all keys share among them; the first output is compared.
Results attention() {
  constexpr int64_t L = 40, S = 64, E = 8;
  const std::vector<float> query = numbers(L * E, 1), key = numbers(S * E, 2), value = numbers(S * E, 3),
                           gradient = numbers(L * E, 4), mask = numbers(L, 5);
  std::vector<float> output(L * E), statistics(2 * L), grads((L + 2 * S) * E + L);
  AttentionSizes sizes = {0, {}, 1, 1, 1, L, S, E, E};
  auto rows = [](auto* data, int64_t count) {
    using Pointer = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>, const void*, void*>;
    return AttentionTensor<Pointer>{data, {}, count * E, E};
  };
  const AttentionMask<const void*> added = {AttentionMaskType::element, mask.data(), {}, L, 1, 0};
  const AttentionMask<void*> grad_mask = {AttentionMaskType::element, grads.data() + (L + 2 * S) * E, {}, L, 1, 0};
  const HostPlace place;
  const AttentionKernels kernels = dlkernels::simt::attention_kernels();
  kernels.forward({DType::float32,
                   sizes,
                   rows(query.data(), L),
                   rows(key.data(), S),
                   rows(value.data(), S),
                   added,
                   false,
                   0.5,
                   0.0,
                   nullptr,
                   rows(output.data(), L),
                   {},
                   statistics.data()});
  const float* result = output.data();
  kernels.backward({DType::float32,
                    sizes,
                    rows(gradient.data(), L),
                    rows(query.data(), L),
                    rows(key.data(), S),
                    rows(value.data(), S),
                    rows(result, L),
                    {},
                    statistics.data(),
                    added,
                    false,
                    0.5,
                    0.0,
                    nullptr,
                    rows(grads.data(), L),
                    rows(grads.data() + L * E, S),
                    rows(grads.data() + (L + S) * E, S),
                    grad_mask,
                    L});
  double sum = 0, weighted = 0;
  for (int64_t j = 0; j < S; ++j) {
    double score = 0;
    for (int64_t e = 0; e < E; ++e) score += double{query[e]} * key[j * E + e];
    sum += std::exp(0.5 * score), weighted += std::exp(0.5 * score) * value[j * E];
  }
  output.insert(output.end(), grads.begin(), grads.end());
  return checked(output[0], weighted / sum, output);
}
#endif

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
#if defined(DRIVE_cross_entropy)
  for (const int64_t classes : {40, 3001, 33001}) {
    all &= holds("cross-entropy", [=] { return cross_entropy(classes); });
  }
#elif defined(DRIVE_batch_norm)
  for (const bool channels_last : {false, true}) {
    all &= holds("batch norm", [=] { return batch_norm(13, 1500, channels_last); });
  }
#elif defined(DRIVE_linear)
  all = holds("linear", linear);
  for (const bool left : {true, false}) {
    for (const bool right : {true, false}) {
      if (!left && right) continue;  // the operands are exchanged
      all &= holds("wide product on Hopper", [=] { return linear_on_hopper(264, 264, left, right); });
      all &= holds("narrow product on Hopper", [=] { return linear_on_hopper(136, 64, left, right); });
    }
  }
#elif defined(DRIVE_conv2d)
  for (const bool channels_last : {false, true}) {
    all &= holds("depthwise convolution", [=] { return depthwise(channels_last); });
  }
#elif defined(DRIVE_lstm)
  all = holds("lstm", lstm);
#elif defined(DRIVE_attention)
  all = holds("attention", attention);
#endif
  return all ? 0 : 1;
}
