// What the kernels of bags share.
#pragma once

#include "core/backend.h"
#include "kernels/memory.cuh"
#include "kernels/output.cuh"
#include "rules/bag.h"

namespace dualbin::kernels {

struct BagArgs {
  Table table;
  Bags bags;
  int64_t count;
  int64_t width;
  float unit;  // of a weight of several planes
  BadIds bad_ids;
  FloatType type;
  void* out;
  bool vectors;  // eight output values can be stored in units of 16 bytes
  ErrorBlock* errors;
};

struct Span {
  int64_t begin;
  int64_t end;
  bool bad;
};

__device__ __forceinline__ Span load_span(const BagArgs& args, int64_t bag, bool reports) {
  const int64_t begin = load_id(args.bags.offsets, bag);
  const int64_t end = load_id(args.bags.offsets, bag + 1);
  if (begin >= 0 && end >= begin && end <= args.bags.ids.count) return {begin, end, false};
  if (reports && args.errors != nullptr) report(args.errors, begin < 0 ? begin : end);
  return {0, 0, true};
}

// For rows of whole 32-bit words, with the table aligned to them and the result to 16 bytes; no votes.
Status launch_bag_words(cudaStream_t stream, const BagArgs& args);

}  // namespace dualbin::kernels
