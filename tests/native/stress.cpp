// Random operations on one BlockManager with a fake key/value store, for the sanitizers:
//     g++ -std=c++20 -g -O1 -fsanitize=address,undefined -Icsrc tests/native/stress.cpp csrc/[bs]*_*.cpp -o stress
//     ./stress OPERATIONS [THREADS]
// Every plan must read back its own history, at once and again when its step ends. With one thread, now and then each
// allocation of a plan in turn is made to fail, and the manager must be as before.
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

constexpr CacheConfig kConfig{40, 3, 4, 20, 2, 6, true};
constexpr std::size_t kWidth = 7;
constexpr std::size_t kUsers = 9;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "stress: %s\n", what);
    std::abort();
}

// A row depends on all keys up to it, like a key or value in a decoder.
std::uint64_t next_row(std::uint64_t row, const std::int32_t* key) {
    for (int i = 0; i < kConfig.key_width; ++i) row = (row ^ std::uint64_t(key[i] + 1)) * 0x9E3779B97F4A7C15u + 1;
    return row;
}

std::vector<std::uint64_t> rows_of(std::span<const std::int32_t> keys) {
    std::vector<std::uint64_t> rows;
    for (std::size_t i = 0; i < keys.size(); i += kConfig.key_width) {
        rows.push_back(next_row(rows.empty() ? 0 : rows.back(), &keys[i]));
    }
    return rows;
}

struct Engine {
    BlockManager manager{kConfig};
    // one writer per block is the manager's promise: a plain array, so that TSan sees a broken one
    std::vector<std::uint64_t> store = std::vector<std::uint64_t>(kConfig.num_blocks * kConfig.block_size);
};

struct Batch {
    std::vector<std::string> names;
    std::vector<std::optional<std::string_view>> users;
    Ints offsets{0}, keys;
    Ints cached, slots, tables, mapping, copies;

    Batch(std::minstd_rand& draw, std::size_t size)
        : cached(size), slots(size), tables(size * kWidth), mapping(size * kConfig.max_seq_len), copies(size * 3) {
        names.reserve(size);
        for (std::size_t i = 0; i < size; ++i) {
            names.push_back("a user whose name needs memory " + std::to_string(draw() % kUsers));
            users.push_back(draw() % 8 ? std::optional<std::string_view>(names.back()) : std::nullopt);
            const std::size_t length = draw() % (kConfig.max_seq_len + 1);
            for (std::size_t k = 0; k < length * kConfig.key_width; ++k) keys.push_back(draw() % 8 == 0);
            offsets.push_back(static_cast<std::int32_t>(keys.size()) / kConfig.key_width);
        }
    }

    StepPlan plan(BlockManager& manager) {
        return manager.plan({users, offsets, keys}, {cached, slots, tables, kWidth, mapping, copies});
    }

    std::span<const std::int32_t> keys_of(std::size_t i) const {
        const std::size_t width = kConfig.key_width;
        return std::span(keys).subspan(offsets[i] * width, (offsets[i + 1] - offsets[i]) * width);
    }

    std::uint64_t& row(Engine& engine, std::size_t i, std::size_t at) const {
        const BlockId block = tables[i * kWidth + at / kConfig.block_size];
        return engine.store[block * kConfig.block_size + at % kConfig.block_size];
    }

    void compute(Engine& engine, const StepPlan& plan) {
        for (std::int32_t c = 0; c < plan.num_copies; ++c) {
            for (std::int32_t at = 0; at < copies[3 * c + 2]; ++at) {
                engine.store[copies[3 * c + 1] * kConfig.block_size + at] =
                    engine.store[copies[3 * c] * kConfig.block_size + at];
            }
        }
        std::int32_t written = 0;
        for (std::size_t i = 0; i < users.size(); ++i) {
            const auto rows = rows_of(keys_of(i));
            for (std::size_t at = cached[i]; at < rows.size(); ++at) engine.store[mapping[written++]] = rows[at];
        }
        expect(written == plan.num_new_rows, "number of new rows");
    }

    void check(Engine& engine) const {
        for (std::size_t i = 0; i < users.size(); ++i) {
            const auto rows = rows_of(keys_of(i));
            for (std::size_t at = 0; at < rows.size(); ++at) expect(row(engine, i, at) == rows[at], "foreign row");
        }
    }
};

bool same(CacheStats a, CacheStats b) { return std::memcmp(&a, &b, sizeof a) == 0; }

// Fails the 1st, 2nd, 3rd ... allocation of the same plan until it comes through.
StepPlan plan_with_failures(Engine& engine, Batch& batch) {
    for (long allowed = 0;; ++allowed) {
        const CacheStats before = engine.manager.stats();
        try {
            allocations_left = allowed;
            const StepPlan plan = batch.plan(engine.manager);
            allocations_left = -1;
            return plan;
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

void work(Engine& engine, unsigned seed, long operations, bool alone) {
    std::minstd_rand draw(seed);
    std::deque<std::pair<Batch, std::int64_t>> open;
    const auto finish = [&](bool commit) {
        auto& [batch, step] = open.front();
        batch.check(engine);
        commit ? engine.manager.commit(step) : engine.manager.release(step);
        open.pop_front();
    };
    for (long done = 0; done < operations; ++done) {
        const unsigned kind = draw() % 16;
        if (kind < 8 && open.size() < 3) {
            Batch batch(draw, draw() % 4);
            const CacheStats before = engine.manager.stats();
            try {
                const bool failing = alone && draw() % 4 == 0;
                const StepPlan plan = failing ? plan_with_failures(engine, batch) : batch.plan(engine.manager);
                batch.compute(engine, plan);
                batch.check(engine);
                open.emplace_back(std::move(batch), plan.step);
            } catch (const CacheExhausted&) {
                expect(!alone || same(engine.manager.stats(), before), "exhaustion left a trace");
            }
        } else if (kind < 15 && !open.empty()) {
            finish(kind < 13);
        } else if (kind == 15) {
            engine.manager.close("a user whose name needs memory " + std::to_string(draw() % kUsers));
            if (draw() % 64 == 0) engine.manager.clear();
        }
        if (alone || done % 64 == 0) engine.manager.check_integrity();
    }
    while (!open.empty()) finish(true);
}

}  // namespace

int main(int argc, char** argv) {
    const long operations = argc > 1 ? std::atol(argv[1]) : 100'000;
    const int num_threads = argc > 2 ? std::atoi(argv[2]) : 1;
    Engine engine;
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) {
        threads.emplace_back([&, i] { work(engine, i + 1, operations / num_threads, num_threads == 1); });
    }
    for (std::thread& thread : threads) thread.join();
    engine.manager.clear();
    engine.manager.check_integrity();
    const CacheStats stats = engine.manager.stats();
    expect(stats.num_sessions == 0 && stats.num_open_steps == 0, "something is left");
    expect(stats.num_free_blocks == stats.num_blocks - engine.manager.num_shared_blocks(), "blocks are lost");
    std::printf("%ld operations: %ld steps, %ld positions reused, %ld copies, %ld evictions, %ld trims\n", operations,
                long(stats.steps_planned), long(stats.positions_reused), long(stats.copies), long(stats.evictions),
                long(stats.trims));
}
