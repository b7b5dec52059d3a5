// What the kernels for AVX-512 share: sixteen values at a time.

#pragma once

#include "cpu_common.h"

namespace {

inline __m512 widen16(__m256i bfloats) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloats), 16));
}

// Sixteen outputs of one row, those stored that `which` names; halves are rounded to even.
inline void store16(__m512 v, float* out, __mmask16 which) { _mm512_mask_storeu_ps(out, which, v); }

inline void store16(__m512 v, at::Half* out, __mmask16 which) {
  _mm256_mask_storeu_epi16(out, which, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline void store16(__m512 v, at::BFloat16* out, __mmask16 which) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), odd);
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 no_number = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i value = _mm512_mask_mov_epi32(rounded, no_number, _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(out, which, _mm512_cvtepi32_epi16(value));
}

inline __m512 load16(const float* p, __mmask16 which) { return _mm512_maskz_loadu_ps(which, p); }
inline __m512 load16(const at::Half* p, __mmask16 which) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(which, p)); }
inline __m512 load16(const at::BFloat16* p, __mmask16 which) { return widen16(_mm256_maskz_loadu_epi16(which, p)); }

}  // namespace
