// Normalisation of rows, its adjoint for many cotangents, and the rotation of queries and keys by
// position: one pass each. A unit is a fixed run of rows, so that no result depends on the number
// of threads; sums of a row run in the accumulation type, in as many parts as a vector has lanes.
// Included once per instruction set, inside that set's namespace (isa_*.cpp): no include guard.

constexpr Index rows_per_unit = 32;

// The element offset of row `number` over the three axes behind the first.
inline Index row_offset(const View& x, const Index* sizes, Index number) {
    const Index inner = number % sizes[2], outer = number / sizes[2];
    return outer / sizes[1] * x.stride[1] + outer % sizes[1] * x.stride[2] + inner * x.stride[3];
}

// sum over i of f(i) for whole vectors, then one by one
template <typename R, typename Whole, typename One>
ATP_FAST_INLINE R row_sum(Index count, const Whole& whole, const One& one) {
    Vec<R> sums[4]{};  // side by side: an addition takes longer than it takes to begin one
    Index i = 0;
    for (; i + 4 * lanes<R> <= count; i += 4 * lanes<R>)
        for (int n = 0; n < 4; ++n) sums[n] += whole(i + n * lanes<R>);
    for (; i + lanes<R> <= count; i += lanes<R>) sums[0] += whole(i);
    R sum = horizontal_sum<R>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < count; ++i) sum += one(i);
    return sum;
}

template <typename R>
inline R rounded_to(Dtype dtype, R x) {
    if (dtype == Dtype::bfloat16) return R(widen_bfloat16(narrow_bfloat16(float(x))));
    if (dtype == Dtype::float16) return R(widen_float16(narrow_float16(float(x))));
    return x;
}

template <typename R>
struct Norm {
    NormCall call;
    char* scratch;
    Index scratch_stride;

    Index rows() const { return call.sizes[0] * call.sizes[1] * call.sizes[2]; }

    // n = (x - mean) rstd of a row in `out`
    void normalised(R* out, const R* x, R mean, R rstd) const {
        for (Index i = 0; i < call.width; ++i) out[i] = (x[i] - mean) * rstd;
    }

    void forward(Index number, R* buffer) const {
        const Index width = call.width;
        const R *weight = static_cast<const R*>(call.weight),
                *bias = static_cast<const R*>(call.bias);
        const R* x = row(buffer, call.x.data, call.x.dtype, row_offset(call.x, call.sizes, number),
                         call.x.stride[4], width);
        R mean = 0;
        if (call.mean) {
            mean = row_sum<R>(
                       width, [&](Index i) { return load(x + i); }, [&](Index i) { return x[i]; }) /
                   R(width);
            static_cast<R*>(call.mean)[number] = mean;
        }
        const R square = row_sum<R>(
            width,
            [&](Index i) {
                const Vec<R> part = load(x + i) - mean;
                return part * part;
            },
            [&](Index i) { return (x[i] - mean) * (x[i] - mean); });
        const R rstd = 1 / std::sqrt(square / R(width) + R(call.eps));
        static_cast<R*>(call.rstd)[number] = rstd;
        R* y = buffer + width;
        normalised(y, x, mean, rstd);
        if (call.rounded)
            for (Index i = 0; i < width; ++i) y[i] = rounded_to(call.x.dtype, y[i]);
        const R offset = R(call.offset);
        if (bias)
            for (Index i = 0; i < width; ++i) y[i] = y[i] * (weight[i] + offset) + bias[i];
        else
            for (Index i = 0; i < width; ++i) y[i] *= weight[i] + offset;
        write_row(call.out, row_offset(call.out, call.sizes, number), y, width);
    }

    void backward(Index number, R* buffer) const {
        const Index width = call.width;
        const R* weight = static_cast<const R*>(call.weight);
        R *n = buffer + width, *h = n + width, *sum = h + width;
        const R* x = row(buffer, call.x.data, call.x.dtype, row_offset(call.x, call.sizes, number),
                         call.x.stride[4], width);
        const R mean = call.mean ? static_cast<const R*>(call.mean)[number] : R(0);
        const R rstd = static_cast<const R*>(call.rstd)[number], offset = R(call.offset);
        normalised(n, x, mean, rstd);
        for (Index c = 0; c < call.cotangents; ++c) {
            const Index at = row_offset(call.grad, call.sizes, number) + c * call.grad.stride[0];
            const R* g = row(h, call.grad.data, call.grad.dtype, at, call.grad.stride[4], width);
            for (Index i = 0; i < width; ++i) h[i] = g[i] * (weight[i] + offset);
            const R along = row_sum<R>(
                                width, [&](Index i) { return load(h + i) * load(n + i); },
                                [&](Index i) { return h[i] * n[i]; }) /
                            R(width);
            R level = 0;
            if (call.mean)
                level = row_sum<R>(
                            width, [&](Index i) { return load(h + i); },
                            [&](Index i) { return h[i]; }) /
                        R(width);
            for (Index i = 0; i < width; ++i) h[i] = (h[i] - level - n[i] * along) * rstd;
            const Index to = row_offset(call.out, call.sizes, number) + c * call.out.stride[0];
            if (call.before) {
                const R* b = row(sum, call.before, call.out.dtype, to, Index(1), width);
                for (Index i = 0; i < width; ++i) h[i] += b[i];
            }
            write_row(call.out, to, h, width);
        }
    }

