// Attention of drafts on CPU: vLLM's own kernels, called by one operator per layer.
//
// vLLM reaches them through two Python operators per layer, each of which looks up the step's metadata and takes the
// layer's cache apart anew. Here the layers are described once and a proposal's tensors are named once: what changes
// from draft to draft changes inside them.
//
//   DraftAttention    the layers of one drafter and the batch that it drafts for
//   draft_attention   query [T, H * D], key and value [T, KH * D] of a layer: writes keys and values to the slots of the
//                     batch, then attends; [T, H * D]. Zeros where there is no batch, as while an engine warms up.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <string>
#include <vector>

namespace {

using c10::IValue;

// What slopes, attention sinks, masks and caches of 8 bits would set.
const IValue kNone, kOne(1.0), kAuto("auto");

c10::OperatorHandle kernel(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

struct Layer {
  at::Tensor key_cache, value_cache;  // [blocks, KH, block size, D]
  int64_t head_size;
  IValue scale, sliding_window, softcap, isa;
};

// Rows that are no padding, and the tensors that hold their slots, places and lengths.
struct Batch {
  int64_t rows;
  IValue slot_mapping, query_start_loc, seq_lens, block_table;
};

class DraftAttention : public torch::CustomClassHolder {
 public:
  // Heads and the window that all layers share (-1: none) are what the kernel's plan of a step is made for.
  DraftAttention(int64_t heads, int64_t window, bool split_kv) : heads_(heads), window_(window), split_kv_(split_kv) {}

  ~DraftAttention() override { end(); }

  // Another layer, after those that are there.
  void add(const at::Tensor& key_cache, const at::Tensor& value_cache, int64_t head_size, double scale,
           int64_t sliding_window, double softcap, const std::string& isa) {
    layers_.push_back({key_cache, value_cache, head_size, scale, sliding_window, softcap, isa});
  }

  // Until end(), draft_attention in this thread is of these layers and this batch.
  void begin(int64_t rows, const at::Tensor& slot_mapping, const at::Tensor& query_start_loc,
             const at::Tensor& seq_lens, const at::Tensor& block_table) {
    batch_ = {rows, slot_mapping, query_start_loc, seq_lens, block_table};
    current = this;
  }

  void end() {
    if (current == this) current = nullptr;
    batch_ = {};
  }

  at::Tensor run(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t index) {
    TORCH_CHECK(index < static_cast<int64_t>(layers_.size()), "layer ", index, " of ", layers_.size());
    if (index == 0) make_plan();
    const Layer& layer = layers_[index];
    const auto heads = [&](const at::Tensor& rows) {
      return rows.view({rows.size(0), rows.size(1) / layer.head_size, layer.head_size});
    };
    stack_ = {heads(key), heads(value), layer.key_cache, layer.value_cache, batch_.slot_mapping,
              layer.isa,  kOne,         kOne,            kAuto};
    write_.callBoxed(stack_);
    const at::Tensor out = at::empty({query.size(0), query.size(1)}, query.options());
    stack_ = {heads(query).narrow(0, 0, batch_.rows), layer.key_cache, layer.value_cache,
              heads(out).narrow(0, 0, batch_.rows), batch_.query_start_loc, batch_.seq_lens, layer.scale, true,
              kNone, layer.sliding_window, batch_.block_table, layer.softcap, plan_, kNone, kNone, kOne,
              kOne, kAuto};
    attend_.callBoxed(stack_);
    return out;
  }

  static thread_local DraftAttention* current;

 private:
  // How the kernel shares out the work of the lengths that this forward finds.
  void make_plan() {
    const Layer& layer = layers_[0];
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
  torch::jit::Stack stack_;  // kept for its memory
};

thread_local DraftAttention* DraftAttention::current = nullptr;

at::Tensor draft_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t layer) {
  if (DraftAttention::current == nullptr) return at::zeros({query.size(0), query.size(1)}, query.options());
  return DraftAttention::current->run(query, key, value, layer);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selfspec_cpu, library) {
  library.class_<DraftAttention>("DraftAttention")
      .def(torch::init<int64_t, int64_t, bool>())
      .def("add", &DraftAttention::add)
      .def("begin", &DraftAttention::begin)
      .def("end", &DraftAttention::end);
  library.def("draft_attention(Tensor query, Tensor key, Tensor value, int layer) -> Tensor");
}

TORCH_LIBRARY_IMPL(selfspec_cpu, CPU, library) { library.impl("draft_attention", draft_attention); }
