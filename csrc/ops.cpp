// What the library knows about itself. Schemas are defined in Python (kernels/<op>/op.py), so that they exist without
// this library; csrc/cpu/<op>.cpp only adds CPU implementations with TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m).
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include <torch/library.h>

#include "cpu/amx.h"
#include "cpu_features.h"

namespace lmvae {

Feature cpu_cap() {
  static const Feature cap = [] {
    const char* const names[] = {"default", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};
    const char* given = std::getenv("LMVAE_CPU_ISA");
    if (given != nullptr)
      for (int i = 0; i < 5; i++)
        if (std::strcmp(given, names[i]) == 0) return static_cast<Feature>(i);
    return Feature::Amx;
  }();
  return cap;
}

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
    return static_cast<Isa>(std::min(static_cast<int>(best), static_cast<int>(cpu_cap())));
  }();
  return isa;
}

bool have_byte_dots() {
#ifdef LMVAE_HAVE_AVX2
  static const bool have =
      cpu_isa() == Isa::Avx512 && cpu_cap() >= Feature::Avx512Vnni && __builtin_cpu_supports("avx512vnni");
  return have;
#else
  return false;
#endif
}

bool have_bf16_dots() {
#ifdef LMVAE_HAVE_AVX2
  static const bool have =
      cpu_isa() == Isa::Avx512 && cpu_cap() >= Feature::Avx512Bf16 && __builtin_cpu_supports("avx512bf16");
  return have;
#else
  return false;
#endif
}

static std::string isa_name() {
  switch (cpu_isa()) {
    case Isa::Avx512: return "avx512";
    case Isa::Avx2: return "avx2";
    default: return "default";
  }
}

// The best of what single functions use beyond it, or the same.
static std::string extension_name() {
  if (have_amx()) return "amx";
  if (have_bf16_dots()) return "avx512_bf16";
  return have_byte_dots() ? "avx512_vnni" : isa_name();
}

}  // namespace lmvae

TORCH_LIBRARY_FRAGMENT(lmvae_fast, m) {
  m.def("cpu_isa() -> str", &lmvae::isa_name);
  m.def("cpu_extension() -> str", &lmvae::extension_name);
}
