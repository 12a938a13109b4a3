// Every CUDA kernel, executed by cuda_host, against its CPU twin on random cases, in memory of
// exact size. Usage: twins SEED CASES [OP]. Exits 1 at the first difference, after naming it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_host.h"
#include "dparallel/certainty_forcing_loss.h"
#include "dparallel/launch.h"
#include "dparallel/numeric.h"

using namespace dparallel;

namespace {

std::mt19937_64 engine;
int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
bool chance(double p) { return std::uniform_real_distribution<>()(engine) < p; }
double uniform(double a, double b) { return std::uniform_real_distribution<>(a, b)(engine); }
template <class T>
T one_of(std::initializer_list<T> values) {
  return values.begin()[below(static_cast<int64_t>(values.size()))];
}

void serial(int64_t n, cpu::Body body, const void* context) {
  if (n > 0) body(0, n, context);
}

std::string now;  // the case being run

#define REQUIRE(condition, ...)                         \
  do {                                                  \
    if (!(condition)) {                                 \
      std::fprintf(stderr, "twins: %s: ", now.c_str()); \
      std::fprintf(stderr, __VA_ARGS__);                \
      std::fprintf(stderr, " (%s)\n", #condition);      \
      std::exit(1);                                     \
    }                                                   \
  } while (0)

template <class T>
void same(const std::vector<T>& cuda, const std::vector<T>& cpu, const char* name) {
  for (size_t i = 0; i < cpu.size(); ++i)
    REQUIRE(cuda[i] == cpu[i], "%s[%zu]: %lld, CPU %lld", name, i, (long long)cuda[i],
            (long long)cpu[i]);
}

// Each is within 2e-6 + 1e-6 |x| of the truth.
void close(const std::vector<float>& cuda, const std::vector<float>& cpu, const char* name) {
  for (size_t i = 0; i < cpu.size(); ++i) {
    const float a = cuda[i], b = cpu[i];
    const bool equal = a == b || (a != a && b != b);
    REQUIRE(equal || std::fabs(a - b) <= 4e-6f + 2e-6f * std::fabs(b), "%s[%zu]: %.9g, CPU %.9g",
            name, i, a, b);
  }
}

// Logits [rows] of `vocab` with a random stride, in their dtype, in memory that ends with them.
struct Rows {
  DType dtype;
  int64_t vocab, stride, rows;
  std::unique_ptr<char[]> memory;

  Rows(int64_t rows, int64_t vocab, bool bad, double repeat, bool wide = false)
      : dtype(wide ? DType::float64 : one_of({DType::float32, DType::bfloat16, DType::float16})),
        vocab(vocab),
        stride(vocab + (chance(0.5) ? below(9) : 0)),
        rows(rows) {
    const int64_t size = element_size();
    const int64_t elements = rows == 0 ? 0 : (rows - 1) * stride + vocab;
    memory.reset(new char[std::max<int64_t>(1, elements * size)]);
    std::normal_distribution<float> normal(0.0f, static_cast<float>(uniform(0.1, 6.0)));
    // At -200 what pads a vector, a 0, lies beyond the range of exp above the row.
    const float shift = chance(0.3) ? one_of({-60.0f, -200.0f}) : 0.0f;
    const bool coarse = chance(0.2);  // many equal logits
    for (int64_t i = 0; i < elements; ++i) {
      float z = normal(engine) + shift;
      if (coarse && repeat == 0) z = std::round(z);
      put(i, z);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (r > 0 && chance(repeat)) {
        memcpy(memory.get() + r * stride * size, memory.get() + below(r) * stride * size,
               vocab * size);
        continue;
      }
      if (chance(0.3)) put(r * stride + below(vocab), 30.0f);  // a sure row
      if (chance(0.1)) put(r * stride + below(vocab), kInfinity);
      if (chance(0.3)) put(r * stride + below(vocab), -kInfinity);
      if (bad && chance(0.1)) put(r * stride + below(vocab), NAN);
      if (bad && chance(0.1))
        for (int64_t v = 0; v < vocab; ++v) put(r * stride + v, -kInfinity);
    }
  }

  int64_t element_size() const {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  }

  // Element i of memory like this.
  double element(const char* from, int64_t i) const {
    if (dtype == DType::float64) return reinterpret_cast<const double*>(from)[i];
    if (dtype == DType::float32) return reinterpret_cast<const float*>(from)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(from)[i];
    return dtype == DType::bfloat16 ? bfloat16_value(bits) : float16_value(bits);
  }

  void put(int64_t i, float z) {
    if (dtype == DType::float64) {
      const double wide = std::isinf(z) && z > 0 ? 1e4 : z;
      memcpy(memory.get() + 8 * i, &wide, 8);
    } else if (dtype == DType::float32) {
      memcpy(memory.get() + 4 * i, &z, 4);
    } else {
      const uint16_t bits = dtype == DType::bfloat16 ? bfloat16_bits(z) : float16_bits(z);
      memcpy(memory.get() + 2 * i, &bits, 2);
    }
  }

  // Some rows become what no model gives: of the largest numbers of the dtype, or near them.
  void exaggerate() {
    const float most = dtype == DType::float16    ? 65504.0f
                       : dtype == DType::bfloat16 ? bfloat16_value(0x7f7f)
                                                  : kLargest;
    for (int64_t r = 0; r < rows; ++r) {
      const int kind = chance(0.7) ? -1 : static_cast<int>(below(3));
      for (int64_t v = 0; v < vocab && kind >= 0; ++v)
        put(r * stride + v, kind == 0   ? -most
                            : kind == 1 ? one_of({-most, most, 0.0f, 1.0f})
                                        : most * static_cast<float>(uniform(-1.0, 1.0)));
    }
  }

  Logits flat() const {
    return {memory.get(), dtype, vocab, std::max<int64_t>(1, rows), 0, stride};
  }
};

int64_t random_vocab() {
  return chance(0.04)
             ? one_of<int64_t>({126464, 50257})
             : one_of<int64_t>({1, 2, 3, 7, 8, 9, 31, 255, 1000, 4099, 16384, 16385, 40001});
}

std::vector<int64_t> random_suppress(int64_t vocab) {
  std::vector<int64_t> ids;
  if (chance(0.4))
    for (int64_t i = 0; i < 3; ++i) ids.push_back(below(vocab));
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

// Of half of the calls at temperature 0.
Sampling random_sampling(const std::vector<int64_t>& keys, int64_t position_offset) {
  const double given = chance(0.5)   ? 0.0
                       : chance(0.8) ? uniform(0.3, 2.0)
                                     : one_of({1e-38, 1e-5, 1e-3, 1e4, 1e30, 1e38, 1e300});
  const float temperature = temperature_in_force(given);
  Sampling sampling{temperature, keys.data(), position_offset};
  if (chance(0.4)) sampling.top_p = chance(0.1) ? 0.0 : uniform(0.0, 1.0);
  if (chance(0.4)) sampling.top_k = one_of<int64_t>({1, 2, 17, 3000});
  return sampling;
}

struct Result {
  std::vector<int64_t> tokens, error;
  std::vector<float> fields;
  Result(int64_t count, int64_t errors)
      : tokens(2 * count, -7), error(errors, -7), fields(kRowFields * count, -7.0f) {}
  RowOutput output() { return {tokens.data(), fields.data(), error.data()}; }
};

struct Memory {
  std::vector<char> scratch;
  std::vector<int32_t> counters;
  Memory(int64_t bytes, int64_t count)
      : scratch(std::max<int64_t>(1, bytes), '\x5a'), counters(count) {}
  cuda::Workspace workspace() { return {scratch.data(), counters.data()}; }
  void check() const {
    for (const int32_t c : counters) REQUIRE(c == 0, "a counter is left at %d", c);
  }
};

void row_stats_case() {
  const int64_t vocab = random_vocab(), total = below(6);
  Rows logits(total, vocab, true, 0.0);
  if (chance(0.3)) logits.exaggerate();
  std::vector<int64_t> rows;
  if (chance(0.5) && total > 0)
    for (int64_t i = below(5); i > 0; --i) rows.push_back(below(total));
  const bool indexed = chance(0.5) && total > 0;
  const int64_t count = indexed ? static_cast<int64_t>(rows.size()) : total;
  const std::vector<int64_t> suppress = random_suppress(vocab);
  std::vector<int64_t> keys(4 * count);
  for (auto& k : keys) k = below(1 << 20);
  const Exclusions exclusions{chance(0.7) ? below(vocab) : -1, suppress.data(),
                              static_cast<int64_t>(suppress.size())};
  Result on_cuda(count, count), on_cpu(count, count);
  const bool each = chance(0.5);  // ids of its own for each row
  const int64_t asked = chance(0.5) ? 0 : one_of<int64_t>({1, 3, 200, 700});
  std::vector<int64_t> ids(asked * (each ? count : 1));
  for (auto& id : ids) id = below(vocab);
  std::vector<float> gathered(count * asked, -7.0f), gathered_cpu(gathered);
  RowStatsArgs args{logits.flat(),
                    indexed ? rows.data() : nullptr,
                    count,
                    exclusions,
                    random_sampling(keys, 0),
                    {ids.data(), asked, each ? asked : 0, gathered_cpu.data()},
                    on_cpu.output()};
  cpu::row_stats(args, serial);
  args.output = on_cuda.output();
  args.gather.logits = gathered.data();
  std::vector<size_t> bad;
  for (size_t i = 0; i < ids.size(); ++i)
    if (chance(0.05)) {  // on a device nobody has looked
      bad.push_back(i);
      ids[i] = one_of<int64_t>({-1, vocab, INT64_MAX, INT64_MIN});
    }
  Memory memory(cuda::row_stats_scratch(args), cuda::row_stats_counters(args));
  cuda::row_stats(args, memory.workspace(), nullptr);
  memory.check();
  same(on_cuda.error, on_cpu.error, "error");
  for (const size_t i : bad)
    for (int64_t row = 0; row < (each ? 1 : count); ++row)
      gathered_cpu[row * asked + static_cast<int64_t>(i)] = NAN;
  for (size_t i = 0; i < gathered.size(); ++i)
    REQUIRE(gathered[i] == gathered_cpu[i] ||
                (gathered[i] != gathered[i] && gathered_cpu[i] != gathered_cpu[i]),
            "logit %zu: %.9g, CPU %.9g", i, gathered[i], gathered_cpu[i]);
  same(on_cuda.tokens, on_cpu.tokens, "tokens");
  close(on_cuda.fields, on_cpu.fields, "fields");
}

std::vector<float> random_policy(int64_t batch) {
  std::vector<float> rows;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t selector = below(kSelectors), low = below(4);
    const float threshold =
        selector == kSelectQuota
            ? static_cast<float>(1 + below(9))
            : static_cast<float>(uniform(0.0, selector == kSelectEntropy ? 9 : 1));
    rows.insert(rows.end(),
                {static_cast<float>(selector), threshold, static_cast<float>(low),
                 chance(0.5) ? kInfinity : static_cast<float>(low + below(5) + (low == 0)),
                 static_cast<float>(below(kScores))});
    if (chance(0.1))  // on a device nobody has checked them
      rows[rows.size() - 1 - below(kPolicyFields)] =
          one_of({NAN, kInfinity, -kInfinity, 1e19f, -1e19f, -1.0f, 0.0f, 2.5f, 1e-45f});
  }
  return rows;
}

void select_case() {
  const int64_t batch = below(4), length = one_of<int64_t>({0, 1, 5, 32, 256, 300, 2100});
  const auto size = static_cast<size_t>(batch * length);
  std::vector<float> statistics[3];
  for (auto& s : statistics) {
    s.resize(size);
    for (auto& x : s)  // with ties
      x = chance(0.02) ? one_of({NAN, kInfinity}) : static_cast<float>(below(40)) / 40.0f;
  }
  std::unique_ptr<bool[]> eligible(new bool[size + 1]), a(new bool[size + 1]),
      b(new bool[size + 1]);
  for (size_t i = 0; i < size; ++i) eligible[i] = chance(0.6);
  const std::vector<float> policy = random_policy(batch);
  SelectArgs args{statistics[0].data(),
                  statistics[1].data(),
                  statistics[2].data(),
                  eligible.get(),
                  policy.data(),
                  batch,
                  length,
                  a.get()};
  cpu::select(args, serial);
  args.commit = b.get();
  Memory memory(cuda::select_scratch(args), 0);
  cuda::select(args, memory.workspace(), nullptr);
  for (size_t i = 0; i < size; ++i) REQUIRE(a[i] == b[i], "commit[%zu]: %d, CPU %d", i, b[i], a[i]);
}

void unmask_case() {
  const bool many = chance(0.04);  // more rows of a sequence than shared memory holds
  const int64_t batch = many ? 1 : below(5);
  const int64_t length = many ? 1700 + below(100) : 1 + below(chance(0.1) ? 300 : 40);
  int64_t vocab = many ? 1 + below(30) : random_vocab();
  if (batch * length * vocab > 4000000) vocab = 1 + below(3000);
  const int64_t mask_id = below(vocab), stride_l = 1 + below(3),
                stride_b = length * stride_l + below(3);
  std::vector<int64_t> tokens(
      static_cast<size_t>(batch == 0 ? 0 : (batch - 1) * stride_b + (length - 1) * stride_l + 1));
  for (auto& t : tokens) t = many || chance(0.7) ? mask_id : below(vocab);
  const bool lanes = chance(0.5);
  std::vector<int64_t> lane, start, end, positions;
  for (int64_t b = 0; b < batch; ++b) {  // without lanes one each, else any number side by side
    int64_t at = 0;
    do {
      lane.push_back(b);
      start.push_back(at + below(length - at + 1));
      end.push_back(start.back() + below(length - start.back() + 1));
      if (chance(0.3)) start.back() = at, end.back() = length;
      if (chance(0.1)) end.back() = start.back() - below(3);
      at = std::max(at, end.back());
    } while (lanes && chance(0.7));
  }
  const int64_t windows = static_cast<int64_t>(lane.size());
  if (lanes) {  // in any order
    for (int64_t w = windows; w-- > 1;) {
      const int64_t other = below(w + 1);
      std::swap(lane[w], lane[other]);
      std::swap(start[w], start[other]);
      std::swap(end[w], end[other]);
    }
  }
  const auto needed = [&](int64_t w, int64_t l) {
    return tokens[lane[w] * stride_b + l * stride_l] == mask_id && l >= start[w] && l < end[w];
  };
  const bool indexed = chance(0.5), lists_all = chance(0.9);
  if (indexed)
    for (int64_t p = 0; p < batch * length; ++p) {
      bool any = false;
      for (int64_t w = 0; w < windows; ++w)
        any = any || (lane[w] == p / length && needed(w, p % length));
      if (any ? lists_all || chance(0.8) : chance(0.2)) positions.push_back(p);
    }
  positions.reserve(1);  // an empty list is not the lack of one
  const int64_t count = indexed ? static_cast<int64_t>(positions.size()) : batch * length;
  Rows rows(count, vocab, chance(0.2), 0.1);
  if (chance(0.3)) rows.exaggerate();
  Logits logits = rows.flat();
  if (!indexed) {
    logits.inner_rows = length;
    logits.outer_stride = length * rows.stride;
  }
  const std::vector<int64_t> suppress = random_suppress(vocab);
  std::vector<int64_t> keys(3 * windows);
  for (auto& k : keys) k = below(1 << 20);
  const std::vector<float> policy = random_policy(windows);
  std::vector<int64_t> tokens_cpu = tokens, tokens_cuda = tokens;
  std::vector<int64_t> committed_cpu(windows, -7), committed_cuda(windows, -7);
  std::vector<int64_t> remaining_cpu(windows, -7), remaining_cuda(windows, -7);
  bool done_cpu = false, done_cuda = false;
  Result on_cpu(count, windows), on_cuda(count, windows);
  lane.reserve(1);
  UnmaskArgs args{{tokens_cpu.data(), batch, length, stride_b, stride_l},
                  logits,
                  indexed ? positions.data() : nullptr,
                  count,
                  {windows, lanes ? lane.data() : nullptr, start.data(), end.data()},
                  policy.data(),
                  {mask_id, suppress.data(), static_cast<int64_t>(suppress.size())},
                  random_sampling(keys, below(100)),
                  committed_cpu.data(),
                  remaining_cpu.data(),
                  &done_cpu,
                  on_cpu.output()};
  cpu::unmask(args, serial);
  args.tokens.data = tokens_cuda.data();
  args.committed = committed_cuda.data();
  args.remaining = remaining_cuda.data();
  args.done = &done_cuda;
  args.output = on_cuda.output();
  Memory memory(cuda::unmask_scratch(args), cuda::unmask_counters(args));
  if (chance(0.3)) {  // positions and windows that are wrong spoil no later call
    std::vector<int64_t> wrong = positions, lane_of = lane, from = start, to = end;
    const bool overlapping = chance(0.5);
    if (indexed)
      for (auto& p : wrong) p = below(batch * length + 4) - 2;
    for (int64_t w = 0; w < windows && (overlapping || !indexed); ++w) {
      lane_of[w] = chance(0.2) ? one_of<int64_t>({-1, batch, INT64_MIN, INT64_MAX}) : below(batch);
      from[w] = chance(0.2) ? one_of<int64_t>({INT64_MIN, INT64_MAX}) : below(length + 2) - 1;
      to[w] = chance(0.2) ? one_of<int64_t>({INT64_MIN, INT64_MAX}) : below(length + 4) - 1;
    }
    std::vector<int64_t> spoiled = tokens;
    std::vector<float> one;  // a position may be listed twice, but one row commits
    for (int64_t w = 0; w < windows; ++w) one.insert(one.end(), {kSelectQuota, 1, 1, 1, 0});
    UnmaskArgs bad = args;
    bad.tokens.data = spoiled.data();
    if (indexed) bad.positions = wrong.data();
    bad.windows = {windows, lanes ? lane_of.data() : nullptr, from.data(), to.data()};
    bad.policy = one.data();
    cuda::unmask(bad, memory.workspace(), nullptr);
    memory.check();
    if (!indexed && lanes) {  // whose a position is: the first window's that holds it
      std::vector<int64_t> masked(windows);
      int64_t changed = 0, committed = 0;
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t l = 0; l < length; ++l) {
          const int64_t t = b * stride_b + l * stride_l;
          changed += spoiled[t] != tokens[t];
          if (tokens[t] != mask_id) continue;
          for (int64_t w = 0; w < windows; ++w)
            if (lane_of[w] == b && l >= from[w] && l < to[w]) {
              ++masked[w];
              break;
            }
        }
      for (int64_t w = 0; w < windows; ++w) {
        committed += committed_cuda[w];
        const bool moves = masked[w] > 0 && on_cuda.error[w] == kNoError;
        REQUIRE(committed_cuda[w] == moves, "committed[%lld] of windows that overlap: %lld",
                (long long)w, (long long)committed_cuda[w]);
        REQUIRE(remaining_cuda[w] == masked[w] - moves,
                "remaining[%lld] of windows that overlap: %lld", (long long)w,
                (long long)remaining_cuda[w]);
      }
      REQUIRE(changed == committed, "%lld tokens changed, %lld committed", (long long)changed,
              (long long)committed);
    }
  }
  cuda::unmask(args, memory.workspace(), nullptr);
  memory.check();
  same(on_cuda.error, on_cpu.error, "error");
  const bool sound = std::all_of(on_cpu.error.begin(), on_cpu.error.end(),
                                 [](int64_t e) { return e == kNoError; });
  if (!sound) {  // a window with a bad row commits nothing; the CPU then commits nothing at all
    same(tokens_cpu, tokens, "tokens of the CPU");
    for (int64_t w = 0; w < windows; ++w)
      for (int64_t l = std::max<int64_t>(start[w], 0);
           on_cuda.error[w] != kNoError && l < std::min(end[w], length); ++l) {
        const int64_t t = lane[w] * stride_b + l * stride_l;
        REQUIRE(tokens_cuda[t] == tokens[t], "window %lld has a bad row, but column %lld changed",
                (long long)w, (long long)l);
      }
    return;
  }
  same(on_cuda.tokens, on_cpu.tokens, "row tokens");
  close(on_cuda.fields, on_cpu.fields, "fields");
  // What must commit by the CUDA kernel's own statistics: scores that differ by rounding alone may
  // rank otherwise than the CPU's.
  const auto size = static_cast<size_t>(windows * length);
  std::vector<float> field[3];
  for (auto& f : field) f.assign(size, 0.0f);
  std::vector<int64_t> choice(size, -1);
  std::unique_ptr<bool[]> eligible(new bool[size + 1]()), commit(new bool[size + 1]());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t p = indexed ? positions[i] : i;
    bool read = false;
    for (int64_t w = 0; w < windows; ++w) {
      if (lane[w] != p / length || !needed(w, p % length)) continue;
      const int64_t at = w * length + p % length;
      eligible[at] = read = true;
      choice[at] = on_cuda.tokens[count + i];
      const RowField of[] = {kConfidence, kMargin, kEntropy};
      for (int f = 0; f < 3; ++f) field[f][at] = on_cuda.fields[of[f] * count + i];
    }
    REQUIRE(read == (on_cuda.tokens[i] >= 0), "row %lld: token %lld", (long long)i,
            (long long)on_cuda.tokens[i]);
  }
  cpu::select({field[0].data(), field[1].data(), field[2].data(), eligible.get(), policy.data(),
               windows, length, commit.get()},
              serial);
  bool all_done = true;
  for (int64_t w = 0; w < windows; ++w) {
    int64_t committed = 0, masked = 0;
    for (int64_t l = 0; l < length; ++l) {
      const int64_t at = w * length + l, t = lane[w] * stride_b + l * stride_l;
      masked += needed(w, l);
      committed += commit[at];
      if (commit[at]) tokens[t] = choice[at];
    }
    REQUIRE(committed_cuda[w] == committed, "committed[%lld]: %lld, expected %lld", (long long)w,
            (long long)committed_cuda[w], (long long)committed);
    REQUIRE(remaining_cuda[w] == masked - committed, "remaining[%lld]: %lld, expected %lld",
            (long long)w, (long long)remaining_cuda[w], (long long)(masked - committed));
    all_done = all_done && masked == committed;
  }
  same(tokens_cuda, tokens, "tokens");
  REQUIRE(done_cuda == all_done, "done: %d, expected %d", done_cuda, all_done);
}

