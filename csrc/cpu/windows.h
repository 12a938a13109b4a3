// The windows of an op, on the CPU, sorted by position.
#pragma once

#include <algorithm>
#include <vector>

#include "dparallel/launch.h"

namespace dparallel::cpu {

// Flat positions [begin, end) of a window.
struct WindowSpan {
  int64_t window, begin, end;
};

// The spans of the windows that hold any position, by ascending positions.
inline std::vector<WindowSpan> spans_of(const Windows& windows, const TokenGrid& tokens) {
  std::vector<WindowSpan> spans;
  for (int64_t w = 0; w < windows.count; ++w) {
    const int64_t first = windows.sequence(w) * tokens.length;
    const int64_t start = std::max<int64_t>(windows.start[w], 0);
    const int64_t end = std::min(windows.end[w], tokens.length);
    if (start < end) spans.push_back({w, first + start, first + end});
  }
  std::sort(spans.begin(), spans.end(),
            [](const WindowSpan& a, const WindowSpan& b) { return a.begin < b.begin; });
  return spans;
}

}  // namespace dparallel::cpu
