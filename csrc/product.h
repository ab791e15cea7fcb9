// Register-blocked products of small packed tiles: C[m][n] = sum over k of A(m, k) B[k][n].
// B's rows are contiguous (n runs along the vector lanes); A is read one element at a time, at any
// strides. Included once per instruction set, inside that set's namespace (isa_*.cpp): no include
// guard.

// Rows of C per register block (A must be readable up to a multiple of it) and vectors per block.
// With AVX2, 6 x 2 in columns of blocks made attention_vjp 5 to 8 % slower than 4 x 3 in rows.
constexpr int block_rows = 4;
constexpr int block_vectors = ATP_FAST_REGISTERS == 32 ? 4 : 3;

// What of a block of rows has to be computed: vectors from `first` on, depth [begin, end).
struct Range {
    Index first, begin, end;
};

// One step of depth of a register block: sums[m][n] += a[m] b[n].
template <int M, int N, typename R>
ATP_FAST_INLINE void multiply_add(Vec<R> (&sums)[M][N], const R* a, Index a_row, const R* b) {
    Vec<R> right[N];
    for (int n = 0; n < N; ++n) right[n] = load(b + n * lanes<R>);
    for (int m = 0; m < M; ++m) {
        const R left = a[m * a_row];
        for (int n = 0; n < N; ++n) sums[m][n] += left * right[n];
    }
}

template <int N, typename R, typename Done>
ATP_FAST_INLINE void product_block(Range range, const R* a, Index a_row, Index a_step, const R* b,
                                   Index b_row, const Done& done) {
    Vec<R> sums[block_rows][N];
    for (int m = 0; m < block_rows; ++m)
        for (int n = 0; n < N; ++n) sums[m][n] = Vec<R>{};
    for (Index k = range.begin; k < range.end; ++k)
        multiply_add(sums, a + k * a_step, a_row, b + k * b_row);
    done(sums);
}

// Calls done(m, n, sums) for every register block: sums is an array [block_rows][some vectors]
// whose corner is row m, vector n. range(m) says what a block of rows needs.
template <typename R, typename Ranges, typename Done>
ATP_FAST_INLINE void product(Index rows, Index vectors, const R* a, Index a_row, Index a_step,
                             const R* b, Index b_row, const Ranges& ranges, const Done& done) {
    for (Index m = 0; m < rows; m += block_rows) {
        const Range range = ranges(m);
        const R* left = a + m * a_row;
        Index n = range.first;
        while (n < vectors) {
            const R* right = b + n * lanes<R>;
            const auto at = [&](auto& sums) { done(m, n, sums); };
            switch (std::min<Index>(vectors - n, block_vectors)) {
                case 1: product_block<1>(range, left, a_row, a_step, right, b_row, at); break;
                case 2: product_block<2>(range, left, a_row, a_step, right, b_row, at); break;
                case 3: product_block<3>(range, left, a_row, a_step, right, b_row, at); break;
                default:
                    product_block<block_vectors>(range, left, a_row, a_step, right, b_row, at);
                    break;
            }
            n += block_vectors;
        }
    }
}

// done for `product`: adds to the rows of c that exist, or sets them when c holds nothing yet.
template <typename R>
struct AddTo {
    R* c;
    Index c_row, rows;
    bool fresh;

    template <int N>
    ATP_FAST_INLINE void operator()(Index m, Index n, Vec<R> (&sums)[block_rows][N]) const {
        for (int i = 0; i < block_rows; ++i) {
            if (m + i >= rows) return;
            R* out = c + (m + i) * c_row + n * lanes<R>;
            for (int j = 0; j < N; ++j, out += lanes<R>)
                store(out, fresh ? sums[i][j] : load(out) + sums[i][j]);
        }
    }
};
