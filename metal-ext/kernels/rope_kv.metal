// Norms of q and k, RoPE, and what is kept of k and v, in one dispatch: a simdgroup takes one head of one row.
//
// The head lies in threadgroup memory meanwhile, since a lane needs values that other lanes have loaded. A simdgroup has
// its own part of it, so there are only barriers within simdgroups.

constant bool has_norm [[function_constant(0)]];         // of q and k, before they are rotated
constant bool whole_projection [[function_constant(1)]]; // the norm is over all heads of a row, else over each
constant bool has_rope [[function_constant(2)]];
constant bool interleaved [[function_constant(3)]];      // pairs are neighbours, else halves of what is rotated

constexpr constant ushort SIMDGROUPS = 4;
constexpr constant ushort MOST_DIM = 256;

// 16 bytes a lane.
inline void store(thread const KvF16&, device uchar* kv, constant RopeKvParams& p, RopeKvRow row, uint head,
                  threadgroup const float* from, ushort lane) {
    device half4* to = (device half4*)(KvF16::head(kv, p.kv_heads, row.capacity, p.head_dim, head) +
                                       ulong(row.position) * KvF16::bytes(p.head_dim));
    for (uint i = lane; i < p.head_dim / 4; i += 32) {
        to[i] = half4(((threadgroup const float4*)from)[i]);
    }
}

// 32 values with one scale at a time, a value a lane. The bytes are made with the scale as it is stored.
inline void store(thread const KvQ8_0&, device uchar* kv, constant RopeKvParams& p, RopeKvRow row, uint head,
                  threadgroup const float* from, ushort lane) {
    device uchar* to = KvQ8_0::head(kv, p.kv_heads, row.capacity, p.head_dim, head) +
                       ulong(row.position) * KvQ8_0::bytes(p.head_dim);
    const uint groups = (p.head_dim + 31) / 32;
    device half* scales = (device half*)KvQ8_0::scales(kv, p.kv_heads, row.capacity, p.head_dim, head) +
                          ulong(row.position) * groups;
    for (uint group = 0; group < groups; group++) {
        const uint i = group * 32 + lane;
        const float value = i < p.head_dim ? from[i] : 0.0f;
        const half stored = half(simd_max(abs(value)) / 127.0f);
        const float scale = float(stored);
        const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        if (i < p.head_dim) {
            to[i] = uchar(char(rint(clamp(value * inverse, -127.0f, 127.0f))));
        }
        if (lane == 0) {
            scales[group] = stored;
        }
    }
}

template <typename Kv>
kernel void rope_kv(
    device const float* qkv [[buffer(0)]], // rows of all heads of q, then of k, then of v
    device const float* gamma_q [[buffer(1), function_constant(has_norm)]],
    device const float* gamma_k [[buffer(2), function_constant(has_norm)]],
    device const float* cos_table [[buffer(3), function_constant(has_rope)]],
    device const float* sin_table [[buffer(4), function_constant(has_rope)]],
    device float* q [[buffer(5)]],
    device uchar* keys [[buffer(6)]],
    device uchar* values [[buffer(7)]],
    constant RopeKvRow* rows [[buffer(8)]],
    constant RopeKvParams& p [[buffer(9)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]])
{
    threadgroup float4 memory[SIMDGROUPS][MOST_DIM / 4];
    // All of this is the same in a whole simdgroup.
    const uint index = group.x * SIMDGROUPS + simdgroup;
    if (index >= p.heads + 2 * p.kv_heads) {
        return;
    }
    const bool is_q = index < p.heads;
    const bool is_v = index >= p.heads + p.kv_heads;
    const uint head = is_q ? index : (index - p.heads) % p.kv_heads; // among those of its kind
    device const float* from = qkv + ulong(group.y) * p.stride_qkv + index * p.head_dim;
    threadgroup float4* four = memory[simdgroup];
    threadgroup float* one = (threadgroup float*)four;

    if (has_norm && !is_v) {
        // Every simdgroup adds up the whole projection itself: that is a few loads, and a dispatch less.
        device const float4* normed = (device const float4*)(whole_projection ? from - head * p.head_dim : from);
        const uint heads = whole_projection ? (is_q ? p.heads : p.kv_heads) : 1;
        device const float* gamma = (is_q ? gamma_q : gamma_k) + (whole_projection ? head * p.head_dim : 0);
        float squares = 0.0f;
        for (uint i = lane; i < heads * p.head_dim / 4; i += 32) {
            squares += dot(normed[i], normed[i]);
        }
        const float factor = rsqrt(simd_sum(squares) / float(heads * p.head_dim) + p.eps);
        for (uint i = lane; i < p.head_dim / 4; i += 32) {
            four[i] = factor * ((device const float4*)from)[i] * ((device const float4*)gamma)[i];
        }
    } else {
        for (uint i = lane; i < p.head_dim / 4; i += 32) {
            four[i] = ((device const float4*)from)[i];
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    const RopeKvRow row = rows[group.y];
    if (has_rope && !is_v) {
        const uint pairs = p.rotary_dim / 2;
        for (uint pair = lane; pair < pairs; pair += 32) {
            const uint a = interleaved ? 2 * pair : pair;
            const uint b = interleaved ? a + 1 : pair + pairs;
            const float c = cos_table[ulong(row.angles) * pairs + pair];
            const float s = sin_table[ulong(row.angles) * pairs + pair];
            const float x = one[a], y = one[b];
            one[a] = x * c - y * s;
            one[b] = x * s + y * c;
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    if (is_q) {
        device float4* to = (device float4*)(q + ulong(group.y) * p.stride_q + head * p.head_dim);
        for (uint i = lane; i < p.head_dim / 4; i += 32) {
            to[i] = four[i];
        }
    } else {
        store(Kv(), (is_v ? values : keys) + ulong(row.base) * 16, p, row, head, one, lane);
    }
}

#define INSTANTIATE(format, name) \
    template [[host_name("rope_kv_" name)]] [[kernel]] decltype(rope_kv<format>) rope_kv<format>;

INSTANTIATE(KvF16, "f16")
INSTANTIATE(KvQ8_0, "q8_0")
