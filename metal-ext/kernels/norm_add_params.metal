// What a norm of a branch before its addition is told; sizes and strides in values.
struct NormAddParams {
    uint width; // Values of a row.
    uint stride_branch; // From one row of the branch to the next.
    uint stride_y; // From one row of y to the next.
    float eps; // Of the norm.
    float multiplier; // Of what is added to y.
};
