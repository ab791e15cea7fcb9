// The kernels for AVX2. Everything from elsewhere is included before the target is raised, so that
// no shared inline function is compiled for it.
#include "common.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <type_traits>

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif

#define ATP_FAST_VECTOR_BYTES 32
#define ATP_FAST_REGISTERS 16
#define ATP_FAST_ISA_NAME "avx2"

namespace atp_fast {
namespace {
#include "isa.h"
}  // namespace
const Kernels* kernels_avx2() { return &kernels; }
}  // namespace atp_fast

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

const atp_fast::Kernels* atp_fast::kernels_avx2() { return nullptr; }

#endif
