// The threads of a block as fibers of one thread.
//
// A fiber runs until it waits at a barrier or ends; schedule.h says who runs next. An access that no
// barrier orders with another thread's (accesses.h) is an error, and so are a barrier that not all of
// its threads reach, shared memory that is read before it was written, and a fault of memory or of
// arithmetic; errors name the lines where threads wait. Shared memory starts as NaN in every block.
#pragma once

#include <csignal>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "guarded_memory.h"
#include "schedule.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  size_t count() const { return size_t{1} * x * y * z; }
};

namespace emulation {

constexpr size_t kStackBytes = 256 << 10, kMostStatic = 48 << 10, kMostShared = 227 << 10;

// The stack of the fiber that runs, whose accesses are looked at, those to the stack excepted; null in
// the host's code, and in the emulator's while it looks at one.
inline const char* watched_stack = nullptr;

class Device {
 public:
  dim3 grid, block;
  uint3 block_index{};
  Fiber* current = nullptr;

  void run(
      void* kernel, dim3 grid_, dim3 block_, size_t dynamic_bytes, std::function<void()> body) {
    grid = grid_, block = block_, kernel_ = kernel, body_ = std::move(body);
    check_limits(dynamic_bytes);
    const std::vector<size_t> blocks = schedule_.blocks(grid.count());
    dynamic_ = allocate_shared(dynamic_bytes), dynamic_bytes_ = dynamic_bytes;
    // A fiber left in the middle of a kernel that failed starts anew.
    while (fibers_.size() < block.count()) {
      fibers_.push_back(make_fiber());
    }
    catch_signals();
    first_of_launch_ = interval_ + 1;
    for (size_t i = 0; i < blocks.size() && failure_.empty(); ++i) {
      const size_t plane = size_t{1} * grid.x * grid.y;
      block_index = {
          static_cast<unsigned>(blocks[i] % grid.x),
          static_cast<unsigned>(blocks[i] / grid.x % grid.y),
          static_cast<unsigned>(blocks[i] / plane)};
      run_block();
    }
    release_signals();
    for (const auto& [tag, memory] : shared_) {
      guarded_memory().free(memory.first);
    }
    shared_.clear();
    guarded_memory().free(std::exchange(dynamic_, nullptr));
    std::string failure = std::exchange(failure_, "");
    failure += std::exchange(guarded_memory().damage, "");
    if (!failure.empty()) {
      fibers_.clear();
      throw std::runtime_error("emulated kernel " + name() + ": " + failure);
    }
  }

  // What the fiber's warp gave, by lane; waits until every lane of the mask has given something.
  UNWATCHED const std::array<uint64_t, kWarp>& exchange(
      unsigned mask, uint64_t value, Place place, bool orders_memory = false) {
    Fiber& fiber = *current;
    if (!(mask >> (fiber.number % kWarp) & 1)) {
      fail("thread " + std::to_string(fiber.number) + " is not in the mask of " + place.text());
    }
    fiber.mask = mask, fiber.given = value;
    wait(orders_memory ? State::at_warp_barrier : State::at_warp_exchange, place);
    return current->received;
  }

  // How many threads of the block gave something else than 0; waits for all of them.
  UNWATCHED int block_barrier(bool value, Place place) {
    current->given = value;
    wait(State::at_block_barrier, place);
    return static_cast<int>(current->received[0]);
  }

  void* shared(const void* tag, size_t bytes) {
    auto found = shared_.find(tag);
    if (found == shared_.end()) {
      static_bytes_ += bytes;
      if (static_bytes_ > kMostStatic) {
        fail("more than 48 KiB of shared arrays");
      }
      found = shared_.emplace(tag, std::pair{allocate_shared(bytes), bytes}).first;
    }
    return found->second.first;
  }
  void* dynamic_shared() const { return dynamic_; }

  // A kernel reads or writes, at once after this.
  UNWATCHED void access(const char* address, size_t size, Kind kind) {
    const char* stack = watched_stack;
    watched_stack = nullptr;
    look(address, size, kind);
    watched_stack = stack;
  }

  [[noreturn]] void fail(const std::string& what) {
    watched_stack = nullptr;
    doubtful_.clear();
    failure_ = what + " (block " + text(block_index) + ", thread " +
               (current ? text(current->thread) : "none") + ", after " +
               (current ? current->place.text() : "none") + ")";
    _longjmp(scheduler_, 1);
  }

