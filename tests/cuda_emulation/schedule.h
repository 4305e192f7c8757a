// The threads of a block, and which of them runs next.
//
// CUDA_EMULATION_ORDER=ascending or =descending runs blocks, and the threads that can run, by number; else
// they are drawn at random, by CUDA_EMULATION_SEED.
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "accesses.h"

struct uint3 {
  unsigned x, y, z;
};

namespace emulation {

constexpr unsigned kMostThreads = 1024;

// A line of a kernel's source where its threads meet.
struct Place {
  const char* operation;
  const char* file;
  int line;

  bool operator==(const Place&) const = default;
  std::string text() const {
    return line ? std::string(operation) + " at " + file + ":" + std::to_string(line) : operation;
  }
};

enum class State { ready, at_block_barrier, at_warp_exchange, at_warp_barrier, ended };

struct Fiber {
  ucontext_t start;
  jmp_buf paused;
  bool started = false;
  State state = State::ended;
  unsigned number = 0;
  uint3 thread{};
  Place place{"the start", "", 0};
  unsigned mask = 0;
  uint64_t given = 0;
  std::array<uint64_t, kWarp> received{};  // by lane
  std::array<uint16_t, kWarp> synced{};    // see Moment
};

// The fibers that can run, by warp.
struct Ready {
  std::array<std::vector<Fiber*>, kMostThreads / kWarp> warps;
  size_t count = 0;

  UNWATCHED void add(Fiber* fiber) {
    warps[fiber->number / kWarp].push_back(fiber);
    ++count;
  }
  // One of the first warp from `warp` on that has some.
  UNWATCHED Fiber* take(size_t warp, size_t choice) {
    while (warps[warp % warps.size()].empty()) {
      ++warp;
    }
    std::vector<Fiber*>& fibers = warps[warp % warps.size()];
    return take_from(fibers, fibers.begin() + choice % fibers.size());
  }
  // That with the lowest number, or the highest.
  UNWATCHED Fiber* take_outermost(bool highest, size_t num_warps) {
    size_t warp = highest ? num_warps - 1 : 0;
    while (warps[warp].empty()) {
      warp += highest ? -1 : 1;
    }
    const auto [lowest, last] = std::minmax_element(
        warps[warp].begin(), warps[warp].end(),
        [](const Fiber* a, const Fiber* b) { return a->number < b->number; });
    return take_from(warps[warp], highest ? last : lowest);
  }

 private:
  UNWATCHED Fiber* take_from(std::vector<Fiber*>& fibers, std::vector<Fiber*>::iterator at) {
    std::swap(*at, fibers.back());
    Fiber* fiber = fibers.back();
    fibers.pop_back();
    --count;
    return fiber;
  }
};

// Most of the time one warp has the lead, so that it runs as far ahead of the others as the barriers
// let it.
class Schedule {
 public:
  // Those of a launch.
  std::vector<size_t> blocks(size_t count) {
    order_ = environment("CUDA_EMULATION_ORDER", "random");
    if (order_ != "random" && order_ != "ascending" && order_ != "descending") {
      throw std::runtime_error(
          "CUDA_EMULATION_ORDER: " + order_ + ", expected random, ascending or descending");
    }
    std::vector<size_t> order(count);
    for (size_t i = 0; i < count; ++i) {
      order[i] = order_ == "descending" ? count - 1 - i : i;
      if (order_ == "random") {
        std::swap(order[i], order[random_() % (i + 1)]);
      }
    }
    return order;
  }

  unsigned warp(unsigned num_warps) { return random_() % num_warps; }

  UNWATCHED Fiber* next(Ready& ready, unsigned leader, unsigned num_warps) {
    if (order_ == "random") {
      return ready.take(random_() % 16 ? leader : warp(num_warps), random_());
    }
    return ready.take_outermost(order_ == "descending", num_warps);
  }

 private:
  static std::string environment(const char* name, const char* absent) {
    const char* value = std::getenv(name);
    return value ? value : absent;
  }

  std::string order_;
  std::mt19937 random_{
      static_cast<unsigned>(std::stoul(environment("CUDA_EMULATION_SEED", "1")))};
};

}  // namespace emulation
