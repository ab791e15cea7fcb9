// Attention forward with the row statistics of the leave-one-out rule (ops/reference.py defines
// them).
//
// One unit of work is a block of queries of one head; it visits the key blocks from left to right.
// The tile of scores lies transposed, keys x queries, queries along the vector lanes, so that every
// per-row quantity is a vector and none needs a reduction across lanes. Per row an online softmax
// is kept over everything but the best key so far (other keys and the sink), with its own running
// maximum: when a tile brings a better key, the old best is folded in. The best key enters at the
// very end, z = (1 - a) loo_z + a v_top. Statistics of the others computed relative to the row's
// overall maximum instead would underflow in the saturated rows they are for. Sums run in the
// accumulation type: 64 terms per tile, one rescaling per tile, so rounding grows with keys / 64
// and stays at a few eps. Included once per instruction set, inside that set's namespace
// (isa_*.cpp): no include guard.

constexpr Index tile = 64;  // queries and keys per tile; with AVX2, 48 and 96 are no faster

template <typename R>
constexpr R infinity = std::numeric_limits<R>::infinity();

// Which keys the queries of a block see; key and query numbers are local to the tile.
struct Visibility {
    Index queries;              // in the block
    Index position;             // of the block's first query, in keys
    Index first_key, last_key;  // keys some query of the block may see: [first_key, last_key)
    bool causal;
    Index window;
    const std::uint8_t* mask;  // of the batch row, or null

    Visibility(const AttentionShape& shape, Index b, Index first_query)
        : queries(std::min(tile, shape.queries - first_query)),
          position(first_query + shape.keys - shape.queries),
          first_key(0),
          last_key(shape.keys),
          causal(shape.causal),
          window(shape.window),
          mask(shape.key_mask ? shape.key_mask + b * shape.keys : nullptr) {
        if (causal) last_key = std::min(last_key, position + queries);
        if (window) first_key = std::max<Index>(0, position - window + 1) / tile * tile;
    }

    // Queries [low, high) of the block see the key.
    void of(Index key, Index& low, Index& high) const {
        low = 0;
        high = queries;
        if (causal) low = std::max<Index>(0, key - position);
        if (window) high = std::min(high, key + window - position);
        if (mask && !mask[key]) high = 0;
    }

    bool partial(Index key, Index count) const {
        if (queries < tile || (causal && key + count - 1 > position)) return true;
        if (window && position + queries - 1 - key >= window) return true;
        if (mask)
            for (Index j = 0; j < count; ++j)
                if (!mask[key + j]) return true;
        return false;
    }

    // First vector of queries that a block of key rows starting at key can need.
    template <typename R>
    Index first_vector(Index key) const {
        return causal ? std::max<Index>(0, key - position) / lanes<R> : 0;
    }
};

// Keys and values of one (batch, key/value head), packed for products; kept while units ask for the
// same.
template <typename R>
struct Packed {
    R* data;
    Index row;   // elements per row
    Index rows;  // readable rows, zero beyond the tensor's

    static Index bytes(Index rows, Index width) {
        return round_up(rows, block_rows) * round_up(width, lanes<R>) * Index(sizeof(R));
    }

    void fill(const View& x, Index offset, Index row_stride, Index step, Index count, Index width) {
        row = round_up(width, lanes<R>);
        rows = round_up(count, block_rows);
        for (Index i = 0; i < count; ++i) {
            read_row(data + i * row, x.data, x.dtype, offset + i * row_stride, step, width);
            std::fill(data + i * row + width, data + (i + 1) * row, R(0));
        }
        std::fill(data + count * row, data + rows * row, R(0));
    }
};

// Whether rows can be read where they lie: of the right type, whole vectors, and not so spaced
// (multiples of 4 KiB) that all of them compete for the same few lines of the first-level cache.
template <typename R>
bool readable(Dtype dtype, Index row_stride, Index step, Index count, Index width) {
    return dtype == wide_dtype<R> && step == 1 && width % lanes<R> == 0 && count % lanes<R> == 0 &&
           (width == row_stride || row_stride * Index(sizeof(R)) % 4096 != 0);
}

