#include "cpu/segments.h"

#include <algorithm>

#include "core/checks.h"

namespace dualbin::detail {

namespace {

constexpr int kDigitBits = 11;  // 2048 counters fit the first-level cache
constexpr int64_t kDigits = int64_t{1} << kDigitBits;
constexpr int64_t kFewIds = 48;  // are sorted faster by insertion than by clearing counters
constexpr size_t kLineBytes = 64;

struct Layout {
  int64_t* keys[2];
  int64_t* order[2];
  int64_t* starts;
  char* scratch;
};

Layout layout(void* workspace, int64_t count) {
  auto* base = static_cast<int64_t*>(workspace);
  Layout l;
  l.keys[0] = base;
  l.keys[1] = base + count;
  l.order[0] = base + 2 * count;
  l.order[1] = base + 3 * count;
  l.starts = base + 4 * count;
  const auto end = reinterpret_cast<uintptr_t>(base + 5 * count + 1);
  l.scratch = reinterpret_cast<char*>((end + kLineBytes - 1) / kLineBytes * kLineBytes);
  return l;
}

size_t scratch_bytes(int64_t dim) {
  const auto columns = static_cast<size_t>(padded_dim(dim));
  return columns * (2 * sizeof(float) + static_cast<size_t>(batch_rows(dim)) * sizeof(int16_t));
}

void insertion_sort(int64_t* keys, int64_t* order, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const int64_t key = keys[i];
    const int64_t position = order[i];
    int64_t to = i;
    for (; to > 0 && keys[to - 1] > key; --to) {
      keys[to] = keys[to - 1];
      order[to] = order[to - 1];
    }
    keys[to] = key;
    order[to] = position;
  }
}

// One stable counting pass over the digit of `bits` bits at `shift`.
void radix_pass(const int64_t* keys, const int64_t* order, int64_t count, int shift, int bits, int64_t* keys_out, int64_t* order_out) {
  const int64_t digits = int64_t{1} << bits;
  int64_t offsets[kDigits];
  std::fill_n(offsets, digits, 0);
  for (int64_t i = 0; i < count; ++i) ++offsets[(keys[i] >> shift) & (digits - 1)];
  int64_t sum = 0;
  for (int64_t digit = 0; digit < digits; ++digit) {
    const int64_t size = offsets[digit];
    offsets[digit] = sum;
    sum += size;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t to = offsets[(keys[i] >> shift) & (digits - 1)]++;
    keys_out[to] = keys[i];
    order_out[to] = order[i];
  }
}

}  // namespace

size_t segments_bytes(const Executor* executor, int64_t count, int64_t dim) {
  const size_t n = static_cast<size_t>(count);
  return (5 * n + 1) * sizeof(int64_t) + kLineBytes + scratch_bytes(dim) * static_cast<size_t>(workers(executor));
}

Scratch worker_scratch(void* workspace, int64_t count, int64_t dim, int worker) {
  char* own = layout(workspace, count).scratch + scratch_bytes(dim) * static_cast<size_t>(worker);
  auto* rows = reinterpret_cast<float*>(own);
  const int64_t columns = padded_dim(dim);
  return {rows, rows + columns, reinterpret_cast<int16_t*>(rows + 2 * columns)};
}

Segments make_segments(void* workspace, const Ids& ids, int64_t rows, int64_t* bad) {
  Layout l = layout(workspace, ids.count);
  int64_t valid = 0;
  int64_t first_bad = -1;
  for (int64_t n = 0; n < ids.count; ++n) {
    const int64_t id = id_at(ids, n);
    if (id < 0 || id >= rows) {
      if (first_bad < 0) first_bad = n;
      continue;
    }
    l.keys[0][valid] = id;
    l.order[0][valid] = n;
    ++valid;
  }
  if (bad != nullptr) *bad = first_bad;

  bool sorted = true;
  for (int64_t i = 1; i < valid && sorted; ++i) sorted = l.keys[0][i - 1] <= l.keys[0][i];
  int current = 0;
  if (!sorted && valid <= kFewIds) {
    insertion_sort(l.keys[0], l.order[0], valid);
  } else if (!sorted) {
    int bits = 0;
    while (bits < 63 && (rows - 1) >> bits != 0) ++bits;
    const int passes = (bits + kDigitBits - 1) / kDigitBits;
    const int digit = (bits + passes - 1) / passes;  // of equal width: passes cost by the number of counters, too
    for (int pass = 0; pass < passes; ++pass) {
      radix_pass(l.keys[current], l.order[current], valid, pass * digit, digit, l.keys[1 - current], l.order[1 - current]);
      current = 1 - current;
    }
  }

  Segments segments;
  segments.keys = l.keys[current];
  segments.order = l.order[current];
  segments.starts = l.starts;
  for (int64_t i = 0; i < valid; ++i) {
    if (i == 0 || segments.keys[i] != segments.keys[i - 1]) l.starts[segments.count++] = i;
  }
  l.starts[segments.count] = valid;
  return segments;
}

}  // namespace dualbin::detail
