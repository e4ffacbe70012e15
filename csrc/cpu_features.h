// What this CPU has beyond the instruction set that files are compiled for (dispatch.h): single functions use it.
#pragma once

#include "dispatch.h"

namespace lmvae {

// A ladder: whoever has a rung has those below it, too.
enum class Feature : int { Default, Avx2, Avx512, Avx512Vnni, Avx512Bf16, Amx };

// The most that LMVAE_CPU_ISA=default|avx2|avx512|avx512_vnni|avx512_bf16 allows (tests run every copy that way).
Feature cpu_cap();
// Dot products of bytes (AVX512-VNNI) and of bf16 (AVX512-BF16), where they are allowed. AMX: have_amx of cpu/amx.h.
bool have_byte_dots();
bool have_bf16_dots();

}  // namespace lmvae
