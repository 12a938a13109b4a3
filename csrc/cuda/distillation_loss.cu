// distillation_loss: forward, a block sums a chunk of the student's row and of the teacher's, then
// a warp merges the chunks of a row; where the L1 distance counts, two launches more do the same
// with the probabilities, which are known by then. Backward, a block writes the gradient of a
// chunk. Rows that are not active cost a block that leaves at once (forward) or writes zeros
// (backward).
//
// Bytes: a pair of numbers is read once forward; read once and a gradient written once backward.
// That is 5.2 GB for 4096 rows of 126464 bfloat16 numbers, 1.2 ms at the 4.3 TB/s of an H200, and
// 2.1 GB more for the distance.
//
// Forward, a thread requests its 4 vectors of both rows at once and keeps them, as stored, in 32
// registers. The block finds both maxima, and only then are the exponentials summed: no sum is ever
// rescaled within a chunk. The own terms of the maxima are left out of the sums (see SoftmaxPart),
// by the threads that hold one, which take a longer way. Left for each pair of numbers are some 17
// instructions, where an H200's memory leaves time for 28.
//
// Measured on an H200, with the host's part of the launches: forward and backward of 4096 rows take
// 1.51 ms, 81 % of the bandwidth, and with the distance 2.16 ms, 79 %. Guesses, not measured
// against others: 4 vectors of each row and 4 blocks on an SM forward; 8 vectors, 2 of each row in
// flight, and 4 blocks backward; 256 threads.
#include "loss.cuh"

#include "dparallel/distillation_loss.h"

namespace dparallel::cuda {
namespace {

constexpr int kVectors = 4;  // of a chunk of each row, for each thread, all at once
constexpr int kBackwardVectors = 8;
constexpr int kInFlight = 2;  // of them at once, of each row
constexpr int kBlocks = 4;    // on an SM, at least

// +inf counts as the largest float; NaN stays.
template <class R>
__device__ __forceinline__ R capped(R z) {
  return z > R(kLargest) ? R(kLargest) : z;
}

// Adds up the same fields of all threads of a block; the sums are the first thread's. Called by
// every thread.
template <class R, int N>
__device__ __forceinline__ void add_up(R (&sums)[N]) {
  DPARALLEL_SHARED(of_warps, R[kWarps][N]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto add_all = [&](int most) {  // of lanes 0 ... 2 most - 1
    for (int offset = most; offset > 0; offset /= 2)
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += __shfl_xor_sync(kFullWarp, sums[i], offset);
  };
  add_all(16);
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < N; ++i) of_warps[warp][i] = sums[i];
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = of_warps[lane % kWarps][i];
  add_all(kWarps / 2);
}

enum Sum : int { kStudent = 0, kTeacher, kCross, kStudentTies, kTeacherTies, kSums };

template <class T, int kAtOnce>
__global__ void __launch_bounds__(kThreads, T::kWidth > 2 ? kBlocks : 1)
    distillation_sums_kernel(DistillationArgs args, DistillationPart<typename T::Real>* parts,
                             uint32_t chunks, typename T::Real scale) {
  using R = typename T::Real;
  using Own = Chunk<T, kVectors>;
  constexpr int W = T::kWidth;
  DPARALLEL_SHARED(tops, R[kWarps][2]);
  const Own chunk(chunks, args.student.vocab);
  if (!args.active[chunk.row]) return;
  uint4 student[kVectors], teacher[kVectors];
  chunk.template load<kAtOnce>(chunk.logits(args.student), student);
  chunk.template load<kAtOnce>(chunk.logits(args.teacher), teacher);

  const R own_z = largest<T, kVectors>(student), own_t = largest<T, kVectors>(teacher);
  R top_z = own_z, top_t = own_t;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    top_z = larger(top_z, __shfl_xor_sync(kFullWarp, top_z, offset));
    top_t = larger(top_t, __shfl_xor_sync(kFullWarp, top_t, offset));
  }
  if (threadIdx.x % 32 == 0) {
    tops[threadIdx.x / 32][0] = top_z;
    tops[threadIdx.x / 32][1] = top_t;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    top_z = larger(top_z, tops[w][0]);
    top_t = larger(top_t, tops[w][1]);
  }