void commit_case() {
  const int64_t batch = below(5), length = one_of<int64_t>({0, 1, 5, 33, 100, 700});
  const int64_t mask_id = below(6), stride_l = 1 + below(3),
                stride_b = length * stride_l + below(3);
  const bool empty = batch == 0 || length == 0;
  std::vector<int64_t> tokens(
      static_cast<size_t>(empty ? 0 : (batch - 1) * stride_b + (length - 1) * stride_l + 1));
  for (auto& t : tokens) t = below(6);
  std::vector<int64_t> positions, lane, start, end, token;
  const bool indexed = chance(0.6), lanes = chance(0.7) && batch > 0;
  if (indexed)
    for (int64_t p = 0; p < batch * length; ++p)
      if (chance(0.5)) positions.push_back(p);
  positions.reserve(1);  // an empty list is not the lack of one
  const int64_t windows = lanes ? below(40) : batch;
  for (int64_t w = 0; w < windows; ++w) {
    lane.push_back(batch > 0 ? below(batch) : 0);
    start.push_back(below(length + 5) - 2);
    end.push_back(chance(0.3) ? length : below(length + 5) - 2);
  }
  lane.reserve(1);
  int64_t count = indexed ? static_cast<int64_t>(positions.size()) : batch * length;
  if (chance(0.2)) count = 0;
  const double often = chance(0.1) ? 0.0 : uniform(0.0, 1.0);
  std::unique_ptr<bool[]> commit(new bool[count + 1]);
  for (int64_t i = 0; i < count; ++i) {
    token.push_back(below(7) - 1);
    const bool fits = token.back() >= 0 && token.back() != mask_id;
    commit[i] = chance(often) && fits;
  }
  struct Output {
    std::vector<int64_t> tokens, remaining, first, changed;
    int64_t error = -7;
    Output(const std::vector<int64_t>& tokens, int64_t windows)
        : tokens(tokens), remaining(windows, -7), first(windows, -7), changed(windows, -7) {}
  } on_cpu(tokens, windows), on_cuda(tokens, windows), spoiled(tokens, windows);
  const auto args_of = [&](Output& o) {
    return CommitArgs{{o.tokens.data(), batch, length, stride_b, stride_l},
                      indexed ? positions.data() : nullptr,
                      commit.get(),
                      token.data(),
                      count,
                      mask_id,
                      {windows, lanes ? lane.data() : nullptr, start.data(), end.data()},
                      o.remaining.data(),
                      o.first.data(),
                      o.changed.data(),
                      &o.error};
  };
  cpu::commit(args_of(on_cpu), serial);
  const CommitArgs args = args_of(on_cuda);
  Memory memory(0, cuda::commit_counters(args));
  if (chance(0.3)) {  // what is wrong spoils neither memory nor a later call
    std::vector<int64_t> positions_before = positions, lane_before = lane, token_before = token;
    for (auto& p : positions)
      if (chance(0.1)) p = one_of<int64_t>({-1, batch * length, INT64_MAX, INT64_MIN});
    for (auto& b : lane)
      if (chance(0.3)) b = one_of<int64_t>({-1, batch, INT64_MAX, INT64_MIN});
    int64_t worst = kNoError;
    for (int64_t i = count; i-- > 0;)
      if (commit[i] && chance(0.1)) {
        token[i] = chance(0.5) ? mask_id : -1 - below(3);
        const int64_t at = indexed ? positions[i] : i;
        if (at >= 0 && at < batch * length) worst = encode_error(at, kRowMask);
      }
    cuda::commit(args_of(spoiled), memory.workspace(), nullptr);
    memory.check();
    REQUIRE(spoiled.error == worst, "error: %lld, expected %lld", (long long)spoiled.error,
            (long long)worst);
    positions = positions_before, lane = lane_before, token = token_before;
    positions.reserve(1), lane.reserve(1);
  }
  cuda::commit(args_of(on_cuda), memory.workspace(), nullptr);
  memory.check();
  same(on_cuda.tokens, on_cpu.tokens, "tokens");
  same(on_cuda.remaining, on_cpu.remaining, "remaining");
  same(on_cuda.first, on_cpu.first, "first");
  same(on_cuda.changed, on_cpu.changed, "changed");
  REQUIRE(on_cuda.error == on_cpu.error, "error: %lld", (long long)on_cuda.error);
}

