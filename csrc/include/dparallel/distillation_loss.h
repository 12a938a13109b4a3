// The divergence of a student's row q = softmax(z / T) from its teacher's p = softmax(t / T):
//   D = a KL + b L1     KL = sum p (ln p - ln q)     L1 = sum |p - q|
// One read of both rows gives, with d = z - max z and e = t - max t,
//   Q = sum e^(d/T)   P = sum e^(e/T)   C = sum e^(e/T) (e - d)     KL = C / (T P) + ln Q - ln P
// The distance L1 takes a second read, only where b > 0:
//   L1 = sum |p - q|   A = sum (1 + s) q   B = sum (1 - s) q, with s = sign(q - p)
// The last read gives the gradient, where g is the gradient of D:
//   dz_j = g / T (a (q_j - p_j) + b q_j (s_j - sum s q))
//   s_j - sum s q = B where s_j is 1, -A where it is -1, (B - A) / 2 where it is 0
// Computed as A and B, s_j - sum s q keeps the small terms that the difference would lose to
// rounding in a confident row.
#pragma once

#include "dparallel/certainty_forcing_loss.h"

namespace dparallel {

// A logit that is this far below its row's maximum counts as -inf (probability 0): the -3e38 that
// some masks write, and any finite logit beside +inf. With all others, float32 sums stay finite.
constexpr float kNothing = -1e29f;

enum DistillationSaved : int {
  kSavedStudentMax = 0,
  kSavedTeacherMax,
  kSavedStudentShare,  // 1/Q
  kSavedTeacherShare,  // 1/P
  kSavedAbove,         // A
  kSavedBelow,         // B
  kDistillationSaved
};

// The sum of a softmax over part of a row, relative to max, without the maximum's own term, 1 (see
// LossPart).
template <class R>
struct SoftmaxPart {
  R max = -kInfinity;
  R sum = 0;

  DP_HD bool empty() const { return !(max > R(-kInfinity)); }  // no logit above -inf, NaN aside
  DP_HD R total() const { return empty() ? R(0) : R(1) + sum; }
  DP_HD RowError error() const {
    if (sum != sum) return kRowNan;
    return empty() ? kRowEmpty : kRowOk;
  }

  // Makes the sum relative to `to`, a maximum not below the old one, whose term is then left out.
  DP_HD void rebase(R to, R inverse) {
    if (to == max) return;
    if (!empty()) sum = floored_exponential((max - to) * inverse) * (R(1) + sum);
    else sum = sum == sum ? R(0) : sum;
    max = to;
  }

  DP_HD void merge(SoftmaxPart other, R inverse) {
    const R to = max > other.max ? max : other.max;
    const R own = max == other.max && !empty() ? R(1) : R(0);  // of two maxima one is left out
    rebase(to, inverse);
    other.rebase(to, inverse);
    sum += other.sum + own;
  }
};

// The sums over part of both rows. An id to which the teacher gives no probability has no term in
// `cross`. An id to which the teacher gives some and the student none makes `cross` infinite or NaN
// for good: the divergence is infinite, however small the teacher's probability is.
template <class R>
struct DistillationPart {
  SoftmaxPart<R> student, teacher;
  R cross = 0;  // C

  // `cross` of this part, relative to these maxima, which are not below its own.
  DP_HD R cross_at(R student_max, R teacher_max, R inverse) const {
    if (teacher.empty() || teacher.max - teacher_max < R(kNothing)) return R(0);
    const R e = teacher.max - teacher_max;
    const R d = student.empty() ? R(0) : student.max - student_max;
    if (d < R(kNothing)) return R(kInfinity);
    if (e * inverse < R(kExpFloor)) return cross - cross;  // probability 0: 0, or NaN if not finite
    return exponential(e * inverse) * (cross + teacher.total() * (e - d));
  }

  DP_HD void rebase(R student_max, R teacher_max, R inverse) {
    cross = cross_at(student_max, teacher_max, inverse);
    student.rebase(student_max, inverse);
    teacher.rebase(teacher_max, inverse);
  }

