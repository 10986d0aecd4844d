// Vectors of 512 bits in AVX-512 (F, DQ, BW, VL), with the names of vector_avx2.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define DUALBIN_INLINE inline __attribute__((always_inline))

// No name of these headers is visible in another file: each instruction set has functions of its own.
namespace dualbin::detail {
namespace {

using Vec = __m512i;
using Vecf = __m512;
using Vecd = __m512d;
using Lane = __m128i;

constexpr int kLanes = 4;
constexpr int kFloats = 16;
constexpr int kDoubles = 8;

// ---- loads, stores, constants

DUALBIN_INLINE Vec load(const void* p) { return _mm512_loadu_si512(p); }
DUALBIN_INLINE void store(void* p, Vec x) { _mm512_storeu_si512(p, x); }
DUALBIN_INLINE Lane load_lane(const void* p) { return _mm_loadu_si128(static_cast<const Lane*>(p)); }
DUALBIN_INLINE void store_lane(void* p, Lane x) { _mm_storeu_si128(static_cast<Lane*>(p), x); }
DUALBIN_INLINE Vec join(const Lane (&x)[kLanes]) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(x[0]), x[1], 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(x[2]), x[3], 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
DUALBIN_INLINE void split(Vec x, Lane (&to)[kLanes]) {
  to[0] = _mm512_castsi512_si128(x);
  to[1] = _mm512_extracti32x4_epi32(x, 1);
  to[2] = _mm512_extracti32x4_epi32(x, 2);
  to[3] = _mm512_extracti32x4_epi32(x, 3);
}
DUALBIN_INLINE Lane lane8(int x) { return _mm_set1_epi8(static_cast<char>(x)); }
DUALBIN_INLINE Lane lane16(int x) { return _mm_set1_epi16(static_cast<int16_t>(x)); }
DUALBIN_INLINE Lane lane32(uint32_t x) { return _mm_set1_epi32(static_cast<int32_t>(x)); }
DUALBIN_INLINE Lane lane_of_floats(float x) { return _mm_castps_si128(_mm_set1_ps(x)); }
DUALBIN_INLINE Vec in_lanes(Lane x) { return _mm512_broadcast_i32x4(x); }
DUALBIN_INLINE Vec zero() { return _mm512_setzero_si512(); }
DUALBIN_INLINE Vec all8(int x) { return in_lanes(lane8(x)); }
DUALBIN_INLINE Vec all16(int x) { return in_lanes(lane16(x)); }
DUALBIN_INLINE Vec all32(uint32_t x) { return in_lanes(lane32(x)); }

// ---- bits

DUALBIN_INLINE Vec both(Vec a, Vec b) { return _mm512_and_si512(a, b); }
DUALBIN_INLINE Vec either(Vec a, Vec b) { return _mm512_or_si512(a, b); }
DUALBIN_INLINE Vec without(Vec a, Vec b) { return _mm512_andnot_si512(b, a); }
DUALBIN_INLINE Vec differ(Vec a, Vec b) { return _mm512_xor_si512(a, b); }
template <int k>
DUALBIN_INLINE Vec left16(Vec a) {
  return _mm512_slli_epi16(a, k);
}
template <int k>
DUALBIN_INLINE Vec right16(Vec a) {
  return _mm512_srli_epi16(a, k);
}
template <int k>
DUALBIN_INLINE Vec left32(Vec a) {
  return _mm512_slli_epi32(a, k);
}
template <int k>
DUALBIN_INLINE Vec right32(Vec a) {
  return _mm512_srli_epi32(a, k);
}
template <int k>
DUALBIN_INLINE Vec left64(Vec a) {
  return _mm512_slli_epi64(a, k);
}
template <int k>
DUALBIN_INLINE Vec right64(Vec a) {
  return _mm512_srli_epi64(a, k);
}
DUALBIN_INLINE Vec left32(Vec a, int k) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(k)); }
DUALBIN_INLINE Vec right_signed16(Vec a, int k) { return _mm512_sra_epi16(a, _mm_cvtsi32_si128(k)); }
DUALBIN_INLINE Vec signs16(Vec a) { return _mm512_srai_epi16(a, 15); }  // all ones where a is below 0