template <class R>
void loss_case_of(const Rows& rows, const std::vector<int64_t>& labels, const bool* active,
                  double ce_temperature, double temperature) {
  const int64_t count = rows.rows, vocab = rows.vocab;
  struct Outputs {
    std::vector<R> nll, entropy, saved;
    std::unique_ptr<bool[]> correct;
    std::vector<int64_t> error;
    explicit Outputs(int64_t n)
        : nll(n, -7),
          entropy(n, -7),
          saved(n * kLossSaved, -7),
          correct(new bool[n + 1]),
          error(n, -7) {}
  } cpu_out(count), cuda_out(count);
  const auto args_of = [&](Outputs& o) {
    return LossArgs{rows.flat(),     active,         labels.data(), count,
                    ce_temperature,  temperature,    o.nll.data(),  o.entropy.data(),
                    o.correct.get(), o.saved.data(), o.error.data()};
  };
  const LossArgs args = args_of(cuda_out);
  cpu::certainty_forcing_loss(args_of(cpu_out), serial);
  Memory memory(cuda::certainty_forcing_loss_scratch(args), 0);
  cuda::certainty_forcing_loss(args, memory.workspace(), nullptr);
  same(cuda_out.error, cpu_out.error, "error");
  const auto near = [](const std::vector<R>& cuda, const std::vector<R>& cpu, const char* name) {
    for (size_t i = 0; i < cpu.size(); ++i) {
      const double a = cuda[i], b = cpu[i];
      REQUIRE(a == b || (a != a && b != b) || std::fabs(a - b) <= 4e-6 + 4e-6 * std::fabs(b),
              "%s[%zu]: %.9g, CPU %.9g", name, i, a, b);
    }
  };
  near(cuda_out.nll, cpu_out.nll, "nll");
  near(cuda_out.entropy, cpu_out.entropy, "entropy");
  near(cuda_out.saved, cpu_out.saved, "saved");
  for (int64_t i = 0; i < count; ++i)
    REQUIRE(cuda_out.correct[i] == cpu_out.correct[i], "correct[%lld]", (long long)i);
  std::vector<R> grad_nll(count), grad_entropy(count);
  for (int64_t i = 0; i < count; ++i) {
    grad_nll[i] = chance(0.2) ? R(0) : static_cast<R>(uniform(-1, 1));
    grad_entropy[i] = chance(0.2) ? R(0) : static_cast<R>(uniform(-1, 1));
  }
  const int64_t size = rows.element_size();
  std::unique_ptr<char[]> a(new char[count * vocab * size + 1]),
      b(new char[count * vocab * size + 1]);
  LossBackwardArgs backward{rows.flat(),         active,      labels.data(),        count,
                            ce_temperature,      temperature, cpu_out.saved.data(), grad_nll.data(),
                            grad_entropy.data(), a.get()};
  cpu::certainty_forcing_loss_backward(backward, serial);
  backward.grad = b.get();
  cuda::certainty_forcing_loss_backward(backward, nullptr);
  const double step = rows.dtype == DType::bfloat16  ? 0.01
                      : rows.dtype == DType::float16 ? 2e-3
                                                     : 2e-6;
  for (int64_t i = 0; i < count * vocab; ++i) {
    if (cpu_out.error[i / vocab] != kNoError)
      continue;  // nothing is promised of a bad row's gradient
    const double x = rows.element(a.get(), i), y = rows.element(b.get(), i);
    REQUIRE(std::fabs(x - y) <= 3e-7 + step * std::fabs(x), "grad[%lld]: %.9g, CPU %.9g",
            (long long)i, y, x);
  }
  // Over the logits it is the same, to the bit.
  const auto over_the_logits = [&](const char* expected, auto launch, const char* name) {
    const int64_t bytes = count ? ((count - 1) * rows.stride + vocab) * size : 0;
    std::unique_ptr<char[]> own(new char[bytes]);
    std::memcpy(own.get(), rows.memory.get(), bytes);
    backward.logits.data = own.get();
    backward.grad = nullptr;
    launch();
    for (int64_t i = 0; i < count; ++i)
      REQUIRE(!std::memcmp(own.get() + i * rows.stride * size, expected + i * vocab * size,
                           vocab * size),
              "%s over the logits: row %lld", name, (long long)i);
  };
  over_the_logits(
      a.get(), [&] { cpu::certainty_forcing_loss_backward(backward, serial); }, "grad, CPU");
  over_the_logits(
      b.get(), [&] { cuda::certainty_forcing_loss_backward(backward, nullptr); }, "grad");
}

