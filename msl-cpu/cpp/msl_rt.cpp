// Runtime of the CPU harness: runs a kernel one threadgroup at a time, every GPU thread a fiber
// on the calling OS thread, and checks it while it runs.
//
//  * Scheduling. A fiber runs until it reaches a simdgroup operation or a barrier, or returns.
//    When every lane of a simdgroup is stopped, the operation they stopped at is resolved; when
//    every simdgroup is stopped at the threadgroup barrier, the barrier is. Stopping at different
//    places is divergence and is reported with both source lines.
//  * Memory checks (checked build only). The kernel is compiled with -fsanitize=thread but NOT
//    linked with libtsan: the __tsan_* calls the compiler inserts before every load and store
//    land here. They give exact bounds checks on buffers and threadgroup variables, data races
//    (per byte, with barrier epochs), and reads of uninitialised threadgroup memory.
//    -fsanitize=alignment,bounds works the same way through the __ubsan_* handlers below.
//  * Threadgroup memory is filled with 0xff (a NaN in half, bfloat and float) for every group.
#include "msl_abi.h"
#include "msl_fiber.h"

#include <dlfcn.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>


// ---------------------------------------------------------------------------- data structures

namespace {

constexpr uint32_t WIDTH = 32;            // lanes per simdgroup
constexpr size_t PAGE = 4096;
constexpr size_t GUARD = 64 * 1024;       // unmapped on both sides of every buffer
constexpr size_t ARENA = 1 << 20;         // threadgroup memory, with gaps between variables
constexpr size_t GAP = 4096;
constexpr uint32_t TG_ARGS = 32;          // [[threadgroup(n)]] indices below this
constexpr size_t RACE_LIMIT = 1 << 20;    // device buffers up to this size get race tracking
constexpr uint32_t STEP_LIMIT = 1u << 28; // checked accesses between two stops: an endless loop?

enum State : uint8_t { READY, AT_SIMD, AT_SIMD_BARRIER, AT_BARRIER, DONE };
const char* const op_name[] = {"simdgroup_barrier", "simd reduction", "simd shuffle",
                               "simd vote", "simdgroup matrix operation", "quad operation"};
constexpr int OP_QUAD = 5;
enum : unsigned { MEM_DEVICE = 1, MEM_THREADGROUP = 2 };

struct Exchange { // the values published for one resolved simdgroup operation
    unsigned char slots[WIDTH * MSL_SLOT];
    uint64_t mask;
    uint32_t users; // lanes that still have to read it
};

struct Fiber {
    Context context;
    uintptr_t lo, hi; // stack
    State state;
    uint32_t tid, sg, lane, pos[3];
    const char* file; // where it is stopped
    int line, op;
    unsigned flags;
    size_t size;
    Exchange* exchange;
    unsigned char payload[MSL_SLOT];
};

struct Access { // one remembered access to one byte
    uint32_t tid1; // thread in threadgroup + 1; 0 = none
    uint32_t group;
    uint32_t fence, sg_fence, exec; // epochs at the time
    const void* pc;
};
struct Shadow { Access write, read[2]; };

struct Buffer {
    char *map, *data; // data is placed so that its end touches the guard page
    size_t map_len, len;
    uint32_t index;
    bool writable, in_place;
    void* host;
    Shadow* shadow;
    const char* name;
};

struct TgVar { char* data; size_t size; const char* name; int line; };

struct Map { // an anonymous mapping that frees itself
    char* p = nullptr;
    size_t n = 0;
    void reserve(size_t bytes) {
        if (bytes <= n) return;
        release();
        void* m = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (m == MAP_FAILED) { perror("msl: mmap"); abort(); }
        p = (char*)m;
        n = bytes;
    }
    void release() { if (p) munmap(p, n); p = nullptr; n = 0; }
    ~Map() { release(); }
};

std::string lanes(uint64_t m) { // "0-15,31"
    std::string s;
    for (uint32_t i = 0; i < 64; i++) {
        if (!(m >> i & 1)) continue;
        uint32_t j = i;
        while (j + 1 < 64 && (m >> (j + 1) & 1)) j++;
        s += (s.empty() ? "" : ",") + std::to_string(i);
        if (j > i) s += "-" + std::to_string(j);
        i = j;
    }
    return s;
}

const char* base(const char* path) {
    const char* s = path ? strrchr(path, '/') : nullptr;
    return s ? s + 1 : path ? path : "?";
}

// file:line of a code address in this module, through addr2line (only ever run to report an
// error). Of the inlined frames, the innermost one that is not in the shim.
std::string locate(const void* pc) {
    Dl_info d;
    if (!pc || !dladdr(pc, &d) || !d.dli_fname) return "";
    const size_t off = (size_t)((const char*)pc - (const char*)d.dli_fbase);
    char text[1400];
    snprintf(text, sizeof text, "addr2line -i -e '%s' 0x%zx 2>/dev/null", d.dli_fname, off - 1);
    std::string s;
    if (FILE* f = popen(text, "r")) {
        while (fgets(text, sizeof text, f)) {
            text[strcspn(text, "\n")] = 0;
            if (char* note = strstr(text, " (")) *note = 0; // "(discriminator 3)"
            if (s.empty() && text[0] != '?' && !strstr(text, "msl_stdlib.h:")) s = base(text);
        }
        pclose(f);
    }
    if (s.empty()) {
        snprintf(text, sizeof text, "%s+0x%zx", base(d.dli_fname), off);
        s = text;
    }
    return s;
}

// ---------------------------------------------------------------------------- one launch

struct Launch {
    const msl_kernel* kernel;
    const msl_dispatch* dispatch;
    msl_options opt;
    msl_report* report;

