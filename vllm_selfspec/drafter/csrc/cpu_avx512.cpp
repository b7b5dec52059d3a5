// Drafts on x86 CPUs with AVX-512 and VNNI: products of a few rows with quantized weights at the memory's speed.
//
// A weight is kept as a stream: for each block of sixteen outputs, for each group of 64 inputs, what the group's
// products need, in the order in which they need it. A vector register holds four inputs of sixteen outputs, and one
// VNNI instruction multiplies them with four inputs of a row, so that nothing is summed across a register.
//
//   avx512_int8_linear   weights [N / 16, K / 64, 16, 16, 4]: int8 + 128, a scale per output; activations int8 per row
//   avx512_int4_linear   weights [N / 16, K / 64, 576]: 512 bytes of 4 bits (inputs 0 to 31 in the low halves, 32 to 63
//                        in the high ones), sixteen scales, sixteen minima in bfloat16; activations int8 per row and
//                        group
//
// x, bias and the result are as in cpu_rows.cpp. N and K are padded with zeros. A row's result does not depend on the
// others: sums of integers are exact, and groups are added up in one order.
//
//   avx512_quantize_int8, avx512_quantize_int4   fill these weights as those of cpu_rows.cpp do

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "cpu_avx512.h"

namespace {

constexpr int64_t kOut = 16, kQuads = kGroup / 4;
constexpr int64_t kInt8Bytes = kGroup * kOut, kScaleBytes = 2 * kOut * 2, kInt4Bytes = kGroup * kOut / 2 + kScaleBytes;

// Asks for the next `BYTES` of a stream in advance: long before for the second cache, to which more lines can be under
// way at a time, and from there for the first.
template <int64_t BYTES>
inline void ask_for(const uint8_t* p) {
  constexpr int64_t kFar = 4096, kNear = 1024;
  for (int64_t i = 0; i < BYTES; i += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kFar + i), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(p + kNear + i), _MM_HINT_T0);
  }
}

inline __m512i load64(const void* p) { return _mm512_loadu_si512(p); }

// The same four inputs of a row for all outputs.
inline __m512i four(const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  return _mm512_set1_epi32(quad);
}

inline __m512 int8_result(__m512i sum, const QuantizedRows& x, int64_t m) {
  // the weights are 128 too great, so each input of the row was counted 128 times too often
  const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(128 * x.totals[m]));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(x.scales[m]));
}

// Scales and minima of a group of sixteen outputs.
struct Int4Scales {
  __m512 scale, minimum;

  explicit Int4Scales(const uint8_t* w) {
    const __m512i both = load64(w + kGroup * kOut / 2);
    scale = widen16(_mm512_castsi512_si256(both));
    minimum = widen16(_mm512_extracti64x4_epi64(both, 1));
  }

  // `sum` of the products of integers, of the row and group `at`, as what it stands for.
  __m512 add(__m512 result, __m512i sum, const QuantizedRows& x, int64_t at) const {
    const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x.scales[at]));
    return _mm512_fmadd_ps(minimum, _mm512_set1_ps(x.sums[at]), _mm512_fmadd_ps(product, scale, result));
  }
};

constexpr int64_t kPass = 8;  // rows whose sums registers hold beside the weights

// Sums of one output that a pass of few rows keeps: each waits some cycles for its last product.
constexpr int sums_of(int rows) { return rows == 1 ? 4 : rows < 4 ? 2 : 1; }

constexpr int64_t kTileFrom = 4;  // rows from which on tiles are faster

#ifdef __AMX_INT8__

// --- with AMX: up to 64 rows read a weight once ----------------------------------------------------------------------

// The tiles of one thread, for up to 64 rows in blocks of sixteen: sums of each block (0 to 3), weights (4), rows of x
// of a block that is not the last (5 and 6 in turn) and of the last (7), which may have fewer than sixteen.
class Tiles {
 public:
  ~Tiles() {
    if (configured_ != 0) _tile_release();
  }

  // From now on for so many rows, 1 to 64.
  void set_rows(int64_t rows) {
    if (rows == configured_) return;
    configured_ = rows;
    const int64_t last = (rows - 1) / 16;
    const auto left = static_cast<uint8_t>(rows - 16 * last);
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    config.rows[last] = config.rows[7] = left;
    _tile_loadconfig(&config);
  }

 private:
  int64_t configured_ = 0;
};