void loss_case() {
  int64_t vocab = random_vocab();
  const int64_t count = below(6);
  Rows rows(count, vocab, chance(0.3), 0.0, chance(0.15));
  if (count > 0 && chance(0.2))  // as large as an infinite one is taken to be
    rows.put(below(count) * rows.stride + below(vocab), kLargest);
  std::vector<int64_t> labels(count);
  std::unique_ptr<bool[]> active(new bool[count + 1]);
  for (int64_t i = 0; i < count; ++i) {
    active[i] = chance(0.7);
    labels[i] = chance(0.1) ? -100 : below(vocab);
  }
  const double ce = one_of({1.0, 1.0, 0.7, 2.0}), t = one_of({0.5 * ce, ce, 0.3, 2.5});
  if (rows.dtype == DType::float64) loss_case_of<double>(rows, labels, active.get(), ce, t);
  else loss_case_of<float>(rows, labels, active.get(), ce, t);
}

// Numbers of a 16-bit or 32-bit type, in memory of exact size.
struct Numbers {
  DType dtype;
  int64_t count;
  std::unique_ptr<char[]> memory;

  Numbers(DType dtype, int64_t count) : dtype(dtype), count(count), memory(new char[bytes()]) {
    for (int64_t i = 0; i < count; ++i) set(i, uniform(-2, 2));
  }
  Numbers(const Numbers& other)
      : dtype(other.dtype), count(other.count), memory(new char[bytes()]) {
    std::memcpy(memory.get(), other.memory.get(), bytes());
  }
  int64_t bytes() const { return count * (dtype == DType::float32 ? 4 : 2); }
  void set(int64_t i, double value) {
    const auto x = static_cast<float>(value);
    if (dtype == DType::float32) reinterpret_cast<float*>(memory.get())[i] = x;
    else
      reinterpret_cast<uint16_t*>(memory.get())[i] =
          dtype == DType::bfloat16 ? bfloat16_bits(x) : float16_bits(x);
  }
  double get(int64_t i) const {
    if (dtype == DType::float32) return reinterpret_cast<const float*>(memory.get())[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(memory.get())[i];
    return dtype == DType::bfloat16 ? bfloat16_value(bits) : float16_value(bits);
  }
};

void near(const Numbers& cuda, const Numbers& cpu, const char* name) {
  const double step = cpu.dtype == DType::bfloat16  ? 0.01
                      : cpu.dtype == DType::float16 ? 2e-3
                                                    : 4e-6;
  for (int64_t i = 0; i < cpu.count; ++i) {
    const double a = cuda.get(i), b = cpu.get(i);
    REQUIRE((a != a && b != b) || std::fabs(a - b) <= step * (1 + std::fabs(b)),
            "%s[%lld]: %.9g, CPU %.9g", name, (long long)i, a, b);
  }
}

CacheLayout random_layout(int64_t pages, int64_t page_size, int64_t heads, int64_t dim) {
  if (chance(0.5))
    return {pages, page_size, heads, dim, page_size * heads * dim, page_size * dim, dim};
  return {pages, page_size, heads, dim, page_size * heads * dim, dim, heads * dim};
}

void kv_write_case() {
  const DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  const int64_t dim = one_of({2, 6, 16, 64, 80}), heads = 1 + below(3), group = 1 + below(3);
  const int64_t count = below(12), page_size = one_of({1, 5, 16}), pages = 1 + below(4) + count;
  const int64_t table = 1 + below(9), gap = chance(0.5) ? below(9) : 0;
  const CacheLayout layout = random_layout(pages, page_size, heads, dim);
  const int64_t q_stride = group * heads * dim + gap, k_stride = heads * dim + gap;
  Numbers q(dtype, count * q_stride), k(dtype, count * k_stride), v(dtype, count * k_stride);
  Numbers keys(dtype, pages * page_size * heads * dim), values(keys);
  const int64_t rotary = chance(0.5) ? dim : 2 * below(dim / 2 + 1);
  std::vector<float> cos(table * rotary / 2), sin(table * rotary / 2);
  for (auto& x : cos) x = static_cast<float>(uniform(-1, 1));
  for (auto& x : sin) x = static_cast<float>(uniform(-1, 1));
  std::vector<int64_t> slots(pages * page_size), positions(count);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), engine);
  slots.resize(count);
  for (auto& slot : slots)
    if (chance(0.2)) slot = -1;
  for (auto& position : positions) position = below(table);
  Numbers q2(q), keys2(keys), values2(values);
  KvWriteArgs args{dtype,
                   q.memory.get(),
                   k.memory.get(),
                   v.memory.get(),
                   q_stride,
                   k_stride,
                   k_stride,
                   count,
                   group * heads,
                   positions.data(),
                   slots.data(),
                   cos.data(),
                   sin.data(),
                   table,
                   rotary,
                   keys.memory.get(),
                   values.memory.get(),
                   layout,
                   layout};
  cpu::kv_write(args, serial);
  args.q = q2.memory.get();
  args.k_cache = keys2.memory.get();
  args.v_cache = values2.memory.get();
  cuda::kv_write(args, nullptr);
  near(q2, q, "q");
  near(keys2, keys, "k_cache");
  near(values2, values, "v_cache");
}

