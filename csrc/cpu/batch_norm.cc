// Batch normalisation, with an optional residual and ReLU in the same pass (Ioffe and Szegedy 2015).
//
//   forward    y = relu(w (x - mean) / sqrt(variance + eps) + b + residual), or relu6
//   backward   g = dy where y > 0;   dx = w / s (g - mean(g) - (x - mean) / s^2 mean(g (x - mean))),   s^2 = variance +
//   eps
//
// ReLU is differentiated by its output, as torch's is, and ReLU6 by its argument, which backward computes again: its
// output may be changed in place meanwhile.
//
// The elements of a channel are cut into chunks, the same ones in both layouts. A chunk's mean and sum of
// squared deviations are found in two passes over it (it is in cache for the second), never as E[x^2] - mean^2: the
// second also sums the deviations, and so corrects the mean of the first (Chan, Golub and LeVeque 1983). The chunks
// are merged in double in their order (the same authors, 1979). The mean stays in double: elements are
// centred on its rounding, and what was rounded away is folded into the channel's constants. Inside a chunk, position p
// of an image is summed in lane p mod lanes: with inner positions side by side that is a vector sum; with channels side
// by side the lanes are an array of `lanes` rows of channels. So both layouts, and any number of threads, give the same
// bits.
//
// Contiguous: a task owns one channel, batch x inner elements, which usually stay in the second-level cache between the
// statistics and the normalisation: one read and one write of memory. Channels last: one pass over chunks for the
// statistics, one for the output, the second in reverse order to begin where the cache is warm.
//
// Squares of float32 overflow from 2^64 on. A channel whose statistics, or sums, do not come out as ordinary numbers is
// done again by itself in double.
#include "batch_norm.h"

#include "pack.h"
#include "parallel.h"
#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// Elements of one channel in a chunk: 16 additions in each lane before it is widened, so that sums round hardly
// more than double ones would;
// with 512 float channels side by side half a megabyte, which stays in the second-level cache.
template <class T>
constexpr int64_t kChunk = 16 * Vec<T>::size;

// ---- chunks ------------------------------------------------------------------------------------------------------

// A run of positions [begin, end) of each of the images [first, last).
struct Chunk {
  int64_t first, last, begin, end;
  int64_t count() const { return (last - first) * (end - begin); }
  bool is_as_large_as(const Chunk& other) const {
    return last - first == other.last - other.first && end - begin == other.end - other.begin;
  }
};

// How the batch x inner elements of a channel are cut: whole images together, or an image into parts. The same part of
// all images comes first, so that chunks of equal extent follow one another.
template <class T>
struct Chunks {
  int64_t batch, inner, images, length, groups, parts, count;

  explicit Chunks(const BatchNormShape& shape) : batch(shape.batch), inner(shape.inner) {
    images = max_of(1, kChunk<T> / max_of(inner, 1));
    parts = max_of(1, inner / kChunk<T>);
    length = round_up(ceil_div(max_of(inner, 1), parts), Vec<T>::size);
    parts = ceil_div(max_of(inner, 1), length);
    groups = ceil_div(batch, images);
    count = groups * parts;
  }
  Chunk operator[](int64_t i) const {
    const int64_t first = i % groups * images, begin = i / groups * length;
    return {first, min_of(first + images, batch), begin, min_of(begin + length, inner)};
  }
  // All elements, image by image.
  Chunk whole() const { return {0, batch, 0, inner}; }
  void write_counts(double* counts) const {
    for (int64_t i = 0; i < count; ++i) counts[i] = static_cast<double>((*this)[i].count());
  }
  // The number of the i-th chunk of images in memory order, in which threads have stretches alike and read on.
  int64_t in_memory_order(int64_t i) const { return i % parts * groups + i / parts; }
};

// ---- one chunk, positions side by side ------------------------------------------------------------------------------

// Calls body(offset, lanes) over a chunk of channel c, offsets into [batch][channels][inner].
template <class T, class Body>
DLKERNELS_INLINE void for_each_vector(const BatchNormShape& shape, const Chunk& chunk, int64_t c, Body&& body) {
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    const int64_t base = (n * shape.channels + c) * shape.inner;
    int64_t p = chunk.begin;
    for (; p + Vec<T>::size <= chunk.end; p += Vec<T>::size) body(base + p, Vec<T>::size);
    if (p < chunk.end) body(base + p, chunk.end - p);
  }
}

