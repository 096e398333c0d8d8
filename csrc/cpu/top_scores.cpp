#include "top_scores.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "thread_pool.h"

namespace speeder::cpu {

namespace {

constexpr int kBlock = 224;  // items that stay in the second cache while users take turns
constexpr int kBlocksAtOnce = 16;
constexpr std::int64_t kMergedAlone = 16384;  // answers that are not worth another thread
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Scored {
    float score;
    std::int64_t row;
    bool operator<(const Scored& other) const {  // better
        return score > other.score || (score == other.score && row < other.row);
    }
};

// The best k of what it is shown: a heap whose top is the worst of them.
class Best {
public:
    // all room at once: a thread that shows finds none missing
    explicit Best(int k) : k_(static_cast<std::size_t>(k)) { kept_.reserve(k_); }
    Best(Best&&) = default;  // a copy would have lost its room

    // rows come in ascending order, so that an equal score is never better
    float threshold() const { return kept_.size() < k_ ? kNever : kept_.front().score; }
    void show(float score, std::int64_t row) {
        if (!(score > threshold())) return;
        if (kept_.size() == k_) std::pop_heap(kept_.begin(), kept_.end()), kept_.pop_back();
        kept_.push_back({score, row});
        std::push_heap(kept_.begin(), kept_.end());
    }
    const std::vector<Scored>& kept() const { return kept_; }

private:
    std::size_t k_;
    std::vector<Scored> kept_;
};

class Walk {
public:
    Walk(const Search& search, const Kernels& kernels)
        : search_(search),
          kernels_(kernels),
          bytes_(static_cast<std::ptrdiff_t>(bytes_of(search.type)) * search.size),
          scores_(static_cast<std::size_t>(search.num_users) * kBlock) {
        best_.reserve(static_cast<std::size_t>(search.num_users));
        for (int u = 0; u < search.num_users; ++u) best_.emplace_back(search.depths[u]);
    }

    void block(int first) {
        const int count = std::min(kBlock, search_.num_items - first);
        kernels_.dots(search_.table + first * bytes_, bytes_, count, search_.users, bytes_, search_.num_users,
                      search_.size, search_.type, scores_.data(), kBlock);
        for (int i = 0; i < count; ++i) added_[i] = search_.available[first + i] ? search_.prior[first + i] : kNever;
        for (int u = 0; u < search_.num_users; ++u)
            if (search_.limited == nullptr || !search_.limited[u]) choose(u, first, count);
    }

    // of a user who may be answered a list alone
    void list(int u) {
        const auto& allowed = search_.allowed;
        const std::int32_t* excluded = search_.excluded.rows + search_.excluded.starts[u];
        const std::int32_t* excluded_end = search_.excluded.rows + search_.excluded.starts[u + 1];
        for (int at = allowed.starts[u]; at < allowed.starts[u + 1]; ++at) {
            const int row = allowed.rows[at];
            if (!search_.available[row] || std::binary_search(excluded, excluded_end, row)) continue;
            float score;
            kernels_.dots(search_.table + row * bytes_, bytes_, 1, search_.users + u * bytes_, bytes_, 1, search_.size,
                          search_.type, &score, 1);
            best_[static_cast<std::size_t>(u)].show(score + search_.prior[row], row);
        }
    }

    const Best& best(int u) const { return best_[static_cast<std::size_t>(u)]; }

private:
    void choose(int u, int first, int count) {
        float* scores = scores_.data() + std::ptrdiff_t{u} * kBlock;
        auto& best = best_[static_cast<std::size_t>(u)];
        const int num_found = kernels_.select(scores, added_, count, best.threshold(), found_);
        if (num_found == 0) return;
        const std::int32_t* end = search_.excluded.rows + search_.excluded.starts[u + 1];
        const std::int32_t* row = std::lower_bound(search_.excluded.rows + search_.excluded.starts[u], end, first);
        for (; row < end && *row < first + count; ++row) scores[*row - first] = kNever;
        for (int i = 0; i < num_found; ++i) best.show(scores[found_[i]], first + found_[i]);
    }

    const Search& search_;
    const Kernels& kernels_;
    const std::ptrdiff_t bytes_;
    std::vector<float> scores_;
    std::vector<Best> best_;
    float added_[kBlock] = {};
    int found_[kBlock] = {};
};

// What the threads have kept for a user, as one answer; `found` is room to work in.
void merge(const Search& search, const std::vector<Walk>& walks, int u, std::vector<Scored>& found) {
    found.clear();
    for (const auto& walk : walks) {
        const auto& kept = walk.best(u).kept();
        found.insert(found.end(), kept.begin(), kept.end());
    }
    const auto depth = static_cast<std::size_t>(search.depths[u]);
    if (found.size() > depth) std::nth_element(found.begin(), found.begin() + search.depths[u], found.end());
    found.resize(depth, {kNever, 0});
    std::sort(found.begin(), found.end());
    float* scores = search.scores + std::ptrdiff_t{u} * search.k;
    std::int64_t* rows = search.rows + std::ptrdiff_t{u} * search.k;
    for (const auto& each : found) *scores++ = each.score, *rows++ = each.row;
}

void check(const RowLists& lists, int num_users, int num_items) {
    for (int i = 0; i < lists.starts[num_users]; ++i)
        if (lists.rows[i] < 0 || lists.rows[i] >= num_items) throw std::invalid_argument("a list's row is no item's");
}

}  // namespace

void top_scores(const Search& search, const Kernels& kernels, int threads) {
    for (int u = 0; u < search.num_users; ++u)
        if (search.depths[u] < 1 || search.depths[u] > search.k) throw std::invalid_argument("a user's depth is none");
    check(search.excluded, search.num_users, search.num_items);
    if (search.limited != nullptr) check(search.allowed, search.num_users, search.num_items);
    const bool all_limited = search.limited != nullptr &&
                             std::all_of(search.limited, search.limited + search.num_users, [](bool is) { return is; });
    const int blocks = all_limited ? 0 : (search.num_items + kBlock - 1) / kBlock;
    const std::ptrdiff_t work = std::ptrdiff_t{search.num_items} * search.size * search.num_users *
                                static_cast<std::ptrdiff_t>(bytes_of(search.type));
    threads = static_cast<int>(std::clamp<std::ptrdiff_t>(work / search.bytes_per_thread, 1, threads));
    threads = std::clamp(blocks, 1, threads);
    std::vector<Walk> walks;
    walks.reserve(static_cast<std::size_t>(threads));
    for (int thread = 0; thread < threads; ++thread) walks.emplace_back(search, kernels);
    std::atomic<int> next{0};
    ThreadPool::shared().run(threads, [&](int thread) {
        auto& walk = walks[static_cast<std::size_t>(thread)];
        for (int begin; (begin = next.fetch_add(kBlocksAtOnce)) < blocks;)
            for (int block = begin; block < std::min(blocks, begin + kBlocksAtOnce); ++block)
                walk.block(block * kBlock);
        if (thread == 0 && search.limited != nullptr)
            for (int u = 0; u < search.num_users; ++u)
                if (search.limited[u]) walk.list(u);
    });
    const std::int64_t answers = std::accumulate(search.depths, search.depths + search.num_users, std::int64_t{0});
    next = 0;
    ThreadPool::shared().run(answers > kMergedAlone ? threads : 1, [&](int) {
        std::vector<Scored> found;
        for (int u; (u = next.fetch_add(1)) < search.num_users;) merge(search, walks, u, found);
    });
}

}  // namespace speeder::cpu
