// lm_head_loss: one thread's matrix products on the AMX tiles (x86 with amx_bf16), written directly because the
// products here are small, their operands are reused while they sit in the second-level cache, and sums must stay fp32.
// bf16 has a second unit for the same packed operands: the dot products of AVX512-BF16, where there are no tiles.
//
// A number is a sum of bf16 parts: one for bf16, two for fp16, three for fp32 (8 + 8 + 8 bits: all of its 24). Products
// of parts i and j are taken where i + j < parts: 1, 3 and 6 tile products. What is left out is below
// 2^-16 of an fp16 product and 2^-24 of an fp32 one, and the tiles add 16 products at a time to their fp32 sums, so
// fp32 comes out about as exact as from an fp32 BLAS (tests/kernels/test_lm_head_loss.py holds it to the error rule).
// An infinite number has no such sum: sets with one are refused and the caller uses the BLAS.
#include "lm_head_loss.h"

#include "amx.h"
#include "bf16_dots.h"
#include "cpu_features.h"

#ifdef LMVAE_AMX
#include <algorithm>
#include <memory>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#endif

namespace lmvae {

#ifdef LMVAE_AMX
namespace {

// 32 numbers as `parts` vectors of 32 bf16; bad marks numbers that have no finite parts.
template <int parts>
TILES_INLINE void split(__m512 low, __m512 high, __m512i* out, __mmask16* bad) {
  for (int p = 0; p < parts; p++) {
    const __m512i h = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    out[p] = h;
    if (p + 1 == parts) break;
    low = _mm512_sub_ps(low,
                        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(h)), 16)));
    high = _mm512_sub_ps(
        high, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(h, 1)), 16)));
    if (p == 0)
      *bad |= _mm512_fpclass_ps_mask(low, 0x99) | _mm512_fpclass_ps_mask(high, 0x99);  // Inf - Inf, NaN, overflow
  }
}

TILES_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}

// 32 numbers from x, of which n exist (the rest are 0)
template <int parts>
TILES_INLINE void load_parts(const c10::BFloat16* x, int64_t n, __m512i* out, __mmask16*) {
  out[0] = n >= 32 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16(n <= 0 ? 0u : (1u << n) - 1, x);
}
template <int parts>
TILES_INLINE void load_parts(const c10::Half* x, int64_t n, __m512i* out, __mmask16* bad) {
  const __m512i all = n >= 32 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16(n <= 0 ? 0u : (1u << n) - 1, x);
  split<parts>(_mm512_cvtph_ps(_mm512_castsi512_si256(all)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(all, 1)), out,
               bad);
}
template <int parts>
TILES_INLINE void load_parts(const float* x, int64_t n, __m512i* out, __mmask16* bad) {
  split<parts>(_mm512_maskz_loadu_ps(first_lanes(n), x), _mm512_maskz_loadu_ps(first_lanes(n - 16), x + 16), out, bad);
}

// 16 x 16 dwords, rows to columns
TILES_INLINE void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// In place: right operand tiles of a matrix become left operand tiles of its transpose.
TILES void transpose_tiles(char* tiles, int64_t count) {
  for (int64_t n = 0; n < count; n++, tiles += kTile) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tiles + 64 * i);
    transpose(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(tiles + 64 * i, r[i]);
  }
}

// Places of a matrix's tiles: bytes from one step of 32 rows, and from one step of 32 columns, to the next.
struct Layout {
  int64_t row_step, column_step;
};

