// Reference-counted block ids on a free list. Knows neither sequences nor users.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace speeder {

using BlockId = std::int32_t;
inline constexpr std::int32_t kNone = -1;

class BlockPool {
public:
    explicit BlockPool(std::int32_t num_blocks);

    std::int32_t num_blocks() const noexcept { return static_cast<std::int32_t>(refs_.size()); }
    std::int32_t num_free() const noexcept { return static_cast<std::int32_t>(free_.size()); }

    // A block with one reference; the caller has made sure that one is free.
    BlockId allocate() noexcept;
    // One more reference to a block in use.
    void acquire(BlockId block) noexcept;
    // One reference less; the last one frees the block.
    void release(BlockId block) noexcept;
    // Releases blocks[keep:] and cuts them off.
    void release_from(std::vector<BlockId>& blocks, std::size_t keep) noexcept;

    // Throws std::logic_error unless the counts equal `expected` [num_blocks] and the free list holds the zeros.
    void check(std::span<const std::int32_t> expected) const;

private:
    std::vector<std::int32_t> refs_;
    std::vector<BlockId> free_;
};

}  // namespace speeder
