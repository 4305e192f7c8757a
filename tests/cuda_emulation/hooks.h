// The calls that -fsanitize=thread puts in front of every access. The sanitizer's own library is not
// linked; these are hidden, so that each library calls its own.
#pragma once

#include "fibers.h"

#define EMULATED_HOOK extern "C" inline __attribute__((used, visibility("hidden"))) UNWATCHED
EMULATED_HOOK void emulated_access(const void* address, size_t size, emulation::Kind kind) {
  const char *byte = static_cast<const char*>(address), *stack = emulation::watched_stack;
  const bool is_on_stack = static_cast<size_t>(byte - stack) < emulation::kStackBytes;
  if (stack != nullptr && !is_on_stack && size > 0) {
    emulation::device().access(byte, size, kind);
  }
}
#define EMULATED_ACCESS(operation, size)                                 \
  EMULATED_HOOK void __tsan_##operation##size(void* address) {           \
    emulated_access(address, size, emulation::Kind::operation);          \
  }                                                                      \
  EMULATED_HOOK void __tsan_unaligned_##operation##size(void* address) { \
    emulated_access(address, size, emulation::Kind::operation);          \
  }
#define EMULATED_ACCESSES(size) \
  EMULATED_ACCESS(read, size)   \
  EMULATED_ACCESS(write, size)
EMULATED_ACCESSES(1)
EMULATED_ACCESSES(2)
EMULATED_ACCESSES(4)
EMULATED_ACCESSES(8)
EMULATED_ACCESSES(16)
EMULATED_HOOK void __tsan_read_range(void* address, size_t size) {
  emulated_access(address, size, emulation::Kind::read);
}
EMULATED_HOOK void __tsan_write_range(void* address, size_t size) {
  emulated_access(address, size, emulation::Kind::write);
}
EMULATED_HOOK void __tsan_init() {}
EMULATED_HOOK void __tsan_func_entry(void*) {}
EMULATED_HOOK void __tsan_func_exit() {}
EMULATED_HOOK void __tsan_vptr_read(void*) {}
EMULATED_HOOK void __tsan_vptr_update(void*, void*) {}
// The host's counts of who holds a tensor.
EMULATED_HOOK int __tsan_atomic32_fetch_add(volatile int* address, int value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
