// Linear layer.
//
//   forward    Y = X W^T + b        X [N, in], W [out, in]
//   backward   dX = dY W            dW = dY^T X            db = sum over n of dY
//
// All three products are a b^T with operands of some strides. Many rows take gemm (gemm.h): b is packed once, blocks of
// the result go to the threads, the bias is added and the result rounded as a block is finished. Packing reads and
// writes all of b; with few rows that is most of the work, so b is then read where it lies: by dot products along the
// depth (dots.h), or as the panels of the micro-kernel. Which of the two is the caller's choice and not that of the
// strides, so that strides never change a bit; operands that lie otherwise are copied.
//
// 2 N in out operations each; few rows cost the reading of W.
#include "linear.h"

#include "dots.h"
#include "gemm.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kFewRows = 8;
constexpr int64_t kSumRows = 8;          // rows summed before the sum is widened
constexpr int64_t kSumPart = 2048;       // rows of a task of sums
constexpr double kSerialWork = 1 << 16;  // multiply-adds below which threads cost more than they give

template <class Scalar>
class Product {
  using T = accumulate_t<Scalar>;
  using Factor = factor_t<Scalar>;

 public:
  explicit Product(const LinearProductArgs& args)
      : args_(args),
        a_{static_cast<const Scalar*>(args.a), args.a_row_stride, args.a_column_stride},
        b_{static_cast<const Scalar*>(args.b), args.b_row_stride, args.b_column_stride},
        bias_(static_cast<const Scalar*>(args.bias)),
        product_(static_cast<Scalar*>(args.product)) {}

  void run() const {
    const bool few = args_.rows <= kFewRows;
    if (few && args_.along_depth) {
      const Dense a(a_, args_.rows, args_.depth), b(b_, args_.columns, args_.depth);
      multiply_in_place(Vec<T>::size, [&](int64_t j, int64_t count, T* sums) {
        multiply_by_dots<Factor>(
            args_.rows, count, args_.depth, [&](int64_t i) { return a.rows.at(i, 0).data; }, b.rows.at(j, 0).data,
            b.rows.row_stride, sums, count);
      });
    } else if (few && std::is_same_v<Scalar, T>) {  // half types are widened by packing
      const Dense a(a_, args_.rows, args_.depth), b(b_.transposed(), args_.depth, args_.columns);
      multiply_in_place(kTileColumns<T>, [&](int64_t j, int64_t count, T* sums) {
        multiply_panel(a.rows, b.rows.at(0, j), count, sums);
      });
    } else {
      gemm<T>(args_.rows, args_.columns, args_.depth, a_, b_.transposed(),
              [this](int64_t i, int64_t j, int64_t count, const T* values) { finish(i, j, count, values); });
    }
  }

 private:
  // A matrix whose rows are contiguous: where it lies, or a copy.
  struct Dense {
    Scratch<Scalar> copy;
    Matrix<Scalar> rows;
    Dense(Matrix<Scalar> source, int64_t row_count, int64_t columns)
        : copy(source.column_stride == 1 ? 0 : row_count * columns), rows(source) {
      if (source.column_stride == 1) return;
      for (int64_t i = 0; i < row_count; ++i) {
        for (int64_t j = 0; j < columns; ++j) copy[i * columns + j] = *source.at(i, j).data;
      }
      rows = {copy.data(), columns, 1};
    }
  };

  // multiply(j, count, sums) writes columns [j, j + count) of all rows.
  template <class Multiply>
  void multiply_in_place(int64_t width, Multiply&& multiply) const {
    const int64_t panels = ceil_div(args_.columns, width);
    const double work = 1.0 * args_.rows * args_.columns * args_.depth;
    parallel_for(panels, work < kSerialWork ? panels : 1, [&](int64_t panel) {
      alignas(64) T sums[kFewRows * kTileColumns<T>];
      const int64_t j = panel * width, count = min_of(width, args_.columns - j);
      multiply(j, count, sums);
      for (int64_t i = 0; i < args_.rows; ++i) finish(i, j, count, sums + i * count);
    });
  }