 private:
  std::function<void()> body_;
  void* kernel_ = nullptr;
  std::vector<Fiber*> fibers_;
  std::map<const void*, std::pair<void*, size_t>> shared_;
  void* dynamic_ = nullptr;
  size_t dynamic_bytes_ = 0, static_bytes_ = 0;
  uint32_t interval_ = 0, first_of_launch_ = 0, first_of_block_ = 0;
  // Writes that nothing orders with another thread's access, harmless if the bytes stay the same.
  struct Doubtful {
    const char* address;
    std::string before, message;
  };
  std::vector<Doubtful> doubtful_;
  std::string failure_;
  jmp_buf scheduler_;
  Schedule schedule_;
  std::array<struct sigaction, 4> handlers_{};
  stack_t signal_stack_{};
  static constexpr std::array<int, 4> kSignals{SIGSEGV, SIGBUS, SIGILL, SIGFPE};

  static std::string text(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
  }

  static void* allocate_shared(size_t bytes) {
    void* memory = guarded_memory().allocate(bytes);
    guarded_memory().find(memory)->is_shared = true;
    return memory;
  }

  std::string name() const {
    Dl_info info;
    if (!dladdr(kernel_, &info) || !info.dli_sname) {
      return "without a name";
    }
    int status = 0;
    char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
    const std::string name = status == 0 ? demangled : info.dli_sname;
    std::free(demangled);
    return name;
  }

  void check_limits(size_t dynamic_bytes) const {
    if (block.count() < 1 || block.count() > kMostThreads || block.z > 64 || grid.count() < 1 ||
        grid.x > 0x7FFFFFFF || grid.y > 0xFFFF || grid.z > 0xFFFF || dynamic_bytes > kMostShared) {
      throw std::runtime_error("emulated kernel " + name() + ": no device takes such a launch");
    }
  }

  UNWATCHED void run_block() {
    first_of_block_ = ++interval_;
    std::memset(dynamic_, kPoison, dynamic_bytes_);
    static_bytes_ = 0;
    for (const auto& [tag, memory] : shared_) {
      std::memset(memory.first, kPoison, memory.second);
      static_bytes_ += memory.second;
    }
    const unsigned count = static_cast<unsigned>(block.count());
    Ready ready;
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.state = State::ready, fiber.number = i, fiber.place = {"the start", "", 0};
      fiber.thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
      fiber.synced.fill(0);
      fiber.synced[i % kWarp] = 1;
      ready.add(&fiber);
    }
    const unsigned num_warps = (count + kWarp - 1) / kWarp;
    unsigned ended = 0, leader = schedule_.warp(num_warps);
    while (ready.count > 0) {
      Fiber& fiber = *schedule_.next(ready, leader, num_warps);
      resume(fiber);
      if (!failure_.empty()) {
        return;
      }
      ended += fiber.state == State::ended;
      const std::vector<Fiber*> met = fiber.state == State::at_block_barrier  ? met_in_block(count)
                                      : fiber.state == State::ended ? std::vector<Fiber*>()
                                                                    : met_in_warp(fiber);
      leader = met.size() == count ? schedule_.warp(num_warps) : leader;
      for (Fiber* each : met) {
        ready.add(each);
      }
    }
    if (ended < count) {
      describe_deadlock(count);
    }
  }

  UNWATCHED std::vector<Fiber*> met_in_block(unsigned count) {
    uint64_t total = 0;
    for (unsigned i = 0; i < count; ++i) {
      if (fibers_[i]->state != State::at_block_barrier || fibers_[i]->place != fibers_[0]->place) {
        return {};
      }
      total += fibers_[i]->given;
    }
    ++interval_;
    for (unsigned i = 0; i < count; ++i) {
      fibers_[i]->received[0] = total, fibers_[i]->state = State::ready;
    }
    return {fibers_.begin(), fibers_.begin() + count};
  }