template <int BLOCKS>
inline void zero_sums() {
  _tile_zero(0);
  if constexpr (BLOCKS > 1) _tile_zero(1);
  if constexpr (BLOCKS > 2) _tile_zero(2);
  if constexpr (BLOCKS > 3) _tile_zero(3);
}

template <int BLOCKS>
inline void store_sums(int32_t* sums) {
  _tile_stored(0, sums, 64);
  if constexpr (BLOCKS > 1) _tile_stored(1, sums + 16 * kOut, 64);
  if constexpr (BLOCKS > 2) _tile_stored(2, sums + 32 * kOut, 64);
  if constexpr (BLOCKS > 3) _tile_stored(3, sums + 48 * kOut, 64);
}

// Adds to the sums the products of 64 inputs of each row of `x` with a tile of weights. Rows are `stride` bytes apart.
template <int BLOCKS>
inline void tile_products(const void* weights, const int8_t* x, int64_t stride) {
  _tile_loadd(4, weights, 64);
  if constexpr (BLOCKS > 1) {
    _tile_loadd(5, x, stride);
    _tile_dpbsud(0, 5, 4);
  }
  if constexpr (BLOCKS > 2) {
    _tile_loadd(6, x + 16 * stride, stride);
    _tile_dpbsud(1, 6, 4);
  }
  if constexpr (BLOCKS > 3) {
    _tile_loadd(5, x + 32 * stride, stride);
    _tile_dpbsud(2, 5, 4);
  }
  _tile_loadd(7, x + 16 * (BLOCKS - 1) * stride, stride);
  if constexpr (BLOCKS == 1) _tile_dpbsud(0, 7, 4);
  if constexpr (BLOCKS == 2) _tile_dpbsud(1, 7, 4);
  if constexpr (BLOCKS == 3) _tile_dpbsud(2, 7, 4);
  if constexpr (BLOCKS == 4) _tile_dpbsud(3, 7, 4);
}

// Linux hands out the tiles' state on demand.
bool allow_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

const bool kTiles = allow_tiles();

// Four bits of each weight as a byte of its own.
inline void int4_bytes(const uint8_t* w, uint8_t* out) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (int64_t q = 0; q < kQuads / 2; ++q) {
    const __m512i packed = load64(w + 64 * q);
    _mm512_store_si512(out + 64 * q, _mm512_and_si512(packed, mask));
    _mm512_store_si512(out + 64 * (q + kQuads / 2), _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask));
  }
}

#else
constexpr bool kTiles = false;
#endif

// --- the two products ------------------------------------------------------------------------------------------------

// A kernel gives sixteen outputs of the rows from `m` on: pass() of ROWS rows with VNNI, tiles() of `count` rows in
// BLOCKS blocks of sixteen with AMX. finish() has the last word on them before the bias is added.

struct Int8Kernel {
  const uint8_t* weights;
  const float* scales;
  QuantizedRows& x;

  template <int ROWS>
  void pass(int64_t block, int64_t m, __m512* result) const {
    const uint8_t* w = weights + block * kOut * x.padded;
    constexpr int kSums = sums_of(ROWS);
    __m512i acc[kSums][ROWS];
    const int8_t* row[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      for (auto& sums : acc) sums[i] = _mm512_setzero_si512();
      row[i] = x.values.data() + (m + i) * x.padded;
    }
    for (int64_t k = 0; k < x.padded; k += kGroup, w += kInt8Bytes) {
      ask_for<kInt8Bytes>(w);
      for (int64_t q = 0; q < kQuads; ++q) {
        const __m512i weight = load64(w + 64 * q);
        auto& sums = acc[q % kSums];
        for (int i = 0; i < ROWS; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], weight, four(row[i] + k + 4 * q));
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      for (int s = 1; s < kSums; ++s) acc[0][i] = _mm512_add_epi32(acc[0][i], acc[s][i]);
      result[i] = int8_result(acc[0][i], x, m + i);
    }
  }

#ifdef __AMX_INT8__
  template <int BLOCKS>
  void tiles(int64_t block, int64_t m, int64_t count, __m512* result) const {
    const uint8_t* w = weights + block * kOut * x.padded;
    alignas(64) int32_t sums[BLOCKS * 16 * kOut];
    zero_sums<BLOCKS>();
    for (int64_t k = 0; k < x.padded; k += kGroup, w += kInt8Bytes) {
      ask_for<kInt8Bytes>(w);
      tile_products<BLOCKS>(w, x.values.data() + m * x.padded + k, x.padded);
    }
    store_sums<BLOCKS>(sums);
    for (int64_t i = 0; i < count; ++i) result[i] = int8_result(load64(sums + i * kOut), x, m + i);
  }
#endif

