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
    require(config.max_sessions >= 1, "max_sessions: must be at least 1, not ", config.max_sessions);
    const auto blocks = [&](std::int64_t length) { return (length + config.block_size - 1) / config.block_size; };
    const std::int64_t least = blocks(config.shared_len) + blocks(config.max_seq_len);
    require(config.num_blocks >= least, "num_blocks: ", config.num_blocks, " blocks of ", config.block_size,
            " positions can't hold an instruction of ", config.shared_len, " and one history of ", config.max_seq_len,
            "; at least ", least, " are needed");
    require(std::int64_t{config.num_blocks} * config.block_size <= INT32_MAX, "num_blocks: ", config.num_blocks,
            " blocks of ", config.block_size, " positions can't be numbered in int32");
    return config;
}

}  // namespace

BlockManager::BlockManager(const CacheConfig& config)
    : config_(checked(config)), pool_(config.num_blocks), sessions_(config.max_sessions) {
    for (std::int32_t i = 0; i < num_shared_blocks(); ++i) shared_blocks_.push_back(pool_.allocate());
}

BlockManager::Step& BlockManager::open_step(std::int64_t step, const char* what) {
    const auto found = std::find_if(steps_.begin(), steps_.end(), [=](const auto& open) { return open->id == step; });
    if (step > 0 && found != steps_.end()) return **found;
    const char* why = step > 0 && step < next_step_ ? " is already finished" : " was never planned";
    throw std::invalid_argument(message(what, ": step ", step, why));
}

void BlockManager::commit(std::int64_t step) {
    const std::scoped_lock lock(mutex_);
    Step& open = open_step(step, "commit");
    for (Sequence& sequence : open.live()) take_over(sequence);
    open.id = 0;
    open.size = 0;
    ++counters_.steps_committed;
}

void BlockManager::take_over(Sequence& sequence) noexcept {
    if (sequence.session != kNone) {
        Session& session = sessions_[sequence.session];
        std::swap(session.blocks, sequence.blocks);
        std::swap(session.keys, sequence.keys);
        if (session.slot != sequence.slot && session.slot != kNone) sessions_.give_slot(session.slot);
        session.slot = sequence.slot;
        session.length = sequence.length;
        session.has_last = true;
        session.step = 0;
        sessions_.touch(sequence.session);
        if (session.closing) drop(sequence.session);
    }
    pool_.release_from(sequence.blocks, 0);
}

void BlockManager::release(std::int64_t step) {
    const std::scoped_lock lock(mutex_);
    Step& open = open_step(step, "release");
    for (Sequence& sequence : open.live()) give_back(sequence);
    open.id = 0;
    open.size = 0;
    ++counters_.steps_released;
}

void BlockManager::give_back(Sequence& sequence) noexcept {
    pool_.release_from(sequence.blocks, 0);
    if (sequence.session == kNone) return;
    Session& session = sessions_[sequence.session];
    if (session.slot != sequence.slot) {
        sessions_.give_slot(sequence.slot);
    } else if (sequence.cached_len < sequence.length) {
        // the step may have written its own h(last) there
        session.has_last = false;
    }
    session.step = 0;
    if (session.closing || session.length == 0) drop(sequence.session);
}

void BlockManager::drop(SessionId session) noexcept {
    pool_.release_from(sessions_[session].blocks, 0);
    sessions_.remove(session);
}

void BlockManager::close_session(SessionId session) noexcept {
    if (sessions_[session].step == 0) {
        drop(session);
    } else {
        sessions_[session].closing = true;
    }
}

bool BlockManager::close(std::string_view user) {
    const std::scoped_lock lock(mutex_);
    const SessionId session = sessions_.find(user);
    if (session == kNone || sessions_[session].closing) return false;
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
    return session != kNone && sessions_[session].committed && !sessions_[session].closing;
}

CacheStats BlockManager::stats() const {
    const std::scoped_lock lock(mutex_);
    CacheStats stats = counters_;
    stats.num_blocks = pool_.num_blocks();
    stats.num_free_blocks = pool_.num_free();
    stats.num_sessions = sessions_.num_committed();
    for (const auto& step : steps_) {
        stats.num_open_steps += step->id != 0;
        for (const Sequence& sequence : step->live()) {
            if (sequence.session == kNone) continue;
            const Session& session = sessions_[sequence.session];
            stats.num_sessions -= session.committed && session.closing;
        }
    }
    return stats;
}

}  // namespace speeder
