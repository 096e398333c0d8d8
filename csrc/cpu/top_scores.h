// The catalogue's best for each user in one walk over the table: products, prior, masks and selection, block by block.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace speeder::cpu {

// Ascending rows of each user, one behind the other.
struct RowLists {
    const std::int32_t* rows;
    const std::int32_t* starts;  // [users + 1]
};

struct Search {
    const std::byte* table;  // [num_items, size]
    const std::byte* users;  // [num_users, size], of the same type
    Number type;
    int num_items, num_users, size, k;
    const std::int32_t* depths;  // [num_users] how many each one asks for, of at most k: nobody pays for another's
    const float* prior;     // [num_items]
    const bool* available;  // [num_items]
    RowLists excluded;
    RowLists allowed;     // of users where `limited`
    const bool* limited;  // [num_users] or null
    float* scores;        // [num_users, k], descending, equal ones by row; -inf where there are no more; not written
    std::int64_t* rows;   // [num_users, k]                                        beyond a user's depth
    std::ptrdiff_t bytes_per_thread = std::ptrdiff_t{1} << 20;  // of the table, times users, that are worth another
};

// Throws std::invalid_argument for lists that point beyond the table, and for depths that are not within 1..k.
void top_scores(const Search& search, const Kernels& kernels, int threads);

}  // namespace speeder::cpu
