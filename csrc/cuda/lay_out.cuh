// Arrays laid out in a workspace as products read them: dense lines that begin at multiples of 16 bytes.
#pragma once

#include "cuda/numbers.cuh"

namespace dlkernels::DLKERNELS_ISA {

template <class Scalar>
constexpr int64_t whole_chunks(int64_t count) {
  return ceil_div(count, Pack<Scalar>::size) * Pack<Scalar>::size;
}

// Whether lines from `data`, `stride` numbers apart, begin at multiples of 16 bytes.
template <class Scalar>
bool is_aligned(const Scalar* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % Pack<Scalar>::size == 0;
}

// Element (b, l, g, p) is at b * batch_stride + l * line_stride + (g * length + p) * place_stride.
template <class Scalar>
struct Strided {
  const Scalar* data;
  int64_t batch, lines, groups, length;
  int64_t batch_stride, line_stride, place_stride;
};

inline constexpr int kLayOutThreads = 256, kLayOutSide = 32;

// A block lays out 32 lines x 32 places: lanes read along whichever is dense, and write along the line.
template <class Scalar>
__global__ void __launch_bounds__(kLayOutThreads, 1)
    lay_out_squares(Strided<Scalar> from, int64_t padded, Scalar* out) {
  constexpr int kSide = kLayOutSide, kWarps = kLayOutThreads / kWarpSize, kPitch = kSide + 1;
  const int64_t width = from.groups * padded;
  const int64_t place_blocks = ceil_div(width, kSide), line_blocks = ceil_div(from.lines, kSide);
  const int64_t first_place = blockIdx.x % place_blocks * kSide;
  const int64_t first_line = blockIdx.x / place_blocks % line_blocks * kSide;
  const int64_t batch = blockIdx.x / place_blocks / line_blocks;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const bool along_line = from.place_stride == 1;
  Scalar* square = shared_memory<Scalar>();  // [line][place]
  for (int i = warp; i < kSide; i += kWarps) {
    const int line_in = along_line ? i : lane, place_in = along_line ? lane : i;
    const int64_t line = first_line + line_in, place = first_place + place_in;
    const int64_t group = place / padded, in_group = place % padded;
    Scalar value{};
    if (line < from.lines && place < width && in_group < from.length) {
      value = from.data[batch * from.batch_stride + line * from.line_stride +
                        (group * from.length + in_group) * from.place_stride];
    }
    square[line_in * kPitch + place_in] = value;
  }
  __syncthreads();
  for (int i = warp; i < kSide; i += kWarps) {
    const int64_t line = first_line + i, place = first_place + lane;
    if (line < from.lines && place < width)
      out[(batch * from.lines + line) * width + place] = square[i * kPitch + lane];
  }
}

// [batch][lines][groups][length], with zeros after each length up to whole chunks.
template <class Scalar>
const Scalar* lay_out(const Strided<Scalar>& from) {
  const int64_t padded = whole_chunks<Scalar>(from.length), width = from.groups * padded;
  Scalar* out = workspace<Scalar>(from.batch, from.lines, width);
  launch({from.batch * ceil_div(from.lines, kLayOutSide) * ceil_div(width, kLayOutSide), kLayOutThreads,
          kLayOutSide * (kLayOutSide + 1) * sizeof(Scalar)},
         lay_out_squares<Scalar>, from, padded, out);
  return out;
}

// Lines of `length` numbers at multiples of 16 bytes: where they are, or laid out.
template <class Scalar>
struct Lines {
  const Scalar* data;
  int64_t stride;

  Lines(const void* from, int64_t count, int64_t length, int64_t line_stride, int64_t step = 1)
      : data(static_cast<const Scalar*>(from)), stride(line_stride) {
    if ((step == 1 || length <= 1) && is_aligned(data, stride)) return;
    data = lay_out(Strided<Scalar>{data, 1, count, 1, length, 0, stride, step});
    stride = whole_chunks<Scalar>(length);
  }
};

}  // namespace dlkernels::DLKERNELS_ISA
