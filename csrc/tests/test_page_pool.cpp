// Random operations on PagePool against a model made of maps, with every invariant checked after each; then the same
// pool under several threads.   test_page_pool [operations] [seed] [threads' operations]
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../page_pool.h"

using namespace bark_fast;

namespace {

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::abort(); \
        } \
    } while (0)

enum class Outcome { ok, out_of_pages, invalid_sequence, invalid_input };

template <typename Call>
Outcome outcome_of(Call&& call) {
    try {
        call();
        return Outcome::ok;
    } catch (const OutOfPages&) {
        return Outcome::out_of_pages;
    } catch (const InvalidSequence&) {
        return Outcome::invalid_sequence;
    } catch (const InvalidInput&) {
        return Outcome::invalid_input;
    }
}

// Pages here are names, as many as one likes, and are never reused; only their number is bounded.
struct Model {
    struct Sequence {
        std::vector<int> pages;
        std::vector<int> tokens;
    };
    std::map<Handle, Sequence> sequences;
    std::map<int, int> holders;
    int next_page = 0;

    void leave(int page) {
        if (--holders[page] == 0) holders.erase(page);
    }
    int new_page() {
        holders[next_page] = 1;
        return next_page++;
    }
    // Returns the number of copies; the pages it takes show in holders.size().
    bool extend(Handle handle, int n, int page_size, std::mt19937_64& random) {
        Sequence& sequence = sequences.at(handle);
        bool copied = false;
        if (n > 0 && sequence.tokens.size() % page_size != 0 && holders[sequence.pages.back()] > 1) {
            leave(sequence.pages.back());
            sequence.pages.back() = new_page();
            copied = true;
        }
        for (int i = 0; i < n; ++i) {
            if (sequence.tokens.size() % page_size == 0) sequence.pages.push_back(new_page());
            sequence.tokens.push_back(static_cast<int>(random() >> 40));
        }
        return copied;
    }
    void truncate(Handle handle, int length, int page_size) {
        Sequence& sequence = sequences.at(handle);
        sequence.tokens.resize(length);
        while (sequence.pages.size() > static_cast<std::size_t>((length + page_size - 1) / page_size)) {
            leave(sequence.pages.back());
            sequence.pages.pop_back();
        }
    }
};

class Fuzzer {
  public:
    explicit Fuzzer(std::uint64_t seed)
        : random_(seed),
          page_size_(16 << below(3)),
          num_pages_(1 + below(16)),
          pool_(num_pages_, page_size_),
          foreign_(2, 16),
          memory_(num_pages_ * page_size_, -1) {
        dead_ = {0, -1, INT64_MAX, INT64_MIN, 1, foreign_.create()};
    }

    void one_operation() {
        switch (below(16)) {
            case 0: create(); break;
            case 1: fork(); break;
            case 2: case 3: free(); break;
            case 4: truncate(); break;
            case 5: case 6: extend(); break;
            case 7: hostile(); break;
            default: step();
        }
        check_invariants();
    }

  private:
    int below(int n) { return static_cast<int>(random_() % n); }
    Handle any() {
        auto it = model_.sequences.begin();
        std::advance(it, below(static_cast<int>(model_.sequences.size())));
        return it->first;
    }
    int any_n() { return below(3) ? below(3) : below(3 * page_size_); }
    int free_pages() const { return num_pages_ - static_cast<int>(model_.holders.size()); }

    void create() {
        if (model_.sequences.size() >= 8) return;
        const Handle handle = pool_.create();
        CHECK(model_.sequences.emplace(handle, Model::Sequence{}).second);
    }

    void fork() {
        if (model_.sequences.empty() || model_.sequences.size() >= 8) return;
        const Handle parent = any();
        const Model::Sequence& source = model_.sequences.at(parent);
        const int size = static_cast<int>(source.tokens.size());
        const int length = below(2) ? size : below(size + 1);
        const Handle child = length == size && below(2) ? pool_.fork(parent) : pool_.fork(parent, length);
        Model::Sequence copy = source;
        copy.tokens.resize(length);
        copy.pages.resize((length + page_size_ - 1) / page_size_);
        for (int page : copy.pages) ++model_.holders[page];
        CHECK(model_.sequences.emplace(child, copy).second);
    }

