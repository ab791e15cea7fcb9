// The adjoint of gated units, y = activation(gate) * up, for many cotangents: what multiplies them
// is computed once per row. A unit is a fixed run of rows (norm.h), so that no result depends on
// the number of threads. Included once per instruction set, inside that set's namespace
// (isa_*.cpp): no include guard.

template <typename R>
struct GateVjp {
    GateCall call;
    char* scratch;
    Index scratch_stride;

    Index rows() const { return call.sizes[0] * call.sizes[1] * call.sizes[2]; }
    // of a row in the buffer: whole vectors
    Index room() const { return round_up(call.width, lanes<R>); }

    // value = activation(x), slope = its derivative times up; x and value may be one
    void factors(const R* x, const R* up, R* value, R* slope) const {
        const Vec<R> one = Vec<R>{} + R(1), zero{};
        const R twice = R(1.5957691216057308);  // 2 sqrt(2 / pi)
        for (Index i = 0; i < call.width; i += lanes<R>) {
            const Vec<R> g = load(x + i);
            const Vec<R> u = call.gelu ? twice * (g + R(0.044715) * g * g * g) : g;
            const Vec<R> s = one / (one + exp<R>(zero - u));
            const Vec<R> inner = call.gelu ? twice * (one + R(0.134145) * g * g) : one;
            store(value + i, g * s);
            store(slope + i, (s + g * s * (one - s) * inner) * load(up + i));
        }
    }

    void row_of_all(Index number, R* buffer) const {
        const Index width = call.width;
        R *value = buffer, *up = value + room(), *slope = up + room(), *grad = slope + room();
        R* out = grad + room();
        const auto at = [&](const View& v) { return row_offset(v, call.sizes, number); };
        read_row(value, call.gate.data, call.gate.dtype, at(call.gate), call.gate.stride[4], width);
        read_row(up, call.up.data, call.up.dtype, at(call.up), call.up.stride[4], width);
        factors(value, up, value, slope);
        for (Index c = 0; c < call.cotangents; ++c) {
            const R* g = row(grad, call.grad.data, call.grad.dtype,
                             at(call.grad) + c * call.grad.stride[0], call.grad.stride[4], width);
            for (Index i = 0; i < width; ++i) out[i] = g[i] * slope[i];
            write_row(call.grad_gate, at(call.grad_gate) + c * call.grad_gate.stride[0], out,
                      width);
            for (Index i = 0; i < width; ++i) out[i] = g[i] * value[i];
            write_row(call.grad_up, at(call.grad_up) + c * call.grad_up.stride[0], out, width);
        }
    }

    static void unit(void* context, Index number, int thread) {
        const auto& self = *static_cast<const GateVjp*>(context);
        R* buffer = reinterpret_cast<R*>(self.scratch + thread * self.scratch_stride);
        const Index end = std::min((number + 1) * rows_per_unit, self.rows());
        for (Index r = number * rows_per_unit; r < end; ++r) self.row_of_all(r, buffer);
    }
};

template <typename R>
void gate_vjp(const GateCall& call, int threads) {
    GateVjp<R> self{call, nullptr, 0};
    const Index units = divide_up(self.rows(), rows_per_unit);
    if (units == 0 || call.width == 0) return;
    self.scratch_stride = round_up(5 * self.room() * Index(sizeof(R)), 64);
    threads = int(std::min<Index>(std::max(threads, 1), units));
    Scratch scratch(self.scratch_stride * threads);
    self.scratch = scratch.data();
    // what lies behind a row's end is computed with, and not written
    std::fill(scratch.data(), scratch.data() + self.scratch_stride * threads, char(0));
    parallel(units, threads, GateVjp<R>::unit, &self);
}
