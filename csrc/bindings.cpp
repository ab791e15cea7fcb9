// Every line of pybind11 in the project: addresses, strides and sizes in, calls of the chosen kernels out.
// The callers in atp_fast/ops/cpp.py allocate, check, and keep the tensors alive.
#include "common.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
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
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(kernels_avx2());
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

void exponential(std::uintptr_t in, std::uintptr_t out, Index count, bool wide) {
    kernels().exponential[wide](reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), count);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.doc() = "CPU kernels of atp_fast";
    m.attr("__version__") = ATP_FAST_VERSION;
    m.def("node_effects", node_effects, release());
    m.def("exponential", exponential, release());
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* each : available()) names.emplace_back(each->name);
        return names;
    });
    m.def("use_instruction_set", use_instruction_set);
}
