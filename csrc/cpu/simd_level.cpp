// The instruction set of the CPU kernels: the machine's best, or a lower one on request.
#include "simd_level.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "dparallel/launch.h"

namespace dparallel::cpu {
namespace {

constexpr const char* kSimdLevels[] = {"portable", "avx2", "avx512"};  // indexed by SimdLevel

SimdLevel supported_simd_level() {
#if defined(DPARALLEL_X86_LEVELS)
  // x86-64-v3 and v4 by features that old compilers know too: before version 18 clang knows neither
  // these levels nor f16c, lzcnt and movbe, which every CPU with the rest of v3 has.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2"))
    return SimdLevel::portable;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return SimdLevel::avx512;
  return SimdLevel::avx2;
#else
  return SimdLevel::portable;
#endif
}

// The level called `name`, but at most the machine's best; the best where no level has that name.
SimdLevel level_called(const char* name) {
  const SimdLevel best = supported_simd_level();
  for (const SimdLevel level : {SimdLevel::portable, SimdLevel::avx2, SimdLevel::avx512})
    if (name != nullptr && std::strcmp(name, kSimdLevels[static_cast<int>(level)]) == 0)
      return std::min(level, best);
  return best;
}

std::atomic<SimdLevel>& level_in_use() {
  static std::atomic<SimdLevel> level{level_called(std::getenv("DPARALLEL_SIMD"))};
  return level;
}

}  // namespace

const char* simd_level() { return kSimdLevels[static_cast<int>(simd_level_in_use())]; }

SimdLevel simd_level_in_use() { return level_in_use().load(std::memory_order_relaxed); }

bool is_simd_level(const char* name) {
  return std::any_of(std::begin(kSimdLevels), std::end(kSimdLevels),
                     [&](const char* level) { return std::strcmp(level, name) == 0; });
}

void use_simd_level(const char* name) { level_in_use() = level_called(name); }

}  // namespace dparallel::cpu
