// Sampling on x86 CPUs: each row of logits is read from memory once, and what is not asked for is not written.
//
// Rows are [B, V] with V entries side by side; logits are float32, bfloat16 or float16, with a temperature for each row.
//
//   softmax       probabilities in float32, into a tensor that is there already
//   token_probs   the probability of one token in each of some rows
//   argmax_rows   the first of the greatest logits of some rows
//   inverse_cdf   draws tokens from weights, by one number in [0, 1) for each row
//
// A row's result does not depend on the others, nor on the number of threads: sums are made of blocks of kTokens.

#include <limits>
#include <tuple>

#include "cpu_common.h"

namespace {

constexpr int64_t kTokens = 512;

inline float exp1(float x) {
  alignas(32) float each[8];
  _mm256_store_ps(each, exp8(_mm256_set1_ps(x)));
  return each[0];
}

template <typename T>
float greatest(const T* values, int64_t count) {
  float most = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  __m256 most8 = _mm256_set1_ps(most);
  // What is no number is passed over: of two operands the instruction then gives the second.
  for (; i + 8 <= count; i += 8) most8 = _mm256_max_ps(load8(values + i), most8);
  most = max8(most8);
  for (; i < count; ++i) most = std::max(most, static_cast<float>(values[i]));
  return most;
}

inline double sum_of(const float* w, int64_t count) {
  __m256d sums[4] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int64_t j = 0; j < 4; ++j) sums[j] = _mm256_add_pd(sums[j], _mm256_cvtps_pd(_mm_loadu_ps(w + i + 4 * j)));
  alignas(32) double each[4];
  _mm256_store_pd(each, _mm256_add_pd(_mm256_add_pd(sums[0], sums[1]), _mm256_add_pd(sums[2], sums[3])));
  double total = (each[0] + each[1]) + (each[2] + each[3]);
  for (; i < count; ++i) total += w[i];
  return total;
}

// The sum of e^((logit - most) * inverse) over up to kTokens entries; each is stored where `out` is no null pointer.
template <typename T>
double exponentials(const T* logits, int64_t count, float most, float inverse, float* out) {
  const __m256 most8 = _mm256_set1_ps(most), inverse8 = _mm256_set1_ps(inverse);
  __m256 sum8 = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 e = exp8(_mm256_mul_ps(_mm256_sub_ps(load8(logits + i), most8), inverse8));
    sum8 = _mm256_add_ps(sum8, e);
    if (out != nullptr) _mm256_storeu_ps(out + i, e);
  }
  double sum = ::sum8(sum8);
  for (; i < count; ++i) {
    const float e = exp1((static_cast<float>(logits[i]) - most) * inverse);
    sum += e;
    if (out != nullptr) out[i] = e;
  }
  return sum;
}

// Calls f(block, first, count) for the blocks of a row of V entries: by all threads where `alone`, else by this one.
template <typename F>
void for_blocks(int64_t tokens, bool alone, F f) {
  const int64_t blocks = (tokens + kTokens - 1) / kTokens;
  const auto of = [&](int64_t block) { f(block, block * kTokens, std::min(kTokens, tokens - block * kTokens)); };
  if (!alone) {
    for (int64_t block = 0; block < blocks; ++block) of(block);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; ++block) of(block);
}

// Calls f(row, alone) for the rows: a thread for each, or, where there is one row only, `alone`.
template <typename F>
void for_rows(int64_t rows, F f) {
  // No region around it: those inside would be nested, for which GNU's runtime starts threads anew each time.
  if (rows == 1) return f(0, true);
#pragma omp parallel for schedule(dynamic)
  for (int64_t row = 0; row < rows; ++row) f(row, false);
}

// The greatest logit of a row, and the sum of its exponentials.
template <typename T>
std::tuple<float, double> measure(const T* logits, int64_t tokens, float inverse, bool alone, float* out) {
  std::vector<float> greatests((tokens + kTokens - 1) / kTokens);
  for_blocks(tokens, alone, [&](int64_t block, int64_t first, int64_t count) {
    greatests[block] = greatest(logits + first, count);
  });
  const float most = *std::max_element(greatests.begin(), greatests.end());
  std::vector<double> sums(greatests.size());
  for_blocks(tokens, alone, [&](int64_t block, int64_t first, int64_t count) {
    sums[block] = exponentials(logits + first, count, most, inverse, out != nullptr ? out + first : nullptr);
  });
  double sum = 0.0;
  for (const double part : sums) sum += part;
  return {most, sum};
}

// Rows whose entries lie side by side.
at::Tensor in_rows(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) > 0, "logits and weights must be [B, V]");
  return tensor.stride(1) == 1 ? tensor : tensor.contiguous();
}

void check_each(const at::Tensor& each, at::ScalarType type, int64_t rows, const char* what) {
  TORCH_CHECK(each.scalar_type() == type && each.numel() == rows && each.is_contiguous(), what, " must be [", rows,
              "] of ", type);
}

