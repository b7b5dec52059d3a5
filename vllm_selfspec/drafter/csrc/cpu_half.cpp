// Products of rows with the model's own bfloat16 and float16 weights on x86 CPUs whose AVX-512 does not multiply these
// types. oneDNN emulates bfloat16 there, each row for the time of one step, and has no product of float16.
//
//   avx512_rows_linear   weights [N, K] bfloat16 or float16 as a checkpoint has them, sums in float32
//
// x is [M, K] float32, bfloat16 or float16; bias [N] of x's type or absent; the result [M, N] of x's type.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <array>

#include "cpu_avx512.h"

namespace {

constexpr int64_t kStep = 32;     // inputs that are multiplied at a time
constexpr int64_t kOut = 4;       // outputs of a tile
constexpr int kRows = 6;          // most rows of a tile: as many sums as registers hold beside the weights
constexpr int64_t kBlock = 32;    // outputs whose weights stay in a cache while all rows pass
constexpr int64_t kChunk = 1024;  // inputs over which sums are taken, whatever the number of rows: none depends on others
constexpr __mmask32 kAll = 0xFFFFFFFF;

inline __m512i load32(const void* p, __mmask32 which) {
  return which == kAll ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(which, p);
}

struct Weights {
  __m512 first, second;
};

// kStep weights as float32. bfloat16 is widened fastest as the even ones and the odd ones.
inline Weights widened(const at::BFloat16* w, __mmask32 which) {
  const __m512i pairs = load32(w, which);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))))};
}

inline Weights widened(const at::Half* w, __mmask32 which) {
  const __m512i halves = load32(w, which);
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
}

// Inputs of a row in the order in which widened() gives the weights that they belong to, padded with zeros.
template <typename W, typename T>
void keep(const T* in, int64_t count, float* out) {
  if (count % kStep != 0) std::fill_n(out + count / kStep * kStep, kStep, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i % kStep;
    out[i - at + (std::is_same_v<W, at::BFloat16> ? at / 2 + at % 2 * (kStep / 2) : at)] = static_cast<float>(in[i]);
  }
}

// The sum of each of four vectors.
inline __m128 sum_each(const __m512 (&v)[4]) {
  const auto mix = [](__m512 a, __m512 b) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  };
  const __m512d first = mix(v[0], v[1]), second = mix(v[2], v[3]);
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), high);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Adds to `sums` [ROWS, kBlock] (or sets them, at the `start` of the inputs) the products of `count` inputs.
template <int ROWS, typename W>
inline void tile(const std::array<const W*, kOut>& w, const float* x, int64_t stride, int64_t count, Ahead ahead,
                 bool start, float* sums) {
  __m512 acc[kOut][ROWS];
  for (int n = 0; n < kOut; ++n)
    for (int m = 0; m < ROWS; ++m) acc[n][m] = _mm512_setzero_ps();
  const auto step = [&](int64_t i, __mmask32 which) __attribute__((always_inline)) {
    Weights weights[kOut];
    for (int n = 0; n < kOut; ++n) weights[n] = widened(w[n] + i, which);
    for (int m = 0; m < ROWS; ++m) {
      const __m512 value = _mm512_loadu_ps(x + m * stride + i);
      for (int n = 0; n < kOut; ++n) acc[n][m] = _mm512_fmadd_ps(weights[n].first, value, acc[n][m]);
    }
    for (int m = 0; m < ROWS; ++m) {
      const __m512 value = _mm512_loadu_ps(x + m * stride + i + kStep / 2);
      for (int n = 0; n < kOut; ++n) acc[n][m] = _mm512_fmadd_ps(weights[n].second, value, acc[n][m]);
    }
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep, ahead.from += ahead.along) {
    // into the second cache: more lines can be under way to it than to the first
    for (int n = 0; n < kOut; ++n) _mm_prefetch(ahead.from + n * ahead.across, _MM_HINT_T1);
    step(i, kAll);
  }
  if (i < count) step(i, (1u << (count - i)) - 1);
  for (int m = 0; m < ROWS; ++m) {
    const __m128 sum = sum_each({acc[0][m], acc[1][m], acc[2][m], acc[3][m]});
    float* to = sums + m * kBlock;
    _mm_storeu_ps(to, start ? sum : _mm_add_ps(_mm_loadu_ps(to), sum));
  }
}