    std::vector<Buffer> buffers;
    Buffer* last = nullptr;
    std::vector<void*> args;

    // the running threadgroup
    uint32_t group_pos[3], groups[3], size[3], grid_threads[3], group = 0;
    uint32_t n_threads = 0, n_sg = 0;
    std::vector<Fiber> fibers;
    Fiber* cur = nullptr;
    Context main;
    uint64_t rng = 0;
    uint32_t steps = 0;

    // epochs: bumped by barriers, compared by the race detector
    uint32_t exec = 1, tg_fence = 1, dev_fence = 1;
    std::vector<uint32_t> sg_exec, sg_tg_fence, sg_dev_fence;

    std::vector<TgVar> tg_vars; // [[threadgroup(n)]] arguments at n, declarations at id + TG_ARGS
    size_t arena_used = 0, tg_bytes = 0;
    std::vector<std::unique_ptr<Exchange>> pool;
    std::vector<Exchange*> free_exchanges;

    bool failed = false;
    const void *pc1 = nullptr, *pc2 = nullptr; // code addresses to append to the message

    struct { char* p = nullptr; size_t n = 0; unsigned char old[64]; const void *pc, *other_pc; uint32_t other; bool tg; } pending;

    // ---- failure
    __attribute__((format(printf, 2, 3))) void fail(const char* fmt, ...);
    std::string who(const Fiber* f) const {
        char b[160];
        snprintf(b, sizeof b, "thread %u (simdgroup %u lane %u) of threadgroup (%u,%u,%u)", f->tid, f->sg, f->lane, group_pos[0], group_pos[1], group_pos[2]);
        return b;
    }

    // ---- scheduling
    bool setup(const msl_arg* a, uint32_t n);
    void run();
    void run_group();
    void run_fiber(Fiber& f);
    bool resolve_simdgroup(uint32_t sg);
    void resolve_barrier();
    void stop(State s);
    void permute(std::vector<uint32_t>& v, uint32_t n);

    // ---- memory
    bool finish_buffers();
    char* tg_alloc(uint32_t id, size_t n, size_t align, const char* name, int line);
    void access(uintptr_t p, size_t n, bool write, const void* pc);
    void race(Shadow* s, size_t n, bool write, bool tg, char* p, const void* pc);
    void report_race(const Access& a, bool write, bool was_write, bool tg, char* p, const void* pc);
    void settle();
    std::string describe(const char* p) const;
};

thread_local Launch* L = nullptr;
thread_local Map stacks, arena, tg_shadow, tg_init;
thread_local size_t stack_size = 0;

void Launch::fail(const char* fmt, ...) {
    if (!failed) {
        failed = true;
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(report->message, sizeof report->message, fmt, ap);
        va_end(ap);
    }
    if (cur) { // abandon the fiber; run_group() sees `failed` and abandons the rest
        Fiber* f = cur;
        cur = nullptr;
        context_switch(f->context, main);
    }
}

void fiber_main() {
    L->kernel->thunk();
    L->stop(DONE);
}

void Launch::stop(State s) {
    Fiber* f = cur;
    settle();
    f->state = s;
    cur = nullptr;
    context_switch(f->context, main);
}

void Launch::run_fiber(Fiber& f) {
    cur = &f;
    steps = 0;
    report->switches++;
    context_switch(main, f.context);
}

void Launch::permute(std::vector<uint32_t>& v, uint32_t n) {
    v.resize(n);
    for (uint32_t i = 0; i < n; i++) v[i] = opt.order == 1 ? n - 1 - i : i;
    if (opt.order == 2)
        for (uint32_t i = n; i > 1; i--) {
            rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
            std::swap(v[i - 1], v[rng % i]);
        }
}

void Launch::run() {
    const uint64_t total = (uint64_t)groups[0] * groups[1] * groups[2];
    std::vector<uint32_t> order;
    permute(order, (uint32_t)total);
    for (uint32_t g : order) {
        group = g;
        group_pos[0] = g % groups[0];
        group_pos[1] = g / groups[0] % groups[1];
        group_pos[2] = g / groups[0] / groups[1];
        for (int d = 0; d < 3; d++) {
            size[d] = dispatch->threadgroup[d];
            if (dispatch->by_threads) // the last group of a row may be smaller
                size[d] = std::min(size[d], grid_threads[d] - group_pos[d] * size[d]);
        }
        run_group();
        if (failed) return;
    }
}

void Launch::run_group() {
    n_threads = size[0] * size[1] * size[2];
    n_sg = (n_threads + WIDTH - 1) / WIDTH;
    exec++, tg_fence++, dev_fence++; // threadgroup memory starts afresh
    sg_exec.assign(n_sg, 1), sg_tg_fence.assign(n_sg, 1), sg_dev_fence.assign(n_sg, 1);
    for (const TgVar& v : tg_vars)
        if (v.data) memset(v.data, 0xff, v.size);
    fibers.resize(n_threads);
    for (uint32_t t = 0; t < n_threads; t++) {
        Fiber& f = fibers[t];
        f.tid = t, f.sg = t / WIDTH, f.lane = t % WIDTH, f.state = READY, f.exchange = nullptr;
        f.pos[0] = t % size[0], f.pos[1] = t / size[0] % size[1], f.pos[2] = t / size[0] / size[1];
        f.lo = (uintptr_t)stacks.p + t * (stack_size + PAGE) + PAGE;
        f.hi = f.lo + stack_size;
        context_init(f.context, (char*)f.lo, (char*)f.hi, fiber_main);
    }
    report->threads += n_threads;
    std::vector<uint32_t> sg_order, lane_order;
    permute(sg_order, n_sg);
    permute(lane_order, WIDTH);
    for (;;) {
        for (uint32_t sg : sg_order) {
            do {
                for (uint32_t l : lane_order) {
                    const uint32_t t = sg * WIDTH + l;
                    if (t < n_threads && fibers[t].state == READY) run_fiber(fibers[t]);
                    if (failed) return;
                }
            } while (resolve_simdgroup(sg));
            if (failed) return;
        }
        if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == DONE; })) return;
        resolve_barrier();
        if (failed) return;
    }
}

