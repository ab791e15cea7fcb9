// The kernels compiled for one instruction set: included once by each isa_*.cpp, inside its
// namespace.

#include "simd.h"
#include "convert.h"
#include "node_effects.h"
#include "add_effects.h"
#include "norm.h"
#include "gate.h"
#include "product.h"
#include "linear.h"
#include "attention.h"
#include "attention_backward.h"

template <typename R>
void exponential(const void* in, void* out, Index count) {
    const R* x = static_cast<const R*>(in);
    R* y = static_cast<R*>(out);
    for (Index i = 0; i < count; i += lanes<R>) {
        R part[lanes<R>] = {};
        const Index n = std::min<Index>(lanes<R>, count - i);
        std::copy(x + i, x + i + n, part);
        store(part, exp<R>(load(part)));
        std::copy(part, part + n, y + i);
    }
}

const Kernels kernels = {
    ATP_FAST_ISA_NAME,
    {attention<float>, attention<double>},
    {attention_backward<float>, attention_backward<double>},
    {node_effects<float>, node_effects<double>},
    {add_effects<float>, add_effects<double>},
    {norm<float>, norm<double>},
    {rotate<float>, rotate<double>},
    {gate_vjp<float>, gate_vjp<double>},
    {linear<float>, linear<double>},
    {exponential<float>, exponential<double>},
};
