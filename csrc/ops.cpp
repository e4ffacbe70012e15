// What the library knows about itself. Schemas are defined in Python (kernels/<op>/op.py), so that they exist without
// this library; csrc/cpu/<op>.cpp only adds CPU implementations with TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m).
#include <cstdlib>
#include <cstring>
#include <string>

#include <torch/library.h>

#include "dispatch.h"

namespace lmvae {

Isa cpu_isa() {
  static const Isa isa = [] {
    Isa best = Isa::Default;
#ifdef LMVAE_HAVE_AVX2
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      best = Isa::Avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        best = Isa::Avx512;
      }
    }
#endif
    const char* cap = std::getenv("LMVAE_CPU_ISA");
    if (cap != nullptr && std::strcmp(cap, "default") == 0) best = Isa::Default;
    if (cap != nullptr && std::strcmp(cap, "avx2") == 0 && best == Isa::Avx512) best = Isa::Avx2;
    return best;
  }();
  return isa;
}

static std::string isa_name() {
  switch (cpu_isa()) {
    case Isa::Avx512: return "avx512";
    case Isa::Avx2: return "avx2";
    default: return "default";
  }
}

}  // namespace lmvae

TORCH_LIBRARY_FRAGMENT(lmvae_fast, m) { m.def("cpu_isa() -> str", &lmvae::isa_name); }