// All lanes of the simdgroup are stopped. Lets the ones at a simd operation go on; false if none.
bool Launch::resolve_simdgroup(uint32_t sg) {
    Fiber* f = &fibers[sg * WIDTH];
    const uint32_t n = std::min(WIDTH, n_threads - sg * WIDTH);
    uint64_t waiting = 0, at_barrier = 0;
    for (uint32_t l = 0; l < n; l++) {
        if (f[l].state == AT_SIMD || f[l].state == AT_SIMD_BARRIER) waiting |= 1ull << l;
        if (f[l].state == AT_BARRIER) at_barrier |= 1ull << l;
    }
    if (!waiting) return false;
    auto same = [&](const Fiber& a, const Fiber& b) {
        return a.state == b.state && a.op == b.op && a.line == b.line && a.size == b.size && !strcmp(a.file, b.file);
    };
    auto site = [&](const Fiber& a) {
        const char* what = a.state == AT_BARRIER ? "threadgroup_barrier" : op_name[a.state == AT_SIMD ? a.op : 0];
        return std::string(what) + " (" + base(a.file) + ":" + std::to_string(a.line) + ")";
    };
    while (waiting) {
        uint32_t lead = (uint32_t)__builtin_ctzll(waiting);
        if (opt.flags & MSL_ALLOW_DIVERGENT_SIMD) // approximate reconvergence: earliest line first
            for (uint32_t l = 0; l < n; l++)
                if ((waiting >> l & 1) && f[l].line < f[lead].line) lead = l;
        uint64_t mask = 0;
        for (uint32_t l = 0; l < n; l++)
            if ((waiting >> l & 1) && same(f[l], f[lead])) mask |= 1ull << l;
        uint64_t others = (waiting | at_barrier) & ~mask;
        if (others && f[lead].state == AT_SIMD && f[lead].op == OP_QUAD) { // only its own quad must agree
            uint64_t quads = 0;
            for (uint32_t q = 0; q < WIDTH; q += 4)
                if (mask >> q & 15) quads |= 15ull << q;
            others &= quads;
        }
        if (others && !(opt.flags & MSL_ALLOW_DIVERGENT_SIMD)) {
            const Fiber& o = f[__builtin_ctzll(others)];
            uint64_t om = 0;
            for (uint32_t l = 0; l < n; l++)
                if ((others >> l & 1) && same(f[l], o)) om |= 1ull << l;
            fail("divergence in simdgroup %u of threadgroup (%u,%u,%u): lanes %s are at %s, lanes %s at %s", sg, group_pos[0], group_pos[1], group_pos[2],
                 lanes(mask).c_str(), site(f[lead]).c_str(), lanes(om).c_str(), site(o).c_str());
            return false;
        }
        if (f[lead].state == AT_SIMD_BARRIER) {
            report->barriers++;
            const bool always = opt.flags & MSL_BARRIER_ALWAYS_FENCES;
            sg_exec[sg]++;
            if (always || (f[lead].flags & MEM_THREADGROUP)) sg_tg_fence[sg]++;
            if (always || (f[lead].flags & MEM_DEVICE)) sg_dev_fence[sg]++;
        } else {
            report->simd_ops++;
            if ((uint32_t)__builtin_popcountll(mask) != n) report->partial_simd_ops++;
            Exchange* x;
            if (free_exchanges.empty()) {
                pool.emplace_back(new Exchange);
                x = pool.back().get();
            } else {
                x = free_exchanges.back();
                free_exchanges.pop_back();
            }
            x->mask = mask;
            x->users = (uint32_t)__builtin_popcountll(mask);
            for (uint32_t l = 0; l < n; l++)
                if (mask >> l & 1) {
                    memcpy(x->slots + l * MSL_SLOT, f[l].payload, f[l].size);
                    f[l].exchange = x;
                }
        }
        for (uint32_t l = 0; l < n; l++)
            if (mask >> l & 1) f[l].state = READY;
        waiting &= ~mask;
        if (opt.flags & MSL_ALLOW_DIVERGENT_SIMD) break; // let this group run before the next
    }
    return true;
}

