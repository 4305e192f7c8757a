// Packed active features: CSR over tokens (row_ptr, feature, value), and the view by feature that
// the backward needs.
#pragma once

#include <cstdint>
#include <vector>

namespace tca_fast {

// Entries grouped by feature; within a feature in ascending token order.
struct ByFeature {
  std::vector<int64_t> start;   // [F + 1]
  std::vector<int32_t> token;   // [entries]
  std::vector<int64_t> entry;   // [entries], position in the CSR arrays
};

inline ByFeature by_feature(
    const int64_t* row_ptr, const int32_t* feature, int64_t num_tokens, int64_t num_features) {
  ByFeature result;
  const int64_t entries = row_ptr[num_tokens];
  result.start.assign(num_features + 1, 0);
  for (int64_t e = 0; e < entries; ++e) {
    ++result.start[feature[e] + 1];
  }
  for (int64_t f = 0; f < num_features; ++f) {
    result.start[f + 1] += result.start[f];
  }
  result.token.resize(entries);
  result.entry.resize(entries);
  std::vector<int64_t> next(result.start.begin(), result.start.end() - 1);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t e = row_ptr[t]; e < row_ptr[t + 1]; ++e) {
      const int64_t slot = next[feature[e]]++;
      result.token[slot] = static_cast<int32_t>(t);
      result.entry[slot] = e;
    }
  }
  return result;
}

}  // namespace tca_fast
