// lm_head_loss on CPU. One pass over the vocabulary in blocks, as flash attention does over keys: for a group of
// tokens, each block of the head's rows gives logits, the running softmax, and its share of sum_v softmax_v weight_v
// while the block is in the cache. No buffer has a vocabulary dimension, so the frozen head costs two matrix products
// and memory of the size of hidden. A trained head takes a second pass (logits again, then d weight block by block).
//
// Work is cut into (group of tokens) x (range of the vocabulary); what ranges have gathered is merged at the end in a
// fixed order, so that results are the same bits run after run and on any number of threads.
#include "lm_head_loss.h"

#include "amx.h"
#include "cpu_features.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace lmvae {
namespace {

constexpr int64_t kIgnore = -100;

struct Plan {
  int64_t groups, ranges, group_tokens;
};

// Ranges of the vocabulary need partial sums [ranges, tokens, width]: held under 1/12 of the size the logits would
// have. They change the order of additions, so they depend on shapes alone and results do not depend on the number of
// threads. Groups of tokens change nothing but the time: each repacks the head, which costs about as much as kPack
// tokens' products, and more than kMaxGroup tokens leave the cache.
Plan make_plan(int64_t tokens, int64_t width, int64_t vocab, int64_t tile, bool accumulate) {
  constexpr int64_t kMaxGroup = 512, kPack = 64;
  const int64_t most = accumulate ? vocab / (12 * std::max<int64_t>(1, width)) : vocab / 512;
  const int64_t ranges = most >= 4 ? 4 : most >= 2 ? 2 : 1;
  const int64_t threads = at::get_num_threads(), fewest = (tokens + kMaxGroup - 1) / kMaxGroup;
  Plan best{1, ranges, 0};
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t cut = fewest; cut <= fewest + threads; cut++) {
    const int64_t size = ((tokens + cut - 1) / cut + tile - 1) / tile * tile;
    const int64_t groups = (tokens + size - 1) / size;
    const int64_t cost = (groups * ranges + threads - 1) / threads * (size + kPack);
    if (cost < best_cost) {
      best_cost = cost;
      best = {groups, ranges, size};
    }
  }
  return best;
}

template <typename C>
struct Call {
  HeadProblem problem;
  LogitForm<C> form;
  const int64_t* labels;            // [tokens]
  std::vector<int64_t> rows;        // tokens that are not ignored
  std::vector<int64_t> row_labels;  // their labels
};

// What one thread works with.
template <typename C>
struct Worker {
  std::unique_ptr<HeadEngine<C>> engine;
  Room<C> logits, alpha;
  Room<double> sums;
};

template <typename C>
std::vector<Worker<C>> make_workers(const Call<C>& call, bool packed, int64_t count, int64_t tokens, Product next) {
  std::vector<Worker<C>> workers(count);
  for (Worker<C>& w : workers) {
    if constexpr (std::is_same_v<C, float>) {
      if (packed) w.engine = make_packed_engine(call.problem, tokens, next);
    }
    if (w.engine == nullptr) w.engine = make_gemm_engine<C>(call.problem, tokens, next);
    const int64_t phase = std::max(w.engine->tile_tokens(), std::min(w.engine->phase_tokens(), tokens));
    w.logits = Room<C>((phase + 31) / 32 * 32 * w.engine->block_columns());
    w.alpha = Room<C>(phase);
    if (next != Product::Hidden) w.sums = Room<double>(w.engine->block_columns());
  }
  return workers;
}

// Runs body(worker, unit) for every unit; each thread keeps one worker.
template <typename C, typename F>
void for_units(std::vector<Worker<C>>& workers, int64_t units, const F& body) {
  const bool nested = at::in_parallel_region();  // then everything runs here, whatever this thread's number out there
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Worker<C>& worker = workers[nested ? 0 : at::get_thread_num()];
    worker.engine->enter();
    for (int64_t unit = begin; unit < end; unit++) body(worker, unit);
    worker.engine->leave();
  });
}