// Chunks of one channel that are summed side by side, so that no addition waits for the one before it.
constexpr int64_t kTogether = 4;

// Calls body(chunk, number) for every chunk in order, kTogether of equal extent at a time; number is a constant.
template <class T, class Body>
DLKERNELS_INLINE void for_each_group(const Chunks<T>& chunks, Body&& body) {
  for (int64_t i = 0; i < chunks.count;) {
    int64_t alike = 1;
    while (alike < kTogether && i + alike < chunks.count && chunks[i + alike].is_as_large_as(chunks[i])) ++alike;
    if (alike == kTogether) {
      body(i, std::integral_constant<int64_t, kTogether>());
      i += kTogether;
    } else {
      body(i, std::integral_constant<int64_t, 1>());
      ++i;
    }
  }
}

// `Count` sums over each of the chunks [first, first + Together) of channel c: add(sums, offset, count, chunk) adds one
// vector of positions to each sum. Both layouts call the same `add`, whose multiplications are explicit fma: left to
// the compiler, one layout would be contracted and the other not.
template <int64_t Together, int Count>
struct Totals {
  double of[Together][Count];
};
template <int64_t Together, int Count, class T, class Add>
DLKERNELS_INLINE Totals<Together, Count> sum_positions(const BatchNormShape& shape, const Chunks<T>& chunks,
                                                       int64_t first, int64_t c, Add&& add) {
  Vec<T> sums[Together][Count];
  int64_t offsets[Together];  // of each chunk from the first
  const Chunk chunk = chunks[first];
  for (int64_t k = 0; k < Together; ++k) {
    for (int s = 0; s < Count; ++s) sums[k][s] = Vec<T>::zero();
    const Chunk other = chunks[first + k];
    offsets[k] = (other.first - chunk.first) * shape.channels * shape.inner + other.begin - chunk.begin;
  }
  for_each_vector<T>(shape, chunk, c, [&](int64_t at, int64_t count) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < Together; ++k) {
      if (count == Vec<T>::size) {
        add(sums[k], at + offsets[k], Vec<T>::size, k);
        continue;
      }
      Vec<T> next[Count];
      for (int s = 0; s < Count; ++s) next[s] = sums[k][s];
      add(next, at + offsets[k], count, k);
      for (int s = 0; s < Count; ++s) sums[k][s] = select(first_lanes<T>(count), next[s], sums[k][s]);
    }
  });
  Totals<Together, Count> totals;
  for (int64_t k = 0; k < Together; ++k) {
    for (int s = 0; s < Count; ++s) totals.of[k][s] = reduce_add_wide(sums[k][s]);
  }
  return totals;
}

// ---- one chunk, channels side by side -------------------------------------------------------------------------------

// Channels summed at a time: their lanes stay in the first-level cache.
constexpr int64_t kRowChannels = 128;

// totals[c] = the sum over the lanes of sums[lane][c], in the order of reduce_add_wide.
template <class T>
inline void add_lanes(const T* sums, double* halves, int64_t channels, double* totals) {
  constexpr int64_t half = Vec<T>::size / 2;
  for (int64_t lane = 0; lane < half; ++lane) {
    const T *low = sums + lane * kRowChannels, *high = low + half * kRowChannels;
    double* out = halves + lane * kRowChannels;
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<double>(low[c]) + static_cast<double>(high[c]);
  }
  for (int64_t rest = half / 2; rest > 0; rest /= 2) {
    for (int64_t e = 0; e < rest * kRowChannels; e += VecD::size) {
      store(halves + e, load(halves + e) + load(halves + rest * kRowChannels + e));
    }
  }
  for (int64_t c = 0; c < channels; ++c) totals[c] = halves[c];
}

