// A decode step's attention, from the projections' q, k and v on: norms of q and k, RoPE, the append to the KV cache, and
// softmax(scale * q . K) V over the positions that a row sees.
//
// A threadgroup takes the query heads of one key head together, so that keys and values come from memory once, and of a
// row's positions a contiguous part. Its simdgroups first make the queries, a head each at a time. Then they are `tiles`
// times `slices`: each takes up to HEADS of the query heads, and blocks of positions in turn. Within a simdgroup, as many
// neighbouring lanes as a position has units of 16 bytes (rounded up to a power of two) take a position; the others take
// the next ones at the same time, and each lane has four such positions under way.
//
// The row's own key and value are appended here and belong to the last split. Nothing orders threadgroups, so whoever
// takes the last split makes both itself, rounded as they are stored, and never reads them from the cache; the first of
// the threadgroups that share a key head's queries is the one that writes them there.
//
// Each group of lanes keeps a greatest score, the sum of weights relative to it, and the weighted sum of values (online
// softmax). These are brought together three times: over the lanes, over the slices, and, where a row's positions are
// split, by a second kernel over the threadgroups. No score is kept, and where a part has no positions its greatest score
// is the lowest float, which gives it no weight anywhere.

constant ushort head_dim [[function_constant(0)]];
constant bool has_softcap [[function_constant(1)]];
constant bool is_split [[function_constant(2)]]; // partial results are written, for `attend_merge`

constexpr constant float LOWEST = -3.402823466e38f;

// Lanes that take a position together.
inline ushort lanes_for(ushort units) {
    return units <= 4 ? 4 : units <= 8 ? 8 : units <= 16 ? 16 : 32;
}

// A key head's entries: those in the cache, and the row's own.
struct Entries {
    device const uchar* cached;        // position 0
    device const uchar* cached_scales;
    threadgroup const uchar* own;
    threadgroup const uchar* own_scales;
};

// A unit of each of four positions.
struct Units {
    uint4 unit[4];
    float4 scales;
};

template <typename Kv>
inline Units load(thread const Entries& from, uint4 position, uint own_position, bool near_own, uint place) {
    const uint stride = Kv::bytes(head_dim), scale_stride = Kv::scale_bytes(head_dim);
    Units units;
    // The same in a whole simdgroup, so that elsewhere nothing stands between the four loads.
    if (!near_own) {
        for (ushort u = 0; u < 4; u++) {
            units.unit[u] = *(device const uint4*)(from.cached + ulong(position[u]) * stride + place * 16);
            units.scales[u] = Kv::scale(from.cached_scales + ulong(position[u]) * scale_stride, place);
        }
        return units;
    }
    for (ushort u = 0; u < 4; u++) {
        if (position[u] == own_position) {
            units.unit[u] = *(threadgroup const uint4*)(from.own + place * 16);
            units.scales[u] = Kv::own_scale(from.own_scales, place);
        } else {
            units.unit[u] = *(device const uint4*)(from.cached + ulong(position[u]) * stride + place * 16);
            units.scales[u] = Kv::scale(from.cached_scales + ulong(position[u]) * scale_stride, place);
        }
    }
    return units;
}

