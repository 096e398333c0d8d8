#include "block_pool.h"

#include <cassert>
#include <numeric>
#include <stdexcept>

#include "message.h"

namespace speeder {

BlockPool::BlockPool(std::int32_t num_blocks, bool track_freed)
    : refs_(num_blocks, 0), free_(num_blocks), freed_(track_freed ? num_blocks : 0) {
    // the lowest id is on top
    std::iota(free_.rbegin(), free_.rend(), 0);
}

BlockId BlockPool::allocate() noexcept {
    assert(!free_.empty());
    const BlockId block = free_.back();
    free_.pop_back();
    refs_[block] = 1;
    if (!freed_.empty()) freed_[block] = 0;
    return block;
}

void BlockPool::acquire(BlockId block) noexcept {
    assert(refs_[block] > 0);
    ++refs_[block];
}

void BlockPool::release(BlockId block) noexcept {
    assert(refs_[block] > 0);
    if (--refs_[block] > 0) return;
    // free_ was made with room for every block, so this push never allocates
    free_.push_back(block);
    if (!freed_.empty()) freed_[block] = 1;
}

void BlockPool::release_from(std::vector<BlockId>& blocks, std::size_t keep) noexcept {
    // last first: the next sequence gets the same blocks in the same order
    while (blocks.size() > keep) {
        release(blocks.back());
        blocks.pop_back();
    }
}

std::vector<BlockId> BlockPool::take_freed() {
    std::vector<BlockId> taken;
    if (freed_.empty()) return taken;
    taken.reserve(free_.size());
    for (const BlockId block : free_) {
        if (freed_[block] == 0) continue;
        freed_[block] = 0;
        taken.push_back(block);
    }
    return taken;
}

void BlockPool::check(std::span<const std::int32_t> expected, const char* what) const {
    for (BlockId block = 0; block < num_blocks(); ++block) {
        if (refs_[block] != expected[block]) {
            throw std::logic_error(message(what, " ", block, " has ", refs_[block], " references, ", expected[block],
                                           " are held"));
        }
    }
    std::vector<bool> listed(refs_.size());
    for (const BlockId block : free_) {
        if (block < 0 || block >= num_blocks() || listed[block] || refs_[block] != 0) {
            throw std::logic_error(message("free list: ", what, " ", block, " is unknown, listed twice or in use"));
        }
        listed[block] = true;
    }
    for (BlockId block = 0; block < num_blocks(); ++block) {
        if (refs_[block] == 0 && !listed[block]) throw std::logic_error(message(what, " ", block, " is lost"));
    }
}

}  // namespace speeder
