// The Metal standard library, as plain C++17, for running MSL kernels on the CPU.
//
// The generated code includes this file INSIDE a namespace that is private to one module, after
// msl_abi.h, <type_traits> and <limits>.  So it must not include anything itself; no libc name
// (exp, abs, index, gamma, y1 ...) is visible to a kernel, and two kernels with clashing helpers
// never meet.  MSL_SWIZZLES_{2,3,4} (the swizzles the kernel really uses) come from rewrite.rs.
//
// Vectors are classes, not clang ext_vectors: that is what gives float4(a, b), T4(x) in
// templates, value-converting float4(half4) and gcc support.

#include "msl_types.h"

namespace metal {

// ============================================================================ math

// Functions of floating point scalars: float, half (rounded once from float) and bfloat, plus
// the component-wise vector form. As in MSL, an integer argument is ambiguous.
#define MSL_F1(name, expr)                                                                       \
    inline float name(float x) { return expr; }                                                  \
    inline half name(half h) { float x = float(h); return half(expr); }                          \
    inline bfloat name(bfloat h) { float x = float(h); return bfloat(expr); }                    \
    template <class T, int N>                                                                    \
    inline vec<T, N> name(const vec<T, N>& a) {                                                  \
        vec<T, N> r;                                                                             \
        for (int i = 0; i < N; i++) r.v[i] = name(a.v[i]);                                       \
        return r;                                                                                \
    }
#define MSL_F2(name, expr)                                                                       \
    inline float name(float x, float y) { return expr; }                                         \
    inline half name(half a, half b) { float x = float(a), y = float(b); return half(expr); }    \
    inline bfloat name(bfloat a, bfloat b) {                                                     \
        float x = float(a), y = float(b);                                                        \
        return bfloat(expr);                                                                     \
    }                                                                                            \
    template <class A, class B, class V = detail::vec_of_t<A, B>>                                \
    inline V name(const A& a, const B& b) {                                                      \
        V x(a), y(b), r;                                                                         \
        for (int i = 0; i < V::size; i++) r.v[i] = name(x.v[i], y.v[i]);                         \
        return r;                                                                                \
    }
#define MSL_F3(name, expr)                                                                       \
    inline float name(float x, float y, float z) { return expr; }                                \
    inline half name(half a, half b, half c) {                                                   \
        float x = float(a), y = float(b), z = float(c);                                          \
        return half(expr);                                                                       \
    }                                                                                            \
    inline bfloat name(bfloat a, bfloat b, bfloat c) {                                           \
        float x = float(a), y = float(b), z = float(c);                                          \
        return bfloat(expr);                                                                     \
    }                                                                                            \
    template <class A, class B, class C, class V = detail::vec_of_t<A, B, C>>                    \
    inline V name(const A& a, const B& b, const C& c) {                                          \
        V x(a), y(b), z(c), r;                                                                   \
        for (int i = 0; i < V::size; i++) r.v[i] = name(x.v[i], y.v[i], z.v[i]);                 \
        return r;                                                                                \
    }
MSL_F1(exp, __builtin_expf(x))
MSL_F1(exp2, __builtin_exp2f(x))
MSL_F1(exp10, __builtin_powf(10.0f, x))
MSL_F1(log, __builtin_logf(x))
MSL_F1(log2, __builtin_log2f(x))
MSL_F1(log10, __builtin_log10f(x))
MSL_F1(sqrt, __builtin_sqrtf(x))
MSL_F1(rsqrt, (1.0f / __builtin_sqrtf(x)))
MSL_F1(sin, __builtin_sinf(x))
MSL_F1(cos, __builtin_cosf(x))
MSL_F1(tan, __builtin_tanf(x))
MSL_F1(sinpi, __builtin_sinf(x * 3.14159265358979323846f))
MSL_F1(cospi, __builtin_cosf(x * 3.14159265358979323846f))
MSL_F1(asin, __builtin_asinf(x))
MSL_F1(acos, __builtin_acosf(x))
MSL_F1(atan, __builtin_atanf(x))
MSL_F1(sinh, __builtin_sinhf(x))
MSL_F1(cosh, __builtin_coshf(x))
MSL_F1(tanh, __builtin_tanhf(x))
MSL_F1(asinh, __builtin_asinhf(x))
MSL_F1(acosh, __builtin_acoshf(x))
MSL_F1(atanh, __builtin_atanhf(x))
MSL_F1(floor, __builtin_floorf(x))
MSL_F1(ceil, __builtin_ceilf(x))
MSL_F1(trunc, __builtin_truncf(x))
MSL_F1(round, __builtin_roundf(x))
MSL_F1(rint, __builtin_rintf(x))
MSL_F1(fabs, __builtin_fabsf(x))
MSL_F1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
MSL_F1(sign, (x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f))
MSL_F1(saturate, (x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f))
MSL_F2(pow, __builtin_powf(x, y))
MSL_F2(powr, __builtin_powf(x, y))
MSL_F2(fmod, __builtin_fmodf(x, y))
MSL_F2(atan2, __builtin_atan2f(x, y))
MSL_F2(copysign, __builtin_copysignf(x, y))
MSL_F2(fdim, __builtin_fdimf(x, y))
MSL_F2(fmin, __builtin_fminf(x, y))
MSL_F2(fmax, __builtin_fmaxf(x, y))
MSL_F2(step, (y < x ? 0.0f : 1.0f))
MSL_F2(divide, (x / y))
MSL_F3(fma, __builtin_fmaf(x, y, z))
MSL_F3(mix, (x + (y - x) * z))
MSL_F3(smoothstep, ([&] {
           float t = (z - x) / (y - x);
           t = t > 0.0f ? (t < 1.0f ? t : 1.0f) : 0.0f;
           return t * t * (3.0f - 2.0f * t);
       }()))
#undef MSL_F1
#undef MSL_F2
#undef MSL_F3
inline float sincos(float x, float& c) { c = __builtin_cosf(x); return __builtin_sinf(x); }
inline half sincos(half x, half& c) { c = cos(x); return sin(x); }
inline float modf(float x, float& i) { i = __builtin_truncf(x); return x - i; }
inline float frexp(float x, int& e) { return __builtin_frexpf(x, &e); }
inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
inline half ldexp(half x, int e) { return half(__builtin_ldexpf(float(x), e)); }

#define MSL_CLASSIFY(name, expr)                                                                 \
    inline bool name(float x) { return expr; }                                                   \
    inline bool name(half h) { float x = float(h); return expr; }                                \
    inline bool name(bfloat h) { float x = float(h); return expr; }                              \
    template <class T, int N>                                                                    \
    inline vec<bool, N> name(const vec<T, N>& a) {                                               \
        vec<bool, N> r;                                                                          \
        for (int i = 0; i < N; i++) r.v[i] = name(a.v[i]);                                       \
        return r;                                                                                \
    }
MSL_CLASSIFY(isnan, (x != x))
MSL_CLASSIFY(isinf, (__builtin_fabsf(x) == __builtin_inff()))
MSL_CLASSIFY(isfinite, (__builtin_fabsf(x) < __builtin_inff()))
MSL_CLASSIFY(signbit, (__builtin_signbit(x) != 0))
#undef MSL_CLASSIFY

typedef signed char schar; // int8_t, a type of its own in C++

// min, max, clamp, abs: one overload per scalar type, so mixed types are as ambiguous as in MSL.
// The floating point forms return the other operand when one is NaN (fmin/fmax rules).
#define MSL_INT(T)                                                                               \
    constexpr T min(T a, T b) { return b < a ? b : a; }                                          \
    constexpr T max(T a, T b) { return a < b ? b : a; }                                          \
    constexpr T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }                           \
    constexpr T abs(T a) { return a < T(0) ? T(-a) : a; }                                        \
    constexpr T absdiff(T a, T b) { return a < b ? T(b - a) : T(a - b); }                        \
    constexpr T popcount(T a) { return T(__builtin_popcountll((ulong)(make_unsigned_t<T>)a)); }  \
    constexpr T clz(T a) {                                                                       \
        return T(a == 0 ? int(sizeof(T) * 8)                                                     \
                        : __builtin_clzll((ulong)(make_unsigned_t<T>)a) - (64 - int(sizeof(T) * 8))); \
    }                                                                                            \
    constexpr T ctz(T a) {                                                                       \
        return T(a == 0 ? int(sizeof(T) * 8) : __builtin_ctzll((ulong)(make_unsigned_t<T>)a));   \
    }                                                                                            \
    constexpr T rotate(T a, T n) {                                                               \
        typedef make_unsigned_t<T> U;                                                            \
        const int w = sizeof(T) * 8, k = int(U(n) % w);                                          \
        return k ? T(U(U(a) << k) | U(U(a) >> (w - k))) : a;                                     \
    }                                                                                            \
    constexpr T reverse_bits(T a) {                                                              \
        typedef make_unsigned_t<T> U;                                                            \
        U r = 0;                                                                                 \
        for (unsigned i = 0; i < sizeof(T) * 8; i++) r = U(r | (U((U(a) >> i) & 1) << (sizeof(T) * 8 - 1 - i))); \
        return T(r);                                                                             \
    }                                                                                            \
    constexpr T extract_bits(T a, uint off, uint n) {                                            \
        const uint w = sizeof(T) * 8;                                                            \
        if (n == 0) return 0;                                                                    \
        return T(T(make_unsigned_t<T>(a) << (w - off - n)) >> (w - n));                          \
    }                                                                                            \
    constexpr T insert_bits(T base, T ins, uint off, uint n) {                                   \
        typedef make_unsigned_t<T> U;                                                            \
        U m = U((n >= sizeof(T) * 8 ? U(~U(0)) : U((U(1) << n) - 1)) << off);                    \
        return T((U(base) & U(~m)) | (U(U(ins) << off) & m));                                    \
    }
