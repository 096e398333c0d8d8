// How a batch is planned, from the look-up of its sessions to the caller's buffers. Nothing is evicted here.
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
            if (session.tier == Tier::kNew) manager_.sessions_.remove(sequence.session);
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
    check_request(request);
    check_buffers(request.users.size(), out);
    const std::scoped_lock lock(mutex_);
    Step& step = take_step(request.users.size());
    Rollback rollback(*this, step);
    for (std::size_t i = 0; i < request.users.size(); ++i) {
        match(step.sequences[step.size++], request.users[i], keys_of(request, i), next_step_);
    }
    const Need need = measure(step);
    require(static_cast<std::size_t>(need.rows) <= out.slot_mapping.size(), "slot_mapping: has ",
            out.slot_mapping.size(), " entries, the batch has ", need.rows, " new rows");
    check_room(need);
    // nothing throws from here on
    rollback.dismiss();
    for (Sequence& sequence : step.live()) assign(sequence);
    step.id = next_step_++;
    return write(step, out);
}

void BlockManager::peek(const PlanRequest& request, std::span<std::int32_t> cached_len) {
    constexpr std::int64_t peeked = -1;
    check_request(request);
    require(cached_len.size() >= request.users.size(), "cached_len: has ", cached_len.size(), " entries for ",
            request.users.size(), " users");
    const std::scoped_lock lock(mutex_);
    peeked_.clear();
    peeked_.reserve(request.users.size());
    // nothing throws from here on
    for (std::size_t i = 0; i < request.users.size(); ++i) {
        const std::span<const std::int32_t> keys = keys_of(request, i);
        const SessionId id = request.users[i] && !keys.empty() ? sessions_.find(*request.users[i]) : kNone;
        const bool usable = id != kNone && sessions_[id].step == 0;
        cached_len[i] = usable ? usable_len(sessions_[id], keys) : 0;
        if (!usable) continue;
        // marked, so that the same user a second time gets nothing
        sessions_[id].step = peeked;
        peeked_.push_back(id);
    }
    for (const SessionId id : peeked_) sessions_[id].step = 0;
}

std::span<const std::int32_t> BlockManager::keys_of(const PlanRequest& request, std::size_t index) const noexcept {
    const std::size_t begin = static_cast<std::size_t>(request.offsets[index]) * config_.key_width;
    const std::size_t end = static_cast<std::size_t>(request.offsets[index + 1]) * config_.key_width;
    return request.keys.subspan(begin, end - begin);
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
    if (!user || config_.budget_blocks == 0 || sequence.length == 0) return;
    SessionId id = sessions_.find(*user);
    // one writer per user and step
    if (id != kNone && sessions_[id].step != 0) return;
    if (id == kNone) id = sessions_.create(*user);
    sessions_[id].step = step;
    sequence.session = id;
    sequence.cached_len = usable_len(sessions_[id], keys);
    sequence.keys.assign(keys.begin(), keys.end());
    if (config_.num_host_blocks > 0) sessions_[id].host_blocks.reserve(num_blocks_for(sequence.length));
}

// How many leading positions of the session serve a history with these keys.
std::int32_t BlockManager::usable_len(const Session& session, std::span<const std::int32_t> keys) const noexcept {
    const std::size_t shorter = std::min(session.keys.size(), keys.size());
    std::size_t common = shorter;
    if (shorter > 0 && std::memcmp(session.keys.data(), keys.data(), shorter * sizeof(std::int32_t)) != 0) {
        common = std::mismatch(keys.begin(), keys.begin() + shorter, session.keys.begin()).first - keys.begin();
    }
    if (common == keys.size() && common == session.keys.size() && session.slot != kNone) return session.length;
    const auto length = static_cast<std::int32_t>(keys.size() / config_.key_width);
    // without h(last) the last row is computed anew
    return std::min(static_cast<std::int32_t>(common / config_.key_width), length - 1);
}

// Leading blocks shared with the session. A block that goes on differently is copied, not kept; a block of the
// host tier is restored.
std::int32_t BlockManager::num_kept_blocks(const Sequence& sequence) const noexcept {
    if (sequence.session == kNone || !sessions_[sequence.session].host_blocks.empty()) return 0;
    const bool appends = sequence.cached_len == sessions_[sequence.session].length;
    return appends ? num_blocks_for(sequence.cached_len) : sequence.cached_len / config_.block_size;
}

