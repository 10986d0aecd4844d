// Rows that travel between ranks: where those of a batch are, and rows with their scales, on the CPU.
#include <cstring>

#include "core/checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/ids.h"
#include "cpu/segments.h"

namespace dualbin::detail {

namespace {

constexpr int64_t kWeightsOfThread = 32768;           // columns of occurrences that are worth a thread
constexpr int64_t kBytesOfThread = int64_t{1} << 18;  // of rows that are worth a thread

// Occurrences that have no place, into the counts of earlier batches.
void count_missed(const RouteCall& call) {
  for (int64_t n = 0; n < call.ids.count; ++n) {
    if (id_at({call.slots, call.slots_type, call.ids.count}, n) == 0) ++call.missed[0];
    const int64_t id = id_at(call.ids, n);
    if (id >= 0 && id < call.rows) continue;
    call.missed[1] = std::min(call.missed[1], id);
    call.missed[2] = std::max(call.missed[2], id);
  }
  for (int64_t r = 0; r < call.world; ++r) {
    const int64_t wanted = call.numbers[r] - (r > 0 ? call.numbers[r - 1] : 0);
    call.missed[3 + r] = std::max(call.missed[3 + r], wanted);
  }
}

}  // namespace

Status CpuBackend::route(const Launch& launch, const RouteCall& call) const {
  DUALBIN_TRY(call.check());
  const Ids& ids = call.ids;
  DUALBIN_TRY(check_workspace(launch, segments_bytes(launch.executor, ids.count, 1)));
  int64_t bad = -1;
  const Segments segments = make_segments(launch.workspace, ids, call.rows, &bad);
  int64_t* numbers = call.numbers;
  std::fill(numbers, numbers + call.world, int64_t{0});
  for (int64_t s = 0; s < segments.count; ++s) ++numbers[segments.row(s) / call.share];
  for (int64_t r = 1; r < call.world; ++r) numbers[r] += numbers[r - 1];
  numbers[call.world] = bad;
  const bool limited = call.capacity > 0;
  for (int64_t place = limited ? 0 : segments.count; place < call.places; ++place)
    store_int(call.local, call.local_type, place, call.share);
  for (int64_t n = 0; n < ids.count; ++n) store_int(call.slots, call.slots_type, n, limited ? 0 : -1);
  for (int64_t s = 0; s < segments.count; ++s) {
    const int64_t rank = segments.row(s) / call.share;
    int64_t place = s;
    if (limited) {
      const int64_t among = s - (rank > 0 ? numbers[rank - 1] : 0);
      if (among >= call.capacity) continue;
      place = rank * call.capacity + among;
    }
    store_int(call.local, call.local_type, place, segments.row(s) - rank * call.share);
    for (int64_t i = 0; i < segments.size(s); ++i) store_int(call.slots, call.slots_type, segments.positions(s)[i], call.spare + place);
  }
  if (call.missed != nullptr) count_missed(call);
  return {};
}

Status CpuBackend::slot_means(const Launch& launch, const SlotMeansCall& call) const {
  DUALBIN_TRY(call.check());
  const Ids& slots = call.sums.slots;
  const int64_t dim = call.sums.dim;
  const int64_t count = call.sums.segments;
  if (count == 0) return {};
  DUALBIN_TRY(check_workspace(launch, segments_bytes(launch.executor, slots.count, dim)));
  const Segments segments = make_segments(launch.workspace, slots, count, nullptr);
  with_float(call.type, [&](auto format) {
    using Format = decltype(format);
    auto* out = static_cast<typename Format::Storage*>(call.out);
    int64_t next = 0;  // slots without an occurrence lie between those with one
    for (int64_t s = 0; s <= segments.count; ++s) {
      const int64_t row = s < segments.count ? segments.row(s) : count;
      std::memset(out + next * dim, 0, static_cast<size_t>((row - next) * dim) * sizeof(*out));
      next = row + 1;
    }
    for_segments(launch.executor, segments, dim, kWeightsOfThread, [&](int64_t begin, int64_t end, int worker) {
      const Scratch scratch = worker_scratch(launch.workspace, slots.count, dim, worker);
      for (int64_t s = begin; s < end; ++s) {
        sum_segment(kernels_, call.sums.dy, dim, segments, s, scratch.sum, scratch.block);
        auto* to = out + segments.row(s) * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] = Format::narrow(scratch.sum[d] / call.divisor);
      }
    });
  });
  return {};
}

Status CpuBackend::take_rows(const Launch& launch, const TakeRowsCall& call) const {
  DUALBIN_TRY(call.check());
  const auto width = static_cast<size_t>(call.width);
  const int64_t step = call.width + kScaleBytes;
  parallel_range(launch.executor, call.ids.count, std::max<int64_t>(1, kBytesOfThread / step), [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = id_at(call.ids, n);
      const bool inside = id >= 0 && id < call.rows;
      const float scale = inside ? call.scale[id] : bits_float(0x7fc00000u);
      uint8_t* out = call.out + n * step;
      if (inside) {
        std::memcpy(out, call.bits + id * call.width, width);
      } else {
        std::memset(out, 0, width);
      }
      std::memcpy(out + width, &scale, sizeof(scale));
    }
  });
  return {};
}

Status CpuBackend::put_rows(const Launch& launch, const PutRowsCall& call) const {
  DUALBIN_TRY(call.check());
  const auto width = static_cast<size_t>(call.width);
  const int64_t step = call.width + kScaleBytes;
  parallel_range(launch.executor, call.ids.count, std::max<int64_t>(1, kBytesOfThread / step), [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = call.ids.data == nullptr ? n : id_at(call.ids, n);
      if (id < 0 || id >= call.rows) continue;
      const uint8_t* packed = call.packed + n * step;
      std::memcpy(call.bits + id * call.width, packed, width);
      std::memcpy(call.scale + id, packed + width, sizeof(float));
    }
  });
  return {};
}

}  // namespace dualbin::detail
