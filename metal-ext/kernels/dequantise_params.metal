// What widening a packed matrix is told.
struct DequantiseParams {
    uint n; // Rows of the matrix.
    uint k; // Columns of the matrix, and values from one output row to the next.
    uint stride_w; // Bytes from one row of the matrix to the next.
    uint scales; // Bytes from the start of the matrix to its scales, where the format keeps them apart.
    uint stride_scales; // Bytes from one row's scales to the next.
    uint rows; // Output rows.
    float multiplier; // Of every value.
};
