// Random operations on one BlockManager with fake key/value stores for device and host, for the sanitizers:
//     g++ -std=c++20 -g -O1 -fsanitize=address,undefined -Icsrc tests/native/stress.cpp csrc/[bs]*_*.cpp -o stress
//     ./stress OPERATIONS [THREADS]
// Every row carries its user and a value that depends on all keys up to it. Every plan must read back its own history,
// at once and again when its step ends; freed blocks are filled with junk. With one thread, now and then each
// allocation of a call in turn is made to fail, and the manager must be as before. Its integrity is checked every 4
// operations, with several threads every 256 of each.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>
#include <random>
#include <string>
#include <thread>

#include "block_manager.h"
#include "message.h"

namespace {

thread_local long allocations_left = -1;  // -1: as many as asked for

}  // namespace

void* operator new(std::size_t size) {
    if (allocations_left == 0) throw std::bad_alloc();
    if (allocations_left > 0) --allocations_left;
    if (void* memory = std::malloc(size)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using namespace speeder;
using Ints = std::vector<std::int32_t>;

constexpr CacheConfig kConfig{.num_blocks = 56,
                              .block_size = 3,
                              .shared_len = 4,
                              .max_seq_len = 20,
                              .key_width = 2,
                              .budget_blocks = 18,
                              .max_sessions = 7,
                              .num_slots = 14,
                              .max_blocks_per_user = 5,
                              .num_host_blocks = 12,
                              .track_freed = true};
constexpr std::size_t kWidth = 7;
constexpr std::uint32_t kUsers = 9;
constexpr std::uint32_t kNobody = ~0u;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "stress: %s\n", what);
    std::abort();
}

std::string name_of(std::uint32_t user) { return "a user whose name needs memory " + std::to_string(user); }

struct Row {
    std::uint64_t value = 0;
    std::uint32_t user = kNobody;
    bool operator==(const Row&) const = default;
};

// A row depends on all keys up to it, like a key or value in a decoder.
std::vector<Row> rows_of(std::span<const std::int32_t> keys, std::uint32_t user) {
    std::vector<Row> rows;
    std::uint64_t value = user;
    for (std::size_t i = 0; i < keys.size(); ++i) {
        value = (value ^ std::uint64_t(keys[i] + 1)) * 0x9E3779B97F4A7C15u + 1;
        if (i % kConfig.key_width == kConfig.key_width - 1u) rows.push_back({value, user});
    }
    return rows;
}

// One writer per block and slot is the manager's promise: plain arrays, so that TSan sees a broken one.
struct Engine {
    BlockManager manager{kConfig};
    std::vector<Row> device = std::vector<Row>(kConfig.num_blocks * kConfig.block_size);
    std::vector<Row> host = std::vector<Row>(kConfig.num_host_blocks * kConfig.block_size);
    std::vector<Row> last = std::vector<Row>(kConfig.num_slots);
    std::mutex freed;  // a freed block is filled with junk before another thread's plan can get it
    std::atomic<std::uint32_t> last_user{kNobody}, num_anonymous{kUsers};
    std::atomic<long> num_writes{0}, num_turns{0}, num_exhausted{0};

    void write(Row& to, const Row& row) {
        to = row;
        num_writes.fetch_add(1, std::memory_order_relaxed);
        if (last_user.exchange(row.user, std::memory_order_relaxed) != row.user) {
            num_turns.fetch_add(1, std::memory_order_relaxed);
        }
    }

    void copy_block(std::vector<Row>& to, BlockId target, const std::vector<Row>& from, BlockId source, int length) {
        const auto rows = std::span(from).subspan(source * kConfig.block_size, length);
        std::copy(rows.begin(), rows.end(), to.begin() + target * kConfig.block_size);
    }

    void junk_freed() {
        const std::scoped_lock lock(freed);
        const Row junk;
        for (const BlockId block : manager.take_freed()) {
            std::fill_n(device.begin() + block * kConfig.block_size, kConfig.block_size, junk);
        }
    }
};

bool same(const CacheStats& a, const CacheStats& b) { return std::memcmp(&a, &b, sizeof a) == 0; }

// Fails the 1st, 2nd, 3rd ... allocation of the same call until it comes through.
template <typename Call>
auto with_failures(Engine& engine, bool failing, Call&& call) {
    if (!failing) return call();
    for (long allowed = 0;; ++allowed) {
        const CacheStats before = engine.manager.stats();
        try {
            allocations_left = allowed;
            auto result = call();
            allocations_left = -1;
            return result;
        } catch (const std::bad_alloc&) {
            allocations_left = -1;
            expect(same(engine.manager.stats(), before), "a failed allocation left a trace");
            engine.manager.check_integrity();
        } catch (...) {
            allocations_left = -1;
            throw;
        }
    }
}