// ---- integers

DUALBIN_INLINE Vec add16(Vec a, Vec b) { return _mm512_add_epi16(a, b); }
DUALBIN_INLINE Vec sub16(Vec a, Vec b) { return _mm512_sub_epi16(a, b); }
DUALBIN_INLINE Vec add32(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
DUALBIN_INLINE Vec add64(Vec a, Vec b) { return _mm512_add_epi64(a, b); }
DUALBIN_INLINE Vec abs16(Vec a) { return _mm512_abs_epi16(a); }
DUALBIN_INLINE Vec min16(Vec a, Vec b) { return _mm512_min_epi16(a, b); }
DUALBIN_INLINE Vec max16(Vec a, Vec b) { return _mm512_max_epi16(a, b); }
DUALBIN_INLINE Vec min32(Vec a, Vec b) { return _mm512_min_epi32(a, b); }
DUALBIN_INLINE Vec max32(Vec a, Vec b) { return _mm512_max_epi32(a, b); }
DUALBIN_INLINE Vec less_to_zero16(Vec a, Vec b) { return _mm512_subs_epu16(a, b); }  // max(a - b, 0), unsigned
DUALBIN_INLINE Vec with_sign16(Vec a, Vec b) { return _mm512_mask_sub_epi16(a, _mm512_movepi16_mask(b), _mm512_setzero_si512(), a); }
DUALBIN_INLINE Vec high16(Vec a, Vec b) { return _mm512_mulhi_epi16(a, b); }
DUALBIN_INLINE Vec high_unsigned16(Vec a, Vec b) { return _mm512_mulhi_epu16(a, b); }
DUALBIN_INLINE Vec times16(Vec a, Vec b) { return _mm512_mullo_epi16(a, b); }
DUALBIN_INLINE Vec above_unsigned16(Vec a, Vec b) { return _mm512_movm_epi16(_mm512_cmpgt_epu16_mask(a, b)); }
DUALBIN_INLINE Vec dot16(Vec a, Vec b) { return _mm512_madd_epi16(a, b); }  // a0 * b0 + a1 * b1 in 32 bits
DUALBIN_INLINE Vec times32(Vec a, Vec b) { return _mm512_mullo_epi32(a, b); }
DUALBIN_INLINE Vec times_even32(Vec a, Vec b) { return _mm512_mul_epu32(a, b); }  // 64-bit products of the even elements
DUALBIN_INLINE Vec above32(Vec a, Vec b) { return _mm512_movm_epi32(_mm512_cmpgt_epi32_mask(a, b)); }
DUALBIN_INLINE Vec odd16(Vec a, Vec b) { return _mm512_mask_blend_epi16(0xaaaaaaaau, a, b); }  // even elements of a, odd ones of b
DUALBIN_INLINE Vec odd32(Vec a, Vec b) { return _mm512_mask_blend_epi32(0xaaaau, a, b); }

// The top bits of the bytes: bit i of the result is that of byte i.
DUALBIN_INLINE uint64_t tops8(Vec a) { return _mm512_movepi8_mask(a); }

// The same of 32-bit elements.
DUALBIN_INLINE uint32_t tops32(Vec a) { return _mm512_movepi32_mask(a); }

// ---- order, within lanes

DUALBIN_INLINE Vec low8(Vec a, Vec b) { return _mm512_unpacklo_epi8(a, b); }
DUALBIN_INLINE Vec upper8(Vec a, Vec b) { return _mm512_unpackhi_epi8(a, b); }
DUALBIN_INLINE Vec low16(Vec a, Vec b) { return _mm512_unpacklo_epi16(a, b); }
DUALBIN_INLINE Vec upper16(Vec a, Vec b) { return _mm512_unpackhi_epi16(a, b); }
DUALBIN_INLINE Vec low32(Vec a, Vec b) { return _mm512_unpacklo_epi32(a, b); }
DUALBIN_INLINE Vec upper32(Vec a, Vec b) { return _mm512_unpackhi_epi32(a, b); }
DUALBIN_INLINE Vec low64(Vec a, Vec b) { return _mm512_unpacklo_epi64(a, b); }
DUALBIN_INLINE Vec upper64(Vec a, Vec b) { return _mm512_unpackhi_epi64(a, b); }
DUALBIN_INLINE Vec choose8(Vec a, Vec index) { return _mm512_shuffle_epi8(a, index); }
DUALBIN_INLINE Vec narrow_unsigned16(Vec a, Vec b) { return _mm512_packus_epi16(a, b); }
DUALBIN_INLINE Vec narrow16(Vec a, Vec b) { return _mm512_packs_epi16(a, b); }

// ---- floats

DUALBIN_INLINE Vecf load_floats(const float* p) { return _mm512_loadu_ps(p); }
DUALBIN_INLINE void store_floats(float* p, Vecf x) { _mm512_storeu_ps(p, x); }
DUALBIN_INLINE Vecf all_floats(float x) { return _mm512_set1_ps(x); }
DUALBIN_INLINE Vecf floats_in_lanes(const float (&x)[4]) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
DUALBIN_INLINE Vec bits_of(Vecf a) { return _mm512_castps_si512(a); }
DUALBIN_INLINE Vecf as_floats(Vec a) { return _mm512_castsi512_ps(a); }
DUALBIN_INLINE Vecf add(Vecf a, Vecf b) { return _mm512_add_ps(a, b); }
DUALBIN_INLINE Vecf sub(Vecf a, Vecf b) { return _mm512_sub_ps(a, b); }
DUALBIN_INLINE Vecf over(Vecf a, Vecf b) { return _mm512_div_ps(a, b); }
DUALBIN_INLINE Vecf times(Vecf a, Vecf b) { return _mm512_mul_ps(a, b); }
DUALBIN_INLINE Vecf widen_bf16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
DUALBIN_INLINE Vecf widen_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
DUALBIN_INLINE Vecf absolute(Vecf a) { return _mm512_abs_ps(a); }
DUALBIN_INLINE Vecf nearest(Vecf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }  // ties to even
// A bit an element.
DUALBIN_INLINE uint32_t at_least_0(Vecf a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GE_OQ); }
DUALBIN_INLINE uint32_t above(Vecf a, Vecf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
DUALBIN_INLINE Vecf floats_of(Vec a) { return _mm512_cvtepi32_ps(a); }
DUALBIN_INLINE Vec rounded(Vecf a) { return _mm512_cvtps_epi32(a); }  // to nearest, ties to even

// Two vectors of 32-bit integers as one of 16 bits, in order; they must fit.
DUALBIN_INLINE Vec narrow_in_order32(Vec a, Vec b) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi32(a, b));
}

