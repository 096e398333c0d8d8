#include "session_table.h"

#include <cassert>
#include <stdexcept>

#include "message.h"

namespace speeder {

SessionTable::SessionTable(std::int32_t max_sessions) : max_sessions_(max_sessions) {
    index_.reserve(max_sessions);
    records_.reserve(max_sessions);
    free_slots_.reserve(max_sessions);
}

SessionId SessionTable::find(std::string_view user) const noexcept {
    const auto found = index_.find(user);
    return found == index_.end() ? kNone : found->second;
}

SessionId SessionTable::create(std::string_view user) {
    if (free_record_ == kNone) {
        records_.emplace_back();
        free_record_ = static_cast<SessionId>(records_.size()) - 1;
    }
    const SessionId id = free_record_;
    const auto [entry, inserted] = index_.emplace(user, id);
    assert(inserted);
    Session& session = records_[id];
    free_record_ = session.older;
    session.older = kNone;
    session.user = &entry->first;
    return id;
}

void SessionTable::remove(SessionId id) noexcept {
    Session& session = records_[id];
    assert(session.blocks.empty());
    if (session.committed) unlink(session);
    if (session.slot != kNone) give_slot(session.slot);
    index_.erase(index_.find(*session.user));
    std::vector<std::int32_t> keys = std::move(session.keys);
    std::vector<BlockId> blocks = std::move(session.blocks);
    keys.clear();
    session = Session{.keys = std::move(keys), .blocks = std::move(blocks), .older = free_record_};
    free_record_ = id;
}

void SessionTable::touch(SessionId id) noexcept {
    Session& session = records_[id];
    if (session.committed) unlink(session);
    session.committed = true;
    ++num_committed_;
    session.older = newest_;
    session.newer = kNone;
    (newest_ == kNone ? oldest_ : records_[newest_].newer) = id;
    newest_ = id;
}

void SessionTable::unlink(Session& session) noexcept {
    (session.newer == kNone ? newest_ : records_[session.newer].older) = session.older;
    (session.older == kNone ? oldest_ : records_[session.older].newer) = session.newer;
    session.newer = session.older = kNone;
    session.committed = false;
    --num_committed_;
}

std::int32_t SessionTable::num_free_slots() const noexcept {
    return max_sessions_ - num_slots_seen_ + static_cast<std::int32_t>(free_slots_.size());
}

std::int32_t SessionTable::take_slot() noexcept {
    assert(num_free_slots() > 0);
    if (free_slots_.empty()) return num_slots_seen_++;
    const std::int32_t slot = free_slots_.back();
    free_slots_.pop_back();
    return slot;
}

void SessionTable::give_slot(std::int32_t slot) noexcept {
    assert(slot >= 0 && slot < num_slots_seen_);
    free_slots_.push_back(slot);
}

void SessionTable::check(const std::vector<std::int32_t>& slot_holders) const {
    check_index();
    check_order();
    std::vector<std::int32_t> holders = slot_holders;
    for (const std::int32_t slot : free_slots_) ++holders.at(slot);
    for (std::int32_t slot = 0; slot < max_sessions_; ++slot) {
        const std::int32_t expected = slot < num_slots_seen_ ? 1 : 0;
        if (holders[slot] != expected) {
            throw std::logic_error(message("slot ", slot, " is held or listed as free ", holders[slot], " times"));
        }
    }
}

void SessionTable::check_index() const {
    for (const auto& [user, id] : index_) {
        if (records_.at(id).user != &user) throw std::logic_error(message("index: '", user, "' has a foreign session"));
    }
    std::size_t num_free = 0;
    for (SessionId id = free_record_; id != kNone && num_free <= records_.size(); id = records_.at(id).older) {
        if (records_[id].user != nullptr) throw std::logic_error(message("session ", id, " is free and in use"));
        ++num_free;
    }
    if (num_free + index_.size() != records_.size()) {
        throw std::logic_error(message(index_.size(), " sessions and ", num_free, " free records, ", records_.size(),
                                       " in all"));
    }
}

void SessionTable::check_order() const {
    std::int32_t num_linked = 0;
    SessionId older = kNone;
    for (SessionId id = oldest_; id != kNone; older = id, id = records_[id].newer) {
        const Session& session = records_.at(id);
        if (!session.committed || session.older != older || ++num_linked > num_committed_) {
            throw std::logic_error(message("order of use is broken at session ", id));
        }
    }
    std::int32_t num_committed = 0;
    for (const auto& [user, id] : index_) num_committed += records_[id].committed;
    if (newest_ != older || num_linked != num_committed_ || num_committed != num_committed_) {
        throw std::logic_error(message("order of use holds ", num_linked, " sessions, ", num_committed,
                                       " are committed"));
    }
}

}  // namespace speeder
