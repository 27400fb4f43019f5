// y = softmax(scale * x): a threadgroup a row of any length.
//
// A row is read twice: once for its greatest value and the sum of weights relative to it, which every thread keeps for
// what it has seen (online softmax), and once for what is written. Rows begin at multiples of 16, so four values are read
// at a time, and one at a time behind the last four.

constexpr constant ushort MOST_SIMDGROUPS = 32;
constexpr constant float LOWEST = -3.402823466e38f;

// x: greatest value, y: sum of weights.
inline float2 joined(float2 a, float2 b) {
    const float most = max(a.x, b.x);
    return float2(most, a.y * exp(a.x - most) + b.y * exp(b.x - most));
}

// Over a simdgroup; each side of an exchange computes the same.
inline float2 joined_lanes(float2 own) {
    for (ushort distance = 16; distance > 0; distance /= 2) {
        own = joined(own, simd_shuffle_xor(own, distance));
    }
    return own;
}

kernel void softmax(
    device const float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    constant SoftmaxParams& p [[buffer(2)]],
    uint row [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort threads [[threads_per_threadgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]])
{
    threadgroup float2 partial[MOST_SIMDGROUPS];
    device const float* from = x + ulong(row) * p.stride_x;
    device float* to = y + ulong(row) * p.stride_y;
    const uint fours = p.width / 4;

    float2 own = float2(LOWEST, 0.0f);
    for (uint i = thread_index; i < fours; i += threads) {
        const float4 v = p.scale * ((device const float4*)from)[i];
        const float most = max(max(max(v.x, v.y), max(v.z, v.w)), own.x);
        const float4 weight = exp(v - most);
        own = float2(most, own.y * exp(own.x - most) + weight.x + weight.y + weight.z + weight.w);
    }
    for (uint i = fours * 4 + thread_index; i < p.width; i += threads) {
        own = joined(own, float2(p.scale * from[i], 1.0f));
    }
    own = joined_lanes(own);
    if (lane == 0) {
        partial[simdgroup] = own;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    own = joined_lanes(lane < simdgroups ? partial[lane] : float2(LOWEST, 0.0f));

    const float inverse = 1.0f / own.y;
    for (uint i = thread_index; i < fours; i += threads) {
        ((device float4*)to)[i] = inverse * exp(p.scale * ((device const float4*)from)[i] - own.x);
    }
    for (uint i = fours * 4 + thread_index; i < p.width; i += threads) {
        to[i] = inverse * exp(p.scale * from[i] - own.x);
    }
}
