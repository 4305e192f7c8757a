// Which thread read and wrote what last, and whether something orders it with the access at hand.
//
// An access and a write of other threads to the same bytes are ordered by a barrier of the block, by
// __syncwarp among the lanes that meet there, or by the end of a launch; by nothing else: not by a
// shuffle or a vote, and never between blocks. Two atomic accesses need no order.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace emulation {

// What is looked at is the kernel: looking at the emulator as well would take several times as long.
#define UNWATCHED __attribute__((no_sanitize("thread")))

constexpr unsigned kWarp = 32;

enum class Kind { read, write, atomic };

// Intervals are numbered through all launches: one ends where a block ends or meets at a barrier.
struct Moment {
  uint32_t first_of_launch, first_of_block, interval;
  unsigned thread;         // of its block
  const uint16_t* synced;  // of each lane, how many of its __syncwarp are known
};

// The accesses to one buffer since it was allocated; only what is accessed takes memory.
class History {
 public:
  explicit History(size_t bytes) : num_bytes_((bytes + 1) / 2 * sizeof(Cell)) {
    void* memory = mmap(
        nullptr, num_bytes_ + 1, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    cells_ = static_cast<Cell*>(memory);
  }
  ~History() { munmap(cells_, num_bytes_ + 1); }
  History(const History&) = delete;
  History& operator=(const History&) = delete;

  struct Found {
    bool is_unordered = false, is_written_in_block = true;
    bool other_wrote = false, other_block = false;
    unsigned other_thread = 0;
  };

  // Records an access of `size` bytes from `offset` on, and says what was found there.
  UNWATCHED Found record(size_t offset, size_t size, Kind kind, const Moment& now) {
    Found found;
    for (size_t at = offset / 2; at <= (offset + size - 1) / 2; ++at) {
      const unsigned first = 2 * at >= offset, second = 2 * at + 1 < offset + size;
      Record own;
      own.interval = now.interval;
      own.thread = now.thread, own.bytes = first | second << 1, own.is_atomic = kind == Kind::atomic;
      own.synced = now.synced[now.thread % kWarp];
      Cell& cell = cells_[at];
      found.is_written_in_block &= cell.write.interval >= now.first_of_block;
      look(cell.write, own, now, true, found);
      if (kind == Kind::read) {
        // Two readers are kept, so that one of them is another thread than the one that writes.
        if (!(cell.reads[0].interval == own.interval && cell.reads[0].thread == own.thread)) {
          cell.reads[1] = cell.reads[0];
        }
        cell.reads[0] = own;
      } else {
        look(cell.reads[0], own, now, false, found);
        look(cell.reads[1], own, now, false, found);
        cell.write = own;
      }
    }
    return found;
  }

 private:
  struct Record {
    uint32_t interval;
    uint16_t thread : 10, bytes : 2, is_atomic : 1;
    uint16_t synced;
  };
  // Of two bytes, because no two threads write to one half of a smaller number.
  struct Cell {
    Record write, reads[2];
  };

  UNWATCHED static void look(
      const Record& other, const Record& own, const Moment& now, bool other_wrote, Found& found) {
    if (found.is_unordered || other.interval < now.first_of_launch || !(other.bytes & own.bytes) ||
        (other.is_atomic && own.is_atomic)) {
      return;
    }
    const bool other_block = other.interval < now.first_of_block;
    if (!other_block) {
      const bool same_warp = other.thread / kWarp == own.thread / kWarp;
      if (other.interval < now.interval || other.thread == own.thread ||
          (same_warp && now.synced[other.thread % kWarp] >= other.synced)) {
        return;
      }
    }
    found.is_unordered = true;
    found.other_wrote = other_wrote, found.other_block = other_block;
    found.other_thread = other.thread;
  }

  Cell* cells_;
  size_t num_bytes_;
};

}  // namespace emulation
