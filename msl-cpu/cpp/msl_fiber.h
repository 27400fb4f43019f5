// Switching between fibers: a stack, the callee-saved registers, and nothing else.
#pragma once
#include <stdint.h>

#if defined(__x86_64__) && !defined(MSL_UCONTEXT)
extern "C" void msl_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
.globl msl_switch
.hidden msl_switch
.type msl_switch,@function
msl_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    stmxcsr (%rsp)
    fnstcw 4(%rsp)
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    ldmxcsr (%rsp)
    fldcw 4(%rsp)
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size msl_switch,.-msl_switch
)");
typedef void* Context;
static void context_switch(Context& from, Context& to) { msl_switch(&from, to); }
static void context_init(Context& c, char* lo, char* hi, void (*entry)()) {
    (void)lo;
    uintptr_t* top = (uintptr_t*)((uintptr_t)hi & ~(uintptr_t)15);
    top[-1] = 0;
    top[-2] = (uintptr_t)entry; // popped by `ret`, which leaves the ABI's stack alignment
    uintptr_t* sp = top - 9;
    for (int i = 1; i < 7; i++) sp[i] = 0;
    uint32_t mxcsr;
    uint16_t fcw;
    asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(mxcsr), "=m"(fcw));
    sp[0] = mxcsr | (uintptr_t)fcw << 32;
    c = sp;
}
#else // any other POSIX machine: slower (two system calls per switch) but portable
#include <ucontext.h>
typedef ucontext_t Context;
static void context_switch(Context& from, Context& to) { swapcontext(&from, &to); }
static void context_init(Context& c, char* lo, char* hi, void (*entry)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = lo;
    c.uc_stack.ss_size = hi - lo;
    c.uc_link = nullptr;
    makecontext(&c, entry, 0);
}
#endif
