// Vectors of ATP_FAST_VECTOR_BYTES bytes for float and double, and the functions the kernels need
// on them. Included once per instruction set, inside that set's namespace (isa_*.cpp): no include
// guard.

#define ATP_FAST_INLINE inline __attribute__((always_inline))

template <typename R>
struct Simd;

template <>
struct Simd<float> {
    typedef float Vec __attribute__((vector_size(ATP_FAST_VECTOR_BYTES)));
    typedef std::int32_t Whole;
    typedef Whole Int __attribute__((vector_size(ATP_FAST_VECTOR_BYTES)));
    static constexpr int mantissa = 23;
    static constexpr float round_magic = 0x1.8p23f;
    static constexpr float log2_e = 0x1.715476p+0f;
    static constexpr float ln2_high = 0x1.62e400p-1f, ln2_low = 0x1.7f7d1cp-20f;
    static constexpr float smallest = -87.3f, largest = 88.0f;
    static constexpr int terms =
        8;  // of the Taylor series of exp(r), |r| <= ln(2)/2: remainder < 6e-9
    static constexpr int small_terms = 8;  // of expm1(x)/x, |x| <= 1/2: remainder < 2e-8
};

template <>
struct Simd<double> {
    typedef double Vec __attribute__((vector_size(ATP_FAST_VECTOR_BYTES)));
    typedef std::int64_t Whole;
    typedef Whole Int __attribute__((vector_size(ATP_FAST_VECTOR_BYTES)));
    static constexpr int mantissa = 52;
    static constexpr double round_magic = 0x1.8p52;
    static constexpr double log2_e = 0x1.71547652b82fep+0;
    static constexpr double ln2_high = 0x1.62e42fefa0000p-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
    static constexpr double smallest = -708.0, largest = 709.0;
    static constexpr int terms = 14;
    static constexpr int small_terms = 15;
};

template <typename R>
using Vec = typename Simd<R>::Vec;
template <typename R>
using Int = typename Simd<R>::Int;
template <typename R>
using Whole = typename Simd<R>::Whole;
template <typename R>
constexpr int lanes = ATP_FAST_VECTOR_BYTES / int(sizeof(R));

template <typename R>
ATP_FAST_INLINE Vec<R> load(const R* p) {
    Vec<R> x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

template <typename R>
ATP_FAST_INLINE void store(R* p, Vec<R> x) {
    __builtin_memcpy(p, &x, sizeof x);
}

template <typename R>
ATP_FAST_INLINE Vec<R> splat(R x) {
    return x - Vec<R>{};
}

// Asks the caches for `count` elements, to read (0) or to write (1).
template <int Write, typename R>
ATP_FAST_INLINE void prefetch(const R* p, Index count) {
    for (Index i = 0; i < count; i += 64 / Index(sizeof(R))) __builtin_prefetch(p + i, Write);
}

template <typename V>
ATP_FAST_INLINE V maximum(V a, V b) {
    return a > b ? a : b;
}
template <typename V>
ATP_FAST_INLINE V minimum(V a, V b) {
    return a < b ? a : b;
}

// 0, 1, 2, ...
template <typename R>
ATP_FAST_INLINE Int<R> lane_numbers() {
    Int<R> x;
    for (int i = 0; i < lanes<R>; ++i) x[i] = i;
    return x;
}

// Lanes of a and b picked by number: 0 .. lanes-1 are a's, the next are b's.
template <typename R>
ATP_FAST_INLINE Vec<R> pick(Vec<R> a, Vec<R> b, Int<R> numbers) {
#if defined(__clang__)
    Vec<R> out;
    for (int i = 0; i < lanes<R>; ++i)
        out[i] = numbers[i] < lanes<R> ? a[numbers[i]] : b[numbers[i] - lanes<R>];
    return out;
#else
    return __builtin_shuffle(a, b, numbers);
#endif
}

template <typename R>
ATP_FAST_INLINE R horizontal_sum(Vec<R> x) {
    for (int step = lanes<R> / 2; step > 0; step /= 2)
        x += pick<R>(x, x, lane_numbers<R>() ^ Whole<R>(step));
    return x[0];
}

// Transposes a square of vectors in place, by exchanging halves, quarters, ... of neighbouring
// rows.
template <typename R>
ATP_FAST_INLINE void transpose_square(Vec<R> (&rows)[lanes<R>]) {
    for (int step = lanes<R> / 2; step > 0; step /= 2) {
        const Int<R> number = lane_numbers<R>(), second = (number & Whole<R>(step)) != 0;
        const Int<R> low = number + (second & Whole<R>(lanes<R> - step));
        const Int<R> high =
            number + (second ? Int<R>{} + Whole<R>(lanes<R>) : Int<R>{} + Whole<R>(step));
        for (int i = 0; i < lanes<R>; ++i) {
            if (i & step) continue;
            const Vec<R> a = rows[i], b = rows[i + step];
            rows[i] = pick<R>(a, b, low);
            rows[i + step] = pick<R>(a, b, high);
        }
    }
}

template <typename R>
struct Reciprocals {  // 1/n!
    R of[20];
    constexpr Reciprocals() : of{} {
        double factorial = 1;
        of[0] = 1;
        for (int n = 1; n < 20; ++n) of[n] = R(1 / (factorial *= n));
    }
};

template <typename R>
constexpr Reciprocals<R> reciprocal_factorials{};

// exp(x), at most 1 ulp off with fused multiply-adds and 1.2 without (tests/test_ops_cpp.py); 0
// below Simd::smallest, so no denormals; x above Simd::largest counts as that, so no infinity.
template <typename R>
ATP_FAST_INLINE Vec<R> exp(Vec<R> x) {
    using S = Simd<R>;
    const Vec<R> clamped = minimum(x, splat<R>(S::largest));
    const Vec<R> shifted = clamped * S::log2_e + S::round_magic;
    const Vec<R> n = shifted - S::round_magic;
    const Vec<R> r = (clamped - n * S::ln2_high) - n * S::ln2_low;
    Vec<R> sum = splat<R>(reciprocal_factorials<R>.of[S::terms - 1]);
    for (int i = S::terms - 2; i >= 0; --i) sum = sum * r + reciprocal_factorials<R>.of[i];
    const Int<R> bits = (Int<R>)sum + ((Int<R>)shifted << S::mantissa);
    return x < S::smallest ? Vec<R>{} : (Vec<R>)bits;
}

// expm1(x) for |x| <= 1/2, relative error a few ulp.
template <typename R>
ATP_FAST_INLINE Vec<R> small_expm1(Vec<R> x) {
    Vec<R> sum = splat<R>(reciprocal_factorials<R>.of[Simd<R>::small_terms]);
    for (int i = Simd<R>::small_terms - 1; i >= 2; --i)
        sum = sum * x + reciprocal_factorials<R>.of[i];
    return x + x * x * sum;
}

// tanh(x) = t / (t + 2), t = expm1(2 |x|), with x's sign.
template <typename R>
ATP_FAST_INLINE Vec<R> tanh(Vec<R> x) {
    const Vec<R> twice = minimum(x < 0 ? -2 * x : 2 * x, splat<R>(R(40)));
    const Vec<R> t = twice < R(0.5) ? small_expm1<R>(twice) : exp<R>(twice) - 1;
    const Vec<R> result = t / (t + 2);
    return x < 0 ? -result : result;
}
