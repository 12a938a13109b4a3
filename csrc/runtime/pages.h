// Pages of cache slots, and the tree that shares finished ones between sequences. Host code,
// single-threaded.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dparallel {

using Page = int64_t;
using Tokens = std::vector<int64_t>;

// Which of `count` pages are free. The lowest free page goes first, so that a run can be repeated.
class PageAllocator {
 public:
  explicit PageAllocator(int64_t count) : taken_(count, false) {
    for (int64_t page = count; page-- > 0;) free_.push_back(page);
  }

  int64_t count() const { return static_cast<int64_t>(taken_.size()); }
  int64_t free() const { return static_cast<int64_t>(free_.size()); }

  Page take() {
    if (free_.empty()) throw std::logic_error("PageAllocator: no page is free");
    Page page = free_.back();
    free_.pop_back();
    taken_[page] = true;
    return page;
  }

  void give(Page page) {
    if (page < 0 || page >= count() || !taken_[page])
      throw std::logic_error("PageAllocator: page " + std::to_string(page) + " is not taken");
    taken_[page] = false;
    free_.push_back(page);
  }

 private:
  std::vector<bool> taken_;  // [count]
  std::vector<Page> free_;
};

// The content of a page is determined by the tokens of it and of all pages before it, so pages form
// a tree whose edges are a page's tokens. A node is held by the sequences that read it; one that
// nobody holds is kept until its page is needed, least recently used first. Whoever holds a node
// holds the way to it, so a node that nobody holds has no descendant that somebody does.
class PrefixTree {
 public:
  struct Node {
    Page page;
    Node* parent;
    const Tokens* key;  // owned by the parent's map
    int64_t holders = 0;
    int64_t used = 0;    // the clock when it was last held
    bool ready = false;  // its keys and values have been computed
    std::map<Tokens, std::unique_ptr<Node>> children;
  };

  explicit PrefixTree(PageAllocator& pages) : pages_(pages) {}

  Node* root() { return &root_; }
  int64_t size() const { return size_; }
  int64_t idle() const { return idle_; }  // nodes that nobody holds: their pages can be had
  int64_t evicted() const { return evicted_; }

  Node* find(Node* parent, const Tokens& key) {
    auto child = parent->children.find(key);
    return child == parent->children.end() ? nullptr : child->second.get();
  }

  // A new node, held once, whose page belongs to the tree from now on. Its parent must be held.
  Node* insert(Node* parent, const Tokens& key, Page page, bool ready) {
    auto [at, fresh] = parent->children.emplace(key, std::make_unique<Node>());
    if (!fresh) throw std::logic_error("PrefixTree: the node is there already");
    Node* node = at->second.get();
    node->page = page, node->parent = parent, node->key = &at->first, node->ready = ready;
    node->holders = 1;
    ++size_;
    return node;
  }

  void hold(Node* node) {
    if (node->holders++ == 0) {
      --idle_;
      leaves_.erase({node->used, node});
    }
  }

  void leave(Node* node) {
    if (--node->holders > 0) return;
    // A page that was never computed is of no use to anybody.
    if (!node->ready) return remove(node);
    node->used = ++clock_;
    ++idle_;
    if (node->children.empty()) leaves_.insert({node->used, node});
  }

  // Gives back the page that was of use least recently. There must be an idle node.
  void evict() {
    if (leaves_.empty()) throw std::logic_error("PrefixTree: nothing to evict");
    Node* node = leaves_.begin()->second;
    leaves_.erase(leaves_.begin());
    --idle_;
    ++evicted_;
    remove(node);
  }

 private:
  void remove(Node* node) {
    if (!node->children.empty()) throw std::logic_error("PrefixTree: the node has children");
    Node* parent = node->parent;
    pages_.give(node->page);
    --size_;
    parent->children.erase(parent->children.find(*node->key));
    if (parent != &root_ && parent->holders == 0 && parent->children.empty())
      leaves_.insert({parent->used, parent});
  }

  PageAllocator& pages_;
  Node root_{};
  // Idle nodes without children, by when they were used.
  std::set<std::pair<int64_t, Node*>> leaves_;
  int64_t size_ = 0, idle_ = 0, evicted_ = 0, clock_ = 0;
};

}  // namespace dparallel
