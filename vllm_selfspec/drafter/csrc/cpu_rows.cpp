// Matrix products of a few rows on x86 CPUs that have AVX2 but none of the instructions that vLLM's and ATen's kernels
// are written for (AVX-512, VNNI, AMX). Decoding reads every weight once per step, so the aim is the memory's speed:
// each weight is widened in registers once, for a block of rows, and no copy of it is written anywhere.
//
//   rows_linear   weights [N, K] bfloat16 or float16, sums in float32
//   int8_linear   weights [N, K] int8 with a scale per output, activations int8 with a scale per row
//   int4_linear   weights 4 bits in groups of 64 inputs with scale and minimum, activations int8 per row and group
//
// x is [M, K] float32, bfloat16 or float16; bias [N] of x's type or absent; the result [M, N] of x's type.
//
//   quantize_int8, quantize_int4   fill these weights from [N, K] float32, bfloat16 or float16, reading it once: a
//                                  drafter follows every update of its target

#include "cpu_common.h"

namespace {

inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Sums of four products each of unsigned and signed bytes, as eight int32. Callers keep |u * s| below 2^14, so that the
// 16-bit sums of two cannot saturate.
inline __m256i dot32(__m256i u, __m256i s) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
}

// Which of the passes over the same weights this is: one for each block of rows.
struct Pass {
  int64_t index, count;
};

inline int64_t passes_over(int64_t rows) { return rows / 4 + (rows % 4 + 1) / 2; }

// The outputs of a tile are read side by side, an order that hardware does not foresee: ask for the next tile's bytes
// in the order in which they lie, spread over all steps of all passes, so that memory works while rows are computed.
// `done` of the tile's `size` weights have been used in this pass, and a step uses `STEP`.
template <int64_t STEP, typename W>
inline void prefetch_next(const W* tile, int64_t size, int64_t done, Pass pass) {
  const char* next = reinterpret_cast<const char*>(tile + size);
  const auto bytes = static_cast<uint32_t>((pass.index * size + done) * sizeof(W));
  const uint32_t offset = bytes / static_cast<uint32_t>(pass.count);  // 32 bits: twice as fast as 64
  for (int64_t i = 0; i < STEP * static_cast<int64_t>(sizeof(W)); i += 64) _mm_prefetch(next + offset + i, _MM_HINT_T0);
}

// --- the three products, for a tile of `OUT` outputs and `ROWS` rows -------------------------------------------------

// Keeps a loaded vector in its register: compilers would rather load it again for every product that takes it.
template <typename V>
inline V keep(V v) {
  asm("" : "+x"(v));
  return v;
}

// Sixteen weights as two vectors. bfloat16 is widened fastest as the even ones and the odd ones.
struct Sixteen {
  __m256 first, second;
};

inline Sixteen load16(const at::BFloat16* p) {
  const __m256i pairs = keep(load32(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))))};
}

inline Sixteen load16(const at::Half* p) { return {load8(p), load8(p + 8)}; }

// float32 values in the order in which load16 gives the weights that they belong to.
template <typename W, typename T>
void widen_for(const T* in, float* out, int64_t count) {
  int64_t i = 0;
  if constexpr (std::is_same_v<W, T>)
    for (; i + 16 <= count; i += 16) {
      const Sixteen values = load16(in + i);
      _mm256_storeu_ps(out + i, values.first);
      _mm256_storeu_ps(out + i + 8, values.second);
    }
  else if constexpr (std::is_same_v<W, at::BFloat16>)
    for (; i + 16 <= count; i += 16)
      for (int64_t j = 0; j < 8; ++j) {
        out[i + j] = static_cast<float>(in[i + 2 * j]);
        out[i + 8 + j] = static_cast<float>(in[i + 2 * j + 1]);
      }
  widen(in + i, out + i, count - i);
}

