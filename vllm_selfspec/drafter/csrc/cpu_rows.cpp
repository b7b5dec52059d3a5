// Matrix products of a few rows on x86 CPUs that have AVX2 but none of the instructions that vLLM's and ATen's kernels
// are written for (AVX-512, VNNI, AMX). Decoding reads every weight once per step, so the aim is the memory's speed:
// each weight is widened in registers once, for a block of rows, and no copy of it is written anywhere.
//
//   rows_linear   weights [N, K] bfloat16 or float16, sums in float32
//   int8_linear   weights [N, K] int8 with a scale per output, activations int8 with a scale per row
//   int4_linear   weights 4 bits in groups of 64 inputs with scale and minimum, activations int8 per row and group
//
// x is [M, K] float32, bfloat16 or float16; bias [N] of x's type or absent; the result [M, N] of x's type.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace {

constexpr int64_t kGroup = 64;

// --- eight values at a time ------------------------------------------------------------------------------------------

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }

inline __m256 load8(const at::BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline __m256 load8(const at::Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline int sum8(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Sums of four products each of unsigned and signed bytes, as eight int32. Callers keep |u * s| below 2^14, so that the
// 16-bit sums of two cannot saturate.
inline __m256i dot32(__m256i u, __m256i s) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
}

// --- activations -----------------------------------------------------------------------------------------------------

template <typename T>
void widen(const T* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
}

// Rows quantized to int8 in groups of `group` inputs, padded with zeros to a multiple of kGroup.
struct QuantizedRows {
  int64_t padded, groups;
  std::vector<int8_t> values;  // [M, padded]
  std::vector<float> scales;   // [M, groups]
  std::vector<float> sums;     // [M, groups] of what the int8 values stand for

  template <typename T>
  QuantizedRows(const T* x, int64_t rows, int64_t columns, int64_t padded_columns, int64_t group)
      : padded(padded_columns),
        groups(padded_columns / group),
        values(rows * padded_columns, 0),
        scales(rows * groups),
        sums(rows * groups) {
    std::vector<float> wide(padded_columns, 0.0f);
    for (int64_t m = 0; m < rows; ++m) {
      widen(x + m * columns, wide.data(), columns);
      for (int64_t g = 0; g < groups; ++g) {
        const float* part = wide.data() + g * group;
        float most = 0.0f;
        for (int64_t i = 0; i < group; ++i) most = std::max(most, std::fabs(part[i]));
        const float scale = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
        int8_t* out = values.data() + m * padded + g * group;
        int total = 0;
        for (int64_t i = 0; i < group; ++i) {
          const int q = static_cast<int>(std::lrintf(part[i] * inverse));
          out[i] = static_cast<int8_t>(q);
          total += q;
        }
        scales[m * groups + g] = scale;
        sums[m * groups + g] = scale * static_cast<float>(total);
      }
    }
  }
};

// Which of the passes over one tile's weights this is: one for each block of rows.
struct Pass {
  int64_t index, count;
};

// The outputs of a tile are read side by side, an order that hardware does not foresee: ask for the next tile's bytes in
// the order in which they lie, spread over all steps of all passes, so that memory works while rows are computed.
// `done` of the tile's `size` weights have been used in this pass, and a step uses `STEP`.
template <int64_t STEP, typename W>
inline void prefetch_next(const W* tile, int64_t size, int64_t done, Pass pass) {
  const char* next = reinterpret_cast<const char*>(tile + size);
  const int64_t offset = (pass.index * size + done) * static_cast<int64_t>(sizeof(W)) / pass.count;
  for (int64_t i = 0; i < STEP * static_cast<int64_t>(sizeof(W)); i += 64) _mm_prefetch(next + offset + i, _MM_HINT_T0);
}

// --- the three products, for a tile of `OUT` outputs and `ROWS` rows -------------------------------------------------

template <int OUT, int ROWS, typename W>
inline void rows_tile(const W* w, const float* x, int64_t k, Pass pass, float sums[OUT][ROWS]) {
  __m256 acc[OUT][ROWS];
  for (int n = 0; n < OUT; ++n)
    for (int m = 0; m < ROWS; ++m) acc[n][m] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) {
    prefetch_next<OUT * 8>(w, OUT * k, OUT * i, pass);
    __m256 weight[OUT];
    for (int n = 0; n < OUT; ++n) weight[n] = load8(w + n * k + i);
    for (int m = 0; m < ROWS; ++m) {
      const __m256 value = load8(x + m * k + i);
      for (int n = 0; n < OUT; ++n) acc[n][m] = _mm256_fmadd_ps(weight[n], value, acc[n][m]);
    }
  }
  for (int n = 0; n < OUT; ++n)
    for (int m = 0; m < ROWS; ++m) {
      float total = sum8(acc[n][m]);
      for (int64_t j = i; j < k; ++j) total += static_cast<float>(w[n * k + j]) * x[m * k + j];
      sums[n][m] = total;
    }
}

template <int OUT, int ROWS>
inline void int8_tile(const int8_t* w, const int8_t* x, int64_t k, Pass pass, float sums[OUT][ROWS]) {
  __m256i acc[OUT][ROWS];
  for (int n = 0; n < OUT; ++n)
    for (int m = 0; m < ROWS; ++m) acc[n][m] = _mm256_setzero_si256();
  for (int64_t i = 0; i < k; i += 32) {
    prefetch_next<OUT * 32>(w, OUT * k, OUT * i, pass);
    for (int n = 0; n < OUT; ++n) {
      const __m256i weight = load32(w + n * k + i);
      const __m256i size = _mm256_abs_epi8(weight);
      for (int m = 0; m < ROWS; ++m)
        acc[n][m] = _mm256_add_epi32(acc[n][m], dot32(size, _mm256_sign_epi8(load32(x + m * k + i), weight)));
    }
  }
  for (int n = 0; n < OUT; ++n)
    for (int m = 0; m < ROWS; ++m) sums[n][m] = static_cast<float>(sum8(acc[n][m]));
}

template <int ROWS>
inline void int4_tile(const uint8_t* w, const at::BFloat16* scale_and_min, const int8_t* x, const float* x_scale,
                      const float* x_sum, int64_t groups, float sums[ROWS]) {
  __m256 acc[ROWS];
  float low[ROWS];
  for (int m = 0; m < ROWS; ++m) acc[m] = _mm256_setzero_ps(), low[m] = 0.0f;
  const __m256i mask = _mm256_set1_epi8(15);
  for (int64_t g = 0; g < groups; ++g) {
    _mm_prefetch(reinterpret_cast<const char*>(w + g * kGroup / 2) + 1024, _MM_HINT_T0);  // read one after the other
    const __m256i packed = load32(w + g * kGroup / 2);
    const __m256i first = _mm256_and_si256(packed, mask);
    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
    const float scale = static_cast<float>(scale_and_min[2 * g]), least = static_cast<float>(scale_and_min[2 * g + 1]);
    for (int m = 0; m < ROWS; ++m) {
      const int8_t* part = x + (m * groups + g) * kGroup;
      // four bits times eight: two of the 16-bit sums still fit together
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(first, load32(part)),
                                             _mm256_maddubs_epi16(second, load32(part + 32)));
      const __m256 products = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      acc[m] = _mm256_fmadd_ps(products, _mm256_set1_ps(scale * x_scale[m * groups + g]), acc[m]);
      low[m] += least * x_sum[m * groups + g];
    }
  }
  for (int m = 0; m < ROWS; ++m) sums[m] = sum8(acc[m]) + low[m];
}

