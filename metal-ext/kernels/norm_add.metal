// y += multiplier * branch / rms(branch) * gamma: a threadgroup a row.
//
// A product's own threadgroups cannot do this, since none of them sees a whole row.

constexpr constant ushort MOST_SIMDGROUPS = 32;

kernel void norm_add(
    device const float* branch [[buffer(0)]],
    device const float* gamma [[buffer(1)]],
    device float* y [[buffer(2)]],
    constant NormAddParams& p [[buffer(3)]],
    uint row [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort threads [[threads_per_threadgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]])
{
    threadgroup float partial[MOST_SIMDGROUPS];
    device const float* from = branch + row * p.stride_branch;
    device float* to = y + row * p.stride_y;
    float squares = 0.0f;
    for (uint i = thread_index; i < p.width; i += threads) {
        squares += from[i] * from[i];
    }
    squares = simd_sum(squares);
    if (lane == 0) {
        partial[simdgroup] = squares;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    squares = simd_sum(lane < simdgroups ? partial[lane] : 0.0f);
    const float factor = p.multiplier * rsqrt(squares / float(p.width) + p.eps);
    for (uint i = thread_index; i < p.width; i += threads) {
        to[i] += factor * from[i] * gamma[i];
    }
}
