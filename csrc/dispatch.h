// Run-time choice of the instruction set. Files named <op>_simd.cpp are compiled once per instruction set (setup.py),
// each time with LMVAE_ISA naming the namespace; plain files pick one of the copies through LMVAE_DECLARE / LMVAE_PICK.
#pragma once

namespace lmvae {

enum class Isa : int { Default = 0, Avx2 = 1, Avx512 = 2 };

// The best instruction set of this CPU, lowered by LMVAE_CPU_ISA=default|avx2|avx512 (tests run every copy that way).
Isa cpu_isa();

}  // namespace lmvae

#ifdef LMVAE_HAVE_AVX2
// Declares a function in every instruction-set namespace: LMVAE_DECLARE(void rows(const float* x, int64_t n));
#define LMVAE_DECLARE(...)   \
  namespace lmvae::DEFAULT { \
  __VA_ARGS__;               \
  }                          \
  namespace lmvae::AVX2 {    \
  __VA_ARGS__;               \
  }                          \
  namespace lmvae::AVX512 {  \
  __VA_ARGS__;               \
  }
// The function (or, with template arguments, the instance) that suits this CPU.
#define LMVAE_PICK(...)                                                      \
  (::lmvae::cpu_isa() == ::lmvae::Isa::Avx512 ? ::lmvae::AVX512::__VA_ARGS__ \
   : ::lmvae::cpu_isa() == ::lmvae::Isa::Avx2 ? ::lmvae::AVX2::__VA_ARGS__   \
                                              : ::lmvae::DEFAULT::__VA_ARGS__)
#else
#define LMVAE_DECLARE(...)   \
  namespace lmvae::DEFAULT { \
  __VA_ARGS__;               \
  }
#define LMVAE_PICK(...) (::lmvae::DEFAULT::__VA_ARGS__)
#endif
