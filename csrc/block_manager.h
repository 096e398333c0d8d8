// Plans batches on a paged KV cache: which positions of each history are cached, where the new ones go, what is copied
// first. A sequence is the shared instruction (its blocks are held here, for good) and a user's history, which starts
// in a block of its own. Knows ids, lengths and integer keys; neither tensors nor Python.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "block_pool.h"
#include "session_table.h"

namespace speeder {

// Every idle session would not free enough blocks. Nothing was changed.
class CacheExhausted : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

struct CacheConfig {
    std::int32_t num_blocks;
    std::int32_t block_size;    // positions
    std::int32_t shared_len;    // positions of the instruction
    std::int32_t max_seq_len;   // positions of the longest history
    std::int32_t key_width;     // int32 a position
    std::int32_t max_sessions;  // and slots
    bool retain;                // false: nothing outlives its step
};

// Views that must outlive the call only. B = users.size().
struct PlanRequest {
    std::span<const std::optional<std::string_view>> users;  // [B], nullopt: anonymous
    std::span<const std::int32_t> offsets;                   // [>= B + 1]
    std::span<const std::int32_t> keys;                      // [>= offsets[B] * key_width]
};

// Where `plan` writes; entries past the batch stay untouched.
struct PlanBuffers {
    std::span<std::int32_t> cached_len;     // [>= B]
    std::span<std::int32_t> session_slots;  // [>= B]
    std::span<std::int32_t> block_tables;   // [>= B, table_width], -1 behind the last block
    std::size_t table_width;                // >= max_blocks_per_seq
    std::span<std::int32_t> slot_mapping;   // [>= new rows]
    std::span<std::int32_t> copies;         // [>= B, 3]: source block, target block, positions
};

struct StepPlan {
    std::int64_t step;
    std::int32_t num_new_rows;
    std::int32_t num_copies;
};

struct CacheStats {
    std::int64_t num_blocks, num_free_blocks, num_sessions, num_open_steps;
    std::int64_t steps_planned, steps_committed, steps_released;
    std::int64_t positions_reused, positions_planned, copies, evictions, trims;
};

// Safe to call from several threads. `plan` either succeeds or leaves everything as it was.
class BlockManager {
public:
    explicit BlockManager(const CacheConfig& config);

    const CacheConfig& config() const noexcept { return config_; }
    std::int32_t num_shared_blocks() const noexcept { return num_blocks_for(config_.shared_len); }
    std::int32_t max_blocks_per_seq() const noexcept { return num_blocks_for(config_.max_seq_len); }

    // Throws std::invalid_argument (the message names the argument) or CacheExhausted.
    StepPlan plan(const PlanRequest& request, const PlanBuffers& out);
    // The step's keys and values are written: its sessions take them over. Throws std::invalid_argument, as `release`.
    void commit(std::int64_t step);
    // The step failed: its blocks are freed, its sessions are what they were.
    void release(std::int64_t step);

    // True if the user had a session; one in an open step goes when the step ends.
    bool close(std::string_view user);
    void clear();
    bool contains(std::string_view user) const;
    CacheStats stats() const;

    // Recomputes everything from the sessions and open steps; throws std::logic_error where something disagrees.
    void check_integrity() const;

private:
    struct Sequence {
        SessionId session = kNone;  // kNone: anonymous
        std::int32_t length = 0;
        std::int32_t cached_len = 0;
        std::int32_t slot = kNone;
        BlockId copy_from = kNone;
        std::vector<std::int32_t> keys;
        std::vector<BlockId> blocks;
    };
    struct Step {
        std::int64_t id = 0;  // 0: at rest
        std::size_t size = 0;
        std::vector<Sequence> sequences;  // the first `size` count; the rest keep their memory for later steps
        std::span<Sequence> live() noexcept { return {sequences.data(), size}; }
        std::span<const Sequence> live() const noexcept { return {sequences.data(), size}; }
    };
    struct Need {
        std::int64_t blocks = 0;
        std::int64_t blocks_trimmed = 0;  // if the batch's own sessions give up what their requests don't reuse
        std::int64_t rows = 0;
        std::int64_t slots = 0;
    };
    class Rollback;

    std::int32_t num_blocks_for(std::int32_t length) const noexcept {
        return length / config_.block_size + (length % config_.block_size != 0);
    }

    void check_arguments(const PlanRequest& request, const PlanBuffers& out) const;
    Step& take_step(std::size_t batch_size);
    void match(Sequence& sequence, std::optional<std::string_view> user, std::span<const std::int32_t> keys,
               std::int64_t step);
    std::int32_t usable_len(const Session& session, std::span<const std::int32_t> keys) const noexcept;
    std::int32_t num_kept_blocks(const Sequence& sequence) const noexcept;
    Need measure(const Step& step) const noexcept;
    void make_room(Step& step, const Need& need);
    void trim_sessions(Step& step) noexcept;
    void make_anonymous(Step& step, std::int64_t num_sessions) noexcept;
    void assign(Step& step, std::int64_t num_fresh) noexcept;
    StepPlan write(const Step& step, const PlanBuffers& out) noexcept;

    Step& open_step(std::int64_t step, const char* what);
    void take_over(Sequence& sequence) noexcept;
    void give_back(Sequence& sequence) noexcept;
    void drop(SessionId session) noexcept;
    void close_session(SessionId session) noexcept;
    void count_session(SessionId session, std::vector<std::int32_t>& refs, std::vector<std::int32_t>& slots) const;
    void count_step(const Step& step, std::vector<std::int32_t>& refs, std::vector<std::int32_t>& slots) const;

    const CacheConfig config_;
    mutable std::mutex mutex_;
    BlockPool pool_;
    SessionTable sessions_;
    std::vector<BlockId> shared_blocks_;
    std::vector<std::unique_ptr<Step>> steps_;
    std::vector<SessionId> victims_;
    std::int64_t next_step_ = 1;
    CacheStats counters_{};
};

}  // namespace speeder