// --- tiling ----------------------------------------------------------------------------------------------------------

// Calls tile(n, m, wide, ROWS, pass) so that every output of every row is computed once, three outputs at a time where
// `wide`. Outputs are split among threads; all rows are run over a tile's weights before the next tile's.
template <typename Tile>
void tiles(int64_t outputs, int64_t rows, Tile tile) {
  constexpr int64_t kBlock = 32;
  const int64_t blocks = (outputs + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = std::min(outputs, (block + 1) * kBlock);
    for (int64_t n = block * kBlock; n < end;) {
      const bool wide = n + 3 <= end;
      Pass pass{0, rows / 4 + (rows % 4 + 1) / 2};
      for (int64_t m = 0; m < rows; ++pass.index) {
        const int64_t left = rows - m;
        const int64_t step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        tile(n, m, wide, step, pass);
        m += step;
      }
      n += wide ? 3 : 1;
    }
  }
}

// Writes a tile's sums, scaled and with the bias added.
template <int OUT, int ROWS, typename T>
inline void store(const float sums[OUT][ROWS], T* out, const T* bias, int64_t n0, int64_t m0, int64_t outputs,
                  const float* w_scale, const float* x_scale) {
  for (int n = 0; n < OUT; ++n)
    for (int m = 0; m < ROWS; ++m) {
      float value = sums[n][m];
      if (w_scale != nullptr) value *= w_scale[n0 + n] * x_scale[m0 + m];
      if (bias != nullptr) value += static_cast<float>(bias[n0 + n]);
      out[(m0 + m) * outputs + n0 + n] = static_cast<T>(value);
    }
}

// Turns the run-time tile shape into a compile-time one: f.operator()<OUT, ROWS>().
template <typename F>
inline void dispatch_tile(bool wide, int64_t rows, F f) {
  if (wide) {
    if (rows == 4) return f.template operator()<3, 4>();
    if (rows == 2) return f.template operator()<3, 2>();
    return f.template operator()<3, 1>();
  }
  if (rows == 4) return f.template operator()<1, 4>();
  if (rows == 2) return f.template operator()<1, 2>();
  return f.template operator()<1, 1>();
}