BlockManager::Need BlockManager::measure(const Step& step) const noexcept {
    Need need;
    for (const Sequence& sequence : step.live()) {
        need.rows += sequence.length - sequence.cached_len;
        need.blocks += num_blocks_for(sequence.length) - num_kept_blocks(sequence);
        need.slots += sequence.session != kNone && sequence.cached_len < sequence.length;
    }
    return need;
}

void BlockManager::check_room(const Need& need) const {
    if (need.blocks > pool_.num_free()) {
        throw CacheExhausted(message("the step needs ", need.blocks, " more blocks, ", pool_.num_free(), " of ",
                                     pool_.num_blocks(), " are free"));
    }
    if (need.slots > slots_.num_free()) {
        throw CacheExhausted(message("the step needs ", need.slots, " more slots, ", slots_.num_free(), " of ",
                                     slots_.num_blocks(), " are free"));
    }
}

void BlockManager::assign(Sequence& sequence) noexcept {
    const std::int32_t num_kept = num_kept_blocks(sequence);
    if (sequence.session != kNone) {
        const Session& session = sessions_[sequence.session];
        // a slot of its own: a failed step can't spoil the session's h(last)
        sequence.slot = sequence.cached_len < sequence.length ? slots_.allocate() : session.slot;
        for (std::int32_t i = 0; i < num_kept; ++i) {
            pool_.acquire(session.blocks[i]);
            sequence.blocks.push_back(session.blocks[i]);
        }
        const bool copies = session.host_blocks.empty() && num_kept < num_blocks_for(sequence.cached_len);
        if (copies) sequence.copy_from = session.blocks[num_kept];
    }
    for (std::int32_t i = num_kept; i < num_blocks_for(sequence.length); ++i) {
        sequence.blocks.push_back(pool_.allocate());
    }
}

StepPlan BlockManager::write(Step& step, const PlanBuffers& out) noexcept {
    StepPlan plan{step.id, 0, 0, 0};
    step.reused = 0;
    for (std::size_t i = 0; i < step.size; ++i) {
        const Sequence& sequence = step.sequences[i];
        out.cached_len[i] = sequence.cached_len;
        out.session_slots[i] = sequence.slot;
        const auto row = out.block_tables.subspan(i * out.table_width, out.table_width);
        std::fill(std::copy(sequence.blocks.begin(), sequence.blocks.end(), row.begin()), row.end(), kNone);
        write_rows(sequence, out, plan);
        step.reused += sequence.cached_len;
    }
    step.copies = plan.num_copies;
    step.restores = plan.num_restores;
    counters_.positions_planned += plan.num_new_rows;
    ++counters_.steps_planned;
    return plan;
}

// What the caller writes for the sequence: restored blocks, a copied block, new rows.
void BlockManager::write_rows(const Sequence& sequence, const PlanBuffers& out, StepPlan& plan) const noexcept {
    if (sequence.session != kNone && !sessions_[sequence.session].host_blocks.empty()) {
        for (std::int32_t i = 0; i < num_blocks_for(sequence.cached_len); ++i) {
            const auto restore = out.restores.subspan(2 * static_cast<std::size_t>(plan.num_restores++), 2);
            restore[0] = sessions_[sequence.session].host_blocks[i];
            restore[1] = sequence.blocks[i];
        }
    }
    if (sequence.copy_from != kNone) {
        const auto copy = out.copies.subspan(3 * static_cast<std::size_t>(plan.num_copies++), 3);
        copy[0] = sequence.copy_from;
        copy[1] = sequence.blocks[sequence.cached_len / config_.block_size];
        copy[2] = sequence.cached_len % config_.block_size;
    }
    for (std::int32_t at = sequence.cached_len; at < sequence.length; ++at) {
        const BlockId block = sequence.blocks[at / config_.block_size];
        out.slot_mapping[plan.num_new_rows++] = block * config_.block_size + at % config_.block_size;
    }
}

}  // namespace speeder
