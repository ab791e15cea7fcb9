// y = x w + bias. w is read where it lies, packed panel by panel, while the next block of panels is
// on its way from memory: with few rows of x the time is that of reading w. Then, if w is stored
// column by column, as torch keeps the weights of nn.Linear, it need not be packed at all: see
// TurnedTile. Every element of y is summed by one thread in one order, whatever the rows, the
// threads and the way. Included once per instruction set, inside that set's namespace (isa_*.cpp):
// no include guard.

// The most rows, depth and panels of a tile of y. With AVX2 a panel is 30 KiB, for the first cache;
// the rows of x beside it are 240 KiB and the next block of w 120 KiB, for the second.
// Measured on Zen 3: 96 to 384 rows and depths of 192 to 512 are within 10 %, 2 or 8 panels up to
// 10 % slower. With AVX512 a panel of 96 KiB comes from the second cache and x from the third: on
// Zen 4 a panel that 768 rows meet instead of 192 makes the product 7 % faster where w has to be
// turned, 3 % where not.
constexpr Index linear_rows = ATP_FAST_REGISTERS == 32 ? 768 : 192;
constexpr Index linear_depth = ATP_FAST_REGISTERS == 32 ? 384 : 320, linear_panels = 4;

// Rows of x that meet all of w before the next ones do, so that they stay in the third cache.
// When all rows meet a tile of columns before the next tile, 4,608 rows take up to 18 % longer.
constexpr Index linear_group_bytes = 4 << 20;

template <typename R>
constexpr Index panel_width = block_vectors * lanes<R>;
template <typename R>
constexpr Index linear_scratch = linear_depth * (panel_width<R> + block_rows);

// Columns of w[depth][columns], P of them at most, as a panel [depth][P]; zeros behind the last
// column.
template <Index P, typename R>
ATP_FAST_INLINE void pack_panel(const R* w, Index row, Index column, Index depth, Index columns,
                                R* panel) {
    constexpr Index L = lanes<R>;
    if (columns == P && column == 1) {
        for (Index k = 0; k < depth; ++k)
            for (Index n = 0; n < P; n += L) store(panel + k * P + n, load(w + k * row + n));
        return;
    }
    const Index whole = row == 1 ? depth / L * L : 0;
    for (Index n = 0; n < P; n += L) {
        const Index squares = n + L <= columns ? whole : 0;  // the depth that goes in squares
        for (Index k = 0; k < squares; k += L) {
            const R* from = w + n * column + k;
            Vec<R> square[L];
            for (Index i = 0; i < L; ++i) __builtin_prefetch(from + i * column + 4 * L);
            for (Index i = 0; i < L; ++i) square[i] = load(from + i * column);
            transpose_square<R>(square);
            for (Index i = 0; i < L; ++i) store(panel + (k + i) * P + n, square[i]);
        }
        for (Index k = squares; k < depth; ++k)
            for (Index i = n; i < n + L; ++i)
                panel[k * P + i] = i < columns ? w[k * row + i * column] : R(0);
    }
}

// The depth that sums take in at once: linear_depth at most, in equal parts.
template <typename R>
Index block_depth(Index depth) {
    const Index blocks = std::max<Index>(1, divide_up(depth, linear_depth));
    return round_up(divide_up(depth, blocks), lanes<R>);
}

// f(integral_constant of `vectors`, or of Most if there are more)
template <int Most, typename F>
ATP_FAST_INLINE void with_vectors(Index vectors, const F& f) {
    if constexpr (Most > 1)
        if (vectors < Most) return with_vectors<Most - 1>(vectors, f);
    f(std::integral_constant<int, Most>());
}

// Cache lines of a block that will be packed next, asked for one by one.
struct Lines {
    const char* data;
    Index runs, bytes, stride;  // runs of `bytes`, `stride` bytes apart
    Index run = 0, byte = 0;

    Index count() const { return runs * (bytes / 64 + 1); }
    ATP_FAST_INLINE void fetch_one() {
        if (run >= runs) return;
        __builtin_prefetch(data + run * stride + byte, 0, 2);
        byte += 64;
        if (byte >= bytes) byte = 0, ++run;
    }
};

// A register block of y, whose sums go to done; a line is fetched every `step` of depth.
template <int N, typename R, typename Done>
ATP_FAST_INLINE void linear_block(Index depth, const R* x, Index x_row, const R* panel,
                                  Lines& ahead, Index step, const Done& done) {
    Vec<R> sums[block_rows][N];
    for (int m = 0; m < block_rows; ++m)
        for (int n = 0; n < N; ++n) sums[m][n] = Vec<R>{};
    for (Index k = 0; k < depth;) {
        ahead.fetch_one();
        for (const Index end = std::min(depth, k + step); k < end; ++k)
            multiply_add(sums, x + k, x_row, panel + k * panel_width<R>);
    }
    done(sums);
}

