// A frozen decoder's layers over prepared weights for a packed batch, forward and backward to their inputs and to the
// memory, in one call each: what models/decoder/training_call.py builds. Every part is the op of its name (row_ops.h),
// in the order of training_layers.py, which has the same numbers but for a rounding at the very end; what is saved are
// the calls between them, a node of autograd's for every piece, and the copies that put gradients of queries, keys and
// values, and of all layers' memory, side by side.
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/custom_class.h>

#include "body_parts.h"

namespace lmvae {
namespace {

// prepared weight, bias, outputs, whether oneDNN has prepared it (else it is packed_linear's)
using FrozenParts = std::tuple<at::Tensor, OptionalTensor, int64_t, bool>;

// oneDNN's product as torch has it. Boxed: how it takes text is not the same in all versions of torch.
at::Tensor onednn_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& added) {
  static const c10::OperatorHandle plain =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "");
  static const c10::OperatorHandle summed =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "binary");
  torch::jit::Stack stack;
  if (added.has_value()) {
    torch::jit::push(stack, x, *added, weight, bias, std::string("add"));
    summed.callBoxed(stack);
  } else {
    const c10::impl::GenericList none(c10::OptionalType::create(c10::NumberType::get()));
    torch::jit::push(stack, x, weight, bias, std::string("none"), none, std::string());
    plain.callBoxed(stack);
  }
  return torch::jit::pop(stack).toTensor();
}

struct FrozenLinear {
  explicit FrozenLinear(FrozenParts parts)
      : weight(std::get<0>(parts)), bias(std::get<1>(parts)), outputs(std::get<2>(parts)), onednn(std::get<3>(parts)) {}

  at::Tensor operator()(const at::Tensor& x, const OptionalTensor& added = std::nullopt) const {
    return onednn ? onednn_linear(x, weight, bias, added) : packed_linear(x, weight, bias, added, 0, outputs);
  }

 private:
  at::Tensor weight;
  OptionalTensor bias;
  int64_t outputs;
  bool onednn;
};

// A norm of the heads [from, from + count) of queries, keys and values.
struct HeadNorm {
  RowNorm norm;
  int64_t from, count;
};

// Of [T, heads + 2 kv_heads, head_dim].
struct Heads {
  at::Tensor q, k, v;
};

struct Layer {
  RowNorm before_attention, before_mlp;
  std::vector<HeadNorm> of_heads;
  std::optional<RowNorm> behind_attention, behind_mlp;
  FrozenLinear qkv, out, up, down;
  FrozenLinear by_qkv, by_out, by_up, by_down;  // from the outputs' gradients to the inputs'
  int64_t heads, kv_heads, head_dim, activation;
  double scale;
  std::optional<int64_t> window;
  std::optional<double> softcap;

  Heads split(const at::Tensor& rows) const {
    const at::Tensor all = rows.view({rows.size(0), heads + 2 * kv_heads, head_dim});
    return {all.narrow(1, 0, heads), all.narrow(1, heads, kv_heads), all.narrow(1, heads + kv_heads, kv_heads)};
  }
  at::Tensor part(const at::Tensor& rows, const HeadNorm& norm) const {
    return rows.narrow(1, norm.from * head_dim, norm.count * head_dim);
  }
  // Tensors that a pass keeps of this layer for its gradient.
  size_t kept() const { return 8 + 2 * (of_heads.size() + behind_attention.has_value() + behind_mlp.has_value()); }
};

// What a whole pass reads besides hidden states.
struct Surroundings {
  OptionalTensor memory;  // [layers, 2, batch, kv_heads, slots, head_dim] in the body's dtype
  at::Tensor cu_seqlens;
  int64_t visibility, max_seqlen;
  std::vector<at::Tensor> turns;  // cosines and sines [T, head_dim] of every layer in turn, or nothing

  OptionalTensor of_memory(int64_t layer, int64_t kind) const {
    return memory.has_value() ? OptionalTensor(memory->select(0, layer).select(0, kind)) : std::nullopt;
  }
  void rotate(at::Tensor& rows, int64_t layer, int64_t heads, bool back) const {
    if (!turns.empty()) frozen_rotary(rows, turns[2 * layer], turns[2 * layer + 1], heads, back);
  }
};

