// linear_kv_write: a product (product.cuh) of which each thread turns queries and keys, and writes
// keys and values into the cache. With norms, in heads of 128: 16 threads have a head of a row, and
// first add up its squares, in the order of kv_write.
//
// Bytes: those of the product, but keys and values are written once, to the cache. The positions
// and slots of the rows of x come into shared memory while the weights are on their way, and cos
// and sin before the sums are read. In a layer it stands for two launches; what it saves is the
// second's latency, some 2 us a layer where the product takes 26: a guess, not measured.
#include "product.cuh"

#include "dparallel/linear_steps.h"
#include "layer_math.cuh"

namespace dparallel::cuda {
namespace {

template <bool kNorms>
struct Written {
  static constexpr bool kPaired = true;
  static constexpr int kSlabs = kNorms ? 2 : 1;
  struct Ahead {
    float2 cos, sin;
  };
  struct Row {
    int32_t position, slot;  // slot < 0: not written
  };
  Pairs pairs;
  KvWriteArgs write;

  static __device__ __forceinline__ Row* rows() {
    DPARALLEL_SHARED(kept, Row[64]);
    return kept;
  }
  // The first of many barriers of the block makes them visible.
  __device__ __forceinline__ void keep(int64_t first_n, int count) const {
    const int n = static_cast<int>(threadIdx.x);
    if (n >= count) return;
    const int64_t slot = write.slot_mapping[first_n + n];
    rows()[n] = {static_cast<int32_t>(write.positions[first_n + n]),
                 slot < 0 ? -1 : static_cast<int32_t>(slot)};
  }
  __device__ __forceinline__ Ahead ahead(int n, int64_t row) const {
    const int pair = static_cast<int>(row) % pairs.half;
    const int64_t at = static_cast<int64_t>(rows()[n].position) * pairs.half + pair;
    return {*reinterpret_cast<const float2*>(write.cos + at),
            *reinterpret_cast<const float2*>(write.sin + at)};
  }
  // The sums of a head of one row of x, in its two slabs, from number `row` of the product on; all
  // threads have sums of queries or of keys, or none has.
  template <class T>
  __device__ __forceinline__ void norm(int64_t row, float (&sum)[2][4]) const {
    const int dim = 2 * pairs.half, head = static_cast<int>(row) / dim;
    const bool of_q = head < static_cast<int>(write.q_heads);
    if (head >= static_cast<int>(write.q_heads + write.k_layout.heads)) return;
    const auto* weight =
        static_cast<const typename T::Storage*>(of_q ? write.q_norm : write.k_norm);
    float squares[2];
#pragma unroll
    for (int slab = 0; slab < 2; ++slab) {
      float (&x)[4] = sum[slab];
#pragma unroll
      for (int i = 0; i < 4; i += 2) T::values(T::narrow(x[i], x[i + 1]), x[i], x[i + 1]);
      squares[slab] = sum_over(pair_squares(x[0], x[2]) + pair_squares(x[1], x[3]), 16);
    }
    const float by = norm_factor(squares[0] + squares[1], dim, write.eps);
#pragma unroll
    for (int slab = 0; slab < 2; ++slab)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        float (&x)[4] = sum[slab];
        const int in_head = static_cast<int>(row) - head * dim + slab * 32 + i / 2 * pairs.half;
        float w[2];
        T::values(*reinterpret_cast<const uint32_t*>(weight + in_head), w[0], w[1]);
        T::values(T::narrow(by * x[i], by * x[i + 1]), x[i], x[i + 1]);
        x[i] *= w[0];
        x[i + 1] *= w[1];
      }
  }
  // sum: the first numbers of two pairs, and the second.
  template <class T>
  __device__ __forceinline__ void put(const LinearArgs& args, int64_t first_n, int n, int64_t row,
                                      int, const float (&sum)[4], const Ahead& turn) const {
    using Storage = typename T::Storage;
    const auto q_heads = static_cast<int>(write.q_heads);
    const auto heads = static_cast<int>(write.k_layout.heads);
    const int dim = 2 * pairs.half, head = static_cast<int>(row) / dim;
    const int in_head = static_cast<int>(row) - head * dim;
    uint32_t first = T::narrow(sum[0], sum[1]), second = T::narrow(sum[2], sum[3]);
    if (head < q_heads + heads) {
      float a[2], b[2], x[2], y[2];
      T::values(first, a[0], a[1]);
      T::values(second, b[0], b[1]);
      rotate_pair(a[0], b[0], turn.cos.x, turn.sin.x, x[0], y[0]);
      rotate_pair(a[1], b[1], turn.cos.y, turn.sin.y, x[1], y[1]);
      first = T::narrow(x[0], x[1]);
      second = T::narrow(y[0], y[1]);
    }
    Storage* to;
    if (head < q_heads) {
      to = static_cast<Storage*>(args.out) + (first_n + n) * (q_heads * dim) + row;
    } else {
      const int32_t slot = rows()[n].slot;
      if (slot < 0) return;
      const bool of_keys = head < q_heads + heads;
      const CacheLayout& layout = of_keys ? write.k_layout : write.v_layout;
      const auto page_size = static_cast<uint32_t>(layout.page_size);
      const uint32_t page = static_cast<uint32_t>(slot) / page_size;
      const uint32_t place = static_cast<uint32_t>(slot) - page * page_size;
      to = static_cast<Storage*>(of_keys ? write.k_cache : write.v_cache) +
           layout.offset(page, place, head - q_heads - (of_keys ? 0 : heads)) + in_head;
    }
    *reinterpret_cast<uint32_t*>(to) = first;
    *reinterpret_cast<uint32_t*>(to + pairs.half) = second;
  }
};

ProductCut cut_for(const LinearKvWriteArgs& args) {
  const KvWriteArgs& write = args.write;
  const CacheLayout &k = write.k_layout, &v = write.v_layout;
  const bool norms = write.q_norm != nullptr;
  const bool fits =
      write.rotary_dim == k.head_dim && (norms ? k.head_dim == 128 : k.head_dim % 64 == 0) &&
      multiples_of_16(
          {write.k_cache, write.v_cache, write.cos, write.sin, write.q_norm, write.k_norm},
          {k.page_stride, k.head_stride, k.slot_stride, v.page_stride, v.head_stride,
           v.slot_stride},
          element_size(write.dtype));
  if (!fits) return {0, 1};
  return norms ? cut_of_pairs<Written<true>>(args.product, k.head_dim / 2)
               : cut_of_pairs<Written<false>>(args.product, k.head_dim / 2);
}

}  // namespace

int64_t linear_kv_write_scratch(const LinearKvWriteArgs& args) {
  return cut_for(args).height > 0 ? 0 : LinearKvWriteSteps::scratch(args);
}

int linear_kv_write(const LinearKvWriteArgs& args, const Workspace& workspace, void* stream) {
  if (const ProductCut cut = cut_for(args); cut.height > 0) {
    const Pairs pairs{static_cast<int32_t>(args.write.k_layout.head_dim / 2)};
    if (args.write.q_norm == nullptr)
      return product_of_pairs(args.product, Written<false>{pairs, args.write}, cut, stream);
    return product_of_pairs(args.product, Written<true>{pairs, args.write}, cut, stream);
  }
  const LinearKvWriteSteps steps(args, workspace.scratch);
  const auto product = args.product.scale != nullptr ? fp8_linear : linear;
  int code = product(steps.queries, stream);
  if (code == 0) code = product(steps.keys_values, stream);
  return code != 0 ? code : kv_write(steps.write, stream);
}

}  // namespace dparallel::cuda
