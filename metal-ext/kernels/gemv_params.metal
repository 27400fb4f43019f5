// What a matrix-vector product is told. Sizes are in values and strides in values of x and y, but in bytes for matrices.
struct GemvParams {
    uint k; // Columns of the matrices: values of an input row.
    uint n0; // Rows of the first matrix.
    uint n1; // Rows of the second, 0 without one.
    uint n2; // Rows of the third, 0 without one.
    uint rows; // Input rows.
    uint stride_x; // Values from one input row to the next, a multiple of 4.
    uint stride_y; // Values from one output row to the next.
    uint stride_w; // Bytes from one row of a matrix to the next.
    uint scales0; // Bytes from the start of the first matrix to its scales, where the format keeps them apart.
    uint scales1; // The same of the second.
    uint scales2; // The same of the third.
    uint stride_scales; // Bytes from one row's scales to the next.
    float eps; // Of the norm.
    float multiplier; // Of what is added to y.
};
