// What a softmax is told; sizes and strides in values.
struct SoftmaxParams {
    uint width; // Values of a row.
    uint stride_x; // From one row of x to the next.
    uint stride_y; // From one row of y to the next.
    float scale; // On the values, before.
};
