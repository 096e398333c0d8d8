// How a step's sessions take over, and how the budgets are kept: quota, number of sessions, device blocks.
// Nothing here allocates memory: `match` has reserved all of it.
#include "block_manager.h"

namespace speeder {

std::int32_t BlockManager::commit(std::int64_t step, std::span<std::int32_t> offloads) {
    const std::scoped_lock lock(mutex_);
    Step& open = find_step(step, false, "commit");
    for (Sequence& sequence : open.live()) take_over(sequence);
    // sessions that go for their number need not be moved first
    enforce_max_sessions();
    std::span<std::int32_t> rest = offloads;
    enforce_budget(step, rest);
    const auto num_offloads = static_cast<std::int32_t>((offloads.size() - rest.size()) / 2);
    open.size = 0;
    open.half_open = true;
    if (num_offloads == 0) put_to_rest(open);
    counters_.positions_reused += open.reused;
    counters_.copies += open.copies;
    counters_.restores += open.restores;
    ++counters_.steps_committed;
    return num_offloads;
}

void BlockManager::take_over(Sequence& sequence) noexcept {
    if (sequence.session != kNone) {
        Session& session = sessions_[sequence.session];
        const bool closing = session.tier == Tier::kClosing;
        sessions_.place(sequence.session, Tier::kNew);
        std::swap(session.blocks, sequence.blocks);
        std::swap(session.keys, sequence.keys);
        host_pool_.release_from(session.host_blocks, 0);
        if (session.slot != sequence.slot && session.slot != kNone) slots_.release(session.slot);
        session.slot = sequence.slot;
        session.length = sequence.length;
        session.step = 0;
        if (closing) {
            drop(sequence.session);
        } else {
            apply_quota(session);
            sessions_.place(sequence.session, Tier::kDevice);
        }
    }
    pool_.release_from(sequence.blocks, 0);
}

void BlockManager::apply_quota(Session& session) noexcept {
    const auto quota = static_cast<std::size_t>(config_.max_blocks_per_user);
    if (quota == 0 || session.blocks.size() <= quota) return;
    pool_.release_from(session.blocks, quota);
    session.length = config_.max_blocks_per_user * config_.block_size;
    session.keys.resize(static_cast<std::size_t>(session.length) * config_.key_width);
    if (session.slot != kNone) slots_.release(session.slot);
    session.slot = kNone;
    ++counters_.truncations;
}

void BlockManager::enforce_max_sessions() noexcept {
    while (sessions_.num_committed() > config_.max_sessions) {
        SessionId victim = kNone;
        for (const bool pinned : {false, true}) {
            for (const Tier tier : {Tier::kHost, Tier::kDevice}) {
                if (victim == kNone) victim = sessions_.oldest_idle(tier, pinned);
            }
        }
        evict(victim);
    }
}

void BlockManager::enforce_budget(std::int64_t step, std::span<std::int32_t>& offloads) noexcept {
    while (num_session_blocks() > config_.budget_blocks) {
        SessionId victim = sessions_.oldest_idle(Tier::kDevice, false);
        if (victim == kNone) victim = sessions_.oldest_idle(Tier::kDevice, true);
        if (!offload(victim, step, offloads)) evict(victim);
    }
}

// Starts the move of a session to the host tier. False, and nothing done, if there is no room or no row left for it.
bool BlockManager::offload(SessionId id, std::int64_t step, std::span<std::int32_t>& offloads) noexcept {
    const std::size_t num_blocks = sessions_[id].blocks.size();
    if (2 * num_blocks > offloads.size() || !make_host_room(static_cast<std::int64_t>(num_blocks))) return false;
    sessions_.place(id, Tier::kNew);
    Session& session = sessions_[id];
    for (std::size_t i = 0; i < num_blocks; ++i) {
        session.host_blocks.push_back(host_pool_.allocate());
        offloads[2 * i] = session.blocks[i];
        offloads[2 * i + 1] = session.host_blocks[i];
    }
    offloads = offloads.subspan(2 * num_blocks);
    session.step = step;
    sessions_.place(id, Tier::kMoving);
    return true;
}

// Drops the oldest unpinned idle sessions of the host tier until that many blocks are free there; none if all of them
// would not do.
bool BlockManager::make_host_room(std::int64_t num_blocks) noexcept {
    std::int64_t lacking = num_blocks - host_pool_.num_free();
    if (lacking > sessions_.num_blocks(Tier::kHost, false)) return false;
    for (SessionId id = sessions_.oldest(Tier::kHost, false); id != kNone && lacking > 0; id = sessions_[id].newer) {
        if (sessions_[id].step == 0) lacking -= static_cast<std::int64_t>(sessions_[id].host_blocks.size());
    }
    if (lacking > 0) return false;
    while (host_pool_.num_free() < num_blocks) evict(sessions_.oldest_idle(Tier::kHost, false));
    return true;
}

void BlockManager::finish(std::int64_t step, bool moved) {
    const std::scoped_lock lock(mutex_);
    Step& open = find_step(step, true, "finish");
    for (const bool pinned : {false, true}) finish_moves(Tier::kMoving, pinned, step, moved);
    finish_moves(Tier::kClosing, false, step, moved);
    put_to_rest(open);
}

void BlockManager::finish_moves(Tier tier, bool pinned, std::int64_t step, bool moved) noexcept {
    for (SessionId id = sessions_.oldest(tier, pinned), next = kNone; id != kNone; id = next) {
        Session& session = sessions_[id];
        next = session.newer;
        if (session.step != step) continue;
        session.step = 0;
        if (tier == Tier::kClosing) {
            drop(id);
        } else if (!moved) {
            evict(id);
        } else {
            counters_.offloads += static_cast<std::int64_t>(session.blocks.size());
            sessions_.place(id, Tier::kNew);
            pool_.release_from(session.blocks, 0);
            sessions_.place(id, Tier::kHost);
        }
    }
}

}  // namespace speeder
