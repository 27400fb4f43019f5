// How each weight format is read: sixteen bytes of one row at a time, a "chunk", by one lane.
//
// A chunk's values come as two halves, four at a time. Within a half they are neighbours in the row; the second half lies
// SECOND values after the first (quantised formats keep two distant runs in the two nibbles of a byte). A half has one
// scale and, where MINIMUM says so, one minimum: value = scale * piece - minimum. Both are applied once per half, not once
// per value. Alignment is the packer's promise (src/pack.rs): whatever is loaded as uint4 begins at a multiple of 16.

struct Chunk {
    uint4 low;
    uint4 high;     // only formats that need it
    float2 scale;   // of the two halves
    float2 minimum; // of the two halves
};

// A matrix and where its rows are.
struct Matrix {
    device const uchar* w;
    uint n;             // rows
    uint stride;        // bytes from row to row
    device const uchar* scales;
    uint stride_scales; // bytes from row to row
};

inline uint4 load16(device const uchar* p) { return *(device const uint4*)p; }
inline float4 halves(uint2 bits) { return float4(as_type<half4>(bits)); }
inline float4 bytes(uint bits) { return float4(as_type<uchar4>(bits)); }
inline uint2 pair(uint4 v, ushort i) { return i == 0 ? v.xy : v.zw; }

// 2 bytes a value, rows one after the other; a row is padded with zeros to whole chunks.
struct F16 {
    static constant constexpr const ushort VALUES = 8;
    static constant constexpr const ushort SECOND = 4;
    static constant constexpr const ushort COLUMNS = 2;
    static constant constexpr const bool SCALED = false;
    static constant constexpr const bool MINIMUM = false;
    static constant constexpr const bool RAGGED = true; // k need not be a whole number of chunks
    static uint chunks(uint k) { return (k + 7) / 8; }
    static uint position(uint chunk) { return chunk * 8; }
    static Chunk load(thread const Matrix& m, uint row, uint chunk) {
        Chunk c;
        c.low = load16(m.w + ulong(row) * m.stride + chunk * 16);
        return c;
    }
    static float4 piece(thread const Chunk& c, ushort second, ushort) { return halves(pair(c.low, second)); }
};

// The canonical blocked layout [k / 32][n][32]: what neighbouring simdgroups read at a time lies together.
struct F16Blocked {
    static constant constexpr const ushort VALUES = 8;
    static constant constexpr const ushort SECOND = 4;
    static constant constexpr const ushort COLUMNS = 2;
    static constant constexpr const bool SCALED = false;
    static constant constexpr const bool MINIMUM = false;
    static constant constexpr const bool RAGGED = true;
    static uint chunks(uint k) { return (k + 7) / 8; }
    static uint position(uint chunk) { return chunk * 8; }
    static Chunk load(thread const Matrix& m, uint row, uint chunk) {
        Chunk c;
        c.low = load16(m.w + (ulong(chunk / 4) * m.n + row) * 64 + chunk % 4 * 16);
        return c;
    }
    static float4 piece(thread const Chunk& c, ushort second, ushort) { return halves(pair(c.low, second)); }
};

// As F16. The upper half of a float is read as such: MSL 3.0 has no bfloat.
struct BF16 {
    static constant constexpr const ushort VALUES = 8;
    static constant constexpr const ushort SECOND = 4;
    static constant constexpr const ushort COLUMNS = 2;
    static constant constexpr const bool SCALED = false;
    static constant constexpr const bool MINIMUM = false;
    static constant constexpr const bool RAGGED = true;
    static uint chunks(uint k) { return (k + 7) / 8; }
    static uint position(uint chunk) { return chunk * 8; }
    static Chunk load(thread const Matrix& m, uint row, uint chunk) { return F16::load(m, row, chunk); }
    static float4 piece(thread const Chunk& c, ushort second, ushort) {
        const uint2 bits = pair(c.low, second);
        return as_type<float4>(uint4(bits.x << 16, bits.x & 0xffff0000u, bits.y << 16, bits.y & 0xffff0000u));
    }
};

// 32 int8 and a half as scale. The scales are kept apart, so that the values are aligned.
struct Q8_0 {
    static constant constexpr const ushort VALUES = 16;
    static constant constexpr const ushort SECOND = 8;
    static constant constexpr const ushort COLUMNS = 2;
    static constant constexpr const bool SCALED = true;
    static constant constexpr const bool MINIMUM = false;
    static constant constexpr const bool RAGGED = false;
    static uint chunks(uint k) { return k / 16; }
    static uint position(uint chunk) { return chunk * 16; }
    static Chunk load(thread const Matrix& m, uint row, uint chunk) {
        Chunk c;
        c.low = load16(m.w + ulong(row) * m.stride + chunk * 16);
        c.scale = float2(float(((device const half*)(m.scales + ulong(row) * m.stride_scales))[chunk / 2]));
        return c;
    }
    static float4 piece(thread const Chunk& c, ushort second, ushort i) {
        return float4(as_type<char4>(c.low[second * 2 + i]));
    }
};