struct Batch {
    std::vector<std::string> names;
    std::vector<std::optional<std::string_view>> users;
    std::vector<std::uint32_t> owners;
    Ints offsets{0}, keys;
    Ints cached, slots, tables, mapping, copies, restores;
    StepPlan planned{};

    Batch(std::minstd_rand& draw, std::size_t size)
        : cached(size), slots(size), tables(size * kWidth), mapping(size * kConfig.max_seq_len), copies(size * 3),
          restores(size * kWidth * 2) {
        names.reserve(size);
        for (std::size_t i = 0; i < size; ++i) {
            owners.push_back(draw() % kUsers);
            names.push_back(name_of(owners.back()));
            users.push_back(draw() % 8 ? std::optional<std::string_view>(names.back()) : std::nullopt);
            const std::size_t length = draw() % (kConfig.max_seq_len + 1);
            for (std::size_t k = 0; k < length * kConfig.key_width; ++k) keys.push_back(draw() % 16 == 0);
            offsets.push_back(static_cast<std::int32_t>(keys.size()) / kConfig.key_width);
        }
    }

    void plan(Engine& engine, bool failing, bool alone) {
        const PlanRequest request{users, offsets, keys};
        Ints peeked(users.size());
        with_failures(engine, failing, [&] { return engine.manager.peek(request, peeked), 0; });
        const std::scoped_lock lock(engine.freed);
        planned = with_failures(engine, failing, [&] {
            return engine.manager.plan(request, {cached, slots, tables, kWidth, mapping, copies, restores});
        });
        expect(!alone || peeked == cached, "peek and plan disagree");
        for (std::size_t i = 0; i < users.size(); ++i) {
            if (slots[i] == kNone) owners[i] = engine.num_anonymous++;
        }
    }

    std::vector<Row> rows(std::size_t i) const {
        const std::size_t width = kConfig.key_width;
        const auto mine = std::span(keys).subspan(offsets[i] * width, (offsets[i + 1] - offsets[i]) * width);
        return rows_of(mine, owners[i]);
    }

    void compute(Engine& engine) {
        for (std::int32_t r = 0; r < planned.num_restores; ++r) {
            engine.copy_block(engine.device, restores[2 * r + 1], engine.host, restores[2 * r], kConfig.block_size);
        }
        for (std::int32_t c = 0; c < planned.num_copies; ++c) {
            engine.copy_block(engine.device, copies[3 * c + 1], engine.device, copies[3 * c], copies[3 * c + 2]);
        }
        std::vector<std::vector<Row>> all;
        Ints begins{0};  // of each user's new rows in `mapping`
        for (std::size_t i = 0; i < users.size(); ++i) {
            all.push_back(rows(i));
            begins.push_back(begins.back() + static_cast<std::int32_t>(all[i].size()) - cached[i]);
            if (slots[i] != kNone && begins[i] < begins[i + 1]) engine.last[slots[i]] = all[i].back();
        }
        expect(begins.back() == planned.num_new_rows, "number of new rows");
        // position by position, so that the users' writes interleave
        for (std::int32_t at = 0; at < kConfig.max_seq_len; ++at) {
            for (std::size_t i = 0; i < users.size(); ++i) {
                if (begins[i] + at < begins[i + 1]) {
                    engine.write(engine.device[mapping[begins[i] + at]], all[i][cached[i] + at]);
                }
            }
        }
    }

    void check(const Engine& engine) const {
        for (std::size_t i = 0; i < users.size(); ++i) {
            const auto expected = rows(i);
            for (std::size_t at = 0; at < expected.size(); ++at) {
                const BlockId block = tables[i * kWidth + at / kConfig.block_size];
                const Row& row = engine.device[block * kConfig.block_size + at % kConfig.block_size];
                expect(row.user == owners[i], "a row of another user");
                expect(row == expected[at], "a row of another history");
            }
            if (slots[i] != kNone) expect(engine.last[slots[i]] == expected.back(), "h(last) of another history");
        }
    }
};

struct HalfOpen {
    std::int64_t step;
    Ints offloads;
};

// One thread's steps, open and half open.
class Worker {
public:
    Worker(Engine& engine, unsigned seed, bool alone) : engine_(engine), draw_(seed), alone_(alone) {}

