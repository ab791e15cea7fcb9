// I = sum over the last axis of (corrupted - clean) * grad, per cotangent, added in place: to score
// the weighted sum over cotangents and pairs of |I|, to effect the sum over pairs of the first
// cotangent's I, to a pair's own row one of the two. A unit owns columns of the scores and goes
// over all pairs that have a position there, in order, so that no sum depends on the number of
// threads; each gradient is read once, several cotangents side by side (see node_effects.h).
// Included once per instruction set, inside that set's namespace (isa_*.cpp): no include guard.

template <typename R>
struct AddEffects {
    static constexpr int abreast = NodeEffects<R>::abreast;
    static constexpr Index enough =
        4096;  // elements of a cotangent per unit, where there are so many

    AddEffectsCall call;
    Index columns_per_unit;
    char* scratch;
    Index scratch_stride;

    static Index scratch_rows(const AddEffectsCall& call) {
        return (abreast + 2) * call.width * call.dim + 2 * call.width;
    }

    // The numbers of one pair and position: a row of all vectors, or a copy of it in buffer.
    const R* vectors(R* buffer, const View& x, Index at) const {
        const Index dim_step = x.stride[4], width_step = x.stride[3];
        if (call.dim == 1) return row(buffer, x.data, x.dtype, at, width_step, call.width);
        if (width_step == call.dim * dim_step)
            return row(buffer, x.data, x.dtype, at, dim_step, call.width * call.dim);
        for (Index w = 0; w < call.width; ++w)
            read_row(buffer + w * call.dim, x.data, x.dtype, at + w * width_step, dim_step,
                     call.dim);
        return buffer;
    }

    template <int N>
    ATP_FAST_INLINE void add(R* score, R* first, const R* delta, const R* const* grads,
                             const R* weights) const {
        if (call.dim == 1 && delta) {
            NodeEffects<R>::template add_strips<N>(score, delta, grads, weights, call.width);
            if (first)
                for (Index w = 0; w < call.width; ++w) first[w] = delta[w] * grads[0][w];
            return;
        }
        for (Index w = 0; w < call.width; ++w) {
            const R* g[N];
            R effects[N];
            for (int i = 0; i < N; ++i) g[i] = grads[i] + w * call.dim;
            if (delta)
                NodeEffects<R>::template dots<N>(effects, delta + w * call.dim, g, call.dim);
            else
                for (int i = 0; i < N; ++i) effects[i] = g[i][0];
            for (int i = 0; i < N; ++i) score[w] += weights[i] * std::abs(effects[i]);
            if (first) first[w] = effects[0];
        }
    }

    void column(Index j, R* buffer) const {
        const Index count = call.width * call.dim;
        R *delta = buffer, *other = delta + count, *score = other + abreast * count,
          *first = score + call.width;
        for (Index b = 0; b < call.batch; ++b) {
            const Index i = j - (call.first ? call.first[b] : 0);
            if (i < 0 || i >= call.positions) continue;
            if (call.live && !call.live[b * call.positions + i]) continue;
            if (call.corrupted.data) {
                const View &x = call.corrupted, &y = call.clean;
                const R* a = vectors(delta, x, b * x.stride[1] + i * x.stride[2]);
                const R* c = vectors(other, y, b * y.stride[1] + i * y.stride[2]);
                for (Index n = 0; n < count; ++n) delta[n] = a[n] - c[n];
            }
            std::fill(score, score + call.width, R(0));
            const Index at = b * call.grad.stride[1] + i * call.grad.stride[2];
            const R* weights = static_cast<const R*>(call.weights);
            const auto some = [&](Index c, auto n) {
                const R* grads[n];
                for (int k = 0; k < n; ++k)
                    grads[k] =
                        vectors(other + k * count, call.grad, at + (c + k) * call.grad.stride[0]);
                add<n>(score, c == 0 ? first : nullptr, call.corrupted.data ? delta : nullptr,
                       grads, weights + c);
            };
            Index c = 0;
            for (; c + abreast <= call.cotangents; c += abreast)
                some(c, std::integral_constant<int, abreast>{});
            for (; c < call.cotangents; ++c) some(c, std::integral_constant<int, 1>{});
            add_row(call.score, call.score_row, j, score);
            if (call.effect) add_row(call.effect, call.score_row, j, first);
            if (call.per_pair)
                add_row(static_cast<R*>(call.per_pair) + call.rows[b] * call.pair_step,
                        call.pair_row, j, call.pair_signed ? first : score);
        }
    }

    void add_row(void* out, Index step, Index j, const R* x) const {
        R* y = static_cast<R*>(out) + j * step;
        for (Index w = 0; w < call.width; ++w) y[w] += x[w];
    }

    static void unit(void* context, Index number, int thread) {
        const auto& self = *static_cast<const AddEffects*>(context);
        R* buffer = reinterpret_cast<R*>(self.scratch + thread * self.scratch_stride);
        const Index begin = number * self.columns_per_unit;
        const Index end = std::min(begin + self.columns_per_unit, self.call.columns);
        for (Index j = begin; j < end; ++j) self.column(j, buffer);
    }
};

template <typename R>
void add_effects(const AddEffectsCall& call, int threads) {
    if (call.columns == 0 || call.width == 0 || call.cotangents == 0) return;
    using Self = AddEffects<R>;
    const Index count = std::max<Index>(call.width * call.dim, 1);
    Self self{call, std::max<Index>(Self::enough / count, 1), nullptr, 0};
    const Index units = divide_up(call.columns, self.columns_per_unit);
    self.scratch_stride = round_up(Self::scratch_rows(call) * Index(sizeof(R)), 64);
    threads = int(std::min<Index>(std::max(threads, 1), units));
    Scratch scratch(self.scratch_stride * threads);
    self.scratch = scratch.data();
    parallel(units, threads, Self::unit, &self);
}