MSL_INT(char) MSL_INT(schar) MSL_INT(uchar) MSL_INT(short) MSL_INT(ushort) MSL_INT(int)
MSL_INT(uint) MSL_INT(long) MSL_INT(ulong)
#undef MSL_INT
#define MSL_FLT(T)                                                                               \
    inline T min(T a, T b) { return T(__builtin_fminf(float(a), float(b))); }                    \
    inline T max(T a, T b) { return T(__builtin_fmaxf(float(a), float(b))); }                    \
    inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }                              \
    inline T abs(T a) { return T(__builtin_fabsf(float(a))); }                                   \
    inline T min3(T a, T b, T c) { return min(a, min(b, c)); }                                   \
    inline T max3(T a, T b, T c) { return max(a, max(b, c)); }
MSL_FLT(half) MSL_FLT(float) MSL_FLT(bfloat)
#undef MSL_FLT
#define MSL_V(name)                                                                              \
    template <class A, class B, class V = detail::vec_of_t<A, B>>                                \
    constexpr V name(const A& a, const B& b) {                                                   \
        V x(a), y(b), r{};                                                                       \
        for (int i = 0; i < V::size; i++) r.v[i] = name(x.v[i], y.v[i]);                         \
        return r;                                                                                \
    }
MSL_V(min) MSL_V(max) MSL_V(absdiff) MSL_V(rotate)
#undef MSL_V
template <class A, class B, class C, class V = detail::vec_of_t<A, B, C>>
constexpr V clamp(const A& a, const B& b, const C& c) { return min(max(V(a), V(b)), V(c)); }
#define MSL_V(name)                                                                              \
    template <class T, int N>                                                                    \
    constexpr vec<T, N> name(const vec<T, N>& a) {                                               \
        vec<T, N> r{};                                                                           \
        for (int i = 0; i < N; i++) r.v[i] = name(a.v[i]);                                       \
        return r;                                                                                \
    }
