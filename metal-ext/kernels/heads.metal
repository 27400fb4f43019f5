// From a head of q or k as the projection left it to what attention works with: norm, then RoPE. A simdgroup makes a
// head, in threadgroup memory, since a lane needs values that other lanes have loaded.

constant bool has_norm [[function_constant(3)]];         // of q and k, before they are rotated
constant bool whole_projection [[function_constant(4)]]; // the norm is over all heads of a row, else over each
constant bool has_rope [[function_constant(5)]];
constant bool interleaved [[function_constant(6)]];      // pairs are neighbours, else halves of what is rotated

// RMSNorm of the head, whose mean square is that of `count` values from `normed` on: its own, or those of all heads.
// Every simdgroup adds them up itself: that is a few loads, and a dispatch less. Each lane keeps to its own values.
inline void normalise(threadgroup float4* head, ushort fours, device const float4* normed, uint count,
                      device const float4* gamma, float eps, ushort lane) {
    float squares = 0.0f;
    for (uint i = lane; i < count / 4; i += 32) {
        squares += dot(normed[i], normed[i]);
    }
    const float factor = rsqrt(simd_sum(squares) / float(count) + eps);
    for (ushort i = lane; i < fours; i += 32) {
        head[i] = factor * head[i] * gamma[i];
    }
}

// Turns the first `2 * pairs` values of the head. Barriers on both sides are the caller's.
inline void rotate(threadgroup float* head, uint pairs, device const float* cosines, device const float* sines,
                   ushort lane) {
    for (uint pair = lane; pair < pairs; pair += 32) {
        const uint first = interleaved ? 2 * pair : pair;
        const uint second = interleaved ? first + 1 : pair + pairs;
        const float c = cosines[pair];
        const float s = sines[pair];
        const float x = head[first], y = head[second];
        head[first] = x * c - y * s;
        head[second] = x * s + y * c;
    }
}
