// Torch's parallel_for with threads that the thread sanitizer knows: it cannot see how OpenMP's wait
// for each other, and would take every result for a race. Linked into the extension in place of torch's.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" __attribute__((visibility("hidden"))) int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain_size, void (*body)(int64_t, int64_t, void*),
    void* context) {
  constexpr int64_t kThreads = 4;
  const int64_t size = std::max({(end - begin + kThreads - 1) / kThreads, grain_size, int64_t{1}});
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += size) {
    threads.emplace_back(body, first, std::min(end, first + size), context);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return 0;
}
