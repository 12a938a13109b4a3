// Tensor cores, and copies into shared memory that run beside the arithmetic: the PTX instructions
// (sm_80 and later), and under DPARALLEL_CUDA_HOST functions that do the same.
//
// A warp multiplies A [16, 16] by B [16, 8], two 16-bit numbers to a register. With g = lane / 4
// and q = lane % 4 a lane holds, of row or column and the pair that starts at it:
//   A  a[0]: row g, 2q   a[1]: row g + 8, 2q   a[2]: row g, 2q + 8   a[3]: row g + 8, 2q + 8
//   B  b0: column g, rows 2q and 2q + 1        b1: column g, rows 2q + 8 and 2q + 9
//   C  c[0], c[1]: row g, 2q and 2q + 1        c[2], c[3]: row g + 8, the same columns
#pragma once

#include "device.cuh"

namespace dparallel::cuda {

#if defined(DPARALLEL_CUDA_HOST)

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cuda_host::mma(c, a, b0, b1, T::kBrain);
}

// Lane l gives the address of row l % 8 of matrix l / 8.
inline const char* gather_rows(const void* row) {
  const uint4 mine = cuda_host::load(static_cast<const uint4*>(row));
  return cuda_host::exchange(&mine, sizeof mine);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const unsigned g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const char* all = gather_rows(row);
  for (unsigned i = 0; i < 4; ++i)
    std::memcpy(&r[i], all + cuda_host::kLaneBytes * (8 * i + g) + 4 * q, 4);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const unsigned g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const char* all = gather_rows(row);
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned j = 0; j < 2; ++j)
      std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * j,
                  all + cuda_host::kLaneBytes * (8 * i + 2 * q + j) + 2 * g, 2);
}

// Four e4m3 numbers, the first in the lowest byte, as two pairs of T. NaN is for the caller to
// rule out.
template <class T>
void widen_e4m3(uint32_t bytes, uint32_t& first, uint32_t& second) {
  const auto value = [bytes](int i) { return e4m3_value(static_cast<uint8_t>(bytes >> 8 * i)); };
  first = T::narrow(value(0), value(1));
  second = T::narrow(value(2), value(3));
}

inline void copy_async(void* to, const void* from, bool there) {
  cuda_host::copy_later(to, there ? from : nullptr);
}
template <int kBytes>
void copy_async(void* to, const void* from, bool there) {
  copy_async(static_cast<char*>(to) + kBytes, static_cast<const char*>(from) + kBytes, there);
}
inline void commit_copies() { cuda_host::commit_copies(); }
inline void wait_for_copies() {
  cuda_host::commit_copies();
  cuda_host::finish_copies(0);
}
template <int kPending>
void wait_for_copies() {
  cuda_host::finish_copies(kPending);
}
template <class V>
V anew(V x) {
  return x;
}

#else

// c += a b, accumulated in float32.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#define DPARALLEL_MMA(type)                                                  \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (T::kBrain) DPARALLEL_MMA("bf16");
  else DPARALLEL_MMA("f16");
#undef DPARALLEL_MMA
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four matrices [8, 8] of 16-bit numbers, each row 16 bytes of shared memory: lane l gives the
// address of row l % 8 of matrix l / 8. r[i]: of matrix i, row g, columns 2q and 2q + 1;
// transposed: column g, rows 2q and 2q + 1.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The exponent of e4m3 in the place of T's, and then the difference of their biases multiplied in,
// which is exact, subnormal numbers included. Two bytes are extended by their signs to 16 bits each
// and shifted to where they belong; of the signs, and of bits that the other half shifted in, the
// mask leaves the upmost bit.
template <class T>
__device__ __forceinline__ void widen_e4m3(uint32_t bytes, uint32_t& first, uint32_t& second) {
  asm("prmt.b32 %0, %1, 0, 0x9180;" : "=r"(first) : "r"(bytes));
  asm("prmt.b32 %0, %1, 0, 0xb3a2;" : "=r"(second) : "r"(bytes));
  const uint32_t zero = 0x80008000u;
  if constexpr (T::kBrain) {
    first = first << 4 & 0x87f087f0u;
    second = second << 4 & 0x87f087f0u;
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(first) : "r"(0x7b807b80u), "r"(zero));  // 2^120
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(second) : "r"(0x7b807b80u), "r"(zero));
  } else {
    first = first << 7 & 0xbf80bf80u;
    second = second << 7 & 0xbf80bf80u;
    asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(first) : "r"(0x5c005c00u), "r"(zero));  // 2^8
    asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(second) : "r"(0x5c005c00u), "r"(zero));
  }
}

// Copies 16 bytes from global to shared memory, past the L1 cache, or zeros where not `there`: then
// `from` is not read. They have arrived once the thread has waited for its copies.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
// Copies the 16 bytes that are kBytes beyond both: no address is computed.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0+%3], [%1+%3], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(there ? 16 : 0), "n"(kBytes)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// The copies that the thread has begun since it last committed, perhaps none, become a group. It
// can wait for all but the last kPending groups.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// x, unknown to the compiler: numbers that follow from it are computed where they are needed, and
// not kept in registers from one step of a loop to the next.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <class V>
__device__ __forceinline__ V* anew(V* p) {
  asm volatile("" : "+l"(p));
  return p;
}

#endif

}  // namespace dparallel::cuda
