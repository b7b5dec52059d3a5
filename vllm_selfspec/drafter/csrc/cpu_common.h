// What the kernels for CPUs share: eight values at a time, quantizing activations and weights, the types of tensors.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu_products.h"

namespace {

constexpr int64_t kGroup = 64;
constexpr int64_t kLine = 64;  // bytes of a line of a cache

// What memory is asked for while a tile is computed: in each step a line of every output, `across` bytes apart, then
// those that lie `along` bytes further on. Outputs of a tile are read side by side, an order that hardware does not
// foresee.
struct Ahead {
  const char* from;
  int64_t across, along;
};

// Turns a count, 1 to MOST, into a compile-time one: f.operator()<COUNT>().
template <int MOST, typename F>
inline void with_count(int64_t count, F f) {
  if constexpr (MOST > 1)
    if (count < MOST) return with_count<MOST - 1>(count, f);
  f.template operator()<MOST>();
}

// Outputs of a block, a multiple of `multiple` as is `most`: so many that threads have equally many blocks.
inline int64_t even_blocks(int64_t outputs, int64_t most, int64_t multiple) {
  const auto parts = [](int64_t whole, int64_t size) { return std::max<int64_t>(1, (whole + size - 1) / size); };
  const int64_t threads = omp_get_max_threads(), rounds = parts(outputs, threads * most);
  return parts(parts(outputs, threads * rounds), multiple) * multiple;
}

// --- eight values at a time ------------------------------------------------------------------------------------------

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }

inline __m256 load8(const at::BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline __m256 load8(const at::Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline void store8(float* p, __m256 v) { _mm256_storeu_ps(p, v); }

inline void store8(at::Half* p, __m256 v) {
  const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}

inline void store8(at::BFloat16* p, __m256 v) {  // halves are rounded to even
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7FFF), odd);
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i no_number = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i value = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), no_number);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

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

inline __m256 abs8(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

inline float max8(__m256 v) {
  alignas(32) float each[8];
  _mm256_store_ps(each, v);
  return *std::max_element(each, each + 8);
}

// e^x for x <= 0: a power of two times a Taylor series around zero, which is exact to float32 on ±ln(2)/2. 0 below -87.
inline __m256 exp8(__m256 x) {
  const __m256 power = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln(2) in two parts, the first of which is exact in a product with the power
  __m256 r = _mm256_fnmadd_ps(power, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(power, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 series = _mm256_set1_ps(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = _mm256_fmadd_ps(series, r, _mm256_set1_ps(term));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23);
  const __m256 in_range = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_GE_OQ);
  return _mm256_and_ps(_mm256_mul_ps(series, _mm256_castsi256_ps(exponent)), in_range);
}

// Four times eight int32 as 32 bytes. Packing works on halves of a vector: the permutation puts the bytes in order.
inline __m256i bytes32(const __m256i q[4]) {
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// --- activations -----------------------------------------------------------------------------------------------------

using selfspec::Inputs;

template <typename T>
void widen(const T* in, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, load8(in + i));
  for (; i < count; ++i) out[i] = static_cast<float>(in[i]);
}

// Rows quantized to int8 in groups of `group` inputs, padded with zeros to a multiple of kGroup.
struct QuantizedRows {
  int64_t padded, groups;
  std::vector<int8_t>& values;   // [M, padded]
  std::vector<float>& scales;    // [M, groups]
  std::vector<int32_t>& totals;  // [M, groups] of the int8 values
  std::vector<float>& sums;      // [M, groups] of what they stand for

  // Room for them, of this thread: the one before is gone.
  QuantizedRows(const Inputs& inputs, int64_t padded_columns, int64_t group)
      : padded(padded_columns),
        groups(padded_columns / group),
        values(Room::of_this_thread().values),
        scales(Room::of_this_thread().scales),
        totals(Room::of_this_thread().totals),
        sums(Room::of_this_thread().sums),
        inputs_(inputs),
        group_(group) {
    const auto at_least = [](auto& vector, int64_t size) {
      if (static_cast<int64_t>(vector.size()) < size) vector.resize(size);
    };
    at_least(values, inputs.rows * padded);
    for (auto* floats : {&scales, &sums}) at_least(*floats, inputs.rows * groups);
    at_least(totals, inputs.rows * groups);
    if (inputs.rows == 1) quantize_row(0);
  }

  // Quantizes the rows where there are several; called by all threads of a parallel region, which go on when all are
  // there.
  void run() {
    if (inputs_.rows == 1) return;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < inputs_.rows; ++m) quantize_row(m);
  }

 private:
  // Kept from product to product.
  struct Room {
    std::vector<int8_t> values;
    std::vector<float> scales, sums, wide;
    std::vector<int32_t> totals;

    static Room& of_this_thread() {
      static thread_local Room room;
      return room;
    }
  };

  const Inputs& inputs_;
  const int64_t group_;

  void quantize_row(int64_t m) {
    std::vector<float>& wide = Room::of_this_thread().wide;
    if (static_cast<int64_t>(wide.size()) < padded) wide.resize(padded);
    inputs_.fill(m, wide.data());
    std::fill(wide.data() + inputs_.columns, wide.data() + padded, 0.0f);
    for (int64_t g = 0; g < groups; ++g) quantize(wide.data() + g * group_, group_, m, g);
  }

  // Group `g` of row `m`.
  void quantize(const float* part, int64_t group, int64_t m, int64_t g) {
    __m256 most8 = _mm256_setzero_ps();
    for (int64_t i = 0; i < group; i += 8) most8 = _mm256_max_ps(most8, abs8(_mm256_loadu_ps(part + i)));
    const float most = max8(most8);
    const float scale = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
    int8_t* out = values.data() + m * padded + g * group;
    __m256i total8 = _mm256_setzero_si256();
    for (int64_t i = 0; i < group; i += 32) {
      __m256i q[4];
      for (int64_t j = 0; j < 4; ++j) {
        q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(part + i + 8 * j), _mm256_set1_ps(inverse)));
        total8 = _mm256_add_epi32(total8, q[j]);
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bytes32(q));
    }
    const int total = sum8(total8);
    scales[m * groups + g] = scale;
    totals[m * groups + g] = total;
    sums[m * groups + g] = scale * static_cast<float>(total);
  }
};