MSL_V(abs) MSL_V(popcount) MSL_V(clz) MSL_V(ctz) MSL_V(reverse_bits)
#undef MSL_V
constexpr int mul24(int a, int b) { return a * b; }
constexpr uint mul24(uint a, uint b) { return a * b; }
constexpr int mad24(int a, int b, int c) { return a * b + c; }
constexpr uint mad24(uint a, uint b, uint c) { return a * b + c; }
constexpr int mulhi(int a, int b) { return int((long(a) * long(b)) >> 32); }
constexpr uint mulhi(uint a, uint b) { return uint((ulong(a) * ulong(b)) >> 32); }

template <class T, class = enable_if_t<detail::is_scalar<T>>>
constexpr T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N>
constexpr vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& c) {
    vec<T, N> r{};
    for (int i = 0; i < N; i++) r.v[i] = c.v[i] ? b.v[i] : a.v[i];
    return r;
}
template <int N>
constexpr bool any(const vec<bool, N>& a) {
    bool r = false;
    for (int i = 0; i < N; i++) r = r || a.v[i];
    return r;
}
template <int N>
constexpr bool all(const vec<bool, N>& a) {
    bool r = true;
    for (int i = 0; i < N; i++) r = r && a.v[i];
    return r;
}
constexpr bool any(bool a) { return a; }
constexpr bool all(bool a) { return a; }