  DP_HD void merge(const DistillationPart& other, R inverse) {
    const R z = student.max > other.student.max ? student.max : other.student.max;
    const R t = teacher.max > other.teacher.max ? teacher.max : other.teacher.max;
    cross = cross_at(z, t, inverse) + other.cross_at(z, t, inverse);
    student.merge(other.student, inverse);
    teacher.merge(other.teacher, inverse);
  }

  // The error of row `row`, numbered 2 * row for the student's row and 2 * row + 1 for the
  // teacher's.
  DP_HD int64_t error(int64_t row, bool kl_counts) const {
    const RowError of_student = student.error(), of_teacher = teacher.error();
    if (of_student != kRowOk) return encode_error(2 * row, of_student);
    if (of_teacher != kRowOk) return encode_error(2 * row + 1, of_teacher);
    if (kl_counts && !(cross < R(kInfinity))) return encode_error(2 * row, kRowImpossible);
    return kNoError;
  }

  DP_HD R kl(R inverse) const {
    const R found = cross * inverse / teacher.total() + logarithm_of_one_and(student.sum) -
                    logarithm_of_one_and(teacher.sum);
    return found > R(0) ? found : R(0);
  }

  DP_HD void save(R* saved) const {
    saved[kSavedStudentMax] = student.max;
    saved[kSavedTeacherMax] = teacher.max;
    saved[kSavedStudentShare] = R(1) / student.total();
    saved[kSavedTeacherShare] = R(1) / teacher.total();
    saved[kSavedAbove] = saved[kSavedBelow] = R(0);
  }
};

template <class R>
struct DistancePart {
  R distance = 0;          // L1
  R above = 0, below = 0;  // A and B

  DP_HD void merge(const DistancePart& other) {
    distance += other.distance;
    above += other.above;
    below += other.below;
  }
};

// The probabilities q_j and p_j of a row whose sums are known.
template <class R>
struct DistillationRow {
  R student_max, teacher_max, student_share, teacher_share, inverse;

  DP_HD DistillationRow(const R* saved, R inverse)
      : student_max(saved[kSavedStudentMax]),
        teacher_max(saved[kSavedTeacherMax]),
        student_share(saved[kSavedStudentShare]),
        teacher_share(saved[kSavedTeacherShare]),
        inverse(inverse) {}

  DP_HD R probability(R z, R max, R share) const {
    return share * floored_exponential(((z > R(kLargest) ? R(kLargest) : z) - max) * inverse);
  }
  DP_HD R q(R z) const { return probability(z, student_max, student_share); }
  DP_HD R p(R t) const { return probability(t, teacher_max, teacher_share); }

  // q - p, exactly 0 where they are equal; a fused multiply-add, which rounds only one of the two
  // products, would leave a difference.
  DP_HD static R difference(R q, R p) { return q == p ? R(0) : q - p; }
  DP_HD static R sign(R q, R p) { return R((q > p) - (q < p)); }

  DP_HD void add_distance(R z, R t, DistancePart<R>& part) const {
    const R own = q(z), other = p(t), side = sign(own, other);
    part.distance += side * difference(own, other);
    part.above += (R(1) + side) * own;
    part.below += (R(1) - side) * own;
  }
};

// The gradient with respect to a row's student logits; exactly 0 where both rows are equal.
template <class R>
struct DistillationGradient {
  DistillationRow<R> row;
  R kl, above, same, below;  // the last three: L1's factor where q > p, q = p, q < p

  DP_HD DistillationGradient(const R* saved, R grad, double kl_weight, double l1_weight, R inverse)
      : row(saved, inverse), kl(grad * inverse * static_cast<R>(kl_weight)) {
    const R l1 = grad * inverse * static_cast<R>(l1_weight);
    above = l1 * saved[kSavedBelow];
    below = -l1 * saved[kSavedAbove];
    same = R(0.5) * (above + below);
  }

  DP_HD R of(R q, R p) const {
    return kl * DistillationRow<R>::difference(q, p) + q * (q > p ? above : q < p ? below : same);
  }
  DP_HD R at(R z, R t) const { return of(row.q(z), row.p(t)); }
};

}  // namespace dparallel