  const bool no_student = top_z == R(-kInfinity), no_teacher = top_t == R(-kInfinity);
  const R m = no_student ? R(0) : capped(top_z), n = no_teacher ? R(0) : capped(top_t);
  R sums[kSums] = {};
  const auto add = [&](auto holds_top) {
    constexpr bool kHoldsTop = decltype(holds_top)::value;  // and so may hold +inf
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      R z[W], t[W];
      widen<T>(student[k], z);
      widen<T>(teacher[k], t);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const R d = (kHoldsTop ? capped(z[i]) : z[i]) - m;
        const R e = (kHoldsTop ? capped(t[i]) : t[i]) - n;
        R q = in_units(d * scale), p = in_units(e * scale);
        // An id that the teacher gives nothing has no term. An id that the student gives nothing
        // has an infinite term, or 0 times infinity.
        const R apart = e - (d < R(kNothing) ? R(-kInfinity) : d);
        sums[kCross] += e < R(kNothing) ? R(0) : p * apart;
        if (kHoldsTop) {
          const bool of_student = d == R(0) && !no_student, of_teacher = e == R(0) && !no_teacher;
          sums[kStudentTies] += of_student ? R(1) : R(0);
          sums[kTeacherTies] += of_teacher ? R(1) : R(0);
          if (of_student) q = R(0);
          if (of_teacher) p = R(0);
        }
        sums[kStudent] += q;
        sums[kTeacher] += p;
      }
    }
  };
  if (own_z == top_z || own_t == top_t) add(std::true_type{});
  else add(std::false_type{});
  add_up(sums);
  if (threadIdx.x != 0) return;
  DistillationPart<R> part;
  part.student.sum = sums[kStudent];
  part.teacher.sum = sums[kTeacher];
  part.cross = sums[kCross];
  if (!no_student) {
    part.student.max = m;
    part.student.sum += sums[kStudentTies] - R(1);
  }
  if (!no_teacher) {
    part.teacher.max = n;
    part.teacher.sum += sums[kTeacherTies] - R(1);
  }
  parts[blockIdx.x] = part;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    distillation_rows_kernel(DistillationArgs args, const DistillationPart<typename T::Real>* parts,
                             uint32_t chunks, typename T::Real inverse) {
  using R = typename T::Real;
  const uint32_t row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= args.count) return;
  R divergence = R(0), saved[kDistillationSaved] = {};
  int64_t error = kNoError;
  if (args.active[row]) {
    const auto part = merge_row(parts, row, chunks,
                                [&](auto& all, const auto& other) { all.merge(other, inverse); });
    error = part.error(row, args.kl_weight > 0);
    if (error == kNoError) {
      part.save(saved);
      if (args.kl_weight > 0) divergence = static_cast<R>(args.kl_weight) * part.kl(inverse);
    } else {
      divergence = static_cast<R>(from_bits(0x7fc00000u));  // NaN
    }
  }
  if (threadIdx.x % 32 != 0) return;
  static_cast<R*>(args.divergence)[row] = divergence;
  for (int s = 0; s < kDistillationSaved; ++s)
    static_cast<R*>(args.saved)[static_cast<int64_t>(row) * kDistillationSaved + s] = saved[s];
  args.error[row] = error;
}

// q and p of numbers of a row, as of DistillationRow, in the device's units.
template <class R>
struct Probabilities {
  R student_max, teacher_max, student_share, teacher_share, scale;

  __device__ __forceinline__ Probabilities(const R* saved, R scale)
      : student_max(saved[kSavedStudentMax]),
        teacher_max(saved[kSavedTeacherMax]),
        student_share(saved[kSavedStudentShare]),
        teacher_share(saved[kSavedTeacherShare]),
        scale(scale) {}

  __device__ __forceinline__ R q(R z) const {
    return student_share * in_units((capped(z) - student_max) * scale);
  }
  __device__ __forceinline__ R p(R t) const {
    return teacher_share * in_units((capped(t) - teacher_max) * scale);
  }
};

