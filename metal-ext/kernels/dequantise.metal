// Packed weights as plain floats: a thread widens a chunk.
//
// `widen` writes every row, for a matrix-matrix product; `look_up` writes the rows of a few tokens, which is what a step
// begins with.

template <typename Format>
struct Widened {
    // Writes the values of a chunk to where they stand in their row.
    static void write(thread const Matrix& m, uint row, uint chunk, uint k, float multiplier, device float* to) {
        const Chunk c = Format::load(m, row, chunk);
        for (ushort second = 0; second < 2; second++) {
            const uint at = Format::position(chunk) + second * Format::SECOND;
            for (ushort i = 0; i < Format::VALUES / 8; i++) {
                float4 v = Format::piece(c, second, i);
                if (Format::SCALED) {
                    v *= c.scale[second];
                }
                if (Format::MINIMUM) {
                    v -= c.minimum[second];
                }
                for (ushort j = 0; j < 4; j++) {
                    if (!Format::RAGGED || at + 4 * i + j < k) {
                        to[at + 4 * i + j] = multiplier * v[j];
                    }
                }
            }
        }
    }
};

template <typename Format>
kernel void widen(
    device const uchar* w [[buffer(0)]],
    device float* out [[buffer(1)]],
    constant DequantiseParams& p [[buffer(2)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    uint2 threads [[threads_per_threadgroup]])
{
    const uint chunk = group.x * threads.x + thread_index;
    if (chunk < Format::chunks(p.k)) {
        const Matrix m = {w, p.n, p.stride_w, w + p.scales, p.stride_scales};
        Widened<Format>::write(m, group.y, chunk, p.k, p.multiplier, out + ulong(group.y) * p.k);
    }
}

template <typename Format>
kernel void look_up(
    device const uchar* w [[buffer(0)]],
    device float* out [[buffer(1)]],
    constant uint* tokens [[buffer(2)]], // below n where the host gives them; what else a buffer holds is row n - 1
    constant DequantiseParams& p [[buffer(3)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    uint2 threads [[threads_per_threadgroup]])
{
    const uint chunk = group.x * threads.x + thread_index;
    if (chunk < Format::chunks(p.k)) {
        const Matrix m = {w, p.n, p.stride_w, w + p.scales, p.stride_scales};
        Widened<Format>::write(m, min(tokens[group.y], p.n - 1), chunk, p.k, p.multiplier, out + ulong(group.y) * p.k);
    }
}

// Floats, which products do not take but a table may be of; k is a multiple of 8.
struct F32 {
    static constant constexpr const ushort VALUES = 8;
    static constant constexpr const ushort SECOND = 4;
    static constant constexpr const bool SCALED = false;
    static constant constexpr const bool MINIMUM = false;
    static constant constexpr const bool RAGGED = false;
    static uint chunks(uint k) { return k / 8; }
    static uint position(uint chunk) { return chunk * 8; }
    static Chunk load(thread const Matrix& m, uint row, uint chunk) {
        Chunk c;
        c.low = load16(m.w + ulong(row) * m.stride + chunk * 32);
        c.high = load16(m.w + ulong(row) * m.stride + chunk * 32 + 16);
        return c;
    }
    static float4 piece(thread const Chunk& c, ushort second, ushort) {
        return as_type<float4>(second == 0 ? c.low : c.high);
    }
};

#define INSTANTIATE(format, name) \
    template [[host_name("widen_" name)]] [[kernel]] decltype(widen<format>) widen<format>; \
    template [[host_name("look_up_" name)]] [[kernel]] decltype(look_up<format>) look_up<format>;

INSTANTIATE(F16, "f16")
INSTANTIATE(F16Blocked, "f16_blocked")
INSTANTIATE(BF16, "bf16")
INSTANTIATE(Q8_0, "q8_0")
INSTANTIATE(Q4_0, "q4_0")
INSTANTIATE(Q4_K, "q4_k")
INSTANTIATE(Q6_K, "q6_k")

template [[host_name("look_up_f32")]] [[kernel]] decltype(look_up<F32>) look_up<F32>;
