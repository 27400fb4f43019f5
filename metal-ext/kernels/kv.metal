// How keys and values are stored, 16 bytes at a time: a "unit". src/kv.rs has the layout.

struct KvF16 {
    static constant constexpr const ushort UNIT = 8; // values
    static constant constexpr const bool SCALED = false;
    template <typename T>
    static T head(T kv, uint, uint capacity, uint dim, uint head) { return kv + ulong(head) * capacity * dim * 2; }
    template <typename T>
    static T scales(T kv, uint, uint, uint, uint) { return kv; }
    static uint bytes(uint dim) { return dim * 2; }
    static float scale(device const uchar*, uint, uint, uint) { return 1.0f; }
    static float4 piece(uint4 unit, ushort i) { return float4(as_type<half4>(i == 0 ? unit.xy : unit.zw)); }
};

struct KvQ8_0 {
    static constant constexpr const ushort UNIT = 16;
    static constant constexpr const bool SCALED = true;
    template <typename T>
    static T head(T kv, uint, uint capacity, uint dim, uint head) { return kv + ulong(head) * capacity * dim; }
    // The scales of all heads follow the values of all heads.
    template <typename T>
    static T scales(T kv, uint kv_heads, uint capacity, uint dim, uint head) {
        return kv + ulong(kv_heads) * capacity * dim + ulong(head) * capacity * ((dim + 31) / 32) * 2;
    }
    static uint bytes(uint dim) { return dim; }
    // Of a unit of a position.
    static float scale(device const uchar* scales, uint position, uint dim, uint unit) {
        return float(((device const half*)scales)[ulong(position) * ((dim + 31) / 32) + unit / 2]);
    }
    static float4 piece(uint4 unit, ushort i) { return float4(as_type<char4>(unit[i])); }
};