template <class T, int kAtOnce>
__global__ void __launch_bounds__(kThreads, T::kWidth > 2 ? kBlocks : 1)
    distance_sums_kernel(DistillationArgs args, DistancePart<typename T::Real>* parts,
                         uint32_t chunks, typename T::Real scale) {
  using R = typename T::Real;
  using Own = Chunk<T, kVectors>;
  const Own chunk(chunks, args.student.vocab);
  if (!args.active[chunk.row] || args.error[chunk.row] != kNoError) return;
  uint4 student[kVectors], teacher[kVectors];
  chunk.template load<kAtOnce>(chunk.logits(args.student), student);
  chunk.template load<kAtOnce>(chunk.logits(args.teacher), teacher);
  const Probabilities<R> of(
      static_cast<const R*>(args.saved) + static_cast<int64_t>(chunk.row) * kDistillationSaved,
      scale);
  R sums[3] = {};
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    R z[T::kWidth], t[T::kWidth];
    widen<T>(student[k], z);
    widen<T>(teacher[k], t);
#pragma unroll
    for (int i = 0; i < T::kWidth; ++i) {
      const R q = of.q(z[i]), p = of.p(t[i]), side = DistillationRow<R>::sign(q, p);
      sums[0] += side * DistillationRow<R>::difference(q, p);
      sums[1] += (R(1) + side) * q;
      sums[2] += (R(1) - side) * q;
    }
  }
  add_up(sums);
  if (threadIdx.x != 0) return;
  DistancePart<R> part;
  part.distance = sums[0];
  part.above = sums[1];
  part.below = sums[2];
  parts[blockIdx.x] = part;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    distance_rows_kernel(DistillationArgs args, const DistancePart<typename T::Real>* parts,
                         uint32_t chunks) {
  using R = typename T::Real;
  const uint32_t row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= args.count || !args.active[row] || args.error[row] != kNoError) return;
  const auto part =
      merge_row(parts, row, chunks, [](auto& all, const auto& other) { all.merge(other); });
  if (threadIdx.x % 32 != 0) return;
  static_cast<R*>(args.divergence)[row] += static_cast<R>(args.l1_weight) * part.distance;
  R* saved = static_cast<R*>(args.saved) + static_cast<int64_t>(row) * kDistillationSaved;
  saved[kSavedAbove] = part.above;
  saved[kSavedBelow] = part.below;
}

template <class T, int kAtOnce>
__global__ void __launch_bounds__(kThreads, T::kWidth > 2 ? kBlocks : 1)
    distillation_gradient_kernel(DistillationBackwardArgs args, uint32_t chunks,
                                 typename T::Real inverse, typename T::Real scale) {
  using R = typename T::Real;
  using Storage = typename T::Storage;
  using Own = Chunk<T, kBackwardVectors>;
  constexpr int W = T::kWidth, kStep = Own::kStep;
  const Own chunk(chunks, args.student.vocab);
  const uint32_t row = chunk.row;
  const auto* student = chunk.logits(args.student);
  const auto* teacher = chunk.logits(args.teacher);
  // May be the student's: each number is written by the thread that has read it.
  auto* out = args.grad ? static_cast<Storage*>(args.grad) + row * args.student.vocab + chunk.begin
                        : const_cast<Storage*>(student);
  const R grad = static_cast<const R*>(args.grad_divergence)[row];
  const int whole = chunk.count / W * W;
  if (!args.active[row] || grad == R(0)) {
    const uint4 zeros = all_of<T>(Storage(0));
#pragma unroll 1
    for (int i = chunk.first(); i < whole; i += kStep) store_once<T, kAtOnce>(out + i, zeros);
    if (chunk.has(whole))
#pragma unroll 1
      for (int i = whole; i < chunk.count; ++i) out[i] = Storage(0);
    return;
  }
  const R* saved =
      static_cast<const R*>(args.saved) + static_cast<int64_t>(row) * kDistillationSaved;
  const DistillationGradient<R> g(saved, grad, args.kl_weight, args.l1_weight, inverse);
  const Probabilities<R> of(saved, scale);
  const auto at = [&](R z, R t) { return g.of(of.q(z), of.p(t)); };
#pragma unroll 1
  for (int begin = chunk.first(); begin < whole; begin += kInFlight * kStep) {
    uint4 of_student[kInFlight], of_teacher[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (begin + k * kStep < whole) {
        of_student[k] = load_stored<T>(student + begin + k * kStep, kAtOnce > 1);
        of_teacher[k] = load_stored<T>(teacher + begin + k * kStep, kAtOnce > 1);
      }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (begin + k * kStep >= whole) break;
      R z[W], t[W];
      widen<T>(of_student[k], z);
      widen<T>(of_teacher[k], t);
#pragma unroll
      for (int i = 0; i < W; ++i) z[i] = at(z[i], t[i]);
      store_once<T, kAtOnce>(out + begin + k * kStep, narrow<T>(z));
    }
  }
  if (chunk.has(whole))
#pragma unroll 1
    for (int i = whole; i < chunk.count; ++i)
      out[i] =
          T::narrow(at(static_cast<R>(T::value(student[i])), static_cast<R>(T::value(teacher[i]))));
}

