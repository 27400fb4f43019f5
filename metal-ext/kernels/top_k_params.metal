// What a search for the greatest values is told.
struct TopKParams {
    uint n; // Values of a row.
    uint stride; // Values from one row to the next.
    uint k; // How many are wanted, at most n.
    uint lists; // Pieces of a row, each of which is searched first.
};
