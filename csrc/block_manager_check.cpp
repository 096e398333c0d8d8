// What `plan` refuses, and what the manager can prove about itself.
#include <algorithm>

#include "block_manager.h"
#include "message.h"

namespace speeder {

void BlockManager::check_arguments(const PlanRequest& request, const PlanBuffers& out) const {
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
    require(out.cached_len.size() >= batch, "cached_len: has ", out.cached_len.size(), " entries for ", batch,
            " users");
    require(out.session_slots.size() >= batch, "session_slots: has ", out.session_slots.size(), " entries for ", batch,
            " users");
    require(out.table_width >= static_cast<std::size_t>(max_blocks_per_seq()), "block_tables: has ", out.table_width,
            " columns, the longest history has ", max_blocks_per_seq(), " blocks");
    require(out.block_tables.size() >= batch * out.table_width, "block_tables: has ",
            out.block_tables.size() / out.table_width, " rows for ", batch, " users");
    require(out.copies.size() >= 3 * batch, "copies: has ", out.copies.size() / 3, " rows for ", batch, " users");
}

void BlockManager::check_integrity() const {
    const std::scoped_lock lock(mutex_);
    std::vector<std::int32_t> refs(config_.num_blocks);
    std::vector<std::int32_t> slots(config_.max_sessions);
    for (const BlockId block : shared_blocks_) ++refs.at(block);
    sessions_.for_each([&](SessionId session) { count_session(session, refs, slots); });
    for (const auto& step : steps_) count_step(*step, refs, slots);
    pool_.check(refs);
    sessions_.check(slots);
}

void BlockManager::count_session(SessionId id, std::vector<std::int32_t>& refs,
                                 std::vector<std::int32_t>& slots) const {
    const Session& session = sessions_[id];
    for (const BlockId block : session.blocks) {
        if (++refs.at(block) > 1) throw std::logic_error(message("block ", block, " is in two sessions or shared"));
    }
    if (session.slot != kNone) ++slots.at(session.slot);
    const auto num_keys = static_cast<std::size_t>(session.length) * config_.key_width;
    if (session.keys.size() != num_keys || session.blocks.size() != std::size_t(num_blocks_for(session.length))) {
        throw std::logic_error(message("session '", *session.user, "' of ", session.length, " positions has ",
                                       session.keys.size(), " keys and ", session.blocks.size(), " blocks"));
    }
    const auto writes = [&](const Sequence& sequence) { return sequence.session == id; };
    std::ptrdiff_t num_writers = 0;
    for (const auto& step : steps_) {
        const auto here = std::ranges::count_if(step->live(), writes);
        if (here > 0 && session.step != step->id) num_writers = -1;
        num_writers += here;
    }
    const bool at_rest = session.committed && session.length > 0 && session.slot != kNone && !session.closing;
    if (num_writers != (session.step != 0) || (session.step == 0 && !at_rest)) {
        throw std::logic_error(message("session '", *session.user, "' is not what its ", num_writers, " writers left"));
    }
}

void BlockManager::count_step(const Step& step, std::vector<std::int32_t>& refs,
                              std::vector<std::int32_t>& slots) const {
    if ((step.id == 0 && step.size != 0) || step.id < 0 || step.id >= next_step_) {
        throw std::logic_error(message("step ", step.id, " of ", step.size, " sequences can't be"));
    }
    for (const Sequence& sequence : step.live()) {
        const Session none;
        const Session& session = sequence.session == kNone ? none : sessions_[sequence.session];
        if (sequence.blocks.size() != std::size_t(num_blocks_for(sequence.length))) {
            throw std::logic_error(message("step ", step.id, ": ", sequence.length, " positions in ",
                                           sequence.blocks.size(), " blocks"));
        }
        const auto num_kept = static_cast<std::size_t>(num_kept_blocks(sequence));
        for (std::size_t i = 0; i < sequence.blocks.size(); ++i) {
            const bool kept = i < num_kept && sequence.blocks[i] == session.blocks.at(i);
            const std::int32_t holders = ++refs.at(sequence.blocks[i]);
            if (holders != (kept ? 2 : 1)) {
                throw std::logic_error(message("step ", step.id, ": block ", sequence.blocks[i], " has ", holders,
                                               " holders"));
            }
        }
        if (sequence.slot != kNone && sequence.slot != session.slot) ++slots.at(sequence.slot);
    }
}

}  // namespace speeder
