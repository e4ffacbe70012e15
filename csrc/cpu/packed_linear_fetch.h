// The next piece of a weight on its way from memory while another is multiplied: 16 KB, whatever its numbers are.
#pragma once

#include <cstdint>

namespace lmvae {
namespace {

// In every 32nd of a pass over the piece that is multiplied, its share of the next one's lines, one of every page:
// prefetchers follow streams within a page, and several streams have more lines on their way than one after another.
struct Fetch {
  static constexpr int kPage = 4096, kPages = 4;
  static constexpr int kRounds = kPage / 64 / 32;
  const char* at;
  int passes;  // over the piece that is multiplied: it goes by once a tile
  int due = 0;
  __attribute__((always_inline)) void operator()() {
    for (due += kRounds; due >= passes; due -= passes, at += 64)
#pragma GCC unroll 4
      for (int page = 0; page < kPages; page++) __builtin_prefetch(at + page * kPage, 0, 2);
  }
};

}  // namespace
}  // namespace lmvae
