// What linear layers do to single rows: their ends, LayerNorm's moments, GELU. Included after simd.h, where that is.

constexpr int64_t kStep = 2 * W;  // columns that load2 takes
constexpr float kNormEps = 1e-5f;

// The first `count` of kStep elements, zeros after them: the end of a line whose length is no multiple of kStep.
template <class T>
BARK_FAST_INLINE void load2_some(const T* p, int64_t count, Vec& a, Vec& b) {
    T some[kStep] = {};
    __builtin_memcpy(some, p, count * sizeof(T));
    load2(some, a, b);
}

// W elements in their order; load2 has an order of its own.
typedef uint16_t Shorts __attribute__((vector_size(W * 2)));
typedef Shorts LooseShorts __attribute__((aligned(2), may_alias));
BARK_FAST_INLINE Vec widen(const float* p) { return load(p); }
BARK_FAST_INLINE Vec widen(const Half* p) { return widen_half(p); }
BARK_FAST_INLINE Vec widen(const Brain* p) {
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const LooseShorts*>(p), Bits) << 16);
}
BARK_FAST_INLINE void narrow(float* p, Vec v) { store(p, v); }
BARK_FAST_INLINE void narrow(Half* p, Vec v) { narrow_half(p, v); }
BARK_FAST_INLINE void narrow(Brain* p, Vec v) {
    *reinterpret_cast<LooseShorts*>(p) = __builtin_convertvector(round_brain(v) >> 16, Shorts);
}

// The first `count` of W elements, zeros after them; and these alone.
template <class T>
BARK_FAST_INLINE Vec load_some(const T* p, int64_t count) {
    if (count >= W) return widen(p);
    T some[W] = {};
    __builtin_memcpy(some, p, count * sizeof(T));
    return widen(some);
}

template <class T>
BARK_FAST_INLINE void store_some(T* p, int64_t count, Vec v) {
    if (count >= W) return narrow(p, v);
    T some[W];
    narrow(some, v);
    __builtin_memcpy(p, some, count * sizeof(T));
}

// x Phi(x), 1 - Phi(a) = exp(-a^2/2) P(1 / (1 + 0.325 a)) for a >= 0; P fitted to 1.6e-9. Rounding included, the error
// stays below 1.5e-7 max(1, |x|).
BARK_FAST_INLINE Vec gelu(Vec x) {
    const Vec a = (Vec)((Bits)x & 0x7fffffffu);
    const Vec t = splat(1.0f) / fma(splat(0.325f), a, splat(1.0f));
    Vec p = splat(0.045108399789832755f);
    p = fma(p, t, splat(-0.22776023273197613f));
    p = fma(p, t, splat(0.362668781196523f));
    p = fma(p, t, splat(-0.11916703794948395f));
    p = fma(p, t, splat(0.19431622106596957f));
    p = fma(p, t, splat(0.11385934258753236f));
    p = fma(p, t, splat(0.13097452643379956f));
    const Vec tail = exp2_nonpositive(a * a * splat(-0.72134752044448170f)) * (p * t);  // log2(e) / 2
    return x * (x > 0 ? splat(1.0f) - tail : tail);
}

// use(column, count, a, b) for kStep columns after the other, as load2 takes them; zeros beyond the row's end.
template <class T, class Use>
BARK_FAST_INLINE void each_step(const T* x, int64_t k, Use use) {
    const int64_t whole = k / kStep * kStep;
    for (int64_t j = 0; j < whole; j += kStep) {
        Vec a, b;
        load2(x + j, a, b);
        use(j, kStep, a, b);
    }
    if (whole < k) {
        Vec a, b;
        load2_some(x + whole, k - whole, a, b);
        use(whole, k - whole, a, b);
    }
}

struct Norm {
    float mean, scale;
};

// LayerNorm's moments of a row, eps 1e-5, in two passes over it.
template <class T>
BARK_FAST_INLINE Norm norm_of(const T* x, int64_t k) {
    Vec sum_a{}, sum_b{};
    each_step(x, k, [&](int64_t, int64_t, Vec a, Vec b) __attribute__((always_inline)) {
        sum_a += a;
        sum_b += b;
    });
    const float mean = sum_of(sum_a + sum_b) / static_cast<float>(k);
    sum_a = sum_b = Vec{};
    each_step(x, k, [&](int64_t, int64_t count, Vec a, Vec b) __attribute__((always_inline)) {
        a -= mean;
        b -= mean;
        if (count < kStep) {  // what lies beyond the row is not mean away from it
            float ones[kStep];
            for (int64_t i = 0; i < kStep; ++i) ones[i] = i < count ? 1.0f : 0.0f;
            T inside[kStep];
            for (int i = 0; i < kStep; i += W) narrow(inside + i, load(ones + i));
            Vec in_a, in_b;
            load2(inside, in_a, in_b);
            a *= in_a;
            b *= in_b;
        }
        sum_a = fma(a, a, sum_a);
        sum_b = fma(b, b, sum_b);
    });
    return {mean, 1.0f / __builtin_sqrtf(sum_of(sum_a + sum_b) / static_cast<float>(k) + kNormEps)};
}