  __m512 finish(__m512 value, int64_t n, __mmask16 which) const {
    return _mm512_mul_ps(value, load16(scales + n, which));
  }
};

struct Int4Kernel {
  const uint8_t* weights;
  QuantizedRows& x;

  template <int ROWS>
  void pass(int64_t block, int64_t m, __m512* result) const {
    const uint8_t* w = weights + block * x.groups * kInt4Bytes;
    const __m512i mask = _mm512_set1_epi8(15);
    const int8_t* row[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      result[i] = _mm512_setzero_ps();
      row[i] = x.values.data() + (m + i) * x.padded;
    }
    for (int64_t g = 0; g < x.groups; ++g, w += kInt4Bytes) {
      ask_for<kInt4Bytes>(w);
      __m512i acc[ROWS];
      for (int i = 0; i < ROWS; ++i) acc[i] = _mm512_setzero_si512();
      for (int64_t q = 0; q < kQuads / 2; ++q) {
        const __m512i packed = load64(w + 64 * q);
        const __m512i first = _mm512_and_si512(packed, mask);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
        for (int i = 0; i < ROWS; ++i) {
          const int8_t* part = row[i] + g * kGroup + 4 * q;
          acc[i] = _mm512_dpbusd_epi32(acc[i], first, four(part));
          acc[i] = _mm512_dpbusd_epi32(acc[i], second, four(part + kGroup / 2));
        }
      }
      const Int4Scales scales(w);
      for (int i = 0; i < ROWS; ++i) result[i] = scales.add(result[i], acc[i], x, (m + i) * x.groups + g);
    }
  }

#ifdef __AMX_INT8__
  // Each group passes three stages, a group apart, so that none waits for what the one before it has just stored.
  template <int BLOCKS>
  void tiles(int64_t block, int64_t m, int64_t count, __m512* result) const {
    const uint8_t* w = weights + block * x.groups * kInt4Bytes;
    alignas(64) uint8_t bytes[2][kGroup * kOut];
    alignas(64) int32_t sums[2][BLOCKS * 16 * kOut];
    for (int64_t i = 0; i < count; ++i) result[i] = _mm512_setzero_ps();
    int4_bytes(w, bytes[0]);
    for (int64_t g = 0; g <= x.groups; ++g, w += kInt4Bytes) {
      ask_for<kInt4Bytes>(w);
      if (g + 1 < x.groups) int4_bytes(w + kInt4Bytes, bytes[(g + 1) % 2]);
      if (g < x.groups) {
        zero_sums<BLOCKS>();
        tile_products<BLOCKS>(bytes[g % 2], x.values.data() + m * x.padded + g * kGroup, x.padded);
        store_sums<BLOCKS>(sums[g % 2]);
      }
      if (g == 0) continue;
      const Int4Scales scales(w - kInt4Bytes);
      const int32_t* done = sums[(g - 1) % 2];
      for (int64_t i = 0; i < count; ++i)
        result[i] = scales.add(result[i], load64(done + i * kOut), x, (m + i) * x.groups + g - 1);
    }
  }
#endif

  __m512 finish(__m512 value, int64_t, __mmask16) const { return value; }
};

// All rows of all outputs by a kernel, which quantizes them first, with the bias added.
template <typename T, typename Kernel>
void blocks(T* out, const T* bias, int64_t rows, int64_t outputs, const Kernel& kernel) {
#pragma omp parallel
  {
    kernel.x.run();
    __m512 result[64];
    const auto store = [&](int64_t block, int64_t m, int64_t count) {
      const int64_t n = block * kOut;
      const auto which = static_cast<__mmask16>((1u << std::min(kOut, outputs - n)) - 1);
      const __m512 added = bias != nullptr ? load16(bias + n, which) : _mm512_setzero_ps();
      for (int64_t i = 0; i < count; ++i)
        store16(_mm512_add_ps(kernel.finish(result[i], n, which), added), out + (m + i) * outputs + n, which);
    };
    const int64_t last = (outputs + kOut - 1) / kOut;
    if (kTiles && rows >= kTileFrom) {
#ifdef __AMX_INT8__
      Tiles tiles;
#pragma omp for schedule(static) nowait
      for (int64_t block = 0; block < last; ++block)
        for (int64_t m = 0; m < rows; m += 64) {
          const int64_t count = std::min<int64_t>(64, rows - m);
          tiles.set_rows(count);
          with_count<4>((count + 15) / 16, [&]<int BLOCKS>() { kernel.template tiles<BLOCKS>(block, m, count, result); });
          store(block, m, count);
        }
#endif
    } else {
#pragma omp for schedule(static) nowait
      for (int64_t block = 0; block < last; ++block)
        for (int64_t m = 0; m < rows; m += kPass) {
          const int64_t count = std::min(kPass, rows - m);
          with_count<kPass>(count, [&]<int ROWS>() { kernel.template pass<ROWS>(block, m, result); });
          store(block, m, count);
        }
    }
  }
}

