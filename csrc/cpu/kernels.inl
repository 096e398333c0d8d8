// The kernels over a vector type V; included by one file an instruction set, which sets the compiler's target before.
// Nothing here may call a function of another file, inline ones of the standard library included: the linker could
// keep the copy that was compiled for the larger instruction set.

namespace {

using namespace speeder::cpu;

// ---- products -------------------------------------------------------------------------------------------------------

inline std::int32_t word(const std::byte* at) {
    std::int32_t found;
    __builtin_memcpy(&found, at, 4);
    return found;
}

template <class V, Number N>
struct Dot;

template <class V>
struct Dot<V, Number::fp32> {
    using Sum = typename V::F;
    using In = typename V::F;
    static Sum zero() { return V::zero(); }
    static Sum load(const std::byte* at) { return V::load(reinterpret_cast<const float*>(at)); }
    static void store(std::byte* at, Sum sum) { V::store(reinterpret_cast<float*>(at), sum); }
    static In weights(const std::byte* at) { return load(at); }
    static In spread(const std::byte* at) { return V::set1(*reinterpret_cast<const float*>(at)); }
    static Sum add(Sum sum, In w, In a) { return V::fma(w, a, sum); }
};

template <class V>
struct Dot<V, Number::bf16> {
    using Sum = typename V::F;
    using In = typename V::I;
    static Sum zero() { return V::zero(); }
    static Sum load(const std::byte* at) { return V::load(reinterpret_cast<const float*>(at)); }
    static void store(std::byte* at, Sum sum) { V::store(reinterpret_cast<float*>(at), sum); }
    static In weights(const std::byte* at) { return V::load_words(at); }
    static In spread(const std::byte* at) { return V::set1_word(word(at)); }
    static Sum add(Sum sum, In w, In a) { return V::dot_bf16(sum, w, a); }
};

template <class V>
struct Dot<V, Number::int8> {
    using Sum = typename V::I;
    using In = typename V::I;
    static Sum zero() { return V::set1_word(0); }
    static Sum load(const std::byte* at) { return V::load_words(at); }
    static void store(std::byte* at, Sum sum) { V::store_words(at, sum); }
    static In weights(const std::byte* at) { return V::load_words(at); }
    static In spread(const std::byte* at) { return V::set1_word(word(at)); }
    static Sum add(Sum sum, In w, In a) { return V::dot_u8s8(sum, w, a); }
};

constexpr int kBlockSteps = 1024;   // of a panel at a time, so that it and the rows' part stay in the second cache
constexpr int kAhead = 2048;        // bytes of weights fetched before they are needed

// M rows by one panel: `sums` [M, 32] begin at zero, or go on
template <class V, Number N, int M>
void tile(const std::byte* rows, std::ptrdiff_t stride, const std::byte* weights, int steps, std::byte* sums,
          std::ptrdiff_t sum_stride, bool fresh) {
    using D = Dot<V, N>;
    constexpr int kVectors = kPanel / V::width;
    typename D::Sum sum[M][kVectors];
    for (int i = 0; i < M; ++i)
        for (int v = 0; v < kVectors; ++v)
            sum[i][v] = fresh ? D::zero() : D::load(sums + i * sum_stride + v * V::width * 4);
    for (int step = 0; step < steps; ++step, weights += kStepBytes) {
        V::prefetch(weights + kAhead);
        V::prefetch(weights + kAhead + 64);
        typename D::In w[kVectors];
        for (int v = 0; v < kVectors; ++v) w[v] = D::weights(weights + v * V::width * 4);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const auto a = D::spread(rows + i * stride + step * kRowStepBytes);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[i][v] = D::add(sum[i][v], w[v], a);
        }
    }
    for (int i = 0; i < M; ++i)
        for (int v = 0; v < kVectors; ++v) D::store(sums + i * sum_stride + v * V::width * 4, sum[i][v]);
}

using Tile = void (*)(const std::byte*, std::ptrdiff_t, const std::byte*, int, std::byte*, std::ptrdiff_t, bool);