    static void unit(void* context, Index number, int thread) {
        const auto& self = *static_cast<const Norm*>(context);
        R* buffer = reinterpret_cast<R*>(self.scratch + thread * self.scratch_stride);
        const Index end = std::min((number + 1) * rows_per_unit, self.rows());
        for (Index r = number * rows_per_unit; r < end; ++r)
            self.call.grad.data ? self.backward(r, buffer) : self.forward(r, buffer);
    }
};

template <typename R>
void norm(const NormCall& call, int threads) {
    Norm<R> self{call, nullptr, 0};
    const Index units = divide_up(self.rows(), rows_per_unit);
    if (units == 0 || call.width == 0) return;
    self.scratch_stride = round_up(4 * call.width * Index(sizeof(R)), 64);
    threads = int(std::min<Index>(std::max(threads, 1), units));
    Scratch scratch(self.scratch_stride * threads);
    self.scratch = scratch.data();
    parallel(units, threads, Norm<R>::unit, &self);
}

template <typename R>
struct Rotate {
    RotateCall call;
    char* scratch;
    Index scratch_stride;

    void rotate(Index number, R* buffer) const {
        const Index half = call.rotated / 2, dim = call.dim;
        const Index m = number % call.positions, outer = number / call.positions;
        const Index b = outer % call.batch;
        R *x = buffer, *y = x + dim, *cos = y + dim, *sin = cos + call.rotated;
        read_row(cos, call.cos.data, call.cos.dtype,
                 b * call.cos.stride[0] + m * call.cos.stride[1], call.cos.stride[2], call.rotated);
        read_row(sin, call.sin.data, call.sin.dtype,
                 b * call.sin.stride[0] + m * call.sin.stride[1], call.sin.stride[2], call.rotated);
        const auto at = [&](const View& v, Index h) {
            return outer / call.batch * v.stride[0] + b * v.stride[1] + h * v.stride[2] +
                   m * v.stride[3];
        };
        const Dtype dtype = call.x.dtype;
        const bool narrow = dtype == Dtype::bfloat16 || dtype == Dtype::float16;
        for (Index h = 0; h < call.heads; ++h) {
            read_row(x, call.x.data, dtype, at(call.x, h), call.x.stride[4], dim);
            if (call.adjoint) {
                for (Index i = 0; i < half; ++i) {
                    y[i] = x[i] * cos[i] + x[half + i] * sin[half + i];
                    y[half + i] = x[half + i] * cos[half + i] - x[i] * sin[i];
                }
            } else if (narrow) {  // rounded where the models' own code rounds
                for (Index i = 0; i < half; ++i) {
                    y[i] =
                        rounded_to(dtype, x[i] * cos[i]) - rounded_to(dtype, x[half + i] * sin[i]);
                    y[half + i] = rounded_to(dtype, x[half + i] * cos[half + i]) +
                                  rounded_to(dtype, x[i] * sin[half + i]);
                }
            } else {
                for (Index i = 0; i < half; ++i) {
                    y[i] = x[i] * cos[i] - x[half + i] * sin[i];
                    y[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
                }
            }
            std::copy(x + call.rotated, x + dim, y + call.rotated);
            write_row(call.out, at(call.out, h), y, dim);
        }
    }

    static void unit(void* context, Index number, int thread) {
        const auto& self = *static_cast<const Rotate*>(context);
        self.rotate(number, reinterpret_cast<R*>(self.scratch + thread * self.scratch_stride));
    }
};

template <typename R>
void rotate(const RotateCall& call, int threads) {
    const Index units = call.outer * call.batch * call.positions;
    if (units == 0 || call.heads == 0 || call.dim == 0) return;
    Rotate<R> self{call, nullptr, 0};
    self.scratch_stride = round_up(2 * (call.dim + call.rotated) * Index(sizeof(R)), 64);
    threads = int(std::min<Index>(std::max(threads, 1), units));
    Scratch scratch(self.scratch_stride * threads);
    self.scratch = scratch.data();
    parallel(units, threads, Rotate<R>::unit, &self);
}