at::Tensor avx512_int8_linear(const Inputs& x, const at::Tensor& weight, const at::Tensor& scale,
                              const std::optional<at::Tensor>& bias) {
  const int64_t outputs = scale.numel(), padded = weight.size(1) * kGroup;
  TORCH_CHECK(weight.scalar_type() == at::kByte && weight.is_contiguous() && padded >= x.columns &&
                  weight.numel() == (outputs + kOut - 1) / kOut * kOut * padded && scale.scalar_type() == at::kFloat,
              "weight must be uint8 [N / 16, K / 64, 16, 16, 4], scale float32 [N]");
  const uint8_t* w = weight.const_data_ptr<uint8_t>();
  const float* scales = scale.const_data_ptr<float>();
  QuantizedRows quantized(x, padded, padded);
  return with_result(x, bias, outputs, [&](auto* out, const auto* b) {
    blocks(out, b, x.rows, outputs, Int8Kernel{w, scales, quantized});
  });
}

at::Tensor avx512_int4_linear(const Inputs& x, const at::Tensor& weight, int64_t outputs,
                              const std::optional<at::Tensor>& bias) {
  const int64_t groups = weight.size(1);
  TORCH_CHECK(weight.scalar_type() == at::kByte && weight.is_contiguous() && groups * kGroup >= x.columns &&
                  weight.size(0) == (outputs + kOut - 1) / kOut && weight.size(2) == kInt4Bytes,
              "weight must be uint8 [N / 16, K / 64, ", kInt4Bytes, "]");
  const uint8_t* w = weight.const_data_ptr<uint8_t>();
  QuantizedRows quantized(x, groups * kGroup, kGroup);
  return with_result(x, bias, outputs, [&](auto* out, const auto* b) {
    blocks(out, b, x.rows, outputs, Int4Kernel{w, quantized});
  });
}

// Both weights of a drafter with two views; `light`, one bool, tells which one is applied.
at::Tensor avx512_views_linear(const Inputs& x, const at::Tensor& light, const at::Tensor& weight8,
                               const at::Tensor& scale, const at::Tensor& weight4,
                               const std::optional<at::Tensor>& bias) {
  return *light.const_data_ptr<bool>() ? avx512_int4_linear(x, weight4, scale.numel(), bias)
                                       : avx512_int8_linear(x, weight8, scale, bias);
}

using Tensors = std::vector<at::Tensor>;
using Bias = std::optional<at::Tensor>;

const bool kRegistered = [] {
  auto& products = selfspec::products();
  products["avx512_int8_linear"] = [](const Inputs& x, const Tensors& w, int64_t, const Bias& b) {
    return avx512_int8_linear(x, w.at(0), w.at(1), b);
  };
  products["avx512_int4_linear"] = [](const Inputs& x, const Tensors& w, int64_t outputs, const Bias& b) {
    return avx512_int4_linear(x, w.at(0), outputs, b);
  };
  products["avx512_views_linear"] = [](const Inputs& x, const Tensors& w, int64_t, const Bias& b) {
    return avx512_views_linear(x, w.at(0), w.at(1), w.at(2), w.at(3), b);
  };
  return true;
}();

// --- quantizing weights ----------------------------------------------------------------------------------------------

// Four bytes of sixteen rows side by side: from [kOut] rows of `dwords` times four bytes, `stride` apart.
inline void interleave(const uint8_t* rows, int64_t stride, int64_t dwords, uint8_t* out) {
  for (int64_t i = 0; i < dwords; ++i)
    for (int64_t n = 0; n < kOut; ++n, out += 4) std::memcpy(out, rows + n * stride + 4 * i, 4);
}