// Takes what a pass kept in the order in which it was kept.
class Kept {
 public:
  Kept(const std::vector<at::Tensor>& all, size_t at) : all_(all), at_(at) {}
  const at::Tensor& next() { return all_.at(at_++); }

 private:
  const std::vector<at::Tensor>& all_;
  size_t at_;
};

struct TrainingBody : torch::CustomClassHolder {
  explicit TrainingBody(NormParts last) : last_(std::move(last)) {}

  // products: qkv, out, up, down, then the same from outputs' gradients to inputs'; heads: of queries, of keys,
  // head_dim; activation: its number in frozen_layer.
  void add_layer(std::vector<NormParts> norms, std::optional<NormParts> query_norm, std::optional<NormParts> key_norm,
                 std::optional<NormParts> behind_attention, std::optional<NormParts> behind_mlp,
                 std::vector<FrozenParts> products, std::vector<int64_t> heads, int64_t activation, double scale,
                 std::optional<int64_t> window, std::optional<double> softcap) {
    TORCH_CHECK(norms.size() == 2 && products.size() == 8 && heads.size() == 3,
                "TrainingBody: a layer has 2 norms, 8 products and 3 numbers of heads, got ", norms.size(), ", ",
                products.size(), " and ", heads.size());
    std::vector<HeadNorm> of_heads;
    if (query_norm.has_value()) of_heads.push_back({RowNorm(*query_norm), 0, heads[0]});
    if (key_norm.has_value()) of_heads.push_back({RowNorm(*key_norm), heads[0], heads[1]});
    const auto product = [&](size_t n) { return FrozenLinear(products[n]); };
    layers_.push_back({RowNorm(norms[0]),
                       RowNorm(norms[1]),
                       std::move(of_heads),
                       norm_of(std::move(behind_attention)),
                       norm_of(std::move(behind_mlp)),
                       product(0),
                       product(1),
                       product(2),
                       product(3),
                       product(4),
                       product(5),
                       product(6),
                       product(7),
                       heads[0],
                       heads[1],
                       heads[2],
                       activation,
                       scale,
                       window,
                       softcap});
  }

  // Hidden states [T, hidden] to normed ones, which come first; then, where `keeps`, what `backward` takes.
  std::vector<at::Tensor> forward(at::Tensor x, OptionalTensor memory, at::Tensor cu_seqlens, int64_t visibility,
                                  int64_t max_seqlen, std::vector<at::Tensor> turns, bool keeps) const {
    const at::NoGradGuard no_grad;
    const Surroundings around =
        surroundings(x, std::move(memory), std::move(cu_seqlens), visibility, max_seqlen, std::move(turns));
    std::vector<at::Tensor> kept(1);
    const auto keep = [&](const at::Tensor& tensor) {
      if (keeps) kept.push_back(tensor);
    };
    for (size_t n = 0; n < layers_.size(); n++) x = layer_forward(layers_[n], static_cast<int64_t>(n), x, around, keep);
    auto [rows, stats] = last_.with_stats(x);
    keep(x);
    keep(stats);
    kept[0] = rows;
    return kept;
  }

  // Gradients by the hidden states (unless not `wanted`) and by the memory, given that of what `forward` gave first;
  // `kept` is what followed.
  std::tuple<OptionalTensor, OptionalTensor> backward(at::Tensor grad, const std::vector<at::Tensor>& kept,
                                                      OptionalTensor memory, at::Tensor cu_seqlens, int64_t visibility,
                                                      int64_t max_seqlen, std::vector<at::Tensor> turns,
                                                      bool wanted) const {
    const at::NoGradGuard no_grad;
    size_t end = 2;
    for (const Layer& layer : layers_) end += layer.kept();
    TORCH_CHECK(kept.size() == end, "TrainingBody: ", kept.size(), " tensors were kept, ", end, " are read");
    const Surroundings around =
        surroundings(grad, std::move(memory), std::move(cu_seqlens), visibility, max_seqlen, std::move(turns));
    at::Tensor by_memory;
    if (around.memory.has_value()) by_memory = at::empty(around.memory->sizes(), around.memory->options());
    end -= 2;
    at::Tensor by = last_.gradient(grad, kept[end], kept[end + 1]);
    for (int64_t n = static_cast<int64_t>(layers_.size()) - 1; n >= 0; n--) {
      end -= layers_[n].kept();
      by = layer_backward(layers_[n], n, by, Kept(kept, end), around, by_memory, wanted || n > 0);
    }
    return {by.defined() ? OptionalTensor(by) : std::nullopt,
            by_memory.defined() ? OptionalTensor(by_memory) : std::nullopt};
  }

