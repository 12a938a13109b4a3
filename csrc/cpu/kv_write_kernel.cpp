// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
#include "kv_write_kernel.h"

#include <vector>

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

// A row of cos and sin for all of its heads, as vectors in the order of the halves of `widen`. Each
// product is rounded, as where torch computes them one by one.
template <class T>
struct Rotation {
  using Storage = typename T::Storage;

  int64_t half;  // pairs (i, i + half) turn, what follows them is copied
  std::vector<F> cos, sin;

  explicit Rotation(int64_t half) : half(half), cos(half / kStep * 2 + 2), sin(cos.size()) {}

  static void arrange(const float* from, int64_t count, std::vector<F>& to) {
    if constexpr (sizeof(Storage) == sizeof(float)) {
      if (count > 0) std::memcpy(to.data(), from, count * sizeof(float));
    } else {  // even ones, odd ones
      for (int64_t i = 0; i < count; ++i) to[i / kStep * 2 + i % 2][i % kStep / 2] = from[i];
    }
  }

  // One head from `in` to `out`, which may be `in`. weight: of its norm.
  template <bool kNormed>
  void turn(const Storage* in, Storage* out, int64_t dim, const Storage* weight, float eps) const {
    const F scale = kNormed ? norm_scale<T>(in, dim, eps) : F{};
    const auto load = [&](int64_t i, int64_t left, F& first, F& second) {
      const Pair v = load_step<T>(in + i, left);
      first = v.first, second = v.second;
      if constexpr (kNormed) {
        const Pair y = normed<T>(v, scale, load_step<T>(weight + i, left));
        first = T::round(y.first), second = T::round(y.second);
      }
    };
    for (int64_t i = 0; i < half; i += kStep) {
      const int64_t left = half - i, step = i / kStep * 2;
      F a, b, a2, b2;
      load(i, left, a, a2);
      load(i + half, left, b, b2);
      const F c = cos[step], c2 = cos[step + 1], s = sin[step], s2 = sin[step + 1];
      store_step<T>({product(a, c) - product(b, s), product(a2, c2) - product(b2, s2)}, out + i,
                    left);
      store_step<T>({product(b, c) + product(a, s), product(b2, c2) + product(a2, s2)},
                    out + i + half, left);
    }
    if (!kNormed && in == out) return;
    for (int64_t i = 2 * half; i < dim; i += kStep) {
      F first, second;
      load(i, dim - i, first, second);
      store_step<T>({first, second}, out + i, dim - i);
    }
  }
};

template <class T, bool kNormed>
void write(const KvWriteArgs& args, int64_t begin, int64_t end) {
  using Storage = typename T::Storage;
  const CacheLayout &keys = args.k_layout, &values = args.v_layout;
  const int64_t dim = keys.head_dim;
  const auto* q_norm = static_cast<const Storage*>(args.q_norm);
  const auto* k_norm = static_cast<const Storage*>(args.k_norm);
  Rotation<T> rotation(args.rotary_dim / 2);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t angles = args.positions[row] * rotation.half, slot = args.slot_mapping[row];
    rotation.arrange(args.cos + angles, rotation.half, rotation.cos);
    rotation.arrange(args.sin + angles, rotation.half, rotation.sin);
    auto* q = static_cast<Storage*>(args.q) + row * args.q_stride;
    for (int64_t i = 0; i < args.q_heads * dim; i += dim)
      rotation.template turn<kNormed>(q + i, q + i, dim, q_norm, args.eps);
    if (slot < 0) continue;
    const int64_t page = slot / keys.page_size, at = slot % keys.page_size;
    const auto* k = static_cast<const Storage*>(args.k) + row * args.k_stride;
    const auto* v = static_cast<const Storage*>(args.v) + row * args.v_stride;
    for (int64_t head = 0; head < keys.heads; ++head) {
      auto* key = static_cast<Storage*>(args.k_cache) + keys.offset(page, at, head);
      auto* value = static_cast<Storage*>(args.v_cache) + values.offset(page, at, head);
      rotation.template turn<kNormed>(k + head * dim, key, dim, k_norm, args.eps);
      std::memcpy(value, v + head * dim, dim * sizeof(Storage));
    }
  }
}

template <class T>
void rows(const KvWriteArgs& args, int64_t begin, int64_t end) {
  if (args.q_norm != nullptr) write<T, true>(args, begin, end);
  else write<T, false>(args, begin, end);
}

}  // namespace

extern const KvWriteKernel kv_write_kernel;
const KvWriteKernel kv_write_kernel{{rows<Float32>, rows<BFloat16>, rows<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
