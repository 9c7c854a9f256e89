// The paged cache's operations against their definition in double. Pages that no sequence owns hold NaN and, under
// AddressSanitizer, may not be touched; everything else lies in blocks of exactly its size.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "../paged_kv.h"
#include "../parallel.h"
#include "testing.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

using namespace bark_fast;

namespace {

int32_t between(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(rng); }

// Numbers of a dtype as the tests read and write them.
struct Plain {
    using Stored = float;
    static constexpr DType dtype = DType::f32;
    static constexpr double tolerance = 2e-6;
    static Stored store(float x) { return x; }
    static float load(Stored x) { return x; }
};

struct Brain {
    using Stored = uint16_t;
    static constexpr DType dtype = DType::bf16;
    static constexpr double tolerance = 2e-2;
    static Stored store(float x) { return to_brain(x); }
    static float load(Stored x) { return of_brain(x); }
};

template <class Number>
struct Cache {
    using Stored = typename Number::Stored;

    PageShape shape;
    std::vector<Stored> k, v;
    std::vector<bool> owned;

    explicit Cache(PageShape shape_)
        : shape(shape_), k(shape_.num_pages * page_elements(shape_), Number::store(NAN)), v(k), owned(shape_.num_pages) {
        for (auto* pages : {&k, &v}) ASAN_POISON_MEMORY_REGION(pages->data(), pages->size() * sizeof(Stored));
    }
    ~Cache() {
        for (auto* pages : {&k, &v}) ASAN_UNPOISON_MEMORY_REGION(pages->data(), pages->size() * sizeof(Stored));
    }
    int32_t take() {
        int32_t page = between(0, static_cast<int32_t>(shape.num_pages) - 1);
        while (owned[page]) page = (page + 1) % static_cast<int32_t>(shape.num_pages);
        owned[page] = true;
        const int64_t size = page_elements(shape);
        for (auto* pages : {&k, &v}) ASAN_UNPOISON_MEMORY_REGION(pages->data() + page * size, size * sizeof(Stored));
        return page;
    }
};

// Sequences of these lengths, whose last rows are new: appended, then attended to.
template <class Number>
void check(int32_t page_size, int32_t head_dim, const std::vector<int32_t>& lengths, const std::vector<int32_t>& rows,
           int threads) {
    using Stored = typename Number::Stored;
    const auto seqs = static_cast<int32_t>(lengths.size());
    const int32_t heads = 3, longest = *std::max_element(lengths.begin(), lengths.end());
    const int32_t columns = (longest + page_size - 1) / page_size, width = heads * head_dim;
    int64_t pages = 3;
    for (const int32_t length : lengths) pages += (length + page_size - 1) / page_size;
    Cache<Number> cache({pages, heads, page_size, head_dim});
    std::vector<int32_t> table(seqs * columns, 1 << 30), starts{0};  // beyond a sequence's pages nothing is read
    std::vector<std::vector<float>> qkv(seqs);                       // of every token of every sequence
    std::normal_distribution<float> normal;
    for (int32_t s = 0; s < seqs; ++s) {
        for (int32_t t = 0; t < lengths[s]; t += page_size) table[s * columns + t / page_size] = cache.take();
        for (int64_t i = 0; i < int64_t{lengths[s]} * 3 * width; ++i)
            qkv[s].push_back(Number::load(Number::store(normal(rng))));
        starts.push_back(starts.back() + rows[s]);
    }
    const auto slot = [&](int32_t s, int32_t t) {
        return int64_t{table[s * columns + t / page_size]} * page_size + t % page_size;
    };
    // first what was there before, then the rows; a row without a slot is stored nowhere
    const auto append = [&](const std::vector<std::pair<int32_t, int32_t>>& tokens, bool nowhere) {
        std::vector<Stored> packed;
        std::vector<int64_t> slots;
        for (const auto& [s, t] : tokens) {
            for (int32_t i = 0; i < 3 * width; ++i) packed.push_back(Number::store(qkv[s][int64_t{t} * 3 * width + i]));
            slots.push_back(slot(s, t));
        }
        if (nowhere) {
            packed.insert(packed.end(), 3 * width, Number::store(NAN));
            slots.push_back(-1);
        }
        cpu::append_kv({cache.shape, Number::dtype, packed.data(), 3 * width, cache.k.data(), cache.v.data(), slots.data(),
                        static_cast<int32_t>(slots.size())},
                       threads);
        return packed;
    };
    std::vector<std::pair<int32_t, int32_t>> before, fresh;
    for (int32_t s = 0; s < seqs; ++s)
        for (int32_t t = 0; t < lengths[s]; ++t) (t < lengths[s] - rows[s] ? before : fresh).emplace_back(s, t);
    append(before, true);
    const std::vector<Stored> query = append(fresh, false);
    std::vector<Stored> out(fresh.size() * width, Number::store(NAN));
    cpu::paged_attention({cache.shape, Number::dtype, query.data(), 3 * width, cache.k.data(), cache.v.data(), table.data(),
                          columns, lengths.data(), starts.data(), out.data(), width, seqs,
                          static_cast<int32_t>(fresh.size()), 0.2f, nullptr},
                         threads);

    std::vector<double> weights, expected(head_dim);
    for (size_t row = 0; row < fresh.size(); ++row) {
        const auto& [s, t] = fresh[row];
        const float* tokens = qkv[s].data();
        for (int32_t head = 0; head < heads; ++head) {
            const float* q = tokens + int64_t{t} * 3 * width + head * head_dim;
            double most = -INFINITY, sum = 0;
            weights.assign(t + 1, 0);
            for (int32_t j = 0; j <= t; ++j) {
                const float* key = tokens + int64_t{j} * 3 * width + width + head * head_dim;
                for (int32_t d = 0; d < head_dim; ++d) weights[j] += 0.2 * q[d] * key[d];
                most = std::max(most, weights[j]);
            }
            std::fill(expected.begin(), expected.end(), 0);
            for (int32_t j = 0; j <= t; ++j) {
                sum += weights[j] = std::exp(weights[j] - most);
                const float* value = tokens + int64_t{j} * 3 * width + 2 * width + head * head_dim;
                for (int32_t d = 0; d < head_dim; ++d) expected[d] += weights[j] * value[d];
            }
            for (int32_t d = 0; d < head_dim; ++d) {
                const float got = Number::load(out[row * width + head * head_dim + d]);
                expect(std::fabs(got - expected[d] / sum) <= Number::tolerance, "attention");
            }
        }
    }

    for (int32_t s = 0; s < seqs; ++s) {
        std::vector<Stored> gathered(int64_t{lengths[s]} * width);
        cpu::gather_kv({cache.shape, sizeof(Stored), cache.v.data(), table.data() + s * columns, lengths[s], gathered.data()},
                       threads);
        for (int32_t head = 0; head < heads; ++head)
            for (int32_t t = 0; t < lengths[s]; ++t)
                for (int32_t d = 0; d < head_dim; ++d)
                    expect(Number::load(gathered[(int64_t{head} * lengths[s] + t) * head_dim + d]) ==
                               qkv[s][int64_t{t} * 3 * width + 2 * width + head * head_dim + d],
                           "append and gather");
    }
    if (lengths[0] == 0) return;
    // a page to a new one, and from there on to another: pairs are carried out in order
    const int32_t first = table[0], second = cache.take(), third = cache.take();
    const int32_t pairs[] = {first, second, second, third};
    const int64_t elements = page_elements(cache.shape), bytes = elements * static_cast<int64_t>(sizeof(Stored));
    const Copy copies[] = {{cache.k.data(), cache.k.data(), bytes, pages, pages, pairs, 2},
                           {cache.v.data(), cache.v.data(), bytes, pages, pages, pairs, 2}};
    cpu::copy_pages(copies, 2, threads);
    for (const auto* all : {&cache.k, &cache.v})
        expect(!std::memcmp(all->data() + first * elements, all->data() + third * elements, bytes), "copies of pages");
}

template <class Number>
void check_all() {
    for (const int threads : {1, 5})
        for (const auto& [page_size, head_dim] : {std::pair<int32_t, int32_t>{16, 64}, {16, 32}, {32, 128}, {64, 64}}) {
            check<Number>(page_size, head_dim, {1}, {1}, threads);
            check<Number>(page_size, head_dim, {page_size - 1, page_size, page_size + 1}, {1, 1, 1}, threads);
            check<Number>(page_size, head_dim, {0, 3 * page_size, 9, 20}, {0, 5, 9, 17}, threads);
            check<Number>(page_size, head_dim, {600}, {1}, threads);  // one context, shared by the threads
            std::vector<int32_t> lengths, rows;
            for (int i = 0; i < 6; ++i) {
                lengths.push_back(between(1, 200));
                rows.push_back(between(0, std::min(lengths.back(), 4)));
            }
            check<Number>(page_size, head_dim, lengths, rows, threads);
        }
}

}  // namespace

int main() {
    avoid_openmp(true);  // thread sanitizers know nothing of libgomp
    check_all<Plain>();
    check_all<Brain>();
    std::puts("the paged cache agrees");
}
