// y = W x for up to three matrices of one format in one dispatch, with what stands before and after it in a decoder.
//
// A simdgroup computes Format::COLUMNS neighbouring columns of the output for ROWS rows of x: its lanes take a chunk each
// of those rows of W, multiply it with the same piece of every row of x, and go on 32 chunks further; what they have
// gathered is added up once, at the end. There is no barrier and no threadgroup memory: the norm before the product is one
// factor for a whole row of x, so its sum of squares is gathered along the way and applied at the end.
//
// More rows of x than ROWS are on the grid's depth.

constant bool has_norm [[function_constant(0)]];   // x is normalised: x / rms(x) * gamma
constant bool has_bias [[function_constant(1)]];
constant bool has_second [[function_constant(2)]]; // a second matrix, whose columns follow those of the first
constant bool has_third [[function_constant(3)]];
constant ushort finish [[function_constant(4)]];

constexpr constant ushort STORE = 0;     // y = product
constexpr constant ushort ADD = 1;       // y += multiplier * product
constexpr constant ushort SILU = 2;      // y = silu(first product) * second product
constexpr constant ushort GELU_TANH = 3; // the same with GELU by its tanh approximation

inline float activate(float gate) {
    if (finish == SILU) {
        return gate / (1.0f + exp(-gate));
    }
    return 0.5f * gate * (1.0f + precise::tanh(0.7978845608f * (gate + 0.044715f * gate * gate * gate)));
}

// Four values at `at`; those from k on are zeros and not read.
inline float4 four(device const float* x, uint at, uint k, bool ragged) {
    if (!ragged || at + 4 <= k) {
        return *(device const float4*)(x + at);
    }
    float4 v = float4(0.0f);
    for (ushort i = 0; i < 4; i++) {
        if (at + i < k) {
            v[i] = x[at + i];
        }
    }
    return v;
}

