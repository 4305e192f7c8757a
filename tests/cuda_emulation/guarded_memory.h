// Memory whose ends cannot be crossed unseen.
//
// A buffer ends where a page without access begins, so that a read or a write beyond it is a fault.
// It begins on a multiple of 16 bytes, as vector loads want; the bytes that this leaves over, in
// front of it and behind it, are checked when the buffer is freed. All of it starts as ones in
// every bit: NaN as a floating-point number, -1 as an integer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <string>

#include "accesses.h"

namespace emulation {

constexpr int kPoison = 0xFF;

struct Buffer {
  char* pages;         // first page, without access
  size_t num_bytes;    // of all pages
  char* inner;         // first page with access
  char* inner_end;     // the page behind it has none
  char* begin;
  size_t size;
  std::unique_ptr<History> history;
  bool is_shared = false;  // of a block

  UNWATCHED bool contains(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    return pages <= byte && byte < pages + num_bytes;
  }
};

struct GuardedMemory {
  std::map<const void*, Buffer> buffers;  // by their first page
  std::string damage;                     // what was written where nothing was allocated

  void* allocate(size_t size) {
    const size_t page = sysconf(_SC_PAGESIZE), aligned = (size + 15) / 16 * 16;
    const size_t inner = (aligned + page - 1) / page * page, num_bytes = inner + 2 * page;
    void* memory = mmap(
        nullptr, num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    Buffer& buffer = buffers[memory];
    buffer.pages = static_cast<char*>(memory), buffer.num_bytes = num_bytes;
    buffer.inner = buffer.pages + page;
    buffer.inner_end = buffer.inner + inner;
    buffer.begin = buffer.inner_end - aligned, buffer.size = size;
    buffer.history = std::make_unique<History>(size);
    if (inner && mprotect(buffer.inner, inner, PROT_READ | PROT_WRITE) != 0) {
      throw std::bad_alloc();
    }
    std::memset(buffer.inner, kPoison, inner);
    std::fill(recent_, recent_ + kRecent, Recent());
    return buffer.begin;
  }

  // The buffer whose pages have the address, those without access included, or null.
  UNWATCHED Buffer* find(const void* address) {
    const uintptr_t page = reinterpret_cast<uintptr_t>(address) / kPage;
    Recent& recent = recent_[page % kRecent];
    if (recent.page != page) {
      auto next = buffers.upper_bound(address);
      recent = {page, next == buffers.begin() ? nullptr : &std::prev(next)->second};
      if (recent.buffer && !recent.buffer->contains(address)) {
        recent.buffer = nullptr;
      }
    }
    return recent.buffer;
  }

  void free(void* begin) {
    const Buffer& buffer = *find(begin);
    check(buffer.inner, buffer.begin, buffer, "in front of");
    check(buffer.begin + buffer.size, buffer.inner_end, buffer, "behind");
    munmap(buffer.pages, buffer.num_bytes);
    std::fill(recent_, recent_ + kRecent, Recent());
    buffers.erase(buffer.pages);
  }

 private:
  // What was looked for lately: a page is of one buffer, or of none.
  struct Recent {
    uintptr_t page = 0;
    Buffer* buffer = nullptr;
  };
  static constexpr size_t kRecent = 1024, kPage = 4096;
  Recent recent_[kRecent] = {};

  void check(const char* from, const char* to, const Buffer& buffer, const char* where) {
    for (const char* byte = from; byte < to; ++byte) {
      if (static_cast<unsigned char>(*byte) != kPoison) {
        damage += "a write " + std::string(where) + " a buffer of " + std::to_string(buffer.size) +
                  " bytes\n";
        return;
      }
    }
  }
};

UNWATCHED inline GuardedMemory& guarded_memory() {
  static GuardedMemory memory;
  return memory;
}

}  // namespace emulation