// Adds to `sums` (or sets them, at the `start` of the inputs) the products of `count` inputs of weights `stride` apart.
template <int OUT, int ROWS, typename W>
inline void rows_tile(const W* w, const float* x, int64_t stride, int64_t count, Ahead ahead, bool start, float* sums,
                      int64_t rows) {
  __m256 acc[OUT][ROWS];
  for (int n = 0; n < OUT; ++n)
    for (int m = 0; m < ROWS; ++m) acc[n][m] = _mm256_setzero_ps();
  const auto step = [&](int64_t i) __attribute__((always_inline)) {
    Sixteen weight[OUT];
    for (int n = 0; n < OUT; ++n) weight[n] = load16(w + n * stride + i);
    for (int m = 0; m < ROWS; ++m) {
      const __m256 value = keep(_mm256_loadu_ps(x + m * stride + i));
      for (int n = 0; n < OUT; ++n) acc[n][m] = _mm256_fmadd_ps(weight[n].first, value, acc[n][m]);
    }
    for (int m = 0; m < ROWS; ++m) {
      const __m256 value = keep(_mm256_loadu_ps(x + m * stride + i + 8));
      for (int n = 0; n < OUT; ++n) acc[n][m] = _mm256_fmadd_ps(weight[n].second, value, acc[n][m]);
    }
  };
  int64_t i = 0;
  for (; i + 32 <= count; i += 32, ahead.from += ahead.along) {
    for (int n = 0; n < OUT; ++n) _mm_prefetch(ahead.from + n * ahead.across, _MM_HINT_T0);
    step(i);
    step(i + 16);
  }
  for (; i + 16 <= count; i += 16) step(i);
  for (int n = 0; n < OUT; ++n)
    for (int m = 0; m < ROWS; ++m) {
      float total = sum8(acc[n][m]);
      for (int64_t j = i; j < count; ++j) total += static_cast<float>(w[n * stride + j]) * x[m * stride + j];
      sums[n * rows + m] = start ? total : sums[n * rows + m] + total;
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

// Quantizes x, then calls tile(n, m, wide, ROWS, pass) so that every output of every row is computed once, three outputs
// at a time where `wide`. Outputs are split among threads; all rows are run over a tile's weights before the next tile's.
template <typename Tile>
void tiles(int64_t outputs, int64_t rows, QuantizedRows& x, Tile tile) {
  const int64_t block = even_blocks(outputs, 33, 3);
#pragma omp parallel
  {
    x.run();
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < outputs; first += block) {
      const int64_t end = std::min(outputs, first + block);
      for (int64_t n = first; n < end;) {
        const bool wide = n + 3 <= end;
        Pass pass{0, passes_over(rows)};
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

// rows_linear takes sums over kChunk inputs at a time, whatever the number of rows, so that a row's result does not
// depend on the others. With more than four rows, four rows of x over a chunk stay in the nearest cache while kBlock
// outputs are computed from them, and those weights in the next one while all rows pass. With up to four, weights are
// read once, in the order in which they lie.
constexpr int64_t kBlock = 24, kChunk = 1024;

// Sums [count, rows] of `count` outputs, whose weights begin at `w`, over the inputs k0..k1 of k.
template <typename W>
void rows_block(const W* w, const float* x, int64_t count, int64_t rows, int64_t k, int64_t k0, int64_t k1,
                float* sums) {
  constexpr int64_t kSize = sizeof(W);
  Pass pass{0, passes_over(rows)};
  for (int64_t m = 0; m < rows; ++pass.index) {
    const auto run = [&]<int OUT, int ROWS>() {
      int64_t n = 0;
      const auto tile = [&]<int N>() {
        for (int64_t c = k0; c < k1; c += kChunk) {
          const int64_t size = std::min(kChunk, k - c);
          // the tile behind this one, or, where all rows pass over these weights, the chunk after this one in shares
          Ahead ahead{reinterpret_cast<const char*>(w + (n + N) * k + N * c), kLine, N * kLine};
          if (pass.count > 1) {
            const W* next = c + kChunk < k ? w + n * k + c + kChunk : w + (n + count) * k;
            const int64_t share = kLine / pass.count;
            ahead = {reinterpret_cast<const char*>(next) + pass.index * share * (size / 32), k * kSize, share};
          }
          rows_tile<N, ROWS>(w + n * k + c, x + m * k + c, k, size, ahead, c == 0, sums + n * rows + m, rows);
        }
        n += N;
      };
      while (n + OUT <= count) tile.template operator()<OUT>();
      while (n < count) tile.template operator()<1>();
      m += ROWS;
    };
    // as many sums as registers hold beside the weights
    if (rows - m >= 4)
      run.template operator()<2, 4>();
    else if (rows - m >= 2)
      run.template operator()<3, 2>();
    else
      run.template operator()<4, 1>();
  }
}

template <typename W>
at::Tensor rows_linear_of(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const int64_t outputs = weight.size(0), block = even_blocks(outputs, kBlock, 12);  // 2, 3 or 4 are a tile
  const W* w = weight.const_data_ptr<W>();
  return with_output(x, bias, outputs, [&](const auto* in, auto* out, const auto* b, int64_t rows, int64_t k) {
    const at::Tensor scratch = at::empty({rows, k}, x.options().dtype(at::kFloat));  // begins at a cache line
    float* wide = scratch.mutable_data_ptr<float>();
    const int64_t part = passes_over(rows) > 1 ? kChunk : k;
#pragma omp parallel
    {
      std::vector<float> sums(kBlock * rows);
#pragma omp for schedule(static)
      for (int64_t m = 0; m < rows; ++m) widen_for<W>(in + m * k, wide + m * k, k);
#pragma omp for schedule(static)
      for (int64_t first = 0; first < outputs; first += block) {
        const int64_t count = std::min(block, outputs - first);
        for (int64_t k0 = 0; k0 < k; k0 += part)
          rows_block(w + first * k, wide, count, rows, k, k0, std::min(k, k0 + part), sums.data());
        for (int64_t m = 0; m < rows; ++m)
          for (int64_t n = 0; n < count; ++n) {
            const float value = sums[n * rows + m] + (b != nullptr ? static_cast<float>(b[first + n]) : 0.0f);
            out[m * outputs + first + n] = static_cast<std::decay_t<decltype(*out)>>(value);
          }
      }
    }
  });
}

at::Tensor rows_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) == x.size(-1), "weight must be [N, K]");
  if (weight.scalar_type() == at::kHalf) return rows_linear_of<at::Half>(x, weight, bias);
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16, "weight must be bfloat16 or float16");
  return rows_linear_of<at::BFloat16>(x, weight, bias);
}

at::Tensor int8_linear(const Inputs& x, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& bias) {
  const int64_t outputs = weight.size(0), padded = weight.size(1);
  TORCH_CHECK(weight.scalar_type() == at::kChar && weight.is_contiguous() && padded % kGroup == 0 &&
                  padded >= x.columns && scale.scalar_type() == at::kFloat && scale.numel() == outputs,
              "weight must be int8 [N, K padded to a multiple of 64], scale float32 [N]");
  const int8_t* w = weight.const_data_ptr<int8_t>();
  const float* w_scale = scale.const_data_ptr<float>();
  QuantizedRows quantized(x, padded, padded);
  return with_result(x, bias, outputs, [&](auto* out, const auto* b) {
    tiles(outputs, x.rows, quantized, [&](int64_t n, int64_t m, bool wide_tile, int64_t step, Pass pass) {
      dispatch_tile(wide_tile, step, [&]<int OUT, int ROWS>() {
        float sums[OUT][ROWS];
        int8_tile<OUT, ROWS>(w + n * padded, quantized.values.data() + m * padded, padded, pass, sums);
        store<OUT, ROWS>(sums, out, b, n, m, outputs, w_scale, quantized.scales.data());
      });
    });
  });
}

at::Tensor int4_linear(const Inputs& x, const at::Tensor& weight, const at::Tensor& scale_and_min,
                       const std::optional<at::Tensor>& bias) {
  const int64_t outputs = weight.size(0), groups = scale_and_min.size(1);
  TORCH_CHECK(weight.scalar_type() == at::kByte && weight.is_contiguous() && weight.size(1) == groups * kGroup / 2 &&
                  groups * kGroup >= x.columns && scale_and_min.scalar_type() == at::kBFloat16 &&
                  scale_and_min.is_contiguous() && scale_and_min.numel() == 2 * outputs * groups,
              "weight must be uint8 [N, 32 G], scale_and_min bfloat16 [N, G, 2]");
  const uint8_t* w = weight.const_data_ptr<uint8_t>();
  const at::BFloat16* pairs = scale_and_min.const_data_ptr<at::BFloat16>();
  QuantizedRows quantized(x, groups * kGroup, kGroup);
  return with_result(x, bias, outputs, [&](auto* out, const auto* b) {
    tiles(outputs, x.rows, quantized, [&](int64_t n, int64_t m, bool wide_tile, int64_t step, Pass) {
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

// Both weights of a drafter with two views; `light`, one bool, tells which one is applied.
at::Tensor views_linear(const Inputs& x, const at::Tensor& light, const at::Tensor& weight8, const at::Tensor& scale,
                        const at::Tensor& weight4, const at::Tensor& scale_and_min,
                        const std::optional<at::Tensor>& bias) {
  return *light.const_data_ptr<bool>() ? int4_linear(x, weight4, scale_and_min, bias)
                                       : int8_linear(x, weight8, scale, bias);
}

using Tensors = std::vector<at::Tensor>;
using Bias = std::optional<at::Tensor>;

const bool kRegistered = [] {
  auto& products = selfspec::products();
  products["int8_linear"] = [](const Inputs& x, const Tensors& w, int64_t, const Bias& b) {
    return int8_linear(x, w.at(0), w.at(1), b);
  };
  products["int4_linear"] = [](const Inputs& x, const Tensors& w, int64_t, const Bias& b) {
    return int4_linear(x, w.at(0), w.at(1), b);
  };
  products["views_linear"] = [](const Inputs& x, const Tensors& w, int64_t, const Bias& b) {
    return views_linear(x, w.at(0), w.at(1), w.at(2), w.at(3), w.at(4), b);
  };
  return true;
}();

// --- quantizing weights ----------------------------------------------------------------------------------------------

void quantize_int8(const at::Tensor& weight, at::Tensor out, at::Tensor scale) {
  const at::Tensor source = weight.contiguous();
  const int64_t outputs = source.size(0), inputs = source.size(1), padded = out.size(1);
  TORCH_CHECK(out.size(0) == outputs && padded >= inputs && scale.numel() == outputs, "the weight has another shape");
  float* scales = scale.data_ptr<float>();
  int8_t* values = out.data_ptr<int8_t>();
  for_type(source, [&]<typename W>() {
    const W* w = source.const_data_ptr<W>();
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < outputs; ++n) scales[n] = int8_row(w + n * inputs, inputs, values + n * padded);
  });
}

void quantize_int4(const at::Tensor& weight, at::Tensor out, at::Tensor scale_and_min) {
  const at::Tensor source = weight.contiguous();
  const int64_t outputs = source.size(0), inputs = source.size(1), groups = scale_and_min.size(1);
  TORCH_CHECK(out.size(0) == outputs && (inputs + kGroup - 1) / kGroup == groups, "the weight has another shape");
  at::BFloat16* scales = scale_and_min.data_ptr<at::BFloat16>();
  uint8_t* values = out.data_ptr<uint8_t>();
  for_type(source, [&]<typename W>() {
    const W* w = source.const_data_ptr<W>();
#pragma omp parallel
    {
      std::vector<float> wide(groups * kGroup, 0.0f);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < outputs; ++n) {
        widen(w + n * inputs, wide.data(), inputs);
        for (int64_t g = n * groups; g < (n + 1) * groups; ++g) {
          alignas(32) uint8_t q[kGroup];
          int4_group(wide.data() + (g - n * groups) * kGroup, q, scales[2 * g], scales[2 * g + 1]);
          // the first half of a group in the low half bytes
          const __m256i both = _mm256_or_si256(load32(q), _mm256_slli_epi16(load32(q + 32), 4));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + g * kGroup / 2), both);
        }
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY(selfspec_cpu, library) {
  library.def("rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  library.def("int4_linear(Tensor x, Tensor weight, Tensor scale_and_min, Tensor? bias) -> Tensor");
  library.def(
      "views_linear(Tensor x, Tensor light, Tensor weight8, Tensor scale, Tensor weight4, Tensor scale_and_min,"
      " Tensor? bias) -> Tensor");
  library.def("quantize_int8(Tensor weight, Tensor(a!) out, Tensor(b!) scale) -> ()");
  library.def("quantize_int4(Tensor weight, Tensor(a!) out, Tensor(b!) scale_and_min) -> ()");
}

TORCH_LIBRARY_IMPL(selfspec_cpu, CPU, library) {
  library.impl("rows_linear", rows_linear);
  library.impl("int8_linear", Operator<int8_linear>::call);
  library.impl("int4_linear", Operator<int4_linear>::call);
  library.impl("views_linear", Operator<views_linear>::call);
  library.impl("quantize_int8", quantize_int8);
  library.impl("quantize_int4", quantize_int4);
}