template <typename R>
struct LinearTile {
    const LinearCall& call;
    Index first_row, first_column, rows, columns;
    Index next_column, next_columns;  // of the tile that the thread will likely do next, or none
    R* panel;                         // [linear_depth][panel_width]
    R* last_rows;                     // [block_rows][linear_depth], what is left over of x's rows

    // Not inlined: among what surrounds the call the compiler would run out of registers.
    __attribute__((noinline)) void run() const {
        const R* x = static_cast<const R*>(call.x) + first_row * call.x_row;
        const R* w = static_cast<const R*>(call.w) + first_column * call.w_column;
        const Index whole = rows / block_rows * block_rows;
        const Index blocks = divide_up(columns, panel_width<R>) * divide_up(rows, block_rows);
        const Index longest = block_depth<R>(call.depth);
        Index k = 0;
        do {  // once at least: without depth y is the bias
            const Index depth = std::min(longest, call.depth - k), next = k + depth;
            for (Index m = whole; m < rows; ++m)
                std::copy_n(x + m * call.x_row + k, depth, last_rows + (m - whole) * linear_depth);
            Lines ahead = next < call.depth ? lines(next, longest, first_column, columns)
                                            : lines(0, longest, next_column, next_columns);
            const Index step =
                std::max<Index>(1, blocks * depth / std::max<Index>(1, ahead.count()));
            for (Index n = 0; n < columns; n += panel_width<R>) {
                pack_panel<panel_width<R>>(w + k * call.w_row + n * call.w_column, call.w_row,
                                           call.w_column, depth,
                                           std::min(panel_width<R>, columns - n), panel);
                for (Index m = 0; m < rows; m += block_rows) {
                    if (m < whole) prefetch_block(m, n);
                    const R* left = m < whole ? x + m * call.x_row + k : last_rows;
                    const Index left_row = m < whole ? call.x_row : linear_depth;
                    const auto done = [&](const auto& sums) { add(m, n, k == 0, sums); };
                    const auto block = [&](auto vectors) __attribute__((always_inline)) {
                        linear_block<vectors>(depth, left, left_row, panel, ahead, step, done);
                    };
                    with_vectors<block_vectors>(divide_up(columns - n, lanes<R>), block);
                }
            }
            k = next;
        } while (k < call.depth);
    }

    // The lines of w[depth][columns] from row k and `column` on; of rows only as far as w has any.
    Lines lines(Index k, Index depth, Index column, Index columns) const {
        constexpr Index size = sizeof(R);
        const R* w = static_cast<const R*>(call.w) + k * call.w_row + column * call.w_column;
        const char* data = reinterpret_cast<const char*>(w);
        depth = columns > 0 ? std::min(depth, call.depth - k) : 0;
        if (call.w_column == 1) return {data, depth, columns * size, call.w_row * size};
        return {data, columns, depth * size, call.w_column * size};
    }

    // Asks for the part of y that a register block at row m, column n of the tile will be added to.
    ATP_FAST_INLINE void prefetch_block(Index m, Index n) const {
        const R* y = static_cast<const R*>(call.y) + (first_row + m) * call.columns + first_column;
        for (int i = 0; i < block_rows; ++i) prefetch<1>(y + i * call.columns + n, panel_width<R>);
    }

    // Adds a register block at row m, column n of the tile to y, or to the bias when it is the
    // first.
    template <int N>
    ATP_FAST_INLINE void add(Index m, Index n, bool first,
                             const Vec<R> (&sums)[block_rows][N]) const {
        R* y = static_cast<R*>(call.y) + (first_row + m) * call.columns + first_column + n;
        const R* bias = call.bias ? static_cast<const R*>(call.bias) + first_column + n : nullptr;
        if (m + block_rows <= rows && n + N * lanes<R> <= columns) {
            for (int i = 0; i < block_rows; ++i, y += call.columns)
                for (int j = 0; j < N; ++j) {
                    const Index at = j * lanes<R>;
                    const Vec<R> before = !first ? load(y + at) : bias ? load(bias + at) : Vec<R>{};
                    store(y + at, before + sums[i][j]);
                }
            return;
        }
        for (int i = 0; i < std::min<Index>(block_rows, rows - m); ++i, y += call.columns)
            for (Index at = 0; at < std::min<Index>(N * lanes<R>, columns - n); ++at)
                y[at] = (!first ? y[at]
                         : bias ? bias[at]
                                : R(0)) +
                        sums[i][at / lanes<R>][at % lanes<R>];
    }
};