    void free() {
        if (model_.sequences.empty()) return;
        const Handle handle = any();
        pool_.free(handle);
        model_.truncate(handle, 0, page_size_);
        model_.sequences.erase(handle);
        if (dead_.size() < 64) dead_.push_back(handle);
        else dead_[6 + below(58)] = handle;
    }

    void truncate() {
        if (model_.sequences.empty()) return;
        const Handle handle = any();
        const int length = below(static_cast<int>(model_.sequences.at(handle).tokens.size()) + 1);
        pool_.truncate(handle, length);
        model_.truncate(handle, length, page_size_);
    }

    // Writes the tokens from `start` on through the pool's own pages, as a kernel would.
    void write(Handle handle, std::size_t start) {
        const std::vector<int>& tokens = model_.sequences.at(handle).tokens;
        const std::vector<std::int32_t> pages = pool_.pages(handle);
        for (std::size_t i = start; i < tokens.size(); ++i)
            memory_[pages.at(i / page_size_) * page_size_ + i % page_size_] = tokens[i];
    }

    void copy_page(PageCopy copy) {
        for (int i = 0; i < page_size_; ++i)
            memory_[copy.target * page_size_ + i] = memory_[copy.source * page_size_ + i];
    }

    void extend() {
        if (model_.sequences.empty()) return;
        const Handle handle = any();
        const int n = any_n();
        const std::size_t start = model_.sequences.at(handle).tokens.size();
        Model after = model_;
        const bool copied = after.extend(handle, n, page_size_, random_);
        std::optional<PageCopy> copy;
        const Outcome outcome = outcome_of([&] { copy = pool_.extend(handle, n); });
        const bool fits = static_cast<int>(after.holders.size()) <= num_pages_;
        CHECK(outcome == (fits ? Outcome::ok : Outcome::out_of_pages));
        if (!fits) return;
        model_ = std::move(after);
        CHECK(copy.has_value() == copied);
        if (copy) copy_page(*copy);
        write(handle, start);
    }

    void step() {
        std::vector<Handle> handles;
        std::vector<std::int32_t> n_new;
        Model after = model_;
        std::size_t copied = 0;
        std::int64_t total = 0, widest = 0;
        for (const auto& [handle, sequence] : model_.sequences)
            if (below(4)) handles.push_back(handle);
        std::shuffle(handles.begin(), handles.end(), random_);
        for (Handle handle : handles) {
            n_new.push_back(any_n());
            copied += after.extend(handle, n_new.back(), page_size_, random_);
            total += n_new.back();
            widest = std::max<std::int64_t>(widest, after.sequences.at(handle).pages.size());
        }
        const bool fits = static_cast<int>(after.holders.size()) <= num_pages_;
        const int needed = static_cast<int>(after.holders.size()) - static_cast<int>(model_.holders.size());
        CHECK(pool_.pages_needed(handles.data(), n_new.data(), handles.size()) == needed);
        CHECK(pool_.can_extend(handles.data(), n_new.data(), handles.size()) == fits);

        const bool narrow = widest > 0 && below(50) == 0, missized = below(50) == 0;
        const std::int64_t columns = narrow ? widest - 1 : widest + below(3), stride = columns + below(3);
        const std::int64_t num_slots = missized ? total + 1 : total;
        std::vector<std::int32_t> tables(stride * handles.size(), -7), lengths(handles.size(), -7);
        std::vector<std::int64_t> slots(num_slots, -7);
        const StepOutput out{tables.data(), stride, columns, slots.data(), num_slots, lengths.data()};
        const Outcome outcome =
            outcome_of([&] { pool_.step(handles.data(), n_new.data(), handles.size(), out, copies_); });
        if (narrow || missized || !fits) {
            CHECK(outcome == (narrow || missized ? Outcome::invalid_input : Outcome::out_of_pages));
            for (std::int32_t value : tables) CHECK(value == -7);
            for (std::int64_t value : slots) CHECK(value == -7);
            for (std::int32_t value : lengths) CHECK(value == -7);
            return;
        }
        CHECK(outcome == Outcome::ok);
        CHECK(copies_.size() == copied);
        for (const PageCopy& copy : copies_) copy_page(copy);
        model_ = std::move(after);
        auto slot = slots.begin();
        for (std::size_t row = 0; row < handles.size(); ++row) {
            const std::vector<int>& tokens = model_.sequences.at(handles[row]).tokens;
            CHECK(lengths[row] == static_cast<std::int32_t>(tokens.size()));
            for (std::size_t i = tokens.size() - n_new[row]; i < tokens.size(); ++i) memory_.at(*slot++) = tokens[i];
            std::vector<std::int32_t> pages = pool_.pages(handles[row]);
            pages.resize(columns, -1);
            CHECK(std::equal(pages.begin(), pages.end(), tables.begin() + row * stride));
        }
    }