// Rows of a tensor as rows of `out`, padded with zeros to whole vectors: in length, and in number.
template <typename R>
inline void read_rows(R* out, Index out_row, const View& x, Index offset, Index row_stride,
                      Index step, Index count, Index width) {
    for (Index i = 0; i < count; ++i) {
        read_row(out + i * out_row, x.data, x.dtype, offset + i * row_stride, step, width);
        std::fill(out + i * out_row + width, out + (i + 1) * out_row, R(0));
    }
    std::fill(out + count * out_row, out + round_up(count, lanes<R>) * out_row, R(0));
}

// out[d][i] = rows[i][d] for `vectors` whole vectors of rows i; width is the rows' length, whole
// vectors too.
template <typename R>
inline void transpose(R* out, const R* rows, Index row_stride, Index width, Index vectors) {
    constexpr int w = lanes<R>;
    for (Index i = 0; i < vectors * w; i += w)
        for (Index d = 0; d < width; d += w) {
            Vec<R> square[w];
            for (int m = 0; m < w; ++m) square[m] = load(rows + (i + m) * row_stride + d);
            transpose_square<R>(square);
            for (int m = 0; m < w; ++m) store(out + (d + m) * tile + i, square[m]);
        }
}

// What every attention kernel knows about scores.
template <typename R>
struct Scores {
    Index depth;
    R scale, softcap;

    explicit Scores(const AttentionShape& shape)
        : depth(shape.head_dim), scale(R(shape.scale)), softcap(R(shape.softcap)) {}

    // out[key][query] = score, for the vectors that some query needs; out's other places are left
    // alone.
    void compute(R* out, const Packed<R>& keys, Index key, Index count, const R* queries,
                 Index vectors, const Visibility& seen) const {
        const auto ranges = [&](Index m) { return Range{seen.first_vector<R>(key + m), 0, depth}; };
        const auto finish = [&](Index m, Index n, auto& sums) {
            for (int i = 0; i < block_rows; ++i) {
                R* to = out + (m + i) * tile + n * lanes<R>;
                for (auto& sum : sums[i]) {
                    const Vec<R> raw = sum * scale;
                    store(to, softcap > 0 ? softcap * tanh<R>(raw / softcap) : raw);
                    to += lanes<R>;
                }
            }
        };
        product(count, vectors, keys.data + key * keys.row, keys.row, Index(1), queries, tile,
                ranges, finish);
    }
};

template <typename R>
struct Attention {
    static constexpr int w = lanes<R>;

    AttentionCall call;
    Scores<R> scores;
    Index blocks, units;
    char* scratch;
    Index scratch_stride;

    struct Thread {
        Index packed;  // which (batch, key/value head) is packed, -1: none
        Packed<R> keys, values;
        R *rows, *queries, *tile_scores, *z, *best, *most, *sum, *shrink, *fold;
        Index *top, *rise;
    };

    explicit Attention(const AttentionCall& c)
        : call(c),
          scores(c.shape),
          blocks(divide_up(c.shape.queries, tile)),
          units(c.shape.batch * c.shape.heads * blocks),
          scratch(nullptr),
          scratch_stride(0) {
        scratch_stride = carve(nullptr, nullptr);
    }

