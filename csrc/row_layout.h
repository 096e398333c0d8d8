// Lays a step out: the rows that its plan leaves to compute, sequence after sequence, new history before candidates.
// Knows numbers and plain arrays; neither tensors nor Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace speeder {

// A matrix of fields that lie one behind the other, each `width` long.
struct Fields {
    std::span<std::int64_t> values;
    std::size_t width;
    std::span<std::int64_t> operator[](std::size_t field) const { return values.subspan(field * width, width); }
};

// What there is of B sequences: their windows' keys and what was planned.
struct RowSource {
    std::span<const std::int32_t> offsets;        // [B + 1] of the windows in `keys`
    std::span<const std::int32_t> keys;           // [n, 3] catalogue row, version, time bucket
    std::span<const std::int32_t> cached_len;     // [B]
    std::span<const std::int32_t> session_slots;  // [B] of h(last), -1 for none
    std::span<const std::int32_t> slot_mapping;   // [new history rows]
    std::span<const std::int32_t> num_ranked;     // [B] candidates that are rows
    std::span<const std::int32_t> candidates;     // [all of them] catalogue rows
};

struct RowConstants {
    std::int32_t instruction_len;   // positions
    std::int32_t instruction_slot;  // h(last) of an empty history
    std::int32_t scratch_slot;      // what nobody keeps
    std::int32_t nobody;            // the sequence of padding
};

inline constexpr std::size_t kRowFields = 8, kReadFields = 5, kUserFields = 3;

// Where it goes; what is not filled is padding, which stores nothing, sees the instruction alone and is read by nobody.
struct RowTarget {
    Fields rows;   // item_rows, slots, buckets, positions, slot_mapping, sequence, local, visible
    Fields reads;  // row, item, sequence, local, visible: candidates, and each sequence's last new history row
    Fields users;  // last_read, kept_slots, keep_slots
    std::span<std::uint8_t> candidate;       // [rows] its own key is folded in, and stored nowhere
    std::span<std::uint8_t> read_candidate;  // [reads]
    std::span<std::uint8_t> is_new;          // [users] h(last) is among the reads, at last_read; else at kept_slots
};

// Throws std::invalid_argument for a source that doesn't fit together or a target that is too small; then nothing is
// written.
void lay_out(const RowSource& source, const RowConstants& constants, const RowTarget& target);

}  // namespace speeder
