// Rows of any element type and stride, as rows of the accumulation type and back.
// Included once per instruction set, inside that set's namespace (isa_*.cpp): no include guard.

ATP_FAST_INLINE float widen_bfloat16(std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t(x) << 16;
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
}

ATP_FAST_INLINE std::uint16_t narrow_bfloat16(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return std::uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

ATP_FAST_INLINE float widen_float16(std::uint16_t x) {
    const std::uint32_t magnitude = std::uint32_t(x & 0x7fff) << 13;
    float scaled;
    __builtin_memcpy(&scaled, &magnitude, sizeof scaled);
    scaled *= 0x1p112f;  // moves the exponent's bias, denormals included
    std::uint32_t bits;
    __builtin_memcpy(&bits, &scaled, sizeof bits);
    bits |= (x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    bits |= std::uint32_t(x & 0x8000) << 16;
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
}

ATP_FAST_INLINE std::uint16_t narrow_float16(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const std::uint32_t sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
    const float shifted = magnitude + 0.5f;  // rounds a denormal result to its last place, 2^-24
    std::uint32_t denormal;
    __builtin_memcpy(&denormal, &shifted, sizeof denormal);
    const std::uint32_t normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    const std::uint32_t finite = bits < (113u << 23) ? denormal - 0x3f000000 : normal;
    const std::uint32_t overflow = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    return std::uint16_t(sign | (bits >= 0x477ff000 ? overflow : finite));
}

template <typename R, typename T, typename F>
ATP_FAST_INLINE void widen_row(R* out, const T* in, Index step, Index count, F widen) {
    if (step == 1)
        for (Index i = 0; i < count; ++i) out[i] = R(widen(in[i]));
    else
        for (Index i = 0; i < count; ++i) out[i] = R(widen(in[i * step]));
}

// out[i] = in[offset + i * step]
template <typename R>
inline void read_row(R* out, const void* in, Dtype dtype, Index offset, Index step, Index count) {
    const auto same = [](auto x) { return x; };
    switch (dtype) {
        case Dtype::float32:
            return widen_row(out, static_cast<const float*>(in) + offset, step, count, same);
        case Dtype::float64:
            return widen_row(out, static_cast<const double*>(in) + offset, step, count, same);
        case Dtype::bfloat16:
            return widen_row(out, static_cast<const std::uint16_t*>(in) + offset, step, count,
                             [](std::uint16_t x) { return widen_bfloat16(x); });
        case Dtype::float16:
            return widen_row(out, static_cast<const std::uint16_t*>(in) + offset, step, count,
                             [](std::uint16_t x) { return widen_float16(x); });
    }
}

// out[offset + i] = in[i]
template <typename R>
inline void write_row(const View& out, Index offset, const R* in, Index count) {
    switch (out.dtype) {
        case Dtype::float32:
            for (Index i = 0; i < count; ++i)
                static_cast<float*>(out.data)[offset + i] = float(in[i]);
            return;
        case Dtype::float64:
            for (Index i = 0; i < count; ++i)
                static_cast<double*>(out.data)[offset + i] = double(in[i]);
            return;
        case Dtype::bfloat16:
            for (Index i = 0; i < count; ++i)
                static_cast<std::uint16_t*>(out.data)[offset + i] = narrow_bfloat16(float(in[i]));
            return;
        case Dtype::float16:
            for (Index i = 0; i < count; ++i)
                static_cast<std::uint16_t*>(out.data)[offset + i] = narrow_float16(float(in[i]));
            return;
    }
}

template <typename R>
constexpr Dtype wide_dtype = sizeof(R) == 8 ? Dtype::float64 : Dtype::float32;

// The row itself where it already is what the kernels read, else a copy of it in buffer.
template <typename R>
ATP_FAST_INLINE const R* row(R* buffer, const void* in, Dtype dtype, Index offset, Index step,
                             Index count) {
    if (dtype == wide_dtype<R> && (step == 1 || count == 1))
        return static_cast<const R*>(in) + offset;
    read_row(buffer, in, dtype, offset, step, count);
    return buffer;
}
