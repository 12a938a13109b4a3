// block_attention on tensor cores; block_attention.cu says why it is cut as it is, and its limits.
#pragma once

#include <type_traits>

#include "attention_work.cuh"
#include "cluster.cuh"
#include "mma.cuh"

namespace dparallel::cuda {
namespace {

template <int kDim>
struct TensorShared {
  static constexpr int kPadded = kDim + 8;  // so that eight rows' elements are in different banks
  // Of a warp's 16 rows by its slots: the weighted sum of values, and then the score that weights
  // are relative to and their sum.
  using Sums = float[16 * kWarps][kPadded];
  union alignas(16) {
    struct {
      uint16_t step[2][2 * kStep * kDim];  // keys, values
      uint16_t query[kTallRows * kDim];
    };
    Sums sums;  // when all steps are done
  };
  // Of a launch whose segments have no more rows: where all tiles are short they need no more
  // queries.
  static LargeShared of_launch(int longest) {
    constexpr size_t all = sizeof(TensorShared);
    constexpr size_t spared = sizeof(uint16_t) * (kTallRows - kShortRows) * kDim;
    return {longest <= kShortRows ? all - spared : all, all};
  }
};

template <class T, int kDim>
struct Steps {
  static constexpr int kChunks = kDim / 8, kTile = kStep * kDim;
  static constexpr int kLanes = 8;                   // share a row: a line of 128 bytes at a time
  static constexpr int kAtOnce = kThreads / kLanes;  // rows, a multiple of 8

  // A row of shared memory is kDim elements, in chunks of 16 bytes. Chunk c of row r lies at
  // c ^ r % 8: eight rows' same chunk, which ldmatrix reads at once, is in eight groups of banks.
  static __device__ __forceinline__ int chunk(int row, int c) {
    return row * kDim + (c ^ row % 8) * 8;
  }
  // The chunk 2k further on: every fourth of them is no new address to keep.
  static __device__ __forceinline__ int across(int chunk, int k) {
    return (chunk ^ 16 * (k % 4)) + 64 * (k / 4);
  }

  // Begins to copy the queries: zeros beyond the tile's rows, and beyond head_dim.
  static __device__ __forceinline__ void copy_queries(const Work& work, uint16_t* to) {
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    const int dim = static_cast<int>(work.args.k_layout.head_dim);
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x / kLanes); r < work.cut.tile_rows; r += kAtOnce) {
      const bool there = r < work.rows;
      const uint16_t* from = static_cast<const uint16_t*>(work.args.q) +
                             work.query(work.first + (there ? r : 0)) + lane * 8;
      copy_row(to + chunk(r, lane), from, there && lane * 8 < dim,
               there && (lane + kLanes) * 8 < dim);
    }
  }

  // Begins to copy the slots [slot, slot + kStep) of the split: zeros beyond its end, and beyond
  // head_dim.
  static __device__ __forceinline__ void copy(const Work& work, int slot, uint16_t* to) {
    const int dim = static_cast<int>(work.args.k_layout.head_dim);
    const auto t = static_cast<unsigned>(anew(static_cast<int>(threadIdx.x)));
    const int lane = static_cast<int>(t % kLanes), row = static_cast<int>(t / kLanes);
    const uint16_t *keys[kRows], *values[kRows];  // their pages are looked up together
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int s = slot + row + i * kAtOnce;
      const Work::Place from = work.place_of(s < work.end ? s : work.end - 1);
      keys[i] = work.keys<uint16_t>() + lane * 8 + from.key;
      values[i] = work.values<uint16_t>() + lane * 8 + from.value;
    }
    to += chunk(row, lane);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool there = slot + row + i * kAtOnce < work.end;
      const bool near = there && lane * 8 < dim, far = there && (lane + kLanes) * 8 < dim;
      copy_row(to + i * kAtOnce * kDim, keys[i], near, far);
      copy_row(to + i * kAtOnce * kDim + kTile, values[i], near, far);
    }
  }

 private:
  static constexpr int kRows = kStep / kAtOnce;

  // A thread's chunks of a row.
  static __device__ __forceinline__ void copy_row(uint16_t* to, const uint16_t* from, bool near,
                                                  bool far) {
    static_assert(kChunks <= 2 * kLanes, "");
    copy_async<0>(to, from, near);
    if constexpr (kChunks > kLanes) copy_async<16 * kLanes>(to, from, far);
  }
};

// A warp's 16 rows and their softmax so far, over the slots that are the warp's.
template <class T, int kDim, bool kRestricted>
struct Rows {
  using S = Steps<T, kDim>;
  static constexpr int kDepth = kDim / 16;
  static constexpr int kKeys = 32;  // at a time
  // A row's sums are made relative to a larger score only when it is larger by a factor of
  // 2^kSlack: weights stay below that, of which 16 bits make no more than of 1.
  static constexpr float kSlack = 8.0f;

  uint32_t query[kDepth][4];
  float out[kDim / 8][4] = {};
  // Of rows g and g + 8. top: in units of log 2. sum: of this lane.
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {};