// Calls f with the C++ type of a tensor's values.
template <typename F>
void for_type(at::ScalarType type, F f) {
  switch (type) {
    case at::kFloat: f.template operator()<float>(); break;
    case at::kBFloat16: f.template operator()<at::BFloat16>(); break;
    case at::kHalf: f.template operator()<at::Half>(); break;
    default: TORCH_CHECK(false, "x and weights must be float32, bfloat16 or float16");
  }
}

template <typename F>
void for_type(const at::Tensor& tensor, F f) {
  for_type(tensor.scalar_type(), f);
}

// The rows of a tensor, which must be there while they are used.
inline Inputs inputs_of(const at::Tensor& x) {
  Inputs inputs{x.size(0), x.size(1), x.scalar_type(), {}};
  for_type(x, [&]<typename T>() {
    inputs.fill = [in = x.const_data_ptr<T>(), k = x.size(1)](int64_t m, float* to) { widen(in + m * k, to, k); };
  });
  return inputs;
}

// silu(gate) * up of rows that hold the gates, then the others.
template <typename T>
Inputs gated(const at::Tensor& gate_up, const at::Tensor& out) {
  const int64_t width = gate_up.size(1) / 2;
  return {gate_up.size(0), width, gate_up.scalar_type(),
          [x = gate_up.const_data_ptr<T>(), width](int64_t m, float* wide) {
            const T *gates = x + 2 * m * width, *ups = gates + width;
            const __m256 one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps();
            for (int64_t i = 0; i < width; i += 8) {
              const __m256 gate = load8(gates + i);
              // e^-|gate|: no overflow, and both signs of the sigmoid follow from it
              const __m256 e = exp8(_mm256_sub_ps(zero, abs8(gate)));
              const __m256 above = _mm256_blendv_ps(one, e, gate);
              const __m256 sigmoid = _mm256_div_ps(above, _mm256_add_ps(one, e));
              _mm256_storeu_ps(wide + i, _mm256_mul_ps(_mm256_mul_ps(gate, sigmoid), load8(ups + i)));
            }
          },
          out};
}

// f(out, bias) writes a product's result [M, N].
template <typename F>
at::Tensor with_result(const Inputs& x, const std::optional<at::Tensor>& bias, int64_t outputs, F f) {
  const at::Tensor out = x.out.defined() ? x.out : at::empty({x.rows, outputs}, at::TensorOptions(x.type));
  if (bias.has_value())
    TORCH_CHECK(bias->scalar_type() == x.type && bias->numel() == outputs && bias->is_contiguous(),
                "bias must be [N] of x's dtype");
  for_type(x.type, [&]<typename T>() {
    f(out.mutable_data_ptr<T>(), bias.has_value() ? bias->const_data_ptr<T>() : nullptr);
  });
  return out;
}

inline at::Tensor matrix(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2, "x must be [M, K]");
  return x.contiguous();
}

// f(x, out, bias, M, K) writes it from a tensor.
template <typename F>
at::Tensor with_output(const at::Tensor& input, const std::optional<at::Tensor>& bias, int64_t outputs, F f) {
  const at::Tensor x = matrix(input);
  const int64_t rows = x.size(0), k = x.size(1);
  return with_result({rows, k, x.scalar_type(), {}}, bias, outputs,
                     [&]<typename T>(T* out, const T* b) { f(x.const_data_ptr<T>(), out, b, rows, k); });
}

// A product as the operator that takes its rows from a tensor.
template <auto PRODUCT>
struct Operator;

template <typename... Args, at::Tensor (*PRODUCT)(const Inputs&, Args...)>
struct Operator<PRODUCT> {
  static at::Tensor call(const at::Tensor& input, Args... args) {
    const at::Tensor x = matrix(input);
    return PRODUCT(inputs_of(x), args...);
  }
};

