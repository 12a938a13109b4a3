// Which accesses happen before which, and a memory of who touched what: two accesses to a byte, one
// of them a write, by threads that no barrier and no fence puts in order are a race, whatever order
// the fibers happened to run in.
//
// Within a block, barriers order, of a team its own threads; shuffles do not. Between blocks, what
// a thread did or knew of at a fence is handed on by its next atomic to whoever does an atomic on
// the same address later, and counts there after a fence of its own; a barrier spreads it over the
// block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

namespace cuda_host {

// When a thread did something: the barriers, of its block and its team, and fences behind it.
struct Epoch {
  static constexpr uint32_t kAny = 0xffffffffu;     // several threads,
  static constexpr uint32_t kOfTeam = 0x80000000u;  // of this team alone where it is added
  static constexpr uint32_t kTeam = 128;            // threads
  uint32_t block = 0, thread = 0, barriers = 0, fences = 0, team_barriers = 0;

  uint32_t team() const {
    return thread == kAny ? kAny : thread >= kOfTeam ? thread - kOfTeam : thread / kTeam;
  }
};

// What is known of other blocks: of each, all that its threads did before a barrier of theirs, and
// what single threads did before a fence.
class Clock {
 public:
  void learn(const Clock& other);
  void learn(const Epoch& fence);
  bool covers(const Epoch& access) const;
  void clear() {
    barriers_.clear();
    fences_.clear();
  }

 private:
  std::map<uint32_t, uint32_t> barriers_;                     // by block
  std::map<std::pair<uint32_t, uint32_t>, uint32_t> fences_;  // by block and thread
};

struct ThreadClock {
  Clock known, fenced, pending;
};

// The bytes of memory, since the launch began. Bytes that were only ever accessed together share a
// cell.
class Shadow {
 public:
  // False: a race. `bytes` from `address` are accessed now.
  template <class Before>
  bool access(uintptr_t address, size_t bytes, bool writes, const Epoch& now, Before before) {
    for (const uintptr_t end = address + bytes; address < end;) {
      Page& page = page_of(address);
      const uintptr_t stop = std::min(end, (address | (kPage - 1)) + 1);
      while ((address | stop) % (1 << page.bits)) page.split();
      for (; address < stop; address += 1 << page.bits)
        if (!access(page.cells[address % kPage >> page.bits], writes, now, before)) return false;
    }
    return true;
  }
  void forget(uintptr_t address, size_t bytes) {
    const uintptr_t end = address + bytes;
    for (uintptr_t number = address / kPage; number * kPage < end; ++number) {
      const auto found = pages_.find(number);
      if (found == pages_.end()) continue;
      Page& page = *found->second;
      const uintptr_t first = std::max(address, number * kPage);
      const uintptr_t stop = std::min(end, (number + 1) * kPage);
      while ((first | stop) % (1 << page.bits)) page.split();
      for (uintptr_t at = first; at < stop; at += 1 << page.bits)
        page.cells[at % kPage >> page.bits] = Cell{};
    }
  }
  void clear() {
    pages_.clear();
    last_ = nullptr;
  }

 private:
  static constexpr uintptr_t kPage = 256;
  static constexpr size_t kLately = 8;

  struct Cell {
    bool written = false;
    Epoch write;
    std::vector<Epoch> reads;  // an entry stands for reads of a block; a block may have several
  };
  struct Page {
    unsigned bits = 4;  // a cell is of 1 << bits bytes
    std::vector<Cell> cells{kPage >> bits};

    void split() {
      std::vector<Cell> halves;
      halves.reserve(2 * cells.size());
      for (const Cell& cell : cells) halves.insert(halves.end(), 2, cell);
      cells = std::move(halves);
      --bits;
    }
  };

  template <class Before>
  static bool access(Cell& cell, bool writes, const Epoch& now, Before before) {
    if (cell.written && !before(cell.write)) return false;
    if (writes) {
      for (const Epoch& read : cell.reads)
        if (!before(read)) return false;
      cell.written = true;
      cell.write = now;
      cell.reads.clear();
      return true;
    }
    // Not further back: all blocks of a grid may have read it, and a second entry costs nothing.
    const size_t count = cell.reads.size();
    for (size_t i = count; i > 0 && i + kLately > count; --i) {
      Epoch& read = cell.reads[i - 1];
      if (read.block != now.block) continue;
      if (before(read)) read = now;
      else merge(read, now);
      return true;
    }
    cell.reads.push_back(now);
    return true;
  }
  static void merge(Epoch& read, const Epoch& now) {
    const uint32_t team = read.team();  // of another thread than now
    const bool same = team == now.team();
    read.thread = same ? Epoch::kOfTeam + team : Epoch::kAny;
    read.barriers = std::max(read.barriers, now.barriers);
    read.team_barriers = same ? std::max(read.team_barriers, now.team_barriers) : 0;
  }
  Page& page_of(uintptr_t address) {
    const uintptr_t number = address / kPage;
    if (last_ == nullptr || number != last_number_) {
      auto& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      last_ = page.get();
      last_number_ = number;
    }
    return *last_;
  }

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Page* last_ = nullptr;
  uintptr_t last_number_ = 0;
};

}  // namespace cuda_host