// Every thread is either at a threadgroup barrier or done.
void Launch::resolve_barrier() {
    const Fiber* first = nullptr;
    uint32_t waiting = 0;
    for (const Fiber& f : fibers)
        if (f.state == AT_BARRIER) {
            waiting++;
            if (!first) first = &f;
        }
    for (const Fiber& f : fibers) {
        if (f.state == AT_BARRIER && (f.line != first->line || strcmp(f.file, first->file))) {
            fail("divergent threadgroup_barrier: thread %u waits at %s:%d, %s at %s:%d", first->tid, base(first->file), first->line, who(&f).c_str(), base(f.file), f.line);
            return;
        }
        if (f.state == DONE && !(opt.flags & MSL_ALLOW_PARTIAL_BARRIER)) {
            fail("threadgroup_barrier (%s:%d) not reached by all threads: %u of %u wait there, but %s has returned", base(first->file), first->line, waiting, n_threads, who(&f).c_str());
            return;
        }
    }
    report->barriers++;
    const bool always = opt.flags & MSL_BARRIER_ALWAYS_FENCES;
    exec++;
    if (always || (first->flags & MEM_THREADGROUP)) tg_fence++;
    if (always || (first->flags & MEM_DEVICE)) dev_fence++;
    for (Fiber& f : fibers)
        if (f.state == AT_BARRIER) f.state = READY;
}

// ---------------------------------------------------------------------------- arguments

