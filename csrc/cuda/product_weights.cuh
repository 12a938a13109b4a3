// The two kinds of weights of a product (product.cuh), in 16 and in 8 bits: how a line of them and
// of x lies in shared memory, and becomes the operands of multiplications.
#pragma once

#include "mma.cuh"

namespace dparallel::cuda {

constexpr int kPieces = 8;  // of 16 bytes, of a line

// Where piece p of row r of lines in shared memory lies: at p ^ turned(r). Eight rows' same piece,
// which ldmatrix reads at once, and four pieces of two rows, which eight lanes read as vectors, are
// then in eight groups of banks.
__device__ __forceinline__ int turned(int r) { return r % 2 * 4 + r / 2 % 4; }

// Weights of the dtype of x. A warp multiplies 16 of their rows by x, over its half of a line.
template <class T>
struct SixteenBits {
  using Weight = typename T::Storage;
  static constexpr int kNumbers = 8;          // of a piece
  static constexpr int kMultiplications = 2;  // over half of a line

  static __device__ __forceinline__ float value(Weight weight) { return T::value(weight); }
  // The left operands, of the 16 rows that lie at `rows`.
  static __device__ __forceinline__ void load(uint32_t (&a)[kMultiplications][4], const uint4* rows,
                                              int half) {
    const int lane = threadIdx.x % 32, row = lane % 16;
#pragma unroll
    for (int m = 0; m < kMultiplications; ++m)
      load_matrices(a[m], rows + row * kPieces + ((4 * half + 2 * m + lane / 16) ^ turned(row)));
  }
  // Where piece p of row n of x lies, of a line of the weights.
  static __device__ __forceinline__ int place(int n, int p) {
    return n * kPieces + (p ^ turned(n));
  }
  // The right operands.
  template <int kTiles>
  static __device__ __forceinline__ void load_x(uint32_t (&b)[kMultiplications][kTiles][2],
                                                const uint4* x, int half) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kMultiplications; ++m)
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        uint32_t r[4];
        load_matrices(r,
                      x + place(8 * (t + lane / 16) + lane % 8, 4 * half + 2 * m + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) b[m][t + i / 2][i % 2] = r[i];
      }
  }
};

// In e4m3. The order in which the inner dimension is summed is free: a lane reads 16 bytes of a row
// at once, which are its operands of four multiplications, and the 32 of each row of x.
template <class T>
struct EightBits {
  using Weight = uint8_t;
  static constexpr int kNumbers = 16;
  static constexpr int kMultiplications = 4;

  static __device__ __forceinline__ float value(Weight weight) { return e4m3_value(weight); }
  static __device__ __forceinline__ void load(uint32_t (&a)[kMultiplications][4], const uint4* rows,
                                              int half) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      memcpy(words[i], rows + (g + 8 * i) * kPieces + ((4 * half + q) ^ turned(g)), 16);
#pragma unroll
    for (int m = 0; m < kMultiplications; ++m) {
      widen_e4m3<T>(words[0][m], a[m][0], a[m][2]);
      widen_e4m3<T>(words[1][m], a[m][1], a[m][3]);
    }
  }
  static __device__ __forceinline__ int place(int n, int p) {
    return n * (2 * kPieces) + (p ^ n % 2);
  }
  template <int kTiles>
  static __device__ __forceinline__ void load_x(uint32_t (&b)[kMultiplications][kTiles][2],
                                                const uint4* x, int half) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t r[4];
        memcpy(r, x + place(8 * t + g, 2 * (4 * half + q) + i), 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) b[2 * i + j / 2][t][j % 2] = r[j];
      }
  }
};

}  // namespace dparallel::cuda