  UNWATCHED std::vector<Fiber*> met_in_warp(const Fiber& last) {
    std::vector<Fiber*> met;
    std::array<uint64_t, kWarp> given{};
    const unsigned first = last.number / kWarp * kWarp;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(last.mask >> lane & 1)) {
        continue;
      }
      if (first + lane >= block.count()) {
        return {};
      }
      Fiber& fiber = *fibers_[first + lane];
      if (fiber.state != last.state || fiber.mask != last.mask ||
          fiber.place != last.place) {
        return {};
      }
      given[lane] = fiber.given;
      met.push_back(&fiber);
    }
    if (last.state == State::at_warp_barrier) {
      order(met);
    }
    for (Fiber* fiber : met) {
      fiber->received = given, fiber->state = State::ready;
    }
    return met;
  }

  // What each of the lanes did so far is known to all of them.
  static void order(const std::vector<Fiber*>& lanes) {
    std::array<uint16_t, kWarp> known{};
    for (const Fiber* fiber : lanes) {
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        known[lane] = std::max(known[lane], fiber->synced[lane]);
      }
    }
    for (Fiber* fiber : lanes) {
      fiber->synced = known;
      ++fiber->synced[fiber->number % kWarp];
    }
  }

  void describe_deadlock(unsigned count) {
    std::map<std::string, std::pair<unsigned, unsigned>> places;  // threads, and the first of them
    for (unsigned i = 0; i < count; ++i) {
      const Fiber& fiber = *fibers_[i];
      const std::string where =
          fiber.state == State::ended ? "ended" : "wait in " + fiber.place.text();
      ++places.try_emplace(where, 0u, i).first->second.first;
    }
    failure_ = "divergent barrier in block " + text(block_index) + ":";
    for (const auto& [where, threads] : places) {
      failure_ += " " + std::to_string(threads.first) + " threads from number " +
                  std::to_string(threads.second) + " on " + where + ";";
    }
  }

  UNWATCHED void wait(State state, Place place) {
    check_doubtful();
    current->state = state, current->place = place;
    pause();
  }

  __attribute__((noinline)) void resume(Fiber& fiber) {
    current = &fiber;
    watched_stack = static_cast<const char*>(fiber.start.uc_stack.ss_sp);
    if (_setjmp(scheduler_) == 0) {
      if (fiber.started) {
        _longjmp(fiber.paused, 1);
      }
      fiber.started = true;
      setcontext(&fiber.start);
    }
    watched_stack = nullptr;
    current = nullptr;
  }

  __attribute__((noinline)) void pause() {
    if (_setjmp(current->paused) == 0) {
      _longjmp(scheduler_, 1);
    }
  }

  UNWATCHED void look(const char* address, size_t size, Kind kind) {
    Buffer* buffer = guarded_memory().find(address);
    if (!buffer) {
      return;  // the host's: arguments of the launch
    }
    const char* verb = kind == Kind::read ? "a read" : "a write";
    if (address < buffer->begin || address + size > buffer->begin + buffer->size) {
      fail(
          std::string(verb) + " of " + std::to_string(size) + " bytes out of bounds, at " +
          std::to_string(address - buffer->begin) + " of a buffer of " +
          std::to_string(buffer->size));
    }
    const History::Found found = buffer->history->record(
        address - buffer->begin, size, kind,
        {buffer->is_shared ? first_of_block_ : first_of_launch_, first_of_block_, interval_,
         current->number, current->synced.data()});
    if (buffer->is_shared && kind == Kind::read && !found.is_written_in_block) {
      fail("a read of shared memory that was not written");
    }
    if (!found.is_unordered) {
      return;
    }
    const std::string message =
        std::string(verb) + ", and " + (found.other_wrote ? "a write" : "a read") + " by thread " +
        std::to_string(found.other_thread) + (found.other_block ? " of another block" : "") +
        ", without a barrier between them, at byte " + std::to_string(address - buffer->begin) +
        " of a buffer of " + std::to_string(buffer->size) + (buffer->is_shared ? ", shared" : "");
    if (kind == Kind::write) {
      doubtful_.push_back({address, std::string(address, size), message});
    } else {
      fail(message);
    }
  }

  // Before another thread runs.
  UNWATCHED void check_doubtful() {
    if (doubtful_.empty()) {
      return;
    }
    for (const Doubtful& one : std::exchange(doubtful_, {})) {
      if (std::memcmp(one.address, one.before.data(), one.before.size()) != 0) {
        fail(one.message);
      }
    }
  }

  static void live();  // what every fiber does

  static Fiber* make_fiber() {
    auto* fiber = new Fiber;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = guarded_memory().allocate(kStackBytes);
    fiber->start.uc_stack.ss_size = kStackBytes;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, &Device::live, 0);
    return fiber;
  }

  void catch_signals() {
    static std::array<char, 64 << 10> stack;
    stack_t own{};
    own.ss_sp = stack.data(), own.ss_size = stack.size();
    sigaltstack(&own, &signal_stack_);
    struct sigaction action{};
    action.sa_sigaction = &Device::on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < kSignals.size(); ++i) {
      sigaction(kSignals[i], &action, &handlers_[i]);
    }
  }

  void release_signals() {
    for (size_t i = 0; i < kSignals.size(); ++i) {
      sigaction(kSignals[i], &handlers_[i], nullptr);
    }
    sigaltstack(&signal_stack_, nullptr);
  }

  static void on_signal(int number, siginfo_t* info, void*);
};

UNWATCHED inline Device& device() {
  static Device device;
  return device;
}

inline void Device::live() {
  for (;;) {
    device().body_();
    device().check_doubtful();
    device().current->state = State::ended;
    device().pause();
  }
}

inline void Device::on_signal(int number, siginfo_t* info, void*) {
  Device& here = device();
  if (!here.current) {
    signal(number, SIG_DFL);
    return;
  }
  here.fail(
      number == SIGILL   ? "undefined behaviour, such as a shift by too much or an overflow"
      : number == SIGFPE ? "a division by zero"
                         : "access out of bounds near address " +
                               std::to_string(reinterpret_cast<uintptr_t>(info->si_addr)));
}

}  // namespace emulation