DUALBIN_INLINE Vec narrow_unsigned_in_order32(Vec a, Vec b) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packus_epi32(a, b));
}

DUALBIN_INLINE Vec widen8(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
DUALBIN_INLINE Vecf floats_of_bytes(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_lane(p))); }
DUALBIN_INLINE Vecf sign_of(Vecf a) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, all_floats(0.0f), _CMP_GE_OQ), all_floats(-1.0f), all_floats(1.0f));
}
DUALBIN_INLINE Vecf one_nan(Vecf a) {
  const Vecf nan = _mm512_castsi512_ps(all32(0x7fc00000u));
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a, nan);
}
DUALBIN_INLINE __m256i narrow_f16(Vecf a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
DUALBIN_INLINE Vec wide_f16(Vecf a) { return _mm512_cvtepu16_epi32(narrow_f16(a)); }
DUALBIN_INLINE __m256i narrow_bf16(Vecf a) {
  const Vec u = _mm512_castps_si512(a);
  const Vec odd = both(right32<16>(u), all32(1));
  return _mm512_cvtepi32_epi16(right32<16>(add32(u, add32(odd, all32(0x7fffu)))));
}
DUALBIN_INLINE void stream(void* p, Vec x) { _mm512_stream_si512(static_cast<Vec*>(p), x); }
DUALBIN_INLINE void stream_floats(float* p, Vecf x) { _mm512_stream_ps(p, x); }
DUALBIN_INLINE void stream_lane(void* p, Lane x) { _mm_stream_si128(static_cast<Lane*>(p), x); }
DUALBIN_INLINE void store_halves(uint16_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
DUALBIN_INLINE void stream_halves(uint16_t* p, __m256i x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), x); }
DUALBIN_INLINE void finish_streams() { _mm_sfence(); }

