// Working memory of an op.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace lmvae {

// From torch's allocator and allocated by the calling thread, so that profilers
// count it; on a cache line's boundary, wherever the allocator begins.
template <typename T>
class Room {
 public:
  Room() = default;
  explicit Room(int64_t n)
      : memory_(at::empty({n * static_cast<int64_t>(sizeof(T)) + 63}, at::TensorOptions().dtype(at::kByte))) {}
  T* data() const {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data_ptr()) + 63) & ~uintptr_t{63});
  }

 private:
  at::Tensor memory_;
};

}  // namespace lmvae
