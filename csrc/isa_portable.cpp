// The kernels for any processor: 16-byte vectors, which every compiler maps to what the target has.
#include "common.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <type_traits>

#define ATP_FAST_VECTOR_BYTES 16
#if defined(__aarch64__)
#define ATP_FAST_REGISTERS 32
#else
#define ATP_FAST_REGISTERS 16
#endif
#define ATP_FAST_ISA_NAME "portable"

namespace atp_fast {
namespace {
#include "isa.h"
}  // namespace
const Kernels* kernels_portable() { return &kernels; }
}  // namespace atp_fast
