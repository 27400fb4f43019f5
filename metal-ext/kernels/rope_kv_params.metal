// A row of a rope_kv dispatch.
struct RopeKvRow {
    uint position; // Where in its sequence the row stands.
    uint angles; // Row of the tables of cos and sin.
    uint base; // Where in the regions of keys and of values the sequence begins, in units of 16 bytes.
    uint capacity; // Positions that the sequence has room for.
};

// What a rope_kv dispatch is told; sizes and strides in values.
struct RopeKvParams {
    uint heads; // Query heads.
    uint kv_heads; // Key and value heads.
    uint head_dim; // A multiple of 16.
    uint rotary_dim; // Leading values of a head that are rotated, even.
    uint stride_qkv; // From one row of q, k and v to the next.
    uint stride_q; // From one row of rotated q to the next.
    float eps; // Of the norms.
};