// The same with add(sums, offset, c, count), for every channel at once; totals holds Count x channels.
template <class T, int Count, class Add>
DLKERNELS_INLINE void sum_rows(const BatchNormShape& shape, const Chunk& chunk, double* totals, Add&& add) {
  constexpr int64_t lanes = Vec<T>::size, one_sum = lanes * kRowChannels;
  const Scratch<T> buffer(Count, one_sum);  // [sum][lane][channel]
  const Scratch<double> halves(lanes / 2 * kRowChannels);
  for (int64_t first = 0; first < shape.channels; first += kRowChannels) {
    const int64_t channels = min_of(kRowChannels, shape.channels - first);
    fill(buffer.data(), T(0), Count * one_sum);
    // Rows that a lane's sums take one after another, with the sums in registers between them.
    auto add_rows = [&](int64_t n, int64_t p, auto rows) {
      const int64_t row = (n * shape.inner + p) * shape.channels + first;
      T* lane = buffer.data() + (p - chunk.begin) % lanes * kRowChannels;
      auto add_vector = [&](int64_t c, int64_t count) {
        Vec<T> sums[Count];
        for (int s = 0; s < Count; ++s) sums[s] = load(lane + s * one_sum + c);
        for (int64_t r = 0; r < rows; ++r) add(sums, row + r * lanes * shape.channels + c, first + c, count);
        for (int s = 0; s < Count; ++s) store(lane + s * one_sum + c, sums[s]);
      };
      int64_t c = 0;
      for (; c + lanes <= channels; c += lanes) add_vector(c, lanes);
      if (c < channels) add_vector(c, channels - c);
    };
    constexpr int64_t kRows = 4;
    for (int64_t n = chunk.first; n < chunk.last; ++n) {
      int64_t p = chunk.begin;
      for (; p + kRows * lanes <= chunk.end; p += kRows * lanes) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          add_rows(n, p + lane, std::integral_constant<int64_t, kRows>());
        }
      }
      for (; p < chunk.end; ++p) add_rows(n, p, std::integral_constant<int64_t, 1>());
    }
    for (int s = 0; s < Count; ++s) {
      add_lanes(buffer.data() + s * one_sum, halves.data(), channels, totals + s * shape.channels + first);
    }
  }
}

// Calls body(offset, c, count) for every vector of channels of a chunk.
template <class T, class Body>
DLKERNELS_INLINE void for_each_row_vector(const BatchNormShape& shape, const Chunk& chunk, Body&& body) {
  const int64_t channels = shape.channels;
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    for (int64_t p = chunk.begin; p < chunk.end; ++p) {
      const int64_t row = (n * shape.inner + p) * channels;
      int64_t c = 0;
      for (; c + Vec<T>::size <= channels; c += Vec<T>::size) body(row + c, c, Vec<T>::size);
      if (c < channels) body(row + c, c, channels - c);
    }
  }
}

// ---- output that is larger than the caches -------------------------------------------------------------------------

constexpr int64_t kCachedBytes = 16 << 20;

// Whether outputs of these sizes at `output` are stored past the caches: they are large, and their vectors aligned.
template <class Scalar>
bool goes_past_cache(const BatchNormShape& shape, const Scalar* output) {
  using T = accumulate_t<Scalar>;
  const int64_t side_by_side = shape.channels_last ? shape.channels : shape.inner;
  return shape.batch * shape.channels * shape.inner * static_cast<int64_t>(sizeof(Scalar)) > kCachedBytes &&
         side_by_side % Vec<T>::size == 0 && reinterpret_cast<uintptr_t>(output) % kVectorBytes == 0;
}

template <class Scalar>
DLKERNELS_INLINE void store_output(Scalar* p, Vec<accumulate_t<Scalar>> value, int64_t count, bool past_cache) {
  past_cache ? store_past_cache(p, value) : store_lanes(p, value, count);
}

// ---- statistics ----------------------------------------------------------------------------------------------------

// a b + c, rounded alike wherever it is written: left to the compiler, a loop that it vectorises for one layout is
// fused and its twin for the other is not.
inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Mean of some elements, and the sum of their squared deviations from it.
struct Moments {
  double mean = 0, squares = 0;

  // From the sums of deviations, and of their squares, from `center`, which is nearly the mean.
  static Moments about(double center, double count, double deviations, double squares) {
    const double off = deviations / count, rest = multiply_add(-deviations, off, squares);
    return {center + off, rest < 0 ? 0.0 : rest};
  }
};