    void run(long operations) {
        for (long done = 0; done < operations; ++done) {
            operate();
            if (done % (alone_ ? 4 : 256) == 0) engine_.manager.check_integrity();
        }
        while (!open_.empty()) commit();
        while (!half_open_.empty()) finish();
    }

private:
    void operate() {
        const unsigned kind = draw_() % 16;
        failing_ = alone_ && draw_() % 8 == 0;
        if (kind < 7 && open_.size() < (alone_ ? 3 : 2)) {
            plan();
        } else if (kind < 11 && !open_.empty()) {
            commit();
        } else if (kind < 12 && !open_.empty()) {
            release();
        } else if (kind < 15 && !half_open_.empty()) {
            finish();
        } else if (kind == 15) {
            touch(name_of(draw_() % kUsers));
        }
    }

    void plan() {
        Batch batch(draw_, draw_() % 5);
        const CacheStats before = engine_.manager.stats();
        try {
            batch.plan(engine_, failing_, alone_);
        } catch (const CacheExhausted&) {
            expect(!alone_ || same(engine_.manager.stats(), before), "exhaustion left a trace");
            ++engine_.num_exhausted;
            return;
        }
        batch.compute(engine_);
        batch.check(engine_);
        open_.push_back(std::move(batch));
    }

    void commit() {
        const Batch& batch = open_.front();
        batch.check(engine_);
        Ints offloads(2 * (draw_() % 4 ? kConfig.num_blocks : draw_() % 6));
        const auto step = batch.planned.step;
        const auto num_offloads =
            with_failures(engine_, failing_, [&] { return engine_.manager.commit(step, offloads); });
        offloads.resize(2 * num_offloads);
        if (num_offloads > 0) half_open_.push_back({step, offloads});
        open_.pop_front();
        engine_.junk_freed();
    }

    void release() {
        open_.front().check(engine_);
        const auto step = open_.front().planned.step;
        with_failures(engine_, failing_, [&] { return engine_.manager.release(step), 0; });
        open_.pop_front();
        engine_.junk_freed();
    }

    void finish() {
        const auto& [step, offloads] = half_open_.front();
        const bool moved = draw_() % 8 != 0;
        for (std::size_t i = 0; moved && i < offloads.size(); i += 2) {
            engine_.copy_block(engine_.host, offloads[i + 1], engine_.device, offloads[i], kConfig.block_size);
        }
        with_failures(engine_, failing_, [&] { return engine_.manager.finish(step, moved), 0; });
        half_open_.pop_front();
        engine_.junk_freed();
    }

    void touch(const std::string& user) {
        const unsigned kind = draw_() % 8;
        with_failures(engine_, failing_, [&] {
            return kind < 4 ? engine_.manager.pin(user, kind != 0) : engine_.manager.close(user);
        });
        if (draw_() % 64 == 0) engine_.manager.clear();
        engine_.junk_freed();
    }

    Engine& engine_;
    std::minstd_rand draw_;
    bool alone_;
    bool failing_ = false;
    std::deque<Batch> open_;
    std::deque<HalfOpen> half_open_;
};

void report(const Engine& engine, long operations) {
    const CacheStats stats = engine.manager.stats();
    std::printf("%ld operations: %ld steps, %ld positions reused, %ld copies, %ld restores, %ld offloads, "
                "%ld evictions, %ld truncations, %ld times exhausted\n",
                operations, long(stats.steps_planned), long(stats.positions_reused), long(stats.copies),
                long(stats.restores), long(stats.offloads), long(stats.evictions), long(stats.truncations),
                engine.num_exhausted.load());
    std::printf("%ld rows written, %ld times after a row of another user\n", engine.num_writes.load(),
                engine.num_turns.load());
}

}  // namespace

int main(int argc, char** argv) {
    const long operations = argc > 1 ? std::atol(argv[1]) : 100'000;
    const int num_threads = argc > 2 ? std::atoi(argv[2]) : 1;
    Engine engine;
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) {
        threads.emplace_back([&, i] { Worker(engine, i + 1, num_threads == 1).run(operations / num_threads); });
    }
    for (std::thread& thread : threads) thread.join();
    report(engine, operations);
    engine.manager.clear();
    engine.manager.check_integrity();
    const CacheStats stats = engine.manager.stats();
    expect(stats.num_sessions == 0 && stats.num_open_steps == 0 && stats.host_blocks_used == 0, "something is left");
    expect(stats.num_free_blocks == stats.num_blocks - engine.manager.num_shared_blocks(), "blocks are lost");
    expect(stats.restores > 0 && stats.evictions > 0 && stats.truncations > 0, "rules were left out");
    // a million operations interleave at least a million writes of several users
    expect(engine.num_turns >= operations, "too few rows were written");
}