bool Launch::setup(const msl_arg* a, uint32_t n) {
    const msl_kernel& k = *kernel;
    for (int d = 0; d < 3; d++) {
        const uint32_t g = dispatch->grid[d], t = dispatch->threadgroup[d];
        if (!g || !t) return fail("empty grid or threadgroup"), false;
        groups[d] = dispatch->by_threads ? (g + t - 1) / t : g;
        grid_threads[d] = dispatch->by_threads ? g : g * t;
    }
    const uint64_t per_group = (uint64_t)dispatch->threadgroup[0] * dispatch->threadgroup[1] * dispatch->threadgroup[2];
    const uint32_t max = k.max_threads ? k.max_threads : 1024;
    if (per_group > max) return fail("%s: %llu threads per threadgroup, the limit is %u", k.name, (unsigned long long)per_group, max), false;
    rng = opt.seed * 2 + 0x9e3779b97f4a7c15ull;

    const size_t want = opt.stack_bytes ? (opt.stack_bytes + PAGE - 1) / PAGE * PAGE : 128 * 1024;
    if (want != stack_size || stacks.n < per_group * (want + PAGE)) { // pooled across launches
        stacks.release();
        stacks.reserve(per_group * (want + PAGE));
        stack_size = want;
        for (uint64_t t = 0; t < per_group; t++) mprotect(stacks.p + t * (want + PAGE), PAGE, PROT_NONE);
    }
    arena.reserve(ARENA);
    tg_shadow.reserve(ARENA * sizeof(Shadow));
    tg_init.reserve(ARENA * sizeof(uint32_t));

    for (uint32_t i = 0; i < n; i++) {
        bool known = false;
        for (uint32_t p = 0; p < k.n_params; p++)
            known |= k.params[p].index == a[i].index && k.params[p].kind == (a[i].kind == MSL_ARG_THREADGROUP ? (uint32_t)MSL_PARAM_THREADGROUP : (uint32_t)MSL_PARAM_BUFFER);
        if (!known) return fail("%s has no %s(%u)", k.name, a[i].kind == MSL_ARG_THREADGROUP ? "threadgroup" : "buffer", a[i].index), false;
    }
    buffers.reserve(n);
    args.assign(k.n_params, nullptr);
    for (uint32_t p = 0; p < k.n_params; p++) {
        const msl_param& q = k.params[p];
        if (q.kind == MSL_PARAM_BUILTIN) continue;
        const msl_arg* m = nullptr;
        for (uint32_t i = 0; i < n; i++)
            if (a[i].index == q.index && (a[i].kind == MSL_ARG_THREADGROUP) == (q.kind == MSL_PARAM_THREADGROUP)) m = &a[i];
        if (!m || m->kind == MSL_ARG_NIL) {
            if (!m && !q.optional) return fail("%s: %s(%u) `%s` is not bound", k.name, q.kind == MSL_PARAM_THREADGROUP ? "threadgroup" : "buffer", q.index, q.name), false;
            continue;
        }
        if (q.kind == MSL_PARAM_THREADGROUP) {
            if (!m->len || m->len % 16) return fail("%s: threadgroup(%u) length %llu is not a positive multiple of 16", k.name, q.index, (unsigned long long)m->len), false;
            args[p] = tg_alloc(q.index, m->len, 16, q.name, k.line);
            if (failed) return false;
            continue;
        }
        if (m->len < q.min_bytes) return fail("%s: buffer(%u) `%s` holds %llu bytes, the kernel expects %u", k.name, q.index, q.name, (unsigned long long)m->len, q.min_bytes), false;
        Buffer b{};
        if ((opt.flags & MSL_IN_PLACE) && m->kind == MSL_ARG_BUFFER) {
            if ((uintptr_t)m->ptr % 4) return fail("buffer(%u) `%s` does not begin at a multiple of 4", q.index, q.name), false;
            b.map = b.data = (char*)m->ptr;
            b.map_len = b.len = m->len, b.index = q.index, b.writable = m->writable, b.name = q.name, b.in_place = true;
            buffers.push_back(b);
            args[p] = b.data;
            continue;
        }
        // Own copy between guard pages, its end against the upper one as closely as its alignment allows.
        const size_t skew = m->skew % 16, whole = (m->len + skew + 15) / 16 * 16;
        const size_t body = (whole + PAGE - 1) / PAGE * PAGE;
        b.map_len = body + 2 * GUARD;
        b.map = (char*)mmap(nullptr, b.map_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (b.map == (char*)MAP_FAILED) return fail("out of memory for buffer(%u)", q.index), false;
        mprotect(b.map, GUARD, PROT_NONE);
        mprotect(b.map + GUARD + body, GUARD, PROT_NONE);
        memset(b.map + GUARD + body - whole, 0xff, whole);
        b.data = b.map + GUARD + body - whole + skew;
        memcpy(b.data, m->ptr, m->len);
        b.len = m->len, b.index = q.index, b.writable = m->writable, b.host = m->ptr, b.name = q.name;
        buffers.push_back(b);
        if (b.writable && b.len <= RACE_LIMIT && !(opt.flags & MSL_ALLOW_DEVICE_RACES)) {
            void* s = mmap(nullptr, b.len * sizeof(Shadow), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            buffers.back().shadow = s == MAP_FAILED ? nullptr : (Shadow*)s;
        }
        args[p] = b.data;
    }
    return true;
}

bool Launch::finish_buffers() {
    for (Buffer& b : buffers) {
        if (b.in_place) continue;
        if (b.writable && !failed) memcpy(b.host, b.data, b.len);
        if (b.shadow) munmap(b.shadow, b.len * sizeof(Shadow));
        munmap(b.map, b.map_len);
    }
    return !failed;
}

char* Launch::tg_alloc(uint32_t id, size_t n, size_t align, const char* name, int line) {
    if (tg_vars.size() <= id) tg_vars.resize(id + 1);
    TgVar& v = tg_vars[id];
    if (v.data && v.size != n) fail("`%s` (line %d) has two sizes in one kernel", name, line);
    if (v.data) return v.data;
    const size_t limit = opt.tg_limit ? opt.tg_limit : 32768, al = std::max<size_t>(align, 16);
    tg_bytes = (tg_bytes + 15) / 16 * 16 + n;
    const size_t at = (arena_used + GAP + al - 1) / al * al;
    if (tg_bytes > limit || at + n + GAP > ARENA) {
        fail("`%s` (line %d) brings threadgroup memory to %zu bytes, the limit is %zu", name, line, tg_bytes, limit);
        return nullptr;
    }
    arena_used = at + n;
    report->tg_bytes = (uint32_t)tg_bytes;
    v = TgVar{arena.p + at, n, name, line};
    memset(v.data, 0xff, n);
    // this part of the arena may have been used by an earlier launch
    memset(tg_shadow.p + at * sizeof(Shadow), 0, n * sizeof(Shadow));
    memset(tg_init.p + at * sizeof(uint32_t), 0, n * sizeof(uint32_t));
    return v.data;
}

// ---------------------------------------------------------------------------- memory checks

// The module's own image: constant tables and function constants may be read from there.
bool in_image(uintptr_t p) {
    static const std::vector<std::pair<uintptr_t, uintptr_t>> ranges = [] {
        std::vector<std::pair<uintptr_t, uintptr_t>> r;
        dl_iterate_phdr([](dl_phdr_info* i, size_t, void* out) {
            auto& v = *(std::vector<std::pair<uintptr_t, uintptr_t>>*)out;
            bool mine = false;
            for (int pass = 0; pass < 2; pass++)
                for (int k = 0; k < i->dlpi_phnum; k++) {
                    const auto& h = i->dlpi_phdr[k];
                    if (h.p_type != PT_LOAD) continue;
                    const uintptr_t lo = i->dlpi_addr + h.p_vaddr;
                    if (pass == 0) mine |= (uintptr_t)&in_image - lo < h.p_memsz;
                    else if (mine) v.emplace_back(lo, lo + h.p_memsz);
                }
            return 0;
        }, &r);
        return r;
    }();
    for (auto& r : ranges)
        if (p >= r.first && p < r.second) return true;
    return false;
}

std::string Launch::describe(const char* p) const { // names the object nearest to an address
    char b[256];
    for (const Buffer& x : buffers)
        if ((uintptr_t)(p - x.map) < x.map_len) {
            const long off = (long)(p - x.data);
            if (off < 0) snprintf(b, sizeof b, "%ld bytes before the start of buffer(%u) `%s` (%zu bytes)", -off, x.index, x.name, x.len);
            else if ((size_t)off >= x.len) snprintf(b, sizeof b, "%ld bytes past the end of buffer(%u) `%s` (%zu bytes)", off - (long)x.len, x.index, x.name, x.len);
            else snprintf(b, sizeof b, "byte %ld of buffer(%u) `%s` (%zu bytes)", off, x.index, x.name, x.len);
            return b;
        }
    const TgVar* best = nullptr;
    auto distance = [p](const TgVar& v) { return p < v.data ? v.data - p : std::max<long>(p - v.data - (long)v.size + 1, 0); };
    for (const TgVar& v : tg_vars)
        if (v.data && (!best || distance(v) < distance(*best))) best = &v;
    if ((uintptr_t)(p - arena.p) < ARENA && best) {
        const long off = (long)(p - best->data);
        if (off < 0) snprintf(b, sizeof b, "%ld bytes before the start of threadgroup `%s` (%zu bytes)", -off, best->name, best->size);
        else if ((size_t)off >= best->size) snprintf(b, sizeof b, "%ld bytes past the end of threadgroup `%s` (%zu bytes)", off - (long)best->size, best->name, best->size);
        else snprintf(b, sizeof b, "byte %ld of threadgroup `%s` (%zu bytes)", off, best->name, best->size);
        return b;
    }
    snprintf(b, sizeof b, "address %p, which is no buffer bound to this kernel", (const void*)p);
    return b;
}

void Launch::access(uintptr_t a, size_t n, bool write, const void* pc) {
    report->accesses++;
    if (pending.n) settle();
    Fiber* f = cur;
    if (++steps == STEP_LIMIT) {
        pc1 = pc;
        fail("%s does not come to an end (or waits for another thread, which cannot work here)", who(f).c_str());
    }
    if (a >= f->lo && a < f->hi) return; // private memory
    char* p = (char*)a;
    const char* verb = write ? "writes" : "reads";
    Buffer* b = last;
    if (!b || a - (uintptr_t)b->map >= b->map_len) {
        b = nullptr;
        for (Buffer& x : buffers)
            if (a - (uintptr_t)x.map < x.map_len) b = &x;
        if (b) last = b;
    }
    if (b) {
        const size_t off = (size_t)(p - b->data);
        if (off > b->len || n > b->len - off) {
            pc1 = pc;
            fail("out of bounds: %s %s %zu bytes at %s", who(f).c_str(), verb, n, describe(p).c_str());
        }
        if (write && !b->writable) {
            pc1 = pc;
            fail("%s writes to %s, which the host bound as read-only", who(f).c_str(), describe(p).c_str());
        }
        if (b->shadow) race(b->shadow + off, n, write, false, p, pc);
        return;
    }
    const size_t off = a - (uintptr_t)arena.p;
    if (off < ARENA) {
        const TgVar* v = nullptr;
        for (const TgVar& x : tg_vars)
            if (x.data && a - (uintptr_t)x.data < x.size) v = &x;
        if (!v || n > v->size - (a - (uintptr_t)v->data)) {
            pc1 = pc;
            fail("out of bounds: %s %s %zu bytes at %s", who(f).c_str(), verb, n, describe(p).c_str());
        }
        uint32_t* init = (uint32_t*)tg_init.p + off;
        if (write) {
            for (size_t i = 0; i < n; i++) init[i] = group + 1;
        } else {
            bool any = false; // padding inside a struct may stay unset
            for (size_t i = 0; i < n; i++) any |= init[i] == group + 1;
            if (!any) {
                pc1 = pc;
                fail("%s reads uninitialised threadgroup memory: %s", who(f).c_str(), describe(p).c_str());
            }
        }
        race((Shadow*)tg_shadow.p + off, n, write, true, p, pc);
        return;
    }
    if (!write && in_image(a)) return;
    for (const auto& x : pool)
        if (a - (uintptr_t)x.get() < sizeof(Exchange)) return; // a lane reading its neighbours' values
    pc1 = pc;
    if (a < 65536) fail("null pointer: %s %s address %#zx (an argument that is not bound?)", who(f).c_str(), verb, (size_t)a);
    if (a - (uintptr_t)stacks.p < stacks.n) fail("%s %s another thread's private memory", who(f).c_str(), verb);
    fail("out of bounds: %s %s %zu bytes at %s", who(f).c_str(), verb, n, describe(p).c_str());
}

// Race detection. Two accesses to a byte, at least one a write, by different threads are ordered
// only if a threadgroup barrier that fences this kind of memory lies between them, or, within one
// simdgroup, such a simdgroup barrier. Nothing orders different threadgroups.
void Launch::race(Shadow* s, size_t n, bool write, bool tg, char* p, const void* pc) {
    const Fiber* f = cur;
    const uint32_t fence = tg ? tg_fence : dev_fence;
    const std::vector<uint32_t>& sgf = tg ? sg_tg_fence : sg_dev_fence;
    const Access now{f->tid + 1, group + 1, fence, sgf[f->sg], exec, pc};
    auto unordered = [&](const Access& a) {
        if (!a.tid1 || (a.tid1 == now.tid1 && a.group == now.group)) return false;
        if (a.group != now.group) return !tg;
        if (a.fence < fence) return false;
        return (a.tid1 - 1) / WIDTH != f->sg || a.sg_fence >= now.sg_fence;
    };
    for (size_t i = 0; i < n; i++) {
        Shadow& x = s[i];
        if (unordered(x.write)) {
            if (!write || n > sizeof pending.old) return report_race(x.write, write, true, tg, p + i, pc);
            if (!pending.n) { // two unordered writes: harmless if they store the same bytes
                pending.p = p, pending.n = n, pending.pc = pc, pending.tg = tg;
                pending.other = x.write.tid1 - 1, pending.other_pc = x.write.pc;
                memcpy(pending.old, p, n);
            }
        }
        if (write) {
            for (const Access& r : x.read)
                if (unordered(r)) return report_race(r, true, false, tg, p + i, pc);
            x.write = now;
        } else {
            Access& r = x.read[0];
            // keep the latest reader, and one other, preferably of another simdgroup
            if (r.tid1 != now.tid1 || r.group != now.group) {
                if (r.tid1 && ((r.tid1 - 1) / WIDTH != f->sg || !unordered(x.read[1]) || r.group != now.group)) x.read[1] = r;
            }
            r = now;
        }
    }
}

void Launch::report_race(const Access& a, bool write, bool was_write, bool tg, char* p, const void* pc) {
    const char* hint = "no barrier lies between them";
    if (a.group != group + 1) hint = "different threadgroups are never ordered";
    else if (a.exec < exec) hint = tg ? "the barrier between them lacks mem_flags::mem_threadgroup" : "the barrier between them lacks mem_flags::mem_device";
    pc1 = pc, pc2 = a.pc;
    fail("data race on %s: %s %s it, thread %u%s %s it earlier; %s", describe(p).c_str(), who(cur).c_str(), write ? "writes" : "reads", a.tid1 - 1,
         a.group != group + 1 ? " of another threadgroup" : "", was_write ? "wrote" : "read", hint);
}

// The store announced by the previous hook has happened by now: did it change anything?
void Launch::settle() {
    if (!pending.n) return;
    const size_t n = pending.n;
    pending.n = 0;
    if (!memcmp(pending.p, pending.old, n)) {
        report->same_value_races++;
        return;
    }
    pc1 = pending.pc, pc2 = pending.other_pc;
    fail("data race on %s: %s overwrites what thread %u wrote, with a different value and no ordering between them", describe(pending.p).c_str(), who(cur).c_str(), pending.other);
}

inline void hook(const void* p, size_t n, bool write, const void* pc) {
    Launch* l = L;
    if (l && l->cur) l->access((uintptr_t)p, n, write, pc);
}

} // namespace

// ---------------------------------------------------------------------------- calls from kernels

extern "C" {

void* msl_rt_arg(uint32_t i) { return L->args[i]; }

void msl_rt_builtin(uint32_t i, uint32_t* o) {
    const Launch& l = *L;
    const Fiber& f = *l.cur;
    auto set = [o](uint32_t a, uint32_t b, uint32_t c) { o[0] = a, o[1] = b, o[2] = c; };
    const uint32_t* full = l.dispatch->threadgroup;
    switch (l.kernel->params[i].index) {
    case MSL_B_thread_position_in_grid:
        return set(l.group_pos[0] * full[0] + f.pos[0], l.group_pos[1] * full[1] + f.pos[1], l.group_pos[2] * full[2] + f.pos[2]);
    case MSL_B_thread_position_in_threadgroup: return set(f.pos[0], f.pos[1], f.pos[2]);
    case MSL_B_thread_index_in_threadgroup: return set(f.tid, 0, 0);
    case MSL_B_threadgroup_position_in_grid: return set(l.group_pos[0], l.group_pos[1], l.group_pos[2]);
    case MSL_B_threads_per_grid: return set(l.grid_threads[0], l.grid_threads[1], l.grid_threads[2]);
    case MSL_B_threads_per_threadgroup: return set(l.size[0], l.size[1], l.size[2]);
    case MSL_B_dispatch_threads_per_threadgroup: return set(full[0], full[1], full[2]);
    case MSL_B_threadgroups_per_grid: return set(l.groups[0], l.groups[1], l.groups[2]);
    case MSL_B_thread_execution_width:
    case MSL_B_threads_per_simdgroup: return set(WIDTH, 1, 1);
    case MSL_B_simdgroup_index_in_threadgroup: return set(f.sg, 0, 0);
    case MSL_B_thread_index_in_simdgroup: return set(f.lane, 0, 0);
    case MSL_B_simdgroups_per_threadgroup: return set(l.n_sg, 1, 1);
    case MSL_B_dispatch_simdgroups_per_threadgroup: return set((full[0] * full[1] * full[2] + WIDTH - 1) / WIDTH, 1, 1);
    case MSL_B_quadgroup_index_in_threadgroup: return set(f.tid / 4, 0, 0);
    case MSL_B_thread_index_in_quadgroup: return set(f.tid % 4, 0, 0);
    case MSL_B_quadgroups_per_threadgroup: return set((l.n_threads + 3) / 4, 1, 1);
    }
    set(0, 0, 0);
}

void* msl_rt_tg_var(uint32_t id, size_t size, size_t align, const char* name, int line) {
    return L->tg_alloc(id + TG_ARGS, size, align, name, line);
}

void msl_rt_barrier(int simdgroup_only, unsigned flags, const char* file, int line) {
    Fiber* f = L->cur;
    f->file = file, f->line = line, f->flags = flags, f->op = 0, f->size = 0;
    L->stop(simdgroup_only ? AT_SIMD_BARRIER : AT_BARRIER);
}

const unsigned char* msl_rt_exchange(int op, const void* value, size_t size, uint64_t* mask, uint32_t* lane, const char* file, int line) {
    Fiber* f = L->cur;
    f->file = file, f->line = line, f->op = op, f->size = size;
    memcpy(f->payload, value, size);
    L->stop(AT_SIMD);
    Exchange* x = f->exchange; // stays valid until this lane stops again
    *mask = x->mask;
    *lane = f->lane;
    if (--x->users == 0) L->free_exchanges.push_back(x); // reused at the earliest by a later resolve
    return x->slots;
}

void msl_rt_note_inactive_read(void) { L->report->inactive_reads++; }
void msl_rt_atomic(void* p, size_t size, int write) {
    Launch* l = L;
    if (!l->report->checked) return;
    // bounds and read-only checks only: atomics do not race
    Buffer* b = nullptr;
    for (Buffer& x : l->buffers)
        if ((uintptr_t)p - (uintptr_t)x.map < x.map_len) b = &x;
    if (b && ((char*)p < b->data || (char*)p + size > b->data + b->len || (write && !b->writable)))
        l->fail("atomic access by %s at %s", l->who(l->cur).c_str(), l->describe((char*)p).c_str());
    if (!b && (uintptr_t)p - (uintptr_t)arena.p < ARENA && write)
        for (size_t i = 0; i < size; i++) ((uint32_t*)tg_init.p)[(char*)p - arena.p + i] = l->group + 1;
}

MSL_EXPORT int msl_launch(const char* name, const msl_arg* args, uint32_t n_args, const msl_dispatch* d, const msl_options* o, msl_report* r) {
    memset(r, 0, sizeof *r);
    r->checked = msl_module_table.checked;
    Launch l;
    l.kernel = nullptr;
    for (uint32_t i = 0; i < msl_module_table.n_kernels; i++)
        if (!strcmp(msl_module_table.kernels[i].name, name)) l.kernel = &msl_module_table.kernels[i];
    if (!l.kernel) {
        snprintf(r->message, sizeof r->message, "no kernel named %s", name);
        return 1;
    }
    l.dispatch = d, l.opt = *o, l.report = r;
    Launch* outer = L;
    L = &l;
    if (l.setup(args, n_args)) l.run();
    L = outer;
    const bool ok = l.finish_buffers();
    for (int i = 0; i < 2; i++) {
        const std::string s = locate(i ? l.pc2 : l.pc1);
        const size_t used = strlen(r->message);
        if (!s.empty()) snprintf(r->message + used, sizeof r->message - used, "\n    %s %s", i ? "the earlier access:" : "at", s.c_str());
    }
    return ok ? 0 : 1;
}

// ---------------------------------------------------------------------------- compiler hooks

#define PC __builtin_extract_return_addr(__builtin_return_address(0))
#define SIZE(n)                                                                              \
    void __tsan_read##n(void* p) { hook(p, n, false, PC); }                                  \
    void __tsan_write##n(void* p) { hook(p, n, true, PC); }                                  \
    void __tsan_unaligned_read##n(void* p) { hook(p, n, false, PC); }                        \
    void __tsan_unaligned_write##n(void* p) { hook(p, n, true, PC); }                        \
    void __tsan_volatile_read##n(void* p) { hook(p, n, false, PC); }                         \
    void __tsan_volatile_write##n(void* p) { hook(p, n, true, PC); }                         \
    void __tsan_read_write##n(void* p) { hook(p, n, false, PC), hook(p, n, true, PC); }      \
    void __tsan_unaligned_read_write##n(void* p) { hook(p, n, false, PC), hook(p, n, true, PC); }
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)
#undef SIZE
void __tsan_init(void) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void) {}
void __tsan_read_range(void* p, size_t n) { if (n) hook(p, n, false, PC); }
void __tsan_write_range(void* p, size_t n) { if (n) hook(p, n, true, PC); }
void* __tsan_memcpy(void* d, const void* s, size_t n) {
    if (n) hook(s, n, false, PC), hook(d, n, true, PC);
    return memcpy(d, s, n);
}
void* __tsan_memmove(void* d, const void* s, size_t n) {
    if (n) hook(s, n, false, PC), hook(d, n, true, PC);
    return memmove(d, s, n);
}
void* __tsan_memset(void* d, int c, size_t n) {
    if (n) hook(d, n, true, PC);
    return memset(d, c, n);
}