template <class T, int N>
constexpr T dot(const vec<T, N>& a, const vec<T, N>& b) {
    T r = T(a.v[0] * b.v[0]);
    for (int i = 1; i < N; i++) r = T(r + a.v[i] * b.v[i]);
    return r;
}
template <class T, int N>
inline T length_squared(const vec<T, N>& a) { return dot(a, a); }
template <class T, int N>
inline T length(const vec<T, N>& a) { return sqrt(dot(a, a)); }
template <class T, int N>
inline T distance(const vec<T, N>& a, const vec<T, N>& b) { return length(a - b); }
template <class T, int N>
inline vec<T, N> normalize(const vec<T, N>& a) { return a * rsqrt(dot(a, a)); }
template <class T>
constexpr vec<T, 3> cross(const vec<T, 3>& a, const vec<T, 3>& b) {
    return vec<T, 3>(a.v[1] * b.v[2] - a.v[2] * b.v[1], a.v[2] * b.v[0] - a.v[0] * b.v[2],
                     a.v[0] * b.v[1] - a.v[1] * b.v[0]);
}
template <class T, int C, int R>
constexpr matrix<T, R, C> transpose(const matrix<T, C, R>& m) {
    matrix<T, R, C> r;
    for (int c = 0; c < C; c++)
        for (int i = 0; i < R; i++) r.columns[i].v[c] = m.columns[c].v[i];
    return r;
}

inline vec<float, 4> unpack_unorm4x8_to_float(uint x) {
    return vec<float, 4>(x & 255, (x >> 8) & 255, (x >> 16) & 255, x >> 24) / 255.0f;
}
inline vec<float, 4> unpack_snorm4x8_to_float(uint x) {
    return max(vec<float, 4>(int8_t(x), int8_t(x >> 8), int8_t(x >> 16), int8_t(x >> 24)) / 127.0f, -1.0f);
}

// One implementation serves both: Metal's fast:: functions are only *less* accurate.
#define MSL_FAST                                                                                 \
    using metal::abs; using metal::acos; using metal::asin; using metal::atan;                   \
    using metal::atan2; using metal::ceil; using metal::clamp; using metal::cos;                 \
    using metal::cosh; using metal::cospi; using metal::distance; using metal::divide;           \
    using metal::dot; using metal::exp; using metal::exp10; using metal::exp2;                   \
    using metal::fabs; using metal::floor; using metal::fma; using metal::fmax;                  \
    using metal::fmin; using metal::fmod; using metal::fract; using metal::length;               \
    using metal::log; using metal::log10; using metal::log2; using metal::max; using metal::min; \
    using metal::mix; using metal::normalize; using metal::pow; using metal::powr;               \
    using metal::rint; using metal::round; using metal::rsqrt; using metal::saturate;            \
    using metal::sign; using metal::sin; using metal::sinh; using metal::sinpi;                  \
    using metal::sqrt; using metal::tan; using metal::tanh; using metal::trunc;
namespace fast { MSL_FAST }
namespace precise { MSL_FAST }
#undef MSL_FAST

// ============================================================================ barriers

enum class mem_flags : uint {
    mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4,
    mem_threadgroup_imageblock = 8, mem_object_data = 16
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }
inline void threadgroup_barrier(mem_flags f, MSL_SITE) { msl_rt_barrier(0, uint(f), msl_file, msl_line); }
inline void simdgroup_barrier(mem_flags f, MSL_SITE) { msl_rt_barrier(1, uint(f), msl_file, msl_line); }

// ============================================================================ simdgroup ops

