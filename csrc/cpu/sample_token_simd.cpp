// sample_token, row by row. Where a filter cuts is found by bisection over the scores, on a list of candidates that
// shrinks at every step: some three passes over the vocabulary in all, exponentials taken once, and no sort. Sums of
// weights are exact (reference.py says why), so neither lanes nor chunks nor the order of bisection can change an id.
#include <limits>
#include <type_traits>

#include "sample_token.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int64_t kChunk = 1024;  // tokens whose weight is summed as one when a draw is located
constexpr int kWays = 32;         // independent running maxima: two registers of AVX-512

// e^x in units that make sums exact.
template <typename A>
LMVAE_INLINE double in_units(A weight, double magic) {
  return (static_cast<double>(weight) + magic) - magic;
}

struct Best {
  int64_t id;
  bool finite;
};

// The first of the largest; a NaN is larger than all, as in torch.argmax.
template <typename A>
Best best(const A* s, int64_t n) {
  A lanes[kWays];
  int nans[kWays] = {};
  std::fill_n(lanes, kWays, -std::numeric_limits<A>::infinity());
  int64_t i = 0;
  for (; i + kWays <= n; i += kWays) {
#pragma omp simd
    for (int l = 0; l < kWays; l++) {
      const A v = s[i + l];
      lanes[l] = v > lanes[l] ? v : lanes[l];
      nans[l] |= v != v;
    }
  }
  A top = -std::numeric_limits<A>::infinity();
  bool nan = false;
  for (int l = 0; l < kWays; l++) {
    top = std::max(top, lanes[l]);
    nan |= nans[l] != 0;
  }
  for (; i < n; i++) {
    top = s[i] > top ? s[i] : top;
    nan |= s[i] != s[i];
  }
  for (i = 0; i < n; i++)
    if (nan ? s[i] != s[i] : s[i] == top) break;
  return {i, !nan && std::isfinite(top)};
}

// Scores of a row: its logits with the penalty; the tensor's own memory where nothing has to be done.
template <typename T>
const acc_t<T>* scores(const SampleTokenArgs& a, int64_t b, bool penalised, acc_t<T>* room) {
  using A = acc_t<T>;
  const T* logits = static_cast<const T*>(a.logits) + b * a.logits_row;
  if constexpr (std::is_same_v<T, A>) {
    if (a.logits_col == 1 && !penalised) return logits;
  }
  load_row(logits, a.logits_col, room, a.vocab);
  if (penalised) {
    const uint8_t* seen = a.seen + b * a.seen_row;
    const A times = static_cast<A>(a.penalty), over = static_cast<A>(1.0 / a.penalty);
    for (int64_t i = 0; i < a.vocab; i++)
      if (seen[i * a.seen_col]) room[i] *= room[i] < 0 ? times : over;
  }
  return room;
}

// Scores and, where they are wanted, the weights e^x beside them.
template <typename A>
struct List {
  A *x, *w;
};

// Keeps what is (not) at least `pivot`, in order; source and target may be one list. Returns how many are left.
template <bool above, bool by_weight, typename A>
int64_t compact(const List<A>& from, int64_t n, A pivot, const List<A>& to) {
  int64_t kept = 0, i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    const __m512 at = _mm512_set1_ps(pivot);
    for (; i + 16 <= n; i += 16) {
      const __m512 v = _mm512_loadu_ps(from.x + i);
      const __mmask16 keep = _mm512_cmp_ps_mask(v, at, above ? _CMP_GE_OQ : _CMP_LT_OQ);
      // compressed in the register and stored whole: what that writes behind the kept ones has been read, or is to come
      if constexpr (by_weight)
        _mm512_storeu_ps(to.w + kept, _mm512_maskz_compress_ps(keep, _mm512_loadu_ps(from.w + i)));
      _mm512_storeu_ps(to.x + kept, _mm512_maskz_compress_ps(keep, v));
      kept += __builtin_popcount(keep);
    }
  }
#endif
  for (; i < n; i++) {
    const A v = from.x[i];
    to.x[kept] = v;
    if constexpr (by_weight) to.w[kept] = from.w[i];
    kept += above ? v >= pivot : v < pivot;
  }
  return kept;
}

// What the candidates from `pivot` upwards measure: their weight, or their number.
template <bool by_weight, typename A>
double measure(const List<A>& list, int64_t n, A pivot, double magic) {
  const A *x = list.x, *w = list.w;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i] >= pivot ? (by_weight ? in_units(w[i], magic) : 1.0) : 0.0;
  return sum;
}

template <typename A>
void range(const A* x, int64_t n, A* low, A* high) {
  A lows[kWays], highs[kWays];
  for (int l = 0; l < kWays; l++) lows[l] = highs[l] = x[0];
  int64_t i = 0;
  for (; i + kWays <= n; i += kWays) {
#pragma omp simd
    for (int l = 0; l < kWays; l++) {
      const A v = x[i + l];
      lows[l] = v < lows[l] ? v : lows[l];
      highs[l] = v > highs[l] ? v : highs[l];
    }
  }
  for (; i < n; i++) {
    lows[0] = std::min(lows[0], x[i]);
    highs[0] = std::max(highs[0], x[i]);
  }
  *low = *std::min_element(lows, lows + kWays);
  *high = *std::max_element(highs, highs + kWays);
}

