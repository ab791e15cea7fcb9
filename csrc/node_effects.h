// I = sum over the last axis of delta * grad, per cotangent; with weights, sum over cotangents of w |I|.
// One pass: a run of rows of delta stays in the first-level cache while each gradient is read once.
// Sums run in the accumulation type (float for narrow inputs): a row has at most some hundred terms.
// Included once per instruction set, inside that set's namespace (isa_*.cpp): no include guard.

template <typename R> struct NodeEffects {
    static constexpr Index run = 256;      // rows per unit: fixed, so that no result depends on the threads
    static constexpr Index strip = 4096;   // elements per unit when the summed axis has length 1

    NodeEffectsCall call;
    Index rows, units;
    char* scratch;
    Index scratch_stride;

    // Drops axes of length 1 and joins neighbours that step as one.
    void join() {
        int kept = 0;
        for (int i = 0; i < call.dims; ++i) {
            if (call.size[i] == 1) continue;
            const bool joins = kept > 0 &&
                               call.delta_stride[kept - 1] == call.size[i] * call.delta_stride[i] &&
                               call.grad_stride[kept - 1] == call.size[i] * call.grad_stride[i];
            const int at = joins ? kept - 1 : kept++;
            call.size[at] = (joins ? call.size[at] : 1) * call.size[i];
            call.delta_stride[at] = call.delta_stride[i];
            call.grad_stride[at] = call.grad_stride[i];
        }
        if (kept == 0) {
            call.size[0] = 1;
            call.delta_stride[0] = call.grad_stride[0] = 0;
            kept = 1;
        }
        call.dims = kept;
    }

    // Element offsets of a row given by its number over the first `dims` axes.
    void offsets(Index number, int dims, Index& delta, Index& grad) const {
        delta = grad = 0;
        for (int i = dims - 1; i >= 0; --i) {
            const Index at = number % call.size[i];
            number /= call.size[i];
            delta += at * call.delta_stride[i];
            grad += at * call.grad_stride[i];
        }
    }

    ATP_FAST_INLINE static R dot(const R* a, const R* b, Index count) {
        constexpr int w = lanes<R>;
        Vec<R> sums[2] = {};
        Index i = 0;
        for (; i + 2 * w <= count; i += 2 * w) {
            sums[0] += load(a + i) * load(b + i);
            sums[1] += load(a + i + w) * load(b + i + w);
        }
        if (i + w <= count) {
            sums[0] += load(a + i) * load(b + i);
            i += w;
        }
        R sum = horizontal_sum<R>(sums[0] + sums[1]);
        for (; i < count; ++i) sum += a[i] * b[i];
        return sum;
    }

    void rows_unit(Index unit, R* buffer) const {
        const Index first = unit * run, count = std::min(run, rows - first);
        Index delta_at[run], grad_at[run];
        for (Index r = 0; r < count; ++r) offsets(first + r, call.dims, delta_at[r], grad_at[r]);
        R* out = static_cast<R*>(call.out) + first;
        const R* weights = static_cast<const R*>(call.weights);
        if (weights) std::fill(out, out + count, R(0));
        for (Index c = 0; c < call.cotangents; ++c) {
            for (Index r = 0; r < count; ++r) {
                const R* d = row(buffer, call.delta, call.delta_dtype, delta_at[r], call.delta_step, call.width);
                const R* g = row(buffer + call.width, call.grad, call.grad_dtype,
                                 grad_at[r] + c * call.grad_cotangent, call.grad_step, call.width);
                const R effect = dot(d, g, call.width);
                if (weights)
                    out[r] += weights[c] * std::abs(effect);
                else
                    out[c * rows + r] = effect;
            }
        }
    }

    // The summed axis has length 1: neurons. Strips along the innermost axis instead of rows.
    void strip_unit(Index unit, R* buffer) const {
        const int inner = call.dims - 1;
        const Index length = call.size[inner], strips = (length + strip - 1) / strip;
        const Index line = unit / strips, first = unit % strips * strip;
        const Index count = std::min(strip, length - first);
        Index delta_at, grad_at;
        offsets(line, inner, delta_at, grad_at);
        delta_at += first * call.delta_stride[inner];
        grad_at += first * call.grad_stride[inner];
        const R* d = row(buffer, call.delta, call.delta_dtype, delta_at, call.delta_stride[inner], count);
        R* out = static_cast<R*>(call.out) + line * length + first;
        const R* weights = static_cast<const R*>(call.weights);
        if (weights) std::fill(out, out + count, R(0));
        for (Index c = 0; c < call.cotangents; ++c) {
            const R* g = row(buffer + strip, call.grad, call.grad_dtype, grad_at + c * call.grad_cotangent,
                             call.grad_stride[inner], count);
            if (weights) {
                const R w = weights[c];
                for (Index i = 0; i < count; ++i) out[i] += w * std::abs(d[i] * g[i]);
            } else {
                R* signed_out = out + c * rows;
                for (Index i = 0; i < count; ++i) signed_out[i] = d[i] * g[i];
            }
        }
    }

    static void unit(void* context, Index number, int thread) {
        const auto& self = *static_cast<const NodeEffects*>(context);
        R* buffer = reinterpret_cast<R*>(self.scratch + thread * self.scratch_stride);
        self.call.width == 1 ? self.strip_unit(number, buffer) : self.rows_unit(number, buffer);
    }
};

template <typename R> void node_effects(const NodeEffectsCall& call, int threads) {
    NodeEffects<R> self{call, 1, 0, nullptr, 0};
    for (int i = 0; i < call.dims; ++i) self.rows *= call.size[i];
    if (self.rows == 0) return;
    self.join();
    const Index inner = self.call.size[self.call.dims - 1];
    self.units = call.width == 1 ? self.rows / inner * ((inner + self.strip - 1) / self.strip)
                                 : (self.rows + self.run - 1) / self.run;
    self.scratch_stride = (2 * std::max(call.width, self.strip) * Index(sizeof(R)) + 63) / 64 * 64;
    threads = int(std::min<Index>(std::max(threads, 1), self.units));
    Scratch scratch(self.scratch_stride * threads);
    self.scratch = scratch.data();
    parallel(self.units, threads, NodeEffects<R>::unit, &self);
}