// Sums [rows, kBlock] of `count` outputs, whose weights begin at `w`, over the inputs k0..k1 of k. Rows are `stride`
// values apart. Up to kRows rows read the weights once, in the order in which they lie; more pass one after the other
// over those of a chunk, and ask for the next chunk's in shares.
template <typename W>
void block_sums(const W* w, const float* x, int64_t stride, int64_t count, int64_t rows, int64_t k, int64_t k0,
                int64_t k1, float* sums) {
  const int64_t passes = (rows + kRows - 1) / kRows;
  for (int64_t pass = 0, m = 0; pass < passes; ++pass) {
    const int64_t now = (rows - m + passes - pass - 1) / (passes - pass);  // spread evenly
    for (int64_t n = 0; n < count; n += kOut)
      for (int64_t c = k0; c < k1; c += kChunk) {
        const int64_t size = std::min(kChunk, k - c);
        std::array<const W*, kOut> outputs;  // the last one again where there are no more
        for (int64_t i = 0; i < kOut; ++i) outputs[i] = w + std::min(n + i, count - 1) * k + c;
        // the tile after the next, or, where all rows pass over these weights, the chunk after this one in shares
        Ahead ahead{reinterpret_cast<const char*>(w + (n + 2 * kOut) * k + kOut * c), kLine, kOut * kLine};
        if (passes > 1) {
          const W* next = c + kChunk < k ? w + n * k + c + kChunk : w + (n + kBlock) * k;
          const int64_t share = kLine / passes;
          ahead = {reinterpret_cast<const char*>(next) + pass * share * (size / kStep), 2 * k, share};
        }
        with_count<kRows>(now, [&]<int ROWS>() {
          tile<ROWS>(outputs, x + m * stride + c, stride, size, ahead, c == 0, sums + m * kBlock + n);
        });
      }
    m += now;
  }
}

template <typename W, typename T>
void product(const W* w, const T* in, T* out, const T* bias, int64_t rows, int64_t outputs, int64_t k) {
  const int64_t stride = (k + kStep - 1) / kStep * kStep, part = rows > kRows ? kChunk : k;
  const at::Tensor kept = at::empty({rows, stride}, at::kFloat);  // begins at a line
  float* x = kept.mutable_data_ptr<float>();
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; ++m) keep<W>(in + m * k, k, x + m * stride);
    std::vector<float> sums(kBlock * rows);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < outputs; first += kBlock) {
      const int64_t count = std::min(kBlock, outputs - first);
      for (int64_t k0 = 0; k0 < k; k0 += part)
        block_sums(w + first * k, x, stride, count, rows, k, k0, std::min(k, k0 + part), sums.data());
      for (int64_t n = 0; n < count; n += 16) {
        const auto which = static_cast<__mmask16>((1u << std::min<int64_t>(16, count - n)) - 1);
        const __m512 added = bias != nullptr ? load16(bias + first + n, which) : _mm512_setzero_ps();
        for (int64_t m = 0; m < rows; ++m) {
          const __m512 sum = _mm512_loadu_ps(sums.data() + m * kBlock + n);
          store16(_mm512_add_ps(sum, added), out + m * outputs + first + n, which);
        }
      }
    }
  }
}

at::Tensor avx512_rows_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) == x.size(-1), "weight must be [N, K]");
  TORCH_CHECK(weight.scalar_type() == at::kHalf || weight.scalar_type() == at::kBFloat16,
              "weight must be bfloat16 or float16");
  return with_output(x, bias, weight.size(0), [&](const auto* in, auto* out, const auto* b, int64_t rows, int64_t k) {
    if (weight.scalar_type() == at::kHalf)
      product(weight.const_data_ptr<at::Half>(), in, out, b, rows, weight.size(0), k);
    else
      product(weight.const_data_ptr<at::BFloat16>(), in, out, b, rows, weight.size(0), k);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selfspec_cpu, library) {
  library.def("avx512_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(selfspec_cpu, CPU, library) { library.impl("avx512_rows_linear", avx512_rows_linear); }

#endif
