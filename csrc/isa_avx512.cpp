// The kernels for AVX512. Everything from elsewhere is included before the target is raised, so
// that no shared inline function is compiled for it.
#include "common.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <type_traits>

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")
#endif

#define ATP_FAST_VECTOR_BYTES 64
#define ATP_FAST_REGISTERS 32
#define ATP_FAST_ISA_NAME "avx512"

namespace atp_fast {
namespace {
#include "isa.h"
}  // namespace
const Kernels* kernels_avx512() { return &kernels; }
}  // namespace atp_fast

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

const atp_fast::Kernels* atp_fast::kernels_avx512() { return nullptr; }

#endif