template <typename Format, ushort ROWS>
kernel void gemv(
    device const uchar* w0 [[buffer(0)]],
    device const uchar* w1 [[buffer(1), function_constant(has_second)]],
    device const uchar* w2 [[buffer(2), function_constant(has_third)]],
    device const float* x [[buffer(3)]],
    device const float* gamma [[buffer(4), function_constant(has_norm)]],
    device const float* bias [[buffer(5), function_constant(has_bias)]],
    device float* y [[buffer(6)]],
    constant GemvParams& p [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroups [[simdgroups_per_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]])
{
    constexpr ushort COLUMNS = Format::COLUMNS;
    constexpr ushort PIECES = Format::VALUES / 8; // of four values, in half a chunk
    const bool gated = finish >= SILU;

    // Which matrix, and which of its columns. All of this is the same in a whole simdgroup.
    uint tile = group.x * simdgroups + simdgroup;
    uint first = 0; // column of y at which the matrix begins
    Matrix m = {w0, p.n0, p.stride_w, w0 + p.scales0, p.stride_scales};
    Matrix up = m;
    if (has_second && gated) {
        up.w = w1;
        up.scales = w1 + p.scales1;
    } else if (has_second) {
        const uint tiles0 = (p.n0 + COLUMNS - 1) / COLUMNS;
        const uint tiles1 = (p.n1 + COLUMNS - 1) / COLUMNS;
        if (tile >= tiles0) {
            tile -= tiles0;
            first = p.n0;
            m.w = w1;
            m.n = p.n1;
            m.scales = w1 + p.scales1;
            if (has_third && tile >= tiles1) {
                tile -= tiles1;
                first += p.n1;
                m.w = w2;
                m.n = p.n2;
                m.scales = w2 + p.scales2;
            }
        }
    }
    const uint column = tile * COLUMNS;
    if (column >= m.n) {
        return;
    }
    const uint row0 = group.z * ROWS;

    float sum[COLUMNS][ROWS] = {};
    float sum_up[COLUMNS][ROWS] = {};
    float squares[ROWS] = {};
    const uint chunks = Format::chunks(p.k);
    for (uint i = lane; i < chunks; i += 32) {
        Chunk chunk[COLUMNS], chunk_up[COLUMNS];
        for (ushort c = 0; c < COLUMNS; c++) { // columns past the end repeat the last one
            const uint row = min(column + c, m.n - 1);
            chunk[c] = Format::load(m, row, i);
            if (gated) {
                chunk_up[c] = Format::load(up, row, i);
            }
        }
        for (ushort second = 0; second < 2; second++) {
            const uint at = Format::position(i) + second * Format::SECOND;
            float part[COLUMNS][ROWS] = {};
            float part_up[COLUMNS][ROWS] = {};
            float total[ROWS] = {};
            for (ushort j = 0; j < PIECES; j++) {
                float4 g = float4(1.0f);
                if (has_norm) {
                    g = four(gamma, at + 4 * j, p.k, Format::RAGGED);
                }
                for (ushort r = 0; r < ROWS; r++) { // rows past the end repeat the last one
                    float4 v = four(x + min(row0 + r, p.rows - 1) * p.stride_x, at + 4 * j, p.k, Format::RAGGED);
                    if (has_norm) {
                        squares[r] += dot(v, v);
                        v *= g;
                    }
                    if (Format::MINIMUM) {
                        total[r] += v.x + v.y + v.z + v.w;
                    }
                    for (ushort c = 0; c < COLUMNS; c++) {
                        part[c][r] += dot(Format::piece(chunk[c], second, j), v);
                        if (gated) {
                            part_up[c][r] += dot(Format::piece(chunk_up[c], second, j), v);
                        }
                    }
                }
            }
            for (ushort c = 0; c < COLUMNS; c++) {
                for (ushort r = 0; r < ROWS; r++) {
                    float value = part[c][r], value_up = part_up[c][r];
                    if (Format::SCALED) {
                        value *= chunk[c].scale[second];
                        value_up *= gated ? chunk_up[c].scale[second] : 0.0f;
                    }
                    if (Format::MINIMUM) {
                        value -= chunk[c].minimum[second] * total[r];
                        value_up -= gated ? chunk_up[c].minimum[second] * total[r] : 0.0f;
                    }
                    sum[c][r] += value;
                    sum_up[c][r] += value_up;
                }
            }
        }
    }

    for (ushort r = 0; r < ROWS; r++) {
        float factor = 1.0f;
        if (has_norm) {
            factor = rsqrt(simd_sum(squares[r]) / float(p.k) + p.eps);
        }
        for (ushort c = 0; c < COLUMNS; c++) {
            float value = factor * simd_sum(sum[c][r]);
            float value_up = gated ? factor * simd_sum(sum_up[c][r]) : 0.0f;
            if (lane == 0 && column + c < m.n && row0 + r < p.rows) {
                const uint out = first + column + c;
                if (has_bias) {
                    value += bias[out];
                    if (gated) {
                        value_up += bias[p.n0 + out];
                    }
                }
                device float& to = y[(row0 + r) * p.stride_y + out];
                if (gated) {
                    value = activate(value) * value_up;
                } else if (finish == ADD) {
                    value = to + p.multiplier * value;
                }
                to = value;
            }
        }
    }
}

#define INSTANTIATE(format, name, rows) \
    template [[host_name("gemv_" name "_" #rows)]] [[kernel]] decltype(gemv<format, rows>) gemv<format, rows>;
#define INSTANTIATE_ROWS(format, name) INSTANTIATE(format, name, 1) INSTANTIATE(format, name, 2) INSTANTIATE(format, name, 4)

INSTANTIATE_ROWS(F16, "f16")
INSTANTIATE_ROWS(F16Blocked, "f16_blocked")
INSTANTIATE_ROWS(BF16, "bf16")
INSTANTIATE_ROWS(Q8_0, "q8_0")
INSTANTIATE_ROWS(Q4_0, "q4_0")
INSTANTIATE_ROWS(Q4_K, "q4_k")
INSTANTIATE_ROWS(Q6_K, "q6_k")
