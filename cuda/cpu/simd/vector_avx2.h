// Vectors of 256 bits in AVX2. vector_avx512.h has the same names, so that kernels are written once.
//
// "Lane" means 128 bits: what shuffles and packs stay within. Names end in the width of an element.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define DUALBIN_INLINE inline __attribute__((always_inline))

// No name of these headers is visible in another file: each instruction set has functions of its own.
namespace dualbin::detail {
namespace {

using Vec = __m256i;
using Vecf = __m256;
using Vecd = __m256d;
using Lane = __m128i;

constexpr int kLanes = 2;
constexpr int kFloats = 8;
constexpr int kDoubles = 4;

// ---- loads, stores, constants

DUALBIN_INLINE Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const Vec*>(p)); }
DUALBIN_INLINE void store(void* p, Vec x) { _mm256_storeu_si256(static_cast<Vec*>(p), x); }
DUALBIN_INLINE Lane load_lane(const void* p) { return _mm_loadu_si128(static_cast<const Lane*>(p)); }
DUALBIN_INLINE void store_lane(void* p, Lane x) { _mm_storeu_si128(static_cast<Lane*>(p), x); }
DUALBIN_INLINE Vec join(const Lane (&x)[kLanes]) { return _mm256_inserti128_si256(_mm256_castsi128_si256(x[0]), x[1], 1); }
DUALBIN_INLINE void split(Vec x, Lane (&to)[kLanes]) {
  to[0] = _mm256_castsi256_si128(x);
  to[1] = _mm256_extracti128_si256(x, 1);
}
DUALBIN_INLINE Lane lane8(int x) { return _mm_set1_epi8(static_cast<char>(x)); }
DUALBIN_INLINE Lane lane16(int x) { return _mm_set1_epi16(static_cast<int16_t>(x)); }
DUALBIN_INLINE Lane lane32(uint32_t x) { return _mm_set1_epi32(static_cast<int32_t>(x)); }
DUALBIN_INLINE Lane lane_of_floats(float x) { return _mm_castps_si128(_mm_set1_ps(x)); }
DUALBIN_INLINE Vec in_lanes(Lane x) { return _mm256_broadcastsi128_si256(x); }
DUALBIN_INLINE Vec zero() { return _mm256_setzero_si256(); }
DUALBIN_INLINE Vec all8(int x) { return in_lanes(lane8(x)); }
DUALBIN_INLINE Vec all16(int x) { return in_lanes(lane16(x)); }
DUALBIN_INLINE Vec all32(uint32_t x) { return _mm256_set1_epi32(static_cast<int32_t>(x)); }

// ---- bits

DUALBIN_INLINE Vec both(Vec a, Vec b) { return _mm256_and_si256(a, b); }
DUALBIN_INLINE Vec either(Vec a, Vec b) { return _mm256_or_si256(a, b); }
DUALBIN_INLINE Vec without(Vec a, Vec b) { return _mm256_andnot_si256(b, a); }  // a, but for the bits of b
DUALBIN_INLINE Vec differ(Vec a, Vec b) { return _mm256_xor_si256(a, b); }
template <int k>
DUALBIN_INLINE Vec left16(Vec a) {
  return _mm256_slli_epi16(a, k);
}
template <int k>
DUALBIN_INLINE Vec right16(Vec a) {
  return _mm256_srli_epi16(a, k);
}
template <int k>
DUALBIN_INLINE Vec left32(Vec a) {
  return _mm256_slli_epi32(a, k);
}
template <int k>
DUALBIN_INLINE Vec right32(Vec a) {
  return _mm256_srli_epi32(a, k);
}
template <int k>
DUALBIN_INLINE Vec left64(Vec a) {
  return _mm256_slli_epi64(a, k);
}
template <int k>
DUALBIN_INLINE Vec right64(Vec a) {
  return _mm256_srli_epi64(a, k);
}
DUALBIN_INLINE Vec left32(Vec a, int k) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(k)); }
DUALBIN_INLINE Vec right_signed16(Vec a, int k) { return _mm256_sra_epi16(a, _mm_cvtsi32_si128(k)); }
DUALBIN_INLINE Vec signs16(Vec a) { return _mm256_srai_epi16(a, 15); }  // all ones where a is below 0

// ---- integers

