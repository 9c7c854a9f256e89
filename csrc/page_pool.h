// Page pool of the paged key-value cache: which page belongs to which sequence, and nothing about what is in it.
//
// A page holds `page_size` tokens. A sequence is a list of pages and a length; forks share pages, counted by
// reference. A sequence that would write into a page others also hold gets a page of its own first, and the caller
// is told which page to copy where (copy-on-write). No Python in here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <vector>

namespace bark_fast {

// Names a sequence. Never given twice in a process, so stale, freed and foreign handles are all noticed.
using Handle = std::int64_t;

// Copy page `source` to page `target` before the next write through a block table.
struct PageCopy {
    std::int32_t source;
    std::int32_t target;
};

struct PoolStats {
    std::int64_t pages_total;
    std::int64_t pages_used;
    std::int64_t pages_free;
    std::int64_t pages_shared;     // held by more than one sequence
    std::int64_t tokens_live;      // a token in a shared page counts once
    std::int64_t tokens_reserved;  // pages_used * page_size
    std::int64_t tokens_waste;     // reserved - live
    std::int64_t sequences;
};

// Where `PagePool::step` writes. Row i of the tables belongs to sequence i of the batch.
struct StepOutput {
    std::int32_t* block_tables;  // (batch, max_pages), rows `row_stride` elements apart
    std::int64_t row_stride;
    std::int64_t max_pages;
    std::int64_t* slots;  // (num_slots), page * page_size + offset of each new token, in batch order
    std::int64_t num_slots;
    std::int32_t* lengths;  // (batch), after the step
};

struct OutOfPages : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct InvalidSequence : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct InvalidInput : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Every method checks first and acts second: one that throws (std::bad_alloc included) has changed nothing.
// Every method may be called from any thread at any time; one mutex a pool puts them in some order.
class PagePool {
  public:
    static constexpr std::int64_t kMaxSequences = std::int64_t{1} << 20;
    static constexpr std::int64_t kMaxTokens = (std::int64_t{1} << 31) - 1;  // lengths and pages are int32

    PagePool(std::int64_t num_pages, std::int64_t page_size);

    // A new, empty sequence.
    Handle create();
    // Room for `n` more tokens.
    std::optional<PageCopy> extend(Handle handle, std::int64_t n);
    // Drop the tokens from `length` on.
    void truncate(Handle handle, std::int64_t length);
    // A new sequence that shares the first `length` tokens; all of them by default.
    Handle fork(Handle handle, std::optional<std::int64_t> length = std::nullopt);
    void free(Handle handle);

    // Extend sequence i by n_new[i] (>= 0) for the whole batch or not at all, as if one after another. Writes the
    // block tables (entries past the last page become -1), the new tokens' slots and the lengths, and replaces
    // `copies`. Allocates nothing once its scratch space has grown to the batch. Inputs are read once, before
    // anything is written, so they may overlap the output.
    void step(const Handle* handles, const std::int32_t* n_new, std::size_t batch, const StepOutput& out,
              std::vector<PageCopy>& copies);
    // Pages that such a step would take from the free ones, copies on write included.
    std::int64_t pages_needed(const Handle* handles, const std::int32_t* n_new, std::size_t batch) const;
    bool can_extend(const Handle* handles, const std::int32_t* n_new, std::size_t batch) const;

    std::int64_t num_pages() const { return num_pages_; }
    std::int64_t page_size() const { return page_size_; }
    std::int64_t length(Handle handle) const;
    std::vector<std::int32_t> pages(Handle handle) const;
    std::vector<std::int32_t> reference_counts() const;
    PoolStats stats() const;

  private:
    struct Sequence {
        Handle handle = 0;  // 0: vacant
        std::int64_t length = 0;
        mutable std::uint64_t planned = 0;  // number of the last plan that had it
        std::vector<std::int32_t> pages;
    };
    struct Planned {
        std::size_t index;  // of the sequence
        std::int64_t length;
        std::int64_t n_new;
        std::int64_t pages;  // after the step
        bool copy;           // its partly filled last page is shared
    };
    // What one batch will do; also the scratch space that spares allocations.
    struct Plan {
        std::uint64_t number = 0;
        std::int64_t fresh_pages = 0;
        std::int64_t tokens = 0;
        std::int64_t widest = 0;
        std::size_t copies = 0;
        std::vector<Planned> items;
    };
    // How many holders of a page an unfinished plan has moved to a copy of their own.
    struct Leaving {
        std::uint64_t plan = 0;
        std::int32_t holders = 0;
    };

    std::size_t find(Handle handle) const;
    void ensure_vacant();
    Handle occupy();
    std::int64_t pages_for(std::int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }
    void make_plan(const Handle* handles, const std::int32_t* n_new, std::size_t batch) const;
    void plan_one(std::size_t index, std::int64_t n_new) const;
    void begin_plan() const;
    void check_free() const;
    void reserve_planned();
    std::optional<PageCopy> commit(const Planned& item);
    std::int32_t take_page();
    void share_page(std::int32_t page);
    void release_page(std::int32_t page);

    const std::int64_t num_pages_;
    const std::int64_t page_size_;
    mutable std::mutex mutex_;
    std::vector<std::int32_t> free_;        // a stack: what was used last is warm in the cache
    std::vector<std::int32_t> references_;  // sequences that hold each page
    std::int64_t shared_ = 0;
    std::vector<Sequence> sequences_;
    std::vector<std::uint32_t> vacant_;  // indices into sequences_
    mutable Plan plan_;
    mutable std::vector<Leaving> leaving_;  // by page
};

}  // namespace bark_fast