  void multiply_panel(Matrix<Scalar> a, Matrix<Scalar> b, int64_t count, T* sums) const {
    if constexpr (std::is_same_v<Scalar, T>) {
      if (args_.depth == 0) fill(sums, T(0), args_.rows * count);
      for (int64_t k = 0; k < args_.depth; k += kDepthBlock) {
        multiply<T>(args_.rows, count, min_of(kDepthBlock, args_.depth - k), a.at(0, k).data, a.row_stride,
                    plain_panels(b.at(k, 0).data, b.row_stride), sums, count, k > 0);
      }
    }
  }

  void finish(int64_t i, int64_t j, int64_t count, const T* sums) const {
    Scalar* out = product_ + i * args_.columns + j;
    if (bias_ == nullptr) return narrow_row(sums, count, out);
    for (int64_t c = 0; c < count; c += Vec<T>::size) {
      const int64_t lanes = min_of(Vec<T>::size, count - c);
      store_lanes(out + c, load_lanes(sums + c, lanes) + load_lanes(bias_ + j + c, lanes), lanes);
    }
  }

  const LinearProductArgs& args_;
  Matrix<Scalar> a_, b_;
  const Scalar* bias_;
  Scalar* product_;
};

// out[0 .. count) = the sums of `rows` rows, in double, a run at a time.
template <class Scalar, class T = accumulate_t<Scalar>>
void sum_rows(Matrix<Scalar> values, int64_t rows, int64_t count, double* out) {
  fill(out, 0.0, count);
  for (int64_t first = 0; first < rows; first += kSumRows) {
    const int64_t end = min_of(rows, first + kSumRows);
    for (int64_t j = 0; j < count; j += Vec<T>::size) {
      const int64_t lanes = min_of(Vec<T>::size, count - j);
      Vec<T> sum = Vec<T>::zero();
      for (int64_t i = first; i < end; ++i) sum += load_lanes(values.at(i, j).data, lanes);
      T run[Vec<T>::size];
      store(run, sum);
      for (int64_t lane = 0; lane < lanes; ++lane) out[j + lane] += run[lane];
    }
  }
}

template <class Scalar>
void sum_columns(const LinearSumArgs& args) {
  using T = accumulate_t<Scalar>;
  constexpr int64_t width = 8 * Vec<T>::size;
  const Matrix<Scalar> values = {static_cast<const Scalar*>(args.values), args.row_stride, args.column_stride};
  const int64_t blocks = ceil_div(args.columns, width), parts = max_of(1, ceil_div(args.rows, kSumPart));
  Scratch<double> partial(parts, args.columns);
  const double work = 1.0 * args.rows * args.columns;
  parallel_for(blocks * parts, work < kSerialWork ? blocks * parts : 1, [&](int64_t task) {
    const int64_t i = task / blocks * kSumPart, j = task % blocks * width;
    const int64_t rows = min_of(kSumPart, args.rows - i), count = min_of(width, args.columns - j);
    double* sums = partial.data() + task / blocks * args.columns + j;
    if (values.column_stride == 1) return sum_rows(values.at(i, j), rows, count, sums);
    Scratch<T> row_major(rows, count);
    pack_rows(values.at(i, j), rows, count, row_major.data(), count);
    sum_rows(Matrix<T>{row_major.data(), count, 1}, rows, count, sums);
  });
  for (int64_t part = 1; part < parts; ++part) {
    add_to(partial.data(), partial.data() + part * args.columns, args.columns);
  }
  for (int64_t j = 0; j < args.columns; ++j) {
    store_one(static_cast<Scalar*>(args.sums) + j, static_cast<T>(partial[j]));
  }
}

void product(const LinearProductArgs& args) {
  if (args.rows == 0 || args.columns == 0) return;
  dispatch(args.dtype, [&](auto* type) { Product<std::remove_pointer_t<decltype(type)>>(args).run(); });
}

void sum(const LinearSumArgs& args) {
  if (args.columns == 0) return;
  dispatch(args.dtype, [&](auto* type) { sum_columns<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace

LinearKernels linear_kernels() {
  return {product, sum};
}

}  // namespace dlkernels::DLKERNELS_ISA
