// Vector-Jacobian products of attention for many cotangents, and the exact effects of patching
// keys.
//
// Per tile (keys x queries, queries along the vector lanes) the weights p, the slope of the scores
// and the key fix's weights w are computed once and serve every cotangent: per cotangent there
// remain the products dP = v g^T, dV += p g, dK += dS q, dQ += dS^T k, with dS = p (dP - D) slope;
// a key's effect is the row sum of w (dP - D). Cotangents and (batch, key/value head) pairs are
// independent, and a unit is a run of cotangents of one such pair: within it heads, query blocks
// and key blocks come in a fixed order, so a result depends neither on the threads nor on how
// cotangents are grouped. Sums run in the accumulation type, in blocks of 64 terms.
//
// Key fix: with a = exp(s - lse) and E = exp(s' - lse), w = (a' - a)/(1 - a) = (E - a)/(E + 1 - a),
// exact enough for every key but the row's top one, where 1 - a may vanish: there w = sigmoid(x') -
// sigmoid(x) with x = s - loo_lse, against the mean of the others, dP - D_loo = (dP - D) + g . (z -
// loo_z). More than 400 lines, since gradients and effects share each tile's work. Included once
// per instruction set, inside that set's namespace (isa_*.cpp): no include guard.

template <typename R>
struct AttentionBackward {
    static constexpr int w = lanes<R>;
    static constexpr Index most_cotangents = 16;  // of a unit

    BackwardCall call;
    Scores<R> scores;
    bool gradients, effects, direct_q, direct_k, direct_v;
    Index group, blocks, chunks, chunk, units;
    char* scratch;
    Index scratch_stride;

    struct Thread {
        Index packed;
        Packed<R> keys, values, corrupted;
        Index begun;  // keys whose gradients hold something; the others' are still uninitialised
        R *rows, *queries, *query_rows, *z, *z_minus_loo;  // of a query block
        R *lse, *loo_lse;
        Index* top;
        R *grad, *grad_rows, *grad_q, *mean, *top_shift;  // of a query block, per cotangent
        R *grad_k, *grad_v, *effect;                      // per cotangent
        R *p, *slope, *weight, *moved, *ds;               // tiles
    };

    // A row whose top key lies in the tile.
    struct Top {
        Index key, query;
        R weight;
    };

    AttentionBackward(const BackwardCall& c, int threads)
        : call(c),
          scores(c.shape),
          gradients(c.grad_q.data || c.grad_k.data || c.grad_v.data),
          effects(c.effect_k != nullptr) {
        const AttentionShape& s = call.shape;
        group = s.heads / s.kv_heads;
        blocks = divide_up(s.queries, tile);
        direct_q = call.grad_q.dtype == wide_dtype<R> && s.head_dim % w == 0;
        direct_k = call.grad_k.dtype == wide_dtype<R> && s.head_dim % w == 0;
        direct_v = call.grad_v.dtype == wide_dtype<R> && s.value_dim % w == 0;
        choose_chunks(std::max(threads, 1));
        units = s.batch * s.kv_heads * chunks;
        scratch = nullptr;
        scratch_stride = carve(nullptr, nullptr);
    }

    // Splits the cotangents where (batch, head) pairs alone would leave threads idle: every run of
    // cotangents recomputes the tiles' weights, about three products against the four (one without
    // gradients) of each cotangent. No cotangent's arithmetic depends on the choice.
    void choose_chunks(int threads) {
        const Index pairs = call.shape.batch * call.shape.kv_heads, per = gradients ? 4 : 1;
        chunks = chunk = 0;
        if (call.cotangents == 0) return;
        Index best = -1;
        for (Index n = 1; n <= call.cotangents; ++n) {
            const Index size = divide_up(call.cotangents, n);
            if (size > most_cotangents) continue;
            const Index cost = divide_up(pairs * n, threads) * (3 + per * size);
            if (best < 0 || cost < best) {
                best = cost;
                chunk = size;
            }
        }
        chunks = divide_up(call.cotangents, chunk);
    }