    void hostile() {
        const Handle dead = dead_[below(static_cast<int>(dead_.size()))];
        CHECK(outcome_of([&] { pool_.extend(dead, 1); }) == Outcome::invalid_sequence);
        CHECK(outcome_of([&] { pool_.truncate(dead, 0); }) == Outcome::invalid_sequence);
        CHECK(outcome_of([&] { pool_.fork(dead); }) == Outcome::invalid_sequence);
        CHECK(outcome_of([&] { pool_.free(dead); }) == Outcome::invalid_sequence);
        CHECK(outcome_of([&] { pool_.length(dead); }) == Outcome::invalid_sequence);
        if (model_.sequences.empty()) return;
        const Handle handle = any();
        const auto size = static_cast<std::int64_t>(model_.sequences.at(handle).tokens.size());
        CHECK(outcome_of([&] { pool_.extend(handle, INT64_MAX); }) == Outcome::out_of_pages);
        for (std::int64_t bad : {std::int64_t{-1}, std::int64_t{INT64_MIN}}) {
            CHECK(outcome_of([&] { pool_.extend(handle, bad); }) == Outcome::invalid_input);
            CHECK(outcome_of([&] { pool_.truncate(handle, bad); }) == Outcome::invalid_input);
            CHECK(outcome_of([&] { pool_.fork(handle, bad); }) == Outcome::invalid_input);
        }
        CHECK(outcome_of([&] { pool_.truncate(handle, size + 1); }) == Outcome::invalid_input);
        CHECK(outcome_of([&] { pool_.fork(handle, INT64_MAX); }) == Outcome::invalid_input);
        const std::int32_t n_new[] = {1, 1};
        const Handle twice[] = {handle, handle}, stale[] = {handle, dead};
        CHECK(outcome_of([&] { pool_.pages_needed(twice, n_new, 2); }) == Outcome::invalid_sequence);
        CHECK(outcome_of([&] { pool_.can_extend(stale, n_new, 2); }) == Outcome::invalid_sequence);
    }

    void check_invariants() {
        const PoolStats stats = pool_.stats();
        std::vector<std::int32_t> owners(num_pages_);
        std::int64_t live = 0;
        std::map<int, std::size_t> filled;
        for (const auto& [handle, sequence] : model_.sequences) {
            const std::vector<std::int32_t> pages = pool_.pages(handle);
            CHECK(pages.size() == sequence.pages.size());
            CHECK(pool_.length(handle) == static_cast<std::int64_t>(sequence.tokens.size()));
            for (std::size_t i = 0; i < pages.size(); ++i) {
                ++owners.at(pages[i]);
                std::size_t& most = filled[sequence.pages[i]];
                most = std::max(most, std::min<std::size_t>(page_size_, sequence.tokens.size() - i * page_size_));
            }
            for (std::size_t i = 0; i < sequence.tokens.size(); ++i)
                CHECK(memory_[pages[i / page_size_] * page_size_ + i % page_size_] == sequence.tokens[i]);
        }
        CHECK(owners == pool_.reference_counts());
        int used = 0, shared = 0;
        for (std::int32_t count : owners) used += count > 0, shared += count > 1;
        for (const auto& [page, tokens] : filled) live += tokens;
        CHECK(used == static_cast<int>(model_.holders.size()));
        CHECK(stats.pages_total == num_pages_ && stats.pages_used == used && stats.pages_free == free_pages());
        CHECK(stats.pages_shared == shared && stats.tokens_live == live);
        CHECK(stats.tokens_reserved == used * page_size_ && stats.tokens_waste == used * page_size_ - live);
        CHECK(stats.sequences == static_cast<std::int64_t>(model_.sequences.size()));
    }

