#include "keep_masks.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <utility>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

namespace lmvae {
namespace {

constexpr int64_t kKeptBytes = 32 << 20;
constexpr int64_t kGrain = 50'000;  // elements worth a thread

// The latest masks, the last used in front.
class Masks {
 public:
  at::Tensor find(const KeepMaskKey& key) {
    const std::lock_guard<std::mutex> guard(lock_);
    for (auto it = masks_.begin(); it != masks_.end(); ++it)
      if (it->first == key) {
        std::rotate(masks_.begin(), it, it + 1);
        return masks_.front().second;
      }
    return {};
  }
  void add(const KeepMaskKey& key, const at::Tensor& mask) {
    if (static_cast<int64_t>(mask.nbytes()) > kKeptBytes) return;
    const std::lock_guard<std::mutex> guard(lock_);
    masks_.emplace_front(key, mask);
    int64_t bytes = 0;
    size_t count = 0;
    for (; count < masks_.size(); count++)
      if ((bytes += static_cast<int64_t>(masks_[count].second.nbytes())) > kKeptBytes) break;
    masks_.resize(count);
  }

 private:
  std::mutex lock_;
  std::deque<std::pair<KeepMaskKey, at::Tensor>> masks_;
};

}  // namespace

at::Tensor keep_mask(const KeepMaskKey& key) {
  static Masks* const masks = new Masks;  // never destroyed: torch's allocator may be gone by then
  if (at::Tensor found = masks->find(key); found.defined()) return found;
  const int64_t rows = key.groups * key.batch;
  at::Tensor mask = at::empty({rows * key.words()}, at::kLong);
  auto* bits = reinterpret_cast<uint64_t*>(mask.mutable_data_ptr<int64_t>());
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / (key.cols + 1)),
                   [&](int64_t begin, int64_t end) { LMVAE_PICK(keep_mask_rows(key, begin, end, bits)); });
  masks->add(key, mask);
  return mask;
}

}  // namespace lmvae
