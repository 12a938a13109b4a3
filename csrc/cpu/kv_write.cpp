// kv_write on the CPU: rows in parallel. Norms are those of rms_norm, by its kernel: of the queries
// in place, of a row's keys into memory of the row's own.
#include <cstring>
#include <vector>

#include "dparallel/launch.h"
#include "parallel.h"
#include "rms_norm_kernel.h"
#include "stored.h"

namespace dparallel::cpu {
namespace {

// Rotates the first `width` numbers of one head; `in` may be `out`.
template <class T>
void rotate(const typename T::Storage* in, typename T::Storage* out, int64_t width,
            const float* cos, const float* sin) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = T::value(in[i]), b = T::value(in[i + half]);
    out[i] = T::narrowed(a * cos[i] - b * sin[i]);
    out[i + half] = T::narrowed(b * cos[i] + a * sin[i]);
  }
}

// Of `heads` heads, one after another; `in` may be `out`.
void norm(const KvWriteArgs& args, const void* in, void* out, int64_t heads, const void* weight) {
  const RowStrides rows{heads, 0, args.k_layout.head_dim};
  const RmsNormArgs norms{args.dtype, in,     nullptr, rows,     {1, 0, 0}, heads,
                          rows.inner, weight, nullptr, args.eps, nullptr,   out};
  rms_norm_kernel_in_use().rows[static_cast<int>(args.dtype)](norms, 0, heads);
}

template <class T>
void write(const KvWriteArgs& args, Parallel parallel) {
  using Storage = typename T::Storage;
  const CacheLayout &keys = args.k_layout, &values = args.v_layout;
  const int64_t dim = keys.head_dim, width = args.rotary_dim;
  run_parallel(parallel, args.count, [&](int64_t row) {
    const float* cos = args.cos + args.positions[row] * (width / 2);
    const float* sin = args.sin + args.positions[row] * (width / 2);
    auto* q = static_cast<Storage*>(args.q) + row * args.q_stride;
    if (args.q_norm != nullptr) norm(args, q, q, args.q_heads, args.q_norm);
    for (int64_t head = 0; head < args.q_heads; ++head)
      rotate<T>(q + head * dim, q + head * dim, width, cos, sin);
    if (args.slot_mapping[row] < 0) return;
    const int64_t page = args.slot_mapping[row] / keys.page_size,
                  at = args.slot_mapping[row] % keys.page_size;
    const auto* k = static_cast<const Storage*>(args.k) + row * args.k_stride;
    const auto* v = static_cast<const Storage*>(args.v) + row * args.v_stride;
    std::vector<Storage> normed;
    if (args.k_norm != nullptr) {
      normed.resize(keys.heads * dim);
      norm(args, k, normed.data(), keys.heads, args.k_norm);
      k = normed.data();
    }
    for (int64_t head = 0; head < keys.heads; ++head) {
      auto* key = static_cast<Storage*>(args.k_cache) + keys.offset(page, at, head);
      rotate<T>(k + head * dim, key, width, cos, sin);
      std::memcpy(key + width, k + head * dim + width, (dim - width) * sizeof(Storage));
      std::memcpy(static_cast<Storage*>(args.v_cache) + values.offset(page, at, head),
                  v + head * dim, dim * sizeof(Storage));
    }
  });
}

}  // namespace

void kv_write(const KvWriteArgs& args, Parallel parallel) {
  if (args.k_layout.head_dim == 0) return;  // an empty tensor has no address
  with_stored(args.dtype, [&](auto stored) { write<decltype(stored)>(args, parallel); });
}

}  // namespace dparallel::cpu