namespace detail {
enum { X_REDUCE = 1, X_SHUFFLE, X_VOTE, X_MATRIX, X_QUAD };
template <class T>
struct is_simd : integral_constant<bool, is_scalar<T>> {};
template <class T, int N>
struct is_simd<vec<T, N>> : true_type {};
template <class T>
using if_simd = enable_if_t<is_simd<T>::value>;

template <class T>
struct exchange { // every lane publishes one T; lanes then read each other's
    const unsigned char* slots;
    uint64_t mask = 0; // lanes that take part
    uint32_t lane = 0;
    exchange(int op, const T& v, const char* file, int line) {
        static_assert(sizeof(T) <= MSL_SLOT, "value too large for a simdgroup exchange");
        slots = msl_rt_exchange(op, &v, sizeof(T), &mask, &lane, file, line);
    }
    bool has(uint32_t l) const { return l < 64 && ((mask >> l) & 1); }
    MSL_UNCHECKED T read(uint32_t l) const {
        T r;
        if (!has(l)) { // MSL: undefined. Here: poison, and counted.
            msl_rt_note_inactive_read();
            __builtin_memset((void*)&r, 0xff, sizeof(T));
        } else {
            __builtin_memcpy((void*)&r, slots + l * MSL_SLOT, sizeof(T));
        }
        return r;
    }
    // Reduction over lanes [first, first+n). Butterfly order when all take part, which is both
    // what hardware does and more accurate than a running sum.
    template <class Op>
    MSL_UNCHECKED T reduce(uint32_t first, uint32_t n, Op op) const {
        T t[32];
        uint32_t k = 0;
        for (uint32_t l = first; l < first + n; l++)
            if (has(l)) t[k++] = read(l);
        if (k == n) {
            for (uint32_t h = n / 2; h; h /= 2)
                for (uint32_t i = 0; i < h; i++) t[i] = op(t[i], t[i + h]);
        } else {
            for (uint32_t i = 1; i < k; i++) t[0] = op(t[0], t[i]);
        }
        return t[0];
    }
};
template <class T> struct op_sum { T operator()(const T& a, const T& b) const { return T(a + b); } };
template <class T> struct op_product { T operator()(const T& a, const T& b) const { return T(a * b); } };
template <class T> struct op_min { T operator()(const T& a, const T& b) const { return min(a, b); } };
template <class T> struct op_max { T operator()(const T& a, const T& b) const { return max(a, b); } };
template <class T> struct op_and { T operator()(const T& a, const T& b) const { return T(a & b); } };
template <class T> struct op_or { T operator()(const T& a, const T& b) const { return T(a | b); } };
template <class T> struct op_xor { T operator()(const T& a, const T& b) const { return T(a ^ b); } };
} // namespace detail

#define MSL_REDUCE(op)                                                                           \
    template <class T, class = detail::if_simd<T>>                                               \
    inline T simd_##op(T v, MSL_SITE) {                                                          \
        return detail::exchange<T>(detail::X_REDUCE, v, msl_file, msl_line)                      \
            .reduce(0, 32, detail::op_##op<T>());                                                \
    }                                                                                            \
    template <class T, class = detail::if_simd<T>>                                               \
    inline T quad_##op(T v, MSL_SITE) {                                                          \
        detail::exchange<T> x(detail::X_QUAD, v, msl_file, msl_line);                            \
        return x.reduce(x.lane & ~3u, 4, detail::op_##op<T>());                                  \
    }
MSL_REDUCE(sum) MSL_REDUCE(product) MSL_REDUCE(min) MSL_REDUCE(max) MSL_REDUCE(and)
MSL_REDUCE(or) MSL_REDUCE(xor)
#undef MSL_REDUCE

// In each shuffle `l` is the caller's lane within the group, `w` the group width.
// Shuffles down/up leave the lanes that would read past the end unchanged, as MSL specifies.
#define MSL_SHUFFLE(name, arg, src)                                                              \
    template <class T, class = detail::if_simd<T>>                                               \
    inline T simd_##name(T v, ushort arg, MSL_SITE) {                                            \
        detail::exchange<T> x(detail::X_SHUFFLE, v, msl_file, msl_line);                         \
        const uint l = x.lane, w = 32, from = (src);                                             \
        return from < w ? x.read(from) : v;                                                      \
    }                                                                                            \
    template <class T, class = detail::if_simd<T>>                                               \
    inline T quad_##name(T v, ushort arg, MSL_SITE) {                                            \
        detail::exchange<T> x(detail::X_QUAD, v, msl_file, msl_line);                            \
        const uint l = x.lane & 3, w = 4, from = (src);                                          \
        return from < w ? x.read((x.lane & ~3u) + from) : v;                                     \
    }
