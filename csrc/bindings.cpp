// Every line of pybind11 in the project: addresses, strides and sizes in, calls of the chosen
// kernels out. The callers in atp_fast/ops/cpp.py allocate, check, and keep the tensors alive.
#include "common.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;
using namespace atp_fast;

namespace {

// (address, dtype, strides) of a tensor
using Passed = std::tuple<std::uintptr_t, int, std::vector<Index>>;

std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(kernels_avx512());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back(kernels_avx2());
#endif
    found.push_back(kernels_portable());
    return found;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
    if (chosen == nullptr) chosen = available().front();
    return *chosen;
}

std::string use_instruction_set(const std::string& name) {
    const std::string before = kernels().name;
    for (const Kernels* each : available())
        if (name == each->name) {
            chosen = each;
            return before;
        }
    throw std::invalid_argument("this machine has no instruction set '" + name + "'");
}

int slot(Dtype dtype) { return dtype == Dtype::float64; }

void node_effects(const std::vector<Index>& size, const Passed& delta, const Passed& grad,
                  std::uintptr_t weights, std::uintptr_t out, int threads) {
    const auto& [delta_address, delta_dtype, delta_stride] = delta;
    const auto& [grad_address, grad_dtype, grad_stride] = grad;
    NodeEffectsCall call{};
    call.dims = int(size.size()) - 2;
    if (call.dims > max_dims) throw std::invalid_argument("delta has too many axes");
    for (int i = 0; i < call.dims; ++i) {
        call.size[i] = size[i + 1];
        call.delta_stride[i] = delta_stride[i];
        call.grad_stride[i] = grad_stride[i + 1];
    }
    call.cotangents = size.front();
    call.width = size.back();
    call.delta_step = delta_stride.back();
    call.grad_step = grad_stride.back();
    call.grad_cotangent = grad_stride.front();
    call.delta = reinterpret_cast<const void*>(delta_address);
    call.grad = reinterpret_cast<const void*>(grad_address);
    call.delta_dtype = Dtype(delta_dtype);
    call.grad_dtype = Dtype(grad_dtype);
    call.weights = reinterpret_cast<const void*>(weights);
    call.out = reinterpret_cast<void*>(out);
    kernels().node_effects[slot(call.delta_dtype)](call, threads);
}

View view(const Passed& passed) {
    const auto& [address, dtype, stride] = passed;
    View out;
    out.data = reinterpret_cast<void*>(address);
    out.dtype = Dtype(dtype);
    if (stride.size() > 5) throw std::invalid_argument("a tensor has more than 5 axes");
    std::copy(stride.begin(), stride.end(), out.stride);
    return out;
}

template <typename T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// sizes: cotangents, three leading axes, width; grad of nothing: the norm itself
void norm(const std::array<Index, 5>& sizes, const Passed& x, const Passed& grad, const Passed& out,
          const std::array<std::uintptr_t, 5>& rest, double eps, double offset, bool rounded,
          int threads) {
    NormCall call{};
    call.cotangents = sizes[0];
    std::copy(sizes.begin() + 1, sizes.begin() + 4, call.sizes);
    call.width = sizes[4];
    call.x = view(x);
    call.grad = view(grad);
    call.out = view(out);
    const auto& [weight, bias, mean, rstd, before] = rest;
    call.weight = at<void>(weight);
    call.bias = at<void>(bias);
    call.mean = at<void>(mean);
    call.rstd = at<void>(rstd);
    call.before = at<void>(before);
    call.eps = eps;
    call.offset = offset;
    call.rounded = rounded;
    kernels().norm[slot(call.x.dtype)](call, threads);
}

// sizes: outer, batch, heads, positions, dim, rotated
void rotate(const std::array<Index, 6>& sizes, const Passed& x, const Passed& cos,
            const Passed& sin, bool adjoint, const Passed& out, int threads) {
    const RotateCall call{sizes[0], sizes[1],  sizes[2],  sizes[3],  sizes[4], sizes[5],
                          view(x),  view(cos), view(sin), view(out), adjoint};
    kernels().rotate[slot(call.x.dtype)](call, threads);
}

// sizes: cotangents, three leading axes, width
void gate_vjp(const std::array<Index, 5>& sizes, const Passed& gate, const Passed& up,
              const Passed& grad, bool gelu, const Passed& grad_gate, const Passed& grad_up,
              int threads) {
    GateCall call{};
    call.cotangents = sizes[0];
    std::copy(sizes.begin() + 1, sizes.begin() + 4, call.sizes);
    call.width = sizes[4];
    call.gate = view(gate);
    call.up = view(up);
    call.grad = view(grad);
    call.grad_gate = view(grad_gate);
    call.grad_up = view(grad_up);
    call.gelu = gelu;
    kernels().gate_vjp[slot(call.gate.dtype)](call, threads);
}