// 16 bytes of two nibbles each and a half as scale; a nibble is the value plus 8. The scales are kept apart.
struct Q4_0 {
    static constant constexpr const ushort VALUES = 32;
    static constant constexpr const ushort SECOND = 16;
    static constant constexpr const ushort COLUMNS = 4;
    static constant constexpr const bool SCALED = true;
    static constant constexpr const bool MINIMUM = true;
    static constant constexpr const bool RAGGED = false;
    static uint chunks(uint k) { return k / 32; }
    static uint position(uint chunk) { return chunk * 32; }
    static Chunk load(thread const Matrix& m, uint row, uint chunk) {
        Chunk c;
        c.low = load16(m.w + ulong(row) * m.stride + chunk * 16);
        c.scale = float2(float(((device const half*)(m.scales + ulong(row) * m.stride_scales))[chunk]));
        c.minimum = 8.0f * c.scale;
        return c;
    }
    static float4 piece(thread const Chunk& c, ushort second, ushort i) {
        return bytes((c.low[i] >> (4 * second)) & 0x0f0f0f0fu);
    }
};

// 256 values in 144 bytes, as GGML stores them: two halves d and dmin, eight pairs of 6-bit scale and minimum in 12 bytes,
// 128 bytes of nibbles. The block is nine times 16 bytes, so it is aligned as it is.
struct Q4_K {
    static constant constexpr const ushort VALUES = 32;
    static constant constexpr const ushort SECOND = 32;
    static constant constexpr const ushort COLUMNS = 2;
    static constant constexpr const bool SCALED = true;
    static constant constexpr const bool MINIMUM = true;
    static constant constexpr const bool RAGGED = false;
    static uint chunks(uint k) { return k / 32; }
    static uint position(uint chunk) { return chunk / 8 * 256 + chunk % 8 / 2 * 64 + chunk % 2 * 16; }
    static Chunk load(thread const Matrix& m, uint row, uint chunk) {
        Chunk c;
        device const uchar* block = m.w + ulong(row) * m.stride + chunk / 8 * 144;
        const uint4 head = load16(block);
        c.low = load16(block + 16 + chunk % 8 * 16);
        const float2 d = float2(as_type<half2>(head.x));
        // The sub-blocks 2 * p and 2 * p + 1 are the low and the high nibbles of the same bytes.
        const uint p = chunk % 8 / 2;
        const uint shift = p % 2 * 16;
        uint2 scale, minimum;
        if (p < 2) {
            scale = uint2(head.y >> shift, head.y >> (shift + 8)) & 63u;
            minimum = uint2(head.z >> shift, head.z >> (shift + 8)) & 63u;
        } else { // 4 bits in the last word, the upper 2 in what the first four sub-blocks leave free
            scale = (uint2(head.w >> shift, head.w >> (shift + 8)) & 15u) | (uint2(head.y >> (shift + 6), head.y >> (shift + 14)) & 3u) << 4u;
            minimum = (uint2(head.w >> (shift + 4), head.w >> (shift + 12)) & 15u) | (uint2(head.z >> (shift + 6), head.z >> (shift + 14)) & 3u) << 4u;
        }
        c.scale = d.x * float2(scale);
        c.minimum = d.y * float2(minimum);
        return c;
    }
    static float4 piece(thread const Chunk& c, ushort second, ushort i) {
        return bytes((c.low[i] >> (4 * second)) & 0x0f0f0f0fu);
    }
};

// 256 values: 128 bytes of low nibbles, 64 of upper pairs of bits, 16 int8 scales, and a half that is kept apart, since
// the 210 bytes of GGML's block are no multiple of 16. A value is the six bits less 32.
struct Q6_K {
    static constant constexpr const ushort VALUES = 32;
    static constant constexpr const ushort SECOND = 64;
    static constant constexpr const ushort COLUMNS = 2;
    static constant constexpr const bool SCALED = true;
    static constant constexpr const bool MINIMUM = true;
    static constant constexpr const bool RAGGED = false;
    static uint chunks(uint k) { return k / 32; }
    static uint position(uint chunk) { return chunk / 4 * 128 + chunk % 4 * 16; }
    static Chunk load(thread const Matrix& m, uint row, uint chunk) {
        Chunk c;
        device const uchar* block = m.w + ulong(row) * m.stride + chunk / 8 * 208;
        const uint part = chunk % 8 / 4; // which 128 values
        const uint run = chunk % 4;      // which 16 of their first 64; the high nibbles are the same of the last 64
        c.low = load16(block + chunk % 8 * 16);
        c.high = load16(block + 128 + part * 32 + run % 2 * 16) >> (run / 2 * 2);
        device const char* scales = (device const char*)(block + 192 + part * 8 + run);
        const float d = float(((device const half*)(m.scales + ulong(row) * m.stride_scales))[chunk / 8]);
        c.scale = d * float2(float(scales[0]), float(scales[4]));
        c.minimum = 32.0f * c.scale;
        return c;
    }
    static float4 piece(thread const Chunk& c, ushort second, ushort i) {
        const uint low = (c.low[i] >> (4 * second)) & 0x0f0f0f0fu;
        const uint high = (c.high[i] >> (4 * second)) & 0x03030303u;
        return bytes(low | high << 4);
    }
};
