// Sessions by user: what each has cached, in order of last use, and the slots of their last hidden states.
// Knows block ids as numbers only; who counts their references is the caller's business.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "block_pool.h"

namespace speeder {

using SessionId = std::int32_t;

struct Session {
    const std::string* user = nullptr;
    std::vector<std::int32_t> keys;  // [length * key_width], compared with every request
    std::vector<BlockId> blocks;     // [ceil(length / block_size)]
    std::int32_t length = 0;         // positions
    std::int32_t slot = kNone;       // where h(last) is stored
    bool has_last = false;           // h(last) belongs to `keys`
    bool committed = false;          // false: made by an open step, in no one's reach yet
    bool closing = false;            // goes when its open step ends
    std::int64_t step = 0;           // the open step that writes it, 0: idle
    SessionId newer = kNone;
    SessionId older = kNone;
};

class SessionTable {
public:
    explicit SessionTable(std::int32_t max_sessions);

    Session& operator[](SessionId id) noexcept { return records_[id]; }
    const Session& operator[](SessionId id) const noexcept { return records_[id]; }

    // kNone if the user has none. `create` expects that; both count sessions that are not committed yet.
    SessionId find(std::string_view user) const noexcept;
    SessionId create(std::string_view user);
    // Forgets the session and frees its slot; its blocks have been released by the caller.
    void remove(SessionId id) noexcept;

    // Puts a session at the young end of the order of use; from then on it counts as committed.
    void touch(SessionId id) noexcept;
    SessionId oldest() const noexcept { return oldest_; }
    std::int32_t num_committed() const noexcept { return num_committed_; }

    std::int32_t num_free_slots() const noexcept;
    // The caller has made sure that a slot is free.
    std::int32_t take_slot() noexcept;
    void give_slot(std::int32_t slot) noexcept;

    // Calls visit(id) for every session, committed or not; it may remove that session.
    template <typename Visit>
    void for_each(Visit&& visit) const {
        for (auto entry = index_.begin(); entry != index_.end();) visit(entry++->second);
    }

    // Throws std::logic_error unless index, records, order of use and free slots agree.
    // slot_holders [max_sessions] counts who holds each slot: sessions and open steps.
    void check(const std::vector<std::int32_t>& slot_holders) const;

private:
    struct Hash : std::hash<std::string_view> {
        using is_transparent = void;
    };

    void unlink(Session& session) noexcept;
    void check_index() const;
    void check_order() const;

    std::int32_t max_sessions_;
    std::unordered_map<std::string, SessionId, Hash, std::equal_to<>> index_;
    std::vector<Session> records_;
    SessionId free_record_ = kNone;  // a chain through `older`
    SessionId newest_ = kNone;
    SessionId oldest_ = kNone;
    std::int32_t num_committed_ = 0;
    std::int32_t num_slots_seen_ = 0;
    std::vector<std::int32_t> free_slots_;  // of those below num_slots_seen_
};

}  // namespace speeder