// Panels of a tile, such that the thread with the most to do has the least.
inline Index tile_panels(Index row_tiles, Index panels, int threads) {
    Index best = 0, least = 0;
    for (Index each = linear_panels; each > 0; --each) {
        const Index tiles = row_tiles * divide_up(panels, each);
        const Index most = divide_up(tiles, threads) * each;
        if (best == 0 || most < least) best = each, least = most;
    }
    return best;
}

template <typename R>
void tiled_linear(const LinearCall& call, int threads) {
    struct Context {
        const LinearCall& call;
        Index rows, width;                     // of a tile
        Index row_tiles, column_tiles, group;  // group: tiles of rows
        int threads;
        R* scratch;
    };
    const Index row_tiles = divide_up(call.rows, linear_rows);
    const Index rows = round_up(divide_up(call.rows, std::max<Index>(1, row_tiles)), block_rows);
    const Index panels = divide_up(call.columns, panel_width<R>);
    const Index width = tile_panels(row_tiles, panels, std::max(threads, 1)) * panel_width<R>;
    const Index tile_bytes = std::max<Index>(1, rows * call.depth) * Index(sizeof(R));
    const Scratch scratch(std::max(threads, 1) * linear_scratch<R> * Index(sizeof(R)));
    Context context{call,
                    rows,
                    width,
                    row_tiles,
                    divide_up(call.columns, width),
                    std::max<Index>(1, linear_group_bytes / tile_bytes),
                    std::max(threads, 1),
                    reinterpret_cast<R*>(scratch.data())};
    const auto tile = [](void* given, Index unit, int thread) {
        const Context& c = *static_cast<Context*>(given);
        const Index first = unit / (c.group * c.column_tiles) * c.group;  // first tile of the group
        const Index rows = std::min(c.group, c.row_tiles - first);
        const Index inside = unit - first * c.column_tiles;
        const Index row = (first + inside % rows) * c.rows, column = inside / rows * c.width;
        // threads that keep step take units `threads` apart
        const Index next = std::min(c.call.columns, (inside + c.threads) / rows * c.width);
        R* panel = c.scratch + thread * linear_scratch<R>;
        LinearTile<R>{c.call,
                      row,
                      column,
                      std::min(c.rows, c.call.rows - row),
                      std::min(c.width, c.call.columns - column),
                      next,
                      next == column ? 0 : std::min(c.width, c.call.columns - next),
                      panel,
                      panel + linear_depth * panel_width<R>}
            .run();
    };
    parallel(row_tiles * context.column_tiles, threads, tile, &context);
}

// The product as y' = w' x': x' is packed, once, and w' read in place, row after row, the next
// rows being asked for. Up to few_rows rows of x: 1.2 to 1.4 times as fast on Zen 3 as packing w at
// 8 to 32 rows, 1.1 times at 64; slower from 128 on, where the packed x' leaves the caches. On
// Zen 4, whose vectors hold twice as much, 1.05 times at 128 rows and slower from 256 on.
constexpr Index few_rows = ATP_FAST_REGISTERS == 32 ? 128 : 64, turned_columns = 48;
constexpr int turned_vectors = 4, turned_sums = block_rows * block_vectors;
// Rows of w' read side by side, at most: 12 were up to 1.6 times slower.
constexpr int turned_streams = ATP_FAST_REGISTERS == 32 ? 8 : 6;
template <typename R>
constexpr Index turned_width = turned_vectors * lanes<R>;

// Rows of w' beside `vectors` of x', a divisor of turned_columns.
constexpr int turned_rows(int vectors) {
    int rows = std::min(turned_sums / vectors, turned_streams);
    while (turned_columns % rows) --rows;
    return rows;
}

// multiply_add with the smaller side in registers.
template <int M, int N, typename R>
ATP_FAST_INLINE void turned_step(Vec<R> (&sums)[M][N], const R* w, Index w_column, const R* x) {
    if constexpr (M > N) {
        multiply_add(sums, w, w_column, x);
    } else {
        for (int n = 0; n < N; ++n) {
            const Vec<R> right = load(x + n * lanes<R>);
            for (int m = 0; m < M; ++m) sums[m][n] += w[m * w_column] * right;
        }
    }
}

template <typename R>
struct TurnedTile {
    const LinearCall& call;
    Index first_column, columns;
    const R* x;  // [panels][depth][turned_width, or the vectors that hold the last panel's rows]
    R* sums;     // [turned_columns][turned_width]
    Index next;  // columns from this tile to the one that the thread will likely do next

