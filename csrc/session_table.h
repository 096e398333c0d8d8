// Sessions by user: what each has cached and where, each tier in order of last use.
// Knows block ids and slots as numbers only; who counts their references is the caller's business.
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

enum class Tier : std::uint8_t {
    kNew,      // made by an open step, in no one's reach yet; the only tier in which blocks may change
    kDevice,   // in device blocks
    kHost,     // in host blocks
    kMoving,   // in device blocks that are being copied to its host blocks: locked
    kClosing,  // forgotten by its user; goes when its step ends
};
inline constexpr int kNumTiers = 5;
inline constexpr Tier kCommittedTiers[] = {Tier::kDevice, Tier::kHost, Tier::kMoving};

struct Session {
    const std::string* user = nullptr;
    std::vector<std::int32_t> keys;    // [length * key_width], compared with every request
    std::vector<BlockId> blocks;       // on the device
    std::vector<BlockId> host_blocks;  // on the host
    std::int32_t length = 0;           // positions
    std::int32_t slot = kNone;         // where h(last) of `keys` is stored, kNone: nowhere
    Tier tier = Tier::kNew;
    bool pinned = false;
    std::int64_t step = 0;  // the open step that writes or moves it, 0: idle
    SessionId newer = kNone;
    SessionId older = kNone;

    bool committed() const noexcept { return tier != Tier::kNew && tier != Tier::kClosing; }
};

class SessionTable {
public:
    explicit SessionTable(std::int32_t max_sessions);

    Session& operator[](SessionId id) noexcept { return records_[id]; }
    const Session& operator[](SessionId id) const noexcept { return records_[id]; }

    // kNone if the user has none. `create` expects that; its session is in tier kNew.
    SessionId find(std::string_view user) const noexcept;
    SessionId create(std::string_view user);
    // Forgets a session of tier kNew; its blocks and slot have been released by the caller.
    void remove(SessionId id) noexcept;

    // Puts a session at the young end of a tier.
    void place(SessionId id, Tier tier) noexcept;
    // Puts a session at the young end of its tier's pinned or unpinned sessions.
    void pin(SessionId id, bool pinned) noexcept;

    // The ends of a tier's order of use; go on with `newer`.
    SessionId oldest(Tier tier, bool pinned) const noexcept { return order(tier, pinned).oldest; }
    SessionId oldest_idle(Tier tier, bool pinned) const noexcept;

    std::int32_t num_sessions(Tier tier) const noexcept;
    std::int32_t num_committed() const noexcept;
    std::int32_t num_pinned() const noexcept;
    std::int64_t num_blocks(Tier tier, bool pinned) const noexcept { return order(tier, pinned).num_blocks; }

    // Calls visit(id) for every session of all tiers; it may remove that session.
    template <typename Visit>
    void for_each(Visit&& visit) const {
        for (auto entry = index_.begin(); entry != index_.end();) visit(entry++->second);
    }

    // Throws std::logic_error unless index, records and orders of use agree.
    void check() const;

private:
    struct Hash : std::hash<std::string_view> {
        using is_transparent = void;
    };
    struct Order {
        SessionId newest = kNone;
        SessionId oldest = kNone;
        std::int32_t num_sessions = 0;
        std::int64_t num_blocks = 0;
    };

    Order& order(Tier tier, bool pinned) noexcept { return orders_[static_cast<int>(tier)][pinned]; }
    const Order& order(Tier tier, bool pinned) const noexcept { return orders_[static_cast<int>(tier)][pinned]; }
    void link(SessionId id) noexcept;
    void unlink(SessionId id) noexcept;
    void check_index() const;
    void check_order(Tier tier, bool pinned) const;

    std::unordered_map<std::string, SessionId, Hash, std::equal_to<>> index_;
    std::vector<Session> records_;
    SessionId free_record_ = kNone;  // a chain through `older`
    Order orders_[kNumTiers][2];     // by tier and pinned; kNew has none
};

}  // namespace speeder
