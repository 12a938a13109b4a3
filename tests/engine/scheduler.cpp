// Drives a Scheduler with random requests against a simple model of what the pages hold.
//
//   scheduler SEED OPERATIONS [FAULT]
//
// The model is the truth that users rely on: a page holds what was last computed into it, and a
// request reads its own tokens' pages. After every operation: a position that a request has stored
// is in its page, whoever computed it; no page that a request may still write is another's; pages
// used, kept and free add up. FAULT plants what the model must notice: "early" stores before
// computing, "leak" forgets to release, "twice" releases twice.
#include "scheduler.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

using namespace dparallel;

namespace {

constexpr int64_t kSize = 4;  // positions of a page

struct Request {
  Tokens tokens;  // of all its positions, the response's too
  int64_t prompt;
  int64_t lane = -1, stored = 0;
  std::vector<Page> pages;
};

[[noreturn]] void fail(const char* what, int64_t operation) {
  std::printf("operation %lld: %s\n", static_cast<long long>(operation), what);
  std::exit(1);
}

#define EXPECT(condition, what) \
  if (!(condition)) fail(what, operation)

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  std::mt19937_64 random(std::strtoull(argv[1], nullptr, 10));
  int64_t operations = std::atoll(argv[2]), next = 0, operation = 0;
  const char* fault = argc > 3 ? argv[3] : "";
  auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };

  const int64_t lanes = 1 + below(6), pages = 8 + below(40);
  const bool share = below(4) > 0;
  Scheduler scheduler(lanes, pages, kSize, share);
  std::map<int64_t, Request> requests;
  std::deque<int64_t> queue;
  std::vector<Tokens> holds(pages);  // what was computed into each page: all tokens up to its end
  int64_t admitted = 0, reused = 0, shared_now = 0;

  auto compute = [&](Request& r, int64_t upto) {  // keys and values of its positions [stored, upto)
    for (int64_t i = r.stored / kSize; i * kSize < upto; ++i)
      holds[r.pages[i]] = Tokens(
          r.tokens.begin(), r.tokens.begin() + std::min<int64_t>((i + 1) * kSize, r.tokens.size()));
  };
  auto store = [&](int64_t id, Request& r, int64_t upto) {
    for (auto [index, page] :
         scheduler.store(id, Tokens(r.tokens.begin(), r.tokens.begin() + upto)))
      r.pages[index] = page;
    r.stored = upto;
  };

  for (; operation < operations; ++operation) {
    switch (below(6)) {
      case 0:
      case 1: {  // submit: few different tokens, so that many begin alike
        Request r;
        r.prompt = below(20);
        int64_t length = r.prompt + below(12);
        for (int64_t i = 0; i < length; ++i)
          r.tokens.push_back(below(i < 12 ? 2 : 5) / (i < 8 ? 2 : 1));
        if (queue.size() > 8) break;
        scheduler.submit(next, Tokens(r.tokens.begin(), r.tokens.begin() + r.prompt), length);
        queue.push_back(next);
        requests.emplace(next++, r);
        break;
      }
      case 2: {  // admit
        while (auto found = scheduler.admit()) {
          EXPECT(!queue.empty() && found->id == queue.front(), "not first come, first served");
          queue.pop_front();
          Request& r = requests.at(found->id);
          r.lane = found->lane, r.pages = found->pages, r.stored = found->reused;
          for (auto& [id, other] : requests)
            EXPECT(id == found->id || other.lane != r.lane, "a lane is another's");
          EXPECT(static_cast<int64_t>(r.pages.size()) ==
                     (static_cast<int64_t>(r.tokens.size()) + kSize - 1) / kSize,
                 "not the pages that it needs");
          EXPECT(r.stored <= r.prompt && r.stored % kSize == 0, "reuse beyond the prompt");
          ++admitted;
          reused += r.stored > 0;
        }
        break;
      }
      case 3:
      case 4: {  // a pass: every running request computes up to somewhere
        for (auto& [id, r] : requests) {
          if (r.lane < 0) continue;
          int64_t length = static_cast<int64_t>(r.tokens.size());
          int64_t upto = std::min(length, std::max(r.prompt, r.stored) + below(6));
          if (!std::strcmp(fault, "early")) store(id, r, upto);
          else compute(r, upto), store(id, r, upto);
        }
        break;
      }
      default: {  // one ends, or is cancelled while it waits
        if (requests.empty()) break;
        auto at = std::next(requests.begin(), below(static_cast<int64_t>(requests.size())));
        if (!std::strcmp(fault, "leak") && at->second.lane >= 0 && below(50) == 0) {
          at->second.lane = -2;
          break;
        }
        if (at->second.lane == -2) break;
        if (at->second.lane < 0)
          for (auto w = queue.begin(); w != queue.end(); ++w)
            if (*w == at->first) {
              queue.erase(w);
              break;
            }
        scheduler.release(at->first);
        if (!std::strcmp(fault, "twice")) scheduler.release(at->first);
        requests.erase(at);
      }
    }
    std::map<Page, int> users;
    for (auto& [id, r] : requests) {
      if (r.lane < 0) continue;
      for (int64_t i = 0; i < static_cast<int64_t>(r.pages.size()); ++i) {
        EXPECT(r.pages[i] >= 0 && r.pages[i] < pages, "no such page");
        ++users[r.pages[i]];
        if ((i + 1) * kSize <= r.stored)
          EXPECT(holds[r.pages[i]] == Tokens(r.tokens.begin(), r.tokens.begin() + (i + 1) * kSize),
                 "a page does not hold what its request computed");
      }
    }
    for (auto& [id, r] : requests)
      for (int64_t i = 0; r.lane >= 0 && i < static_cast<int64_t>(r.pages.size()); ++i) {
        shared_now += users[r.pages[i]] > 1;
        if ((i + 1) * kSize > r.stored)
          EXPECT(users[r.pages[i]] == 1, "a page that is written is another's");
      }
    SchedulerStats stats = scheduler.stats();
    EXPECT(stats.used == static_cast<int64_t>(users.size()),
           "pages in use are not those of the running requests");
    EXPECT(stats.used + stats.kept <= stats.pages, "more pages than there are");
    EXPECT(share || stats.kept == 0, "kept without sharing");
  }
  for (auto& [id, r] : requests)
    if (r.lane != -2) scheduler.release(id);
  EXPECT(scheduler.stats().used == 0, "a page is lost");
  for (int64_t lane = 0; lane < lanes; ++lane) {  // all that is kept can be had again
    int64_t length = pages / lanes * kSize;
    scheduler.submit(next, {}, length);
    EXPECT(scheduler.admit().has_value(), "a lane or a page is lost");
    ++next;
  }
  std::printf("%lld operations, %lld admitted, %lld reused, %lld pages shared: no difference\n",
              static_cast<long long>(operations), static_cast<long long>(admitted),
              static_cast<long long>(reused), static_cast<long long>(shared_now));
  return 0;
}
