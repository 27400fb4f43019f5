// The C interface between the three parts of the harness:
//   generated code (kernel.metal after rewrite.rs)  <->  msl_rt.cpp  <->  msl-cpu/src/lib.rs
// lib.rs mirrors the structs by hand (#[repr(C)]): change both together and bump MSL_ABI_VERSION.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define MSL_ABI_VERSION 2
#define MSL_EXPORT __attribute__((visibility("default")))

extern "C" {

// ------------------------------------------------------------------ what a module provides

enum { MSL_PARAM_BUFFER = 0, MSL_PARAM_THREADGROUP = 1, MSL_PARAM_BUILTIN = 2 };

// Builtin kernel inputs ([[thread_position_in_grid]] ...). Order is shared with rewrite.rs.
enum msl_builtin {
    MSL_B_thread_position_in_grid,
    MSL_B_thread_position_in_threadgroup,
    MSL_B_thread_index_in_threadgroup,
    MSL_B_threadgroup_position_in_grid,
    MSL_B_threads_per_grid,
    MSL_B_threads_per_threadgroup,
    MSL_B_dispatch_threads_per_threadgroup,
    MSL_B_threadgroups_per_grid,
    MSL_B_thread_execution_width,
    MSL_B_threads_per_simdgroup,
    MSL_B_simdgroup_index_in_threadgroup,
    MSL_B_thread_index_in_simdgroup,
    MSL_B_simdgroups_per_threadgroup,
    MSL_B_dispatch_simdgroups_per_threadgroup,
    MSL_B_quadgroup_index_in_threadgroup,
    MSL_B_thread_index_in_quadgroup,
    MSL_B_quadgroups_per_threadgroup,
    MSL_B_COUNT
};

struct msl_param {       // one kernel parameter, in declaration order
    uint32_t kind;       // MSL_PARAM_*
    uint32_t index;      // buffer index, threadgroup index or msl_builtin
    uint32_t min_bytes;  // sizeof(T) for `T&` parameters, 0 for pointers
    uint32_t optional;   // carries [[function_constant(x)]]: may stay unbound
    const char* name;
};

struct msl_kernel {
    const char* name;    // host_name, or the function name
    const char* file;
    int line;
    uint32_t max_threads; // [[max_total_threads_per_threadgroup]], 0 if not given
    void (*thunk)();      // runs ONE thread: fetches its arguments and calls the kernel
    const msl_param* params;
    uint32_t n_params;
};

struct msl_module {
    uint32_t abi_version;
    uint32_t checked; // compiled with the memory checks
    const msl_kernel* kernels;
    uint32_t n_kernels;
    uint32_t n_function_constants;
    // stores one [[function_constant(index)]]; returns 0 if the module has no such index
    int (*set_function_constant)(uint32_t index, const void* value, uint32_t size);
    void (*reset_function_constants)();
    void (*refresh_function_constants)(); // recomputes constants derived from others
};

// ------------------------------------------------------------------ what the host passes in

enum { MSL_ARG_BUFFER = 0, MSL_ARG_BYTES = 1, MSL_ARG_THREADGROUP = 2, MSL_ARG_NIL = 3 };

struct msl_arg {
    uint32_t kind;
    uint32_t index;
    uint32_t writable; // copied back to the host after a clean run
    uint32_t skew;     // how far past a multiple of 16 the kernel's pointer lies
    void* ptr;
    uint64_t len;      // bytes
};

// Leniency switches. 0 = strictly what the MSL specification promises.
enum {
    MSL_ALLOW_PARTIAL_BARRIER = 1,  // a barrier releases when every thread waits or has returned
    MSL_ALLOW_DIVERGENT_SIMD = 2,   // lanes may reach different simd ops (lowest line goes first)
    MSL_BARRIER_ALWAYS_FENCES = 4,  // mem_none barriers order memory too (what the GPU does)
    MSL_ALLOW_MISALIGNED = 8,       // accesses below natural alignment, for types up to 8 bytes
    MSL_ALLOW_DEVICE_RACES = 16,    // do not track races on device buffers
    MSL_IN_PLACE = 32,              // work on the host's memory, without copies and guard pages
};

struct msl_options {
    uint32_t flags;
    uint32_t order;        // thread schedule: 0 forward, 1 reverse, 2 shuffled by seed
    uint64_t seed;
    uint32_t stack_bytes;  // per thread; 0 = default
    uint32_t tg_limit;     // threadgroup memory limit in bytes; 0 = 32 KiB
};

struct msl_dispatch {
    uint32_t grid[3];        // threadgroups, or threads when by_threads is set
    uint32_t threadgroup[3]; // threads per threadgroup
    uint32_t by_threads;     // dispatchThreads (ragged edges) instead of dispatchThreadgroups
};

struct msl_report {
    char message[2048]; // "" after a clean run
    uint64_t threads, switches, barriers, simd_ops;
    uint64_t accesses;          // memory accesses that were checked (0 in the fast build)
    uint64_t partial_simd_ops;  // simd ops run with some lanes of the simdgroup already returned
    uint64_t inactive_reads;    // shuffles that read a lane that was not there (result: poison)
    uint64_t same_value_races;  // unordered writes that stored identical bytes
    uint32_t tg_bytes;          // threadgroup memory in use by one threadgroup
    uint32_t checked;           // built with the memory checks?
};

// ------------------------------------------------------------------ runtime calls from a kernel

void* msl_rt_arg(uint32_t i);                    // address for pointer/reference parameter i
void msl_rt_builtin(uint32_t i, uint32_t* xyz);  // value of builtin parameter i
void* msl_rt_tg_var(uint32_t id, size_t size, size_t align, const char* name, int line);
void msl_rt_barrier(int simdgroup_only, unsigned mem_flags, const char* file, int line);
// Publishes `size` bytes for the calling lane and waits for the others. Returns the 32 slots
// (stride MSL_SLOT bytes; a lane's slot is only meaningful if its bit in *mask is set).
enum { MSL_SLOT = 64 };
const unsigned char* msl_rt_exchange(int op, const void* value, size_t size, uint64_t* mask,
                                     uint32_t* lane, const char* file, int line);
void msl_rt_note_inactive_read(void);
void msl_rt_atomic(void* address, size_t size, int is_write); // bounds check for an atomic

// exported by every compiled module
extern MSL_EXPORT const msl_module msl_module_table;
MSL_EXPORT int msl_launch(const char* kernel, const msl_arg* args, uint32_t n_args, const msl_dispatch* d,
               const msl_options* o, msl_report* r);
}
