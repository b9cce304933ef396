// What Hopper (sm_90a) adds: barriers in shared memory that count threads and bytes, boxes of a matrix copied by one
// thread's order (TMA), and products that 128 threads start together and that read both operands from shared memory
// (wgmma). PTX ISA 8.0, sections on mbarrier, cp.async.bulk.tensor and wgmma.
//
// A box is 64 numbers of a half type wide, a line of 128 bytes, and lies in shared memory line by line; the eight
// chunks of 16 bytes of line i change places by i % 8 (the hardware's 128-byte swizzle), so a box begins at a multiple
// of 1024 bytes. Instructions are compiled for sm_90a alone; kernels on them do nothing elsewhere and are not called.
#pragma once

#if !defined(DLKERNELS_SIMT)
#include <cuda.h>
#endif

#include <cstdlib>

#include "cuda/mma.cuh"

#if defined(DLKERNELS_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DLKERNELS_HAS_HOPPER 1
#else
#define DLKERNELS_HAS_HOPPER 0
#endif

namespace dlkernels::DLKERNELS_ISA {

// Kernels on Hopper's own instructions were right on a device in every layout, but the suites have not passed there
// with them since tensor maps are encoded in autograd's threads too: they are used where DLKERNELS_HOPPER=1 asks for
// them.
inline bool uses_hopper() {
#if defined(DLKERNELS_SIMT)
  return ::simt::uses_hopper();
#else
  static const bool wanted = [] {
    const char* value = std::getenv("DLKERNELS_HOPPER");
    return value != nullptr && std::string(value) == "1";
  }();
  if (!wanted) return false;
  int device = 0, major = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major == 9;
#endif
}

inline constexpr int kGroupThreads = 128;                                         // that multiply together
inline constexpr int kGroupRows = 64, kGroupColumns = 128, kGroupStepDepth = 16;  // of one product of 128 threads
inline constexpr int kBoxLength = 64;                                             // numbers of a half type
inline constexpr int kBoxLineBytes = 128, kBoxAlignment = 1024, kBarrierBytes = 8;

// ---- matrices as the copying unit knows them -----------------------------------------------------------------------

struct BoxMap {
#if defined(DLKERNELS_SIMT)
  ::simt::BoxMap map;
#else
  CUtensorMap map;  // 128 bytes, at a multiple of 64
#endif
};

#if !defined(DLKERNELS_SIMT)
// The driver's function, found at run time so that nothing links the driver.
inline decltype(&cuTensorMapEncodeTiled) encode_function() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = {};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("CUDA: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}
#endif

// Boxes of `box_lines` lines of a matrix [lines][length], whose lines begin at multiples of 16 bytes. What lies beyond
// the matrix is zero.
template <class Scalar>
BoxMap map_boxes(const Scalar* data, int64_t lines, int64_t length, int64_t stride, int box_lines) {
  static_assert(sizeof(Scalar) == 2);
  BoxMap boxes = {};
#if defined(DLKERNELS_SIMT)
  boxes.map = {data, lines, length, stride * int64_t{sizeof(Scalar)}, box_lines};
#else
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(length), static_cast<cuuint64_t>(lines)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * sizeof(Scalar)};
  const cuuint32_t box[2] = {kBoxLength, static_cast<cuuint32_t>(box_lines)}, steps[2] = {1, 1};
  const CUtensorMapDataType type =
      std::is_same_v<Scalar, bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // The driver works in a thread's current context, which a thread that autograd has started may not have yet.
  int device = 0;
  check(cudaGetDevice(&device));
  check(cudaSetDevice(device));
  const CUresult result = encode_function()(&boxes.map, type, 2, const_cast<Scalar*>(data), sizes, strides, box, steps,
                                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("CUDA: cuTensorMapEncodeTiled refuses a matrix (" + std::to_string(result) + ")");
#endif
  return boxes;
}

#if DLKERNELS_HAS_HOPPER

// ---- addresses -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
#if defined(DLKERNELS_SIMT)
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - ::simt::current().shared);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#endif
}

// The first address from `shared` on where a box may begin.
__device__ __forceinline__ unsigned char* first_box(unsigned char* shared) {
  return shared + (kBoxAlignment - shared_address(shared) % kBoxAlignment) % kBoxAlignment;
}

// ---- barriers in shared memory -------------------------------------------------------------------------------------

// Opens, again and again, when `arrivals` threads have arrived and all bytes that were expected are there. Its phases
// are counted by their parity: the first has 0.
class MessageBarrier {
 public:
  __device__ __forceinline__ void initialize(int arrivals) {
#if defined(DLKERNELS_SIMT)
    ::simt::initialize_barrier(&state_, arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state_)), "r"(arrivals) : "memory");
