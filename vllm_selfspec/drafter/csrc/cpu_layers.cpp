// Decoder layers of drafts on CPU: all that follow each other, or the attention of one, by one operator.
//
// A draft is a forward of a few rows. What surrounds the products of a layer, in a graph of small operators, is a third
// of its time there. Layers are described once and a proposal's tensors are named once: what changes from draft to
// draft changes inside them. Attention is vLLM's own kernels.
//
//   Linear           a drafter's weight and the product that reads it
//   DraftLayers      the layers of one drafter and the batch that it drafts for
//   draft_attention  query [T, H * D], key and value [T, KH * D] of a layer: writes keys and values to the slots of the
//                    batch, then attends; [T, H * D]
//   draft_layers     hidden states and what is to be added to them [T, width] (absent: nothing), positions [T]: the same
//                    pair after some layers that normalize their inputs, rotate queries and keys and gate their MLP
//                    with SiLU
//
// Both give zeros where there is no batch, as while an engine warms up.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/custom_class.h>

#include <string>
#include <tuple>

#include "cpu_common.h"

namespace selfspec {

std::map<std::string, Product>& products() {
  static std::map<std::string, Product> all;
  return all;
}

}  // namespace selfspec

namespace {

using c10::IValue;
using Optional = std::optional<at::Tensor>;

// What slopes, attention sinks, masks and caches of 8 bits would set.
const IValue kNone, kOne(1.0), kAuto("auto");

c10::OperatorHandle kernel(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

class Linear : public torch::CustomClassHolder {
 public:
  // `product` is the name of an operator, which takes `weights` between x and the bias [outputs].
  Linear(const std::string& product, std::vector<at::Tensor> weights, int64_t outputs, Optional bias)
      : weights_(std::move(weights)), outputs_(outputs), bias_(std::move(bias)) {
    const auto found = selfspec::products().find(product);
    TORCH_CHECK(found != selfspec::products().end(), "no product is called ", product);
    product_ = found->second;
  }

  at::Tensor operator()(const Inputs& x) const {
    if (bias_.has_value() && bias_->scalar_type() != x.type)  // vLLM keeps that of a small layer in float32
      return product_(x, weights_, outputs_, bias_->to(x.type));
    return product_(x, weights_, outputs_, bias_);
  }

  int64_t outputs() const { return outputs_; }

 private:
  selfspec::Product product_;
  const std::vector<at::Tensor> weights_;
  const int64_t outputs_;
  const Optional bias_;
};

// Memory for one kind of intermediate result, used again by the next layer: allocating it would take microseconds each time.
class Room {
 public:
  const at::Tensor& of(int64_t rows, int64_t columns, const at::Tensor& like) {
    if (!room_.defined() || room_.size(0) != rows || room_.size(1) != columns || room_.dtype() != like.dtype())
      room_ = at::empty({rows, columns}, like.options());
    return room_;
  }

 private:
  at::Tensor room_;
};

// x / sqrt(mean of x^2 + epsilon) * weight
struct Norm {
  at::Tensor weight;
  float epsilon;

  template <typename T>
  void apply(const float* x, int64_t count, float* out) const {
    const T* w = weight.const_data_ptr<T>();
    __m256 squares = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i += 8) {
      const __m256 value = _mm256_loadu_ps(x + i);
      squares = _mm256_fmadd_ps(value, value, squares);
    }
    const __m256 factor = _mm256_set1_ps(1.0f / std::sqrt(sum8(squares) / static_cast<float>(count) + epsilon));
    for (int64_t i = 0; i < count; i += 8)
      _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor), load8(w + i)));
  }
};

// What surrounds a layer's attention.
struct Block {
  Norm before_attention, before_mlp;
  std::optional<Norm> of_queries, of_keys;
  at::Tensor cos_sin;  // [positions, rotary dim]: cosines, then sines
  c10::intrusive_ptr<Linear> qkv, o, gate_up, down;
};

struct Layer {
  at::Tensor key_cache, value_cache;  // [blocks, KH, block size, D]
  int64_t heads, head_size;
  IValue scale, sliding_window, softcap, isa;
  std::optional<Block> block;
};

