// Products with a drafter's weights whose rows need not lie in memory: they are made while they are quantized.

#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace selfspec {

// Rows [M, K] of a product.
struct Inputs {
  int64_t rows, columns;
  at::ScalarType type;                                // of the result
  std::function<void(int64_t row, float* to)> fill;   // writes K values; called once for each row, by any thread
  at::Tensor out = {};                                // where the result [M, N] goes; a new tensor where this is none
};

// A product with `weights`, the tensors that the operator of the same name takes between x and the bias.
using Product = at::Tensor (*)(const Inputs& x, const std::vector<at::Tensor>& weights, int64_t outputs,
                               const std::optional<at::Tensor>& bias);

// All of them by the names of their operators.
std::map<std::string, Product>& products();

}  // namespace selfspec