    Index carve(char* base, Thread* out) const {
        const AttentionShape& s = call.shape;
        Thread local;
        Thread& t = out ? *out : local;
        Index used = 0;
        const auto take = [&](auto*& pointer, Index count) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
            used += round_up(count * Index(sizeof(*pointer)), 64);
        };
        const Index depth = round_up(s.head_dim, w), width = round_up(s.value_dim, w);
        const Index keys = round_up(s.keys, block_rows);
        take(t.keys.data, keys * depth);
        take(t.values.data, keys * width);
        take(t.corrupted.data, effects ? keys * depth : 0);
        take(t.rows, tile * std::max(depth, width));
        take(t.queries, depth * tile);
        take(t.query_rows, tile * depth);
        take(t.z, width * tile);
        take(t.z_minus_loo, width * tile);
        take(t.lse, tile);
        take(t.loo_lse, tile);
        take(t.top, tile);
        take(t.grad, chunk * width * tile);
        take(t.grad_rows, chunk * tile * width);
        take(t.grad_q, gradients && !direct_q ? chunk * tile * depth : 0);
        take(t.mean, chunk * tile);
        take(t.top_shift, chunk * tile);
        take(t.grad_k, gradients && !direct_k ? chunk * s.keys * depth : 0);
        take(t.grad_v, gradients && !direct_v ? chunk * s.keys * width : 0);
        take(t.effect, effects ? chunk * s.keys : 0);
        for (R** each : {&t.p, &t.slope, &t.weight, &t.moved, &t.ds}) take(*each, tile * tile);
        return used;
    }

    void pack(Thread& t, Index b, Index kv_head) const {
        const AttentionShape& s = call.shape;
        const Index wanted = b * s.kv_heads + kv_head;
        if (t.packed == wanted) return;
        const auto fill = [&](Packed<R>& to, const View& x, Index width) {
            to.fill(x, b * x.stride[0] + kv_head * x.stride[1], x.stride[2], x.stride[3], s.keys,
                    width);
        };
        fill(t.keys, call.k, s.head_dim);
        fill(t.values, call.v, s.value_dim);
        if (effects) fill(t.corrupted, call.k_corrupted, s.head_dim);
        t.packed = wanted;
    }

    // Where a cotangent's key or value gradient is summed: the output itself, or scratch.
    R* key_grad(Thread& t, Index c, Index first, Index b, Index kv_head) const {
        const AttentionShape& s = call.shape;
        if (!direct_k) return t.grad_k + (c - first) * s.keys * round_up(s.head_dim, w);
        return static_cast<R*>(call.grad_k.data) + output_row(c, b, kv_head) * s.head_dim;
    }

    R* value_grad(Thread& t, Index c, Index first, Index b, Index kv_head) const {
        const AttentionShape& s = call.shape;
        if (!direct_v) return t.grad_v + (c - first) * s.keys * round_up(s.value_dim, w);
        return static_cast<R*>(call.grad_v.data) + output_row(c, b, kv_head) * s.value_dim;
    }

    Index output_row(Index c, Index b, Index kv_head) const {
        const AttentionShape& s = call.shape;
        return ((c * s.batch + b) * s.kv_heads + kv_head) * s.keys;
    }

    void run(Index unit, Thread& t) const {
        const AttentionShape& s = call.shape;
        const Index first = unit % chunks * chunk, last = std::min(first + chunk, call.cotangents);
        const Index kv_head = unit / chunks % s.kv_heads, b = unit / chunks / s.kv_heads;
        const Index depth = round_up(s.head_dim, w), width = round_up(s.value_dim, w);
        pack(t, b, kv_head);
        if (effects) std::fill(t.effect, t.effect + (last - first) * s.keys, R(0));
        t.begun = 0;
        for (Index h = kv_head * group; h < (kv_head + 1) * group; ++h)
            for (Index block = 0; block < blocks; ++block)
                run_block(t, first, last, b, h, kv_head, block * tile);
        begin(t, first, last, b, kv_head, s.keys);
        for (Index c = first; c < last; ++c) {
            if (gradients && !direct_k) {
                const R* from = key_grad(t, c, first, b, kv_head);
                for (Index j = 0; j < s.keys; ++j)
                    write_row(call.grad_k, (output_row(c, b, kv_head) + j) * s.head_dim,
                              from + j * depth, s.head_dim);
            }
            if (gradients && !direct_v) {
                const R* from = value_grad(t, c, first, b, kv_head);
                for (Index j = 0; j < s.keys; ++j)
                    write_row(call.grad_v, (output_row(c, b, kv_head) + j) * s.value_dim,
                              from + j * width, s.value_dim);
            }
            if (effects) {
                R* out = static_cast<R*>(call.effect_k) + (c * s.batch + b) * s.keys * s.kv_heads +
                         kv_head;
                for (Index j = 0; j < s.keys; ++j)
                    out[j * s.kv_heads] = t.effect[(c - first) * s.keys + j];
            }
        }
    }

    // Zeroes the gradients of the keys up to `end` that hold nothing yet.
    void begin(Thread& t, Index first, Index last, Index b, Index kv_head, Index end) const {
        const Index depth = round_up(call.shape.head_dim, w),
                    width = round_up(call.shape.value_dim, w);
        if (end <= t.begun) return;
        for (Index c = first; gradients && c < last; ++c) {
            R* grad_k = key_grad(t, c, first, b, kv_head);
            R* grad_v = value_grad(t, c, first, b, kv_head);
            std::fill(grad_k + t.begun * depth, grad_k + end * depth, R(0));
            std::fill(grad_v + t.begun * width, grad_v + end * width, R(0));
        }
        t.begun = end;
    }

    // Where a cotangent's query gradients of one block are summed: the output itself, or scratch.
    R* query_grad(Thread& t, Index c, Index first, Index row) const {
        const AttentionShape& s = call.shape;
        if (!direct_q) return t.grad_q + (c - first) * tile * round_up(s.head_dim, w);
        return static_cast<R*>(call.grad_q.data) +
               (c * s.batch * s.heads * s.queries + row) * s.head_dim;
    }

    void run_block(Thread& t, Index first, Index last, Index b, Index h, Index kv_head,
                   Index first_query) const {
        const AttentionShape& s = call.shape;
        const Visibility seen(s, b, first_query);
        const Index queries = seen.queries, vectors = divide_up(queries, w);
        const Index depth = round_up(s.head_dim, w), width = round_up(s.value_dim, w);
        const Index row = (b * s.heads + h) * s.queries + first_query;

        const View& q = call.q;
        read_rows(t.query_rows, depth, q,
                  b * q.stride[0] + h * q.stride[1] + first_query * q.stride[2], q.stride[2],
                  q.stride[3], queries, s.head_dim);
        transpose(t.queries, t.query_rows, depth, depth, vectors);
        const View wide_z = rows_of(call.wide_z), loo_z = rows_of(call.loo_z);
        read_rows(t.rows, width, wide_z, row * s.value_dim, s.value_dim, 1, queries, s.value_dim);
        transpose(t.z, t.rows, width, width, vectors);
        for (Index i = 0; i < tile; ++i) {
            const R lse = i < queries ? static_cast<const R*>(call.logsumexp)[row + i] : 0;
            t.lse[i] = lse == -infinity<R> ? 0 : lse;
        }
        if (effects) {
            read_rows(t.rows, width, loo_z, row * s.value_dim, s.value_dim, 1, queries,
                      s.value_dim);
            transpose(t.z_minus_loo, t.rows, width, width, vectors);
            for (Index d = 0; d < width; ++d)
                for (Index i = d * tile; i < d * tile + vectors * w; ++i)
                    t.z_minus_loo[i] = t.z[i] - t.z_minus_loo[i];
            for (Index i = 0; i < queries; ++i) {
                t.loo_lse[i] = static_cast<const R*>(call.loo_logsumexp)[row + i];
                t.top[i] = call.top_key[row + i];
            }
        }
        const View& g = call.grad_z;
        const bool in_place = readable<R>(g.dtype, g.stride[3], g.stride[4], queries, s.value_dim);
        const Index grad_row = in_place ? g.stride[3] : width;
        const R* grad_rows[most_cotangents];
        for (Index c = first; c < last; ++c) {
            R* rows = t.grad_rows + (c - first) * tile * width;
            R* grad = t.grad + (c - first) * width * tile;
            const Index at =
                c * g.stride[0] + b * g.stride[1] + h * g.stride[2] + first_query * g.stride[3];
            if (in_place && c + 1 < last) {
                const R* next = static_cast<const R*>(g.data) + at + g.stride[0];
                for (Index i = 0; i < queries; ++i) prefetch<0>(next + i * grad_row, width);
            }
            if (!in_place)
                read_rows(rows, width, g, at, g.stride[3], g.stride[4], queries, s.value_dim);
            grad_rows[c - first] = in_place ? static_cast<const R*>(g.data) + at : rows;
            transpose(grad, grad_rows[c - first], grad_row, width, vectors);
            column_dots(t.mean + (c - first) * tile, grad, t.z, vectors);
            if (effects)
                column_dots(t.top_shift + (c - first) * tile, grad, t.z_minus_loo, vectors);
        }

        bool fresh_q = true;
        for (Index key = seen.first_key; key < seen.last_key; key += tile) {
            const Index count = std::min(tile, seen.last_key - key);
            const bool fresh_k = t.begun <= key;
            begin(t, first, last, b, kv_head, fresh_k ? key : key + count);
            Top tops[tile];
            const Index found = weigh(t, tops, key, count, vectors, seen);
            for (Index c = first; c < last; ++c) {
                if (gradients) {
                    R* grad_k = key_grad(t, c, first, b, kv_head) + key * depth;
                    R* grad_v = value_grad(t, c, first, b, kv_head) + key * width;
                    R* grad_q = query_grad(t, c, first, row);
                    if (fresh_k) {
                        prefetch<1>(grad_k, count * depth);
                        prefetch<1>(grad_v, count * width);
                    }
                    if (fresh_q) prefetch<1>(grad_q, queries * depth);
                }
                add_tile(t, c - first, key, count, vectors, seen);
                if (gradients) {
                    R* grad_k = key_grad(t, c, first, b, kv_head) + key * depth;
                    R* grad_v = value_grad(t, c, first, b, kv_head) + key * width;
                    R* grad_q = query_grad(t, c, first, row);
                    const auto from_key = [&](Index m) {
                        return Range{0,
                                     seen.causal ? std::max<Index>(0, key + m - seen.position) : 0,
                                     queries};
                    };
                    const auto to_query = [&](Index m) {
                        const Index end =
                            seen.causal ? seen.position + m + block_rows - key : count;
                        return Range{0, 0, std::min(count, std::max<Index>(0, end))};
                    };
                    product(count, width / w, t.p, tile, Index(1), grad_rows[c - first], grad_row,
                            from_key, AddTo<R>{grad_v, width, count, fresh_k});
                    product(count, depth / w, t.ds, tile, Index(1), t.query_rows, depth, from_key,
                            AddTo<R>{grad_k, depth, count, fresh_k});
                    product(queries, depth / w, t.ds, Index(1), tile, t.keys.data + key * depth,
                            depth, to_query, AddTo<R>{grad_q, depth, queries, fresh_q});
                }
                for (Index i = 0; i < found; ++i)
                    t.effect[(c - first) * s.keys + tops[i].key] +=
                        tops[i].weight * t.top_shift[(c - first) * tile + tops[i].query];
            }
            t.begun = std::max(t.begun, key + count);
            fresh_q = false;
        }
        for (Index c = first; gradients && c < last; ++c) {
            R* grad_q = query_grad(t, c, first, row);
            if (fresh_q) std::fill(grad_q, grad_q + queries * depth, R(0));
            if (direct_q) continue;
            const Index at = c * s.batch * s.heads * s.queries + row;
            for (Index i = 0; i < queries; ++i)
                write_row(call.grad_q, (at + i) * s.head_dim, grad_q + i * depth, s.head_dim);
        }
    }

    // A statistic of the value dimension, contiguous in the accumulation type, as a tensor to read
    // rows of.
    static View rows_of(const void* data) {
        View view;
        view.data = const_cast<void*>(data);
        view.dtype = wide_dtype<R>;
        return view;
    }

    // out[i] = sum over d of a[d][i] b[d][i]
    void column_dots(R* out, const R* a, const R* b, Index vectors) const {
        for (Index n = 0; n < vectors; ++n) {
            Vec<R> sum = {};
            for (Index d = 0; d < call.shape.value_dim; ++d)
                sum += load(a + d * tile + n * w) * load(b + d * tile + n * w);
            store(out + n * w, sum);
        }
    }

    // Computes the tile's p, slope and w; the rows whose top key is in it go to tops. Returns their
    // number.
    Index weigh(Thread& t, Top* tops, Index key, Index count, Index vectors,
                const Visibility& seen) const {
        scores.compute(t.p, t.keys, key, count, t.queries, vectors, seen);
        Index found = 0;
        if (effects) {
            scores.compute(t.moved, t.corrupted, key, count, t.queries, vectors, seen);
            for (Index i = 0; i < seen.queries; ++i) {
                const Index j = t.top[i] - key;
                if (j < 0 || j >= count) continue;
                const R score = t.p[j * tile + i];
                tops[found++] = {
                    t.top[i], i,
                    sigmoid_difference(score - t.loo_lse[i], t.moved[j * tile + i] - score)};
            }
        }
        const bool partial = seen.partial(key, count);
        const Int<R> number = lane_numbers<R>();
        const R cap = scores.softcap;
        for (Index j = 0; j < round_up(count, block_rows); ++j) {
            Index low = 0, high = 0;
            if (j < count) seen.of(key + j, low, high);
            for (Index n = seen.first_vector<R>(key + j / block_rows * block_rows); n < vectors;
                 ++n) {
                const Index at = j * tile + n * w;
                const Vec<R> score = load(t.p + at), lse = load(t.lse + n * w);
                Int<R> keep = (number + Whole<R>(n * w) >= Whole<R>(low)) &
                              (number + Whole<R>(n * w) < Whole<R>(high));
                if (!partial && j < count) keep = ~Int<R>{};
                // hidden scores may be anything; what is seen has score <= lse up to rounding
                const Vec<R> p = keep ? exp<R>(score - lse) : Vec<R>{};
                store(t.p + at, p);
                if (gradients && cap > 0) {
                    const Vec<R> squashed = score / cap;
                    store(t.slope + at, p * scores.scale * (1 - squashed * squashed));
                }
                if (!effects) continue;
                const Vec<R> moved = load(t.moved + at), change = moved - score;
                const Vec<R> moved_p = exp<R>(minimum(moved - lse, splat(R(80))));
                const Vec<R> small = p * small_expm1<R>(change);
                const Vec<R> size = change < 0 ? -change : change;
                const Vec<R> rise = size < R(0.5) ? small : moved_p - p;
                store(t.weight + at, keep ? rise / (moved_p + (1 - p)) : Vec<R>{});
            }
        }
        for (Index i = 0; i < found; ++i)
            t.weight[(tops[i].key - key) * tile + tops[i].query] = tops[i].weight;
        return found;
    }

    // sigmoid(x + change) - sigmoid(x) without cancellation; x = inf: nothing else to attend to.
    static R sigmoid_difference(R x, R change) {
        if (x == infinity<R>) return 0;
        const R y = x + change;
        const auto sigmoid = [](R u) { return 1 / (1 + std::exp(-u)); };
        return change > 0 ? sigmoid(y) * sigmoid(-x) * -std::expm1(-change)
                          : sigmoid(x) * sigmoid(-y) * std::expm1(change);
    }

    // dP - D of one cotangent, from which dS and the keys' effects.
    void add_tile(Thread& t, Index c, Index key, Index count, Index vectors,
                  const Visibility& seen) const {
        const R* mean = t.mean + c * tile;
        const R* slope = scores.softcap > 0 ? t.slope : t.p;
        const R factor = scores.softcap > 0 ? R(1) : scores.scale;
        R* effect = t.effect + c * call.shape.keys + key;
        const auto ranges = [&](Index m) {
            const Range range{seen.first_vector<R>(key + m), 0, call.shape.value_dim};
            if (gradients)
                for (int i = 0; i < block_rows; ++i)
                    std::fill(t.ds + (m + i) * tile, t.ds + (m + i) * tile + range.first * w, R(0));
            return range;
        };
        const auto finish = [&](Index m, Index n, auto& sums) {
            for (int i = 0; i < block_rows; ++i) {
                Index at = (m + i) * tile + n * w;
                Vec<R> moved = {};
                for (auto& sum : sums[i]) {
                    const Vec<R> x = sum - load(mean + at % tile);
                    if (gradients) store(t.ds + at, load(slope + at) * (x * factor));
                    if (effects) moved += load(t.weight + at) * x;
                    at += w;
                }
                if (effects && m + i < count) effect[m + i] += horizontal_sum<R>(moved);
            }
        };
        product(count, vectors, t.values.data + key * t.values.row, t.values.row, Index(1),
                t.grad + c * round_up(call.shape.value_dim, w) * tile, tile, ranges, finish);
    }

    static void unit(void* context, Index number, int thread) {
        const auto& self = *static_cast<const AttentionBackward*>(context);
        self.run(number, *reinterpret_cast<Thread*>(self.scratch + thread * self.scratch_stride));
    }
};

template <typename R>
void attention_backward(const BackwardCall& call, int threads) {
    const AttentionShape& s = call.shape;
    const Index size = call.grad_z.dtype == Dtype::float64   ? 8
                       : call.grad_z.dtype == Dtype::float32 ? 4
                                                             : 2;
    const Index batches = call.cotangents * s.batch * size, pairs = batches * s.kv_heads * s.keys;
    prefer_large_pages(call.grad_q.data, batches * s.heads * s.queries * s.head_dim);
    prefer_large_pages(call.grad_k.data, pairs * s.head_dim);
    prefer_large_pages(call.grad_v.data, pairs * s.value_dim);
    AttentionBackward<R> op(call, threads);
    run_units(op, threads);
}