void block_attention_case() {
  const DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  // Splits that no cluster can merge; or tiles so many that they are large, and not split.
  const bool longer = chance(0.03), wider = !longer && chance(0.03);
  const int64_t dim =
      longer || wider ? one_of({16, 64}) : one_of({2, 5, 32, 64, 64, 80, 96, 128, 128, 256, 300});
  const int64_t heads = 1 + below(2), group = wider ? 8 : one_of({1, 2, 3, 8});
  const int64_t segments = 1 + below(3), page_size = one_of({1, 7, 16, 64, 200});
  const int64_t longest =  // one split, or several
      longer ? 7000 + below(3000) : 1 + below(wider ? 200 : one_of({40, 200, 1500}));
  const int64_t width = (longest + page_size - 1) / page_size, pages = segments * width + 1;
  const CacheLayout layout = random_layout(pages, page_size, heads, dim);
  const CacheLayout v_layout = random_layout(pages, page_size, heads, dim);
  Numbers keys(dtype, pages * page_size * heads * dim), values(dtype, keys.count);
  std::vector<int64_t> order(pages), begin, end, length;
  for (int64_t i = 0; i < pages; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), engine);
  order.resize(segments * width);
  std::vector<bool> seen(pages * page_size);
  int64_t rows = 0, most = 0;
  for (int64_t s = 0; s < segments; ++s) {
    rows += below(3);
    begin.push_back(rows);
    rows += wider && s == 0 ? 100 + below(200) : chance(0.1) ? 8 + below(40) : below(6);
    end.push_back(rows);
    most = std::max(most, end[s] - begin[s]);
    length.push_back(chance(0.1) ? 0 : longer ? longest : 1 + below(longest));
    for (int64_t j = 0; j < length[s]; ++j)
      seen[order[s * width + j / page_size] * page_size + j % page_size] = true;
  }
  for (int64_t slot = 0; slot < pages * page_size; ++slot)
    for (int64_t h = 0; !seen[slot] && h < heads; ++h)  // what none may see
      for (int64_t d = 0; d < dim; ++d) {
        keys.set(layout.offset(slot / page_size, slot % page_size, h) + d, NAN);
        values.set(v_layout.offset(slot / page_size, slot % page_size, h) + d, NAN);
      }
  const int64_t stride = group * heads * dim + one_of({0, 0, 8, 3});
  Numbers q(dtype, rows * stride), out(dtype, rows * group * heads * dim);
  Numbers out2(out);
  BlockAttentionArgs args{dtype,
                          q.memory.get(),
                          stride,
                          rows,
                          group * heads,
                          keys.memory.get(),
                          values.memory.get(),
                          layout,
                          v_layout,
                          segments,
                          begin.data(),
                          end.data(),
                          length.data(),
                          order.data(),
                          width,
                          most + below(3),
                          longest,
                          static_cast<float>(uniform(0.05, dtype == DType::float32 ? 0.5 : 4)),
                          out.memory.get()};
  cpu::block_attention(args, serial);
  cuda_host::clusters(chance(0.7));  // a device has them or not; sums are of other orders
  const auto launch = [&args](Numbers& to) {
    std::memset(to.memory.get(), 0xff, to.bytes());
    Memory memory(cuda::block_attention_scratch(args), 0);
    args.out = to.memory.get();
    cuda::block_attention(args, memory.workspace(), nullptr);
  };
  launch(out2);
  near(out2, out, "out");
  if (chance(0.1)) {  // wrong bounds are no fault of the memory's, nor of the next launch
    const BlockAttentionArgs right = args;
    args.max_q_len = below(most + 1);
    args.max_kv_len = below(longest);
    launch(out);
    args = right;
  }
  args.segments = 1;  // each segment alone, to the bit
  const int64_t row = out.bytes() / std::max<int64_t>(1, rows);
  for (int64_t s = 0; s < segments; ++s) {
    args.q_start = &begin[s];
    args.q_end = &end[s];
    args.kv_lens = &length[s];
    args.block_table = &order[s * width];
    args.max_q_len = end[s] - begin[s] + below(3);
    args.max_kv_len = length[s] + below(300);
    launch(out);
    const auto of = [&](const Numbers& numbers) {
      return reinterpret_cast<const char*>(numbers.memory.get()) + begin[s] * row;
    };
    REQUIRE(std::memcmp(of(out), of(out2), (end[s] - begin[s]) * row) == 0,
            "a segment alone is not what it is among others");
  }
  cuda_host::clusters(true);
}

