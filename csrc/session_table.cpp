#include "session_table.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>

#include "message.h"

namespace speeder {

namespace {

std::int64_t size_in_blocks(const Session& session) noexcept {
    return static_cast<std::int64_t>(std::max(session.blocks.size(), session.host_blocks.size()));
}

}  // namespace

SessionTable::SessionTable(std::int32_t max_sessions) {
    index_.reserve(max_sessions);
    records_.reserve(max_sessions);
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
    assert(session.tier == Tier::kNew && session.blocks.empty() && session.host_blocks.empty());
    index_.erase(index_.find(*session.user));
    // the vectors keep their memory for the next session
    std::vector<std::int32_t> keys = std::move(session.keys);
    std::vector<BlockId> blocks = std::move(session.blocks);
    std::vector<BlockId> host_blocks = std::move(session.host_blocks);
    keys.clear();
    session = Session{.keys = std::move(keys),
                      .blocks = std::move(blocks),
                      .host_blocks = std::move(host_blocks),
                      .older = free_record_};
    free_record_ = id;
}

void SessionTable::place(SessionId id, Tier tier) noexcept {
    unlink(id);
    records_[id].tier = tier;
    link(id);
}

void SessionTable::pin(SessionId id, bool pinned) noexcept {
    unlink(id);
    records_[id].pinned = pinned;
    link(id);
}

void SessionTable::link(SessionId id) noexcept {
    Session& session = records_[id];
    if (session.tier == Tier::kNew) return;
    Order& order = this->order(session.tier, session.pinned);
    session.older = order.newest;
    (order.newest == kNone ? order.oldest : records_[order.newest].newer) = id;
    order.newest = id;
    ++order.num_sessions;
    order.num_blocks += size_in_blocks(session);
}

void SessionTable::unlink(SessionId id) noexcept {
    Session& session = records_[id];
    if (session.tier == Tier::kNew) return;
    Order& order = this->order(session.tier, session.pinned);
    (session.newer == kNone ? order.newest : records_[session.newer].older) = session.older;
    (session.older == kNone ? order.oldest : records_[session.older].newer) = session.newer;
    session.newer = session.older = kNone;
    --order.num_sessions;
    order.num_blocks -= size_in_blocks(session);
}

SessionId SessionTable::oldest_idle(Tier tier, bool pinned) const noexcept {
    SessionId id = order(tier, pinned).oldest;
    while (id != kNone && records_[id].step != 0) id = records_[id].newer;
    return id;
}

std::int32_t SessionTable::num_sessions(Tier tier) const noexcept {
    return order(tier, false).num_sessions + order(tier, true).num_sessions;
}

std::int32_t SessionTable::num_committed() const noexcept {
    std::int32_t sum = 0;
    for (const Tier tier : kCommittedTiers) sum += num_sessions(tier);
    return sum;
}

std::int32_t SessionTable::num_pinned() const noexcept {
    std::int32_t sum = 0;
    for (const Tier tier : kCommittedTiers) sum += order(tier, true).num_sessions;
    return sum;
}

void SessionTable::check() const {
    check_index();
    for (int tier = static_cast<int>(Tier::kDevice); tier < kNumTiers; ++tier) {
        for (const bool pinned : {false, true}) check_order(static_cast<Tier>(tier), pinned);
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

void SessionTable::check_order(Tier tier, bool pinned) const {
    const Order& order = this->order(tier, pinned);
    Order linked;
    for (SessionId id = order.oldest; id != kNone; linked.newest = id, id = records_[id].newer) {
        const Session& session = records_.at(id);
        if (session.tier != tier || session.pinned != pinned || session.older != linked.newest ||
            ++linked.num_sessions > order.num_sessions) {
            throw std::logic_error(message("order of use is broken at session ", id));
        }
        linked.num_blocks += size_in_blocks(session);
    }
    std::int32_t num_here = 0;
    for (const auto& [user, id] : index_) num_here += records_[id].tier == tier && records_[id].pinned == pinned;
    if (order.newest != linked.newest || linked.num_sessions != order.num_sessions ||
        num_here != order.num_sessions || linked.num_blocks != order.num_blocks) {
        throw std::logic_error(message("order of use counts ", order.num_sessions, " sessions of ", order.num_blocks,
                                       " blocks, holds ", linked.num_sessions, " of ", linked.num_blocks, ", ",
                                       num_here, " belong there"));
    }
}

}  // namespace speeder
