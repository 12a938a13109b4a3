// Cases of the ops that read logits and commit tokens.
#include "cases.h"

namespace cases {

void row_stats_case() {
  const int64_t vocab = random_vocab(), total = below(6);
  Rows logits(total, vocab, true, 0.0);
  if (chance(0.3)) logits.exaggerate();
  if (logits.dtype == DType::float32 && chance(0.3)) logits.append_infinities();
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
  std::vector<int64_t> unchecked = suppress;
  for (int64_t n = below(3); n > 0; --n)
    unchecked.push_back(one_of<int64_t>({-1, vocab, INT64_MAX, (int64_t{1} << 32) + below(vocab)}));
  args.exclusions.suppress = unchecked.data();
  args.exclusions.suppress_count = static_cast<int64_t>(unchecked.size());
  std::vector<size_t> bad;
  for (size_t i = 0; i < ids.size(); ++i)
    if (chance(0.05)) {  // on a device nobody has looked
      bad.push_back(i);
      ids[i] = one_of<int64_t>({-1, vocab, INT64_MAX, INT64_MIN});
    }
  Memory memory(cuda::row_stats_scratch(args), cuda::row_stats_counters(args));
  launched(cuda::row_stats(args, memory.workspace(), nullptr));
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

void row_topk_case() {
  const bool wide = chance(0.1);  // more keys than the last block looks at together
  const int64_t vocab = wide ? 300000 : random_vocab(), total = wide ? 1 : 1 + below(4);
  Rows logits(total, vocab, true, 0.0);
  if (chance(0.3)) logits.exaggerate();
  for (int64_t r = 0; r < total; ++r) {
    const int64_t kind = below(8), first = below(vocab), many = below(300);
    if (kind == 0)  // more equal logits than a block lists
      for (int64_t v = first; v < vocab; ++v) logits.put(r * logits.stride + v, 7.0f);
    else if (kind == 1)  // few that may be chosen
      for (int64_t v = 0; v < vocab; ++v)
        if (v < first || v > first + many) logits.put(r * logits.stride + v, -kInfinity);
  }
  std::vector<int64_t> rows;
  const bool indexed = chance(0.5);
  for (int64_t i = indexed ? below(5) : 0; i > 0; --i) rows.push_back(below(total));
  rows.reserve(1);  // an empty list is not the lack of one
  const int64_t count = indexed ? static_cast<int64_t>(rows.size()) : total;
  const std::vector<int64_t> suppress = random_suppress(vocab);
  const int64_t k = wide ? kMostTop : 1 + below(kMostTop);
  struct Output {
    std::vector<int64_t> tokens, error;
    std::vector<float> logprobs;
    Output(int64_t count, int64_t k)
        : tokens(count * k, -7), error(count, -7), logprobs(count * k, -7.0f) {}
  } on_cpu(count, k), on_cuda(count, k);
  const int64_t mask_id = chance(0.7) ? below(vocab) : -1;
  const auto args_of = [&](Output& o) {
    return RowTopkArgs{logits.flat(),
                       indexed ? rows.data() : nullptr,
                       count,
                       k,
                       {mask_id, suppress.data(), static_cast<int64_t>(suppress.size())},
                       o.tokens.data(),
                       o.logprobs.data(),
                       o.error.data()};
  };
  cpu::row_topk(args_of(on_cpu), serial);
  const RowTopkArgs args = args_of(on_cuda);
  Memory memory(cuda::row_topk_scratch(args), cuda::row_topk_counters(args));
  launched(cuda::row_topk(args, memory.workspace(), nullptr));
  memory.check();
  same(on_cuda.error, on_cpu.error, "error");
  same(on_cuda.tokens, on_cpu.tokens, "tokens");
  close(on_cuda.logprobs, on_cpu.logprobs, "logprobs");
}

namespace {

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

}  // namespace

void select_case() {
  const int64_t batch = below(4), length = one_of<int64_t>({0, 1, 5, 32, 256, 300, 2100});
  const auto size = static_cast<size_t>(batch * length);
  std::vector<float> statistics[3];
  for (auto& s : statistics) {
    s.resize(size);
    for (auto& x : s)  // with ties
      x = chance(0.02) ? one_of({NAN, kInfinity}) : static_cast<float>(below(40)) / 40.0f;
  }
  std::vector<Flag> eligible(size + 1);
  std::unique_ptr<bool[]> a(new bool[size + 1]), b(new bool[size + 1]);
  for (size_t i = 0; i < size; ++i) eligible[i] = flag(0.6);
  const std::vector<float> policy = random_policy(batch);
  SelectArgs args{statistics[0].data(),
                  statistics[1].data(),
                  statistics[2].data(),
                  eligible.data(),
                  policy.data(),
                  batch,
                  length,
                  a.get()};
  cpu::select(args, serial);
  args.commit = b.get();
  Memory memory(cuda::select_scratch(args), 0);
  launched(cuda::select(args, memory.workspace(), nullptr));
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
    launched(cuda::unmask(bad, memory.workspace(), nullptr));
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
  launched(cuda::unmask(args, memory.workspace(), nullptr));
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
  std::vector<Flag> eligible(size + 1);
  std::unique_ptr<bool[]> commit(new bool[size + 1]());
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
  cpu::select({field[0].data(), field[1].data(), field[2].data(), eligible.data(), policy.data(),
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
  std::vector<Flag> commit(count + 1);
  for (int64_t i = 0; i < count; ++i) {
    token.push_back(below(7) - 1);
    const bool fits = token.back() >= 0 && token.back() != mask_id;
    commit[i] = fits ? flag(often) : 0;
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
                      commit.data(),
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
    launched(cuda::commit(args_of(spoiled), memory.workspace(), nullptr));
    memory.check();
    REQUIRE(spoiled.error == worst, "error: %lld, expected %lld", (long long)spoiled.error,
            (long long)worst);
    positions = positions_before, lane = lane_before, token = token_before;
    positions.reserve(1), lane.reserve(1);
  }
  launched(cuda::commit(args_of(on_cuda), memory.workspace(), nullptr));
  memory.check();
  same(on_cuda.tokens, on_cpu.tokens, "tokens");
  same(on_cuda.remaining, on_cpu.remaining, "remaining");
  same(on_cuda.first, on_cpu.first, "first");
  same(on_cuda.changed, on_cpu.changed, "changed");
  REQUIRE(on_cuda.error == on_cpu.error, "error: %lld", (long long)on_cuda.error);
}

// Some launches, of which the first with an error counts.
void keep_error_case() {
  int64_t on_cpu = kNoError;
  const std::unique_ptr<int64_t> word(new int64_t{kNoError});  // not beside the kernel's arguments
  int64_t& on_cuda = *word;
  for (int launch = 0; launch < 3; ++launch) {
    std::vector<int64_t> error(one_of<int64_t>({0, 1, 5, 511, 512, 513, 3000}), kNoError);
    if (chance(0.5))
      for (auto& e : error)
        if (chance(0.1)) e = below(INT64_MAX);
    const auto count = static_cast<int64_t>(error.size());
    cpu::keep_error({error.data(), count, &on_cpu}, serial);
    launched(cuda::keep_error({error.data(), count, &on_cuda}, nullptr));
    REQUIRE(on_cuda == on_cpu, "word: %lld, CPU %lld", (long long)on_cuda, (long long)on_cpu);
  }
}

}  // namespace cases
