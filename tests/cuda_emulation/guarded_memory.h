// Memory whose ends cannot be crossed unseen.
//
// A buffer ends where a page without access begins, so that a read or a write beyond it is a fault.
// It begins on a multiple of 16 bytes, as vector loads want; the bytes that this leaves over, in
// front of it and behind it, are checked when the buffer is freed. All of it starts as ones in
// every bit: NaN as a floating-point number, -1 as an integer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <new>
#include <string>

namespace emulation {

constexpr int kPoison = 0xFF;

struct Buffer {
  char* pages;         // first page, without access
  size_t num_bytes;    // of all pages
  char* inner;         // first page with access
  char* inner_end;     // the page behind it has none
  char* begin;
  size_t size;
};

struct GuardedMemory {
  std::map<void*, Buffer> buffers;
  std::string damage;  // what was written where nothing was allocated

  void* allocate(size_t size) {
    const size_t page = sysconf(_SC_PAGESIZE), aligned = (size + 15) / 16 * 16;
    const size_t inner = (aligned + page - 1) / page * page;
    Buffer buffer{nullptr, inner + 2 * page, nullptr, nullptr, nullptr, size};
    void* pages = mmap(
        nullptr, buffer.num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) {
      throw std::bad_alloc();
    }
    buffer.pages = static_cast<char*>(pages);
    buffer.inner = buffer.pages + page;
    buffer.inner_end = buffer.inner + inner;
    buffer.begin = buffer.inner_end - aligned;
    if (inner && mprotect(buffer.inner, inner, PROT_READ | PROT_WRITE) != 0) {
      throw std::bad_alloc();
    }
    std::memset(buffer.inner, kPoison, inner);
    buffers[buffer.begin] = buffer;
    return buffer.begin;
  }

  void free(void* begin) {
    const Buffer buffer = buffers.at(begin);
    buffers.erase(begin);
    check(buffer.inner, buffer.begin, buffer, "in front of");
    check(buffer.begin + buffer.size, buffer.inner_end, buffer, "behind");
    munmap(buffer.pages, buffer.num_bytes);
  }

 private:
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

inline GuardedMemory& guarded_memory() {
  static GuardedMemory memory;
  return memory;
}

}  // namespace emulation