// A tensor [count, width] of rows in one or two strides, in memory of exact size.
struct StridedRows {
  RowStrides rows;
  Numbers numbers;

  StridedRows(DType dtype, int64_t count, int64_t width)
      : rows(strides(count, width)),
        numbers(dtype, count == 0 ? 0 : rows.offset(count - 1) + width) {}
  static RowStrides strides(int64_t count, int64_t width) {
    const int64_t inner = width + one_of({0, 0, 8, 3});
    const int64_t rows = chance(0.5) ? std::max<int64_t>(1, count) : 1 + below(3);
    return {rows, rows * inner + one_of({0, 8, 5}), inner};
  }
};

void rms_norm_case() {
  const DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  const int64_t width = one_of({1, 5, 64, 80, 128, 1024, 1032, 4096, 5000}), count = below(20);
  const StridedRows x(dtype, count, width), delta(dtype, count, width);
  const Numbers weight(dtype, width);
  Numbers bias(dtype, width);  // small, lest it cancel a product that was rounded to its own size
  for (int64_t i = 0; i < width; ++i) bias.set(i, uniform(-0.25, 0.25));
  Numbers out(dtype, count * width), out2(out), sum(out), sum2(out);
  const bool adds = chance(0.5);
  RmsNormArgs args{dtype,
                   x.numbers.memory.get(),
                   adds ? delta.numbers.memory.get() : nullptr,
                   x.rows,
                   delta.rows,
                   count,
                   width,
                   weight.memory.get(),
                   chance(0.3) ? bias.memory.get() : nullptr,
                   one_of({1e-5f, 1e-6f, 0.1f}),
                   adds ? sum.memory.get() : nullptr,
                   out.memory.get()};
  cpu::rms_norm(args, serial);
  args.sum = adds ? sum2.memory.get() : nullptr;
  args.out = out2.memory.get();
  cuda::rms_norm(args, nullptr);
  near(out2, out, "out");
  near(sum2, sum, "sum");
}