// First pass. states [ranges][tokens], acc [ranges][tokens][width] (null: no gradient). False: take the other engine.
template <typename C>
bool gather(const Call<C>& call, const Plan& plan, bool packed, TokenState<C>* states, C* acc) {
  const int64_t n = static_cast<int64_t>(call.rows.size()), width = call.problem.width, vocab = call.problem.vocab;
  const int64_t units = plan.groups * plan.ranges, threads = std::min<int64_t>(at::get_num_threads(), units);
  auto workers =
      make_workers(call, packed, threads, plan.group_tokens, acc == nullptr ? Product::None : Product::Hidden);
  std::atomic<bool> good{true};
  for_units(workers, units, [&](Worker<C>& worker, int64_t unit) {
    HeadEngine<C>& engine = *worker.engine;
    const int64_t tile = engine.tile_tokens(), block = engine.block_columns(), phase = engine.phase_tokens();
    const int64_t blocks = (vocab + block - 1) / block;
    const int64_t group = unit / plan.ranges, range = unit % plan.ranges;
    const int64_t g0 = group * plan.group_tokens, count = std::min(plan.group_tokens, n - g0);
    TokenState<C>* state = states + range * n + g0;
    if (!good || !engine.set_tokens(&call.rows[g0], count)) {
      good = false;
      return;
    }
    for (int64_t b = blocks * range / plan.ranges; b < blocks * (range + 1) / plan.ranges; b++) {
      const int64_t v0 = b * block, columns = std::min(block, vocab - v0);
      if (!engine.set_block(v0, columns)) {
        good = false;
        return;
      }
      for (int64_t p = 0; p < count; p += phase) {
        const int64_t stop = std::min(p + phase, count);
        C *s = worker.logits.data() - p * block, *alpha = worker.alpha.data() - p;
        for (int64_t t = p; t < stop; t += tile) {
          const int64_t rows = std::min(tile, stop - t);
          engine.scores(t, rows, s + t * block, block);
          LMVAE_PICK(head_online<C>)(s + t * block, block, rows, columns, call.form, &call.row_labels[g0 + t], v0,
                                     state + t, alpha + t, acc != nullptr);
        }
        for (int64_t t = p; acc != nullptr && t < stop; t += tile)
          engine.accumulate(t, std::min(tile, stop - t), alpha + t, s + t * block, block);
      }
    }
    for (int64_t t = 0; acc != nullptr && t < count; t++)
      std::copy_n(engine.acc_row(t), width, acc + (range * n + g0 + t) * width);
  });
  return good;
}

// Merges the ranges; writes nll and the rows of d nll / d hidden (jac null: none), and what the second pass needs.
template <typename T, typename C>
void finish(const Call<C>& call, const Plan& plan, const TokenState<C>* states, const C* acc, C* nll, HeadRow<T>* jac,
            std::vector<TokenDone<C>>* done) {
  const int64_t n = static_cast<int64_t>(call.rows.size()), width = call.problem.width;
  const int64_t grain = jac == nullptr ? 4096 : std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    std::vector<const C*> parts(plan.ranges);
    std::vector<C> factors(plan.ranges);
    for (int64_t i = begin; i < end; i++) {
      TokenState<C> all;
      for (int64_t r = 0; r < plan.ranges; r++) {
        const TokenState<C>& s = states[r * n + i];
        all.max = s.max > all.max ? s.max : all.max;
        if (s.label_slope != 0 || s.label != 0) {
          all.label = s.label;
          all.label_slope = s.label_slope;
        }
      }
      for (int64_t r = 0; r < plan.ranges; r++) {
        const TokenState<C>& s = states[r * n + i];
        factors[r] = s.max == -INFINITY ? C(0) : std::exp(s.max - all.max);
        all.sum += s.sum * factors[r];
      }
      // With M the greater of the two maxima: others = sum of what is not the label, total = all, both times e^-M.
      const C top = all.label > all.max ? all.label : all.max;
      const C shrink = all.max == -INFINITY && top != -INFINITY ? C(0) : std::exp(all.max - top);
      const C others = all.sum * shrink, label = std::exp(all.label - top), total = others + label;
      C value = all.label > all.max ? std::log1p(others) : (top - all.label) + std::log(total);
      if (all.label == INFINITY) value = NAN;
      const C miss = others / total;  // 1 - softmax(label)
      nll[call.rows[i]] = value;
      if (done != nullptr) (*done)[i] = {top, C(1) / total, value != value ? value : -miss, C(0)};
      if (jac == nullptr) continue;
      const C scale = value != value ? value : call.form.scale;
      for (int64_t r = 0; r < plan.ranges; r++) {
        parts[r] = acc + (r * n + i) * width;
        factors[r] *= scale * shrink / total;
      }
      const T* row = static_cast<const T*>(call.problem.weight) + call.row_labels[i] * call.problem.weight_row;
      LMVAE_PICK(head_jacobian<T, C>)(parts.data(), factors.data(), plan.ranges, row, -scale * miss * all.label_slope,
                                      jac + call.rows[i] * width, width);
    }
  });
}

