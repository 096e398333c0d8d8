#include "row_layout.h"

#include <algorithm>
#include <numeric>

#include "message.h"

namespace speeder {
namespace {

enum Row : std::size_t { kItem, kSlot, kBucket, kPosition, kMapping, kSequence, kLocal, kVisible };
enum Read : std::size_t { kReadRow, kReadItem, kReadSequence, kReadLocal, kReadVisible };
enum User : std::size_t { kLastRead, kKeptSlot, kKeepSlot };
constexpr std::size_t kKeyWidth = 3, kKeyRow = 0, kKeyBucket = 2;

// How many of each a source fills.
struct Counts {
    std::size_t rows = 0, reads = 0;
};

Counts check_source(const RowSource& source) {
    const std::size_t users = source.cached_len.size();
    require(source.offsets.size() == users + 1 && source.session_slots.size() == users &&
                source.num_ranked.size() == users,
            "lay_out: offsets, session_slots and num_ranked must fit ", users, " sequences");
    require(source.offsets[0] == 0, "lay_out: offsets must begin with 0");
    Counts counts;
    std::size_t extended = 0, ranked = 0;
    for (std::size_t b = 0; b < users; ++b) {
        const std::int64_t length = std::int64_t{source.offsets[b + 1]} - source.offsets[b];
        require(length >= 0 && source.cached_len[b] >= 0 && source.cached_len[b] <= length && source.num_ranked[b] >= 0,
                "lay_out: sequence ", b, " has ", length, " positions, ", source.cached_len[b], " of them cached, and ",
                source.num_ranked[b], " candidates");
        const auto extend = static_cast<std::size_t>(length - source.cached_len[b]);
        extended += extend;
        ranked += static_cast<std::size_t>(source.num_ranked[b]);
        counts.reads += extend > 0;
    }
    require(static_cast<std::size_t>(source.offsets[users]) * kKeyWidth <= source.keys.size(),
            "lay_out: offsets lead beyond the keys");
    require(source.slot_mapping.size() == extended, "lay_out: slot_mapping has ", source.slot_mapping.size(),
            " entries for ", extended, " new rows");
    require(source.candidates.size() == ranked, "lay_out: ", source.candidates.size(), " candidates, ", ranked,
            " are counted");
    counts.rows = extended + ranked;
    counts.reads += ranked;
    return counts;
}

void check_target(const RowTarget& target, const Counts& counts, std::size_t users) {
    require(target.rows.width >= counts.rows && target.candidate.size() == target.rows.width, "lay_out: ", counts.rows,
            " rows, room for ", target.rows.width);
    require(target.reads.width >= counts.reads && target.read_candidate.size() == target.reads.width, "lay_out: ",
            counts.reads, " reads, room for ", target.reads.width);
    require(target.users.width >= users && target.is_new.size() == target.users.width, "lay_out: ", users,
            " sequences, room for ", target.users.width);
}

class Writer {
public:
    Writer(const RowConstants& constants, const RowTarget& target) : constants_(constants), to_(target) {}

    void history(std::int64_t item, std::int64_t bucket, std::int64_t slot, std::int64_t mapping) {
        put(item, bucket, slot, mapping, slot + 1, false);
    }
    void candidate(std::int64_t item, std::int64_t slot) {
        put(item, 0, slot, -1, slot, true);
        read();
    }
    // the row that was put last
    void read() {
        const std::size_t row = row_ - 1;
        to_.reads[kReadRow][read_] = static_cast<std::int64_t>(row);
        to_.reads[kReadItem][read_] = to_.rows[kItem][row];
        to_.reads[kReadSequence][read_] = user_;
        to_.reads[kReadLocal][read_] = to_.rows[kLocal][row];
        to_.reads[kReadVisible][read_] = to_.rows[kVisible][row];
        to_.read_candidate[read_] = to_.candidate[row];
        ++read_;
    }
    void end_sequence(std::int64_t first_read, bool is_new, bool is_empty, std::int64_t session_slot) {
        const auto user = static_cast<std::size_t>(user_);
        to_.users[kLastRead][user] = is_new ? first_read : 0;
        to_.users[kKeptSlot][user] = is_new || is_empty ? constants_.instruction_slot : session_slot;
        to_.users[kKeepSlot][user] = is_new && session_slot >= 0 ? session_slot : constants_.scratch_slot;
        to_.is_new[user] = is_new;
        ++user_;
        local_ = 0;
    }
    std::int64_t num_reads() const { return static_cast<std::int64_t>(read_); }