void swiglu_case() {
  const DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  const int64_t width = one_of({1, 7, 64, 1032}), count = below(9);
  StridedRows gate(dtype, count, width), up(dtype, count, width);
  for (int64_t i = 0; i < gate.numbers.count; ++i)
    if (chance(0.1)) gate.numbers.set(i, one_of({-1e4, -90.0, -20.0, 60.0, 3e4, NAN * 1.0}));
  Numbers out(dtype, count * width), out2(out);
  SwigluArgs args{
      dtype, gate.numbers.memory.get(), up.numbers.memory.get(), gate.rows, up.rows, count,
      width, out.memory.get()};
  cpu::swiglu(args, serial);
  args.out = out2.memory.get();
  cuda::swiglu(args, nullptr);
  near(out2, out, "out");
}

void fp8_linear_case() {
  const DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  // The parts of a cluster's CTAs may be of no step, or of more than the ring has. On the
  // stand-in's eight SMs: tiles of every height, of one to eight CTAs. A chunk has 64 rows.
  const int64_t in = one_of({64, 64, 128, 64 * 17, 64 * 40, 1, 30, 200});
  const int64_t out_width = in > 1000 ? one_of({1, 127, 130, 300, 391})
                                      : one_of({1, 8, 15, 63, 64, 127, 128, 130, 264, 390, 1030});
  const int64_t count = chance(0.1) ? 60 + below(80) : below(34);
  const int64_t stride = in + one_of({0, 0, 8, 3});
  Numbers x(dtype, count == 0 ? 0 : (count - 1) * stride + in), bias(dtype, out_width);
  Numbers out(dtype, count * out_width), out2(out);
  std::unique_ptr<uint8_t[]> weight(new uint8_t[out_width * in]);  // of exact size
  for (int64_t i = 0; i < out_width * in; ++i) {
    weight[i] = static_cast<uint8_t>(below(256));
    if (weight[i] % 128 == 127) weight[i] = 0;  // NaN
  }
  std::vector<float> scale(out_width);
  for (auto& s : scale) s = static_cast<float>(uniform(0.0005, 0.002) / std::sqrt(in));
  Fp8LinearArgs args{dtype,
                     x.memory.get(),
                     stride,
                     count,
                     in,
                     out_width,
                     weight.get(),
                     scale.data(),
                     chance(0.5) ? bias.memory.get() : nullptr,
                     out.memory.get()};
  cpu::fp8_linear(args, serial);
  const auto launch = [&args](Numbers& to, int64_t rows) {
    args.count = rows;
    args.out = to.memory.get();
    cuda::fp8_linear(args, nullptr);
  };
  cuda_host::clusters(chance(0.8));
  launch(out2, count);
  near(out2, out, "out");
  const int64_t fewer = count > 0 ? 1 + below(count) : 0;  // as among others, to the bit
  Numbers some(dtype, fewer * out_width);
  launch(some, fewer);
  REQUIRE(std::memcmp(some.memory.get(), out2.memory.get(), some.bytes()) == 0,
          "rows are not what they are among others");
  cuda_host::clusters(true);

  Numbers wide(dtype, out_width * in), wide2(wide);
  Fp8WidenArgs widen{dtype, in, out_width, weight.get(), scale.data(), wide.memory.get()};
  cpu::fp8_widen(widen, serial);
  widen.out = wide2.memory.get();
  cuda::fp8_widen(widen, nullptr);
  REQUIRE(std::memcmp(wide.memory.get(), wide2.memory.get(), wide.bytes()) == 0,
          "widened weights differ");
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
  const int cases = std::atoi(argv[2]);
  for (int i = 0; i < cases; ++i) {
    engine.seed(seed * 1000003 + static_cast<uint64_t>(i));
    cuda_host::seed(engine());
    const int64_t op = argc > 3 ? std::atoi(argv[3]) : i % 10;
    const char* const names[] = {
        "row_stats",  "select",          "unmask",   "certainty_forcing_loss",
        "kv_write",   "block_attention", "rms_norm", "swiglu",
        "fp8_linear", "commit"};
    now = std::string(names[op]) + " of seed " + argv[1] + ", case " + std::to_string(i);
    if (op == 0) row_stats_case();
    else if (op == 1) select_case();
    else if (op == 2) unmask_case();
    else if (op == 3) loss_case();
    else if (op == 4) kv_write_case();
    else if (op == 5) block_attention_case();
    else if (op == 6) rms_norm_case();
    else if (op == 7) swiglu_case();
    else if (op == 8) fp8_linear_case();
    else commit_case();
  }
  std::printf("%d cases, no difference\n", cases);
  return 0;
}