DUALBIN_INLINE Vec add16(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
DUALBIN_INLINE Vec sub16(Vec a, Vec b) { return _mm256_sub_epi16(a, b); }
DUALBIN_INLINE Vec add32(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
DUALBIN_INLINE Vec add64(Vec a, Vec b) { return _mm256_add_epi64(a, b); }
DUALBIN_INLINE Vec abs16(Vec a) { return _mm256_abs_epi16(a); }
DUALBIN_INLINE Vec min16(Vec a, Vec b) { return _mm256_min_epi16(a, b); }
DUALBIN_INLINE Vec max16(Vec a, Vec b) { return _mm256_max_epi16(a, b); }
DUALBIN_INLINE Vec min32(Vec a, Vec b) { return _mm256_min_epi32(a, b); }
DUALBIN_INLINE Vec max32(Vec a, Vec b) { return _mm256_max_epi32(a, b); }
DUALBIN_INLINE Vec less_to_zero16(Vec a, Vec b) { return _mm256_subs_epu16(a, b); }  // max(a - b, 0), unsigned
DUALBIN_INLINE Vec with_sign16(Vec a, Vec b) { return _mm256_sign_epi16(a, b); }     // a, -a where b is below 0, 0 where it is 0 or a is
DUALBIN_INLINE Vec high16(Vec a, Vec b) { return _mm256_mulhi_epi16(a, b); }
DUALBIN_INLINE Vec high_unsigned16(Vec a, Vec b) { return _mm256_mulhi_epu16(a, b); }
DUALBIN_INLINE Vec times16(Vec a, Vec b) { return _mm256_mullo_epi16(a, b); }
DUALBIN_INLINE Vec above_unsigned16(Vec a, Vec b) {  // all ones where a is above b
  const Vec top = all16(0x8000);
  return _mm256_cmpgt_epi16(_mm256_xor_si256(a, top), _mm256_xor_si256(b, top));
}
DUALBIN_INLINE Vec dot16(Vec a, Vec b) { return _mm256_madd_epi16(a, b); }  // a0 * b0 + a1 * b1 in 32 bits
DUALBIN_INLINE Vec times32(Vec a, Vec b) { return _mm256_mullo_epi32(a, b); }
DUALBIN_INLINE Vec times_even32(Vec a, Vec b) { return _mm256_mul_epu32(a, b); }  // 64-bit products of the even elements
DUALBIN_INLINE Vec above32(Vec a, Vec b) { return _mm256_cmpgt_epi32(a, b); }
DUALBIN_INLINE Vec odd16(Vec a, Vec b) { return _mm256_blend_epi16(a, b, 0xaa); }  // even elements of a, odd ones of b
DUALBIN_INLINE Vec odd32(Vec a, Vec b) { return _mm256_blend_epi32(a, b, 0xaa); }

// The top bits of the bytes: bit i of the result is that of byte i.
DUALBIN_INLINE uint64_t tops8(Vec a) { return static_cast<uint32_t>(_mm256_movemask_epi8(a)); }

// The same of 32-bit elements.
DUALBIN_INLINE uint32_t tops32(Vec a) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a))); }

// ---- order, within lanes

DUALBIN_INLINE Vec low8(Vec a, Vec b) { return _mm256_unpacklo_epi8(a, b); }
DUALBIN_INLINE Vec upper8(Vec a, Vec b) { return _mm256_unpackhi_epi8(a, b); }
DUALBIN_INLINE Vec low16(Vec a, Vec b) { return _mm256_unpacklo_epi16(a, b); }
DUALBIN_INLINE Vec upper16(Vec a, Vec b) { return _mm256_unpackhi_epi16(a, b); }
DUALBIN_INLINE Vec low32(Vec a, Vec b) { return _mm256_unpacklo_epi32(a, b); }
DUALBIN_INLINE Vec upper32(Vec a, Vec b) { return _mm256_unpackhi_epi32(a, b); }
DUALBIN_INLINE Vec low64(Vec a, Vec b) { return _mm256_unpacklo_epi64(a, b); }
DUALBIN_INLINE Vec upper64(Vec a, Vec b) { return _mm256_unpackhi_epi64(a, b); }
DUALBIN_INLINE Vec choose8(Vec a, Vec index) { return _mm256_shuffle_epi8(a, index); }
DUALBIN_INLINE Vec narrow_unsigned16(Vec a, Vec b) { return _mm256_packus_epi16(a, b); }
DUALBIN_INLINE Vec narrow16(Vec a, Vec b) { return _mm256_packs_epi16(a, b); }