// Whether all rows are of aligned vectors, and the rows of a gradient at `grad`.
template <class T, class Args>
bool both_aligned(const Args& args, const void* grad) {
  return aligned<T>(args.student, grad) && aligned<T>(args.teacher, nullptr);
}

}  // namespace

int64_t distillation_loss_scratch(const DistillationArgs& args) {
  int64_t bytes = 0;
  dispatch_wide(args.student.dtype, [&](auto type) {
    using T = decltype(type);
    using R = typename T::Real;
    static_assert(sizeof(DistancePart<R>) <= sizeof(DistillationPart<R>), "share the scratch");
    bytes = args.count * Chunk<T, kVectors>::in(args.student.vocab) *
            static_cast<int64_t>(sizeof(DistillationPart<R>));
    return 0;
  });
  return bytes;
}

int distillation_loss(const DistillationArgs& args, const Workspace& workspace, void* stream) {
  if (args.count == 0) return 0;
  return dispatch_wide(args.student.dtype, [&](auto type) {
    using T = decltype(type);
    using R = typename T::Real;
    const uint32_t chunks = Chunk<T, kVectors>::in(args.student.vocab);
    const R inverse = static_cast<R>(1 / args.temperature), scale = units(inverse);
    const int64_t grid = args.count * chunks;
    const int64_t blocks = (args.count + kWarps - 1) / kWarps;
    const bool vectors = both_aligned<T>(args, nullptr);
    auto* parts = static_cast<DistillationPart<R>*>(workspace.scratch);
    if (vectors)
      DPARALLEL_LAUNCH((distillation_sums_kernel<T, kVector<T>>), grid, kThreads, stream, args,
                       parts, chunks, scale);
    else
      DPARALLEL_LAUNCH((distillation_sums_kernel<T, 1>), grid, kThreads, stream, args, parts,
                       chunks, scale);
    DPARALLEL_LAUNCH(distillation_rows_kernel<T>, blocks, kThreads, stream, args, parts, chunks,
                     inverse);
    if (args.l1_weight > 0) {
      auto* distances = static_cast<DistancePart<R>*>(workspace.scratch);
      if (vectors)
        DPARALLEL_LAUNCH((distance_sums_kernel<T, kVector<T>>), grid, kThreads, stream, args,
                         distances, chunks, scale);
      else
        DPARALLEL_LAUNCH((distance_sums_kernel<T, 1>), grid, kThreads, stream, args, distances,
                         chunks, scale);
      DPARALLEL_LAUNCH(distance_rows_kernel<T>, blocks, kThreads, stream, args, distances, chunks);
    }
    return static_cast<int>(cudaGetLastError());
  });
}

int distillation_loss_backward(const DistillationBackwardArgs& args, void* stream) {
  if (args.count == 0) return 0;
  return dispatch_wide(args.student.dtype, [&](auto type) {
    using T = decltype(type);
    using R = typename T::Real;
    const uint32_t chunks = Chunk<T, kBackwardVectors>::in(args.student.vocab);
    const R inverse = static_cast<R>(1 / args.temperature), scale = units(inverse);
    const int64_t grid = args.count * chunks;
    if (both_aligned<T>(args, args.grad))
      DPARALLEL_LAUNCH((distillation_gradient_kernel<T, kVector<T>>), grid, kThreads, stream, args,
                       chunks, inverse, scale);
    else
      DPARALLEL_LAUNCH((distillation_gradient_kernel<T, 1>), grid, kThreads, stream, args, chunks,
                       inverse, scale);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
