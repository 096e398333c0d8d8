// Random steps laid out into arrays of just their size, and into larger ones, for the sanitizers:
//     g++ -std=c++20 -g -O1 -fsanitize=address,undefined -Icsrc tests/native/row_stress.cpp csrc/row_layout.cpp -o stress
//     ./stress STEPS
// Every row must stand where its sequence's own count puts it, every read must repeat its row, padding must be padding;
// a source that doesn't fit together, or a target that is too small, must be refused with the target as it was.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "row_layout.h"

namespace {

using namespace speeder;
using Ints = std::vector<std::int32_t>;
using Longs = std::vector<std::int64_t>;
using Flags = std::vector<std::uint8_t>;

constexpr RowConstants kConstants{.instruction_len = 30, .instruction_slot = 91, .scratch_slot = 92, .nobody = 77};
constexpr std::int64_t kUntouched = -12345;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "row stress: %s\n", what);
    std::abort();
}

struct Step {
    Ints offsets{0}, keys, cached_len, session_slots, slot_mapping, num_ranked, candidates;
    std::size_t num_reads = 0;

    explicit Step(std::minstd_rand& draw) {
        const std::size_t users = draw() % 5;
        for (std::size_t b = 0; b < users; ++b) {
            const std::int32_t length = static_cast<std::int32_t>(draw() % 6);
            const std::int32_t cached = static_cast<std::int32_t>(draw() % static_cast<std::uint32_t>(length + 1));
            const std::int32_t ranked = draw() % 2 ? static_cast<std::int32_t>(draw() % 4) : 0;
            for (std::int32_t i = 0; i < 3 * length; ++i) keys.push_back(static_cast<std::int32_t>(draw() % 1000));
            for (std::int32_t i = cached; i < length; ++i) slot_mapping.push_back(static_cast<std::int32_t>(draw() % 500));
            for (std::int32_t i = 0; i < ranked; ++i) candidates.push_back(static_cast<std::int32_t>(draw() % 1000));
            offsets.push_back(offsets.back() + length);
            cached_len.push_back(cached);
            session_slots.push_back(static_cast<std::int32_t>(draw() % 9) - 1);
            num_ranked.push_back(ranked);
            num_reads += static_cast<std::size_t>(ranked) + (length > cached);
        }
    }
    std::size_t num_users() const { return cached_len.size(); }
    std::size_t num_rows() const { return slot_mapping.size() + candidates.size(); }
    RowSource source() const {
        return {offsets, keys, cached_len, session_slots, slot_mapping, num_ranked, candidates};
    }
};

struct Arrays {
    std::size_t num_rows, num_reads, num_users;
    Longs rows, reads, users;
    Flags candidate, read_candidate, is_new;

    Arrays(std::size_t rows_wide, std::size_t reads_wide, std::size_t users_wide)
        : num_rows(rows_wide), num_reads(reads_wide), num_users(users_wide), rows(kRowFields * rows_wide, kUntouched),
          reads(kReadFields * reads_wide, kUntouched), users(kUserFields * users_wide, kUntouched),
          candidate(rows_wide, 2), read_candidate(reads_wide, 2), is_new(users_wide, 2) {}
    RowTarget target() {
        return {{rows, num_rows}, {reads, num_reads}, {users, num_users}, candidate, read_candidate, is_new};
    }
    bool untouched() const {
        const auto all = [](const auto& values, auto value) {
            for (const auto each : values)
                if (each != value) return false;
            return true;
        };
        return all(rows, kUntouched) && all(reads, kUntouched) && all(users, kUntouched) && all(candidate, 2) &&
               all(read_candidate, 2) && all(is_new, 2);
    }
};

bool is_refused(const RowSource& source, Arrays& arrays) {
    try {
        lay_out(source, kConstants, arrays.target());
    } catch (const std::invalid_argument&) {
        expect(arrays.untouched(), "something was written before it was refused");
        return true;
    }
    return false;
}

