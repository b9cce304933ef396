// Independent chains of the multiply-adds that products of a type are taken in, in registers: as many as hide the
// latency of one, twice over. On matrix units a product counts once, however many products of its parts it is made of.
#include "arithmetic_rate.h"

#include "pairs.h"
#include "parallel.h"
#include "split.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int kChains = 12;
constexpr int64_t kTasks = 64;  // more than threads, so that every thread has the same share

// Emulated tiles serve no one's speed.
#if defined(__AMX_BF16__)
constexpr bool kTilesAreFast = true;
#else
constexpr bool kTilesAreFast = false;
#endif

template <class Factor>
accumulate_t<Factor> run_chains(int64_t task, int64_t repetitions) {
  using T = accumulate_t<Factor>;
  constexpr int64_t elements = Vec<T>::size * Step<Factor>::depth;
  Factor factors[elements];
  for (auto& factor : factors) store_one(&factor, T(task + 1));  // no two tasks alike, or one would be run for all
  const auto factor = Step<Factor>::load_right(factors);
  Vec<T> sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = T(c);
  for (int64_t r = 0; r < repetitions; ++r) {
    for (auto& sum : sums) sum = Step<Factor>::add(factor, factor, sum);
  }
  for (int c = 1; c < kChains; ++c) sums[0] += sums[c];
  return reduce_add(sums[0]);
}

template <class Scalar>
double run_vectors(int64_t repetitions) {
  using Factor = factor_t<Scalar>;
  using T = accumulate_t<Scalar>;
  const Scratch<T> results(kTasks);  // used, so that the chains are not left out
  parallel_for(kTasks, 1, [&](int64_t task) { results[task] = run_chains<Factor>(task, repetitions); });
  return 2.0 * kTasks * kChains * Vec<T>::size * Step<Factor>::depth * static_cast<double>(repetitions);
}

// Four sums of two left and two right tiles, as products have them.
template <int Planes>
double run_tiles(int64_t repetitions) {
  constexpr int64_t products = 4, tile_products = kTileHeight * kTileHeight * kTileDepth;
  parallel_for(kTasks, 1, [&](int64_t) {
    alignas(64) static constexpr bfloat16 zeros[kTileHeight][kTileDepth] = {};
    Tiles tiles;
    tiles.clear<0>(), tiles.clear<1>(), tiles.clear<2>(), tiles.clear<3>();
    tiles.load<4>(zeros, 64), tiles.load<5>(zeros, 64), tiles.load<6>(zeros, 64), tiles.load<7>(zeros, 64);
    for (int64_t r = 0; r < repetitions; ++r) {
      tiles.add_product<0, 4, 6>(), tiles.add_product<1, 4, 7>();
      tiles.add_product<2, 5, 6>(), tiles.add_product<3, 5, 7>();
    }
  });
  return 2.0 * kTasks * products * tile_products * static_cast<double>(repetitions) / detail::Terms<Planes>::count;
}

double multiply_add(DType dtype, int64_t repetitions) {
  double operations = 0;
  dispatch(dtype, [&](auto* type) {
    using Scalar = std::remove_pointer_t<decltype(type)>;
    if constexpr (kTilesAreFast && std::is_same_v<accumulate_t<Scalar>, float>) {
      operations = with_planes<Scalar>([&](auto planes) { return run_tiles<planes()>(repetitions); });
    } else {
      operations = run_vectors<Scalar>(repetitions);
    }
  });
  return operations;
}

}  // namespace

ArithmeticRateKernels arithmetic_rate_kernels() {
  return {multiply_add};
}

}  // namespace dlkernels::DLKERNELS_ISA