template <class V, Number N>
struct Tiles {
    static constexpr int kMost = V::tile_rows;
    Tile by_rows[16];
    constexpr Tiles() : by_rows{} { fill<kMost>(); }
    template <int M>
    constexpr void fill() {
        by_rows[M] = tile<V, N, M>;
        if constexpr (M > 1) fill<M - 1>();
    }
};

// rows by one panel in tiles of nearly equal heights
template <class V, Number N>
void tiled(const std::byte* rows, std::ptrdiff_t stride, int num_rows, const std::byte* weights, int steps,
           std::byte* sums, std::ptrdiff_t sum_stride) {
    static constexpr Tiles<V, N> kTiles;
    const int tiles = (num_rows + kTiles.kMost - 1) / kTiles.kMost;
    for (int begin = 0; begin < steps; begin += kBlockSteps) {
        const int block = steps - begin < kBlockSteps ? steps - begin : kBlockSteps;
        for (int t = 0, row = 0; t < tiles; ++t) {
            const int height = (num_rows - row + tiles - t - 1) / (tiles - t);
            kTiles.by_rows[height](rows + row * stride + begin * kRowStepBytes, stride, weights + begin * kStepBytes,
                                   block, sums + row * sum_stride, sum_stride, begin == 0);
            row += height;
        }
    }
}

template <class V>
typename V::F exponential(typename V::F x) {
    x = V::max(V::min(x, V::set1(88.0f)), V::set1(-87.0f));
    const auto n = V::round(V::mul(x, V::set1(1.44269504088896341f)));
    auto r = V::fma(n, V::set1(-0.693359375f), x);
    r = V::fma(n, V::set1(2.12194440e-4f), r);
    auto p = V::set1(1.9875691500e-4f);
    p = V::fma(p, r, V::set1(1.3981999507e-3f));
    p = V::fma(p, r, V::set1(8.3334519073e-3f));
    p = V::fma(p, r, V::set1(4.1665795894e-2f));
    p = V::fma(p, r, V::set1(1.6666665459e-1f));
    p = V::fma(p, r, V::set1(5.0000001201e-1f));
    p = V::fma(p, V::mul(r, r), V::add(r, V::set1(1.0f)));
    return V::mul(p, V::power_of_2(V::to_int(n)));
}

template <class V>
void put(std::byte* at, int column, typename V::F x, Number type) {
    if (type == Number::bf16) V::store_bf16(reinterpret_cast<std::uint16_t*>(at) + column, x);
    else V::store(reinterpret_cast<float*>(at) + column, x);
}

template <class V>
typename V::F get(const std::byte* at, int column, Number type) {
    if (type == Number::bf16) return V::load_bf16(reinterpret_cast<const std::uint16_t*>(at) + column);
    return V::load(reinterpret_cast<const float*>(at) + column);
}

// sums of `width` columns as what they stand for
template <class V, Number N>
typename V::F finished(const std::byte* sums, int column, const Panel& panel, float row_scale) {
    typename V::F x;
    if constexpr (N == Number::int8) {
        const auto whole = V::sub_words(V::load_words(sums + column * 4),
                                        V::times_zero_point(V::load_words(panel.column_sum + column)));
        x = V::mul(V::to_float(whole), V::mul(V::set1(row_scale), V::load(panel.column_scale + column)));
    } else {
        x = V::load(reinterpret_cast<const float*>(sums) + column);
    }
    return panel.bias == nullptr ? x : V::add(x, V::load(panel.bias + column));
}