// The largest candidate from which upwards they measure `need` or more, as all together do. The list of n > 0
// candidates is used up. Every step drops one side of the middle of their range, which is looked up anew when there are
// few or none was dropped.
template <bool by_weight, typename A>
A select(const List<A>& list, int64_t n, double need, double magic) {
  constexpr int64_t kFew = 512;
  double passed = 0;  // measure of what is above all candidates
  A low, high;
  range(list.x, n, &low, &high);
  for (bool tight = true; low != high || !tight;) {
    A pivot = low + (high - low) / 2;
    if (!(pivot > low)) pivot = high;
    const double upper = measure<by_weight>(list, n, pivot, magic);
    const int64_t before = n;
    if (passed + upper >= need) {
      n = compact<true, by_weight>(list, n, pivot, list);
      low = pivot;
    } else {
      passed += upper;
      n = compact<false, by_weight>(list, n, pivot, list);
      high = pivot;
    }
    tight = n <= kFew || n == before;
    if (tight) range(list.x, n, &low, &high);
  }
  return low;
}

// The smallest x that the filters keep.
template <typename A>
A cut(const SampleTokenArgs& a, const List<A>& all, const List<A>& list, double magic) {
  A least = -std::numeric_limits<A>::infinity();
  if (a.top_k > 0 && a.top_k < a.vocab) {
    const int64_t n = compact<true, false>(all, a.vocab, std::numeric_limits<A>::lowest(), list);
    if (n > a.top_k) least = select<false>(list, n, static_cast<double>(a.top_k), magic);
  }
  if (a.top_p < 1.0) {
    // what is lower weighs nothing: 2^-53 is the smallest unit there is
    const int64_t n = compact<true, true>(all, a.vocab, std::max(least, A(-37)), list);
    const double total = measure<true>(list, n, A(-37), magic);
    least = std::max(least, select<true>(list, n, a.top_p * total, magic));
  }
  return a.min_p > 0 ? std::max(least, static_cast<A>(std::log(a.min_p))) : least;
}

// One uniform of 48 bits: the first two words of block `row` of the stream (seed, offset).
double uniform(uint64_t seed, uint64_t offset, int64_t row) {
  uint32_t words[4 * (1 + kLanes)];
  words_fill(words, seed, offset, static_cast<uint64_t>(row), 1);
  return (static_cast<double>(words[0] >> 8) * 0x1p24 + static_cast<double>(words[1] >> 8)) * 0x1p-48;
}

// The first token of a kept x at which the running weight passes u of the whole; -1 when nothing weighs anything.
template <typename A>
int64_t locate(const List<A>& all, int64_t n, A least, double u, double magic, double* chunks) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kChunk) {
    const List<A> chunk{all.x + i, all.w + i};
    total += chunks[i / kChunk] = measure<true>(chunk, std::min(kChunk, n - i), least, magic);
  }
  const double target = u * total;
  double running = 0;
  for (int64_t c = 0; c * kChunk < n; c++) {
    if (running + chunks[c] <= target) {
      running += chunks[c];
      continue;
    }
    for (int64_t i = c * kChunk;; i++)
      if (all.x[i] >= least && (running += in_units(all.w[i], magic)) > target) return i;
  }
  return -1;
}

template <typename A>
float log_probability(const A* s, int64_t n, int64_t id) {
  const Best top = best(s, n);
  const A largest = s[top.id];
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += static_cast<double>(exp_(s[i] - largest));
  return static_cast<float>(static_cast<double>(s[id] - largest) - std::log(sum));
}

int64_t chunks_of(int64_t vocab) { return (vocab + kChunk - 1) / kChunk; }

}  // namespace

template <typename T>
int64_t sample_token_workspace(int64_t vocab) {
  return chunks_of(vocab) * sizeof(double) + 4 * (vocab + 16) * sizeof(acc_t<T>);
}

template <typename T>
void sample_token_rows(const SampleTokenArgs& a, int64_t begin, int64_t end, void* workspace) {
  using A = acc_t<T>;
  const int64_t n = a.vocab;
  auto* chunks = static_cast<double*>(workspace);
  A* x = reinterpret_cast<A*>(chunks + chunks_of(n));
  A* w = x + n + 16;
  const List<A> all{x, w}, list{w + n + 16, w + 2 * (n + 16)};
  int bits = 0;
  while (n >> bits) bits++;
  const double magic = std::ldexp(1.5, bits);
  const A inverse = static_cast<A>(1.0 / a.temperature);
  for (int64_t b = begin; b < end; b++) {
    const A* s = scores<T>(a, b, a.seen != nullptr, x);
    const Best top = best(s, n);
    int64_t id = top.id;
    if (!a.greedy && top.finite) {
      const A largest = s[id];
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        x[i] = (s[i] - largest) * inverse;
        w[i] = exp_(x[i]);
      }
      const double u = uniform(a.seed, a.offset + static_cast<uint64_t>(a.steps[b]), a.rows[b]);
      const int64_t drawn = locate(all, n, cut(a, all, list, magic), u, magic, chunks);
      id = drawn < 0 ? id : drawn;
    }
    a.ids[b] = id;
    if (a.logprob != nullptr) a.logprob[b] = log_probability(scores<T>(a, b, false, x), n, id);
  }
}

#define LMVAE_INSTANTIATE(T)                           \
  template int64_t sample_token_workspace<T>(int64_t); \
  template void sample_token_rows<T>(const SampleTokenArgs&, int64_t, int64_t, void*);
LMVAE_INSTANTIATE(float)
LMVAE_INSTANTIATE(double)
LMVAE_INSTANTIATE(c10::BFloat16)
LMVAE_INSTANTIATE(c10::Half)

}  // namespace lmvae::LMVAE_ISA
