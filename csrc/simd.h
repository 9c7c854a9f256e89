// Vectors of floats for code that is compiled once per instruction set.
//
// Included inside the namespace that BARK_FAST_ISA names; width and intrinsics follow from the compiler's flags. All is
// arithmetic on GCC/clang vector types, so the portable build is SSE2 on x86-64 and NEON on Arm. No standard
// library templates here or in what includes this: the linker keeps one copy of an inline function, and it must not
// be one compiled for AVX-512.

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(W * 4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(W * 4), may_alias));
typedef Vec LooseVec __attribute__((aligned(4)));    // for unaligned loads and stores
typedef Bits LooseBits __attribute__((aligned(2)));

#define BARK_FAST_INLINE static inline __attribute__((always_inline))

BARK_FAST_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
BARK_FAST_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
BARK_FAST_INLINE Bits load_bits(const void* p) { return *reinterpret_cast<const LooseBits*>(p); }
BARK_FAST_INLINE Vec splat(float x) {  // not Vec{} + x: as it makes 0 of -0, it must add
#if defined(__AVX512F__)
    return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Vec)_mm256_set1_ps(x);
#else
    return Vec{x, x, x, x};
#endif
}

// The same, for what several instructions take: GCC may load it anew for each of them otherwise.
BARK_FAST_INLINE Vec in_register(Vec v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__x86_64__)
    asm("" : "+x"(v));
#endif
    return v;
}

BARK_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

#if defined(__AVX512BF16__)
// c and the products of the two bf16 of each lane; subnormal numbers count as zeros.
BARK_FAST_INLINE Vec fma_pairs(Vec a, Vec b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#endif

// 2^x for x <= 0 (anything below -126 becomes 0, NaN stays NaN), relative error below 1e-7.
// 2^x = 2^n 2^r with n the nearest integer; 2^r by the minimax polynomial of degree 6 on [-1/2, 1/2], 3e-9 off.
BARK_FAST_INLINE Vec exp2_nonpositive(Vec x) {
    const Vec floor_ = splat(-126.0f);
    const auto tiny = x < floor_;
    x = tiny ? floor_ : x;
    const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    const Vec shifted = x + shifter;
    const Vec r = x - (shifted - shifter);
    Vec y = splat(1.5326471e-4f);
    y = fma(y, r, splat(1.3390806e-3f));
    y = fma(y, r, splat(9.6185058e-3f));
    y = fma(y, r, splat(5.5503599e-2f));
    y = fma(y, r, splat(2.4022648e-1f));
    y = fma(y, r, splat(6.9314718e-1f));
    y = fma(y, r, splat(1.0f));
    const Vec scaled = (Vec)((Bits)y + ((Bits)shifted << 23));
    return tiny ? splat(0.0f) : (x == x ? scaled : x);
}

// Element types: 16-bit ones are loaded and stored 2W at a time into two vectors. bf16 comes apart into even and odd
// elements, which needs no shuffle; whatever is stored through store2 is put together the same way.
struct Half {
    uint16_t bits;
};
struct Brain {
    uint16_t bits;
};
struct Byte {  // of quantised weights, which are read only
    int8_t bits;
};

BARK_FAST_INLINE Vec widen_half(const Half* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Bits h;
    for (int i = 0; i < W; ++i) h[i] = p[i].bits;
    const Bits magnitude = h & 0x7fffu;
    const Vec finite = (Vec)(magnitude << 13) * splat(5.192296858534828e33f);  // 2^112 rebiases, subnormals too
    const Bits bits = magnitude >= 0x7c00u ? (Bits)((magnitude << 13) | 0x7f800000u) : (Bits)finite;
    return (Vec)(bits | ((h & 0x8000u) << 16));
#endif
}

template <int N>
struct Part {
    static constexpr int value = N;
};

// One of 2W elements' two vectors.
template <int N>
BARK_FAST_INLINE Vec half_step(const float* p, Part<N>) {
    return load(p + N * W);
}
template <int N>
BARK_FAST_INLINE Vec half_step(const Half* p, Part<N>) {
    return widen_half(p + N * W);
}
template <int N>
BARK_FAST_INLINE Vec half_step(const Brain* p, Part<N>) {
    return (Vec)(N ? load_bits(p) & 0xffff0000u : load_bits(p) << 16);
}

template <int N>
BARK_FAST_INLINE Vec half_step(const Byte* p, Part<N>) {
    p += N * W;
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    Vec v;
    for (int i = 0; i < W; ++i) v[i] = p[i].bits;
    return v;
#endif
}

#if defined(__AVX2__)
// 2W bytes as int16; c and the products of the two int16 of each lane, as int32; and these as floats.
BARK_FAST_INLINE Vec widen_bytes(const Byte* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    return (Vec)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}
BARK_FAST_INLINE Vec add_products(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_add_epi32((__m512i)c, _mm512_madd_epi16((__m512i)a, (__m512i)b));
#else
    return (Vec)_mm256_add_epi32((__m256i)c, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#endif
}
BARK_FAST_INLINE Vec from_integers(Vec v) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps((__m512i)v);
#else
    return (Vec)_mm256_cvtepi32_ps((__m256i)v);
#endif
}
// W floats to the nearest int16, which they are near enough to.
BARK_FAST_INLINE void narrow_to(int16_t* p, Vec v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)v)));
#else
    const __m256i whole = _mm256_cvtps_epi32((__m256)v);
    const __m128i low = _mm256_castsi256_si128(whole), high = _mm256_extracti128_si256(whole, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(low, high));