    __attribute__((noinline)) void run() const {
        const Index longest = block_depth<R>(call.depth);
        for (Index row = 0; row < call.rows; row += turned_width<R>) {
            const Index rows = std::min(call.rows - row, turned_width<R>);
            Index k = 0;
            do {  // once at least: without depth y is the bias
                const Index depth = std::min(longest, call.depth - k);
                with_vectors<turned_vectors>(
                    divide_up(rows, lanes<R>), [&](auto vectors) __attribute__((always_inline)) {
                        constexpr int N = vectors, M = turned_rows(N);
                        Index m = 0;
                        for (; m + M <= columns; m += M) {
                            const bool last = m + 2 * M > columns;
                            const R* ahead = last ? behind(row, k + depth) : weights(m + M, k);
                            block<M, N>(m, row, k, depth, ahead);
                        }
                        for (; m < columns; ++m) block<1, N>(m, row, k, depth, weights(m + 1, k));
                    });
                k += longest;
            } while (k < call.depth);
            write(row, rows);
        }
    }

    const R* weights(Index m, Index k) const {
        return static_cast<const R*>(call.w) + (first_column + m) * call.w_column + k;
    }

    // The weights that are needed when all columns have met the depth up to k.
    const R* behind(Index row, Index k) const {
        if (k < call.depth) return weights(0, k);
        return weights(row + turned_width<R> < call.rows ? 0 : next, 0);
    }

    // Sums of columns m .. m + M of the tile and N vectors of rows from `row` on over depth from k,
    // while the weights at `ahead` are asked for.
    template <int M, int N>
    ATP_FAST_INLINE void block(Index m, Index row, Index k, Index depth, const R* ahead) const {
        constexpr Index L = lanes<R>, P = turned_width<R>;
        const R* w = weights(m, k);
        const R* right = x + row * call.depth + k * N * L;
        Vec<R> found[M][N];
        for (int i = 0; i < M; ++i)
            for (int n = 0; n < N; ++n) found[i][n] = Vec<R>{};
        constexpr Index line = 64 / Index(sizeof(R));
        for (Index at = 0; at < depth;) {
            for (int i = 0; i < M; ++i) __builtin_prefetch(ahead + i * call.w_column + at, 0, 2);
            for (const Index end = std::min(depth, at + line); at < end; ++at)
                turned_step(found, w + at, call.w_column, right + at * N * L);
        }
        for (int i = 0; i < M; ++i) {
            const R bias =
                call.bias ? static_cast<const R*>(call.bias)[first_column + m + i] : R(0);
            for (int n = 0; n < N; ++n) {
                R* out = sums + (m + i) * P + n * L;
                store(out, (k == 0 ? splat<R>(bias) : load(out)) + found[i][n]);
            }
        }
    }

    // Sums, turned back, to y's rows from `row` on.
    void write(Index row, Index rows) const {
        constexpr Index L = lanes<R>, P = turned_width<R>;
        R* y = static_cast<R*>(call.y) + row * call.columns + first_column;
        for (Index n = 0; n < rows; n += L)
            for (Index m = 0; m < columns; m += L) {
                Vec<R> square[L];
                for (Index i = 0; i < L; ++i) square[i] = load(sums + (m + i) * P + n);
                transpose_square<R>(square);
                for (Index i = 0; i < std::min(L, rows - n); ++i) {
                    R* out = y + (n + i) * call.columns + m;
                    if (m + L <= columns)
                        store(out, square[i]);
                    else
                        for (Index j = 0; j < columns - m; ++j) out[j] = square[i][j];
                }
            }
    }
};

template <typename R>
void turned_linear(const LinearCall& call, int threads) {
    struct Context {
        const LinearCall& call;
        const R* x;
        R* sums;
        Index next;  // columns
    };
    constexpr Index P = turned_width<R>, tile = turned_columns * P;
    const Index packed = round_up(call.rows, P) * call.depth;
    const Scratch scratch((packed + std::max(threads, 1) * tile) * Index(sizeof(R)));
    R* x = reinterpret_cast<R*>(scratch.data());
    for (Index row = 0; row < call.rows; row += P) {
        const R* from = static_cast<const R*>(call.x) + row * call.x_row;
        const auto pack = [&](auto vectors) {
            constexpr Index width = vectors * lanes<R>;
            pack_panel<width>(from, Index(1), call.x_row, call.depth,
                              std::min(width, call.rows - row), x + row * call.depth);
        };
        with_vectors<turned_vectors>(divide_up(call.rows - row, lanes<R>), pack);
    }
    Context context{call, x, x + packed, std::max(threads, 1) * turned_columns};
    const auto run = [](void* given, Index unit, int thread) {
        const Context& c = *static_cast<Context*>(given);
        const Index first = unit * turned_columns;
        TurnedTile<R>{c.call,
                      first,
                      std::min(turned_columns, c.call.columns - first),
                      c.x,
                      c.sums + thread * tile,
                      c.next}
            .run();
    };
    parallel(divide_up(call.columns, turned_columns), threads, run, &context);
}

template <typename R>
void linear(const LinearCall& call, int threads) {
    if (call.rows <= few_rows && call.w_row == 1)
        turned_linear<R>(call, threads);
    else
        tiled_linear<R>(call, threads);
}