// --- quantizing weights ----------------------------------------------------------------------------------------------

// One row to int8: the scale is 1/127 of the largest, at least 1e-12. Divided, not multiplied by the inverse, and halves
// rounded to even: the same values as torch's operators give.
template <typename W>
float int8_row(const W* w, int64_t count, int8_t* out) {
  __m256 most8 = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) most8 = _mm256_max_ps(most8, abs8(load8(w + i)));
  float most = max8(most8);
  for (; i < count; ++i) most = std::max(most, std::abs(static_cast<float>(w[i])));
  const float scale = std::max(most / 127.0f, 1e-12f);
  for (i = 0; i + 32 <= count; i += 32) {
    __m256i q[4];
    for (int j = 0; j < 4; ++j) q[j] = _mm256_cvtps_epi32(_mm256_div_ps(load8(w + i + 8 * j), _mm256_set1_ps(scale)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bytes32(q));
  }
  for (; i < count; ++i) out[i] = static_cast<int8_t>(std::nearbyint(static_cast<float>(w[i]) / scale));
  return scale;
}

// One group's 16 values, of which value q stands for scale * q + minimum, both as bfloat16 holds them.
struct Int4Grid {
  at::BFloat16 scale, minimum;
  __m256 q[kGroup / 8];  // the nearest to each input
  float error;           // sum of squares

  Int4Grid(const float* w, float wanted_scale, float wanted_minimum) : scale(wanted_scale), minimum(wanted_minimum) {
    const __m256 s = _mm256_set1_ps(scale), m = _mm256_set1_ps(minimum);
    __m256 error8 = _mm256_setzero_ps();
    for (int64_t i = 0; i < kGroup / 8; ++i) {
      const __m256 x = _mm256_loadu_ps(w + 8 * i);
      const __m256 nearest =
          _mm256_round_ps(_mm256_div_ps(_mm256_sub_ps(x, m), s), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      q[i] = _mm256_min_ps(_mm256_max_ps(nearest, _mm256_setzero_ps()), _mm256_set1_ps(15.0f));
      const __m256 off = _mm256_sub_ps(_mm256_fmadd_ps(q[i], s, m), x);
      error8 = _mm256_fmadd_ps(off, off, error8);
    }
    error = sum8(error8);
  }

  // The scale and minimum that fit the inputs best with these q: a regression of one on the other. False where all q
  // are the same.
  bool fit(const float* w, float& best_scale, float& best_minimum) const {
    __m256 sum_q = _mm256_setzero_ps(), sum_qq = sum_q, sum_d = sum_q, sum_qd = sum_q;
    for (int64_t i = 0; i < kGroup / 8; ++i) {
      const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(w + 8 * i), _mm256_set1_ps(minimum));
      sum_q = _mm256_add_ps(sum_q, q[i]);
      sum_qq = _mm256_fmadd_ps(q[i], q[i], sum_qq);
      sum_d = _mm256_add_ps(sum_d, d);
      sum_qd = _mm256_fmadd_ps(q[i], d, sum_qd);
    }
    const float mean_q = sum8(sum_q) / kGroup, mean_d = sum8(sum_d) / kGroup;
    const float spread = sum8(sum_qq) - kGroup * mean_q * mean_q;
    best_scale = (sum8(sum_qd) - kGroup * mean_q * mean_d) / spread;
    best_minimum = minimum + mean_d - best_scale * mean_q;
    return spread > 0.0f && best_scale > 1e-8f;
  }
};

// One group of kGroup inputs to values 0 to 15: first between the least and the greatest, then fitted to all of them,
// which leaves an eighth less squared error on the weights of language models.
inline void int4_group(const float* w, uint8_t* out, at::BFloat16& scale_out, at::BFloat16& minimum_out) {
  constexpr int kFits = 2;
  __m256 low8 = _mm256_loadu_ps(w), high8 = low8;
  for (int64_t i = 8; i < kGroup; i += 8) {
    low8 = _mm256_min_ps(low8, _mm256_loadu_ps(w + i));
    high8 = _mm256_max_ps(high8, _mm256_loadu_ps(w + i));
  }
  const float low = -max8(_mm256_sub_ps(_mm256_setzero_ps(), low8)), high = max8(high8);
  Int4Grid best(w, std::max((high - low) / 15.0f, 1e-8f), low);
  float scale, minimum;
  for (int i = 0; i < kFits && best.fit(w, scale, minimum); ++i) {
    const Int4Grid fitted(w, scale, minimum);
    if (!(fitted.error < best.error)) break;
    best = fitted;
  }
  scale_out = best.scale;
  minimum_out = best.minimum;
  for (int64_t half = 0; half < kGroup / 8; half += 4) {
    __m256i q[4];
    for (int64_t i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(best.q[half + i]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * half), bytes32(q));
  }
}

}  // namespace