// Moments of a channel from those of its chunks, `stride` apart. One body for both layouts, so that it rounds alike.
__attribute__((noinline)) Moments merge_chunks(const double* counts, int64_t chunks, const Moments* parts,
                                               int64_t stride) {
  const double first = chunks > 0 ? parts[0].mean : 0.0;
  double count = 0, deviations = 0, squares = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    count += counts[i];
    deviations = multiply_add(counts[i], parts[i * stride].mean - first, deviations);
  }
  const double mean = first + deviations / count;
  for (int64_t i = 0; i < chunks; ++i) {
    const double off = parts[i * stride].mean - mean;
    squares += multiply_add(counts[i] * off, off, parts[i * stride].squares);
  }
  return {mean, squares};
}

// Moments of every chunk of one channel.
template <class Scalar, class T = accumulate_t<Scalar>>
void channel_moments(const BatchNormShape& shape, const Chunks<T>& chunks, const Scalar* x, int64_t c,
                     Moments* moments) {
  for_each_group(chunks, [&](int64_t first, auto together) {
    constexpr int64_t kChunks = together;
    T center[kChunks];
    auto add = [&](Vec<T>(&sums)[1], int64_t at, int64_t n, int64_t) { sums[0] += load_lanes(x + at, n); };
    auto add_deviation = [&](Vec<T>(&sums)[2], int64_t at, int64_t n, int64_t k) {
      const Vec<T> d = load_lanes(x + at, n) - Vec<T>(center[k]);
      sums[0] += d;
      sums[1] = fma(d, d, sums[1]);
    };
    const double count = static_cast<double>(chunks[first].count());
    const auto sums = sum_positions<kChunks, 1>(shape, chunks, first, c, add);
    for (int64_t k = 0; k < kChunks; ++k) center[k] = static_cast<T>(sums.of[k][0] / count);
    const auto about = sum_positions<kChunks, 2>(shape, chunks, first, c, add_deviation);
    for (int64_t k = 0; k < kChunks; ++k) {
      moments[first + k] = Moments::about(center[k], count, about.of[k][0], about.of[k][1]);
    }
  });
}

// Moments of every channel of one chunk.
template <class Scalar, class T = accumulate_t<Scalar>>
void chunk_moments(const BatchNormShape& shape, const Chunk& chunk, const Scalar* x, Moments* moments) {
  const int64_t channels = shape.channels;
  const Scratch<T> centers(channels);
  const Scratch<double> totals(2, channels);
  T* center = centers.data();
  double *deviations = totals.data(), *squares = deviations + channels;
  const double count = static_cast<double>(chunk.count());
  sum_rows<T, 1>(shape, chunk, totals.data(),
                 [&](Vec<T>(&sum)[1], int64_t at, int64_t, int64_t n) { sum[0] += load_lanes(x + at, n); });
  for (int64_t c = 0; c < channels; ++c) center[c] = static_cast<T>(totals.data()[c] / count);
  sum_rows<T, 2>(shape, chunk, totals.data(), [&](Vec<T>(&sums)[2], int64_t at, int64_t c, int64_t n) {
    const Vec<T> d = load_lanes(x + at, n) - load_lanes(center + c, n);
    sums[0] += d;
    sums[1] = fma(d, d, sums[1]);
  });
  for (int64_t c = 0; c < channels; ++c) moments[c] = Moments::about(center[c], count, deviations[c], squares[c]);
}

// ---- channels of very large numbers --------------------------------------------------------------------------------

// Whether a channel with these statistics needs more range than T has: differences from the mean, their squares and
// what these are divided by may not fit. Also where the statistics are no numbers, for that may come of it.
template <class T, class... Numbers>
bool is_extreme(Numbers... numbers) {
  constexpr double kLargest = 0x1p100;
  return sizeof(T) < sizeof(double) && !((__builtin_fabs(numbers) <= kLargest) && ...);
}

// What the center of a channel, its rounded mean, lacks; nothing where the mean is infinite, as it may be in
// evaluation.
template <class T>
double rounded_away(double mean) {
  const double rest = mean - static_cast<double>(static_cast<T>(mean));
  return rest == rest ? rest : 0.0;
}

// Calls body(offset) for every element of channel c, in the same order in both layouts.
template <class Body>
DLKERNELS_INLINE void for_each_element(const BatchNormShape& shape, int64_t c, Body&& body) {
  const int64_t step = shape.channels_last ? shape.channels : 1;
  for (int64_t n = 0; n < shape.batch; ++n) {
    const int64_t image = n * shape.channels * shape.inner + (shape.channels_last ? c : c * shape.inner);
    for (int64_t p = 0; p < shape.inner; ++p) body(image + p * step);
  }
}

