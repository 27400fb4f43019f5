// A row of an attention dispatch.
struct AttendRow {
    uint first; // First position that the row sees.
    uint end; // Position behind the last one that it sees, which is its own.
    uint span; // Positions that a threadgroup takes.
    uint splits; // Threadgroups that share the row's positions.
    uint base; // Where in the regions of keys and of values the sequence begins, in units of 16 bytes.
    uint capacity; // Positions that the sequence has room for.
    uint angles; // Row of the tables of cos and sin.
};

// What an attention dispatch is told; strides in values.
struct AttendParams {
    uint kv_heads; // Key and value heads.
    uint group; // Query heads that share a key head.
    uint parts; // Threadgroups that share the query heads of a key head.
    uint part_heads; // Query heads of a threadgroup, the last of a key head may have fewer.
    uint tiles; // Simdgroups that share the query heads of a threadgroup.
    uint rotary_dim; // Leading values of a head that are rotated, even.
    uint stride_qkv; // From one row of q, k and v to the next.
    uint stride_y; // From one row of y to the next.
    uint most_splits; // Of any row: room for partial results.
    float eps; // Of the norms.
    float scale; // On the scores.
    float softcap; // Scores become softcap * tanh(score / softcap).
};
