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
#include <string>
#include <string_view>
#include <vector>

#include "block_pool.h"
#include "session_table.h"

namespace speeder {

// Too few blocks or slots are free for the step. Nothing was changed.
class CacheExhausted : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

struct CacheConfig {
    std::int32_t num_blocks;
    std::int32_t block_size;           // positions
    std::int32_t shared_len;           // positions of the instruction
    std::int32_t max_seq_len;          // positions of the longest history
    std::int32_t key_width;            // int32 a position
    std::int32_t budget_blocks;        // that sessions may keep between steps, 0: nothing outlives its step
    std::int32_t max_sessions;         // committed ones, of both tiers
    std::int32_t num_slots;            // of h(last)
    std::int32_t max_blocks_per_user;  // that a session may keep, 0: any number
    std::int32_t num_host_blocks;
    bool track_freed;
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
    std::span<std::int32_t> restores;       // [>= B * max_blocks_per_seq, 2]: host block, device block
};

struct StepPlan {
    std::int64_t step;
    std::int32_t num_new_rows;
    std::int32_t num_copies;
    std::int32_t num_restores;
};

struct CacheStats {
    std::int64_t num_blocks, num_free_blocks, num_sessions, num_host_sessions, num_pinned, num_open_steps;
    std::int64_t session_blocks, host_blocks_used, num_host_blocks;
    std::int64_t steps_planned, positions_planned, steps_committed, steps_released;
    std::int64_t positions_reused, copies, evictions, offloads, restores, truncations;  // of committed steps
};

// Safe to call from several threads. Every call either succeeds or leaves everything as it was.
class BlockManager {
public:
    explicit BlockManager(const CacheConfig& config);

    const CacheConfig& config() const noexcept { return config_; }
    std::int32_t num_shared_blocks() const noexcept { return num_blocks_for(config_.shared_len); }
    std::int32_t max_blocks_per_seq() const noexcept { return num_blocks_for(config_.max_seq_len); }

    // Evicts nothing. Throws std::invalid_argument (the message names the argument) or CacheExhausted.
    StepPlan plan(const PlanRequest& request, const PlanBuffers& out);
    // What `plan` would write to cached_len [>= B].
    void peek(const PlanRequest& request, std::span<std::int32_t> cached_len);

    // The step's keys and values are written: its sessions take them over, then the budgets are enforced. Writes
    // (device block, host block) pairs to `offloads` [n, 2] and returns their number; if there are any, the step stays
    // half open, with the blocks and sessions concerned, until `finish`. Throws std::invalid_argument, as they all do.
    std::int32_t commit(std::int64_t step, std::span<std::int32_t> offloads);
    // The offloads of a half-open step were carried out, or, `moved` false, failed: its sessions are lost.
    void finish(std::int64_t step, bool moved);
    // The step failed: its blocks are freed, its sessions are what they were.
    void release(std::int64_t step);

    // Pinned sessions are evicted last. False if the user has no session, or if pinned ones would exceed the budget.
    bool pin(std::string_view user, bool pinned);
    std::vector<std::string> pinned() const;  // users, in no order
    // True if the user had a session; one in an open step goes when the step ends.
    bool close(std::string_view user);
    void clear();
    bool contains(std::string_view user) const;
    CacheStats stats() const;
    // The newest step that is open or half open; 0: none is.
    std::int64_t open_step() const;
    // Device blocks that were freed since the last call and still are free; none unless track_freed.
    std::vector<BlockId> take_freed();

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
        std::int64_t id = 0;     // 0: at rest
        bool half_open = false;  // committed, sessions of tier kMoving wait for `finish`
        std::int64_t reused = 0, copies = 0, restores = 0;  // counted when it is committed
        std::size_t size = 0;
        std::vector<Sequence> sequences;  // the first `size` count; the rest keep their memory for later steps
        std::span<Sequence> live() noexcept { return {sequences.data(), size}; }
        std::span<const Sequence> live() const noexcept { return {sequences.data(), size}; }
    };
    struct Need {
        std::int64_t blocks = 0;
        std::int64_t rows = 0;
        std::int64_t slots = 0;
    };
    struct Holders {  // how often each id is held
        std::vector<std::int32_t> blocks, host_blocks, slots;
    };
    class Rollback;

    std::int32_t num_blocks_for(std::int32_t length) const noexcept {
        return length / config_.block_size + (length % config_.block_size != 0);
    }
    std::int64_t num_session_blocks() const noexcept {
        return sessions_.num_blocks(Tier::kDevice, false) + sessions_.num_blocks(Tier::kDevice, true);
    }

    // block_manager_plan.cpp
    std::span<const std::int32_t> keys_of(const PlanRequest& request, std::size_t index) const noexcept;
    Step& take_step(std::size_t batch_size);
    void match(Sequence& sequence, std::optional<std::string_view> user, std::span<const std::int32_t> keys,
               std::int64_t step);
    std::int32_t usable_len(const Session& session, std::span<const std::int32_t> keys) const noexcept;
    std::int32_t num_kept_blocks(const Sequence& sequence) const noexcept;
    Need measure(const Step& step) const noexcept;
    void check_room(const Need& need) const;
    void assign(Sequence& sequence) noexcept;
    StepPlan write(Step& step, const PlanBuffers& out) noexcept;
    void write_rows(const Sequence& sequence, const PlanBuffers& out, StepPlan& plan) const noexcept;

    // block_manager_commit.cpp
    void take_over(Sequence& sequence) noexcept;
    void apply_quota(Session& session) noexcept;
    void enforce_max_sessions() noexcept;
    void enforce_budget(std::int64_t step, std::span<std::int32_t>& offloads) noexcept;
    bool offload(SessionId session, std::int64_t step, std::span<std::int32_t>& offloads) noexcept;
    bool make_host_room(std::int64_t num_blocks) noexcept;
    void finish_moves(Tier tier, bool pinned, std::int64_t step, bool moved) noexcept;

    // block_manager.cpp
    Step& find_step(std::int64_t step, bool half_open, const char* what);
    static void put_to_rest(Step& step) noexcept;
    void give_back(Sequence& sequence) noexcept;
    void drop(SessionId session) noexcept;
    void evict(SessionId session) noexcept;
    void close_session(SessionId session) noexcept;

    // block_manager_check.cpp
    void check_request(const PlanRequest& request) const;
    void check_buffers(std::size_t batch_size, const PlanBuffers& out) const;
    void check_budgets() const;
    void count_session(SessionId session, Holders& held) const;
    void check_tier(const Session& session) const;
    void check_writer(SessionId session) const;
    void count_step(const Step& step, Holders& held) const;

    const CacheConfig config_;
    mutable std::mutex mutex_;
    BlockPool pool_;
    BlockPool host_pool_;
    BlockPool slots_;
    SessionTable sessions_;
    std::vector<BlockId> shared_blocks_;
    std::vector<std::unique_ptr<Step>> steps_;
    std::vector<SessionId> peeked_;
    std::int64_t next_step_ = 1;
    CacheStats counters_{};
};

}  // namespace speeder