template <typename Kv, ushort HEADS>
kernel void attend(
    device const float* qkv [[buffer(0)]], // rows of all heads of q, then of k, then of v
    device const float* gamma_q [[buffer(1), function_constant(has_norm)]],
    device const float* gamma_k [[buffer(2), function_constant(has_norm)]],
    device const float* cos_table [[buffer(3), function_constant(has_rope)]],
    device const float* sin_table [[buffer(4), function_constant(has_rope)]],
    device uchar* keys [[buffer(5)]],
    device uchar* values [[buffer(6)]],
    device float* y [[buffer(7)]], // or a row for each split of each head
    device float2* stats [[buffer(8), function_constant(is_split)]], // their greatest scores and sums of weights
    constant AttendRow* rows [[buffer(9)]],
    constant AttendParams& p [[buffer(10)]],
    threadgroup float4* queries [[threadgroup(0)]],       // (tiles * HEADS, head_dim)
    threadgroup float4* slice_values [[threadgroup(1)]],  // (simdgroups, head_dim), one query head at a time
    threadgroup float2* slice_stats [[threadgroup(2)]],   // (simdgroups)
    threadgroup uint4* own [[threadgroup(3)]],            // the row's own key and value, then their scales
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]])
{
    constexpr ushort PIECES = Kv::UNIT / 4;
    const ushort threads = simdgroups * 32;
    const ushort fours = head_dim / 4;
    const uint dim = head_dim;
    const AttendRow row = rows[group.z];
    const uint split = group.x;
    if (split >= row.splits) { // the whole threadgroup: other rows have more
        return;
    }
    const uint kv_head = group.y / p.parts;
    const uint part = group.y % p.parts * p.part_heads; // first query head of the key head
    const uint count = min(p.part_heads, p.group - part);
    const uint first_head = kv_head * p.group + part;

    const uint own_position = row.end - 1;
    const bool has_own = split + 1 == row.splits;
    const bool appends = has_own && part == 0; // of a row and key head, this threadgroup and no other
    const uint stride = Kv::bytes(dim), scale_stride = Kv::scale_bytes(dim);
    keys += ulong(row.base) * 16;
    values += ulong(row.base) * 16;
    device uchar* k_cache = Kv::head(keys, p.kv_heads, row.capacity, dim, kv_head);
    device uchar* k_scales = Kv::scales(keys, p.kv_heads, row.capacity, dim, kv_head);
    device uchar* v_cache = Kv::head(values, p.kv_heads, row.capacity, dim, kv_head);
    device uchar* v_scales = Kv::scales(values, p.kv_heads, row.capacity, dim, kv_head);
    threadgroup uchar* own_k = (threadgroup uchar*)own;
    threadgroup uchar* own_v = own_k + stride;
    threadgroup uchar* own_k_scales = own_v + stride;
    threadgroup uchar* own_v_scales = own_k_scales + scale_stride;

    // The queries, times the scale, where heads past the end repeat the last one; then the row's own key and value. A
    // simdgroup makes these two where its sums will be.
    const uint heads = p.kv_heads * p.group;
    const uint slots = p.tiles * HEADS;
    for (uint slot = simdgroup; slot < slots + (has_own ? 2 : 0); slot += simdgroups) {
        const bool is_q = slot < slots, is_v = slot == slots + 1;
        const uint head = is_q ? first_head + min(slot, count - 1) : kv_head; // among those of its kind
        const uint of_kind = is_q ? heads : p.kv_heads;
        device const float* kind =
            qkv + ulong(group.z) * p.stride_qkv + (is_q ? 0 : is_v ? heads + p.kv_heads : heads) * dim;
        device const float4* from = (device const float4*)(kind + head * dim);
        threadgroup float4* made = is_q ? queries + slot * fours : slice_values + simdgroup * fours;
        for (ushort i = lane; i < fours; i += 32) {
            made[i] = from[i];
        }
        if (has_norm && !is_v) {
            device const float* gamma = (is_q ? gamma_q : gamma_k) + (whole_projection ? head * dim : 0);
            normalise(made, fours, whole_projection ? (device const float4*)kind : from,
                      whole_projection ? of_kind * dim : dim, (device const float4*)gamma, p.eps, lane);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (has_rope && !is_v) {
            const uint pairs = p.rotary_dim / 2;
            const ulong angles = ulong(row.angles) * pairs;
            rotate((threadgroup float*)made, pairs, cos_table + angles, sin_table + angles, lane);
            simdgroup_barrier(mem_flags::mem_threadgroup);
        }
        if (is_q) {
            for (ushort i = lane; i < fours; i += 32) {
                made[i] *= p.scale;
            }
        } else {
            const ulong at = ulong(own_position) * stride, scales_at = ulong(own_position) * scale_stride;
            Kv::store((threadgroup const float*)made, dim, is_v ? own_v : own_k, is_v ? own_v_scales : own_k_scales,
                      (is_v ? v_cache : k_cache) + at, (is_v ? v_scales : k_scales) + scales_at, appends, lane);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const ushort tile = simdgroup % p.tiles;
    const ushort slice = simdgroup / p.tiles;
    const ushort slices = simdgroups / p.tiles;
    const ushort units = head_dim / Kv::UNIT;
    const ushort lanes = lanes_for(units);
    const ushort at_once = 32 / lanes;
    const ushort unit = lane % lanes;
    const bool idle = unit >= units;
    const uint place = idle ? 0 : unit; // idle lanes load what the first one loads
    const uint first = row.first + split * row.span;
    const uint end = min(first + row.span, row.end);
    const Entries key_entries = {k_cache, k_scales, own_k, own_k_scales};
    const Entries value_entries = {v_cache, v_scales, own_v, own_v_scales};

    float greatest[HEADS];
    float total[HEADS];
    float4 sum[HEADS][PIECES];
    for (ushort h = 0; h < HEADS; h++) {
        greatest[h] = LOWEST;
        total[h] = 0.0f;
        for (ushort i = 0; i < PIECES; i++) {
            sum[h][i] = float4(0.0f);
        }
    }
    for (uint block = first + slice * 4 * at_once; block < end; block += slices * 4 * at_once) {
        uint4 position; // those past the end repeat the last one, and get no weight
        bool seen[4];
        for (ushort u = 0; u < 4; u++) {
            position[u] = block + u * at_once + lane / lanes;
            seen[u] = position[u] < end;
            position[u] = min(position[u], end - 1);
        }
        const bool near_own = block + 4 * at_once > own_position;
        const Units k = load<Kv>(key_entries, position, own_position, near_own, place);
        float4 weight[HEADS];
        for (ushort h = 0; h < HEADS; h++) {
            float4 score = float4(0.0f);
            for (ushort i = 0; i < PIECES; i++) {
                const float4 query = queries[(tile * HEADS + h) * fours + place * PIECES + i];
                for (ushort u = 0; u < 4; u++) {
                    score[u] += dot(query, Kv::piece(k.unit[u], i));
                }
            }
            if (Kv::SCALED) {
                score *= k.scales;
            }
            if (idle) {
                score = float4(0.0f);
            }
            for (ushort distance = lanes / 2; distance > 0; distance /= 2) {
                score += simd_shuffle_xor(score, distance);
            }
            if (has_softcap) {
                score = p.softcap * precise::tanh(score / p.softcap);
            }
            float most = greatest[h];
            for (ushort u = 0; u < 4; u++) {
                most = seen[u] ? max(most, score[u]) : most;
            }
            const float factor = exp(greatest[h] - most);
            for (ushort u = 0; u < 4; u++) {
                weight[h][u] = seen[u] ? exp(score[u] - most) : 0.0f;
            }
            greatest[h] = most;
            total[h] = total[h] * factor + weight[h].x + weight[h].y + weight[h].z + weight[h].w;
            for (ushort i = 0; i < PIECES; i++) {
                sum[h][i] *= factor;
            }
        }
        const Units v = load<Kv>(value_entries, position, own_position, near_own, place);
        for (ushort h = 0; h < HEADS; h++) {
            if (Kv::SCALED) {
                weight[h] *= v.scales;
            }
            for (ushort i = 0; i < PIECES; i++) {
                for (ushort u = 0; u < 4; u++) {
                    sum[h][i] += weight[h][u] * Kv::piece(v.unit[u], i);
                }
            }
        }
    }

    // Over the groups of lanes. Both sides of an exchange compute the same.
    for (ushort distance = lanes; distance < 32; distance *= 2) {
        for (ushort h = 0; h < HEADS; h++) {
            const float most = max(greatest[h], simd_shuffle_xor(greatest[h], distance));
            const float factor = exp(greatest[h] - most);
            greatest[h] = most;
            total[h] *= factor;
            total[h] += simd_shuffle_xor(total[h], distance);
            for (ushort i = 0; i < PIECES; i++) {
                sum[h][i] *= factor;
                sum[h][i] += simd_shuffle_xor(sum[h][i], distance);
            }
        }
    }

    // Over the slices, one head of each tile at a time.
    for (ushort h = 0; h < HEADS; h++) {
        if (lane < units) {
            for (ushort i = 0; i < PIECES; i++) {
                slice_values[simdgroup * fours + unit * PIECES + i] = sum[h][i];
            }
        }
        if (lane == 0) {
            slice_stats[simdgroup] = float2(greatest[h], total[h]);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (ushort i = thread_index; i < p.tiles * fours; i += threads) {
            const ushort of_tile = i / fours;
            const uint in_part = of_tile * HEADS + h;
            if (in_part < count) {
                float most = LOWEST;
                for (ushort s = 0; s < slices; s++) {
                    most = max(most, slice_stats[s * p.tiles + of_tile].x);
                }
                float all = 0.0f;
                float4 out = float4(0.0f);
                for (ushort s = 0; s < slices; s++) {
                    const ushort from = s * p.tiles + of_tile;
                    const float factor = exp(slice_stats[from].x - most);
                    all += factor * slice_stats[from].y;
                    out += factor * slice_values[from * fours + i % fours];
                }
                const uint head = first_head + in_part;
                if (is_split) {
                    const ulong to = (ulong(group.z) * p.kv_heads * p.group + head) * p.most_splits + split;
                    ((device float4*)y)[to * fours + i % fours] = out;
                    if (i % fours == 0) {
                        stats[to] = float2(most, all);
                    }
                } else {
                    ((device float4*)(y + ulong(group.z) * p.stride_y + head * dim))[i % fours] = out / all;
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

// Brings the splits of a row's head together: a simdgroup, a split for each of its lanes and then a few values.
kernel void attend_merge(
    device const float* partial [[buffer(0)]],
    device const float2* stats [[buffer(1)]],
    device float* y [[buffer(2)]],
    constant AttendRow* rows [[buffer(3)]],
    constant AttendParams& p [[buffer(4)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]])
{
    constexpr ushort MOST_FOURS = 2; // of a lane: 256 values of a head
    const ushort fours = head_dim / 4;
    const ushort splits = rows[group.y].splits;
    const ulong from = (ulong(group.y) * p.kv_heads * p.group + group.x) * p.most_splits;
    const float2 own = lane < splits ? stats[from + lane] : float2(LOWEST, 0.0f);
    const float factor = exp(own.x - simd_max(own.x));
    const float all = simd_sum(factor * own.y);
    float4 out[MOST_FOURS] = {};
    for (ushort split = 0; split < splits; split++) {
        const float weight = simd_shuffle(factor, split);
        for (ushort i = 0; i < MOST_FOURS; i++) {
            if (i * 32 + lane < fours) {
                out[i] += weight * ((device const float4*)partial)[(from + split) * fours + i * 32 + lane];
            }
        }
    }
    for (ushort i = 0; i < MOST_FOURS; i++) {
        if (i * 32 + lane < fours) {
            ((device float4*)(y + ulong(group.y) * p.stride_y + group.x * head_dim))[i * 32 + lane] = out[i] / all;
        }
    }
}

#define INSTANTIATE(format, name, heads) \
    template [[host_name("attend_" name "_" #heads)]] [[kernel]] decltype(attend<format, heads>) attend<format, heads>;
#define INSTANTIATE_HEADS(format, name) INSTANTIATE(format, name, 1) INSTANTIATE(format, name, 2) INSTANTIATE(format, name, 4)

INSTANTIATE_HEADS(KvF16, "f16")
INSTANTIATE_HEADS(KvQ8_0, "q8_0")