// Rows that are no padding, and the tensors that hold their slots, places and lengths.
struct Batch {
  int64_t rows;
  IValue slot_mapping, query_start_loc, seq_lens, block_table;
};

// The rows of `hidden` plus those of `residual`, if it is there, normalized; the sums themselves are left in `sums`,
// which may be `residual`. The result goes to `out`.
template <typename T>
Inputs normed(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& sums, const Norm& norm,
              const at::Tensor& out) {
  const int64_t width = hidden.size(1);
  const T* x = hidden.const_data_ptr<T>();
  const T* added = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
  return {hidden.size(0), width, hidden.scalar_type(),
          [x, added, to = sums.mutable_data_ptr<T>(), width, &norm](int64_t m, float* wide) {
            const int64_t first = m * width;
            for (int64_t i = 0; i < width; i += 8) {
              __m256 sum = load8(x + first + i);
              if (added != nullptr) sum = _mm256_add_ps(sum, load8(added + first + i));
              store8(to + first + i, sum);
              _mm256_storeu_ps(wide + i, sum);
            }
            norm.apply<T>(wide, width, wide);
          },
          out};
}

// Normalizes the queries and keys in rows of queries, keys and values [T, (H + 2 KH) * D] where the layer does, then
// rotates them: halves of a head's first values are the two parts of a complex number.
template <typename T>
void place_heads(const at::Tensor& qkv, const at::Tensor& positions, const Block& block, int64_t heads,
                 int64_t head_size, int64_t kv_heads) {
  const int64_t half = block.cos_sin.size(1) / 2, most = block.cos_sin.size(0);
  const int64_t* position = positions.const_data_ptr<int64_t>();
  std::vector<float> wide(head_size);
  for (int64_t m = 0; m < qkv.size(0); ++m) {
    TORCH_CHECK(position[m] >= 0 && position[m] < most, "position ", position[m], " of ", most);
    const T *cosines = block.cos_sin.const_data_ptr<T>() + 2 * position[m] * half, *sines = cosines + half;
    T* head = qkv.mutable_data_ptr<T>() + m * qkv.size(1);
    for (int64_t h = 0; h < heads + kv_heads; ++h, head += head_size) {
      const std::optional<Norm>& norm = h < heads ? block.of_queries : block.of_keys;
      if (norm.has_value()) {
        widen(head, wide.data(), head_size);
        norm->apply<T>(wide.data(), head_size, wide.data());
        for (int64_t i = 0; i < head_size; i += 8) store8(head + i, _mm256_loadu_ps(wide.data() + i));
      }
      for (int64_t i = 0; i < half; i += 8) {
        const __m256 a = load8(head + i), b = load8(head + half + i), c = load8(cosines + i), s = load8(sines + i);
        store8(head + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
        store8(head + half + i, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
      }
    }
  }
}

class DraftLayers : public torch::CustomClassHolder {
 public:
  // Heads and the window that all layers share (-1: none) are what the kernel's plan of a step is made for.
  DraftLayers(int64_t heads, int64_t window, bool split_kv) : heads_(heads), window_(window), split_kv_(split_kv) {}

  ~DraftLayers() override { end(); }

  // The attention of another layer, after those that are there.
  void add(const at::Tensor& key_cache, const at::Tensor& value_cache, int64_t heads, int64_t head_size, double scale,
           int64_t sliding_window, double softcap, const std::string& isa) {
    layers_.push_back({key_cache, value_cache, heads, head_size, scale, sliding_window, softcap, isa, std::nullopt});
  }

  // What surrounds the attention added last. Norms [of the attention's input, of the MLP's], and, where there are any,
  // of each query and each key, with an epsilon for each.
  void surround(const std::vector<at::Tensor>& norms, const std::vector<double>& epsilons, const at::Tensor& cos_sin,
                const c10::intrusive_ptr<Linear>& qkv, const c10::intrusive_ptr<Linear>& o,
                const c10::intrusive_ptr<Linear>& gate_up, const c10::intrusive_ptr<Linear>& down) {
    TORCH_CHECK(!layers_.empty() && norms.size() == epsilons.size() && (norms.size() == 2 || norms.size() == 4),
                "two or four norms surround the attention of a layer");
    const auto norm = [&](size_t i) { return Norm{norms[i], static_cast<float>(epsilons[i])}; };
    Block block{norm(0), norm(1), std::nullopt, std::nullopt, cos_sin, qkv, o, gate_up, down};
    if (norms.size() == 4) block.of_queries = norm(2), block.of_keys = norm(3);
    for (const at::Tensor& tensor : norms)
      TORCH_CHECK(tensor.scalar_type() == cos_sin.scalar_type(), "norms, sines and cosines must be of one dtype");
    layers_.back().block = std::move(block);
  }

  // Until end(), the operators in this thread are of these layers and this batch.
  void begin(int64_t rows, const at::Tensor& slot_mapping, const at::Tensor& query_start_loc,
             const at::Tensor& seq_lens, const at::Tensor& block_table) {
    batch_ = {rows, slot_mapping, query_start_loc, seq_lens, block_table};
    current = this;
  }

  void end() {
    if (current == this) current = nullptr;
    batch_ = {};
  }

  // query, key and value [T, heads, D].
  void attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
              int64_t index) {
    if (index == 0) make_plan();
    const Layer& layer = at_place(index);
    stack_ = {key, value, layer.key_cache, layer.value_cache, batch_.slot_mapping, layer.isa, kOne, kOne, kAuto};
    write_.callBoxed(stack_);
    stack_ = {query, layer.key_cache, layer.value_cache, out, batch_.query_start_loc, batch_.seq_lens, layer.scale,
              true, kNone, layer.sliding_window, batch_.block_table, layer.softcap, plan_, kNone, kNone, kOne,
              kOne, kAuto};
    attend_.callBoxed(stack_);
  }

  at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t index) {
    const Heads heads{at_place(index).head_size, batch_.rows};
    const at::Tensor out = at::empty({query.size(0), query.size(1)}, query.options());
    attend(heads.real(query), heads.all(key), heads.all(value), heads.real(out), index);
    return out;
  }

  std::tuple<at::Tensor, at::Tensor> layers(const at::Tensor& input, const Optional& residual,
                                            const at::Tensor& positions, int64_t first, int64_t count) {
    at::Tensor hidden = matrix(input), added = residual.has_value() ? matrix(*residual) : at::Tensor();
    const at::Tensor out = at::empty_like(hidden), sums = at::empty_like(hidden);
    for_type(input, [&]<typename T>() {
      for (int64_t index = first; index < first + count; ++index) {
        layer<T>(hidden, added, positions, index, out, sums);
        hidden = out;
        added = sums;
      }
    });
    return {out, sums};
  }

  static thread_local DraftLayers* current;

 private:
  // Rows of some heads, one after the other, as [T, heads, D].
  struct Heads {
    int64_t size, rows;

    at::Tensor all(const at::Tensor& x) const { return x.view({x.size(0), x.size(1) / size, size}); }

    at::Tensor real(const at::Tensor& x) const { return all(x).narrow(0, 0, rows); }  // without padding
  };

  // Of queries, keys and values that lie side by side, the parts, and where attention writes to.
  struct Split {
    at::Tensor qkv, out, query, key, value, attended;
    int64_t head_size = 0, rows = 0;
  };

  // One layer, from `hidden` and `added` to `out` and `sums`, which may be the same tensors.
  template <typename T>
  void layer(const at::Tensor& hidden, const at::Tensor& added, const at::Tensor& positions, int64_t index,
             const at::Tensor& out, const at::Tensor& sums) {
    const Layer& layer = at_place(index);
    TORCH_CHECK(layer.block.has_value(), "layer ", index, " is attention alone");
    const Block& block = *layer.block;
    const at::Tensor& weight = block.before_mlp.weight;
    TORCH_CHECK(hidden.dtype() == weight.dtype() && hidden.size(1) == weight.numel(), "hidden states do not fit layer ",
                index);
    const int64_t rows = hidden.size(0);
    const auto room = [&](Room& kept, int64_t columns) -> const at::Tensor& { return kept.of(rows, columns, hidden); };
    const at::Tensor& qkv = room(qkv_, block.qkv->outputs());
    (*block.qkv)(normed<T>(hidden, added, sums, block.before_attention, qkv));
    place_heads<T>(qkv, positions, block, layer.heads, layer.head_size, layer.key_cache.size(1));
    const Split& parts = split(qkv, room(attended_, layer.heads * layer.head_size), layer);
    attend(parts.query, parts.key, parts.value, parts.attended, index);
    Inputs attended = inputs_of(parts.out);
    attended.out = out;
    (*block.o)(attended);
    const at::Tensor& gate_up = room(gate_up_, block.gate_up->outputs());
    (*block.gate_up)(normed<T>(out, sums, sums, block.before_mlp, gate_up));
    (*block.down)(gated<T>(gate_up, out));
  }

  const Split& split(const at::Tensor& qkv, const at::Tensor& out, const Layer& layer) {
    if (!split_.qkv.is_same(qkv) || !split_.out.is_same(out) || split_.head_size != layer.head_size ||
        split_.rows != batch_.rows) {
      const Heads heads{layer.head_size, batch_.rows};
      const int64_t queries = layer.heads * layer.head_size, keys = layer.key_cache.size(1) * layer.head_size;
      const auto parts = qkv.split_with_sizes({queries, keys, keys}, 1);
      split_ = {qkv, out, heads.real(parts[0]), heads.all(parts[1]), heads.all(parts[2]), heads.real(out),
                layer.head_size, batch_.rows};
    }
    return split_;
  }

  const Layer& at_place(int64_t index) const {
    TORCH_CHECK(index < static_cast<int64_t>(layers_.size()), "layer ", index, " of ", layers_.size());
    return layers_[index];
  }

  // How the kernel shares out the work of the lengths that this forward finds.
  void make_plan() {
    const Layer& layer = at_place(0);
    stack_ = {batch_.rows, heads_, layer.key_cache.size(1), layer.head_size, batch_.seq_lens,
              static_cast<int64_t>(layer.key_cache.scalar_type()), batch_.query_start_loc, true, window_, layer.isa,
              split_kv_, kNone, kAuto};
    plan_kernel_.callBoxed(stack_);
    plan_ = std::move(stack_.front());
  }

  const c10::OperatorHandle plan_kernel_ = kernel("_C::get_scheduler_metadata"),
                            write_ = kernel("_C::cpu_attn_reshape_and_cache"),
                            attend_ = kernel("_C::cpu_attention_with_kv_cache");
  const int64_t heads_, window_;
  const bool split_kv_;
  std::vector<Layer> layers_;
  Batch batch_{};
  IValue plan_;
  Room qkv_, attended_, gate_up_;
  Split split_;
  torch::jit::Stack stack_;  // kept for its memory
};

