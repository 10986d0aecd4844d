#include "cpu/segments.h"

#include <cstring>

#include "core/checks.h"

namespace dualbin::detail {

namespace {

constexpr int kDigitBits = 11;  // 2048 counters fit the first-level cache
constexpr int64_t kDigits = int64_t{1} << kDigitBits;

struct Layout {
  int64_t* keys[2];
  int64_t* order[2];
  int64_t* starts;
  float* rows;
};

Layout layout(void* workspace, int64_t count) {
  auto* base = static_cast<int64_t*>(workspace);
  Layout l;
  l.keys[0] = base;
  l.keys[1] = base + count;
  l.order[0] = base + 2 * count;
  l.order[1] = base + 3 * count;
  l.starts = base + 4 * count;
  l.rows = reinterpret_cast<float*>(base + 5 * count + 1);
  return l;
}

// One stable counting pass over the digit at `shift`.
void radix_pass(const int64_t* keys, const int64_t* order, int64_t count, int shift, int64_t* keys_out, int64_t* order_out) {
  int64_t offsets[kDigits] = {0};
  for (int64_t i = 0; i < count; ++i) ++offsets[(keys[i] >> shift) & (kDigits - 1)];
  int64_t sum = 0;
  for (int64_t& offset : offsets) {
    const int64_t size = offset;
    offset = sum;
    sum += size;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t to = offsets[(keys[i] >> shift) & (kDigits - 1)]++;
    keys_out[to] = keys[i];
    order_out[to] = order[i];
  }
}

}  // namespace

size_t segments_bytes(const Executor* executor, int64_t count, int64_t dim) {
  const size_t n = static_cast<size_t>(count);
  return (5 * n + 1) * sizeof(int64_t) + 2 * static_cast<size_t>(dim) * static_cast<size_t>(workers(executor)) * sizeof(float);
}

float* worker_rows(void* workspace, int64_t count, int64_t dim, int worker) { return layout(workspace, count).rows + 2 * dim * worker; }

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
  for (int shift = 0; !sorted && shift < 63 && (rows - 1) >> shift != 0; shift += kDigitBits) {
    radix_pass(l.keys[current], l.order[current], valid, shift, l.keys[1 - current], l.order[1 - current]);
    current = 1 - current;
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