void avx512_quantize_int8(const at::Tensor& weight, at::Tensor out, at::Tensor scale) {
  const at::Tensor source = weight.contiguous();
  const int64_t outputs = source.size(0), inputs = source.size(1), padded = out.size(1) * kGroup;
  TORCH_CHECK(scale.numel() == outputs && inputs <= padded && padded < inputs + kGroup,
              "the weight has another shape");
  float* scales = scale.data_ptr<float>();
  uint8_t* stream = out.data_ptr<uint8_t>();
  for_type(source, [&]<typename W>() {
    const W* w = source.const_data_ptr<W>();
#pragma omp parallel
    {
      std::vector<int8_t> values(kOut * padded);
#pragma omp for schedule(static)
      for (int64_t block = 0; block < (outputs + kOut - 1) / kOut; ++block) {
        const int64_t first = block * kOut, count = std::min(kOut, outputs - first);
        std::fill(values.begin(), values.end(), 0);
        for (int64_t n = 0; n < count; ++n)
          scales[first + n] = int8_row(w + (first + n) * inputs, inputs, values.data() + n * padded);
        for (int8_t& value : values) value = static_cast<int8_t>(value ^ 0x80);  // + 128
        interleave(reinterpret_cast<const uint8_t*>(values.data()), padded, padded / 4, stream + first * padded);
      }
    }
  });
}

void avx512_quantize_int4(const at::Tensor& weight, at::Tensor out, int64_t outputs) {
  const at::Tensor source = weight.contiguous();
  const int64_t inputs = source.size(1), groups = out.size(1);
  TORCH_CHECK(source.size(0) == outputs && (outputs + kOut - 1) / kOut == out.size(0) &&
                  (inputs + kGroup - 1) / kGroup == groups,
              "the weight has another shape");
  uint8_t* stream = out.data_ptr<uint8_t>();
  for_type(source, [&]<typename W>() {
    const W* w = source.const_data_ptr<W>();
#pragma omp parallel
    {
      std::vector<float> wide(kOut * groups * kGroup, 0.0f);
#pragma omp for schedule(static)
      for (int64_t block = 0; block < out.size(0); ++block) {
        const int64_t first = block * kOut, count = std::min(kOut, outputs - first);
        if (count < kOut) std::fill(wide.begin(), wide.end(), 0.0f);
        for (int64_t n = 0; n < count; ++n) widen(w + (first + n) * inputs, wide.data() + n * groups * kGroup, inputs);
        for (int64_t g = 0; g < groups; ++g) {
          alignas(64) uint8_t q[kOut][kGroup];
          at::BFloat16 scales[2][kOut];
          for (int64_t n = 0; n < kOut; ++n)
            int4_group(wide.data() + (n * groups + g) * kGroup, q[n], scales[0][n], scales[1][n]);
          uint8_t* to = stream + (block * groups + g) * kInt4Bytes;
          for (auto& values : q)
            for (int64_t i = 0; i < kGroup / 2; ++i) values[i] |= static_cast<uint8_t>(values[i + kGroup / 2] << 4);
          interleave(q[0], kGroup, kQuads / 2, to);
          std::memcpy(to + kGroup * kOut / 2, scales, kScaleBytes);
        }
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selfspec_cpu, library) {
  library.def("avx512_int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  library.def("avx512_int4_linear(Tensor x, Tensor weight, int outputs, Tensor? bias) -> Tensor");
  library.def(
      "avx512_views_linear(Tensor x, Tensor light, Tensor weight8, Tensor scale, Tensor weight4, Tensor? bias)"
      " -> Tensor");
  library.def("avx512_quantize_int8(Tensor weight, Tensor(a!) out, Tensor(b!) scale) -> ()");
  library.def("avx512_quantize_int4(Tensor weight, Tensor(a!) out, int outputs) -> ()");
}

TORCH_LIBRARY_IMPL(selfspec_cpu, CPU, library) {
  library.impl("avx512_int8_linear", Operator<avx512_int8_linear>::call);
  library.impl("avx512_int4_linear", Operator<avx512_int4_linear>::call);
  library.impl("avx512_views_linear", Operator<avx512_views_linear>::call);
  library.impl("avx512_quantize_int8", avx512_quantize_int8);
  library.impl("avx512_quantize_int4", avx512_quantize_int4);
}

#endif