    void pad() {
        for (const Row field : {kItem, kSlot, kBucket, kPosition, kVisible}) fill(to_.rows[field], row_, 0);
        fill(to_.rows[kMapping], row_, -1);
        fill(to_.rows[kSequence], row_, constants_.nobody);
        count(to_.rows[kLocal], row_);
        for (const Read field : {kReadRow, kReadItem, kReadVisible}) fill(to_.reads[field], read_, 0);
        fill(to_.reads[kReadSequence], read_, constants_.nobody);
        count(to_.reads[kReadLocal], read_);
        const auto user = static_cast<std::size_t>(user_);
        fill(to_.users[kLastRead], user, 0);
        fill(to_.users[kKeptSlot], user, constants_.instruction_slot);
        fill(to_.users[kKeepSlot], user, constants_.scratch_slot);
        fill(to_.candidate, row_, 0);
        fill(to_.read_candidate, read_, 0);
        fill(to_.is_new, user, 0);
    }

private:
    void put(std::int64_t item, std::int64_t bucket, std::int64_t slot, std::int64_t mapping, std::int64_t visible,
             bool candidate) {
        to_.rows[kItem][row_] = item;
        to_.rows[kSlot][row_] = slot;
        to_.rows[kBucket][row_] = bucket;
        to_.rows[kPosition][row_] = slot + constants_.instruction_len;
        to_.rows[kMapping][row_] = mapping;
        to_.rows[kSequence][row_] = user_;
        to_.rows[kLocal][row_] = local_++;
        to_.rows[kVisible][row_] = visible;
        to_.candidate[row_] = candidate;
        ++row_;
    }
    template <typename T>
    static void fill(std::span<T> values, std::size_t from, std::int64_t value) {
        std::fill(values.begin() + static_cast<std::ptrdiff_t>(from), values.end(), static_cast<T>(value));
    }
    // no two rows of a sequence stand in one place
    static void count(std::span<std::int64_t> values, std::size_t from) {
        std::iota(values.begin() + static_cast<std::ptrdiff_t>(from), values.end(), 0);
    }

    const RowConstants& constants_;
    const RowTarget& to_;
    std::size_t row_ = 0, read_ = 0;
    std::int64_t user_ = 0, local_ = 0;
};

}  // namespace

void lay_out(const RowSource& source, const RowConstants& constants, const RowTarget& target) {
    const std::size_t users = source.cached_len.size();
    check_target(target, check_source(source), users);
    Writer writer(constants, target);
    std::size_t mapped = 0, named = 0;
    for (std::size_t b = 0; b < users; ++b) {
        const std::int64_t first_read = writer.num_reads();
        const std::int32_t start = source.offsets[b], cached = source.cached_len[b];
        const std::int32_t length = source.offsets[b + 1] - start;
        for (std::int32_t slot = cached; slot < length; ++slot) {
            const auto* key = &source.keys[static_cast<std::size_t>(start + slot) * kKeyWidth];
            writer.history(key[kKeyRow], key[kKeyBucket], slot, source.slot_mapping[mapped++]);
        }
        if (length > cached) writer.read();
        for (std::int32_t i = 0; i < source.num_ranked[b]; ++i) writer.candidate(source.candidates[named++], length);
        writer.end_sequence(first_read, length > cached, length == 0, source.session_slots[b]);
    }
    writer.pad();
}

}  // namespace speeder
