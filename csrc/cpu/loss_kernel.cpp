// Compiled once per instruction set, as row_kernel.cpp is.
#include "loss_kernel.h"

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

// e^(d/Tc) and e^(d/T); the published T = Tc / 2 needs but one exponential.
struct Squared {
  static Pair exponentials(F d, const InverseTemperatures<float>& inverse) {
    const F e = exp_nonpositive(d * inverse.ce);
    return {e, e * e};
  }
};
struct Equal {
  static Pair exponentials(F d, const InverseTemperatures<float>& inverse) {
    const F e = exp_nonpositive(d * inverse.ce);
    return {e, e};
  }
};
struct Apart {
  static Pair exponentials(F d, const InverseTemperatures<float>& inverse) {
    return {exp_nonpositive(d * inverse.ce), exp_nonpositive(d * inverse.entropy)};
  }
};

// Calls body(Squared{}), body(Equal{}) or body(Apart{}).
template <class Body>
void of_temperatures(const InverseTemperatures<float>& inverse, Body body) {
  if (inverse.entropy == 2 * inverse.ce) body(Squared{});
  else if (inverse.entropy == inverse.ce) body(Equal{});
  else body(Apart{});
}

template <class T, class Temperatures>
void tile_stats(const typename T::Storage* z, int64_t first_id, int64_t count,
                const InverseTemperatures<float>& inverse, LossPart<double>& part) {
  const float top = tile_max<T>(z, count);
  if (top > part.max) {
    part.rescale(top, {inverse.ce, inverse.entropy});
    int64_t i = 0;
    while (clamp_logit(T::value(z[i])) != top) ++i;
    part.token = static_cast<int32_t>(first_id + i);
  }
  const F m = splat(part.token < 0 ? 0.0f : static_cast<float>(part.max));
  const F floor = splat(inverse.floor()), largest = splat(kLargest);
  F sum1{}, sum2{}, sum_t1{}, sum_t2{}, weighted1{}, weighted2{};
  const auto add = [&](F v, F& sum, F& sum_t, F& weighted) {
    const F d = maximum(floor, minimum(largest, v) - m);
    const Pair e = Temperatures::exponentials(d, inverse);
    sum += e.first;
    sum_t += e.second;
    weighted += e.second * d;
  };
  each_pair<T>(z, count, [&](Pair v) {
    add(v.first, sum1, sum_t1, weighted1);
    add(v.second, sum2, sum_t2, weighted2);
  });
  part.sum += reduce_add(sum1 + sum2);
  part.sum_t += reduce_add(sum_t1 + sum_t2);
  part.weighted_t += reduce_add(weighted1 + weighted2);
}

template <class T>
void stats(const RowSpan& span, const InverseTemperatures<float>& inverse, LossPart<double>& part) {
  const auto* row = static_cast<const typename T::Storage*>(span.row);
  of_temperatures(inverse, [&](auto temperatures) {
    for (int64_t id = span.begin; id < span.end; id += kTile)
      tile_stats<T, decltype(temperatures)>(
          row + id, id, span.end - id < kTile ? span.end - id : kTile, inverse, part);
  });
}

template <class T>
void gradient(const RowSpan& span, const LossGradient<float>& g, void* out) {
  using Storage = typename T::Storage;
  const auto* row = static_cast<const Storage*>(span.row);
  auto* target = static_cast<Storage*>(out);
  const F m = splat(g.max), floor = splat(g.inverse.floor()), largest = splat(kLargest);
  of_temperatures(g.inverse, [&](auto temperatures) {
    const auto of = [&](F v) {
      const F d = maximum(floor, minimum(largest, v) - m);
      const Pair e = decltype(temperatures)::exponentials(d, g.inverse);
      return e.first * g.ce + e.second * g.entropy * (d - g.mean);
    };
    int64_t i = span.begin;
    for (; i + kStep <= span.end; i += kStep) {
      const Pair v = T::widen(row + i);
      T::narrow({of(v.first), of(v.second)}, target + i);
    }
    if (i == span.end) return;
    Storage padded[kStep] = {};
    std::memcpy(padded, row + i, (span.end - i) * sizeof(Storage));
    const Pair v = T::widen(padded);
    T::narrow({of(v.first), of(v.second)}, padded);
    std::memcpy(target + i, padded, (span.end - i) * sizeof(Storage));
  });
}

}  // namespace

const LossKernel loss_kernel = {{stats<Float32>, stats<BFloat16>, stats<Float16>},
                                {gradient<Float32>, gradient<BFloat16>, gradient<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
