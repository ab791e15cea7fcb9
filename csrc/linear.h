// y = x w + bias. w is read where it lies, packed panel by panel, while the next block of panels is
// on its way from memory: with few rows of x the time is that of reading w. Included once per
// instruction set, inside that set's namespace (isa_*.cpp): no include guard.

// A tile of y, and the most depth taken at once. With AVX2 a panel is 30 KiB, for the first cache;
// the rows of x beside it are 240 KiB and the next block of w 120 KiB, for the second.
// Measured on Zen 3: 96 to 384 rows and depths of 192 to 512 are within 10 %, 2 or 8 panels up to
// 10 % slower.
constexpr Index linear_rows = 192, linear_depth = 320, linear_panels = 4;

// Rows of x that meet all of w before the next ones do, so that they stay in the third cache.
// When all rows meet a tile of columns before the next tile, 4,608 rows take up to 18 % longer.
constexpr Index linear_group_bytes = 4 << 20;

template <typename R>
constexpr Index panel_width = block_vectors * lanes<R>;
template <typename R>
constexpr Index linear_columns = linear_panels * panel_width<R>;
template <typename R>
constexpr Index linear_scratch = linear_depth * (panel_width<R> + block_rows);

// Columns of w[depth][columns], panel_width of them at most, as a panel [depth][panel_width]; zeros
// behind the last column.
template <typename R>
ATP_FAST_INLINE void pack_panel(const R* w, Index row, Index column, Index depth, Index columns,
                                R* panel) {
    constexpr Index L = lanes<R>, P = panel_width<R>;
    Index k = 0;
    if (columns == P && column == 1) {
        for (; k < depth; ++k)
            for (Index n = 0; n < P; n += L) store(panel + k * P + n, load(w + k * row + n));
    } else if (columns == P && row == 1) {
        const Index whole = depth / L * L;
        for (Index n = 0; n < P; n += L)
            for (k = 0; k < whole; k += L) {
                const R* from = w + n * column + k;
                Vec<R> square[L];
                for (Index i = 0; i < L; ++i) __builtin_prefetch(from + i * column + 4 * L);
                for (Index i = 0; i < L; ++i) square[i] = load(from + i * column);
                transpose_square<R>(square);
                for (Index i = 0; i < L; ++i) store(panel + (k + i) * P + n, square[i]);
            }
    }
    for (; k < depth; ++k)
        for (Index n = 0; n < P; ++n)
            panel[k * P + n] = n < columns ? w[k * row + n * column] : R(0);
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
            multiply_add<N>(sums, x + k, x_row, panel + k * panel_width<R>);
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
        const Index blocks = (round_up(columns, panel_width<R>) /
                              panel_width<R>)*(round_up(rows, block_rows) / block_rows);
        const Index steps = std::max<Index>(1, round_up(call.depth, linear_depth) / linear_depth);
        const Index longest = round_up(round_up(call.depth, steps) / steps, lanes<R>);
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
                pack_panel(w + k * call.w_row + n * call.w_column, call.w_row, call.w_column, depth,
                           std::min(panel_width<R>, columns - n), panel);
                for (Index m = 0; m < rows; m += block_rows) {
                    if (m < whole) prefetch_block(m, n);
                    const R* left = m < whole ? x + m * call.x_row + k : last_rows;
                    const Index left_row = m < whole ? call.x_row : linear_depth;
                    const auto done = [&](const auto& sums) { add(m, n, k == 0, sums); };
                    const auto block = [&](auto vectors) {
                        linear_block<vectors>(depth, left, left_row, panel, ahead, step, done);
                    };
                    switch (
                        std::min<Index>((columns - n + lanes<R> - 1) / lanes<R>, block_vectors)) {
                        case 1: block(std::integral_constant<int, 1>()); break;
                        case 2: block(std::integral_constant<int, 2>()); break;
                        case 3: block(std::integral_constant<int, 3>()); break;
                        default: block(std::integral_constant<int, block_vectors>()); break;
                    }
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

// Every element of y is summed by one thread in one order, whatever the rows and the threads.
template <typename R>
void linear(const LinearCall& call, int threads) {
    struct Context {
        const LinearCall& call;
        Index row_tiles, column_tiles, group;  // group: tiles of rows
        int threads;
        R* scratch;
    };
    static constexpr Index width = linear_columns<R>;
    const Index row_tiles = round_up(call.rows, linear_rows) / linear_rows;
    const Index column_tiles = round_up(call.columns, width) / width;
    const Index tile_bytes = linear_rows * std::max<Index>(1, call.depth) * Index(sizeof(R));
    const Scratch scratch(std::max(threads, 1) * linear_scratch<R> * Index(sizeof(R)));
    Context context{call,
                    row_tiles,
                    column_tiles,
                    std::max<Index>(1, linear_group_bytes / tile_bytes),
                    std::max(threads, 1),
                    reinterpret_cast<R*>(scratch.data())};
    const auto tile = [](void* given, Index unit, int thread) {
        const Context& c = *static_cast<Context*>(given);
        const Index first = unit / (c.group * c.column_tiles) * c.group;  // first tile of the group
        const Index rows = std::min(c.group, c.row_tiles - first);
        const Index inside = unit - first * c.column_tiles;
        const Index row = (first + inside % rows) * linear_rows, column = inside / rows * width;
        // threads that keep step take units `threads` apart
        const Index next = std::min(c.call.columns, (inside + c.threads) / rows * width);
        R* panel = c.scratch + thread * linear_scratch<R>;
        LinearTile<R>{c.call,
                      row,
                      column,
                      std::min(linear_rows, c.call.rows - row),
                      std::min(width, c.call.columns - column),
                      next,
                      next == column ? 0 : std::min(width, c.call.columns - next),
                      panel,
                      panel + linear_depth * panel_width<R>}
            .run();
    };
    parallel(row_tiles * column_tiles, threads, tile, &context);
}
