// How the three types of floats are read as vectors of float32. Included after a vector header.
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
