// Products whose rows lie side by side in vectors: a panel is (steps, V W), one step of the sums of all its rows after
// another. Then a step takes one factor for all rows, straight from where the other operand lies, and only the panel
// has to be put in order. Included after simd.h, where that is.

#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif
constexpr int kTileOutputs = 6;  // with the vectors above, as many sums as registers hold beside their operands

// Rows in panels of about the same size.
struct Panels {
    int64_t vectors, count;
    explicit Panels(int64_t rows)
        : vectors((rows + W - 1) / W), count((vectors + kPanelVectors - 1) / kPanelVectors) {}
    int64_t first_row(int64_t panel) const {
        const int64_t longer = vectors % count;
        return (vectors / count * panel + (panel < longer ? panel : longer)) * W;
    }
};

// The other operand as it is multiplied.
template <class Element>
struct Lines {
    const Element* first;
    int64_t stride;
};

// Lines in fp32 in `room`, `apart` from one another. The last vector of one may reach into the next, which comes after
// it, and so W floats beyond the last.
template <class T>
BARK_FAST_INLINE Lines<float> copied(const T* lines, int64_t stride, int64_t count, int64_t steps, float* room,
                                     int64_t apart) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t step = 0; step < steps; step += W)
            store(room + i * apart + step, load_some(lines + i * stride + step, steps - step));
    return {room, apart};
}

// The same where they are not in fp32.
template <class T>
BARK_FAST_INLINE Lines<float> widened(const T* lines, int64_t stride, int64_t count, int64_t steps, float* room,
                                      int64_t apart) {
    if constexpr (sizeof(T) == sizeof(float))
        return {lines, stride};
    else
        return copied(lines, stride, count, steps, room, apart);
}

// sums (O, V) of the panel's rows, W to a vector, times factor(output, step), over all steps in turn.
template <int O, int V, class Factor, class Add>
BARK_FAST_INLINE void multiply_tile(const float* panel, int64_t steps, Factor factor, Add add, Vec (&sums)[O * V]) {
#pragma GCC unroll 32
    for (int i = 0; i < O * V; ++i) sums[i] = Vec{};
#pragma GCC unroll 4
    for (int64_t step = 0; step < steps; ++step) {
        Vec rows[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) rows[v] = load(panel + (step * V + v) * W);
#pragma GCC unroll 6
        for (int o = 0; o < O; ++o) {
            const Vec one = factor(o, step);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[o * V + v] = add(rows[v], one, sums[o * V + v]);
        }
    }
}

// Line i of v becomes lane i of each.
BARK_FAST_INLINE void transpose(Vec (&v)[W]) {
    Vec t[W];
#pragma GCC unroll 4
    for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            const Vec a = v[i], b = v[i + W / 2];
#if defined(__AVX512F__)
            t[2 * i] = BARK_FAST_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            t[2 * i + 1] = BARK_FAST_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
            t[2 * i] = BARK_FAST_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            t[2 * i + 1] = BARK_FAST_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
            t[2 * i] = BARK_FAST_SHUFFLE(a, b, 0, 4, 1, 5);
            t[2 * i + 1] = BARK_FAST_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = t[i];
    }
}
