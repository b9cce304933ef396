// Operands laid out as the product micro-kernel reads them, widened to the type of the products on the way.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {

// A matrix of any strides: element (i, j) is data[i * row_stride + j * column_stride].
template <class Scalar>
struct Matrix {
  const Scalar* data;
  int64_t row_stride;
  int64_t column_stride;

  Matrix at(int64_t i, int64_t j) const {
    return {data + i * row_stride + j * column_stride, row_stride, column_stride};
  }
  Matrix transposed() const { return {data, column_stride, row_stride}; }
};

// destination[i] = source[i], widened, for `count` contiguous elements.
template <class Scalar>
inline void widen_row(const Scalar* source, int64_t count, accumulate_t<Scalar>* destination) {
  using T = accumulate_t<Scalar>;
  int64_t i = 0;
  for (; i + Vec<T>::size <= count; i += Vec<T>::size) store(destination + i, load(source + i));
  if (i < count) store(destination + i, load(source + i, count - i), count - i);
}

// destination[i] = source[i], rounded, for `count` contiguous elements.
template <class Scalar>
inline void narrow_row(const accumulate_t<Scalar>* source, int64_t count, Scalar* destination) {
  using T = accumulate_t<Scalar>;
  int64_t i = 0;
  for (; i + Vec<T>::size <= count; i += Vec<T>::size) store(destination + i, load(source + i));
  if (i < count) store(destination + i, load(source + i, count - i), count - i);
}

// sum[i] += addend[i]
template <class T>
inline void add_to(T* sum, const T* addend, int64_t count) {
  int64_t i = 0;
  for (; i + Vec<T>::size <= count; i += Vec<T>::size) store(sum + i, load(sum + i) + load(addend + i));
  if (i < count) store(sum + i, load(sum + i, count - i) + load(addend + i, count - i), count - i);
}

template <class T>
inline void fill(T* destination, T value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) destination[i] = value;
}

// `count` lanes on their way from one array to another: half types that stay what they are move as bits.
template <class Source, class Destination>
constexpr bool kMovesBits = sizeof(Source) == 2 && std::is_same_v<Source, Destination>;
template <class Source, class Destination>
DLKERNELS_INLINE Vec<accumulate_t<Source>> load_moved(const Source* p, int64_t count) {
  if constexpr (kMovesBits<Source, Destination>) {
    const HalfBits bits = count == VecF::size ? load_half_bits(p) : load_half_bits(p, count);
    return from_bits<float>(zero_extend(bits));
  } else {
    return load_lanes(p, count);
  }
}
template <class Source, class Destination>
DLKERNELS_INLINE void store_moved(Destination* p, Vec<accumulate_t<Source>> lanes, int64_t count) {
  if constexpr (kMovesBits<Source, Destination>) {
    const HalfBits bits = __builtin_convertvector(bits_of(lanes), HalfBits);
    count == VecF::size ? store_half_bits(p, bits) : store_half_bits(p, bits, count);
  } else {
    store_lanes(p, lanes, count);
  }
}

// destination[row_offset(j) + i] = source[i][j] for a block of rows x columns; source columns are contiguous. A strip
// of rows is read to its end before the next: more streams at a time are more than the prefetcher follows.
template <class Source, class Destination, class RowOffset>
inline void transpose_to_rows(const Source* source, int64_t source_row_stride, int64_t rows, int64_t columns,
                              Destination* destination, RowOffset&& row_offset) {
  using T = accumulate_t<Source>;
  constexpr int64_t lanes = Vec<T>::size;
  for (int64_t i = 0; i < rows; i += lanes) {
    const int64_t block_rows = min_of(lanes, rows - i);
    for (int64_t j = 0; j < columns; j += lanes) {
      const int64_t block_columns = min_of(lanes, columns - j);
      const Source* in = source + i * source_row_stride + j;
      Destination* out = destination + i;
      Vec<T> block[lanes];
      if (block_rows == lanes && block_columns == lanes) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r)
          block[r] = load_moved<Source, Destination>(in + r * source_row_stride, lanes);
        transpose_square(block);
#pragma GCC unroll 16
        for (int64_t c = 0; c < lanes; ++c) store_moved<Source>(out + row_offset(j + c), block[c], lanes);
        continue;
      }
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) {
        block[r] = r < block_rows ? load_moved<Source, Destination>(in + r * source_row_stride, block_columns)
                                  : Vec<T>::zero();
      }
      transpose_square(block);
#pragma GCC unroll 16
      for (int64_t c = 0; c < lanes; ++c) {
        if (c < block_columns) store_moved<Source>(out + row_offset(j + c), block[c], block_rows);
      }
    }
  }
}

// destination[j][i] = source[i][j].
template <class Source, class Destination>
inline void transpose(const Source* source, int64_t source_row_stride, int64_t rows, int64_t columns,
                      Destination* destination, int64_t destination_row_stride) {
  transpose_to_rows(source, source_row_stride, rows, columns, destination,
                    [=](int64_t j) { return j * destination_row_stride; });
}

// destination[i][k] = source(i, k): rows contiguous along the depth.
template <class Scalar>
inline void pack_rows(Matrix<Scalar> source, int64_t rows, int64_t depth, accumulate_t<Scalar>* destination,
                      int64_t destination_row_stride) {
  if (source.column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      widen_row(source.data + i * source.row_stride, depth, destination + i * destination_row_stride);
    }
  } else if (source.row_stride == 1) {
    transpose(source.data, source.column_stride, depth, rows, destination, destination_row_stride);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < depth; ++k) {
        destination[i * destination_row_stride + k] = load_one(source.at(i, k).data);
      }
    }
  }
}

}  // namespace dlkernels::DLKERNELS_ISA