    std::mt19937_64 random_;
    const int page_size_, num_pages_;
    PagePool pool_, foreign_;
    std::vector<int> memory_;
    Model model_;
    std::vector<Handle> dead_;
    std::vector<PageCopy> copies_;
};

// Threads with sequences of their own and one shared parent. Whatever interleaving: nothing is lost in the end.
void stress(std::uint64_t seed, int operations) {
    constexpr int kThreads = 4;
    PagePool pool(64, 16);
    const Handle parent = pool.create();
    pool.extend(parent, 24);
    std::atomic<std::int64_t> refused{0};
    const auto work = [&](int thread) {
        std::mt19937_64 random(seed * kThreads + thread);
        std::vector<Handle> mine;
        std::vector<PageCopy> copies;
        for (int i = 0; i < operations; ++i) {
            const int choice = static_cast<int>(random() % 8);
            if (mine.size() < 4 || choice == 0) mine.push_back(choice % 2 ? pool.create() : pool.fork(parent));
            if (choice == 1) CHECK(pool.stats().pages_used <= 64);
            if (choice == 2 || mine.size() > 12) {
                pool.free(mine.back());
                mine.pop_back();
            }
            if (choice == 3) pool.truncate(mine[0], pool.length(mine[0]) / 2);
            if (mine.empty()) continue;
            const std::vector<std::int32_t> n_new(mine.size(), static_cast<std::int32_t>(random() % 3));
            std::vector<std::int32_t> tables(mine.size() * 64), lengths(mine.size());
            std::vector<std::int64_t> slots(mine.size() * n_new[0]);
            const StepOutput out{tables.data(),  64, 64, slots.data(), static_cast<std::int64_t>(slots.size()),
                                 lengths.data()};
            pool.can_extend(mine.data(), n_new.data(), mine.size());
            const auto outcome = outcome_of([&] { pool.step(mine.data(), n_new.data(), mine.size(), out, copies); });
            CHECK(outcome == Outcome::ok || outcome == Outcome::out_of_pages);
            if (outcome == Outcome::ok) continue;
            refused += 1;
            for (Handle handle : mine) pool.free(handle);
            mine.clear();
        }
        for (Handle handle : mine) pool.free(handle);
    };
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) threads.emplace_back(work, thread);
    for (std::thread& thread : threads) thread.join();
    CHECK(pool.stats().sequences == 1 && pool.stats().pages_used == 2 && pool.stats().pages_shared == 0);
    std::printf("%d threads x %d steps: %lld refused for want of pages\n", kThreads, operations,
                static_cast<long long>(refused));
}

}  // namespace

int main(int argc, char** argv) {
    const long operations = argc > 1 ? std::atol(argv[1]) : 100000;
    const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
    const int threaded = argc > 3 ? std::atoi(argv[3]) : 2000;
    constexpr long kOperationsAPool = 2000;
    long done = 0;
    for (std::uint64_t pool = 0; done < operations; ++pool) {
        Fuzzer fuzzer(seed * 1000003 + pool);
        for (long i = 0; i < kOperationsAPool && done < operations; ++i, ++done) fuzzer.one_operation();
    }
    std::printf("%ld random operations agree with the model (seed %llu)\n", done,
                static_cast<unsigned long long>(seed));
    if (threaded > 0) stress(seed, threaded);
    return 0;
}
