// Prints how many blocks a second the pool allocates and frees, 4 at a time as a history does, out of 100,000 blocks
// that were shuffled first.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>

#include "block_pool.h"

int main() {
    constexpr int num_blocks = 100'000;
    constexpr int rounds = 10'000'000;
    constexpr int num_together = 4;
    speeder::BlockPool pool(num_blocks);
    std::vector<speeder::BlockId> held(num_blocks / 2);
    std::minstd_rand draw(0);
    for (auto& block : held) block = pool.allocate();
    std::shuffle(held.begin(), held.end(), draw);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < rounds; ++i) {
        speeder::BlockId* freed = &held[draw() % (held.size() - num_together)];
        for (int k = 0; k < num_together; ++k) pool.release(freed[k]);
        for (int k = 0; k < num_together; ++k) freed[k] = pool.allocate();
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%.0f\n", 2.0 * num_together * rounds / seconds.count());
    return pool.num_free() == num_blocks - static_cast<int>(held.size()) ? 0 : 1;
}