template <class Scalar>
__attribute__((noinline)) Moments wide_moments(const BatchNormShape& shape, const Scalar* x, int64_t c) {
  const double count = static_cast<double>(shape.batch * shape.inner);
  double sum = 0, squares = 0;
  for_each_element(shape, c, [&](int64_t at) { sum += static_cast<double>(load_one(x + at)); });
  const double mean = sum / count;
  for_each_element(shape, c, [&](int64_t at) {
    const double d = static_cast<double>(load_one(x + at)) - mean;
    squares = multiply_add(d, d, squares);
  });
  return {mean, squares};
}

// ---- the affine map of a channel -----------------------------------------------------------------------------------

// y = (x - center) scale + offset, center being the rounded mean.
template <class T>
struct Affine {
  const T *weight, *bias;
  const double *mean, *variance;
  double eps;

  T center(int64_t c) const { return static_cast<T>(mean[c]); }
  double exact_scale(int64_t c) const {
    return (weight == nullptr ? 1.0 : static_cast<double>(weight[c])) / __builtin_sqrt(variance[c] + eps);
  }
  double shift(int64_t c) const { return bias == nullptr ? 0.0 : static_cast<double>(bias[c]); }
  T scale(int64_t c) const { return static_cast<T>(exact_scale(c)); }
  T offset(int64_t c) const {
    return static_cast<T>(multiply_add(-rounded_away<T>(mean[c]), exact_scale(c), shift(c)));
  }
};

