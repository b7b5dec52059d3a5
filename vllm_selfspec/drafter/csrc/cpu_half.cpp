// Products of rows with the model's own bfloat16 and float16 weights on x86 CPUs with AVX-512 and without AMX. oneDNN
// emulates bfloat16 where AVX512_BF16 is missing, each row for the time of one step, is slower than this with it, too,
// and has no product of float16 without AVX512_FP16.
//
//   avx512_rows_linear   weights [N, K] bfloat16 or float16 as a checkpoint has them, sums in float32
//
// x is [M, K] float32, bfloat16 or float16; bias [N] of x's type or absent; the result [M, N] of x's type.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <ATen/ops/linear.h>

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

// --- two ways to multiply kStep weights of kOut outputs with some rows' inputs, which are kept as X ---

// As float32, for inputs and weights of any type.
template <typename W>
struct Wide {
  using X = float;
  struct Weights {
    __m512 first, second;
  };

  // bfloat16 is widened fastest as the even ones and the odd ones.
  static Weights load(const W* w, __mmask32 which) {
    const __m512i halves = load32(w, which);
    if constexpr (std::is_same_v<W, at::BFloat16>)
      return {_mm512_castsi512_ps(_mm512_slli_epi32(halves, 16)),
              _mm512_castsi512_ps(_mm512_and_si512(halves, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))))};
    else
      return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
  }

  // Where an input of a step is kept: beside the weight that load() gives for it.
  static int64_t place(int64_t i) { return std::is_same_v<W, at::BFloat16> ? i / 2 + i % 2 * (kStep / 2) : i; }

  template <int ROWS>
  static void add(__m512 (&sums)[kOut][ROWS], const Weights (&w)[kOut], const float* x, int64_t stride) {
    for (int m = 0; m < ROWS; ++m) {
      const __m512 value = _mm512_loadu_ps(x + m * stride);
      for (int n = 0; n < kOut; ++n) sums[n][m] = _mm512_fmadd_ps(w[n].first, value, sums[n][m]);
    }
    for (int m = 0; m < ROWS; ++m) {
      const __m512 value = _mm512_loadu_ps(x + m * stride + kStep / 2);
      for (int n = 0; n < kOut; ++n) sums[n][m] = _mm512_fmadd_ps(w[n].second, value, sums[n][m]);
    }
  }
};

#ifdef __AVX512BF16__

// Pairs of bfloat16 by one instruction.
struct Pairs {
  using X = at::BFloat16;
  using Weights = __m512bh;

  static Weights load(const at::BFloat16* w, __mmask32 which) { return (__m512bh)load32(w, which); }

  static int64_t place(int64_t i) { return i; }

  template <int ROWS>
  static void add(__m512 (&sums)[kOut][ROWS], const Weights (&w)[kOut], const at::BFloat16* x, int64_t stride) {
    for (int m = 0; m < ROWS; ++m) {
      const auto value = (__m512bh)_mm512_loadu_si512(x + m * stride);
      for (int n = 0; n < kOut; ++n) sums[n][m] = _mm512_dpbf16_ps(sums[n][m], w[n], value);
    }
  }
};

// Rows from which on oneDNN is as fast by the same instruction, though it puts the weights into its own order first.
constexpr int64_t kMany = 128;

#endif

// --- tiling ----------------------------------------------------------------------------------------------------------

// Inputs of a row as a way wants them, padded with zeros.
template <typename How, typename T>
void keep(const T* in, int64_t count, typename How::X* out) {
  if (count % kStep != 0) std::fill_n(out + count / kStep * kStep, kStep, typename How::X(0));
  for (int64_t i = 0; i < count; ++i)
    out[i / kStep * kStep + How::place(i % kStep)] = static_cast<typename How::X>(in[i]);
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
template <typename How, int ROWS, typename W>
inline void tile(const std::array<const W*, kOut>& w, const typename How::X* x, int64_t stride, int64_t count,
                 Ahead ahead, bool start, float* sums) {
  __m512 acc[kOut][ROWS];
  for (int n = 0; n < kOut; ++n)
    for (int m = 0; m < ROWS; ++m) acc[n][m] = _mm512_setzero_ps();
  const auto step = [&](int64_t i, __mmask32 which) __attribute__((always_inline)) {
    typename How::Weights weights[kOut];
    for (int n = 0; n < kOut; ++n) weights[n] = How::load(w[n] + i, which);
    How::template add<ROWS>(acc, weights, x + i, stride);
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
template <typename How, typename W>
void block_sums(const W* w, const typename How::X* x, int64_t stride, int64_t count, int64_t rows, int64_t k,
                int64_t k0, int64_t k1, float* sums) {
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
          const W* next = c + kChunk < k ? w + n * k + c + kChunk : w + (n + count) * k;
          const int64_t share = kLine / passes;
          ahead = {reinterpret_cast<const char*>(next) + pass * share * (size / kStep), 2 * k, share};
        }
        with_count<kRows>(now, [&]<int ROWS>() {
          tile<How, ROWS>(outputs, x + m * stride + c, stride, size, ahead, c == 0, sums + m * kBlock + n);
        });
      }
    m += now;
  }
}

// All outputs [rows, outputs] of the rows `in`.
template <typename How, typename W, typename T>
void product(const W* w, const T* in, T* out, const T* bias, int64_t rows, int64_t outputs, int64_t k) {
  using X = typename How::X;
  const int64_t stride = (k + kStep - 1) / kStep * kStep, part = rows > kRows ? kChunk : k;
  const int64_t block = even_blocks(outputs, kBlock, kOut);
  const at::Tensor kept = at::empty({rows, stride}, c10::CppTypeToScalarType<X>::value);  // begins at a line
  X* x = kept.mutable_data_ptr<X>();
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; ++m) keep<How>(in + m * k, k, x + m * stride);
    std::vector<float> sums(kBlock * rows);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < outputs; first += block) {
      const int64_t count = std::min(block, outputs - first);
      for (int64_t k0 = 0; k0 < k; k0 += part)
        block_sums<How>(w + first * k, x, stride, count, rows, k, k0, std::min(k, k0 + part), sums.data());
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

template <typename W>
at::Tensor linear_of(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const W* w = weight.const_data_ptr<W>();
  const int64_t outputs = weight.size(0);
  return with_output(x, bias, outputs, [&]<typename T>(const T* in, T* out, const T* b, int64_t rows, int64_t k) {
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<W, at::BFloat16> && std::is_same_v<T, at::BFloat16>)
      return product<Pairs>(w, in, out, b, rows, outputs, k);
#endif
    product<Wide<W>>(w, in, out, b, rows, outputs, k);
  });
}

at::Tensor avx512_rows_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) == x.size(-1), "weight must be [N, K]");
  TORCH_CHECK(weight.scalar_type() == at::kHalf || weight.scalar_type() == at::kBFloat16,
              "weight must be bfloat16 or float16");
#ifdef __AVX512BF16__
  if (x.size(0) >= kMany && x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16)
    return at::linear(x, weight, bias);
#endif
  return weight.scalar_type() == at::kHalf ? linear_of<at::Half>(x, weight, bias)
                                           : linear_of<at::BFloat16>(x, weight, bias);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selfspec_cpu, library) {
  library.def("avx512_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(selfspec_cpu, CPU, library) { library.impl("avx512_rows_linear", avx512_rows_linear); }

#endif