  __device__ __forceinline__ void load(const uint16_t* queries) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int at = S::chunk(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) load_matrices(query[k], queries + S::across(at, k));
  }

  // Takes kKeys slots, whose keys are at `step`: `left` of them are seen; in a restricted launch
  // the bits `seen` are, by rows g and g + 8, and the bits `bad` have values that are not finite.
  // factor: of scores, to units of log 2.
  __device__ __forceinline__ void attend(const uint16_t* step, int left, float factor,
                                         const uint32_t (&seen)[2], uint32_t bad) {
    const auto t = static_cast<unsigned>(anew(static_cast<int>(threadIdx.x)));
    const int lane = static_cast<int>(t % 32), q = static_cast<int>(t % 4);
    // Of the row that the lane names to ldmatrix. Its chunk c + 2k is then at `across(this, k)`.
    const int key = S::chunk(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const int value = S::kTile + S::chunk(lane % 16, lane / 16);
    float score[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];  // keys 16n ... 16n + 7 by dims 16k ... 16k + 15, then the next eight keys
        load_matrices(b, step + S::across(key, k) + 16 * n * kDim);
        mma<T>(score[2 * n], query[k], b[0], b[1]);
        mma<T>(score[2 * n + 1], query[k], b[2], b[3]);
      }
    if constexpr (kRestricted) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int slot = 8 * n + 2 * q + i % 2;
          if (slot >= left || !(seen[i / 2] >> slot & 1)) score[n][i] = -kInfinity;
        }
#pragma unroll
      for (int half = 0; half < 2; ++half)  // the values themselves are zeros by now
        if (seen[half] & bad) sum[half] = __builtin_nanf("");
    } else if (left < kKeys) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * n + 2 * q + i % 2 >= left) score[n][i] = -kInfinity;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float now = -kInfinity;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)  // ignores NaN
        now = fmaxf(now, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      now = largest_of(now, 4) * factor;
      if (now > top[half] + kSlack) {
        const float kept = weight_of(top[half], now, 1.0f);
        top[half] = now;
        sum[half] *= kept;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          out[d][2 * half] *= kept;
          out[d][2 * half + 1] *= kept;
        }
      }
      const float base = top[half] == -kInfinity ? 0.0f : top[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          score[n][i] = exp2_fast(score[n][i] * factor - base);
          sum[half] += score[n][i];
        }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t a[4];  // a lane's scores of C are, two keys to a register, its part of A
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = T::narrow(score[2 * n + i / 2][i % 2 * 2], score[2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        uint32_t b[4];  // dims 16d ... 16d + 7 by keys 16n ... 16n + 15, then the next eight dims
        load_matrices_transposed(b, step + S::across(value, d) + 16 * n * kDim);
        mma<T>(out[2 * d], a, b[0], b[1]);
        mma<T>(out[2 * d + 1], a, b[2], b[3]);
      }
    }
  }

  // Writes the warp's part into 16 rows of the sums.
  __device__ __forceinline__ void store(float (*to)[TensorShared<kDim>::kPadded]) const {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* row = to[8 * half + g];
      const float total = sum_of(sum[half], 4);
      if (q == 0) {
        row[kDim] = top[half];
        row[kDim + 1] = total;
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        row[8 * n + 2 * q] = out[n][2 * half];
        row[8 * n + 2 * q + 1] = out[n][2 * half + 1];
      }
    }
  }
};

// Merges the warps' parts, which are in shared memory, into the output or into scratch.
template <class T, int kDim>
__device__ __forceinline__ void finish(const Work& work, typename TensorShared<kDim>::Sums& sums,
                                       float* scratch) {
  constexpr int kColumns = kDim / 4;
  const int dim = static_cast<int>(work.args.k_layout.head_dim);
  const int sharing = work.tall() ? 0 : 1;  // warps that share a row: 1 << sharing
  const bool clustered = work.clustered();
  const int own = static_cast<int>(blockIdx.x) & (work.shape.cluster - 1);
  const int parts = clustered ? work.cut.splits << sharing : 1 << sharing;
  const int first = clustered ? own - work.split : own;
  const int begin = clustered ? work.split : 0, step = clustered ? work.cut.splits : 1;
  if (clustered) cluster_barrier();
  else __syncthreads();
#pragma unroll 1
  for (int i = begin * kThreads + static_cast<int>(threadIdx.x); i < work.rows * kColumns;
       i += step * kThreads) {  // each CTA takes its share of the elements
    const int r = i / kColumns, d = i % kColumns * 4;
    const Merged<4, 8> merged(parts, 1.0f, [&](int p, float (&value)[4], float& top, float& sum) {
      const float* row = of_peer(sums[(p & sharing) * kShortRows + r],
                                 static_cast<unsigned>(first + (p >> sharing)));
      const uint4 four = *reinterpret_cast<const uint4*>(row + d);
      const uint2 about = *reinterpret_cast<const uint2*>(row + kDim);
      value[0] = from_bits(four.x);
      value[1] = from_bits(four.y);
      value[2] = from_bits(four.z);
      value[3] = from_bits(four.w);
      top = from_bits(about.x);
      sum = from_bits(about.y);
    });
    if (d >= dim) continue;
    if (clustered || work.cut.splits == 1) {
      auto* out = static_cast<typename T::Storage*>(work.args.out);
      store<T>(out + work.output(work.first + r) + d, merged.value, work.divisor(merged.sum));
      continue;
    }
    const Part part(work, scratch, work.place);
    store_stored<Float32>(part.values + r * dim + d, merged.value, true);
    if (d > 0) continue;
    part.tops[r] = merged.top;
    part.sums[r] = merged.sum;
  }
  if (clustered) leave_cluster();  // no CTA leaves while others read its memory
}

