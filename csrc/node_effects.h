// I = sum over the last axis of delta * grad, per cotangent; with weights, sum over cotangents of w
// |I|. One pass: a run of rows of delta stays in the cache while each gradient is read once,
// several cotangents side by side, because one stream alone does not fill the memory's bandwidth.
// Sums run in the accumulation type (float for narrow inputs): a row has at most some hundred
// terms. Included once per instruction set, inside that set's namespace (isa_*.cpp): no include
// guard.

template <typename R>
struct NodeEffects {
    static constexpr Index run =
        256;  // rows per unit: fixed, so that no result depends on the threads
    static constexpr int abreast = 4;     // at a time; 1 takes 40 % longer, 2 15 %, 12 20 %
    static constexpr Index strip = 4096;  // elements per unit when the summed axis has length 1

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

    // effects[i] = sum over d of a[d] b[i][d]
    template <int N>
    ATP_FAST_INLINE static void dots(R* effects, const R* a, const R* const* b, Index count) {
        constexpr int w = lanes<R>;
        Vec<R> sums[N] = {};
        Index d = 0;
        for (; d + w <= count; d += w)
            for (int i = 0; i < N; ++i) sums[i] += load(a + d) * load(b[i] + d);
        for (int i = 0; i < N; ++i) effects[i] = horizontal_sum<R>(sums[i]);
        for (; d < count; ++d)
            for (int i = 0; i < N; ++i) effects[i] += a[d] * b[i][d];
    }

    const R* delta_row(R* buffer, Index at, Index step, Index count) const {
        return row(buffer, call.delta, call.delta_dtype, at, step, count);
    }

    const R* grad_row(R* buffer, Index at, Index step, Index count) const {
        return row(buffer, call.grad, call.grad_dtype, at, step, count);
    }

    // Runs body<N>(c) over all cotangents, N = `abreast` at a time and then one by one.
    template <typename Body>
    ATP_FAST_INLINE void over_cotangents(const Body& body) const {
        Index c = 0;
        for (; c + abreast <= call.cotangents; c += abreast)
            body(c, std::integral_constant<int, abreast>{});
        for (; c < call.cotangents; ++c) body(c, std::integral_constant<int, 1>{});
    }

    void rows_unit(Index unit, R* buffer) const {
        const Index first = unit * run, count = std::min(run, rows - first), width = call.width;
        Index delta_at[run], grad_at[run];
        for (Index r = 0; r < count; ++r) offsets(first + r, call.dims, delta_at[r], grad_at[r]);
        R* out = static_cast<R*>(call.out) + first;
        const R* weights = static_cast<const R*>(call.weights);
        if (weights) std::fill(out, out + count, R(0));
        over_cotangents([&](Index c, auto n) {
            for (Index r = 0; r < count; ++r) {
                const R* d = delta_row(buffer, delta_at[r], call.delta_step, width);
                const R* g[n];
                for (int i = 0; i < n; ++i)
                    g[i] =
                        grad_row(buffer + (i + 1) * width,
                                 grad_at[r] + (c + i) * call.grad_cotangent, call.grad_step, width);
                R effects[n];
                dots<n>(effects, d, g, width);
                for (int i = 0; i < n; ++i)
                    if (weights)
                        out[r] += weights[c + i] * std::abs(effects[i]);
                    else
                        out[(c + i) * rows + r] = effects[i];
            }
        });
    }

    // The summed axis has length 1: neurons. Strips along the innermost axis instead of rows.
    void strip_unit(Index unit, R* buffer) const {
        const int inner = call.dims - 1;
        const Index length = call.size[inner], strips = divide_up(length, strip);
        const Index line = unit / strips, first = unit % strips * strip;
        const Index count = std::min(strip, length - first);
        Index delta_at, grad_at;
        offsets(line, inner, delta_at, grad_at);
        const Index step = call.grad_stride[inner];
        const R* d = delta_row(buffer, delta_at + first * call.delta_stride[inner],
                               call.delta_stride[inner], count);
        R* out = static_cast<R*>(call.out) + line * length + first;
        const R* weights = static_cast<const R*>(call.weights);
        if (weights) std::fill(out, out + count, R(0));
        over_cotangents([&](Index c, auto n) {
            const R* g[n];
            for (int i = 0; i < n; ++i)
                g[i] =
                    grad_row(buffer + (i + 1) * strip,
                             grad_at + first * step + (c + i) * call.grad_cotangent, step, count);
            weights ? add_strips<n>(out, d, g, weights + c, count)
                    : set_strips<n>(out + c * rows, d, g, count);
        });
    }

    template <int N>
    ATP_FAST_INLINE static void add_strips(R* out, const R* d, const R* const* g, const R* weights,
                                           Index count) {
        constexpr int w = lanes<R>;
        Index at = 0;
        for (; at + w <= count; at += w) {
            Vec<R> sum = load(out + at);
            for (int i = 0; i < N; ++i) {
                const Vec<R> effect = load(d + at) * load(g[i] + at);
                sum += weights[i] * (effect < 0 ? -effect : effect);
            }
            store(out + at, sum);
        }
        for (; at < count; ++at)
            for (int i = 0; i < N; ++i) out[at] += weights[i] * std::abs(d[at] * g[i][at]);
    }

    template <int N>
    ATP_FAST_INLINE void set_strips(R* out, const R* d, const R* const* g, Index count) const {
        constexpr int w = lanes<R>;
        Index at = 0;
        for (; at + w <= count; at += w)
            for (int i = 0; i < N; ++i) store(out + i * rows + at, load(d + at) * load(g[i] + at));
        for (; at < count; ++at)
            for (int i = 0; i < N; ++i) out[i * rows + at] = d[at] * g[i][at];
    }

    static void unit(void* context, Index number, int thread) {
        const auto& self = *static_cast<const NodeEffects*>(context);
        R* buffer = reinterpret_cast<R*>(self.scratch + thread * self.scratch_stride);
        self.call.width == 1 ? self.strip_unit(number, buffer) : self.rows_unit(number, buffer);
    }
};

template <typename R>
void node_effects(const NodeEffectsCall& call, int threads) {
    NodeEffects<R> self{call, 1, 0, nullptr, 0};
    for (int i = 0; i < call.dims; ++i) self.rows *= call.size[i];
    if (self.rows == 0) return;
    self.join();
    const Index inner = self.call.size[self.call.dims - 1];
    self.units = call.width == 1 ? self.rows / inner * divide_up(inner, self.strip)
                                 : divide_up(self.rows, self.run);
    self.scratch_stride =
        round_up((self.abreast + 1) * std::max(call.width, self.strip) * Index(sizeof(R)), 64);
    threads = int(std::min<Index>(std::max(threads, 1), self.units));
    Scratch scratch(self.scratch_stride * threads);
    self.scratch = scratch.data();
    prefer_large_pages(call.out,
                       self.rows * (call.weights ? 1 : call.cotangents) * Index(sizeof(R)));
    parallel(self.units, threads, NodeEffects<R>::unit, &self);
}