template <typename F>
at::Tensor with_output(const at::Tensor& input, const std::optional<at::Tensor>& bias, int64_t outputs, F f) {
  TORCH_CHECK(input.dim() == 2, "x must be [M, K]");
  const at::Tensor x = input.contiguous();
  at::Tensor out = at::empty({x.size(0), outputs}, x.options());
  if (bias.has_value())
    TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->numel() == outputs && bias->is_contiguous(),
                "bias must be [N] of x's dtype");
  const auto run = [&]<typename T>() {
    const T* b = bias.has_value() ? bias->const_data_ptr<T>() : nullptr;
    f(x.const_data_ptr<T>(), out.mutable_data_ptr<T>(), b, x.size(0), x.size(1));
  };
  switch (x.scalar_type()) {
    case at::kFloat: run.template operator()<float>(); break;
    case at::kBFloat16: run.template operator()<at::BFloat16>(); break;
    case at::kHalf: run.template operator()<at::Half>(); break;
    default: TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
  }
  return out;
}

template <typename W>
at::Tensor rows_linear_of(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const int64_t outputs = weight.size(0);
  const W* w = weight.const_data_ptr<W>();
  return with_output(x, bias, outputs, [&](const auto* in, auto* out, const auto* b, int64_t rows, int64_t k) {
    std::vector<float> wide(rows * k);
    widen(in, wide.data(), rows * k);
    tiles(outputs, rows, [&](int64_t n, int64_t m, bool wide_tile, int64_t step, Pass pass) {
      dispatch_tile(wide_tile, step, [&]<int OUT, int ROWS>() {
        float sums[OUT][ROWS];
        rows_tile<OUT, ROWS>(w + n * k, wide.data() + m * k, k, pass, sums);
        store<OUT, ROWS>(sums, out, b, n, m, outputs, nullptr, nullptr);
      });
    });
  });
}

at::Tensor rows_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) == x.size(-1), "weight must be [N, K]");
  if (weight.scalar_type() == at::kHalf) return rows_linear_of<at::Half>(x, weight, bias);
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16, "weight must be bfloat16 or float16");
  return rows_linear_of<at::BFloat16>(x, weight, bias);
}

at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& bias) {
  const int64_t outputs = weight.size(0), padded = weight.size(1);
  TORCH_CHECK(weight.scalar_type() == at::kChar && weight.is_contiguous() && padded % kGroup == 0 &&
                  padded >= x.size(-1) && scale.scalar_type() == at::kFloat && scale.numel() == outputs,
              "weight must be int8 [N, K padded to a multiple of 64], scale float32 [N]");
  const int8_t* w = weight.const_data_ptr<int8_t>();
  const float* w_scale = scale.const_data_ptr<float>();
  return with_output(x, bias, outputs, [&](const auto* in, auto* out, const auto* b, int64_t rows, int64_t k) {
    const QuantizedRows quantized(in, rows, k, padded, padded);
    tiles(outputs, rows, [&](int64_t n, int64_t m, bool wide_tile, int64_t step, Pass pass) {
      dispatch_tile(wide_tile, step, [&]<int OUT, int ROWS>() {
        float sums[OUT][ROWS];
        int8_tile<OUT, ROWS>(w + n * padded, quantized.values.data() + m * padded, padded, pass, sums);
        store<OUT, ROWS>(sums, out, b, n, m, outputs, w_scale, quantized.scales.data());
      });
    });
  });
}

at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale_and_min,
                       const std::optional<at::Tensor>& bias) {
  const int64_t outputs = weight.size(0), groups = scale_and_min.size(1);
  TORCH_CHECK(weight.scalar_type() == at::kByte && weight.is_contiguous() && weight.size(1) == groups * kGroup / 2 &&
                  groups * kGroup >= x.size(-1) && scale_and_min.scalar_type() == at::kBFloat16 &&
                  scale_and_min.is_contiguous() && scale_and_min.numel() == 2 * outputs * groups,
              "weight must be uint8 [N, 32 G], scale_and_min bfloat16 [N, G, 2]");
  const uint8_t* w = weight.const_data_ptr<uint8_t>();
  const at::BFloat16* pairs = scale_and_min.const_data_ptr<at::BFloat16>();
  return with_output(x, bias, outputs, [&](const auto* in, auto* out, const auto* b, int64_t rows, int64_t k) {
    const QuantizedRows quantized(in, rows, k, groups * kGroup, kGroup);
    tiles(outputs, rows, [&](int64_t n, int64_t m, bool wide_tile, int64_t step, Pass) {
      dispatch_tile(wide_tile, step, [&]<int OUT, int ROWS>() {
        for (int i = 0; i < OUT; ++i) {
          float sums[1][ROWS];
          int4_tile<ROWS>(w + (n + i) * groups * kGroup / 2, pairs + (n + i) * groups * 2,
                          quantized.values.data() + m * quantized.padded, quantized.scales.data() + m * groups,
                          quantized.sums.data() + m * groups, groups, sums[0]);
          store<1, ROWS>(sums, out, b, n + i, m, outputs, nullptr, nullptr);
        }
      });
    });
  });
}

}  // namespace

TORCH_LIBRARY(selfspec_cpu, library) {
  library.def("rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  library.def("int4_linear(Tensor x, Tensor weight, Tensor scale_and_min, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(selfspec_cpu, CPU, library) {
  library.impl("rows_linear", rows_linear);
  library.impl("int8_linear", int8_linear);
  library.impl("int4_linear", int4_linear);
}
