// A fixed sequence of steps on the cache manager, for callgrind: users come, come back with a new item, are corrected
// and evicted. No clock and no randomness but a seeded one: the instructions it takes are the same on every run.
#include <array>
#include <cstdio>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "block_manager.h"

using Ints = std::vector<std::int32_t>;

namespace {

constexpr int kUsers = 512, kBatch = 64, kSteps = 200, kHistory = 30, kWindow = 50, kBlock = 16, kWidth = 3;
constexpr speeder::CacheConfig kConfig{.num_blocks = 2000,
                                       .block_size = kBlock,
                                       .shared_len = 40,
                                       .max_seq_len = kWindow,
                                       .key_width = kWidth,
                                       .budget_blocks = 800,
                                       .max_sessions = kUsers,
                                       .num_slots = kUsers + 2 * kBatch,
                                       .max_blocks_per_user = 0,
                                       .num_host_blocks = 200,
                                       .track_freed = false};

struct User {
    std::string name;
    Ints keys;  // kWidth a position
};

struct Traffic {
    std::minstd_rand draw{1};
    std::vector<User> users;

    Traffic() {
        for (int i = 0; i < kUsers; ++i) users.push_back({"user-" + std::to_string(i), {}});
    }

    void extend(User& user, int positions) {
        for (int k = 0; k < positions * kWidth; ++k) user.keys.push_back(static_cast<std::int32_t>(draw() >> 8));
    }

    // A new item most of the time, now and then a corrected past; a full window begins anew.
    void visit(User& user) {
        if (user.keys.empty()) return extend(user, kHistory);
        if (user.keys.size() == kWindow * kWidth) user.keys.resize(kHistory * kWidth);
        if (draw() % 16 == 0) user.keys[draw() % user.keys.size()] ^= 1;
        extend(user, 1);
    }
};

}  // namespace

int main() {
    speeder::BlockManager manager(kConfig);
    Traffic traffic;
    const std::size_t width = manager.max_blocks_per_seq();
    Ints cached(kBatch), slots(kBatch), tables(kBatch * width), mapping(kBatch * kWindow), copies(kBatch * 3),
        restores(kBatch * width * 2), offloads(2 * kConfig.num_host_blocks);
    long new_rows = 0;
    for (int step = 0; step < kSteps; ++step) {
        std::vector<std::optional<std::string_view>> names;
        Ints offsets{0}, keys;
        const int first = traffic.draw() % kUsers;
        for (int i = 0; i < kBatch; ++i) {
            User& user = traffic.users[(first + i * 7) % kUsers];
            traffic.visit(user);
            names.emplace_back(user.name);
            keys.insert(keys.end(), user.keys.begin(), user.keys.end());
            offsets.push_back(static_cast<std::int32_t>(keys.size()) / kWidth);
        }
        const auto planned =
            manager.plan({names, offsets, keys}, {cached, slots, tables, width, mapping, copies, restores});
        new_rows += planned.num_new_rows;
        if (manager.commit(planned.step, offloads) > 0) manager.finish(planned.step, true);
    }
    const speeder::CacheStats stats = manager.stats();
    std::printf("%ld rows planned, %ld positions reused, %ld evictions, %ld restores\n", new_rows,
                long(stats.positions_reused), long(stats.evictions), long(stats.restores));
    return stats.evictions > 0 && stats.restores > 0 && stats.copies > 0 ? 0 : 1;
}