// Second pass: d/d weight and d/d bias (each may be null) of sum_t factor_t nll_t, both in C and dense.
template <typename C>
void weigh(const Call<C>& call, bool packed, const std::vector<TokenDone<C>>& done, C* dweight, C* dbias) {
  constexpr int64_t kGroup = 512;
  const int64_t n = static_cast<int64_t>(call.rows.size()), width = call.problem.width, vocab = call.problem.vocab;
  const int64_t threads = at::get_num_threads();
  auto workers =
      make_workers(call, packed, threads, std::min(n, kGroup), dweight == nullptr ? Product::None : Product::Weight);
  for_units(workers, threads, [&](Worker<C>& worker, int64_t unit) {
    HeadEngine<C>& engine = *worker.engine;
    const int64_t tile = engine.tile_tokens(), block = engine.block_columns(), blocks = (vocab + block - 1) / block;
    C* s = worker.logits.data();
    double* sums = worker.sums.data();
    for (int64_t g0 = 0; g0 < n; g0 += kGroup) {
      const int64_t count = std::min(kGroup, n - g0);
      engine.set_tokens(&call.rows[g0], count);  // succeeds: the first pass has seen every number
      for (int64_t b = blocks * unit / threads; b < blocks * (unit + 1) / threads; b++) {
        const int64_t v0 = b * block, columns = std::min(block, vocab - v0);
        engine.set_block(v0, columns);
        std::fill_n(sums, block, 0.0);
        for (int64_t t = 0; t < count; t += tile) {
          const int64_t rows = std::min(tile, count - t);
          engine.scores(t, rows, s, block);
          LMVAE_PICK(head_gradient<C>)(s, block, rows, columns, call.form, &call.row_labels[g0 + t], v0, &done[g0 + t]);
          if (dbias != nullptr) LMVAE_PICK(head_column_sums<C>)(s, block, rows, columns, sums);
          if (dweight != nullptr) engine.take_gradient(t, rows, s, block);
        }
        for (int64_t j = 0; dbias != nullptr && j < columns; j++) dbias[v0 + j] += static_cast<C>(sums[j]);
        if (dweight != nullptr) engine.weight_gradient(dweight + v0 * width, g0 > 0);
      }
    }
  });
}

at::Tensor dense_rows(const at::Tensor& x) { return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous(); }

using Outputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // loss, nll, jac, dweight, dbias

