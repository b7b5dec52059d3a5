// Experts of a mixture on CPU at the drafter's precision: of each row's experts the outputs, weighted and added up.
//
//   experts  rows x [T, H], weights float32 and ids int32 [T, k] of the experts that the router has chosen for each;
//            `product`, the operator that multiplies with an expert's weights; `gate_up` and `down`, what it takes
//            between x and the bias, of all `count` experts one after the other (a bool for them all); `width`, inputs
//            of the projection down: [T, H]

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <string>

#include "cpu_common.h"

namespace {

using Tensors = std::vector<at::Tensor>;

// One weight of all experts.
class Stack {
 public:
  Stack(const std::string& product, const Tensors& tensors, int64_t count, int64_t outputs)
      : tensors_(tensors), count_(count), outputs_(outputs) {
    const auto found = selfspec::products().find(product);
    TORCH_CHECK(found != selfspec::products().end(), "no product is called ", product);
    product_ = found->second;
    for (const at::Tensor& tensor : tensors)
      TORCH_CHECK(is_shared(tensor) || tensor.size(0) % count == 0, "weights of ", count, " experts are of equal size");
  }

  at::Tensor operator()(int64_t expert, const Inputs& x) const {
    Tensors own;
    for (const at::Tensor& tensor : tensors_) {
      const int64_t size = tensor.size(0) / count_;
      own.push_back(is_shared(tensor) ? tensor : tensor.narrow(0, expert * size, size));
    }
    return product_(x, own, outputs_, std::nullopt);
  }

 private:
  const Tensors& tensors_;
  const int64_t count_, outputs_;
  selfspec::Product product_;

  static bool is_shared(const at::Tensor& tensor) { return tensor.scalar_type() == at::kBool; }
};

at::Tensor experts(const at::Tensor& input, const at::Tensor& weights, const at::Tensor& ids,
                   const std::string& product, const Tensors& gate_up, const Tensors& down, int64_t count,
                   int64_t width) {
  const at::Tensor x = matrix(input);
  const int64_t hidden = x.size(1), each = ids.size(1);
  TORCH_CHECK(hidden % 8 == 0 && width % 8 == 0, "experts work on eight values at a time");
  TORCH_CHECK(ids.scalar_type() == at::kInt && weights.scalar_type() == at::kFloat && ids.is_contiguous() &&
                  weights.is_contiguous() && ids.sizes() == weights.sizes() && ids.size(0) == x.size(0),
              "ids must be int32 and weights float32 [T, k]");
  const Stack up_of(product, gate_up, count, 2 * width), down_of(product, down, count, hidden);
  const int32_t* id = ids.const_data_ptr<int32_t>();
  const float* weight = weights.const_data_ptr<float>();
  std::vector<std::vector<int64_t>> chosen(count);  // by each expert's number, the places in `ids`
  for (int64_t place = 0; place < ids.numel(); ++place) {
    TORCH_CHECK(id[place] >= 0 && id[place] < count, "expert ", id[place], " of ", count);
    chosen[id[place]].push_back(place);
  }
  at::Tensor sum = at::zeros({x.size(0), hidden}, at::TensorOptions(at::kFloat));
  const at::Tensor out = at::empty_like(x);
  for_type(x, [&]<typename T>() {
    const T* from = x.const_data_ptr<T>();
    float* sums = sum.mutable_data_ptr<float>();
    for (int64_t expert = 0; expert < count; ++expert) {
      const std::vector<int64_t>& places = chosen[expert];
      if (places.empty()) continue;
      const auto fill = [&](int64_t m, float* to) { widen(from + places[m] / each * hidden, to, hidden); };
      const auto rows = static_cast<int64_t>(places.size());
      const at::Tensor inner = up_of(expert, {rows, hidden, x.scalar_type(), fill});
      const at::Tensor result = down_of(expert, gated<T>(inner, {}));
      const T* values = result.const_data_ptr<T>();
      for (int64_t m = 0; m < rows; ++m) {
        const __m256 factor = _mm256_set1_ps(weight[places[m]]);
        float* to = sums + places[m] / each * hidden;
        for (int64_t i = 0; i < hidden; i += 8)
          store8(to + i, _mm256_fmadd_ps(factor, load8(values + m * hidden + i), load8(to + i)));
      }
    }
    T* to = out.mutable_data_ptr<T>();
    for (int64_t i = 0; i < out.numel(); i += 8) store8(to + i, load8(sums + i));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selfspec_cpu, library) {
  library.def(
      "experts(Tensor x, Tensor weights, Tensor ids, str product, Tensor[] gate_up, Tensor[] down, int count, int width)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(selfspec_cpu, CPU, library) { library.impl("experts", experts); }
