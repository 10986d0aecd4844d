// How the three types of floats are read and written as vectors of float32. Included after a vector header.
#pragma once

namespace dualbin::detail {
namespace {

struct ReadF32 {
  using Storage = float;
  static DUALBIN_INLINE Vecf widen(const float* p) { return load_floats(p); }
};

struct ReadF16 {
  using Storage = uint16_t;
  static DUALBIN_INLINE Vecf widen(const uint16_t* p) { return widen_f16(p); }
};

struct ReadBF16 {
  using Storage = uint16_t;
  static DUALBIN_INLINE Vecf widen(const uint16_t* p) { return widen_bf16(p); }
};

struct WriteF32 {
  using Storage = float;
  template <bool kStream>
  static DUALBIN_INLINE void put(float* p, Vecf x) {
    kStream ? stream_floats(p, x) : store_floats(p, x);
  }
};

struct WriteF16 {
  using Storage = uint16_t;
  template <bool kStream>
  static DUALBIN_INLINE void put(uint16_t* p, Vecf x) {
    kStream ? stream_halves(p, narrow_f16(x)) : store_halves(p, narrow_f16(x));
  }
  // Even columns and odd ones become halves in order.
  static DUALBIN_INLINE Vec side_by_side(Vecf even, Vecf odd) { return odd16(wide_f16(even), left32<16>(wide_f16(odd))); }
};

struct WriteBF16 {
  using Storage = uint16_t;
  template <bool kStream>
  static DUALBIN_INLINE void put(uint16_t* p, Vecf x) {
    kStream ? stream_halves(p, narrow_bf16(x)) : store_halves(p, narrow_bf16(x));
  }
  // No NaN. An upper half goes up by 1 where the lower one, less 1 if the upper is even, has its top bit.
  static DUALBIN_INLINE Vec side_by_side(Vecf even, Vecf odd) {
    const Vec lower = odd16(bits_of(even), left32<16>(bits_of(odd)));
    const Vec upper = odd16(right32<16>(bits_of(even)), bits_of(odd));
    return add16(upper, right16<15>(less_to_zero16(lower, without(all16(1), upper))));
  }
};

constexpr int64_t kColumnsOfWord = 32;
constexpr int kVecsOfWord = kColumnsOfWord / kFloats;

// body(Index<0>), body(Index<1>), ... `count` times: shifts and parts are constants.
template <int k>
struct Index {
  static constexpr int value = k;
};

template <int count, int k = 0, typename Body>
DUALBIN_INLINE void for_parts(const Body& body) {
  if constexpr (k < count) {
    body(Index<k>{});
    for_parts<count, k + 1>(body);
  }
}

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

DUALBIN_INLINE void fetch(const void* p) { __builtin_prefetch(p); }

constexpr int64_t kLine = 64;  // bytes of a cache line

// The last columns of a row that do not fill a vector, with zeros behind them.
template <typename Storage, int kCount>
struct Rest {
  alignas(64) Storage values[kCount];

  DUALBIN_INLINE Rest(const Storage* from, int64_t count) : values{} {
    std::memcpy(values, from, static_cast<size_t>(count) * sizeof(Storage));
  }
};

}  // namespace
}  // namespace dualbin::detail
