// The k greatest values of each row and where they stand, greatest first, the lowest place first among equals.
//
// `top_k_pieces` finds those of each piece of a row, a simdgroup a piece; `top_k_merge` those of the pieces' lists, a
// simdgroup a row. Both take k turns: every lane offers its best, the best of these is taken, and its lane looks for
// another. Lanes compare unsigned integers that are ordered as the values are.

constexpr constant ushort SIMDGROUPS = 4;
constexpr constant ushort FOURS = 8; // a lane's values, in fours: a piece has 1024
constexpr constant ushort LISTS = 16; // a lane's lists

constexpr constant uint TAKEN = 0;     // what is no value, or not any more
constexpr constant uint NOT_A_NUMBER = 1; // below minus infinity
constexpr constant uint MINUS_INFINITE = 0x007fffffu;
constexpr constant uint INFINITE = 0xff800000u;
constexpr constant uint NOWHERE = 0xffffffffu;

// Ordered as the value; minus zero is zero.
inline uint key_of(float value) {
    const uint bits = as_type<uint>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return NOT_A_NUMBER;
    }
    if (bits == 0x80000000u) {
        return 0x80000000u;
    }
    return bits >> 31 == 0 ? bits | 0x80000000u : ~bits;
}

inline float value_of(uint key) {
    return as_type<float>(key >> 31 == 1 ? key & 0x7fffffffu : key == NOT_A_NUMBER ? 0x7fc00000u : ~key);
}

// x: key, y: place. The best of all lanes, in all of them.
inline uint2 best_of_lanes(uint2 own) {
    const uint key = simd_max(own.x);
    return uint2(key, simd_min(own.x == key ? own.y : NOWHERE));
}

kernel void top_k_pieces(
    device const float* values [[buffer(0)]],
    device uint2* lists [[buffer(1)]],   // (rows, lists, k)
    device uint* first_not_finite [[buffer(2)]], // (rows, lists): the lowest place, or NOWHERE
    constant TopKParams& p [[buffer(3)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]])
{
    const uint list = group.x * SIMDGROUPS + simdgroup;
    if (list >= p.lists) { // a whole simdgroup
        return;
    }
    device const float* row = values + ulong(group.y) * p.stride;
    const uint start = list * FOURS * 128 + lane * 4;
    uint keys[FOURS * 4];
    uint lost = NOWHERE;
    for (ushort i = 0; i < FOURS; i++) {
        const uint at = start + i * 128;
        float4 four = float4(0.0f);
        if (at + 4 <= p.n) {
            four = *(device const float4*)(row + at);
        }
        for (ushort j = 0; j < 4; j++) {
            uint key = TAKEN;
            if (at + 4 <= p.n) {
                key = key_of(four[j]);
            } else if (at + j < p.n) {
                key = key_of(row[at + j]);
            }
            keys[i * 4 + j] = key;
            if (key == NOT_A_NUMBER || key == INFINITE || key == MINUS_INFINITE) {
                lost = min(lost, at + j);
            }
        }
    }
    lost = simd_min(lost);
    if (lane == 0) {
        first_not_finite[group.y * p.lists + list] = lost;
    }

    device uint2* out = lists + (ulong(group.y) * p.lists + list) * p.k;
    uint2 own = uint2(TAKEN, NOWHERE);
    bool look = true;
    for (uint turn = 0; turn < p.k; turn++) {
        if (look) {
            own = uint2(TAKEN, NOWHERE);
            for (ushort i = 0; i < FOURS * 4; i++) {
                if (keys[i] > own.x) {
                    own = uint2(keys[i], start + i / 4 * 128 + i % 4);
                }
            }
        }
        const uint2 best = best_of_lanes(own);
        look = best.y == own.y;
        if (look) {
            for (ushort i = 0; i < FOURS * 4; i++) {
                if (start + i / 4 * 128 + i % 4 == best.y) {
                    keys[i] = TAKEN;
                }
            }
        }
        if (lane == 0) {
            out[turn] = best; // TAKEN once the piece has no more
        }
    }
}

kernel void top_k_merge(
    device const uint2* lists [[buffer(0)]],
    device const uint* first_not_finite [[buffer(1)]],
    device uint* places [[buffer(2)]],      // (rows, k)
    device float* values [[buffer(3)]],     // (rows, k)
    device uint* row_first_not_finite [[buffer(4)]], // (rows)
    constant TopKParams& p [[buffer(5)]],
    uint row [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]])
{
    device const uint2* from = lists + ulong(row) * p.lists * p.k;
    uint2 heads[LISTS]; // the best that each of the lane's lists has left
    ushort used[LISTS];
    uint lost = NOWHERE;
    for (ushort i = 0; i < LISTS; i++) {
        const uint list = i * 32 + lane;
        used[i] = 0;
        heads[i] = uint2(TAKEN, NOWHERE);
        if (list < p.lists) {
            heads[i] = from[list * p.k];
            lost = min(lost, first_not_finite[row * p.lists + list]);
        }
    }
    lost = simd_min(lost);
    if (lane == 0) {
        row_first_not_finite[row] = lost;
    }
    for (uint turn = 0; turn < p.k; turn++) {
        uint2 own = uint2(TAKEN, NOWHERE);
        for (ushort i = 0; i < LISTS; i++) { // a lower list has lower places, and equals stand in the lowest first
            if (heads[i].x > own.x) {
                own = heads[i];
            }
        }
        const uint2 best = best_of_lanes(own);
        if (best.y == own.y) {
            for (ushort i = 0; i < LISTS; i++) {
                if (heads[i].y == best.y) {
                    used[i] += 1;
                    heads[i] = used[i] < p.k ? from[(i * 32 + lane) * p.k + used[i]] : uint2(TAKEN, NOWHERE);
                }
            }
        }
        if (lane == 0) {
            places[row * p.k + turn] = best.y;
            values[row * p.k + turn] = value_of(best.x);
        }
    }
}