// ---- floats

DUALBIN_INLINE Vecf load_floats(const float* p) { return _mm256_loadu_ps(p); }
DUALBIN_INLINE void store_floats(float* p, Vecf x) { _mm256_storeu_ps(p, x); }
DUALBIN_INLINE Vecf all_floats(float x) { return _mm256_set1_ps(x); }
DUALBIN_INLINE Vecf floats_in_lanes(const float (&x)[4]) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)); }
DUALBIN_INLINE Vec bits_of(Vecf a) { return _mm256_castps_si256(a); }
DUALBIN_INLINE Vecf as_floats(Vec a) { return _mm256_castsi256_ps(a); }
DUALBIN_INLINE Vecf add(Vecf a, Vecf b) { return _mm256_add_ps(a, b); }
DUALBIN_INLINE Vecf sub(Vecf a, Vecf b) { return _mm256_sub_ps(a, b); }
DUALBIN_INLINE Vecf over(Vecf a, Vecf b) { return _mm256_div_ps(a, b); }
DUALBIN_INLINE Vecf times(Vecf a, Vecf b) { return _mm256_mul_ps(a, b); }
DUALBIN_INLINE Vecf widen_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_lane(p)), 16));
}
DUALBIN_INLINE Vecf widen_f16(const uint16_t* p) { return _mm256_cvtph_ps(load_lane(p)); }
DUALBIN_INLINE Vecf absolute(Vecf a) { return _mm256_and_ps(a, _mm256_castsi256_ps(all32(0x7fffffffu))); }
DUALBIN_INLINE Vecf nearest(Vecf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }  // ties to even
// A bit an element.
DUALBIN_INLINE uint32_t at_least_0(Vecf a) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GE_OQ)));
}
DUALBIN_INLINE uint32_t above(Vecf a, Vecf b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ))); }
DUALBIN_INLINE Vecf floats_of(Vec a) { return _mm256_cvtepi32_ps(a); }
DUALBIN_INLINE Vec rounded(Vecf a) { return _mm256_cvtps_epi32(a); }  // to nearest, ties to even

// Two vectors of 32-bit integers as one of 16 bits, in order; they must fit.
DUALBIN_INLINE Vec narrow_in_order32(Vec a, Vec b) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8); }

// The same of unsigned 16-bit numbers.
DUALBIN_INLINE Vec narrow_unsigned_in_order32(Vec a, Vec b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8); }

// Signed bytes as 16-bit integers.
DUALBIN_INLINE Vec widen8(const int8_t* p) { return _mm256_cvtepi8_epi16(load_lane(p)); }

// Eight signed bytes as floats.
DUALBIN_INLINE Vecf floats_of_bytes(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const Lane*>(p))));
}
DUALBIN_INLINE Vecf sign_of(Vecf a) {  // 1 where a is at least 0, else -1
  return _mm256_blendv_ps(all_floats(-1.0f), all_floats(1.0f), _mm256_cmp_ps(a, all_floats(0.0f), _CMP_GE_OQ));
}
DUALBIN_INLINE Vecf one_nan(Vecf a) {  // every NaN as the positive quiet one
  const Vecf nan = _mm256_castsi256_ps(all32(0x7fc00000u));
  return _mm256_blendv_ps(a, nan, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}

// Rounded to nearest, ties to even; a NaN has to be that of one_nan().
DUALBIN_INLINE Lane narrow_f16(Vecf a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
DUALBIN_INLINE Vec wide_f16(Vecf a) { return _mm256_cvtepu16_epi32(narrow_f16(a)); }  // in 32 bits each
DUALBIN_INLINE Lane narrow_bf16(Vecf a) {
  const Vec u = _mm256_castps_si256(a);
  const Vec odd = both(right32<16>(u), all32(1));
  const Vec halves = right32<16>(add32(u, add32(odd, all32(0x7fffu))));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08));
}