template <typename T>
Outputs run(const at::Tensor& hidden_in, const at::Tensor& weight_in, const at::Tensor& labels_in,
            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& token_weights, double softcap,
            double scale, bool want_hidden, bool want_weight, bool want_bias) {
  using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const at::Tensor hidden = dense_rows(hidden_in), weight = dense_rows(weight_in), labels = labels_in.contiguous();
  const int64_t tokens = hidden.size(0), width = hidden.size(1), vocab = weight.size(0);
  const auto acc_type = c10::CppTypeToScalarType<C>::value;
  const auto acc_options = hidden.options().dtype(acc_type);

  Call<C> call;
  call.problem = {
      hidden.const_data_ptr(), weight.const_data_ptr(), hidden.stride(0), weight.stride(0), tokens, width, vocab,
      hidden.scalar_type()};
  call.labels = labels.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t label = call.labels[t];
    if (label == kIgnore) continue;
    TORCH_CHECK_VALUE(label >= 0 && label < vocab, "lm_head_loss: labels[", t, "] is ", label,
                      ", outside the vocabulary [0, ", vocab, ") (weight has ", vocab, " rows; only ", kIgnore,
                      " is ignored)");
    call.rows.push_back(t);
    call.row_labels.push_back(label);
  }
  const int64_t n = static_cast<int64_t>(call.rows.size());
  at::Tensor bias_acc;
  if (bias.has_value()) bias_acc = bias->to(acc_type).contiguous();
  call.form = {bias.has_value() ? bias_acc.const_data_ptr<C>() : nullptr, static_cast<C>(scale),
               static_cast<C>(softcap)};

  at::Tensor nll = at::zeros({tokens}, acc_options);
  const auto row_options = hidden.options().dtype(c10::CppTypeToScalarType<HeadRow<T>>::value);
  at::Tensor jac = n == tokens ? at::empty({want_hidden ? tokens : 0, width}, row_options)
                               : at::zeros({want_hidden ? tokens : 0, width}, row_options);
  at::Tensor dweight = at::empty({want_weight ? vocab : 0, width}, acc_options);
  at::Tensor dbias = at::zeros({want_bias ? vocab : 0}, acc_options);
  if (n == 0) return {at::zeros({}, acc_options), nll, jac, dweight.zero_(), dbias};

  const bool second = want_weight || want_bias;
  std::vector<TokenDone<C>> done(second ? n : 0);
  bool packed = width >= 1 && acc_type == at::kFloat &&
                (have_amx() || (have_bf16_dots() && hidden.scalar_type() == at::kBFloat16));
  const Plan plan = make_plan(n, width, vocab, packed ? 32 : 256, want_hidden);
  {
    std::vector<TokenState<C>> states(plan.ranges * n);
    Room<C> sums;
    if (want_hidden) sums = Room<C>(plan.ranges * n * width);
    C* acc = want_hidden ? sums.data() : nullptr;
    if (!gather(call, plan, packed, states.data(), acc)) {
      packed = false;
      states.assign(states.size(), {});
      gather(call, plan, packed, states.data(), acc);
    }
    finish<T, C>(call, plan, states.data(), acc, nll.mutable_data_ptr<C>(),
                 want_hidden ? jac.mutable_data_ptr<HeadRow<T>>() : nullptr, second ? &done : nullptr);
  }
  at::Tensor weights;
  if (token_weights.has_value()) weights = token_weights->to(acc_type).contiguous();
  const C* w = token_weights.has_value() ? weights.const_data_ptr<C>() : nullptr;
  double loss = 0;
  for (int64_t t = 0; t < tokens; t++)
    loss += static_cast<double>(nll.const_data_ptr<C>()[t]) * (w == nullptr ? 1.0 : static_cast<double>(w[t]));
  if (second) {
    for (int64_t i = 0; i < n; i++) done[i].factor = static_cast<C>(scale) * (w == nullptr ? C(1) : w[call.rows[i]]);
    C* dw = want_weight ? dweight.mutable_data_ptr<C>() : nullptr;
    C* db = want_bias ? dbias.mutable_data_ptr<C>() : nullptr;
    weigh(call, packed, done, dw, db);
  }
  return {at::full({}, loss, acc_options), nll, jac, dweight, dbias};
}

Outputs lm_head_loss_fwd(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& token_weights,
                         double softcap, double scale, int64_t /*chunk*/, bool want_hidden, bool want_weight,
                         bool want_bias) {
  switch (hidden.scalar_type()) {
    case at::kDouble:
      return run<double>(hidden, weight, labels, bias, token_weights, softcap, scale, want_hidden, want_weight,
                         want_bias);
    case at::kBFloat16:
      return run<c10::BFloat16>(hidden, weight, labels, bias, token_weights, softcap, scale, want_hidden, want_weight,
                                want_bias);
    case at::kHalf:
      return run<c10::Half>(hidden, weight, labels, bias, token_weights, softcap, scale, want_hidden, want_weight,
                            want_bias);
    default:
      return run<float>(hidden, weight, labels, bias, token_weights, softcap, scale, want_hidden, want_weight,
                        want_bias);
  }
}

}  // namespace
}  // namespace lmvae

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) { m.impl("lm_head_loss_fwd", lmvae::lm_head_loss_fwd); }
