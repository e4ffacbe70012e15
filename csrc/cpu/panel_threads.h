// How packed_linear, its int8 form and greedy_head share panels among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include <ATen/Parallel.h>

#include "packed_linear.h"

namespace lmvae {

constexpr int64_t kGrain = 200'000;  // multiplications worth a thread

// Calls run(queue) on every thread; it takes groups of panels until there are none left.
template <typename F>
void on_threads(int64_t rows, int64_t in, int64_t panels, int64_t group, const F& run) {
  PanelQueue queue(panels, group);
  const int64_t worth = rows * in * kLinearPanel * panels / kGrain + 1;
  const int64_t threads = std::min({worth, (panels + group - 1) / group, int64_t{at::get_num_threads()}});
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin++) run(queue);
  });
}

// Calls run(begin, end, following) for panels [begin, end), of which somebody will take `following` after them.
template <typename F>
void panels_in_turn(int64_t rows, int64_t in, int64_t panels, const F& run) {
  constexpr int64_t kTurns = 8;  // of a thread
  const int64_t group = std::max<int64_t>(1, panels / (at::get_num_threads() * kTurns));
  on_threads(rows, in, panels, group, [&](PanelQueue& queue) {
    for (auto mine = queue.take(); mine.begin < mine.end; mine = queue.take())
      run(mine.begin, mine.end, queue.following());
  });
}

// Rows of one pass over a weight on the tiles: at most `most`, of equal passes.
inline int64_t rows_of_a_tile_pass(int64_t rows, int64_t most) {
  const int64_t passes = (rows + most - 1) / most;
  return passes > 1 ? ((rows + passes - 1) / passes + 31) / 32 * 32 : most;
}

}  // namespace lmvae