// ---- doubles

DUALBIN_INLINE Vecd all_doubles(double x) { return _mm512_set1_pd(x); }
DUALBIN_INLINE Vecd widen_low(Vecf a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }  // the first half of the elements
DUALBIN_INLINE Vecd widen_upper(Vecf a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
DUALBIN_INLINE Vecd add(Vecd a, Vecd b) { return _mm512_add_pd(a, b); }
DUALBIN_INLINE Vecd times(Vecd a, Vecd b) { return _mm512_mul_pd(a, b); }
DUALBIN_INLINE Vecd over(Vecd a, Vecd b) { return _mm512_div_pd(a, b); }
DUALBIN_INLINE Vecd least(Vecd a, Vecd b) { return _mm512_min_pd(a, b); }
DUALBIN_INLINE Vecd floor_of(Vecd a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
DUALBIN_INLINE void store_doubles(double* p, Vecd x) { _mm512_storeu_pd(p, x); }
DUALBIN_INLINE void store_truncated(int32_t* p, Vecd a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvttpd_epi32(a)); }

// For 32 columns: element k of part v is `set` where bit 16 * v + k of the word is set, else `clear`.
struct SignWord {
  uint32_t word;

  explicit DUALBIN_INLINE SignWord(uint32_t bits) : word(bits) {}

  template <int part>
  DUALBIN_INLINE Vecf pick(Vecf clear, Vecf set) const {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(word >> (kFloats * part)), clear, set);
  }

  template <int part>
  DUALBIN_INLINE Vec pick16(Vec clear, Vec set) const {
    return _mm512_mask_blend_epi16(word, clear, set);
  }
};

// For 64 columns, a byte each: `set` where the bit is set, else `clear`.
DUALBIN_INLINE Vec pick8(const uint8_t* bits, Vec clear, Vec set) {
  uint64_t word;
  std::memcpy(&word, bits, sizeof(word));
  return _mm512_mask_blend_epi8(word, clear, set);
}

// For 32 columns of two planes: element k of part v is element i + 2 * j of the lanes of `four`, i and j being bit 16 * v + k of the
// planes.
struct PairWord {
  Vec pairs;

  // Both bits of a column side by side: of even columns in the even elements, of odd ones in the odd elements.
  DUALBIN_INLINE PairWord(uint32_t first, uint32_t second) {
    const Vec low = _mm512_srlv_epi32(all32(first), _mm512_setr_epi32(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1));
    const Vec high = _mm512_sllv_epi32(all32(second), _mm512_setr_epi32(1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
    pairs = either(both(low, all32(0x55555555u)), both(high, all32(0xaaaaaaaau)));
  }

  template <int part>
  DUALBIN_INLINE Vecf pick(Vecf four) const {
    constexpr int b = kFloats * part;
    const Vec index = _mm512_srlv_epi32(pairs, _mm512_setr_epi32(b, b, b + 2, b + 2, b + 4, b + 4, b + 6, b + 6, b + 8, b + 8, b + 10,
                                                                 b + 10, b + 12, b + 12, b + 14, b + 14));
    return _mm512_permutevar_ps(four, index);  // which looks at the last two bits
  }
};

}  // namespace
}  // namespace dualbin::detail