#endif
  }
  // Makes initialized barriers known to the copying unit; a __syncthreads() makes them known to the other threads.
  __device__ __forceinline__ static void publish() {
#if !defined(DLKERNELS_SIMT)
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void arrive() {
#if defined(DLKERNELS_SIMT)
    ::simt::arrive(&state_, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state_)) : "memory");
#endif
  }
  // Arrives, and has the phase wait for copies too.
  __device__ __forceinline__ void arrive_expecting(int bytes) {
#if defined(DLKERNELS_SIMT)
    ::simt::arrive(&state_, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state_)), "r"(bytes)
                 : "memory");
#endif
  }
  // Waits for the end of the phase of this parity: at once where that is the last one.
#if defined(DLKERNELS_SIMT)
  void wait(unsigned parity, Where where = Where::current()) { ::simt::wait_for_phase(&state_, parity, where); }
#else
  __device__ __forceinline__ void wait(unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred open;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 open, [%0], %1;\n"
        "@open bra done;\n"
        "bra again;\n"
        "done:\n"
        "}\n" ::"r"(shared_address(&state_)),
        "r"(parity)
        : "memory");
  }
#endif

  // Orders the copy of a box, whose bytes the phase was told to expect.
  __device__ __forceinline__ void copy_box(void* shared, const BoxMap& boxes, int64_t line, int64_t along) {
#if defined(DLKERNELS_SIMT)
    ::simt::copy_box(shared, boxes.map, line, along, &state_);
#else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(shared)),
        "l"(&boxes.map), "r"(static_cast<int>(along)), "r"(static_cast<int>(line)), "r"(shared_address(&state_))
        : "memory");
#endif
  }

 private:
  uint64_t state_;
};
static_assert(sizeof(MessageBarrier) == kBarrierBytes);

// ---- registers, which the groups of a block share ------------------------------------------------------------------

// Called by all threads of a group; kCount registers remain to each, or become theirs.
template <int kCount>
__device__ __forceinline__ void give_registers_back() {
#if !defined(DLKERNELS_SIMT)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
#if !defined(DLKERNELS_SIMT)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// ---- products of boxes ---------------------------------------------------------------------------------------------

// Where an operand lies: boxes whose lines are rows (along the depth) or positions of the depth. Rows along the depth
// follow one another; along the rows, every 64 of them are a box of 64 lines.
template <bool kAlongDepth>
struct BoxOperand {
  uint64_t descriptor;

  __device__ __forceinline__ explicit BoxOperand(const void* shared) {
    constexpr uint64_t swizzle_128 = 1, eight_lines = 8 * kBoxLineBytes, box = 64 * kBoxLineBytes;
    descriptor = shared_address(shared) >> 4 | (box >> 4) << 16 | (eight_lines >> 4) << 32 | swizzle_128 << 62;
  }
  // The same, `step` products further along the depth and `bytes` further in memory.
  __device__ __forceinline__ uint64_t at(int step, int bytes = 0) const {
    constexpr int step_bytes = kAlongDepth ? kGroupStepDepth * 2 : kGroupStepDepth * kBoxLineBytes;
    return descriptor + static_cast<uint64_t>((step * step_bytes + bytes) >> 4);
  }
};

// Of 64 rows and 128 columns: thread t has, of row t / 32 * 16 + t % 32 / 4 and of the eighth after it, the pairs of
// columns that begin at 8 j + t % 4 * 2, in sums[4 j] and sums[4 j + 2].
struct GroupSums {
  float sums[64];
};

// Products up to the next commit are one batch. The sums and the operands are in use until their batch was waited for.
__device__ __forceinline__ void begin_products() {
#if !defined(DLKERNELS_SIMT)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void commit_products() {
#if defined(DLKERNELS_SIMT)
  ::simt::commit_products();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits for all batches but the last kBatches.
template <int kBatches>
__device__ __forceinline__ void wait_for_products() {
#if defined(DLKERNELS_SIMT)
  ::simt::wait_for_products(kBatches);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kBatches) : "memory");
#endif
}