MSL_SHUFFLE(shuffle, i, (void(l), uint(i)))
MSL_SHUFFLE(broadcast, i, (void(l), uint(i)))
MSL_SHUFFLE(shuffle_xor, m, l ^ uint(m))
MSL_SHUFFLE(shuffle_down, d, l + uint(d))
MSL_SHUFFLE(shuffle_up, d, l - uint(d))
MSL_SHUFFLE(shuffle_rotate_down, d, (l + uint(d)) % w)
MSL_SHUFFLE(shuffle_rotate_up, d, (l + w - uint(d) % w) % w)
#undef MSL_SHUFFLE

template <class T, class = detail::if_simd<T>>
inline T simd_broadcast_first(T v, MSL_SITE) {
    detail::exchange<T> x(detail::X_SHUFFLE, v, msl_file, msl_line);
    return x.read(uint(__builtin_ctzll(x.mask)));
}
#define MSL_SCAN(name, op, identity)                                                             \
    template <class T, class = detail::if_simd<T>>                                               \
    inline T simd_prefix_inclusive_##name(T v, MSL_SITE) {                                       \
        detail::exchange<T> x(detail::X_REDUCE, v, msl_file, msl_line);                          \
        T r = T(identity);                                                                       \
        for (uint l = 0; l <= x.lane; l++)                                                       \
            if (x.has(l)) r = T(r op x.read(l));                                                 \
        return r;                                                                                \
    }                                                                                            \
    template <class T, class = detail::if_simd<T>>                                               \
    inline T simd_prefix_exclusive_##name(T v, MSL_SITE) {                                       \
        detail::exchange<T> x(detail::X_REDUCE, v, msl_file, msl_line);                          \
        T r = T(identity);                                                                       \
        for (uint l = 0; l < x.lane; l++)                                                        \
            if (x.has(l)) r = T(r op x.read(l));                                                 \
        return r;                                                                                \
    }
MSL_SCAN(sum, +, 0) MSL_SCAN(product, *, 1)
#undef MSL_SCAN

struct simd_vote {
    typedef uint64_t vote_t;
    uint64_t bits;
    explicit constexpr simd_vote(uint64_t b = 0) : bits(b) {}
    explicit constexpr operator uint64_t() const { return bits; }
    constexpr bool all() const { return bits == 0xffffffffull; }
    constexpr bool any() const { return bits != 0; }
};
inline simd_vote simd_ballot(bool p, MSL_SITE) {
    detail::exchange<bool> x(detail::X_VOTE, p, msl_file, msl_line);
    uint64_t b = 0;
    for (uint l = 0; l < 32; l++)
        if (x.has(l) && x.read(l)) b |= 1ull << l;
    return simd_vote(b);
}
inline bool simd_all(bool p, MSL_SITE) {
    detail::exchange<bool> x(detail::X_VOTE, p, msl_file, msl_line);
    bool r = true;
    for (uint l = 0; l < 32; l++)
        if (x.has(l)) r = r && x.read(l);
    return r;
}
inline bool simd_any(bool p, MSL_SITE) { return simd_ballot(p, msl_file, msl_line).any(); }
inline simd_vote simd_active_threads_mask(MSL_SITE) { return simd_ballot(true, msl_file, msl_line); }
inline bool simd_is_first(MSL_SITE) {
    detail::exchange<bool> x(detail::X_VOTE, true, msl_file, msl_line);
    return x.lane == uint(__builtin_ctzll(x.mask));
}

// ============================================================================ simdgroup_matrix

