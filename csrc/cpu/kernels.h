// The inner loops of the CPU path, compiled once for every instruction set; `pick` finds the best this machine has.
//
// A row's arithmetic depends on nothing but the row: sums run over fixed blocks in a fixed order, however many rows
// stand beside it and whichever thread takes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace speeder::cpu {

enum class Number : int { fp32 = 0, bf16 = 1, int8 = 2 };

constexpr std::size_t bytes_of(Number number) { return number == Number::fp32 ? 4 : number == Number::bf16 ? 2 : 1; }

// A panel is 32 columns of a weight matrix, laid out as steps of 128 bytes: 1 (fp32), 2 (bf16) or 4 (int8) consecutive
// inputs of each column. A step meets 4 bytes of an activation row, whatever the type.
constexpr int kPanel = 32;
constexpr int kStepBytes = 4 * kPanel;
constexpr int kRowStepBytes = 4;
constexpr int kAlign = 32;  // elements: rows of all buffers are padded with zeros to it, so that no loop has a tail

constexpr int padded(int size) { return (size + kAlign - 1) / kAlign * kAlign; }

// Activation rows; int8 rows are unsigned, 128 standing for zero, each with a scale of its own.
struct Rows {
    std::byte* data;
    std::ptrdiff_t stride;  // bytes
    float* scale;           // one a row, int8 only

    std::byte* row(std::ptrdiff_t i) const { return data + i * stride; }
};

struct Panel {
    const std::byte* weights;
    int steps;
    const float* column_scale;        // [32], int8 only
    const std::int32_t* column_sum;   // [32] of the weights, int8 only
    const float* bias;                // [32] or null
};

// What becomes of a product: 32 columns in fp32, or silu(first 16) * (last 16) as 16 columns in the rows' own type
// (fp32 for int8, to be quantized when the whole row is there).
struct Target {
    std::byte* out;
    std::ptrdiff_t stride;  // bytes
    bool gated;
    Number type;  // of gated columns: fp32 or bf16
};

// One chunk of rows of one sequence, under one key head.
struct AttentionUnit {
    const float* q;             // [rows, group, dim], rotated and scaled; rows `q_stride` floats apart
    std::ptrdiff_t q_stride;
    int num_rows, group, dim;
    int num_keys;               // shared and history, as far as the furthest-seeing row sees
    const std::int64_t* slots;  // [num_keys] where they stand in the cache
    const std::byte* keys;      // of this head in slot 0, in the cache's type; slots `slot_stride` bytes apart
    const std::byte* values;
    std::ptrdiff_t slot_stride;
    Number type;
    const int* limit;                // [rows] keys a row sees
    const std::int64_t* const* path;  // [rows] its own keys: slots of `own_keys`
    const int* path_length;          // [rows]
    const std::byte* own_keys;         // of this head in slot 0, as far apart as the cache's
    const std::byte* own_values;
    std::byte* out;  // [rows, group, dim] in `out_type`, rows `out_stride` bytes apart
    std::ptrdiff_t out_stride;
    Number out_type;
    float* work;  // attention_work(...) floats
};

constexpr int kChunkRows = 16;  // of an AttentionUnit at most

// Floats of an attention unit's workspace.
std::size_t attention_work(int group, int dim, int max_keys, int max_path);

struct Kernels {
    const char* name;
    // rows [n, K] times a panel into 32 (or 16) columns; scratch: [n, 32] of four bytes
    void (*product[3])(const Panel&, const Rows&, int num_rows, const Target&, std::byte* scratch);
    // sum = residual + x (either may be null), kept in `sum`; its norm goes into row i of `out`
    void (*add_norm)(float* sum, const float* residual, const float* x, const float* weight, float eps, int size,
                     Number type, const Rows& out, int i);
    void (*quantize)(const float* row, int size, const Rows& out, int i);
    // norm (weight may be null), rotation and scale of one head, into fp32
    void (*turn)(const float* head, const float* norm, float eps, const float* cos, const float* sin, int dim,
                 float scale, float* out);
    void (*attend)(const AttentionUnit&);
    // scores[user * stride + i] of table rows [num_rows, size] against users [num_users, size], both of one type
    void (*dots)(const std::byte* table, std::ptrdiff_t table_stride, int num_rows, const std::byte* users,
                 std::ptrdiff_t user_stride, int num_users, int size, Number type, float* scores,
                 std::ptrdiff_t stride);
    // scores [count] += added; the indices of those above the threshold go into `found`, how many is returned. All
    // three arrays reach up to a multiple of kAlign
    int (*select)(float* scores, const float* added, int count, float threshold, int* found);
    // reads memory, whole steps of 256 bytes, and returns something that depends on all of it: how fast can it be?
    float (*read)(const std::byte* data, std::size_t bytes);
    void (*widen)(const std::byte* row, Number type, int size, float* out);
    void (*narrow)(const float* row, int size, Number type, std::byte* out);
};

// "avx512", "avx2", "plain", or "" for the best this machine has; null where it can't be had.
const Kernels* pick(std::string_view name);

extern const Kernels plain_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

}  // namespace speeder::cpu
