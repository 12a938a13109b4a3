// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
#include "loss_kernel.h"

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

// e^(d/Tc) and e^(d/T) for d not below `floor`. Where T = Tc / 2, as published, the second is the
// square of the first.
using Inverse = InverseTemperatures<float>;
struct Squared {
  static float floor(const Inverse& inverse) { return 0.5f * kExpFloor / inverse.ce; }
  static Pair exponentials(F d, const Inverse& inverse) {
    const F e = exp_nonpositive(d * inverse.ce);
    return {e, e * e};
  }
};
struct Equal {
  static float floor(const Inverse& inverse) { return kExpFloor / inverse.ce; }
  static Pair exponentials(F d, const Inverse& inverse) {
    const F e = exp_nonpositive(maximum(splat(kExpFloor), d * inverse.ce));
    return {e, e};
  }
};
struct Apart {
  static float floor(const Inverse& inverse) { return inverse.floor(); }
  static Pair exponentials(F d, const Inverse& inverse) {
    const F least = splat(kExpFloor);
    return {exp_nonpositive(maximum(least, d * inverse.ce)),
            exp_nonpositive(maximum(least, d * inverse.entropy))};
  }
};

// Calls body(Squared{}), body(Equal{}) or body(Apart{}).
template <class Body>
void of_temperatures(const Inverse& inverse, Body body) {
  if (inverse.entropy == 2 * inverse.ce) body(Squared{});
  else if (inverse.entropy == inverse.ce) body(Equal{});
  else body(Apart{});
}

template <class T, class Temperatures>
void tile_stats(const typename T::Storage* z, int64_t first_id, int64_t count,
                const Inverse& inverse, LossPart<double>& part) {
  const float top = tile_max<T>(z, count);
  const bool risen = top > part.max;
  int64_t at = 0;  // the place of a new maximum in the tile
  if (risen) {
    part.rebase(top, {inverse.ce, inverse.entropy});
    while (clamp_logit(T::value(z[at])) != top) ++at;
    part.token = static_cast<int32_t>(first_id + at);
  }
  const F m = splat(part.token < 0 ? 0.0f : static_cast<float>(part.max));
  const F floor = splat(Temperatures::floor(inverse)), largest = splat(kLargest);
  const auto add = [&](F v, F& sum, F& sum_t, F& weighted) {
    const F d = maximum(floor, minimum(largest, v) - m);
    const Pair e = Temperatures::exponentials(d, inverse);
    sum += e.first;
    sum_t += e.second;
    weighted += e.second * d;
  };
  const auto sum_up = [&](const typename T::Storage* from, int64_t n) {
    F sum1{}, sum2{}, sum_t1{}, sum_t2{}, weighted1{}, weighted2{};
    each_pair<T>(from, n, [&](Pair v) {
      add(v.first, sum1, sum_t1, weighted1);
      add(v.second, sum2, sum_t2, weighted2);
    });
    part.sum += reduce_add(sum1 + sum2);
    part.sum_t += reduce_add(sum_t1 + sum_t2);
    part.weighted_t += reduce_add(weighted1 + weighted2);
  };
  if (!risen) return sum_up(z, count);
  sum_up(z, at);  // without the maximum's own term
  sum_up(z + at + 1, count - at - 1);
}

template <class T>
void stats(const RowSpan& span, const Inverse& inverse, LossPart<double>& part) {
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
  const F m = splat(g.max), largest = splat(kLargest);
  of_temperatures(g.inverse, [&](auto temperatures) {
    const F floor = splat(decltype(temperatures)::floor(g.inverse));
    const auto of = [&](F v) {
      const F d = maximum(floor, minimum(largest, v) - m);
      const Pair e = decltype(temperatures)::exponentials(d, g.inverse);
      return e.first * g.ce + e.second * g.entropy * (d - g.mean);
    };
    for (int64_t i = span.begin; i < span.end; i += kStep) {
      const Pair v = load_step<T>(row + i, span.end - i);
      store_step<T>({of(v.first), of(v.second)}, target + i, span.end - i);
    }
  });
}

}  // namespace

const LossKernel loss_kernel = {{stats<Float32>, stats<BFloat16>, stats<Float16>},
                                {gradient<Float32>, gradient<BFloat16>, gradient<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