void check(const Step& step, Arrays& arrays) {
    expect(!is_refused(step.source(), arrays), "a good step was refused");
    const RowTarget found = arrays.target();
    const auto [item, slot, position, mapping] =
        std::tuple(found.rows[0], found.rows[1], found.rows[3], found.rows[4]);
    const auto sequence = found.rows[5], local = found.rows[6], visible = found.rows[7];
    std::size_t row = 0, read = 0, mapped = 0, named = 0;
    for (std::size_t b = 0; b < step.num_users(); ++b) {
        const std::int64_t start = step.offsets[b], length = step.offsets[b + 1] - start, cached = step.cached_len[b];
        const std::int64_t last_read = static_cast<std::int64_t>(read), extend = length - cached;
        for (std::int64_t i = 0; i < extend + step.num_ranked[b]; ++i, ++row) {
            const bool ranked = i >= extend;
            const auto at = ranked ? length : cached + i;
            const auto expected = ranked ? step.candidates[named++] : step.keys[static_cast<std::size_t>(start + at) * 3];
            expect(item[row] == expected && slot[row] == at && position[row] == at + 30, "a row is another");
            expect(mapping[row] == (ranked ? -1 : step.slot_mapping[mapped++]), "keys go elsewhere");
            expect(sequence[row] == static_cast<std::int64_t>(b) && local[row] == i, "a row stands elsewhere");
            expect(visible[row] == at + !ranked && found.candidate[row] == ranked, "a row sees something else");
            if (!ranked && i != extend - 1) continue;
            expect(found.reads[0][read] == static_cast<std::int64_t>(row) && found.reads[1][read] == item[row] &&
                       found.reads[2][read] == sequence[row] && found.reads[3][read] == i &&
                       found.reads[4][read] == visible[row] && found.read_candidate[read] == ranked,
                   "a read is no row");
            ++read;
        }
        const std::int64_t slot_of = step.session_slots[b];
        expect(found.is_new[b] == (extend > 0) && found.users[0][b] == (extend > 0 ? last_read : 0), "h(last) is lost");
        expect(found.users[1][b] == (extend > 0 || length == 0 ? 91 : slot_of), "h(last) is found elsewhere");
        expect(found.users[2][b] == (extend > 0 && slot_of >= 0 ? slot_of : 92), "h(last) is kept elsewhere");
    }
    for (std::int64_t at = 0; row < arrays.num_rows; ++row, ++at) {
        expect(mapping[row] == -1 && sequence[row] == 77 && local[row] == at && visible[row] == 0, "padding is a row");
    }
    for (; read < arrays.num_reads; ++read) expect(found.reads[2][read] == 77, "padding is read");
    for (std::size_t b = step.num_users(); b < arrays.num_users; ++b) {
        expect(found.users[1][b] == 91 && found.users[2][b] == 92 && found.is_new[b] == 0, "padding is a user");
    }
}

// One number of a good step is changed.
bool breaks(Step step, std::minstd_rand& draw) {
    if (step.num_users() == 0) return true;
    const std::size_t b = draw() % step.num_users();
    switch (draw() % 5) {
        case 0: step.cached_len[b] = step.offsets[b + 1] - step.offsets[b] + 1; break;
        case 1: step.cached_len[b] = -1; break;
        case 2: step.num_ranked[b] += 1; break;
        case 3: step.slot_mapping.push_back(0); break;
        default: step.keys.resize(static_cast<std::size_t>(step.offsets.back()) * 3); step.offsets.back() += 1; break;
    }
    Arrays arrays(step.num_rows() + 2, step.num_reads + 2, step.num_users());
    return is_refused(step.source(), arrays);
}

}  // namespace

int main(int argc, char** argv) {
    const long steps = argc > 1 ? std::atol(argv[1]) : 100'000;
    std::minstd_rand draw(1);
    long rows = 0;
    for (long i = 0; i < steps; ++i) {
        const Step step(draw);
        rows += static_cast<long>(step.num_rows());
        Arrays exact(step.num_rows(), step.num_reads, step.num_users());
        Arrays wide(step.num_rows() + draw() % 4, step.num_reads + draw() % 4, step.num_users() + draw() % 4);
        check(step, exact);
        check(step, wide);
        expect(breaks(step, draw), "a step that doesn't fit together was laid out");
        if (step.num_rows() == 0) continue;
        Arrays small(step.num_rows() - 1, step.num_reads, step.num_users());
        expect(is_refused(step.source(), small), "more rows than there is room for");
    }
    std::printf("%ld steps of %ld rows laid out, clean\n", steps, rows);
}
