// Which request runs in which lane of the batch, on which pages. Host code; the caller holds a
// lock.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "pages.h"

namespace dparallel {

struct Admission {
  int64_t id;
  int64_t lane;
  std::vector<Page> pages;  // of positions [0, length), in order
  int64_t reused;           // positions [0, reused) are there already
};

struct SchedulerStats {
  int64_t pages;  // all there are; used + kept + free
  int64_t used;   // by requests that run
  int64_t kept;   // finished prefixes that nobody uses
  int64_t evicted;
  int64_t prompt_tokens;  // of the requests admitted so far
  int64_t reused_tokens;  // of those, how many were there already
};

// First come, first served: a request waits until there are a lane and all the pages that it can
// need, and those behind it wait too, so none starves and none that runs can fail for want of
// memory.
class Scheduler {
 public:
  // share: full pages of finished positions are shared by whoever begins with the same tokens. That
  // is exact where a page's contents depend on no later token, as with block-causal models.
  Scheduler(int64_t lanes, int64_t pages, int64_t page_size, bool share);

  // `length` positions in all, of which the prompt is known.
  void submit(int64_t id, Tokens prompt, int64_t length);

  // The next request, if it can run now. Call again until there is none.
  std::optional<Admission> admit();

  // The positions of `tokens`, a running request's first ones, are final and their keys and values
  // computed: others may share their full pages. Returns (index, page) of those that the request
  // shall use from now on instead of its own, because the same were there already.
  std::vector<std::pair<int64_t, Page>> store(int64_t id, const Tokens& tokens);

  // The request is over, whether it ran or waited. Its pages are free, or kept for who begins as it
  // did.
  void release(int64_t id);

  int64_t waiting() const { return static_cast<int64_t>(queue_.size()); }
  int64_t page_size() const { return page_size_; }

  SchedulerStats stats() const;

 private:
  struct Request {
    Tokens prompt;
    int64_t length;
    int64_t lane;                         // -1: it waits
    std::vector<PrefixTree::Node*> path;  // the first pages, which it shares
    std::deque<Page> own;                 // those behind them
    bool shares;
  };

  int64_t needed(int64_t length) const;  // pages of so many positions
  Tokens key(const Tokens& tokens, int64_t page) const;
  Request& running(int64_t id);
  void abandon(Request& request);

  int64_t page_size_;
  bool share_;
  PageAllocator pages_;
  PrefixTree tree_;
  std::vector<int64_t> lanes_;  // free ones
  std::deque<int64_t> queue_;
  std::map<int64_t, Request> requests_;
  int64_t prompt_tokens_ = 0, reused_tokens_ = 0;
};

}  // namespace dparallel