// Of kKeys slots of a step in shared memory, a bit for each whose values are not all finite. A row
// that does not see such a slot must not meet it as 0 * NaN.
template <class T, int kDim>
__device__ __forceinline__ uint32_t not_finite(const uint16_t* step, int from) {
  using S = Steps<T, kDim>;
  constexpr uint32_t kExponent = std::is_same<T, BFloat16>::value ? 0x7f80u : 0x7c00u;
  const int row = from + static_cast<int>(threadIdx.x % 32);
  bool bad = false;
#pragma unroll 1
  for (int c = 0; c < S::kChunks; ++c) {
    const uint4 eight = *reinterpret_cast<const uint4*>(step + S::kTile + S::chunk(row, c));
    for (const uint32_t two : {eight.x, eight.y, eight.z, eight.w})
      bad |= (two & kExponent) == kExponent || (two >> 16 & kExponent) == kExponent;
  }
  return __ballot_sync(kFullWarp, bad);
}

// Zeros in place of the values of `bad` slots of a step, by one warp.
template <class T, int kDim>
__device__ __forceinline__ void blank_values(uint16_t* step, int from, uint32_t bad) {
  using S = Steps<T, kDim>;
  const auto lane = threadIdx.x % 32;
  if (!(bad >> lane & 1)) return;
#pragma unroll 1
  for (int c = 0; c < S::kChunks; ++c)
    *reinterpret_cast<uint4*>(step + S::kTile + S::chunk(from + static_cast<int>(lane), c)) =
        uint4{0, 0, 0, 0};
}

template <class T, int kDim, bool kRestricted>
__global__ void __launch_bounds__(kThreads, kRestricted ? 2 : kTogether)
    block_attention_tensor_kernel(BlockAttentionArgs args, Shape shape, float* scratch) {
  using S = Steps<T, kDim>;
  DPARALLEL_LARGE_SHARED(shared, TensorShared<kDim>);
  wait_for_earlier();
  const int beyond = static_cast<int>(blockIdx.x) - shape.working;
  if (beyond >= 0) return write_blanks<typename T::Storage>(args, shape, beyond);
  const Work work(args, shape, static_cast<int>(blockIdx.x), true);
  if (work.rows == 0) return;
  S::copy_queries(work, shared.query);
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (work.start + i * kStep < work.end) S::copy(work, work.start + i * kStep, shared.step[i]);
    commit_copies();
  }
  Rows<T, kDim, kRestricted> rows;
  static_assert(kShortRows == rows.kKeys && kStep == 2 * rows.kKeys, "");
  // Two warps share a short tile's rows, and take every other kKeys slots of a step.
  const int warp = static_cast<int>(threadIdx.x / 32), row = warp * 16 & (work.cut.tile_rows - 1);
  const int begin = warp * 16 - row;  // 0, or kKeys for the second half of a short tile's warps
  const int stride = work.tall() ? rows.kKeys : kStep;
  const float factor = args.scale * kLog2e;
  wait_for_copies<1>();
  __syncthreads();  // everyone's copies are there
  rows.load(shared.query + row * kDim);
  int now = 0;  // the step's half of shared memory
  for (int slot = work.start; slot < work.end; slot += kStep, now ^= 1) {
    uint32_t bad[2] = {};  // of the step's halves
    if constexpr (kRestricted) {
      if (slot + kStep > work.base) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          bad[half] = not_finite<T, kDim>(shared.step[now], half * rows.kKeys);
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (warp == half) blank_values<T, kDim>(shared.step[now], half * rows.kKeys, bad[half]);
        __syncthreads();
      }
    }
    if (row < work.rows)  // the whole warp
#pragma unroll 1
      for (int from = begin; from < kStep && slot + from < work.end; from += stride) {
        uint32_t seen[2] = {};
        if constexpr (kRestricted) {
          const int own = work.first + row + static_cast<int>(threadIdx.x % 32 / 4);
          seen[0] = work.seen_of(own, slot + from);
          seen[1] = work.seen_of(own + 8, slot + from);
        }
        rows.attend(shared.step[now] + from * kDim, work.end - slot - from, factor, seen,
                    from == 0 ? bad[0] : bad[1]);
      }
    const int next = slot + 2 * kStep;
    if (next < work.end) {
      __syncthreads();  // everyone is done with the step
      S::copy(work, next, shared.step[now]);
    }
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();  // the next step's copies are there; or everyone is done with the last
  }
  rows.store(shared.sums + warp * 16);
  finish<T, kDim>(work, shared.sums, scratch);
}

}  // namespace
}  // namespace dparallel::cuda
