// What `plan` refuses, and what the manager can prove about itself.
#include <algorithm>

#include "block_manager.h"
#include "message.h"

namespace speeder {

void BlockManager::check_request(const PlanRequest& request) const {
    const std::size_t batch = request.users.size();
    require(request.offsets.size() > batch, "offsets: has ", request.offsets.size(), " entries, ", batch,
            " users need ", batch + 1);
    require(request.offsets[0] == 0, "offsets: must start at 0, not ", request.offsets[0]);
    for (std::size_t i = 0; i < batch; ++i) {
        const std::int64_t length = std::int64_t{request.offsets[i + 1]} - request.offsets[i];
        require(length >= 0, "offsets: falls from ", request.offsets[i], " to ", request.offsets[i + 1], " at user ",
                i);
        require(length <= config_.max_seq_len, "offsets: user ", i, " has ", length, " positions, max_seq_len is ",
                config_.max_seq_len);
    }
    const std::size_t num_keys = request.keys.size() / config_.key_width;
    require(static_cast<std::size_t>(request.offsets[batch]) <= num_keys, "keys: has ", num_keys,
            " rows, offsets end at ", request.offsets[batch]);
}

void BlockManager::check_buffers(std::size_t batch, const PlanBuffers& out) const {
    require(out.cached_len.size() >= batch, "cached_len: has ", out.cached_len.size(), " entries for ", batch,
            " users");
    require(out.session_slots.size() >= batch, "session_slots: has ", out.session_slots.size(), " entries for ", batch,
            " users");
    require(out.table_width >= static_cast<std::size_t>(max_blocks_per_seq()), "block_tables: has ", out.table_width,
            " columns, the longest history has ", max_blocks_per_seq(), " blocks");
    require(out.block_tables.size() >= batch * out.table_width, "block_tables: has ",
            out.block_tables.size() / out.table_width, " rows for ", batch, " users");
    require(out.copies.size() >= 3 * batch, "copies: has ", out.copies.size() / 3, " rows for ", batch, " users");
    const std::size_t num_restores = batch * max_blocks_per_seq();
    require(out.restores.size() >= 2 * num_restores, "restores: has ", out.restores.size() / 2, " rows, ", batch,
            " users of up to ", max_blocks_per_seq(), " blocks need ", num_restores);
}

void BlockManager::check_integrity() const {
    const std::scoped_lock lock(mutex_);
    Holders held{std::vector<std::int32_t>(config_.num_blocks), std::vector<std::int32_t>(config_.num_host_blocks),
                 std::vector<std::int32_t>(config_.num_slots)};
    for (const BlockId block : shared_blocks_) ++held.blocks.at(block);
    sessions_.for_each([&](SessionId session) { count_session(session, held); });
    for (const auto& step : steps_) count_step(*step, held);
    pool_.check(held.blocks, "block");
    host_pool_.check(held.host_blocks, "host block");
    slots_.check(held.slots, "slot");
    sessions_.check();
    check_budgets();
}

void BlockManager::check_budgets() const {
    if (num_session_blocks() > config_.budget_blocks || sessions_.num_committed() > config_.max_sessions) {
        throw std::logic_error(message(sessions_.num_committed(), " sessions of ", num_session_blocks(),
                                       " blocks exceed max_sessions or budget_blocks"));
    }
}

void BlockManager::count_session(SessionId id, Holders& held) const {
    const Session& session = sessions_[id];
    for (const BlockId block : session.blocks) {
        if (++held.blocks.at(block) > 1) {
            throw std::logic_error(message("block ", block, " is in two sessions or shared"));
        }
    }
    for (const BlockId block : session.host_blocks) ++held.host_blocks.at(block);
    if (session.slot != kNone) ++held.slots.at(session.slot);
    if (session.keys.size() != static_cast<std::size_t>(session.length) * config_.key_width) {
        throw std::logic_error(message("session '", *session.user, "' of ", session.length, " positions has ",
                                       session.keys.size(), " keys"));
    }
    check_tier(session);
    check_writer(id);
}

void BlockManager::check_tier(const Session& session) const {
    const auto num_blocks = static_cast<std::size_t>(num_blocks_for(session.length));
    const bool on_device = session.blocks.size() == num_blocks && num_blocks > 0;
    const bool on_host = session.host_blocks.size() == num_blocks && num_blocks > 0;
    const bool nowhere = session.blocks.empty() && session.host_blocks.empty();
    bool holds = false;
    if (session.tier == Tier::kNew) holds = nowhere && num_blocks == 0 && session.slot == kNone;
    if (session.tier == Tier::kDevice) holds = on_device && session.host_blocks.empty();
    if (session.tier == Tier::kHost) holds = on_host && session.blocks.empty();
    if (session.tier == Tier::kMoving) holds = on_device && on_host;
    if (session.tier == Tier::kClosing) holds = on_device || on_host || (nowhere && num_blocks == 0);
    const bool may_be_idle = session.tier == Tier::kDevice || session.tier == Tier::kHost;
    const auto quota = static_cast<std::size_t>(config_.max_blocks_per_user);
    if (!holds || (session.step == 0 && !may_be_idle) || (quota > 0 && num_blocks > quota) ||
        (session.pinned && !session.committed())) {
        throw std::logic_error(message("session '", *session.user, "' of ", session.length, " positions has ",
                                       session.blocks.size(), " blocks and ", session.host_blocks.size(),
                                       " host blocks in tier ", static_cast<int>(session.tier)));
    }
}

// A session belongs to no step, to one sequence of an open step, or, moving, to a half-open step.
void BlockManager::check_writer(SessionId id) const {
    const Session& session = sessions_[id];
    const bool moves = !session.blocks.empty() && !session.host_blocks.empty();
    std::int32_t num_steps = 0;
    bool holds = true;
    for (const auto& step : steps_) {
        const auto writes = [&](const Sequence& sequence) { return sequence.session == id; };
        const auto num_writers = std::ranges::count_if(step->live(), writes);
        const bool here = step->id != 0 && step->id == session.step;
        num_steps += here;
        holds = holds && num_writers == (here && !moves) && !(here && step->half_open != moves);
    }
    if (!holds || num_steps != (session.step != 0)) {
        throw std::logic_error(message("session '", *session.user, "' is not where step ", session.step, " left it"));
    }
}

void BlockManager::count_step(const Step& step, Holders& held) const {
    if ((step.id == 0 && step.half_open) || ((step.id == 0 || step.half_open) && step.size != 0) || step.id < 0 ||
        step.id >= next_step_) {
        throw std::logic_error(message("step ", step.id, " of ", step.size, " sequences can't be"));
    }
    for (const Sequence& sequence : step.live()) {
        const Session none;
        const Session& session = sequence.session == kNone ? none : sessions_[sequence.session];
        if (sequence.blocks.size() != static_cast<std::size_t>(num_blocks_for(sequence.length))) {
            throw std::logic_error(message("step ", step.id, ": ", sequence.length, " positions in ",
                                           sequence.blocks.size(), " blocks"));
        }
        const auto num_kept = static_cast<std::size_t>(num_kept_blocks(sequence));
        for (std::size_t i = 0; i < sequence.blocks.size(); ++i) {
            const bool kept = i < num_kept && sequence.blocks[i] == session.blocks.at(i);
            const std::int32_t holders = ++held.blocks.at(sequence.blocks[i]);
            if (holders != (kept ? 2 : 1)) {
                throw std::logic_error(message("step ", step.id, ": block ", sequence.blocks[i], " has ", holders,
                                               " holders"));
            }
        }
        const bool own = sequence.slot != session.slot;
        if (own != (sequence.session != kNone && sequence.cached_len < sequence.length)) {
            throw std::logic_error(message("step ", step.id, ": slot ", sequence.slot, " is not what it writes"));
        }
        if (own) ++held.slots.at(sequence.slot);
    }
}

}  // namespace speeder