// Stores past the caches, to aligned memory; settled by finish_streams().
DUALBIN_INLINE void stream(void* p, Vec x) { _mm256_stream_si256(static_cast<Vec*>(p), x); }
DUALBIN_INLINE void stream_floats(float* p, Vecf x) { _mm256_stream_ps(p, x); }
DUALBIN_INLINE void stream_lane(void* p, Lane x) { _mm_stream_si128(static_cast<Lane*>(p), x); }
DUALBIN_INLINE void store_halves(uint16_t* p, Lane x) { store_lane(p, x); }
DUALBIN_INLINE void stream_halves(uint16_t* p, Lane x) { stream_lane(p, x); }
DUALBIN_INLINE void finish_streams() { _mm_sfence(); }

// ---- doubles

DUALBIN_INLINE Vecd all_doubles(double x) { return _mm256_set1_pd(x); }
DUALBIN_INLINE Vecd widen_low(Vecf a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a)); }  // the first half of the elements
DUALBIN_INLINE Vecd widen_upper(Vecf a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)); }
DUALBIN_INLINE Vecd add(Vecd a, Vecd b) { return _mm256_add_pd(a, b); }
DUALBIN_INLINE Vecd times(Vecd a, Vecd b) { return _mm256_mul_pd(a, b); }
DUALBIN_INLINE Vecd over(Vecd a, Vecd b) { return _mm256_div_pd(a, b); }
DUALBIN_INLINE Vecd least(Vecd a, Vecd b) { return _mm256_min_pd(a, b); }
DUALBIN_INLINE Vecd floor_of(Vecd a) { return _mm256_floor_pd(a); }
DUALBIN_INLINE void store_doubles(double* p, Vecd x) { _mm256_storeu_pd(p, x); }
DUALBIN_INLINE void store_truncated(int32_t* p, Vecd a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvttpd_epi32(a)); }

// For 32 columns: element k of part v is `set` where bit 8 * v + k of the word is set, else `clear`.
struct SignWord {
  Vec word;

  explicit DUALBIN_INLINE SignWord(uint32_t bits) : word(all32(bits)) {}

  template <int part>
  DUALBIN_INLINE Vecf pick(Vecf clear, Vecf set) const {
    constexpr int b = 31 - kFloats * part;
    const Vec top = _mm256_sllv_epi32(word, _mm256_setr_epi32(b, b - 1, b - 2, b - 3, b - 4, b - 5, b - 6, b - 7));
    return _mm256_blendv_ps(clear, set, _mm256_castsi256_ps(top));
  }

  // The same for elements of 16 bits, of which a vector has twice as many.
  template <int part>
  DUALBIN_INLINE Vec pick16(Vec clear, Vec set) const {
    const Vec own = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, INT16_MIN);
    const Vec half = choose8(word, all16(0x0100 + 0x0202 * part));
    return _mm256_blendv_epi8(clear, set, _mm256_cmpeq_epi16(both(half, own), own));
  }
};

// For 32 columns, a byte each: `set` where the bit is set, else `clear`.
DUALBIN_INLINE Vec pick8(const uint8_t* bits, Vec clear, Vec set) {
  uint32_t word;
  std::memcpy(&word, bits, sizeof(word));
  const Vec spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const Vec own = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const Vec bytes = choose8(all32(word), spread);
  return _mm256_blendv_epi8(clear, set, _mm256_cmpeq_epi8(both(bytes, own), own));
}

// For 32 columns of two planes: element k of part v is element i + 2 * j of the lanes of `four`, i and j being bit 8 * v + k of the planes.
struct PairWord {
  Vec pairs;

  // Both bits of a column side by side: of even columns in the even elements, of odd ones in the odd elements.
  DUALBIN_INLINE PairWord(uint32_t first, uint32_t second) {
    const Vec low = _mm256_srlv_epi32(all32(first), _mm256_setr_epi32(0, 1, 0, 1, 0, 1, 0, 1));
    const Vec high = _mm256_sllv_epi32(all32(second), _mm256_setr_epi32(1, 0, 1, 0, 1, 0, 1, 0));
    pairs = either(both(low, all32(0x55555555u)), both(high, all32(0xaaaaaaaau)));
  }

  template <int part>
  DUALBIN_INLINE Vecf pick(Vecf four) const {
    constexpr int b = kFloats * part;
    const Vec index = _mm256_srlv_epi32(pairs, _mm256_setr_epi32(b, b, b + 2, b + 2, b + 4, b + 4, b + 6, b + 6));
    return _mm256_permutevar_ps(four, index);  // which looks at the last two bits
  }
};

}  // namespace
}  // namespace dualbin::detail
