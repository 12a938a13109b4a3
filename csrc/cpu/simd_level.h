// Which build of a SIMD kernel runs. Each *_kernel.cpp is compiled once for each instruction set,
// in a namespace of that name; with DPARALLEL_PORTABLE_ONLY for "portable" alone.
#pragma once

namespace dparallel::cpu {

enum class SimdLevel { portable, avx2, avx512 };

// The level in use: the machine's best, unless DPARALLEL_SIMD=portable|avx2|avx512 or
// use_simd_level lowers it.
SimdLevel simd_level_in_use();

}  // namespace dparallel::cpu

// Declares `table`, of type Table, in each level's namespace, and `table`_in_use(), which picks
// one.
#if defined(__x86_64__) && !defined(DPARALLEL_PORTABLE_ONLY)
#define DPARALLEL_X86_LEVELS
#define DPARALLEL_KERNEL_TABLE(Table, table)        \
  namespace portable {                              \
  extern const Table table;                         \
  }                                                 \
  namespace avx2 {                                  \
  extern const Table table;                         \
  }                                                 \
  namespace avx512 {                                \
  extern const Table table;                         \
  }                                                 \
  inline const Table& table##_in_use() {            \
    switch (simd_level_in_use()) {                  \
      case SimdLevel::avx512: return avx512::table; \
      case SimdLevel::avx2: return avx2::table;     \
      default: return portable::table;              \
    }                                               \
  }
#else
#define DPARALLEL_KERNEL_TABLE(Table, table) \
  namespace portable {                       \
  extern const Table table;                  \
  }                                          \
  inline const Table& table##_in_use() { return portable::table; }
#endif
