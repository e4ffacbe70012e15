// What the vector headers of csrc/ compute, printed for tools/check_aarch64.py to compare: one value a line, as
// "<name> <index> <value>", floats in hexadecimal. Header-only: no library of torch is linked.
#include <cstdio>

#include "cpu/simd_math.h"

using namespace lmvae::LMVAE_ISA;

static void print(const char* name, int index, double value) { std::printf("%s %d %a\n", name, index, value); }

int main() {
  // the stream, from a block whose number needs both halves of a counter
  constexpr uint64_t kSeed = 0x123456789abcdefull, kOffset = 0xfedcba987ull, kFirst = 0xfffffffeull;
  constexpr int kCount = 16;
  uint32_t words[4 * (kCount + kLanes)];
  float normals[4 * (kCount + kLanes)];
  words_fill(words, kSeed, kOffset, kFirst, kCount);
  normal_fill(normals, kSeed, kOffset, kFirst, kCount);
  for (int i = 0; i < 4 * kCount; i++) {
    print("word", i, words[i]);
    print("normal", i, normals[i]);
  }
  // elementary functions over their ranges, ends included, of arguments that no rounding makes another
  for (int i = 0; i <= 2000; i++) {
    print("exp", i, exp_(-110.0f + 0.125f * static_cast<float>(i)));
    print("tanh", i, tanh_(-8.0f + 0.0078125f * static_cast<float>(i)));
  }
  // rounding to halves: ties, subnormal and overflowing values
  float values[] = {1.00390625f, 1.01171875f, 1e-40f, 65519.9f, 65520.0f, 3e38f, -2.5f, 6e-8f};
  c10::BFloat16 brain[8];
  c10::Half half[8];
  store_row(values, brain, 8);
  store_row(values, half, 8);
  float back[8];
  load_unit(brain, back, 8);
  for (int i = 0; i < 8; i++) print("bfloat16", i, back[i]);
  load_unit(half, back, 8);
  for (int i = 0; i < 8; i++) print("float16", i, back[i]);
  // a block of as many vectors as one has lanes, turned
  Register<float> block[Lanes<float>::count];
  for (int i = 0; i < Lanes<float>::count; i++)
    for (int l = 0; l < Lanes<float>::count; l++) block[i][l] = static_cast<float>(100 * i + l);
  transpose_block<float>(block);
  for (int i = 0; i < Lanes<float>::count; i++)
    for (int l = 0; l < Lanes<float>::count; l++) print("turned", 100 * l + i, block[i][l]);
  return 0;
}