// Packs rows x columns numbers (both filled up with zeros to multiples of 32), row i at x + index(i) * stride.
//   left:  the matrix as left operand, depth along its columns        (null: not wanted)
//   flip:  its transpose as right operand, depth along its columns    (null: not wanted)
//   right: the matrix as right operand, depth along its rows          (null: not wanted)
template <int parts, typename T>
TILES bool pack(const T* x, const int64_t* index, int64_t stride, int64_t rows, int64_t columns, char* left, Layout l,
                char* flip, Layout f, char* right, Layout r) {
  alignas(64) static const uint16_t kInterleaveLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kInterleaveLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __mmask16 bad = 0;
  for (int64_t i0 = 0; i0 < (rows + 31) / 32 * 32; i0 += 16) {
    const int64_t half = i0 / 16 % 2;
    for (int64_t k = 0; k < (columns + 31) / 32; k++) {
      __m512i v[16][parts];
      for (int64_t i = 0; i < 16; i++) {
        if (i0 + i < rows) {
          const int64_t at = index == nullptr ? i0 + i : index[i0 + i];
          load_parts<parts>(x + at * stride + 32 * k, columns - 32 * k, v[i], &bad);
        } else {
          for (int p = 0; p < parts; p++) v[i][p] = _mm512_setzero_si512();
        }
      }
      if (left != nullptr) {
        char* to = left + i0 / 32 * l.row_step + k * l.column_step + half * kTile;
        for (int p = 0; p < parts; p++)
          for (int i = 0; i < 16; i++) _mm512_store_si512(to + p * kPair + i * 64, v[i][p]);
      }
      if (right != nullptr) {
        char* to = right + i0 / 32 * r.row_step + k * r.column_step + half * 8 * 64;
        for (int p = 0; p < parts; p++) {
          for (int i = 0; i < 8; i++) {
            _mm512_store_si512(to + p * kPair + i * 64, _mm512_permutex2var_epi16(v[2 * i][p], low, v[2 * i + 1][p]));
            _mm512_store_si512(to + p * kPair + kTile + i * 64,
                               _mm512_permutex2var_epi16(v[2 * i][p], high, v[2 * i + 1][p]));
          }
        }
      }
      if (flip != nullptr) {
        char* to = flip + i0 / 32 * f.row_step + k * f.column_step + half * kTile;
        for (int p = 0; p < parts; p++) {
          __m512i t[16];
          for (int i = 0; i < 16; i++) t[i] = v[i][p];
          transpose(t);
          for (int i = 0; i < 16; i++) _mm512_store_si512(to + p * kPair + i * 64, t[i]);
        }
      }
    }
  }
  return bad == 0;
}

struct Tiles {
  static void enter() { configure_tiles(); }
  static void leave() { release_tiles(); }
  template <int parts>
  static void product(const char* a, const char* b, int64_t steps, float* c, int64_t ldc, bool add) {
    product32<parts>(a, b, steps, c, ldc, add);
  }
};

struct Dots {
  static void enter() {}
  static void leave() {}
  template <int parts>
  static void product(const char* a, const char* b, int64_t steps, float* c, int64_t ldc, bool add) {
    static_assert(parts == 1, "with more than one part fp32 vectors are faster");
    dots32(a, b, steps, c, ldc, add);
  }
};

template <typename T, int parts, typename Unit>
class PackedEngine final : public HeadEngine<float> {
 public:
  PackedEngine(const HeadProblem& problem, int64_t tokens, Product next)
      : p_(problem), depth_((p_.width + 31) / 32), next_(next) {
    const int64_t tiles = (tokens + 31) / 32, panels = block_columns() / 32, pair = parts * kPair;
    left_ = Room<char>(tiles * depth_ * pair);
    flip_ = Room<char>(panels * depth_ * pair);
    if (next == Product::Hidden) {
      acc_ = Room<float>(tiles * 32 * ld_acc());
      block_right_ = Room<char>(panels * depth_ * pair);
      softmax_ = Room<char>(panels * pair);
    }
    if (next == Product::Weight) {
      right_ = Room<char>(tiles * depth_ * pair);
      gradient_ = Room<char>(tiles * panels * pair);
    }
  }
  void enter() override { Unit::enter(); }
  void leave() override { Unit::leave(); }
  int64_t tile_tokens() const override { return 32; }
  // One packed form of a block at a time is in use; it may fill about 600 kB of the second-level cache (2 MB where
  // there is AMX), beside what streams through: tokens, and the sums.
  int64_t phase_tokens() const override { return 512; }
  int64_t block_columns() const override {
    const int64_t fit = (int64_t{600} << 10) / (2 * parts * depth_ * 32);
    return std::min<int64_t>(std::max<int64_t>(fit / 32 * 32, 64), 256);
  }

  bool set_tokens(const int64_t* rows, int64_t count) override {
    steps_ = (count + 31) / 32;
    if (next_ == Product::Hidden) std::memset(acc_.data(), 0, steps_ * 32 * ld_acc() * 4);
    return pack<parts>(static_cast<const T*>(p_.hidden), rows, p_.hidden_row, count, p_.width, left_.data(),
                       {depth_ * parts * kPair, parts * kPair}, nullptr, {},
                       next_ == Product::Weight ? right_.data() : nullptr, {parts * kPair, steps_ * parts * kPair});
  }