 private:
  Surroundings surroundings(const at::Tensor& x, OptionalTensor memory, at::Tensor cu_seqlens, int64_t visibility,
                            int64_t max_seqlen, std::vector<at::Tensor> turns) const {
    TORCH_CHECK(x.dim() == 2 && !layers_.empty(), "TrainingBody: rows [T, hidden], got ", x.sizes());
    TORCH_CHECK(turns.empty() || turns.size() == 2 * layers_.size(), "TrainingBody: ", turns.size(),
                " cosines and sines for ", layers_.size(), " layers");
    TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0 && cu_seqlens.scalar_type() == at::kInt &&
                    cu_seqlens.device().is_cpu() && x.device().is_cpu(),
                "TrainingBody: offsets int32 [batch + 1] on the CPU, got ", cu_seqlens.sizes(), " of ",
                cu_seqlens.scalar_type());
    for (const Layer& layer : layers_)
      TORCH_CHECK(layer.before_attention.width() == x.size(1), "TrainingBody: rows [T, hidden] of ",
                  layer.before_attention.width(), ", got ", x.sizes());
    if (memory.has_value()) {
      TORCH_CHECK(memory->dim() == 6 && memory->size(0) == static_cast<int64_t>(layers_.size()) &&
                      memory->size(1) == 2 && memory->size(2) == cu_seqlens.numel() - 1 &&
                      memory->scalar_type() == x.scalar_type() && memory->device().is_cpu(),
                  "TrainingBody: a memory of ", memory->sizes(), " for ", layers_.size(), " layers and ",
                  cu_seqlens.numel() - 1, " sentences");
      for (const Layer& layer : layers_)
        TORCH_CHECK(memory->size(3) == layer.kv_heads && memory->size(5) == layer.head_dim,
                    "TrainingBody: a memory of ", memory->sizes(), " for ", layer.kv_heads, " heads of ",
                    layer.head_dim);
    }
    return {std::move(memory), std::move(cu_seqlens), visibility, max_seqlen, std::move(turns)};
  }

  // A product that is added to the hidden states, normed before where there is such a norm.
  template <typename Keep>
  static at::Tensor added(const FrozenLinear& product, const std::optional<RowNorm>& behind, const at::Tensor& rows,
                          const at::Tensor& x, const Keep& keep) {
    if (!behind.has_value()) return product(rows, x);
    const at::Tensor out = product(rows);
    const auto [normed, stats] = behind->with_stats(out);
    keep(out);
    keep(stats);
    return x + normed;
  }

  template <typename Keep>
  static at::Tensor layer_forward(const Layer& layer, int64_t n, const at::Tensor& x, const Surroundings& around,
                                  const Keep& keep) {
    const auto [rows, stats] = layer.before_attention.with_stats(x);
    at::Tensor qkv = layer.qkv(rows);
    keep(x);
    keep(stats);
    for (const HeadNorm& norm : layer.of_heads) {
      const at::Tensor part = layer.part(qkv, norm);
      const at::Tensor heads = part.clone(at::MemoryFormat::Contiguous).view({-1, layer.head_dim});
      const auto [normed, of_heads] = norm.norm.with_stats(heads);
      part.copy_(normed.view(part.sizes()));
      keep(heads);
      keep(of_heads);
    }
    around.rotate(qkv, n, layer.heads + layer.kv_heads, false);
    const Heads heads = layer.split(qkv);
    const auto [seen, of_seen] = latent_attention_forward(heads.q, heads.k, heads.v, around.of_memory(n, 0),
                                                          around.of_memory(n, 1), around.cu_seqlens, around.visibility,
                                                          layer.scale, around.max_seqlen, layer.window, layer.softcap);
    keep(qkv);
    keep(seen);
    keep(of_seen);
    const at::Tensor middle = added(layer.out, layer.behind_attention, seen.view({x.size(0), -1}), x, keep);
    const auto [inner_rows, of_middle] = layer.before_mlp.with_stats(middle);
    const at::Tensor inner = layer.up(inner_rows);
    keep(middle);
    keep(of_middle);
    keep(inner);
    return added(layer.down, layer.behind_mlp, frozen_activation(inner, layer.activation), middle, keep);
  }

  // The gradient by a layer's inputs (undefined unless `wanted`), given that of its outputs; that by its memory is
  // written to its place in by_memory.
  static at::Tensor layer_backward(const Layer& layer, int64_t n, const at::Tensor& grad, Kept kept,
                                   const Surroundings& around, const at::Tensor& by_memory, bool wanted) {
    if (!wanted && !by_memory.defined()) return {};
    const at::Tensor &x = kept.next(), &stats = kept.next();
    std::vector<std::pair<at::Tensor, at::Tensor>> of_heads;
    for (size_t norm = 0; norm < layer.of_heads.size(); norm++) {
      const at::Tensor& heads = kept.next();
      of_heads.emplace_back(heads, kept.next());
    }
    const at::Tensor &qkv = kept.next(), &seen = kept.next(), &of_seen = kept.next();
    const auto of_sum = [&](const std::optional<RowNorm>& behind) {
      std::pair<at::Tensor, at::Tensor> found;
      if (behind.has_value()) {
        found.first = kept.next();
        found.second = kept.next();
      }
      return found;
    };
    const auto by_product = [](const std::optional<RowNorm>& behind, const at::Tensor& by,
                               const std::pair<at::Tensor, at::Tensor>& of) {
      return behind.has_value() ? behind->gradient(by, of.first, of.second) : by;
    };
    const auto of_out = of_sum(layer.behind_attention);
    const at::Tensor &middle = kept.next(), &of_middle = kept.next(), &inner = kept.next();
    const auto of_down = of_sum(layer.behind_mlp);

    at::Tensor by = layer.by_down(by_product(layer.behind_mlp, grad, of_down));
    by = layer.by_up(frozen_activation_bwd(by, inner, layer.activation));
    const at::Tensor by_middle = layer.before_mlp.gradient(by, middle, of_middle, grad);

    by = layer.by_out(by_product(layer.behind_attention, by_middle, of_out));
    at::Tensor by_qkv = at::empty_like(qkv);
    const Heads heads = layer.split(qkv), by_heads = layer.split(by_qkv);
    AttentionGradients grads{by_heads.q, by_heads.k, by_heads.v, {}, {}};
    if (by_memory.defined()) {
      grads.memory_k = by_memory.select(0, n).select(0, 0);
      grads.memory_v = by_memory.select(0, n).select(0, 1);
    }
    latent_attention_backward(by.view(heads.q.sizes()), heads.q, heads.k, heads.v, around.of_memory(n, 0),
                              around.of_memory(n, 1), seen, of_seen, around.cu_seqlens, around.visibility, layer.scale,
                              around.max_seqlen, layer.window, layer.softcap, grads);
    if (!wanted) return {};
    around.rotate(by_qkv, n, layer.heads + layer.kv_heads, true);
    for (size_t norm = 0; norm < of_heads.size(); norm++) {
      const at::Tensor part = layer.part(by_qkv, layer.of_heads[norm]);
      const auto& [before, of_before] = of_heads[norm];
      const at::Tensor by_part = part.clone(at::MemoryFormat::Contiguous).view(before.sizes());
      part.copy_(layer.of_heads[norm].norm.gradient(by_part, before, of_before).view(part.sizes()));
    }
    return layer.before_attention.gradient(layer.by_qkv(by_qkv), x, stats, by_middle);
  }

  RowNorm last_;
  std::vector<Layer> layers_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(lmvae_fast, m) {
  m.class_<TrainingBody>("TrainingBody")
      .def(torch::init<NormParts>())
      .def("add_layer", &TrainingBody::add_layer)
      .def("forward", &TrainingBody::forward)
      .def("backward", &TrainingBody::backward);
}

}  // namespace lmvae