// c += left right^T, one step deep.
template <class Scalar, bool kLeftAlongDepth, bool kRightAlongDepth>
__device__ __forceinline__ void multiply_boxes(GroupSums& c, uint64_t left, uint64_t right) {
#if defined(DLKERNELS_SIMT)
  ::simt::multiply_boxes(c.sums, left, right, kLeftAlongDepth, kRightAlongDepth,
                         [](uint16_t bits) -> float { return widen(Scalar{bits}); });
#else
  if constexpr (std::is_same_v<Scalar, bfloat16>) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, adds, 1, 1, %67, %68;\n}\n"
        : "+f"(c.sums[0]), "+f"(c.sums[1]), "+f"(c.sums[2]), "+f"(c.sums[3]), "+f"(c.sums[4]), "+f"(c.sums[5]),
          "+f"(c.sums[6]), "+f"(c.sums[7]), "+f"(c.sums[8]), "+f"(c.sums[9]), "+f"(c.sums[10]), "+f"(c.sums[11]),
          "+f"(c.sums[12]), "+f"(c.sums[13]), "+f"(c.sums[14]), "+f"(c.sums[15]), "+f"(c.sums[16]), "+f"(c.sums[17]),
          "+f"(c.sums[18]), "+f"(c.sums[19]), "+f"(c.sums[20]), "+f"(c.sums[21]), "+f"(c.sums[22]), "+f"(c.sums[23]),
          "+f"(c.sums[24]), "+f"(c.sums[25]), "+f"(c.sums[26]), "+f"(c.sums[27]), "+f"(c.sums[28]), "+f"(c.sums[29]),
          "+f"(c.sums[30]), "+f"(c.sums[31]), "+f"(c.sums[32]), "+f"(c.sums[33]), "+f"(c.sums[34]), "+f"(c.sums[35]),
          "+f"(c.sums[36]), "+f"(c.sums[37]), "+f"(c.sums[38]), "+f"(c.sums[39]), "+f"(c.sums[40]), "+f"(c.sums[41]),
          "+f"(c.sums[42]), "+f"(c.sums[43]), "+f"(c.sums[44]), "+f"(c.sums[45]), "+f"(c.sums[46]), "+f"(c.sums[47]),
          "+f"(c.sums[48]), "+f"(c.sums[49]), "+f"(c.sums[50]), "+f"(c.sums[51]), "+f"(c.sums[52]), "+f"(c.sums[53]),
          "+f"(c.sums[54]), "+f"(c.sums[55]), "+f"(c.sums[56]), "+f"(c.sums[57]), "+f"(c.sums[58]), "+f"(c.sums[59]),
          "+f"(c.sums[60]), "+f"(c.sums[61]), "+f"(c.sums[62]), "+f"(c.sums[63])
        : "l"(left), "l"(right), "r"(1), "n"(kLeftAlongDepth ? 0 : 1), "n"(kRightAlongDepth ? 0 : 1));
  } else {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, adds, 1, 1, %67, %68;\n}\n"
        : "+f"(c.sums[0]), "+f"(c.sums[1]), "+f"(c.sums[2]), "+f"(c.sums[3]), "+f"(c.sums[4]), "+f"(c.sums[5]),
          "+f"(c.sums[6]), "+f"(c.sums[7]), "+f"(c.sums[8]), "+f"(c.sums[9]), "+f"(c.sums[10]), "+f"(c.sums[11]),
          "+f"(c.sums[12]), "+f"(c.sums[13]), "+f"(c.sums[14]), "+f"(c.sums[15]), "+f"(c.sums[16]), "+f"(c.sums[17]),
          "+f"(c.sums[18]), "+f"(c.sums[19]), "+f"(c.sums[20]), "+f"(c.sums[21]), "+f"(c.sums[22]), "+f"(c.sums[23]),
          "+f"(c.sums[24]), "+f"(c.sums[25]), "+f"(c.sums[26]), "+f"(c.sums[27]), "+f"(c.sums[28]), "+f"(c.sums[29]),
          "+f"(c.sums[30]), "+f"(c.sums[31]), "+f"(c.sums[32]), "+f"(c.sums[33]), "+f"(c.sums[34]), "+f"(c.sums[35]),
          "+f"(c.sums[36]), "+f"(c.sums[37]), "+f"(c.sums[38]), "+f"(c.sums[39]), "+f"(c.sums[40]), "+f"(c.sums[41]),
          "+f"(c.sums[42]), "+f"(c.sums[43]), "+f"(c.sums[44]), "+f"(c.sums[45]), "+f"(c.sums[46]), "+f"(c.sums[47]),
          "+f"(c.sums[48]), "+f"(c.sums[49]), "+f"(c.sums[50]), "+f"(c.sums[51]), "+f"(c.sums[52]), "+f"(c.sums[53]),
          "+f"(c.sums[54]), "+f"(c.sums[55]), "+f"(c.sums[56]), "+f"(c.sums[57]), "+f"(c.sums[58]), "+f"(c.sums[59]),
          "+f"(c.sums[60]), "+f"(c.sums[61]), "+f"(c.sums[62]), "+f"(c.sums[63])
        : "l"(left), "l"(right), "r"(1), "n"(kLeftAlongDepth ? 0 : 1), "n"(kRightAlongDepth ? 0 : 1));
  }
#endif
}

#endif  // DLKERNELS_HAS_HOPPER

}  // namespace dlkernels::DLKERNELS_ISA
