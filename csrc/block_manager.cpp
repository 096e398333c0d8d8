#include "block_manager.h"

#include <algorithm>

#include "message.h"

namespace speeder {

namespace {

CacheConfig checked(const CacheConfig& config) {
    require(config.block_size >= 1, "block_size: must be at least 1, not ", config.block_size);
    require(config.shared_len >= 0, "shared_len: must be at least 0, not ", config.shared_len);
    require(config.max_seq_len >= 1, "max_seq_len: must be at least 1, not ", config.max_seq_len);
    require(config.key_width >= 1, "key_width: must be at least 1, not ", config.key_width);
    require(config.budget_blocks >= 0, "budget_blocks: must be at least 0, not ", config.budget_blocks);
    require(config.max_sessions >= 1, "max_sessions: must be at least 1, not ", config.max_sessions);
    require(config.num_slots >= 1, "num_slots: must be at least 1, not ", config.num_slots);
    require(config.max_blocks_per_user >= 0, "max_blocks_per_user: must be at least 0, not ",
            config.max_blocks_per_user);
    require(config.num_host_blocks >= 0, "num_host_blocks: must be at least 0, not ", config.num_host_blocks);
    const auto blocks = [&](std::int64_t length) { return (length + config.block_size - 1) / config.block_size; };
    const std::int64_t least = blocks(config.shared_len) + config.budget_blocks + blocks(config.max_seq_len);
    require(config.num_blocks >= least, "num_blocks: ", config.num_blocks, " blocks of ", config.block_size,
            " positions can't hold an instruction of ", config.shared_len, ", sessions of ", config.budget_blocks,
            " blocks and one history of ", config.max_seq_len, "; at least ", least, " are needed");
    require(std::int64_t{config.num_blocks} * config.block_size <= INT32_MAX, "num_blocks: ", config.num_blocks,
            " blocks of ", config.block_size, " positions can't be numbered in int32");
    return config;
}

}  // namespace

BlockManager::BlockManager(const CacheConfig& config)
    : config_(checked(config)),
      pool_(config.num_blocks, config.track_freed),
      host_pool_(config.num_host_blocks),
      slots_(config.num_slots),
      sessions_(config.max_sessions) {
    for (std::int32_t i = 0; i < num_shared_blocks(); ++i) shared_blocks_.push_back(pool_.allocate());
}

BlockManager::Step& BlockManager::find_step(std::int64_t step, bool half_open, const char* what) {
    const auto found = std::find_if(steps_.begin(), steps_.end(), [=](const auto& open) { return open->id == step; });
    const bool known = step > 0 && step < next_step_;
    if (known && found != steps_.end() && (*found)->half_open == half_open) return **found;
    const char* why = !known                 ? " was never planned"
                      : found == steps_.end() ? " is already finished"
                      : half_open             ? " is not committed yet"
                                              : " is already committed and waits for finish";
    throw std::invalid_argument(message(what, ": step ", step, why));
}

void BlockManager::put_to_rest(Step& step) noexcept {
    step.id = 0;
    step.half_open = false;
    step.size = 0;
}

void BlockManager::release(std::int64_t step) {
    const std::scoped_lock lock(mutex_);
    Step& open = find_step(step, false, "release");
    for (Sequence& sequence : open.live()) give_back(sequence);
    put_to_rest(open);
    ++counters_.steps_released;
}

void BlockManager::give_back(Sequence& sequence) noexcept {
    pool_.release_from(sequence.blocks, 0);
    if (sequence.session == kNone) return;
    Session& session = sessions_[sequence.session];
    if (session.slot != sequence.slot) slots_.release(sequence.slot);
    session.step = 0;
    if (!session.committed()) drop(sequence.session);
}

void BlockManager::drop(SessionId id) noexcept {
    sessions_.place(id, Tier::kNew);
    Session& session = sessions_[id];
    pool_.release_from(session.blocks, 0);
    host_pool_.release_from(session.host_blocks, 0);
    if (session.slot != kNone) slots_.release(session.slot);
    sessions_.remove(id);
}

void BlockManager::evict(SessionId session) noexcept {
    drop(session);
    ++counters_.evictions;
}

bool BlockManager::pin(std::string_view user, bool pinned) {
    const std::scoped_lock lock(mutex_);
    const SessionId id = sessions_.find(user);
    if (id == kNone || !sessions_[id].committed()) return false;
    if (sessions_[id].pinned == pinned) return true;
    std::int64_t num_blocks = num_blocks_for(sessions_[id].length);
    for (const Tier tier : kCommittedTiers) num_blocks += sessions_.num_blocks(tier, true);
    if (pinned && num_blocks > config_.budget_blocks) return false;
    sessions_.pin(id, pinned);
    return true;
}

std::vector<std::string> BlockManager::pinned() const {
    const std::scoped_lock lock(mutex_);
    std::vector<std::string> users;
    sessions_.for_each([&](SessionId session) {
        if (sessions_[session].pinned) users.push_back(*sessions_[session].user);
    });
    return users;
}

void BlockManager::close_session(SessionId id) noexcept {
    if (sessions_[id].step == 0) {
        drop(id);
    } else {
        sessions_.pin(id, false);
        sessions_.place(id, Tier::kClosing);
    }
}

bool BlockManager::close(std::string_view user) {
    const std::scoped_lock lock(mutex_);
    const SessionId session = sessions_.find(user);
    if (session == kNone || sessions_[session].tier == Tier::kClosing) return false;
    close_session(session);
    return true;
}

void BlockManager::clear() {
    const std::scoped_lock lock(mutex_);
    sessions_.for_each([this](SessionId session) { close_session(session); });
}

bool BlockManager::contains(std::string_view user) const {
    const std::scoped_lock lock(mutex_);
    const SessionId session = sessions_.find(user);
    return session != kNone && sessions_[session].committed();
}

std::vector<BlockId> BlockManager::take_freed() {
    const std::scoped_lock lock(mutex_);
    return pool_.take_freed();
}

std::int64_t BlockManager::open_step() const {
    const std::scoped_lock lock(mutex_);
    std::int64_t newest = 0;
    for (const auto& step : steps_) newest = std::max(newest, step->id);
    return newest;
}

CacheStats BlockManager::stats() const {
    const std::scoped_lock lock(mutex_);
    CacheStats stats = counters_;
    stats.num_blocks = pool_.num_blocks();
    stats.num_free_blocks = pool_.num_free();
    stats.num_sessions = sessions_.num_committed();
    stats.num_host_sessions = sessions_.num_sessions(Tier::kHost) + sessions_.num_sessions(Tier::kMoving);
    stats.num_pinned = sessions_.num_pinned();
    for (const auto& step : steps_) stats.num_open_steps += step->id != 0;
    stats.session_blocks = num_session_blocks();
    stats.host_blocks_used = host_pool_.num_blocks() - host_pool_.num_free();
    stats.num_host_blocks = host_pool_.num_blocks();
    return stats;
}

}  // namespace speeder