// UBSan: every check's data begins with its source location.
struct Ubsan { const char* file; uint32_t line, column; };
struct Mismatch { Ubsan at; const void* type; unsigned char log_alignment, kind; };
static void ubsan(const Ubsan* u, const char* what, uintptr_t value) {
    Launch* l = L;
    if (!l || !l->cur) return;
    l->fail("%s (%#zx) in %s\n    at %s:%u", what, (size_t)value, l->who(l->cur).c_str(), base(u->file), u->line);
}
void __ubsan_handle_type_mismatch_v1(Mismatch* m, uintptr_t p) {
    if (p < 65536) return; // null: the access hook says more
    // 16-byte types cannot be let through: the compiler uses aligned SSE moves for them
    if (L && L->cur && (m->log_alignment >= 4 || !(L->opt.flags & MSL_ALLOW_MISALIGNED))) {
        const std::string s = "misaligned access (" + std::to_string(1 << m->log_alignment) + "-byte alignment needed) at " + L->describe((char*)p);
        ubsan(&m->at, s.c_str(), p);
    }
}
void __ubsan_handle_out_of_bounds(Ubsan* u, uintptr_t i) { ubsan(u, "array index out of bounds", i); }
void __ubsan_handle_divrem_overflow(Ubsan* u, uintptr_t, uintptr_t r) { ubsan(u, "integer division by zero", r); }
void __ubsan_handle_missing_return(Ubsan* u) { ubsan(u, "missing return value", 0); }
void __ubsan_handle_builtin_unreachable(Ubsan* u) { ubsan(u, "unreachable code", 0); }

} // extern "C"
