// How keys and values are stored, 16 bytes at a time: a "unit". src/kv.rs has the layout.
//
// An entry is a head's key, or value, at one position: its units, and in Q8_0 its scales. `store` rounds one into
// threadgroup memory and, where `append` says so, the same bytes into the cache. It takes a whole simdgroup.

struct KvF16 {
    static constant constexpr const ushort UNIT = 8; // values
    static constant constexpr const bool SCALED = false;
    template <typename T>
    static T head(T kv, uint, uint capacity, uint dim, uint head) { return kv + ulong(head) * capacity * dim * 2; }
    template <typename T>
    static T scales(T kv, uint, uint, uint, uint) { return kv; }
    static uint bytes(uint dim) { return dim * 2; }
    static uint scale_bytes(uint) { return 0; }
    static float scale(device const uchar*, uint) { return 1.0f; }
    static float own_scale(threadgroup const uchar*, uint) { return 1.0f; }
    static float4 piece(uint4 unit, ushort i) { return float4(as_type<half4>(i == 0 ? unit.xy : unit.zw)); }

    // 16 bytes a lane.
    static void store(threadgroup const float* from, uint dim, threadgroup uchar* own, threadgroup uchar*,
                      device uchar* cache, device uchar*, bool append, ushort lane) {
        for (uint i = lane; i < dim / 4; i += 32) {
            const half4 stored = half4(((threadgroup const float4*)from)[i]);
            ((threadgroup half4*)own)[i] = stored;
            if (append) {
                ((device half4*)cache)[i] = stored;
            }
        }
    }
};

struct KvQ8_0 {
    static constant constexpr const ushort UNIT = 16;
    static constant constexpr const bool SCALED = true;
    template <typename T>
    static T head(T kv, uint, uint capacity, uint dim, uint head) { return kv + ulong(head) * capacity * dim; }
    // The scales of all heads follow the values of all heads.
    template <typename T>
    static T scales(T kv, uint kv_heads, uint capacity, uint dim, uint head) {
        return kv + ulong(kv_heads) * capacity * dim + ulong(head) * capacity * scale_bytes(dim);
    }
    static uint bytes(uint dim) { return dim; }
    static uint scale_bytes(uint dim) { return (dim + 31) / 32 * 2; }
    // Of a unit of an entry whose scales these are.
    static float scale(device const uchar* scales, uint unit) {
        return float(((device const half*)scales)[unit / 2]);
    }
    static float own_scale(threadgroup const uchar* scales, uint unit) {
        return float(((threadgroup const half*)scales)[unit / 2]);
    }
    static float4 piece(uint4 unit, ushort i) { return float4(as_type<char4>(unit[i])); }

    // 32 values with one scale at a time, a value a lane. The bytes are made with the scale as it is stored.
    static void store(threadgroup const float* from, uint dim, threadgroup uchar* own, threadgroup uchar* own_scales,
                      device uchar* cache, device uchar* cache_scales, bool append, ushort lane) {
        for (uint group = 0; group < (dim + 31) / 32; group++) {
            const uint i = group * 32 + lane;
            const float value = i < dim ? from[i] : 0.0f;
            const half stored = half(simd_max(abs(value)) / 127.0f);
            const float scale = float(stored);
            const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
            const uchar byte = uchar(char(rint(clamp(value * inverse, -127.0f, 127.0f))));
            if (i < dim) {
                own[i] = byte;
                if (append) {
                    cache[i] = byte;
                }
            }
            if (lane == 0) {
                ((threadgroup half*)own_scales)[group] = stored;
                if (append) {
                    ((device half*)cache_scales)[group] = stored;
                }
            }
        }
    }
};
