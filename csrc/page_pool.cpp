#include "page_pool.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <sstream>
#include <string>

namespace bark_fast {
namespace {

// A handle is (serial number << kIndexBits) | index into sequences_.
constexpr int kIndexBits = 20;
constexpr Handle kIndexMask = (Handle{1} << kIndexBits) - 1;
static_assert(PagePool::kMaxSequences == kIndexMask + 1);

// Serial numbers are the process's, not a pool's, so that another pool's handle is never taken for one's own.
// 2^43 of them last 100 days at a million a second.
std::atomic<Handle> next_serial{1};

template <typename... Parts>
std::string message(const Parts&... parts) {
    std::ostringstream stream;
    (stream << ... << parts);
    return stream.str();
}

// Grow by doubling: reserve() alone would reallocate at every page.
template <typename T>
void reserve(std::vector<T>& vector, std::size_t size) {
    if (vector.capacity() < size) vector.reserve(std::max(size, 2 * vector.capacity()));
}

}  // namespace

PagePool::PagePool(std::int64_t num_pages, std::int64_t page_size) : num_pages_(num_pages), page_size_(page_size) {
    if (page_size != 16 && page_size != 32 && page_size != 64)
        throw InvalidInput(message("page_size is ", page_size, "; it must be 16, 32 or 64"));
    if (num_pages < 1 || num_pages > kMaxTokens / page_size)
        throw InvalidInput(
            message("num_pages is ", num_pages, "; it must be between 1 and ", kMaxTokens / page_size));
    references_.resize(num_pages);
    leaving_.resize(num_pages);
    free_.resize(num_pages);
    for (std::int64_t i = 0; i < num_pages; ++i) free_[i] = static_cast<std::int32_t>(num_pages - 1 - i);
}

Handle PagePool::create() {
    std::lock_guard lock(mutex_);
    ensure_vacant();
    return occupy();
}

std::optional<PageCopy> PagePool::extend(Handle handle, std::int64_t n) {
    std::lock_guard lock(mutex_);
    begin_plan();
    plan_one(find(handle), n);
    check_free();
    reserve_planned();
    return commit(plan_.items[0]);
}

void PagePool::truncate(Handle handle, std::int64_t length) {
    std::lock_guard lock(mutex_);
    Sequence& sequence = sequences_[find(handle)];
    if (length < 0 || length > sequence.length)
        throw InvalidInput(
            message("cannot truncate to ", length, " tokens; the sequence has ", sequence.length));
    for (std::size_t keep = pages_for(length); sequence.pages.size() > keep; sequence.pages.pop_back())
        release_page(sequence.pages.back());
    sequence.length = length;
}

Handle PagePool::fork(Handle handle, std::optional<std::int64_t> length) {
    std::lock_guard lock(mutex_);
    const std::size_t index = find(handle);
    const std::int64_t keep = length.value_or(sequences_[index].length);
    if (keep < 0 || keep > sequences_[index].length)
        throw InvalidInput(
            message("cannot fork the first ", keep, " tokens; the sequence has ", sequences_[index].length));
    ensure_vacant();
    Sequence& child = sequences_[vacant_.back()];
    const std::vector<std::int32_t>& pages = sequences_[index].pages;
    child.pages.assign(pages.begin(), pages.begin() + pages_for(keep));  // may throw; a vacant one's do not count
    const Handle forked = occupy();
    child.length = keep;
    for (std::int32_t page : child.pages) share_page(page);
    return forked;
}

void PagePool::free(Handle handle) {
    std::lock_guard lock(mutex_);
    const std::size_t index = find(handle);
    Sequence& sequence = sequences_[index];
    for (std::int32_t page : sequence.pages) release_page(page);
    sequence.pages.clear();  // keeps its memory for the next tenant
    sequence.handle = 0;
    vacant_.push_back(static_cast<std::uint32_t>(index));
}

void PagePool::step(const Handle* handles, const std::int32_t* n_new, std::size_t batch, const StepOutput& out,
                    std::vector<PageCopy>& copies) {
    std::lock_guard lock(mutex_);
    make_plan(handles, n_new, batch);
    if (plan_.widest > out.max_pages)
        throw InvalidInput(message("block_tables has ", out.max_pages, " columns; the longest sequence needs ",
                                   plan_.widest, " pages"));
    if (plan_.tokens != out.num_slots)
        throw InvalidInput(message("slots has ", out.num_slots, " elements; n_new sums to ", plan_.tokens));
    check_free();
    copies.reserve(plan_.copies);
    reserve_planned();

    copies.clear();
    std::int64_t* slot = out.slots;
    for (std::size_t row = 0; row < batch; ++row) {
        const Planned& item = plan_.items[row];
        if (const std::optional<PageCopy> copy = commit(item)) copies.push_back(*copy);
        const std::vector<std::int32_t>& pages = sequences_[item.index].pages;
        std::int32_t* table = out.block_tables + static_cast<std::int64_t>(row) * out.row_stride;
        std::fill(std::copy(pages.begin(), pages.end(), table), table + out.max_pages, -1);
        for (std::int64_t token = item.length; token < item.length + item.n_new; ++token)
            *slot++ = pages[token / page_size_] * page_size_ + token % page_size_;
        out.lengths[row] = static_cast<std::int32_t>(item.length + item.n_new);
    }
}

std::int64_t PagePool::pages_needed(const Handle* handles, const std::int32_t* n_new, std::size_t batch) const {
    std::lock_guard lock(mutex_);
    make_plan(handles, n_new, batch);
    return plan_.fresh_pages;
}

bool PagePool::can_extend(const Handle* handles, const std::int32_t* n_new, std::size_t batch) const {
    std::lock_guard lock(mutex_);
    make_plan(handles, n_new, batch);
    return plan_.fresh_pages <= static_cast<std::int64_t>(free_.size());
}

std::int64_t PagePool::length(Handle handle) const {
    std::lock_guard lock(mutex_);
    return sequences_[find(handle)].length;
}

std::vector<std::int32_t> PagePool::pages(Handle handle) const {
    std::lock_guard lock(mutex_);
    return sequences_[find(handle)].pages;
}

std::vector<std::int32_t> PagePool::reference_counts() const {
    std::lock_guard lock(mutex_);
    return references_;
}

PoolStats PagePool::stats() const {
    std::lock_guard lock(mutex_);
    std::vector<std::int64_t> filled(num_pages_);  // of a page's holders the longest says how full it is
    for (const Sequence& sequence : sequences_) {
        if (sequence.handle == 0) continue;
        std::int64_t left = sequence.length;
        for (std::int32_t page : sequence.pages) {
            filled[page] = std::max(filled[page], std::min(left, page_size_));
            left -= page_size_;
        }
    }
    PoolStats stats{};
    stats.pages_total = num_pages_;
    stats.pages_free = static_cast<std::int64_t>(free_.size());
    stats.pages_used = num_pages_ - stats.pages_free;
    stats.pages_shared = shared_;
    for (std::int64_t tokens : filled) stats.tokens_live += tokens;
    stats.tokens_reserved = stats.pages_used * page_size_;
    stats.tokens_waste = stats.tokens_reserved - stats.tokens_live;
    stats.sequences = static_cast<std::int64_t>(sequences_.size() - vacant_.size());
    return stats;
}

std::size_t PagePool::find(Handle handle) const {
    const auto index = static_cast<std::size_t>(handle & kIndexMask);
    // a vacant entry's handle is 0, which is no sequence's
    if (handle > 0 && index < sequences_.size() && sequences_[index].handle == handle) return index;
    throw InvalidSequence(message("sequence ", handle, " is not one of the ", sequences_.size() - vacant_.size(),
                                  " in this pool; it was freed, or is another pool's"));
}

// After this vacant_ is not empty, and free() needs no memory to add to it.
void PagePool::ensure_vacant() {
    if (!vacant_.empty()) return;
    const std::size_t count = sequences_.size();
    if (static_cast<std::int64_t>(count) == kMaxSequences)
        throw InvalidInput(message("the pool has ", count, " sequences, the most it can hold; free some"));
    reserve(vacant_, count + 1);
    sequences_.emplace_back();
    vacant_.push_back(static_cast<std::uint32_t>(count));
}

Handle PagePool::occupy() {
    const std::uint32_t index = vacant_.back();
    vacant_.pop_back();
    Sequence& sequence = sequences_[index];
    sequence.handle = (next_serial.fetch_add(1, std::memory_order_relaxed) << kIndexBits) | index;
    sequence.length = 0;
    return sequence.handle;
}

void PagePool::begin_plan() const {
    plan_.number += 1;
    plan_.fresh_pages = plan_.tokens = plan_.widest = 0;
    plan_.copies = 0;
    plan_.items.clear();
}

void PagePool::make_plan(const Handle* handles, const std::int32_t* n_new, std::size_t batch) const {
    begin_plan();
    for (std::size_t i = 0; i < batch; ++i) plan_one(find(handles[i]), n_new[i]);
}

// Adds a sequence to the plan. Marks what it touches with the plan's number only, so a plan dropped halfway leaves
// no trace.
void PagePool::plan_one(std::size_t index, std::int64_t n_new) const {
    const Sequence& sequence = sequences_[index];
    if (sequence.planned == plan_.number)
        throw InvalidSequence(message("sequence ", sequence.handle, " is twice in one batch of a pool of ",
                                      sequences_.size() - vacant_.size(), " sequences"));
    if (n_new < 0) throw InvalidInput(message("n_new is ", n_new, "; it must be at least 0"));
    // length < 2^31, so only the caller's number could pass the type's end
    const std::int64_t bounded = std::min(n_new, std::numeric_limits<std::int64_t>::max() - 2 * kMaxTokens);
    const std::int64_t pages = pages_for(sequence.length + bounded);
    const auto held = static_cast<std::int64_t>(sequence.pages.size());
    bool copy = false;
    if (n_new > 0 && sequence.length % page_size_ != 0) {
        const std::int32_t last = sequence.pages.back();
        Leaving& leaving = leaving_[last];
        if (leaving.plan != plan_.number) leaving = {plan_.number, 0};
        // sequences earlier in the batch have left it by then; the last holder may write in place
        copy = references_[last] - leaving.holders > 1;
        leaving.holders += copy;
    }
    plan_.items.push_back({index, sequence.length, n_new, pages, copy});
    sequence.planned = plan_.number;
    plan_.fresh_pages += pages - held + copy;
    plan_.tokens += n_new;
    plan_.widest = std::max(plan_.widest, pages);
    plan_.copies += copy;
}

void PagePool::check_free() const {
    if (plan_.fresh_pages > static_cast<std::int64_t>(free_.size()))
        throw OutOfPages(message("wanted ", plan_.fresh_pages, " pages; ", free_.size(), " of ", num_pages_,
                                 " are free. Free sequences, or make the pool larger"));
}

// The only part of a step that allocates, and before it acts.
void PagePool::reserve_planned() {
    for (const Planned& item : plan_.items) reserve(sequences_[item.index].pages, item.pages);
}

std::optional<PageCopy> PagePool::commit(const Planned& item) {
    Sequence& sequence = sequences_[item.index];
    std::optional<PageCopy> copy;
    if (item.copy) {
        std::int32_t& last = sequence.pages.back();
        copy = PageCopy{last, take_page()};
        release_page(last);  // never the last reference, or no copy would have been planned
        last = copy->target;
    }
    while (static_cast<std::int64_t>(sequence.pages.size()) < item.pages) sequence.pages.push_back(take_page());
    sequence.length = item.length + item.n_new;
    return copy;
}

std::int32_t PagePool::take_page() {
    const std::int32_t page = free_.back();
    free_.pop_back();
    references_[page] = 1;
    return page;
}

void PagePool::share_page(std::int32_t page) {
    if (++references_[page] == 2) ++shared_;
}

void PagePool::release_page(std::int32_t page) {
    const std::int32_t left = --references_[page];
    if (left == 0) free_.push_back(page);  // never allocates: free_ was as long as the pool once
    if (left == 1) --shared_;
}

}  // namespace bark_fast