// Each lane owns two neighbouring elements of a row, in the layout Apple GPUs use (MLX's
// steel kernels depend on it through thread_elements()).
template <class T, int C, int R>
struct simdgroup_matrix {
    static_assert(C == 8 && R == 8, "only 8x8 simdgroup matrices exist");
    vec<T, 2> e;
    simdgroup_matrix() = default;
    explicit simdgroup_matrix(T diagonal, MSL_SITE) {
        detail::exchange<bool> x(detail::X_MATRIX, true, msl_file, msl_line);
        for (int i = 0; i < 2; i++) e.v[i] = row(x.lane) == col(x.lane) + i ? diagonal : T(0);
    }
    vec<T, 2>& thread_elements() { return e; }
    const vec<T, 2>& thread_elements() const { return e; }
    static constexpr int row(uint l) { return int((l >> 4) * 4 + ((l >> 1) & 3)); }
    static constexpr int col(uint l) { return int(((l >> 3) & 1) * 4 + (l & 1) * 2); }
    static constexpr uint lane_of(int r, int c) {
        return uint((r >> 2) << 4 | (c >> 2) << 3 | (r & 3) << 1 | ((c >> 1) & 1));
    }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int C, int R = C>
inline simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
    simdgroup_matrix<T, C, R> m;
    m.e = vec<T, 2>(v);
    return m;
}
template <class T, class P>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, P* p, ulong stride = 8,
                           vec<ulong, 2> origin = vec<ulong, 2>(0), bool transposed = false, MSL_SITE) {
    typedef simdgroup_matrix<T, 8, 8> M;
    detail::exchange<bool> x(detail::X_MATRIX, true, msl_file, msl_line);
    const P* q = p + origin.v[1] * stride + origin.v[0];
    const int r = M::row(x.lane), c = M::col(x.lane);
    for (int i = 0; i < 2; i++) m.e.v[i] = T(transposed ? q[(c + i) * stride + r] : q[r * stride + c + i]);
}
template <class T, class P>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, P* p, ulong stride = 8,
                            vec<ulong, 2> origin = vec<ulong, 2>(0), bool transposed = false, MSL_SITE) {
    typedef simdgroup_matrix<T, 8, 8> M;
    detail::exchange<bool> x(detail::X_MATRIX, true, msl_file, msl_line);
    P* q = p + origin.v[1] * stride + origin.v[0];
    const int r = M::row(x.lane), c = M::col(x.lane);
    for (int i = 0; i < 2; i++) (transposed ? q[(c + i) * stride + r] : q[r * stride + c + i]) = P(m.e.v[i]);
}
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b,
                                          const simdgroup_matrix<C, 8, 8>& c, MSL_SITE) {
    typedef simdgroup_matrix<D, 8, 8> M;
    struct pair { vec<A, 2> a; vec<B, 2> b; };
    detail::exchange<pair> x(detail::X_MATRIX, pair{a.e, b.e}, msl_file, msl_line);
    const int r = M::row(x.lane), col = M::col(x.lane);
    for (int i = 0; i < 2; i++) {
        float s = float(c.e.v[i]);
        for (int k = 0; k < 8; k++)
            s += float(x.read(M::lane_of(r, k)).a.v[k & 1]) * float(x.read(M::lane_of(k, col)).b.v[i]);
        d.e.v[i] = D(s);
    }
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b, MSL_SITE) {
    simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8>(D(0)), msl_file, msl_line);
}

// ============================================================================ atomics

// A launch runs on one OS thread, so an atomic is a plain access that is exempt from race
// detection (but not from the bounds check).
enum memory_order { memory_order_relaxed, memory_order_acquire, memory_order_release,
                    memory_order_acq_rel, memory_order_seq_cst };
template <class T>
struct atomic {
    T value;
};
template <class T>
using _atomic = atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
namespace detail {
template <class T, class Op>
MSL_UNCHECKED __attribute__((noinline)) T atomic_op(const atomic<T>* p, int write, Op op) {
    msl_rt_atomic((void*)p, sizeof(T), write);
    T old = *(const volatile T*)&p->value;
    T now = op(old);
    if (write) *(volatile T*)&p->value = now;
    return old;
}
} // namespace detail
template <class T>
inline T atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
    return detail::atomic_op((const atomic<T>*)p, 0, [](T o) { return o; });
}
template <class T>
inline void atomic_store_explicit(volatile atomic<T>* p, T v, memory_order) {
    detail::atomic_op((const atomic<T>*)p, 1, [v](T) { return v; });
}
template <class T>
inline T atomic_exchange_explicit(volatile atomic<T>* p, T v, memory_order) {
    return detail::atomic_op((const atomic<T>*)p, 1, [v](T) { return v; });
}
template <class T>
inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* p, T* expected, T v, memory_order,
                                                  memory_order) {
    const T want = *expected;
    const T old = detail::atomic_op((const atomic<T>*)p, 1, [=](T o) { return o == want ? v : o; });
    *expected = old;
    return old == want;
}
#define MSL_ATOMIC(name, expr)                                                                   \
    template <class T, class U>                                                                  \
    inline T atomic_fetch_##name##_explicit(volatile atomic<T>* p, U u, memory_order) {          \
        const T v = T(u);                                                                        \
        return detail::atomic_op((const atomic<T>*)p, 1, [v](T o) { return T(expr); });          \
    }