    // Lays a thread's scratch out from base; returns its size in bytes.
    Index carve(char* base, Thread* out) const {
        const AttentionShape& s = call.shape;
        Thread local;
        Thread& t = out ? *out : local;
        Index used = 0;
        const auto take = [&](auto*& pointer, Index bytes) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
            used += round_up(bytes, 64);
        };
        const Index real = Index(sizeof(R));
        const Index depth = round_up(s.head_dim, w);
        take(t.keys.data, Packed<R>::bytes(s.keys, s.head_dim));
        take(t.values.data, Packed<R>::bytes(s.keys, s.value_dim));
        take(t.rows, tile * depth * real);
        take(t.queries, depth * tile * real);
        take(t.tile_scores, tile * tile * real);
        take(t.z, tile * round_up(s.value_dim, w) * real);
        for (R** each : {&t.best, &t.most, &t.sum, &t.shrink, &t.fold}) take(*each, tile * real);
        for (Index** each : {&t.top, &t.rise}) take(*each, tile * Index(sizeof(Index)));
        return used;
    }

    void pack(Thread& t, Index b, Index kv_head) const {
        const AttentionShape& s = call.shape;
        const Index wanted = b * s.kv_heads + kv_head;
        if (t.packed == wanted) return;
        const View &k = call.k, &v = call.v;
        t.keys.fill(k, b * k.stride[0] + kv_head * k.stride[1], k.stride[2], k.stride[3], s.keys,
                    s.head_dim);
        t.values.fill(v, b * v.stride[0] + kv_head * v.stride[1], v.stride[2], v.stride[3], s.keys,
                      s.value_dim);
        t.packed = wanted;
    }

    void run(Index unit, Thread& t) const {
        const AttentionShape& s = call.shape;
        // the last query blocks see most keys: they go first, so that the threads end together
        const Index block = blocks - 1 - unit % blocks, h = unit / blocks % s.heads,
                    b = unit / blocks / s.heads;
        const Index kv_head = h / (s.heads / s.kv_heads), first_query = block * tile;
        pack(t, b, kv_head);
        const Visibility seen(s, b, first_query);
        const Index vectors = divide_up(seen.queries, w), z_row = t.values.row;
        const View& q = call.q;
        read_rows(t.rows, t.keys.row, q,
                  b * q.stride[0] + h * q.stride[1] + first_query * q.stride[2], q.stride[2],
                  q.stride[3], seen.queries, s.head_dim);
        transpose(t.queries, t.rows, t.keys.row, t.keys.row, vectors);

        const R* sinks = static_cast<const R*>(s.sinks);
        std::fill(t.best, t.best + tile, -infinity<R>);
        std::fill(t.most, t.most + tile, sinks ? sinks[h] : -infinity<R>);
        std::fill(t.sum, t.sum + tile, R(sinks ? 1 : 0));
        std::fill(t.top, t.top + tile, Index(-1));
        std::fill(t.z, t.z + tile * z_row, R(0));
        for (Index key = seen.first_key; key < seen.last_key; key += tile) {
            const Index count = std::min(tile, seen.last_key - key);
            scores.compute(t.tile_scores, t.keys, key, count, t.queries, vectors, seen);
            if (seen.partial(key, count)) hide(t.tile_scores, key, count, vectors, seen);
            add_tile(t, key, count, vectors, seen);
        }
        finish(t, b, h, first_query, seen.queries);
    }

    // Sets the scores of keys a query does not see to -inf.
    static void hide(R* tile_scores, Index key, Index count, Index vectors,
                     const Visibility& seen) {
        const Int<R> number = lane_numbers<R>();
        for (Index j = 0; j < count; ++j) {
            Index low, high;
            seen.of(key + j, low, high);
            for (Index n = 0; n < vectors; ++n) {
                R* at = tile_scores + j * tile + n * w;
                const Int<R> i = number + Whole<R>(n * w);
                const Int<R> keep = (i >= Whole<R>(low)) & (i < Whole<R>(high));
                store(at, keep ? load(at) : splat(-infinity<R>));
            }
        }
    }

    void add_tile(Thread& t, Index key, Index count, Index vectors, const Visibility& seen) const {
        const Index z_row = t.values.row, value_vectors = z_row / w;
        R* p = t.tile_scores;
        for (Index n = 0; n < vectors; ++n) {
            // the tile's largest and second largest score of each row
            Vec<R> first = splat(-infinity<R>), second = first;
            Int<R> at = {};
            for (Index j = 0; j < count; ++j) {
                const Vec<R> x = load(p + j * tile + n * w);
                const Int<R> higher = x > first;
                second = maximum(second, minimum(first, x));
                at = higher ? Int<R>{} + Whole<R>(j) : at;
                first = higher ? x : first;
            }
            const Vec<R> best = load(t.best + n * w), most = load(t.most + n * w);
            const Int<R> rises = first > best;
            const Vec<R> new_most = maximum(most, rises ? maximum(best, second) : first);
            const Vec<R> base = new_most == -infinity<R> ? Vec<R>{} : new_most;
            const Vec<R> shrink = exp<R>(most - base);
            const Vec<R> fold = rises ? exp<R>(best - base) : Vec<R>{};
            store(t.shrink + n * w, shrink);
            store(t.fold + n * w, fold);
            store(t.best + n * w, rises ? first : best);
            store(t.most + n * w, new_most);
            for (int i = 0; i < w; ++i) t.rise[n * w + i] = rises[i] ? Index(at[i]) : -1;
            // a new best key leaves the tile, its place among the others is taken by the old best
            for (int i = 0; i < w; ++i)
                if (t.rise[n * w + i] >= 0) p[t.rise[n * w + i] * tile + n * w + i] = -infinity<R>;
            Vec<R> sum =
                {};  // of the tile alone: small terms must not drown one by one in a large total
            for (Index j = 0; j < count; ++j) {
                const Vec<R> e = exp<R>(load(p + j * tile + n * w) - base);
                store(p + j * tile + n * w, e);
                sum += e;
            }
            store(t.sum + n * w, load(t.sum + n * w) * shrink + (fold + sum));
        }
        for (Index i = 0; i < seen.queries; ++i) {
            R* z = t.z + i * z_row;
            if (t.shrink[i] != 1)
                for (Index n = 0; n < value_vectors; ++n)
                    store(z + n * w, load(z + n * w) * t.shrink[i]);
            if (t.rise[i] < 0) continue;
            if (t.fold[i] != 0) {
                const R* v = t.values.data + t.top[i] * z_row;
                for (Index n = 0; n < value_vectors; ++n)
                    store(z + n * w, load(z + n * w) + t.fold[i] * load(v + n * w));
            }
            t.top[i] = key + t.rise[i];
        }
        const auto ranges = [&](Index m) {
            const Index end = seen.causal ? seen.position + m + block_rows - key : count;
            return Range{0, 0, std::min(count, std::max<Index>(0, end))};
        };
        product(seen.queries, value_vectors, p, Index(1), tile, t.values.data + key * z_row, z_row,
                ranges, AddTo<R>{t.z, z_row, seen.queries, false});
    }

    void finish(Thread& t, Index b, Index h, Index first_query, Index queries) const {
        const AttentionShape& s = call.shape;
        const Index z_row = t.values.row, dim = s.value_dim;
        for (Index i = 0; i < queries; ++i) {
            const Index at = (b * s.heads + h) * s.queries + first_query + i;
            const R best = t.best[i];
            const R others = t.sum[i] > 0 ? t.most[i] + std::log(t.sum[i]) : -infinity<R>;
            const R high = std::max(best, others), low = std::min(best, others);
            const R odds = low == -infinity<R> ? 0 : std::exp(low - high);
            const R share = best < others ? odds / (1 + odds) : 1 / (1 + odds);  // of the best key
            const R rest = best < others ? 1 / (1 + odds) : odds / (1 + odds);   // of the others
            R* z = t.z + i * z_row;
            const R norm = t.sum[i] > 0 ? 1 / t.sum[i] : 0;
            for (Index d = 0; d < z_row; ++d) z[d] *= norm;
            if (call.loo_z) std::copy(z, z + dim, static_cast<R*>(call.loo_z) + at * dim);
            if (t.top[i] >= 0) {
                const R* v = t.values.data + t.top[i] * z_row;
                for (Index d = 0; d < z_row; ++d) z[d] = rest * z[d] + share * v[d];
            }
            if (call.z.data) write_row(call.z, at * dim, z, dim);
            std::copy(z, z + dim, static_cast<R*>(call.wide_z) + at * dim);
            if (!call.logsumexp) continue;
            static_cast<R*>(call.logsumexp)[at] = high + std::log1p(odds);
            if (call.top_key) call.top_key[at] = t.top[i];
            if (call.loo_logsumexp) static_cast<R*>(call.loo_logsumexp)[at] = others;
        }
    }

    static void unit(void* context, Index number, int thread) {
        const auto& self = *static_cast<const Attention*>(context);
        self.run(number, *reinterpret_cast<Thread*>(self.scratch + thread * self.scratch_stride));
    }
};

// A thread's scratch starts with its Thread, which points to the rest.
template <typename Op>
void run_units(Op& op, int threads) {
    using Thread = typename Op::Thread;
    const Index head = round_up(Index(sizeof(Thread)), 64);
    const Index stride = head + op.scratch_stride;
    threads = int(std::min<Index>(std::max(threads, 1), std::max<Index>(op.units, 1)));
    Scratch scratch(stride * threads);
    op.scratch = scratch.data();
    op.scratch_stride = stride;
    for (int i = 0; i < threads; ++i) {
        Thread* thread = new (op.scratch + i * stride) Thread;
        op.carve(op.scratch + i * stride + head, thread);
        thread->packed = -1;
    }
    parallel(op.units, threads, Op::unit, &op);
}

template <typename R>
void attention(const AttentionCall& call, int threads) {
    Attention<R> op(call);
    run_units(op, threads);
}