  bool set_block(int64_t first, int64_t count) override {
    columns_ = count;
    panels_ = (count + 31) / 32;
    return pack<parts>(static_cast<const T*>(p_.weight) + first * p_.weight_row, nullptr, p_.weight_row, count,
                       p_.width, nullptr, {}, flip_.data(), {depth_ * parts * kPair, parts * kPair},
                       next_ == Product::Hidden ? block_right_.data() : nullptr,
                       {parts * kPair, panels_ * parts * kPair});
  }

  void scores(int64_t t0, int64_t, float* s, int64_t ld) override {
    const char* a = left_.data() + t0 / 32 * depth_ * parts * kPair;
    for (int64_t j = 0; j < panels_; j++)
      Unit::template product<parts>(a, flip_.data() + j * depth_ * parts * kPair, depth_, s + 32 * j, ld, false);
  }

  void accumulate(int64_t t0, int64_t count, const float* alpha, const float* p, int64_t ld) override {
    float* acc = acc_.data() + t0 * ld_acc();
    for (int64_t i = 0; i < count; i++) {
      if (alpha[i] == 1.0f) continue;
      for (int64_t k = 0; k < ld_acc(); k++) acc[i * ld_acc() + k] *= alpha[i];
    }
    char* left = softmax_.data();
    pack<parts>(p, nullptr, ld, count, columns_, left, {0, parts * kPair}, nullptr, {}, nullptr, {});
    for (int64_t k = 0; k < depth_; k++)
      Unit::template product<parts>(left, block_right_.data() + k * panels_ * parts * kPair, panels_, acc + 32 * k,
                                    ld_acc(), true);
  }

  const float* acc_row(int64_t t) const override { return acc_.data() + t * ld_acc(); }

  void take_gradient(int64_t t0, int64_t count, const float* g, int64_t ld) override {
    char* to = gradient_.data() + t0 / 32 * parts * kPair;
    const Layout panel_by_panel{0, steps_ * parts * kPair};
    pack<parts>(g, nullptr, ld, count, columns_, nullptr, {}, nullptr, {}, to, panel_by_panel);
    for (int64_t j = 0; j < panels_; j++, to += steps_ * parts * kPair) transpose_tiles(to, 2 * parts);
  }

  void weight_gradient(float* dw, bool add) override {
    alignas(64) float c[32 * 32];
    for (int64_t j = 0; j < panels_; j++) {
      for (int64_t k = 0; k < depth_; k++) {
        Unit::template product<parts>(gradient_.data() + j * steps_ * parts * kPair,
                                      right_.data() + k * steps_ * parts * kPair, steps_, c, 32, false);
        const int64_t rows = std::min<int64_t>(32, columns_ - 32 * j), width = std::min<int64_t>(32, p_.width - 32 * k);
        for (int64_t i = 0; i < rows; i++) {
          float* to = dw + (32 * j + i) * p_.width + 32 * k;
          for (int64_t x = 0; x < width; x++) to[x] = add ? to[x] + c[32 * i + x] : c[32 * i + x];
        }
      }
    }
  }

 private:
  int64_t ld_acc() const { return 32 * depth_ + 16; }  // the 16 keeps rows of a tile out of each other's cache sets

  HeadProblem p_;
  int64_t depth_, steps_ = 0, columns_ = 0, panels_ = 0;  // of 32: width, the group's tokens; the block's rows, of 32
  Product next_;
  Room<char> left_, right_, flip_, block_right_, softmax_, gradient_;
  Room<float> acc_;
};

}  // namespace

std::unique_ptr<HeadEngine<float>> make_packed_engine(const HeadProblem& p, int64_t tokens, Product next) {
  const bool half = p.dtype == c10::ScalarType::BFloat16;
  if (!have_amx())
    return half && have_bf16_dots() ? std::make_unique<PackedEngine<c10::BFloat16, 1, Dots>>(p, tokens, next) : nullptr;
  switch (p.dtype) {
    case c10::ScalarType::BFloat16: return std::make_unique<PackedEngine<c10::BFloat16, 1, Tiles>>(p, tokens, next);
    case c10::ScalarType::Half: return std::make_unique<PackedEngine<c10::Half, 2, Tiles>>(p, tokens, next);
    default: return std::make_unique<PackedEngine<float, 3, Tiles>>(p, tokens, next);
  }
}
#else
std::unique_ptr<HeadEngine<float>> make_packed_engine(const HeadProblem&, int64_t, Product) { return nullptr; }
#endif

}  // namespace lmvae
