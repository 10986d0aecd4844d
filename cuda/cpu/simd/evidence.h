// From a gradient to 16-bit evidence: quantised, positive for the sign as it is.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/transpose.h"

namespace dualbin::detail {
namespace {

// Sums of squares and values of whole rows of 16-bit numbers of magnitude 2^14 at most.
class EvidenceTotals {
 public:
  // 64 columns at most between two calls of settle_squares(), 2^15 between those of settle().
  DUALBIN_INLINE void add(Vec evidence) {
    squares_now_ = add32(squares_now_, dot16(evidence, evidence));
    values_now_ = add32(values_now_, dot16(evidence, all16(1)));
  }

  DUALBIN_INLINE void settle_squares() {  // unsigned: four products of 2^29 are 2^31
    squares_ = add64(squares_, add64(right64<32>(squares_now_), odd32(squares_now_, zero())));
    squares_now_ = zero();
  }

  DUALBIN_INLINE void settle() {
    alignas(64) int32_t values[sizeof(Vec) / 4];
    store(values, values_now_);
    for (const int32_t x : values) value_ += x;
    values_now_ = zero();
  }

  uint64_t squares() const {
    alignas(64) uint64_t parts[sizeof(Vec) / 8];
    store(parts, squares_);
    uint64_t total = 0;
    for (const uint64_t x : parts) total += x;
    return total;
  }

  int64_t value() const { return value_; }

 private:
  Vec squares_now_ = zero();
  Vec squares_ = zero();
  Vec values_now_ = zero();
  int64_t value_ = 0;
};

template <typename Read, bool kTwo>
DUALBIN_INLINE void word_of_evidence(const typename Read::Storage* gradient, uint32_t bits, const Vecf (&factors)[2], Vecf second,
                                     int16_t* evidence, EvidenceTotals* totals) {
  const SignWord word(bits);
  Vec q[kVecsOfWord];
  const auto part = [&](auto v) {
    constexpr int kPart = decltype(v)::value;
    Vecf x = times(Read::widen(gradient + kFloats * kPart), word.template pick<kPart>(factors[0], factors[1]));
    if (kTwo) x = times(x, second);
    q[kPart] = rounded(x);
  };
  for_parts<kVecsOfWord>(part);
  for (int v = 0; v < kVecsOfWord; v += 2) {
    const Vec e = narrow_in_order32(q[v], q[v + 1]);
    totals->add(e);
    store(evidence + kFloats * v, e);
  }
}

template <typename Read, bool kTwo>
EvidenceTotals row_of_evidence(const void* gradient, const EvidenceRow& row, int16_t* evidence) {
  const auto* g = static_cast<const typename Read::Storage*>(gradient);
  const float turned = row.negative ? -row.first : row.first;
  const Vecf factors[2] = {all_floats(turned), all_floats(-turned)};  // a positive gradient is evidence against +1, a bit that is set
  const Vecf second = all_floats(row.second);
  const int64_t padded = (row.dim + kChunk - 1) / kChunk * kChunk;
  EvidenceTotals totals;
  int64_t d = 0;
  for (; d + kColumnsOfWord <= row.dim; d += kColumnsOfWord) {
    word_of_evidence<Read, kTwo>(g + d, read_as<uint32_t>(row.bits + d / 8), factors, second, evidence + d, &totals);
    if (d % 64 != 0) totals.settle_squares();
    if (d % 8192 == 8192 - kColumnsOfWord) totals.settle();
  }
  if (d < row.dim) {
    const Rest<typename Read::Storage, kColumnsOfWord> rest(g + d, row.dim - d);
    const Rest<uint8_t, 4> bits(row.bits + d / 8, row.width - d / 8);
    word_of_evidence<Read, kTwo>(rest.values, read_as<uint32_t>(bits.values), factors, second, evidence + d, &totals);
    d += kColumnsOfWord;
  }
  totals.settle_squares();
  totals.settle();
  if (d < padded) std::memset(evidence + d, 0, static_cast<size_t>(padded - d) * sizeof(int16_t));
  return totals;
}

// sum(evidence * (2m + 1)) over a row of more than one plane.
inline int64_t levels_times_evidence(const EvidenceRow& row, const int16_t* evidence) {
  const int64_t chunks = (row.width + kChunkBytes - 1) / kChunkBytes;
  Vec total = zero();
  int64_t result = 0;
  const auto settle = [&] {
    alignas(64) int32_t parts[sizeof(Vec) / 4];
    store(parts, total);
    for (const int32_t x : parts) result += x;
    total = zero();
  };
  for (int64_t first = 0; first < chunks; first += kLanes) {
    Vec planes[8];
    planes[0] = all8(0xff);  // the 1 of 2m + 1
    for (int p = 1; p < 8; ++p) planes[p] = zero();
    const auto bytes_of = [&](int lane) {
      const int64_t left = row.width - (first + lane) * kChunkBytes;
      return left < 0 ? 0 : left < kChunkBytes ? left : kChunkBytes;
    };
    for (int p = 1; p < row.planes; ++p) {
      Lane lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t bytes = bytes_of(i);
        lanes[i] = bytes == 0 ? lane8(0) : load_bytes(row.bits + p * row.width + (first + i) * kChunkBytes, bytes);
      }
      planes[row.planes - p] = join(lanes);
    }
    transpose_bits(planes);
    Vec odd[8];
    bytes_in_order(planes, odd);
    for (int i = 0; i < 8; ++i) {
      for (int half = 0; half < 2; ++half) {
        Lane lanes[kLanes];  // a lane behind the row has no evidence in memory
        for (int l = 0; l < kLanes; ++l) {
          lanes[l] = first + l < chunks ? load_lane(evidence + (first + l) * kChunk + 16 * i + 8 * half) : lane8(0);
        }
        total = add32(total, dot16(join(lanes), half == 0 ? low8(odd[i], zero()) : upper8(odd[i], zero())));
      }
    }
    if (first / kLanes % 8 == 7) settle();  // 128 products of 2^23
  }
  settle();
  return result;
}

template <typename Read>
EvidenceSums make_evidence(const void* gradient, const EvidenceRow& row, int16_t* evidence) {
  const EvidenceTotals totals =
      row.second == 1.0f ? row_of_evidence<Read, false>(gradient, row, evidence) : row_of_evidence<Read, true>(gradient, row, evidence);
  // Against the gradient where the scale is positive: minus sum(w * q).
  const int64_t aligned = row.planes == 1 ? totals.value() : levels_times_evidence(row, evidence);
  return {totals.squares(), row.negative ? aligned : -aligned};
}

}  // namespace
}  // namespace dualbin::detail
