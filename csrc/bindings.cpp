#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of atp_fast";
    m.attr("__version__") = ATP_FAST_VERSION;
}