template <class V, Number N>
void product(const Panel& panel, const Rows& rows, int num_rows, const Target& target, std::byte* scratch) {
    tiled<V, N>(rows.data, rows.stride, num_rows, panel.weights, panel.steps, scratch, kPanel * 4);
    for (int i = 0; i < num_rows; ++i) {
        const std::byte* sums = scratch + i * kPanel * 4;
        std::byte* out = target.out + i * target.stride;
        const float scale = N == Number::int8 ? rows.scale[i] : 1.0f;
        if (!target.gated) {
            for (int c = 0; c < kPanel; c += V::width)
                V::store(reinterpret_cast<float*>(out) + c, finished<V, N>(sums, c, panel, scale));
            continue;
        }
        for (int c = 0; c < kPanel / 2; c += V::width) {
            const auto gate = finished<V, N>(sums, c, panel, scale);
            const auto up = finished<V, N>(sums, c + kPanel / 2, panel, scale);
            const auto bent = V::add(V::set1(1.0f), exponential<V>(V::sub(V::zero(), gate)));
            put<V>(out, c, V::mul(V::div(gate, bent), up), target.type);
        }
    }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

template <class V>
void quantize(const float* row, int size, const Rows& out, int i) {
    auto top = V::zero();
    for (int c = 0; c < size; c += V::width) top = V::max(top, V::abs(V::load(row + c)));
    const float largest = V::largest(top);
    out.scale[i] = largest / 127.0f;
    const auto inverse = V::set1(largest > 0.0f ? 127.0f / largest : 0.0f);
    auto* to = reinterpret_cast<std::uint8_t*>(out.row(i));
    for (int c = 0; c < size; c += V::width)
        V::store_bytes(to + c, V::to_int(V::round(V::mul(V::load(row + c), inverse))));
}

template <class V>
void add_norm(float* sum, const float* residual, const float* x, const float* weight, float eps, int size, Number type,
              const Rows& out, int i) {
    auto squares = V::zero();
    for (int c = 0; c < padded(size); c += V::width) {
        auto value = V::load(residual + c);
        if (x != nullptr) value = V::add(value, V::load(x + c));
        V::store(sum + c, value);
        squares = V::fma(value, value, squares);
    }
    const float mean = V::total(squares) / static_cast<float>(size);
    const auto scale = V::set1(1.0f / V::root(mean + eps));
    if (type == Number::int8) {
        // the row is quantized from its norm: through the row of floats that stands behind the sum
        float* normed = sum + padded(size);
        for (int c = 0; c < padded(size); c += V::width)
            V::store(normed + c, V::mul(V::mul(V::load(sum + c), scale), V::load(weight + c)));
        quantize<V>(normed, padded(size), out, i);
        return;
    }
    for (int c = 0; c < padded(size); c += V::width)
        put<V>(out.row(i), c, V::mul(V::mul(V::load(sum + c), scale), V::load(weight + c)), type);
}

template <class V>
void turn(const float* head, const float* norm, float eps, const float* cos, const float* sin, int dim, float scale,
          float* out) {
    float factor = 1.0f;
    if (norm != nullptr) {
        float squares = 0.0f;
        for (int d = 0; d < dim; ++d) squares += head[d] * head[d];
        factor = 1.0f / V::root(squares / static_cast<float>(dim) + eps);
    }
    const int half = dim / 2;
    for (int d = 0; d < half; ++d) {
        float first = head[d], second = head[d + half];
        if (norm != nullptr) {
            first *= factor * norm[d];
            second *= factor * norm[d + half];
        }
        out[d] = (first * cos[d] - second * sin[d]) * scale;
        out[d + half] = (second * cos[d + half] + first * sin[d + half]) * scale;
    }
}

template <class V>
void widen(const std::byte* row, Number type, int size, float* out) {
    int c = 0;
    for (; c + V::width <= size; c += V::width) V::store(out + c, get<V>(row, c, type));
    for (; c < size; ++c) {
        if (type == Number::bf16) {
            const std::uint32_t bits = static_cast<std::uint32_t>(reinterpret_cast<const std::uint16_t*>(row)[c]) << 16;
            __builtin_memcpy(out + c, &bits, 4);
        } else {
            out[c] = reinterpret_cast<const float*>(row)[c];
        }
    }
}

inline std::uint16_t rounded_bf16(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class V>
void narrow(const float* row, int size, Number type, std::byte* out) {
    int c = 0;
    for (; c + V::width <= size; c += V::width) put<V>(out, c, V::load(row + c), type);
    for (; c < size; ++c) {
        if (type == Number::bf16) reinterpret_cast<std::uint16_t*>(out)[c] = rounded_bf16(row[c]);
        else reinterpret_cast<float*>(out)[c] = row[c];
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------

// Parts of the workspace, in floats.
struct AttentionWork {
    float *keys, *values, *queries, *logits, *out, *own, *head;
    int wide_keys, wide_dim;  // padded to panels

    AttentionWork(const AttentionUnit& unit) {
        wide_keys = padded(unit.num_keys);
        wide_dim = padded(unit.dim);
        const std::ptrdiff_t queries_count = std::ptrdiff_t{unit.num_rows} * unit.group;
        keys = unit.work;
        values = keys + std::ptrdiff_t{wide_keys} * unit.dim;
        queries = values + std::ptrdiff_t{wide_dim} * wide_keys;
        logits = queries + queries_count * unit.dim;
        out = logits + queries_count * wide_keys;
        head = out + queries_count * wide_dim;
        own = head + wide_dim;
    }
};

// keys as panels [keys / 32][dim][32], values as panels [dim / 32][keys][32]
template <class V>
void lay_out_keys(const AttentionUnit& unit, const AttentionWork& work) {
    for (int j = 0; j < unit.num_keys; ++j) {
        widen<V>(unit.keys + unit.slots[j] * unit.slot_stride, unit.type, unit.dim, work.head);
        float* column = work.keys + std::ptrdiff_t{j / kPanel} * unit.dim * kPanel + j % kPanel;
        for (int d = 0; d < unit.dim; ++d) column[d * kPanel] = work.head[d];
        widen<V>(unit.values + unit.slots[j] * unit.slot_stride, unit.type, unit.dim, work.head);
        for (int d = 0; d < unit.dim; d += kPanel) {
            float* row = work.values + (std::ptrdiff_t{d / kPanel} * unit.num_keys + j) * kPanel;
            const int there = unit.dim - d < kPanel ? unit.dim - d : kPanel;
            for (int c = 0; c < there; ++c) row[c] = work.head[d + c];
            for (int c = there; c < kPanel; ++c) row[c] = 0.0f;
        }
    }
    // what stands behind the last key is never read as a weight, but it must be a number
    for (int j = unit.num_keys; j < work.wide_keys; ++j) {
        float* column = work.keys + std::ptrdiff_t{j / kPanel} * unit.dim * kPanel + j % kPanel;
        for (int d = 0; d < unit.dim; ++d) column[d * kPanel] = 0.0f;
    }
}

template <class V>
float dot_own(const float* query, const std::byte* key, Number type, int dim, float* head) {
    widen<V>(key, type, dim, head);
    float sum = 0.0f;
    for (int d = 0; d < dim; ++d) sum += query[d] * head[d];
    return sum;
}

// logits of one query become weights; returns 1 / their sum, own keys' weights left in `own`
template <class V>
float soften(float* logits, int limit, int wide, float* own, int num_own) {
    auto top = V::set1(-3.4e38f);
    int j = 0;
    for (; j + V::width <= limit; j += V::width) top = V::max(top, V::load(logits + j));
    float largest = V::largest(top);
    for (; j < limit; ++j) largest = logits[j] > largest ? logits[j] : largest;
    for (int p = 0; p < num_own; ++p) largest = own[p] > largest ? own[p] : largest;
    const auto against = V::set1(largest);
    auto sums = V::zero();
    for (j = 0; j < wide; j += V::width) {
        auto weight = V::zero();
        if (j < limit) {
            weight = exponential<V>(V::sub(V::load(logits + j), against));
            if (j + V::width > limit) weight = V::first(weight, limit - j);
        }
        V::store(logits + j, weight);
        sums = V::add(sums, weight);
    }
    float total = V::total(sums);
    for (int p = 0; p < num_own; ++p) {
        float pair[V::width] = {};
        pair[0] = own[p] - largest;
        V::store(pair, exponential<V>(V::load(pair)));
        own[p] = pair[0];
        total += own[p];
    }
    return 1.0f / total;
}

template <class V>
void attend(const AttentionUnit& unit) {
    const AttentionWork work(unit);
    const int dim = unit.dim, count = unit.num_rows * unit.group;
    lay_out_keys<V>(unit, work);
    for (int i = 0; i < unit.num_rows; ++i)
        for (int c = 0; c < unit.group * dim; ++c)
            work.queries[std::ptrdiff_t{i} * unit.group * dim + c] = unit.q[i * unit.q_stride + c];
    const auto* queries = reinterpret_cast<const std::byte*>(work.queries);
    for (int j = 0; j < work.wide_keys; j += kPanel)
        tiled<V, Number::fp32>(queries, dim * 4, count,
                               reinterpret_cast<const std::byte*>(work.keys + std::ptrdiff_t{j} * dim), dim,
                               reinterpret_cast<std::byte*>(work.logits + j), work.wide_keys * 4);
    float* inverse = work.own;  // [count], then the own keys' weights, path after path
    float* own = inverse + count;
    for (int at = 0; at < count; ++at) {
        const int i = at / unit.group;
        for (int p = 0; p < unit.path_length[i]; ++p)
            own[p] = dot_own<V>(work.queries + std::ptrdiff_t{at} * dim,
                                unit.own_keys + unit.path[i][p] * unit.slot_stride, unit.type, dim, work.head);
        inverse[at] = soften<V>(work.logits + std::ptrdiff_t{at} * work.wide_keys, unit.limit[i], work.wide_keys, own,
                                unit.path_length[i]);
        own += unit.path_length[i];
    }
    for (int d = 0; d < work.wide_dim; d += kPanel)
        tiled<V, Number::fp32>(reinterpret_cast<const std::byte*>(work.logits), work.wide_keys * 4, count,
                               reinterpret_cast<const std::byte*>(work.values + std::ptrdiff_t{d} * unit.num_keys),
                               unit.num_keys, reinterpret_cast<std::byte*>(work.out + d), work.wide_dim * 4);
    own = inverse + count;
    for (int at = 0; at < count; ++at) {
        const int i = at / unit.group;
        float* out = work.out + std::ptrdiff_t{at} * work.wide_dim;
        for (int p = 0; p < unit.path_length[i]; ++p, ++own) {
            widen<V>(unit.own_values + unit.path[i][p] * unit.slot_stride, unit.type, dim, work.head);
            for (int d = 0; d < dim; ++d) out[d] += *own * work.head[d];
        }
        for (int d = 0; d < dim; ++d) out[d] *= inverse[at];
        narrow<V>(out, dim, unit.out_type,
                  unit.out + i * unit.out_stride + (at % unit.group) * dim * bytes_of(unit.out_type));
    }
}

// ---- the catalogue --------------------------------------------------------------------------------------------------

// what no whole vector holds
template <class V, Number N>
float dot_rest(const std::byte* row, const std::byte* user, int whole, int size) {
    float sum = 0.0f;
    for (int c = whole / static_cast<int>(bytes_of(N)); c < size; ++c) {
        float pair[2];
        widen<V>(row + c * bytes_of(N), N, 1, pair);
        widen<V>(user + c * bytes_of(N), N, 1, pair + 1);
        sum += pair[0] * pair[1];
    }
    return sum;
}

constexpr int kTableAhead = 16384;  // bytes of the table fetched before they are needed, line after line

// R rows by U users; one of them is four, or R is one, so that sums are added up by fours: in one order, whoever stands
// beside
template <class V, Number N, int R, int U>
void dot_tile(const std::byte* table, std::ptrdiff_t table_stride, const std::byte* users, std::ptrdiff_t user_stride,
              int size, float* scores, std::ptrdiff_t stride, bool fetch) {
    using D = Dot<V, N>;
    constexpr int kBytes = V::width * 4;
    const int whole = size * static_cast<int>(bytes_of(N)) / kBytes * kBytes;
    typename D::Sum sum[R][U];
    for (auto& row : sum)
        for (auto& each : row) each = D::zero();
    for (int at = 0; at < whole; at += kBytes) {
        typename D::In user[U];
        for (int u = 0; u < U; ++u) user[u] = D::weights(users + u * user_stride + at);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            if (fetch) V::prefetch(table + kTableAhead + R * at + r * kBytes);
            const auto row = D::weights(table + r * table_stride + at);
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) sum[r][u] = D::add(sum[r][u], row, user[u]);
        }
    }
    float found[R][U];
    if constexpr (U == 4) {
        for (int r = 0; r < R; ++r) V::totals(sum[r][0], sum[r][1], sum[r][2], sum[r][3], found[r]);
    } else {
        float four[4];
        if constexpr (R == 4) V::totals(sum[0][0], sum[1][0], sum[2][0], sum[3][0], four);
        else V::totals(sum[0][0], D::zero(), D::zero(), D::zero(), four);
        for (int r = 0; r < R; ++r) found[r][0] = four[r];
    }
    for (int r = 0; r < R; ++r)
        for (int u = 0; u < U; ++u)
            scores[u * stride + r] =
                found[r][u] + dot_rest<V, N>(table + r * table_stride, users + u * user_stride, whole, size);
}

// all rows by U users, R at a time
template <class V, Number N, int R, int U>
void dot_rows(const std::byte* table, std::ptrdiff_t table_stride, int num_rows, const std::byte* users,
              std::ptrdiff_t user_stride, int size, float* scores, std::ptrdiff_t stride, bool fetch) {
    int i = 0;
    for (; i + R <= num_rows; i += R)
        dot_tile<V, N, R, U>(table + i * table_stride, table_stride, users, user_stride, size, scores + i, stride,
                             fetch);
    for (; i < num_rows; ++i)
        dot_tile<V, N, 1, U>(table + i * table_stride, table_stride, users, user_stride, size, scores + i, stride,
                             fetch);
}

template <class V, Number N>
void dots_of(const std::byte* table, std::ptrdiff_t table_stride, int num_rows, const std::byte* users,
             std::ptrdiff_t user_stride, int num_users, int size, float* scores, std::ptrdiff_t stride) {
    int u = 0;
    for (; u + 4 <= num_users; u += 4)
        dot_rows<V, N, V::dot_rows, 4>(table, table_stride, num_rows, users + u * user_stride, user_stride, size,
                                       scores + u * stride, stride, u == 0);
    for (; u < num_users; ++u)
        dot_rows<V, N, 4, 1>(table, table_stride, num_rows, users + u * user_stride, user_stride, size,
                             scores + u * stride, stride, u == 0);
}

template <class V>
void dots(const std::byte* table, std::ptrdiff_t table_stride, int num_rows, const std::byte* users,
          std::ptrdiff_t user_stride, int num_users, int size, Number type, float* scores, std::ptrdiff_t stride) {
    if (type == Number::bf16)
        dots_of<V, Number::bf16>(table, table_stride, num_rows, users, user_stride, num_users, size, scores, stride);
    else
        dots_of<V, Number::fp32>(table, table_stride, num_rows, users, user_stride, num_users, size, scores, stride);
}

template <class V>
int select(float* scores, const float* added, int count, float threshold, int* found) {
    int num_found = 0;
    const auto least = V::set1(threshold);
    for (int i = 0; i < count; i += V::width) {
        const auto score = V::add(V::load(scores + i), V::load(added + i));
        V::store(scores + i, score);
        for (unsigned above = V::above(score, least); above != 0; above &= above - 1) {
            const int at = i + __builtin_ctz(above);
            if (at < count) found[num_found++] = at;
        }
    }
    return num_found;
}

template <class V>
float read(const std::byte* data, std::size_t bytes) {
    typename V::F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (std::size_t at = 0; at + 256 <= bytes; at += 256)
        for (int c = 0; c < 64; c += V::width) {
            auto& sum = sums[c / V::width % 4];
            sum = V::max(sum, V::load(reinterpret_cast<const float*>(data + at) + c));
        }
    return V::largest(V::max(V::max(sums[0], sums[1]), V::max(sums[2], sums[3])));
}

template <class V>
constexpr Kernels kernels_of(const char* name) {
    return {name,
            {product<V, Number::fp32>, product<V, Number::bf16>, product<V, Number::int8>},
            add_norm<V>,
            quantize<V>,
            turn<V>,
            attend<V>,
            dots<V>,
            select<V>,
            read<V>,
            widen<V>,
            narrow<V>};
}

}  // namespace