template <class T>
DLKERNELS_INLINE Vec<T> normalized(Vec<T> x, Vec<T> center, Vec<T> scale, Vec<T> offset) {
  return fma(x - center, scale, offset);
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class Scalar>
struct Forward {
  using T = accumulate_t<Scalar>;
  const BatchNormForwardArgs& args;
  const BatchNormShape& shape = args.shape;
  const Scalar* x = static_cast<const Scalar*>(args.input);
  const Scalar* residual = static_cast<const Scalar*>(args.residual);
  double* mean = args.mean;
  double* variance = args.variance;
  Affine<T> affine{static_cast<const T*>(args.weight), static_cast<const T*>(args.bias), mean, variance, args.eps};
  Scalar* y = static_cast<Scalar*>(args.output);
  Chunks<T> chunks{shape};
  bool past_cache = goes_past_cache(shape, y);

  void keep(int64_t c, const double* counts, const Moments* parts, int64_t stride) const {
    const double count = static_cast<double>(shape.batch * shape.inner);
    Moments moments = merge_chunks(counts, chunks.count, parts, stride);
    if (is_extreme<T>(moments.mean, moments.squares / count)) moments = wide_moments(shape, x, c);
    mean[c] = moments.mean;
    variance[c] = moments.squares / count;
  }
  bool is_wide(int64_t c) const { return is_extreme<T>(mean[c], variance[c], affine.exact_scale(c)); }

  DLKERNELS_INLINE void write(int64_t at, int64_t count, Vec<T> center, Vec<T> scale, Vec<T> offset) const {
    Vec<T> out = normalized(load_lanes(x + at, count), center, scale, offset);
    if (residual != nullptr) out += load_lanes(residual + at, count);
    if (shape.activation != Activation::none) out = max(Vec<T>::zero(), out);
    if (shape.activation == Activation::relu6) out = min(Vec<T>(T(6)), out);
    store_output(y + at, out, count, past_cache);
  }

  // A channel in double.
  __attribute__((noinline)) void write_wide(int64_t c) const {
    const double factor = affine.exact_scale(c), shift = affine.shift(c);
    for_each_element(shape, c, [&](int64_t at) {
      double out = (static_cast<double>(load_one(x + at)) - mean[c]) * factor + shift;
      if (residual != nullptr) out += static_cast<double>(load_one(residual + at));
      if (shape.activation != Activation::none && out < 0) out = 0;  // NaN stays
      if (shape.activation == Activation::relu6 && out > 6) out = 6;
      store_one(y + at, static_cast<T>(out));
    });
  }

  void contiguous() const {
    const Scratch<double> counts(chunks.count);
    chunks.write_counts(counts.data());
    parallel_for(shape.channels, max_of(1, 4096 / max_of(shape.batch * shape.inner, 1)), [&](int64_t c) {
      if (shape.training) {
        const Scratch<Moments> parts(chunks.count);
        channel_moments(shape, chunks, x, c, parts.data());
        keep(c, counts.data(), parts.data(), 1);
      }
      if (is_wide(c)) return write_wide(c);
      const Vec<T> m = affine.center(c), s = affine.scale(c), b = affine.offset(c);
      for_each_vector<T>(shape, chunks.whole(), c, [&](int64_t at, int64_t count) { write(at, count, m, s, b); });
      finish_stores_past_cache();
    });
  }

  void channels_last() const {
    const Scratch<double> counts(chunks.count);
    chunks.write_counts(counts.data());
    const int64_t channels = shape.channels;
    const int64_t grain = max_of(1, 8192 / max_of(channels * kChunk<T>, 1));
    if (shape.training) {
      const Scratch<Moments> moments(chunks.count, channels);
      parallel_for(chunks.count, grain, [&](int64_t task) {
        const int64_t i = chunks.in_memory_order(task);
        chunk_moments(shape, chunks[i], x, moments.data() + i * channels);
      });
      parallel_for(channels, ceil_div(1024, max_of(chunks.count, 1)),
                   [&](int64_t c) { keep(c, counts.data(), moments.data() + c, channels); });
    }
    Scratch<T> constants(3, channels);
    T *centers = constants.data(), *scales = centers + channels, *offsets = scales + channels;
    bool any_wide = false;
    for (int64_t c = 0; c < channels; ++c) {
      centers[c] = affine.center(c), scales[c] = affine.scale(c), offsets[c] = affine.offset(c);
      any_wide |= is_wide(c);
    }
    parallel_for(chunks.count, grain, [&](int64_t task) {
      for_each_row_vector<T>(shape, chunks[chunks.in_memory_order(chunks.count - 1 - task)],
                             [&](int64_t at, int64_t c, int64_t count) {
                               write(at, count, load_lanes(centers + c, count), load_lanes(scales + c, count),
                                     load_lanes(offsets + c, count));
                             });
      finish_stores_past_cache();
    });
    if (!any_wide) return;
    parallel_for(channels, 1, [&](int64_t c) {
      if (is_wide(c)) write_wide(c);
    });
  }
};

// ---- backward ------------------------------------------------------------------------------------------------------

// What the gradient of one channel's input is made of: dx = a (g - mean_g - (x - center) b).
struct Slope {
  double a = 0, mean_g = 0, b = 0;
};

template <class Scalar>
struct Backward {
  using T = accumulate_t<Scalar>;
  const BatchNormBackwardArgs& args;
  const BatchNormShape& shape = args.shape;
  const Scalar* dy = static_cast<const Scalar*>(args.grad_output);
  const Scalar* x = static_cast<const Scalar*>(args.input);
  const Scalar* y = static_cast<const Scalar*>(args.output);
  const T* weight = static_cast<const T*>(args.weight);
  const double* mean = args.mean;
  const double* variance = args.variance;
  Affine<T> affine{weight, static_cast<const T*>(args.bias), mean, variance, args.eps};
  Scalar* dx = static_cast<Scalar*>(args.grad_input);
  Scalar* dresidual = static_cast<Scalar*>(args.grad_residual);
  T* dweight = static_cast<T*>(args.grad_weight);
  T* dbias = static_cast<T*>(args.grad_bias);
  Chunks<T> chunks{shape};
  double count = static_cast<double>(shape.batch * shape.inner);
  bool past_cache = goes_past_cache(shape, dx), residual_past_cache = goes_past_cache(shape, dresidual);

  // The gradient behind the activation, whose argument is argument(x); NaN lets it pass, as torch's activations do.
  template <class Argument>
  DLKERNELS_INLINE Vec<T> masked(int64_t at, int64_t n, Argument&& argument) const {
    const Vec<T> g = load_lanes(dy + at, n);
    if (shape.activation == Activation::none) return g;
    if (shape.activation == Activation::relu) {
      return select(load_lanes(y + at, n) <= Vec<T>::zero(), Vec<T>::zero(), g);
    }
    using Range = Relu6Range<Scalar>;
    const Vec<T> before = argument(load_lanes(x + at, n));
    const Vec<T> positive = select(before <= Vec<T>(T(Range::low)), Vec<T>::zero(), g);
    return select(Vec<T>(T(Range::high)) <= before, Vec<T>::zero(), positive);
  }
  // The same with the constants of n channels side by side.
  DLKERNELS_INLINE Vec<T> masked(int64_t at, int64_t n, const T* centers, const T* scales, const T* offsets) const {
    return masked(at, n, [&](Vec<T> value) {
      return normalized(value, load_lanes(centers, n), load_lanes(scales, n), load_lanes(offsets, n));
    });
  }
  T center(int64_t c) const { return affine.center(c); }
  // Whether T does not have the range of a channel, of which these are the sums.
  bool is_wide(int64_t c, double sum_g, double sum_gx) const {
    return is_extreme<T>(mean[c], variance[c], affine.exact_scale(c), sum_g, sum_gx);
  }

  // sum_gx is the sum of g (x - center).
  Slope finish(int64_t c, double sum_g, double sum_gx) const {
    const double invstd = 1.0 / __builtin_sqrt(variance[c] + args.eps);
    const double rest = rounded_away<T>(mean[c]);
    sum_gx = multiply_add(-rest, sum_g, sum_gx);
    if (dweight != nullptr) dweight[c] = static_cast<T>(sum_gx * invstd);
    if (dbias != nullptr) dbias[c] = static_cast<T>(sum_g);
    const double a = invstd * (weight == nullptr ? 1.0 : static_cast<double>(weight[c]));
    if (!shape.training) return {a, 0, 0};
    const double b = sum_gx / count * invstd * invstd;
    return {a, multiply_add(-rest, b, sum_g / count), b};
  }

  DLKERNELS_INLINE void write(int64_t at, int64_t n, Vec<T> g, Vec<T> center, Vec<T> a, Vec<T> mean_g, Vec<T> b) const {
    if (dresidual != nullptr) store_output(dresidual + at, g, n, residual_past_cache);
    if (dx == nullptr) return;
    if (!shape.training) return store_output(dx + at, a * g, n, past_cache);
    store_output(dx + at, a * fma(load_lanes(x + at, n) - center, -b, g - mean_g), n, past_cache);
  }

  // The gradient of one element of channel c behind the activation.
  double masked_one(int64_t at, int64_t c) const {
    const double g = static_cast<double>(load_one(dy + at));
    if (shape.activation == Activation::none) return g;
    if (shape.activation == Activation::relu) return static_cast<double>(load_one(y + at)) <= 0 ? 0.0 : g;
    using Range = Relu6Range<Scalar>;
    const double off = static_cast<double>(load_one(x + at)) - mean[c];
    const double before = off * affine.exact_scale(c) + affine.shift(c);
    return before <= Range::low || before >= Range::high ? 0.0 : g;
  }
  // A channel in double.
  __attribute__((noinline)) void differentiate_wide(int64_t c) const {
    const double middle = static_cast<double>(center(c));
    double sum_g = 0, sum_gx = 0;
    for_each_element(shape, c, [&](int64_t at) {
      const double g = masked_one(at, c);
      sum_g += g;
      sum_gx += g * (static_cast<double>(load_one(x + at)) - middle);
    });
    const Slope slope = finish(c, sum_g, sum_gx);
    for_each_element(shape, c, [&](int64_t at) {
      const double g = masked_one(at, c);
      if (dresidual != nullptr) store_one(dresidual + at, static_cast<T>(g));
      if (dx == nullptr) return;
      const double off = shape.training ? static_cast<double>(load_one(x + at)) - middle : 0.0;
      store_one(dx + at, static_cast<T>(slope.a * (g - slope.mean_g - off * slope.b)));
    });
  }

  void contiguous() const {
    parallel_for(shape.channels, max_of(1, 4096 / max_of(shape.batch * shape.inner, 1)), [&](int64_t c) {
      const Vec<T> m = center(c), scale = affine.scale(c), offset = affine.offset(c);
      auto argument = [&](Vec<T> value) { return normalized(value, m, scale, offset); };
      double sum_g = 0, sum_gx = 0;
      auto add_both = [&](Vec<T>(&sums)[2], int64_t at, int64_t n, int64_t) {
        const Vec<T> g = masked(at, n, argument);
        sums[0] += g;
        sums[1] = fma(g, load_lanes(x + at, n) - m, sums[1]);
      };
      for_each_group(chunks, [&](int64_t first, auto together) {
        const auto totals = sum_positions<together, 2>(shape, chunks, first, c, add_both);
        for (int64_t k = 0; k < together; ++k) sum_g += totals.of[k][0], sum_gx += totals.of[k][1];
      });
      if (is_wide(c, sum_g, sum_gx)) return differentiate_wide(c);
      const Slope slope = finish(c, sum_g, sum_gx);
      const Vec<T> a = static_cast<T>(slope.a), mean_g = static_cast<T>(slope.mean_g), b = static_cast<T>(slope.b);
      for_each_vector<T>(shape, chunks.whole(), c,
                         [&](int64_t at, int64_t n) { write(at, n, masked(at, n, argument), m, a, mean_g, b); });
      finish_stores_past_cache();
    });
  }

  void channels_last() const {
    const int64_t channels = shape.channels;
    Scratch<T> constants(3, channels);
    T *centers = constants.data(), *scales = centers + channels, *offsets = scales + channels;
    for (int64_t c = 0; c < channels; ++c) {
      centers[c] = center(c), scales[c] = affine.scale(c), offsets[c] = affine.offset(c);
    }
    Scratch<double> sums(2, max_of(chunks.count, 1), channels);
    parallel_for(chunks.count, 1, [&](int64_t task) {
      const int64_t i = chunks.in_memory_order(task);
      auto add_both = [&](Vec<T>(&sums)[2], int64_t at, int64_t c, int64_t n) {
        const Vec<T> g = masked(at, n, centers + c, scales + c, offsets + c);
        sums[0] += g;
        sums[1] = fma(g, load_lanes(x + at, n) - load_lanes(centers + c, n), sums[1]);
      };
      sum_rows<T, 2>(shape, chunks[i], sums.data() + 2 * i * channels, add_both);
    });
    Scratch<T> slopes(3, channels);
    Scratch<bool> wide(channels);
    T *a = slopes.data(), *mean_g = a + channels, *b = mean_g + channels;
    parallel_for(channels, ceil_div(4096, max_of(chunks.count, 1)), [&](int64_t c) {
      double sum_g = 0, sum_gx = 0;
      for (int64_t i = 0; i < chunks.count; ++i) {
        sum_g += sums[2 * i * channels + c];
        sum_gx += sums[(2 * i + 1) * channels + c];
      }
      wide[c] = is_wide(c, sum_g, sum_gx);
      const Slope slope = finish(c, sum_g, sum_gx);
      a[c] = static_cast<T>(slope.a), mean_g[c] = static_cast<T>(slope.mean_g), b[c] = static_cast<T>(slope.b);
    });
    parallel_for(chunks.count, 1, [&](int64_t task) {
      for_each_row_vector<T>(
          shape, chunks[chunks.in_memory_order(chunks.count - 1 - task)], [&](int64_t at, int64_t c, int64_t n) {
            write(at, n, masked(at, n, centers + c, scales + c, offsets + c), load_lanes(centers + c, n),
                  load_lanes(a + c, n), load_lanes(mean_g + c, n), load_lanes(b + c, n));
          });
      finish_stores_past_cache();
    });
    bool any_wide = false;
    for (int64_t c = 0; c < channels; ++c) any_wide |= wide[c];
    if (!any_wide) return;
    parallel_for(channels, 1, [&](int64_t c) {
      if (wide[c]) differentiate_wide(c);
    });
  }
};

// ---- launchers -----------------------------------------------------------------------------------------------------

template <template <class> class Pass, class Args>
void run(const Args& args) {
  dispatch(args.shape.dtype, [&](auto* type) {
    const Pass<std::remove_pointer_t<decltype(type)>> pass{args};
    args.shape.channels_last ? pass.channels_last() : pass.contiguous();
  });
}

void forward(const BatchNormForwardArgs& args) {
  run<Forward>(args);
}
void backward(const BatchNormBackwardArgs& args) {
  run<Backward>(args);
}

}  // namespace

BatchNormKernels batch_norm_kernels() {
  return {forward, backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
