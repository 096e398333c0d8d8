// How a batch is planned, from the look-up of its sessions to the caller's buffers.
#include <algorithm>
#include <cstring>

#include "block_manager.h"
#include "message.h"

namespace speeder {

// Undoes what `match` did to the session table, unless the plan came through.
class BlockManager::Rollback {
public:
    Rollback(BlockManager& manager, Step& step) noexcept : manager_(manager), step_(step) {}
    Rollback(const Rollback&) = delete;
    Rollback& operator=(const Rollback&) = delete;
    ~Rollback() {
        if (done_) return;
        for (Sequence& sequence : step_.live()) {
            if (sequence.session == kNone) continue;
            Session& session = manager_.sessions_[sequence.session];
            session.step = 0;
            if (!session.committed) manager_.sessions_.remove(sequence.session);
        }
        step_.size = 0;
    }
    void dismiss() noexcept { done_ = true; }

private:
    BlockManager& manager_;
    Step& step_;
    bool done_ = false;
};

StepPlan BlockManager::plan(const PlanRequest& request, const PlanBuffers& out) {
    check_arguments(request, out);
    const std::scoped_lock lock(mutex_);
    Step& step = take_step(request.users.size());
    Rollback rollback(*this, step);
    for (std::size_t i = 0; i < request.users.size(); ++i) {
        const std::size_t begin = static_cast<std::size_t>(request.offsets[i]) * config_.key_width;
        const std::size_t end = static_cast<std::size_t>(request.offsets[i + 1]) * config_.key_width;
        match(step.sequences[step.size++], request.users[i], request.keys.subspan(begin, end - begin), next_step_);
    }
    const Need need = measure(step);
    if (static_cast<std::size_t>(need.rows) > out.slot_mapping.size()) {
        throw std::invalid_argument(message("slot_mapping: has ", out.slot_mapping.size(), " entries, the batch has ",
                                            need.rows, " new rows"));
    }
    make_room(step, need);
    // nothing throws from here on
    rollback.dismiss();
    assign(step, need.slots);
    step.id = next_step_++;
    return write(step, out);
}

BlockManager::Step& BlockManager::take_step(std::size_t batch_size) {
    const auto at_rest = std::find_if(steps_.begin(), steps_.end(), [](const auto& step) { return step->id == 0; });
    Step& step = at_rest == steps_.end() ? *steps_.emplace_back(std::make_unique<Step>()) : **at_rest;
    if (step.sequences.size() < batch_size) step.sequences.resize(batch_size);
    return step;
}

// Finds or makes the sequence's session and reserves all memory the rest of the plan and its commit will use.
void BlockManager::match(Sequence& sequence, std::optional<std::string_view> user, std::span<const std::int32_t> keys,
                         std::int64_t step) {
    sequence.session = sequence.slot = sequence.copy_from = kNone;
    sequence.length = static_cast<std::int32_t>(keys.size() / config_.key_width);
    sequence.cached_len = 0;
    sequence.blocks.reserve(num_blocks_for(sequence.length));
    if (!user || !config_.retain || sequence.length == 0) return;
    SessionId id = sessions_.find(*user);
    // one writer per user and step
    if (id != kNone && sessions_[id].step != 0) return;
    if (id == kNone) id = sessions_.create(*user);
    sessions_[id].step = step;
    sequence.session = id;
    sequence.cached_len = usable_len(sessions_[id], keys);
    sequence.keys.assign(keys.begin(), keys.end());
}

// How many leading positions of the session serve a history with these keys.
std::int32_t BlockManager::usable_len(const Session& session, std::span<const std::int32_t> keys) const noexcept {
    const std::size_t shorter = std::min(session.keys.size(), keys.size());
    std::size_t common = shorter;
    if (shorter > 0 && std::memcmp(session.keys.data(), keys.data(), shorter * sizeof(std::int32_t)) != 0) {
        common = std::mismatch(keys.begin(), keys.begin() + shorter, session.keys.begin()).first - keys.begin();
    }
    if (common == keys.size() && common == session.keys.size() && session.has_last) return session.length;
    const auto length = static_cast<std::int32_t>(keys.size() / config_.key_width);
    // without h(last) the last row is computed anew
    return std::min(static_cast<std::int32_t>(common / config_.key_width), length - 1);
}

// Leading blocks shared with the session. A block that goes on differently is copied, not kept.
std::int32_t BlockManager::num_kept_blocks(const Sequence& sequence) const noexcept {
    if (sequence.session == kNone) return 0;
    const bool appends = sequence.cached_len == sessions_[sequence.session].length;
    return appends ? num_blocks_for(sequence.cached_len) : sequence.cached_len / config_.block_size;
}

BlockManager::Need BlockManager::measure(const Step& step) const noexcept {
    Need need;
    for (const Sequence& sequence : step.live()) {
        const std::int32_t num_blocks = num_blocks_for(sequence.length);
        const std::int32_t num_cached = num_blocks_for(sequence.cached_len);
        need.rows += sequence.length - sequence.cached_len;
        need.blocks += num_blocks - num_kept_blocks(sequence);
        need.blocks_trimmed += num_blocks - num_cached;
        if (sequence.session == kNone) continue;
        const Session& session = sessions_[sequence.session];
        need.blocks_trimmed -= static_cast<std::int64_t>(session.blocks.size()) - num_cached;
        need.slots += !session.committed;
    }
    return need;
}

// Evicts the longest unused idle sessions; where even all do not suffice, the batch's own sessions are cut to what
// their requests reuse, and new sessions beyond the slots stay anonymous. Throws before the first change or never.
void BlockManager::make_room(Step& step, const Need& need) {
    std::int64_t blocks = pool_.num_free();
    std::int64_t slots = sessions_.num_free_slots();
    victims_.clear();
    for (SessionId id = sessions_.oldest(); id != kNone && (blocks < need.blocks || slots < need.slots);
         id = sessions_[id].newer) {
        if (sessions_[id].step != 0) continue;
        victims_.push_back(id);
        blocks += static_cast<std::int64_t>(sessions_[id].blocks.size());
        ++slots;
    }
    if (blocks < need.blocks) {
        if (blocks < need.blocks_trimmed) {
            throw CacheExhausted(message("the step needs ", need.blocks_trimmed, " more blocks, ", blocks, " of ",
                                         pool_.num_blocks(), " are free or in idle sessions"));
        }
        trim_sessions(step);
    }
    for (const SessionId id : victims_) drop(id);
    counters_.evictions += static_cast<std::int64_t>(victims_.size());
    if (slots < need.slots) make_anonymous(step, need.slots - slots);
}

void BlockManager::trim_sessions(Step& step) noexcept {
    for (const Sequence& sequence : step.live()) {
        if (sequence.session == kNone) continue;
        Session& session = sessions_[sequence.session];
        if (sequence.cached_len == session.length) continue;
        session.length = sequence.cached_len;
        session.has_last = false;
        session.keys.resize(static_cast<std::size_t>(session.length) * config_.key_width);
        pool_.release_from(session.blocks, num_blocks_for(session.length));
        ++counters_.trims;
    }
}

void BlockManager::make_anonymous(Step& step, std::int64_t num_sessions) noexcept {
    for (auto sequence = step.live().rbegin(); num_sessions > 0; ++sequence) {
        if (sequence->session == kNone || sessions_[sequence->session].committed) continue;
        sessions_.remove(sequence->session);
        sequence->session = kNone;
        --num_sessions;
    }
}

void BlockManager::assign(Step& step, std::int64_t num_fresh) noexcept {
    // h(last) goes to a second slot where one is spare, so that a failed step can't spoil the first
    std::int64_t num_spare = sessions_.num_free_slots() - num_fresh;
    for (Sequence& sequence : step.live()) {
        const std::int32_t num_kept = num_kept_blocks(sequence);
        if (sequence.session != kNone) {
            const Session& session = sessions_[sequence.session];
            const bool writes = sequence.cached_len < sequence.length;
            const bool moves = writes && (!session.committed || num_spare-- > 0);
            sequence.slot = moves ? sessions_.take_slot() : session.slot;
            for (std::int32_t i = 0; i < num_kept; ++i) {
                pool_.acquire(session.blocks[i]);
                sequence.blocks.push_back(session.blocks[i]);
            }
            if (num_kept < num_blocks_for(sequence.cached_len)) sequence.copy_from = session.blocks[num_kept];
        }
        for (std::int32_t i = num_kept; i < num_blocks_for(sequence.length); ++i) {
            sequence.blocks.push_back(pool_.allocate());
        }
    }
}

StepPlan BlockManager::write(const Step& step, const PlanBuffers& out) noexcept {
    StepPlan plan{step.id, 0, 0};
    for (std::size_t i = 0; i < step.size; ++i) {
        const Sequence& sequence = step.sequences[i];
        out.cached_len[i] = sequence.cached_len;
        out.session_slots[i] = sequence.slot;
        const auto row = out.block_tables.subspan(i * out.table_width, out.table_width);
        std::fill(std::copy(sequence.blocks.begin(), sequence.blocks.end(), row.begin()), row.end(), kNone);
        for (std::int32_t at = sequence.cached_len; at < sequence.length; ++at) {
            const BlockId block = sequence.blocks[at / config_.block_size];
            out.slot_mapping[plan.num_new_rows++] = block * config_.block_size + at % config_.block_size;
        }
        if (sequence.copy_from != kNone) {
            const auto copy = out.copies.subspan(3 * static_cast<std::size_t>(plan.num_copies++), 3);
            copy[0] = sequence.copy_from;
            copy[1] = sequence.blocks[sequence.cached_len / config_.block_size];
            copy[2] = sequence.cached_len % config_.block_size;
        }
        counters_.positions_reused += sequence.cached_len;
    }
    counters_.positions_planned += plan.num_new_rows;
    counters_.copies += plan.num_copies;
    ++counters_.steps_planned;
    return plan;
}

}  // namespace speeder