void softmax(const at::Tensor& logits, const at::Tensor& temperature, at::Tensor out) {
  const at::Tensor source = in_rows(logits);
  const int64_t rows = source.size(0), tokens = source.size(1);
  check_each(temperature, at::kFloat, rows, "temperature");
  TORCH_CHECK(out.scalar_type() == at::kFloat && out.sizes() == source.sizes() && out.stride(1) == 1,
              "out must be float32 of the shape of logits, with its entries side by side");
  const float* temperatures = temperature.const_data_ptr<float>();
  for_type(source, [&]<typename T>() {
    for_rows(rows, [&](int64_t row, bool alone) {
      float* to = out.mutable_data_ptr<float>() + row * out.stride(0);
      const T* from = source.const_data_ptr<T>() + row * source.stride(0);
      const auto [most, sum] = measure(from, tokens, 1.0f / temperatures[row], alone, to);
      const __m256 scale = _mm256_set1_ps(static_cast<float>(1.0 / sum));
      for_blocks(tokens, alone, [&](int64_t, int64_t first, int64_t count) {
        int64_t i = first;
        for (; i + 8 <= first + count; i += 8) _mm256_storeu_ps(to + i, _mm256_mul_ps(_mm256_loadu_ps(to + i), scale));
        for (; i < first + count; ++i) to[i] *= static_cast<float>(1.0 / sum);
      });
    });
  });
}

at::Tensor token_probs(const at::Tensor& logits, const at::Tensor& rows, const at::Tensor& tokens,
                       const at::Tensor& temperature) {
  const at::Tensor source = in_rows(logits);
  const int64_t count = rows.numel(), vocabulary = source.size(1);
  check_each(rows, at::kLong, count, "rows");
  check_each(tokens, at::kLong, count, "tokens");
  check_each(temperature, at::kFloat, count, "temperature");
  const int64_t *row = rows.const_data_ptr<int64_t>(), *token = tokens.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK(row[i] >= 0 && row[i] < source.size(0) && token[i] >= 0 && token[i] < vocabulary, "no such row, token");
  at::Tensor result = at::empty({count}, temperature.options());
  for_type(source, [&]<typename T>() {
    for_rows(count, [&](int64_t i, bool alone) {
      const T* from = source.const_data_ptr<T>() + row[i] * source.stride(0);
      const float inverse = 1.0f / temperature.const_data_ptr<float>()[i];
      const auto [most, sum] = measure(from, vocabulary, inverse, alone, nullptr);
      const float e = exp1((static_cast<float>(from[token[i]]) - most) * inverse);
      result.mutable_data_ptr<float>()[i] = e * static_cast<float>(1.0 / sum);
    });
  });
  return result;
}

at::Tensor argmax_rows(const at::Tensor& logits, const at::Tensor& rows) {
  const at::Tensor source = in_rows(logits);
  const int64_t count = rows.numel(), tokens = source.size(1);
  check_each(rows, at::kLong, count, "rows");
  const int64_t* row = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) TORCH_CHECK(row[i] >= 0 && row[i] < source.size(0), "no such row");
  at::Tensor result = at::empty({count}, rows.options());
  for_type(source, [&]<typename T>() {
    for_rows(count, [&](int64_t i, bool alone) {
      const T* from = source.const_data_ptr<T>() + row[i] * source.stride(0);
      std::vector<float> greatests((tokens + kTokens - 1) / kTokens);
      for_blocks(tokens, alone, [&](int64_t block, int64_t first, int64_t size) {
        greatests[block] = greatest(from + first, size);
      });
      const auto best = std::max_element(greatests.begin(), greatests.end());  // the first one
      int64_t found = (best - greatests.begin()) * kTokens;
      while (found + 1 < tokens && static_cast<float>(from[found]) != *best) ++found;
      result.mutable_data_ptr<int64_t>()[i] = found;
    });
  });
  return result;
}

// For each row the first token whose cumulative weight exceeds u times the total, never one of weight 0. Weights are
// added up in blocks, and token by token only in the block that the token is in.
at::Tensor inverse_cdf(const at::Tensor& weights, const at::Tensor& u) {
  const at::Tensor source = in_rows(weights);
  const int64_t rows = source.size(0), tokens = source.size(1), blocks = (tokens + kTokens - 1) / kTokens;
  TORCH_CHECK(source.scalar_type() == at::kFloat, "weights must be float32");
  check_each(u, at::kDouble, rows, "u");
  const double* uniform = u.const_data_ptr<double>();
  at::Tensor result = at::empty({rows}, source.options().dtype(at::kLong));
  for_rows(rows, [&](int64_t row, bool alone) {
    const float* w = source.const_data_ptr<float>() + row * source.stride(0);
    std::vector<double> parts(blocks);
    for_blocks(tokens, alone, [&](int64_t block, int64_t first, int64_t count) {
      parts[block] = sum_of(w + first, count);
    });
    double total = 0.0, before = 0.0;
    for (const double part : parts) total += part;
    // A product that rounds up to the total would point past the last token of positive weight.
    const double threshold = std::min(uniform[row] * total, std::nextafter(total, 0.0));
    int64_t block = 0;
    for (; block + 1 < blocks && !(before + parts[block] > threshold); ++block) before += parts[block];
    int64_t found = tokens - 1;
    for (int64_t i = block * kTokens; i < std::min(tokens, (block + 1) * kTokens); ++i) {
      if (w[i] > 0.0f) found = i;  // the last one, if another order of adding up falls short
      before += w[i];
      if (before > threshold) break;
    }
    result.mutable_data_ptr<int64_t>()[row] = found;
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selfspec_cpu, library) {
  library.def("softmax(Tensor logits, Tensor temperature, Tensor(a!) out) -> ()");
  library.def("token_probs(Tensor logits, Tensor rows, Tensor tokens, Tensor temperature) -> Tensor");
  library.def("argmax_rows(Tensor logits, Tensor rows) -> Tensor");
  library.def("inverse_cdf(Tensor weights, Tensor u) -> Tensor");
}

TORCH_LIBRARY_IMPL(selfspec_cpu, CPU, library) {
  library.impl("softmax", softmax);
  library.impl("token_probs", token_probs);
  library.impl("argmax_rows", argmax_rows);
  library.impl("inverse_cdf", inverse_cdf);
}