#endif
}
#endif
BARK_FAST_INLINE void narrow_to(float* p, Vec v) { store(p, v); }

template <class T>
BARK_FAST_INLINE void load2(const T* p, Vec& a, Vec& b) {
    a = half_step(p, Part<0>());
    b = half_step(p, Part<1>());
}

BARK_FAST_INLINE void store2(float* p, Vec a, Vec b) {
    store(p, a);
    store(p + W, b);
}

BARK_FAST_INLINE Bits round_brain(Vec v) {  // to nearest even, in the upper half of each lane
    const Bits x = (Bits)v;
    const Bits rounded = x + 0x7fffu + ((x >> 16) & 1u);
    return v == v ? rounded : Bits{} + 0x7fc00000u;
}

BARK_FAST_INLINE void store2(Brain* p, Vec a, Vec b) {
    *reinterpret_cast<LooseBits*>(p) = (round_brain(a) >> 16) | (round_brain(b) & 0xffff0000u);
}

BARK_FAST_INLINE void narrow_half(Half* p, Vec v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
    for (int i = 0; i < W; ++i) {
        const uint32_t x = ((Bits)v)[i], sign = (x >> 16) & 0x8000u, magnitude = x & 0x7fffffffu;
        uint32_t h;
        if (magnitude > 0x7f800000u) {
            h = 0x7e00u;
        } else if (magnitude >= 0x47800000u) {
            h = 0x7c00u;
        } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at the last half bit
            const Vec moved = (Vec)(Bits{} + magnitude) + splat(0.5f);
            h = ((Bits)moved)[0] - 0x3f000000u;
        } else {
            h = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
        }
        p[i].bits = static_cast<uint16_t>(h | sign);
    }
#endif
}

BARK_FAST_INLINE void store2(Half* p, Vec a, Vec b) {
    narrow_half(p, a);
    narrow_half(p + W, b);
}

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12  // which has the other one only
#define BARK_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Bits){__VA_ARGS__})
#else
#define BARK_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

// Lane i of the result is the sum of the lanes of v[i].
BARK_FAST_INLINE Vec sum_each(Vec (&v)[W]) {
#if defined(__AVX512F__)
    __m512 t[8], u[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)  // lanes of 4 hold (2i, 2i+1, 2i, 2i+1)
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2 * i], (__m512)v[2 * i + 1]),
                             _mm512_unpackhi_ps((__m512)v[2 * i], (__m512)v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)  // lanes of 4 hold (4i .. 4i+3)
        u[i] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[2 * i]), _mm512_castps_pd(t[2 * i + 1]))),
            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[2 * i]), _mm512_castps_pd(t[2 * i + 1]))));
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return (Vec)_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
#elif defined(__AVX2__)
    __m256 t[4], u[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) t[i] = _mm256_hadd_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) u[i] = _mm256_hadd_ps(t[2 * i], t[2 * i + 1]);
    return (Vec)_mm256_add_ps(_mm256_permute2f128_ps(u[0], u[1], 0x20), _mm256_permute2f128_ps(u[0], u[1], 0x31));
#else
    const Vec a = BARK_FAST_SHUFFLE(v[0], v[1], 0, 4, 1, 5) + BARK_FAST_SHUFFLE(v[0], v[1], 2, 6, 3, 7);
    const Vec b = BARK_FAST_SHUFFLE(v[2], v[3], 0, 4, 1, 5) + BARK_FAST_SHUFFLE(v[2], v[3], 2, 6, 3, 7);
    return BARK_FAST_SHUFFLE(a, b, 0, 1, 4, 5) + BARK_FAST_SHUFFLE(a, b, 2, 3, 6, 7);
#endif
}

BARK_FAST_INLINE float sum_of(Vec v) {
    float sum = 0;
    for (int i = 0; i < W; ++i) sum += v[i];
    return sum;
}

BARK_FAST_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

BARK_FAST_INLINE float max_of(Vec v) {
    float best = v[0];
    for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
    return best;
}
