// Reference-counted ids (of blocks, of slots) on a free list. Knows neither sequences nor users.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace speeder {

using BlockId = std::int32_t;
inline constexpr std::int32_t kNone = -1;

class BlockPool {
public:
    // track_freed: remember which blocks were freed, for `take_freed`.
    explicit BlockPool(std::int32_t num_blocks, bool track_freed = false);

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

    // The blocks that were freed since the last call and still are free.
    std::vector<BlockId> take_freed();

    // Throws std::logic_error unless the counts equal `expected` [num_blocks] and the free list holds the zeros.
    // `what` names the blocks in its message.
    void check(std::span<const std::int32_t> expected, const char* what) const;

private:
    std::vector<std::int32_t> refs_;
    std::vector<BlockId> free_;
    std::vector<std::uint8_t> freed_;  // [num_blocks], or empty: not tracked
};

}  // namespace speeder
