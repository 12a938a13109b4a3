// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
#include "swiglu_kernel.h"

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

// z / (1 + e^-z), computed from e^-|z|, which cannot overflow; NaN at -inf, as F.silu has it.
inline F silu(F z) {
  const F d = (F)((U)z | 0x80000000u), floor = splat(kExpFloor);
  const F e = d < floor ? splat(0.0f) : exp_nonpositive(d < floor ? floor : d);
  return (z < splat(0.0f) ? z * e : z) / (1.0f + e);
}

template <class T>
void rows(const SwigluArgs& args, int64_t begin, int64_t end) {
  using Storage = typename T::Storage;
  const int64_t width = args.width;
  for (int64_t row = begin; row < end; ++row) {
    const auto* gate = static_cast<const Storage*>(args.gate) + args.gate_rows.offset(row);
    const auto* up = static_cast<const Storage*>(args.up) + args.up_rows.offset(row);
    auto* out = static_cast<Storage*>(args.out) + row * width;
    for (int64_t i = 0; i < width; i += kStep) {
      const int64_t left = width - i;
      const Pair g = load_step<T>(gate + i, left), u = load_step<T>(up + i, left);
      store_step<T>({T::round(silu(g.first)) * u.first, T::round(silu(g.second)) * u.second},
                    out + i, left);
    }
  }
}

}  // namespace

const SwigluKernel swiglu_kernel{{rows<Float32>, rows<BFloat16>, rows<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