MSL_ATOMIC(add, o + v) MSL_ATOMIC(sub, o - v) MSL_ATOMIC(and, o & v) MSL_ATOMIC(or, o | v)
MSL_ATOMIC(xor, o ^ v) MSL_ATOMIC(min, (v < o ? v : o)) MSL_ATOMIC(max, (o < v ? v : o))
#undef MSL_ATOMIC

} // namespace metal

// In MSL the type names and as_type are visible without `using namespace metal`.
#define MSL_EXPORT(T)                                                                            \
    using metal::T##2; using metal::T##3; using metal::T##4;                                     \
    using metal::packed_##T##2; using metal::packed_##T##3; using metal::packed_##T##4;
using metal::as_type;
using metal::bfloat;
using metal::half;
using metal::uchar;
using metal::uint;
using metal::ulong;
using metal::ushort;
using metal::vec;
MSL_EXPORT(bool) MSL_EXPORT(char) MSL_EXPORT(uchar) MSL_EXPORT(short) MSL_EXPORT(ushort)
MSL_EXPORT(int) MSL_EXPORT(uint) MSL_EXPORT(long) MSL_EXPORT(ulong) MSL_EXPORT(half)
MSL_EXPORT(float) MSL_EXPORT(bfloat)
#undef MSL_EXPORT
using metal::float2x2; using metal::float2x3; using metal::float2x4; using metal::float3x2;
using metal::float3x3; using metal::float3x4; using metal::float4x2; using metal::float4x3;
using metal::float4x4; using metal::half2x2; using metal::half2x3; using metal::half2x4;
using metal::half3x2; using metal::half3x3; using metal::half3x4; using metal::half4x2;
using metal::half4x3; using metal::half4x4;

// ============================================================================ kernel arguments

namespace msl_call {
using namespace metal;
template <class P>
struct arg { // a builtin passed by value: uint, ushort, uint2, uint3, ushort3 ...
    typedef std::remove_cv_t<P> V;
    static V get(uint32_t i) {
        uint32_t p[3];
        msl_rt_builtin(i, p);
        if constexpr (detail::is_scalar<V>) {
            return V(p[0]);
        } else {
            V r(0);
            for (int k = 0; k < V::size && k < 3; k++) r.v[k] = p[k];
            return r;
        }
    }
    static constexpr uint32_t min_bytes = 0;
};
template <class T>
struct arg<T*> {
    static T* get(uint32_t i) { return (T*)msl_rt_arg(i); }
    static constexpr uint32_t min_bytes = 0;
};
template <class T>
struct arg<T&> {
    static T& get(uint32_t i) { return *(T*)msl_rt_arg(i); }
    static constexpr uint32_t min_bytes = sizeof(T);
};
template <class... P, size_t... I>
inline void invoke(void (*f)(P...), std::index_sequence<I...>) {
    f(arg<P>::get(uint32_t(I))...);
}
template <class... P>
inline void invoke(void (*f)(P...)) {
    invoke(f, std::make_index_sequence<sizeof...(P)>());
}
// sizeof(T) of reference parameter number i, 0 for anything else
template <class... P>
constexpr uint32_t min_bytes(void (*)(P...), uint32_t i) {
    const uint32_t b[] = {arg<P>::min_bytes..., 0};
    return b[i];
}
template <class... P>
constexpr uint32_t n_params(void (*)(P...)) {
    return sizeof...(P);
}
} // namespace msl_call

// Storage of one `threadgroup T name[N];` declaration.
template <class T>
inline T& msl_tg_var(uint32_t id, const char* name, int line) {
    return *(T*)msl_rt_tg_var(id, sizeof(T), alignof(T), name, line);
}
