// Packing and unpacking with every instruction set of this processor beside the code of rules/: the same bits, and the same errors.
#include "simd_support.h"

using namespace dualbin;

namespace {

constexpr FloatType kTypes[] = {FloatType::kF32, FloatType::kF16, FloatType::kBF16};
const int64_t kDims[] = {1, 7, 8, 9, 31, 32, 33, 64, 100, 128, 130, 256, 384, 767, 1100};

struct Packed {
  std::vector<uint8_t> bits;
  std::vector<float> scale;

  bool operator==(const Packed& other) const { return bits == other.bits && World::same(scale, other.scale); }
};

PackCall pack_of(const std::vector<char>& w, FloatType type, int64_t rows, int64_t dim, int planes, bool scaled, Packed* out) {
  out->bits.assign(static_cast<size_t>(rows * planes * ((dim + 7) / 8)) + 64, 0xaa);  // nothing is written behind it
  out->scale.assign(static_cast<size_t>(rows) + 1, -7.0f);
  PackCall call;
  call.w = {w.data(), type};
  call.rows = rows;
  call.dim = dim;
  call.planes = planes;
  call.bits = out->bits.data();
  if (scaled) call.scale = out->scale.data();
  return call;
}

Packed pack(const char* level, const std::vector<char>& w, FloatType type, int64_t rows, int64_t dim, int planes, bool scaled) {
  CHECK(use_simd(level).ok());
  Packed out;
  const Status status = cpu().pack({}, pack_of(w, type, rows, dim, planes, scaled, &out));
  CHECK(status.ok());
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message);
  return out;
}

float value_at(const std::vector<char>& w, FloatType type, size_t at) {
  if (type == FloatType::kF32) return reinterpret_cast<const float*>(w.data())[at];
  const uint16_t half = reinterpret_cast<const uint16_t*>(w.data())[at];
  return type == FloatType::kF16 ? detail::widen_f16(half) : detail::widen_bf16(half);
}

void set_value(std::vector<char>* w, FloatType type, size_t at, float x) {
  if (type == FloatType::kF32) {
    reinterpret_cast<float*>(w->data())[at] = x;
  } else {
    reinterpret_cast<uint16_t*>(w->data())[at] = type == FloatType::kF16 ? detail::narrow_f16(x) : detail::narrow_bf16(x);
  }
}

// Rows as gradients have them, tiny, huge, zero and equal ones among them; `finite`: without infinities, else without NaN.
std::vector<char> weights(int64_t rows, int64_t dim, FloatType type, bool finite, std::mt19937_64& random) {
  std::vector<char> w = gradients(rows, dim, type, random);
  for (size_t i = 0; i < static_cast<size_t>(rows * dim); ++i) {
    const float x = value_at(w, type, i);
    if (std::isnan(x) || (finite && std::isinf(x))) set_value(&w, type, i, 0.25f);
    if (i % 29 == 3) set_value(&w, type, i, -0.0f);  // packs to 1
    if (!finite && i % 61 == 5) set_value(&w, type, i, i % 2 == 0 ? INFINITY : -INFINITY);
  }
  return w;
}

TEST(packing) {
  std::mt19937_64 random(21);
  for (const int64_t dim : kDims) {
    for (int planes = 1; planes <= 8; ++planes) {
      for (const FloatType type : kTypes) {
        for (const bool scaled : {false, true}) {
          const std::vector<char> w = weights(110, dim, type, scaled || planes > 1, random);
          const Packed want = pack("portable", w, type, 110, dim, planes, scaled);
          for_other_levels([&](const char* level) {
            const bool equal = pack(level, w, type, 110, dim, planes, scaled) == want;
            CHECK(equal);
            if (!equal)
              std::fprintf(stderr, "%s: D=%d, %d planes, type %d\n", level, static_cast<int>(dim), planes, static_cast<int>(type));
          });
        }
      }
    }
  }
}

// Rows of one magnitude and of few: quotients of the search that are whole numbers.
TEST(levels_that_are_met_exactly) {
  std::mt19937_64 random(22);
  for (int planes = 2; planes <= 8; ++planes) {
    for (const int64_t dim : {5, 64, 200, 4096}) {
      std::vector<char> w(static_cast<size_t>(40 * dim) * 4);
      for (size_t i = 0; i < static_cast<size_t>(40 * dim); ++i) {
        const auto of = static_cast<float>(1 + i / static_cast<size_t>(dim));
        set_value(&w, FloatType::kF32, i, (random() % 2 == 0 ? 1.0f : -1.0f) * static_cast<float>(1 + random() % (1 + i % 7 * 5)) / of);
      }
      const Packed want = pack("portable", w, FloatType::kF32, 40, dim, planes, true);
      for_other_levels([&](const char* level) { CHECK(pack(level, w, FloatType::kF32, 40, dim, planes, true) == want); });
    }
  }
}

TEST(floats_that_cannot_be_packed) {
  std::mt19937_64 random(23);
  for (const FloatType type : kTypes) {
    for (const bool scaled : {false, true}) {
      std::vector<char> w = weights(20, 100, type, true, random);
      set_value(&w, type, 1733, NAN);
      set_value(&w, type, 1640, scaled ? -INFINITY : INFINITY);
      set_value(&w, type, 1999, NAN);
      for (int i = 0; simd_level(i) != nullptr; ++i) {
        CHECK(use_simd(simd_level(i)).ok());
        Packed out;
        const Status status = cpu().pack({}, pack_of(w, type, 20, 100, 1, scaled, &out));
        CHECK(says(status, Code::kInvalidArgument, scaled ? "got -inf at row 16, column 40" : "nan at row 17, column 33"));
        CHECK(out.bits == std::vector<uint8_t>(out.bits.size(), 0xaa));
      }
      CHECK(use_simd(nullptr).ok());
    }
  }
}

TEST(unpacking) {
  std::mt19937_64 random(24);
  for (const int64_t dim : kDims) {
    for (int planes = 1; planes <= 8; ++planes) {
      Rule rule;
      rule.bits = planes;
      World world(30, dim, planes, rule, false, random);
      const auto unpack = [&](const char* level) {
        CHECK(use_simd(level).ok());
        std::vector<uint8_t> out(static_cast<size_t>(30 * dim) * (planes == 1 ? 1 : 2) + 64, 0xaa);
        UnpackCall call;
        call.table = world.table();
        call.out = out.data();
        CHECK(cpu().unpack({}, call).ok());
        return out;
      };
      const std::vector<uint8_t> want = unpack("portable");
      for_other_levels([&](const char* level) {
        const bool equal = unpack(level) == want;
        CHECK(equal);
        if (!equal) std::fprintf(stderr, "%s: D=%d, %d planes\n", level, static_cast<int>(dim), planes);
      });
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
