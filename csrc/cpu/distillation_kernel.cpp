// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
#include "distillation_kernel.h"

#include <algorithm>

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

// Calls visit(z, t, z, t) with two vectors each of the `count` logits of student and teacher; the
// last ones are padded with -inf, which adds nothing.
template <class T, class Visit>
void each_two(const typename T::Storage* z, const typename T::Storage* t, int64_t count,
              Visit visit) {
  for (int64_t i = 0; i < count; i += kStep) {
    const Pair a = load_step<T>(z + i, count - i, T::kMinusInfinity);
    const Pair b = load_step<T>(t + i, count - i, T::kMinusInfinity);
    visit(a.first, b.first, a.second, b.second);
  }
}

struct Sums {
  F student{}, teacher{}, cross{};
  I student_ties{}, teacher_ties{};  // minus the number of logits that equal the maximum
};

inline int64_t count_of(I ties) {
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) count -= ties[i];
  return count;
}

// Adds a tile, relative to maxima not below any of its logits. kRisen: at least one of the maxima
// is in this tile, so that its terms are left out of the sums.
template <class T, bool kRisen>
void tile_sums(const typename T::Storage* z, const typename T::Storage* t, int64_t count,
               float inverse, bool student_risen, bool teacher_risen,
               DistillationPart<double>& part) {
  const auto reference = [](const SoftmaxPart<double>& of) {
    return splat(of.empty() ? 0.0f : static_cast<float>(of.max));
  };
  const F m = reference(part.student), n = reference(part.teacher), scale = splat(inverse);
  const F floor = splat(kExpFloor), largest = splat(kLargest), nothing = splat(kNothing);
  const auto add = [&](F vz, F vt, Sums& sums) {
    const F d = minimum(largest, vz) - m, e = minimum(largest, vt) - n, x = e * scale;
    F q = exp_nonpositive(maximum(floor, d * scale)), p = exp_nonpositive(maximum(floor, x));
    // An id with no probability from the teacher adds no term; one with a probability too small to
    // count adds 0, or NaN (0 * infinity) where the student gives it none.
    const F apart = e - (d < nothing ? splat(-kInfinity) : d);
    sums.cross += e < nothing ? F{} : (x < floor ? F{} : p) * apart;
    if (kRisen) {
      const I of_student = student_risen ? (I)(d == F{}) : I{};
      const I of_teacher = teacher_risen ? (I)(e == F{}) : I{};
      sums.student_ties += of_student;
      sums.teacher_ties += of_teacher;
      q = of_student ? F{} : q;
      p = of_teacher ? F{} : p;
    }
    sums.student += q;
    sums.teacher += p;
  };
  Sums first, second;
  each_two<T>(z, t, count, [&](F z1, F t1, F z2, F t2) {
    add(z1, t1, first);
    add(z2, t2, second);
  });
  part.student.sum += reduce_add(first.student + second.student);
  part.teacher.sum += reduce_add(first.teacher + second.teacher);
  part.cross += reduce_add(first.cross + second.cross);
  if (student_risen) part.student.sum += count_of(first.student_ties + second.student_ties) - 1;
  if (teacher_risen) part.teacher.sum += count_of(first.teacher_ties + second.teacher_ties) - 1;
}

template <class T>
void stats(const PairSpan& span, float inverse, DistillationPart<double>& part) {
  const auto* student = static_cast<const typename T::Storage*>(span.student);
  const auto* teacher = static_cast<const typename T::Storage*>(span.teacher);
  for (int64_t id = span.begin; id < span.end; id += kTile) {
    const int64_t count = std::min(span.end - id, kTile);
    const double z = tile_max<T>(student + id, count), t = tile_max<T>(teacher + id, count);
    const bool student_risen = z > part.student.max, teacher_risen = t > part.teacher.max;
    part.rebase(student_risen ? z : part.student.max, teacher_risen ? t : part.teacher.max,
                inverse);
    if (student_risen || teacher_risen)
      tile_sums<T, true>(student + id, teacher + id, count, inverse, student_risen, teacher_risen,
                         part);
    else tile_sums<T, false>(student + id, teacher + id, count, inverse, false, false, part);
  }
}

struct Probabilities {
  F student_max, teacher_max, student_share, teacher_share, inverse;

  explicit Probabilities(const DistillationRow<float>& row)
      : student_max(splat(row.student_max)),
        teacher_max(splat(row.teacher_max)),
        student_share(splat(row.student_share)),
        teacher_share(splat(row.teacher_share)),
        inverse(splat(row.inverse)) {}

  F of(F v, F max, F share) const {
    const F d = minimum(splat(kLargest), v) - max;
    return share * exp_nonpositive(maximum(splat(kExpFloor), d * inverse));
  }
  F q(F z) const { return of(z, student_max, student_share); }
  F p(F t) const { return of(t, teacher_max, teacher_share); }
};

inline F difference(F q, F p) { return q == p ? F{} : q - p; }  // see DistillationRow
inline F sign(F x) { return x > 0.0f ? splat(1.0f) : x < 0.0f ? splat(-1.0f) : F{}; }

template <class T>
void distance(const PairSpan& span, const DistillationRow<float>& row, DistancePart<double>& part) {
  const auto* student = static_cast<const typename T::Storage*>(span.student);
  const auto* teacher = static_cast<const typename T::Storage*>(span.teacher);
  const Probabilities of(row);
  for (int64_t id = span.begin; id < span.end; id += kTile) {
    F apart{}, above{}, below{};
    const auto add = [&](F z, F t) {
      const F q = of.q(z), d = difference(q, of.p(t)), s = sign(d);
      apart += s * d;
      above += (1.0f + s) * q;
      below += (1.0f - s) * q;
    };
    each_two<T>(student + id, teacher + id, std::min(span.end - id, kTile),
                [&](F z1, F t1, F z2, F t2) {
                  add(z1, t1);
                  add(z2, t2);
                });
    part.distance += reduce_add(apart);
    part.above += reduce_add(above);
    part.below += reduce_add(below);
  }
}

template <class T, bool kDistance>
void gradient_of(const PairSpan& span, const DistillationGradient<float>& g, void* out) {
  using Storage = typename T::Storage;
  const auto* student = static_cast<const Storage*>(span.student);
  const auto* teacher = static_cast<const Storage*>(span.teacher);
  auto* target = static_cast<Storage*>(out);
  const Probabilities of(g.row);
  const F kl = splat(g.kl), above = splat(g.above), same = splat(g.same), below = splat(g.below);
  const auto at = [&](F z, F t) {
    const F q = of.q(z), d = difference(q, of.p(t));
    return kDistance ? kl * d + q * (d > 0.0f ? above : d < 0.0f ? below : same) : kl * d;
  };
  for (int64_t i = span.begin; i < span.end; i += kStep) {
    const Pair z = load_step<T>(student + i, span.end - i);
    const Pair t = load_step<T>(teacher + i, span.end - i);
    store_step<T>({at(z.first, t.first), at(z.second, t.second)}, target + i, span.end - i);
  }
}

template <class T>
void gradient(const PairSpan& span, const DistillationGradient<float>& g, void* out) {
  if (g.above != 0.0f || g.below != 0.0f) gradient_of<T, true>(span, g, out);
  else gradient_of<T, false>(span, g, out);
}

}  // namespace

const DistillationKernel distillation_kernel = {
    {stats<Float32>, stats<BFloat16>, stats<Float16>},
    {distance<Float32>, distance<BFloat16>, distance<Float16>},
    {gradient<Float32>, gradient<BFloat16>, gradient<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