// sizes: cotangents, batch, positions, width, dim, columns; values are (batch, positions, width,
// dim)
void add_effects(const std::array<Index, 6>& sizes, const Passed& grad, const Passed& clean,
                 const Passed& corrupted, std::uintptr_t weights, std::uintptr_t live,
                 std::uintptr_t first, const Passed& score, std::uintptr_t effect,
                 const Passed& per_pair, std::uintptr_t rows, bool pair_signed, int threads) {
    const auto values = [](const Passed& passed) {
        View out = view(passed);
        std::copy_backward(out.stride, out.stride + 4, out.stride + 5);
        return out;
    };
    const View sums = view(score), pairs = view(per_pair);
    const AddEffectsCall call{sizes[0],
                              sizes[1],
                              sizes[2],
                              sizes[3],
                              sizes[4],
                              sizes[5],
                              view(grad),
                              values(clean),
                              values(corrupted),
                              at<void>(weights),
                              at<std::uint8_t>(live),
                              at<std::int64_t>(first),
                              sums.data,
                              at<void>(effect),
                              sums.stride[0],
                              pairs.data,
                              at<std::int64_t>(rows),
                              pairs.stride[0],
                              pairs.stride[1],
                              pair_signed};
    kernels().add_effects[slot(sums.dtype)](call, threads);
}

// (scale, causal, window or 0, softcap or 0, address of sinks or 0, address of key_mask or 0)
using PassedScoring = std::tuple<double, bool, Index, double, std::uintptr_t, std::uintptr_t>;

AttentionShape shape(const std::array<Index, 7>& sizes, const PassedScoring& scoring) {
    const auto& [batch, heads, kv_heads, queries, keys, head_dim, value_dim] = sizes;
    const auto& [scale, causal, window, softcap, sinks, key_mask] = scoring;
    return {batch,
            heads,
            kv_heads,
            queries,
            keys,
            head_dim,
            value_dim,
            scale,
            causal,
            window,
            softcap,
            at<void>(sinks),
            at<std::uint8_t>(key_mask)};
}

// (wide_z, logsumexp, top_key, loo_logsumexp, loo_z)
using PassedStats = std::array<std::uintptr_t, 5>;

void attention(const std::array<Index, 7>& sizes, const PassedScoring& scoring, const Passed& q,
               const Passed& k, const Passed& v, const Passed& z, const PassedStats& stats,
               int threads) {
    const AttentionCall call{shape(sizes, scoring),
                             view(q),
                             view(k),
                             view(v),
                             view(z),
                             at<void>(stats[0]),
                             at<void>(stats[1]),
                             at<std::int64_t>(stats[2]),
                             at<void>(stats[3]),
                             at<void>(stats[4])};
    kernels().attention[slot(call.q.dtype)](call, threads);
}

void attention_backward(const std::array<Index, 7>& sizes, Index cotangents,
                        const PassedScoring& scoring, const Passed& q, const Passed& k,
                        const Passed& v, const Passed& k_corrupted, const Passed& grad_z,
                        const PassedStats& stats, const Passed& grad_q, const Passed& grad_k,
                        const Passed& grad_v, std::uintptr_t effect_k, int threads) {
    const BackwardCall call{shape(sizes, scoring),
                            cotangents,
                            view(q),
                            view(k),
                            view(v),
                            view(k_corrupted),
                            view(grad_z),
                            at<void>(stats[0]),
                            at<void>(stats[1]),
                            at<std::int64_t>(stats[2]),
                            at<void>(stats[3]),
                            at<void>(stats[4]),
                            view(grad_q),
                            view(grad_k),
                            view(grad_v),
                            at<void>(effect_k)};
    kernels().attention_backward[slot(call.q.dtype)](call, threads);
}

// x (rows, depth) with neighbours along the depth, w (depth, columns), bias's address or 0, out's
void linear(const std::array<Index, 3>& sizes, const Passed& x, const Passed& w,
            std::uintptr_t bias, std::uintptr_t out, int threads) {
    const auto& [rows, columns, depth] = sizes;
    const View left = view(x), right = view(w);
    const LinearCall call{rows,           columns,      depth,           left.data,
                          left.stride[0], right.data,   right.stride[0], right.stride[1],
                          at<void>(bias), at<void>(out)};
    kernels().linear[slot(left.dtype)](call, threads);
}

void exponential(std::uintptr_t in, std::uintptr_t out, Index count, bool wide) {
    kernels().exponential[wide](reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out),
                                count);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.doc() = "CPU kernels of atp_fast";
    m.attr("__version__") = ATP_FAST_VERSION;
    m.def("node_effects", node_effects, release());
    m.def("add_effects", add_effects, release());
    m.def("norm", norm, release());
    m.def("rotate", rotate, release());
    m.def("gate_vjp", gate_vjp, release());
    m.def("attention", attention, release());
    m.def("attention_backward", attention_backward, release());
    m.def("linear", linear, release());
    m.def("exponential", exponential, release());
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* each : available()) names.emplace_back(each->name);
        return names;
    });
    m.def("use_instruction_set", use_instruction_set);
}