thread_local DraftLayers* DraftLayers::current = nullptr;

at::Tensor draft_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t place) {
  if (DraftLayers::current == nullptr) return at::zeros({query.size(0), query.size(1)}, query.options());
  return DraftLayers::current->attention(query, key, value, place);
}

std::tuple<at::Tensor, at::Tensor> draft_layers(const at::Tensor& hidden, const Optional& residual,
                                                const at::Tensor& positions, int64_t first, int64_t count) {
  if (DraftLayers::current == nullptr) return {at::zeros_like(hidden), at::zeros_like(hidden)};
  return DraftLayers::current->layers(hidden, residual, positions, first, count);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selfspec_cpu, library) {
  library.class_<Linear>("Linear").def(
      torch::init<const std::string&, std::vector<at::Tensor>, int64_t, std::optional<at::Tensor>>());
  library.class_<DraftLayers>("DraftLayers")
      .def(torch::init<int64_t, int64_t, bool>())
      .def("add", &DraftLayers::add)
      .def("surround", &DraftLayers::surround)
      .def("begin", &DraftLayers::begin)
      .def("end", &DraftLayers::end);
  library.def("draft_attention(Tensor query, Tensor key, Tensor value, int place) -> Tensor");
  library.def(
      "draft_layers(Tensor hidden, Tensor? residual, Tensor positions, int first, int count)"
      " -> (Tensor hidden, Tensor residual)");
}

TORCH_LIBRARY_IMPL(selfspec_cpu, CPU, library) {
  library.impl("draft_attention", draft_attention);
  library.impl("draft_layers", draft_layers);
}
