// csrc/cuda/index_arithmetic.h against loops that look at every bit, entry and segment.

#include "index_arithmetic.h"

#include <random>
#include <set>
#include <sstream>

#include "entry.h"

namespace cuda = tca_fast::cuda;

namespace {

using Random = std::mt19937_64;

// Words that are empty, full, sparse or anything.
uint32_t random_word(Random& random) {
  switch (random() % 4) {
    case 0:
      return random() % 2 ? 0u : 0xFFFFFFFFu;
    case 1:
      return static_cast<uint32_t>(random() & random() & random());
    default:
      return static_cast<uint32_t>(random());
  }
}

template <typename... Values>
void expect(bool holds, const char* what, Values... values) {
  if (!holds) {
    std::ostringstream text;
    text << what;
    ((text << " " << values), ...);
    throw std::runtime_error(text.str());
  }
}

void check_words(Random& random) {
  uint32_t words[24];
  const int64_t stride = 1 + random() % 3;
  for (uint32_t& word : words) {
    word = random_word(random);
  }
  const int64_t position = random() % 256;
  int rank = 0;
  for (int64_t bit = 0; bit < position; ++bit) {
    rank += words[bit / 32 * stride] >> bit % 32 & 1;
  }
  expect(cuda::rank_in_words(words, stride, position) == rank, "rank_in_words", position);
  const uint32_t word = words[0];
  uint32_t rest = word;
  int found = 0;
  for (int bit = 0; bit < 32; ++bit) {
    expect(cuda::rank_in_word(word, bit) == found, "rank_in_word", word, bit);
    if (word >> bit & 1) {
      expect(cuda::lowest_bit(rest) == bit, "lowest_bit", rest, bit);
      rest = cuda::without_lowest_bit(rest);
      ++found;
    }
  }
  expect(cuda::popcount(word) == found && rest == 0, "popcount", word, found);
}

template <int V>
void check_flags(Random& random) {
  const uint32_t word = random_word(random);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32 / V; ++lane) {
    bool flags[V];
    for (int i = 0; i < V; ++i) {
      flags[i] = word >> (lane * V + i) & 1;
    }
    bits |= cuda::bits_in_word<V>(flags, lane + 32 / V * static_cast<int>(random() % V));
  }
  expect(bits == word, "bits_in_word", V, word, bits);
}

void check_segments(Random& random) {
  const int64_t F = random() % 9, least = 1 + random() % 5, room = random() % 4;
  const int64_t allowed = 1 + random() % 30;
  int64_t col_ptr[10] = {0}, extra_ptr[10] = {0};
  for (int64_t f = 0; f < F; ++f) {
    col_ptr[f + 1] = col_ptr[f] + (random() % 3 ? random() % 4 : random() % 30);
  }
  const int64_t capacity = col_ptr[F] + room;
  const int64_t per_segment = cuda::segment_length(capacity, least, allowed);
  for (int64_t f = 0; f < F; ++f) {
    const int64_t count = col_ptr[f + 1] - col_ptr[f];
    extra_ptr[f + 1] = extra_ptr[f] + cuda::extra_segments(count, per_segment);
  }
  const int64_t most = cuda::most_extra_segments(capacity, per_segment);
  expect(extra_ptr[F] <= most, "most_extra_segments", extra_ptr[F], most);
  expect(most <= allowed, "segment_length", most, allowed);
  expect(per_segment == least || capacity / (per_segment - 1) > allowed - 1, "too long", per_segment);

  // Every pair belongs to one program; partial sums of a feature are found in order.
  std::vector<int> visits(col_ptr[F], 0);
  std::vector<std::vector<int64_t>> parts(F), begins(F);
  std::set<int64_t> used;
  for (int64_t program = 0; program < F + most; ++program) {
    const cuda::Segment s =
        cuda::segment_of(program, col_ptr, extra_ptr, F, per_segment, most);
    if (s.feature == F) {
      expect(program >= F + extra_ptr[F], "idle program", program);
      continue;
    }
    expect(s.feature >= 0 && s.feature < F, "feature", s.feature);
    expect(s.first >= col_ptr[s.feature] && s.last <= col_ptr[s.feature + 1], "range", program);
    expect(s.last - s.first <= per_segment, "length", program);
    expect(program < F || s.first < s.last, "empty", program);
    for (int64_t pair = s.first; pair < s.last; ++pair) {
      ++visits[pair];
    }
    parts[s.feature].push_back(s.part);
    begins[s.feature].push_back(s.first);
    if (s.part >= 0) {
      expect(s.part < 2 * most && used.insert(s.part).second, "part", s.part);
    }
  }
  for (int count : visits) {
    expect(count == 1, "visits", count);
  }
  for (int64_t f = 0; f < F; ++f) {
    const bool alone = parts[f].size() == 1;
    for (size_t i = 0; i < parts[f].size(); ++i) {
      expect(begins[f][i] == col_ptr[f] + static_cast<int64_t>(i) * per_segment, "order", f, i);
      const int64_t part = alone ? -1 : cuda::part_of(f, i, extra_ptr, most);
      expect(parts[f][i] == part, "part_of", f, i, part);
    }
  }
}

void check_rows(Random& random) {
  const int64_t rows = 1 + random() % 8, capacity = random() % 40;
  int64_t ptr[9] = {0};
  for (int64_t row = 0; row < rows; ++row) {
    ptr[row + 1] = ptr[row] + (random() % 3 ? random() % 6 : 0);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const cuda::Range range = cuda::entries_of_row(ptr, row, capacity);
    for (int64_t entry = 0; entry < ptr[rows]; ++entry) {
      const bool inside = range.first <= entry && entry < range.last;
      const bool owned = ptr[row] <= entry && entry < ptr[row + 1];
      expect(inside == (owned && entry < capacity), "entries_of_row", row, entry, capacity);
      expect(!owned || cuda::owner(ptr, rows, entry) == row, "owner", row, entry);
    }
  }
}

}  // namespace

ENTRY const char* check_index_arithmetic(int64_t seed, int64_t cases) {
  return reported([=] {
    Random random(seed);
    for (int64_t i = 0; i < cases; ++i) {
      check_words(random);
      check_flags<1>(random);
      check_flags<4>(random);
      check_flags<8>(random);
      check_segments(random);
      check_rows(random);
    }
  });
}
