#include "amx.h"

#include "cpu_features.h"

#ifdef LMVAE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lmvae {

#ifdef LMVAE_AMX
bool have_amx() {
  static const bool have = [] {
    if (cpu_isa() != Isa::Avx512 || cpu_cap() < Feature::Amx) return false;  // LMVAE_CPU_ISA lowers this engine too
    uint32_t a = 7, b = 0, c = 0, d = 0;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (((d >> 22) & (d >> 24) & (d >> 25) & 1) == 0) return false;  // amx_bf16, amx_tile, amx_int8
    a = 7, c = 1;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (((a >> 5) & 1) == 0) return false;  // avx512_bf16
    constexpr int kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return have;
}
#else
bool have_amx() { return false; }
#endif

}  // namespace lmvae
