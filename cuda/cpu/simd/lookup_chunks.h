// Rows of a lookup, cut into chunks of columns for the lanes.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/kernels.h"

namespace dualbin::detail {
namespace {

DUALBIN_INLINE void fetch_later(const LookupRow& row, const LookupShape& shape) {
  const int64_t bytes = shape.planes * shape.width;
  for (int64_t at = 0; at < bytes; at += kLine) fetch(row.later.bits + at);
  fetch(row.later.bits + bytes - 1);
  fetch(row.later.scale);
}

// The chunks of rows that the lanes work on, consecutive ones; lanes behind the last chunk have no bytes.
template <typename Storage>
struct LookupChunks {
  const LookupRow* row[kLanes];
  const uint8_t* bits[kLanes];
  int64_t bytes[kLanes];
  int64_t columns[kLanes];
  Storage* out[kLanes];
  bool starts[kLanes];  // a row
};

// Calls body(chunks, whole); whole: every lane has 128 columns.
template <typename Storage, typename Body>
DUALBIN_INLINE void for_lookup_chunks(const LookupRow* rows, int64_t count, const LookupShape& shape, const Body& body) {
  int64_t r = 0;
  int64_t first = 0;  // column
  while (r < count) {
    LookupChunks<Storage> chunks;
    bool whole = true;
    for (int i = 0; i < kLanes; ++i) {
      const bool there = r < count;
      const LookupRow& row = rows[there ? r : 0];
      if (there && first == 0) fetch_later(row, shape);
      const int64_t left = shape.width - first / 8;
      chunks.row[i] = &row;
      chunks.bits[i] = row.bits + first / 8;
      chunks.bytes[i] = !there ? 0 : left < kChunkBytes ? left : kChunkBytes;
      chunks.columns[i] = !there ? 0 : shape.dim - first < kChunk ? shape.dim - first : kChunk;
      chunks.out[i] = static_cast<Storage*>(row.out) + first;
      chunks.starts[i] = there && first == 0;
      whole = whole && chunks.columns[i] == kChunk;
      if (!there) continue;
      first += kChunk;
      if (first < shape.dim) continue;
      first = 0;
      ++r;
    }
    whole ? body(chunks, Bool<true>{}) : body(chunks, Bool<false>{});
  }
}

}  // namespace
}  // namespace dualbin::detail
