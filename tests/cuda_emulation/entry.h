// What Python calls: functions that return null, or what went wrong.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "guarded_memory.h"

#define ENTRY extern "C" __attribute__((visibility("default")))

template <typename Body>
const char* reported(const Body& body) {
  static std::string message;
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

ENTRY inline __attribute__((used)) void* guarded_allocate(size_t bytes) {
  return emulation::guarded_memory().allocate(bytes);
}
ENTRY inline __attribute__((used)) void guarded_free(void* begin) {
  emulation::guarded_memory().free(begin);
}
// What was written outside of buffers that were freed since the last call, or null.
ENTRY inline __attribute__((used)) const char* guarded_damage() {
  static std::string damage;
  damage = std::exchange(emulation::guarded_memory().damage, "");
  return damage.empty() ? nullptr : damage.c_str();
}
