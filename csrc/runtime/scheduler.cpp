#include "scheduler.h"

#include <stdexcept>
#include <string>

namespace dparallel {

namespace {

int64_t at_least_1(const char* name, int64_t value) {
  if (value < 1)
    throw std::invalid_argument(std::string(name) + ": expected >= 1, got " +
                                std::to_string(value));
  return value;
}

}  // namespace

Scheduler::Scheduler(int64_t lanes, int64_t pages, int64_t page_size, bool share)
    : page_size_(at_least_1("page_size", page_size)),
      share_(share),
      pages_(at_least_1("pages", pages)),
      tree_(pages_) {
  for (int64_t lane = at_least_1("lanes", lanes); lane-- > 0;) lanes_.push_back(lane);
}

void Scheduler::submit(int64_t id, Tokens prompt, int64_t length) {
  if (requests_.count(id)) throw std::invalid_argument("id: " + std::to_string(id) + " is taken");
  if (length < static_cast<int64_t>(prompt.size()))
    throw std::invalid_argument("length: expected at least the prompt's " +
                                std::to_string(prompt.size()) + ", got " + std::to_string(length));
  if (needed(length) > pages_.count())
    throw std::invalid_argument("length: " + std::to_string(length) + " positions need " +
                                std::to_string(needed(length)) + " pages of " +
                                std::to_string(page_size_) + ", and there are " +
                                std::to_string(pages_.count()));
  requests_.emplace(id, Request{std::move(prompt), length, -1, {}, {}, share_});
  queue_.push_back(id);
}

std::optional<Admission> Scheduler::admit() {
  if (queue_.empty() || lanes_.empty()) return std::nullopt;
  int64_t id = queue_.front();
  Request& request = requests_.at(id);
  auto* node = tree_.root();
  int64_t whole = share_ ? static_cast<int64_t>(request.prompt.size()) / page_size_ : 0;
  for (int64_t i = 0; i < whole; ++i) {
    auto* next = tree_.find(node, key(request.prompt, i));
    if (next == nullptr) break;
    if (!next->ready) {  // a request that runs is computing it: a pass later it is there
      abandon(request);
      return std::nullopt;
    }
    tree_.hold(next);
    request.path.push_back(next);
    node = next;
  }
  int64_t reused = static_cast<int64_t>(request.path.size()), total = needed(request.length);
  if (total - reused > pages_.free() + tree_.idle()) {
    abandon(request);
    return std::nullopt;
  }
  for (int64_t i = reused; i < total; ++i) {
    if (pages_.free() == 0) tree_.evict();
    Page page = pages_.take();
    if (i < whole)
      request.path.push_back(node = tree_.insert(node, key(request.prompt, i), page, false));
    else request.own.push_back(page);
  }
  queue_.pop_front();
  request.lane = lanes_.back();
  lanes_.pop_back();
  prompt_tokens_ += static_cast<int64_t>(request.prompt.size());
  reused_tokens_ += reused * page_size_;
  Admission admission{id, request.lane, {}, reused * page_size_};
  for (auto* held : request.path) admission.pages.push_back(held->page);
  admission.pages.insert(admission.pages.end(), request.own.begin(), request.own.end());
  return admission;
}

std::vector<std::pair<int64_t, Page>> Scheduler::store(int64_t id, const Tokens& tokens) {
  Request& request = running(id);
  std::vector<std::pair<int64_t, Page>> replaced;
  int64_t whole = static_cast<int64_t>(tokens.size()) / page_size_;
  if (whole > needed(request.length))
    throw std::invalid_argument(
        "tokens: expected as many as the request's " + std::to_string(needed(request.length)) +
        " pages of " + std::to_string(page_size_) + " hold, got " + std::to_string(tokens.size()));
  for (int64_t i = 0; i < whole && request.shares; ++i) {
    if (i < static_cast<int64_t>(request.path.size())) {
      request.path[i]->ready = true;
      continue;
    }
    auto* parent = request.path.empty() ? tree_.root() : request.path.back();
    auto* node = tree_.find(parent, key(tokens, i));
    if (node != nullptr && !node->ready) {
      // Somebody is computing the same: whoever shares that must wait for it.
      request.shares = false;
      break;
    }
    Page page = request.own.front();
    request.own.pop_front();
    if (node == nullptr) {
      node = tree_.insert(parent, key(tokens, i), page, true);
    } else {
      tree_.hold(node);
      pages_.give(page);
      replaced.emplace_back(i, node->page);
    }
    request.path.push_back(node);
  }
  return replaced;
}

void Scheduler::release(int64_t id) {
  auto at = requests_.find(id);
  if (at == requests_.end()) throw std::invalid_argument("id: no request " + std::to_string(id));
  Request& request = at->second;
  if (request.lane < 0) {
    for (auto waiting = queue_.begin(); waiting != queue_.end(); ++waiting)
      if (*waiting == id) {
        queue_.erase(waiting);
        break;
      }
  } else {
    lanes_.push_back(request.lane);
    for (Page page : request.own) pages_.give(page);
    abandon(request);
  }
  requests_.erase(at);
}

SchedulerStats Scheduler::stats() const {
  int64_t kept = tree_.idle();
  return {pages_.count(), pages_.count() - pages_.free() - kept,
          kept,           tree_.evicted(),
          prompt_tokens_, reused_tokens_};
}

int64_t Scheduler::needed(int64_t length) const {  // no sum of the two, which may overflow
  return length / page_size_ + (length % page_size_ != 0);
}

Tokens Scheduler::key(const Tokens& tokens, int64_t page) const {
  auto begin = tokens.begin() + page * page_size_;
  return Tokens(begin, begin + page_size_);
}

Scheduler::Request& Scheduler::running(int64_t id) {
  auto at = requests_.find(id);
  if (at == requests_.end() || at->second.lane < 0)
    throw std::invalid_argument("id: request " + std::to_string(id) + " does not run");
  return at->second;
}

void Scheduler::abandon(Request& request) {
  // From the leaf up: a node that is left has no child that is held.
  for (; !request.path.empty(); request.path.pop_back()) tree_.leave(request.path.back());
}

}  // namespace dparallel
