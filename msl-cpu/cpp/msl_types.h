// Scalars, vectors and matrices of the Metal standard library. Included by msl_stdlib.h only, see there.

#ifndef MSL_SWIZZLES_2
#define MSL_SWIZZLES_2
#define MSL_SWIZZLES_3
#define MSL_SWIZZLES_4
#endif
#if defined(__FLT16_MAX__) && !defined(MSL_SOFT_HALF)
#define MSL_NATIVE_HALF 1
#endif
#define MSL_UNCHECKED __attribute__((no_sanitize("thread")))
#define MSL_SITE const char *msl_file = __builtin_FILE(), int msl_line = __builtin_LINE()

namespace metal {

// ============================================================================ scalar types

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::ptrdiff_t;
using ::size_t;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;

template <class D, class S>
constexpr D as_type(const S& s) {
    static_assert(sizeof(D) == sizeof(S), "as_type needs equal sizes");
    return __builtin_bit_cast(D, s);
}

namespace detail {
struct half_format { // IEEE binary16, round to nearest even
    static constexpr float to_float(uint16_t h) {
        uint32_t s = uint32_t(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 0x3ff;
        if (e == 0) {
            float f = float(m) * 5.9604644775390625e-08f; // m * 2^-24, exact
            return s ? -f : f;
        }
        return as_type<float>(e == 31 ? s | 0x7f800000u | (m << 13) : s | ((e + 112) << 23) | (m << 13));
    }
    static constexpr uint16_t from_float(float f) {
        uint32_t x = as_type<uint32_t>(f), s = (x >> 16) & 0x8000;
        x &= 0x7fffffff;
        if (x >= 0x7f800000u) return uint16_t(s | 0x7c00 | (x > 0x7f800000u ? 0x200 : 0));
        if (x >= 0x477ff000u) return uint16_t(s | 0x7c00); // >= 65520 rounds to infinity
        if (x < 0x33000000u) return uint16_t(s);           // < 2^-25 rounds to zero
        if (x < 0x38800000u) {                             // subnormal result
            uint32_t sh = 126 - (x >> 23), m = (x & 0x7fffff) | 0x800000, r = m >> sh;
            uint32_t rem = m & ((1u << sh) - 1), mid = 1u << (sh - 1);
            return uint16_t(s | (r + (rem > mid || (rem == mid && (r & 1)))));
        }
        uint32_t r = x - 0x38000000u;
        return uint16_t(s | ((r + 0xfff + ((r >> 13) & 1)) >> 13));
    }
};
struct bfloat_format { // top half of a float, round to nearest even
    static constexpr float to_float(uint16_t h) { return as_type<float>(uint32_t(h) << 16); }
    static constexpr uint16_t from_float(float f) {
        uint32_t x = as_type<uint32_t>(f);
        if ((x & 0x7fffffff) > 0x7f800000u) return uint16_t((x >> 16) | 0x40);
        return uint16_t((x + 0x7fff + ((x >> 16) & 1)) >> 16);
    }
};

// A 16-bit float that rounds after every operation. Used for bfloat always, and for half where
// the compiler has no usable _Float16 (clang < 15 on x86). One known gap against a built-in
// type: `cond ? half : float` and `cond ? half : 0` are ambiguous (a compile error, never a
// silent change).
template <class F>
struct soft16 {
    uint16_t bits;
    soft16() = default;
    template <class S, class = std::enable_if_t<std::is_arithmetic<S>::value>>
    constexpr soft16(S v) : bits(F::from_float(float(v))) {}
    template <class G, class = std::enable_if_t<!std::is_same<F, G>::value>>
    explicit constexpr soft16(soft16<G> v) : bits(F::from_float(float(v))) {}
#ifdef MSL_NATIVE_HALF
    explicit constexpr soft16(_Float16 v) : bits(F::from_float(float(v))) {}
#endif
    constexpr operator float() const { return F::to_float(bits); }
    constexpr soft16 operator-() const { return soft16(-float(*this)); }
    constexpr soft16 operator+() const { return *this; }
#define MSL_OP(op)                                                                               \
    template <class S>                                                                           \
    constexpr soft16& operator op##=(S v) { return *this = soft16(float(*this) op float(v)); }
    MSL_OP(+) MSL_OP(-) MSL_OP(*) MSL_OP(/)
#undef MSL_OP
};
#define MSL_OP(op)                                                                               \
    template <class F>                                                                           \
    constexpr soft16<F> operator op(soft16<F> a, soft16<F> b) {                                  \
        return soft16<F>(float(a) op float(b));                                                  \
    }                                                                                            \
    template <class F, class S, class = std::enable_if_t<std::is_integral<S>::value>>            \
    constexpr soft16<F> operator op(soft16<F> a, S b) { return a op soft16<F>(b); }              \
    template <class F, class S, class = std::enable_if_t<std::is_integral<S>::value>>            \
    constexpr soft16<F> operator op(S a, soft16<F> b) { return soft16<F>(a) op b; }
MSL_OP(+) MSL_OP(-) MSL_OP(*) MSL_OP(/)
#undef MSL_OP
} // namespace detail

#ifdef MSL_NATIVE_HALF
typedef _Float16 half; // rounds every operation under -fexcess-precision=16 / none
#else
typedef detail::soft16<detail::half_format> half;
#endif
typedef detail::soft16<detail::bfloat_format> bfloat;

// ============================================================================ type traits

using std::conditional_t;
using std::declval;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible;
using std::is_convertible_v;
using std::is_integral;
using std::is_integral_v;
using std::is_pointer;
using std::is_same;
using std::is_same_v;
using std::is_signed;
using std::is_unsigned;
using std::make_signed_t;
using std::make_unsigned_t;
using std::remove_const_t;
using std::remove_cv_t;
using std::remove_pointer_t;
using std::remove_reference_t;
using std::true_type;

template <class T>
struct is_floating_point
    : integral_constant<bool, is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>> {};
template <class T>
constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct is_arithmetic : integral_constant<bool, is_integral_v<T> || is_floating_point_v<T>> {};
template <class T>
constexpr bool is_arithmetic_v = is_arithmetic<T>::value;

namespace detail {
// anything a scalar can be in C++ (double appears only if a kernel forces it)
template <class T>
constexpr bool is_scalar = is_arithmetic_v<T> || std::is_arithmetic<T>::value;
} // namespace detail

template <class T>
struct __is_valid_simdgroup_type
    : integral_constant<bool, is_arithmetic_v<T> && sizeof(T) <= 4 && !is_same_v<T, bool> &&
                                  !is_same_v<T, bfloat>> {};

template <class T>
struct _numeric_limits_impl : std::numeric_limits<T> {};
template <>
struct _numeric_limits_impl<half> {
    static constexpr bool is_specialized = true;
    static constexpr int digits = 11;
    static constexpr half lowest() { return half(-65504.0f); }
    static constexpr half max() { return half(65504.0f); }
    static constexpr half min() { return half(6.103515625e-05f); }
    static constexpr half epsilon() { return half(0.0009765625f); }
    static constexpr half infinity() { return half(__builtin_inff()); }
    static constexpr half quiet_NaN() { return half(__builtin_nanf("")); }
};
template <>
struct _numeric_limits_impl<bfloat> {
    static constexpr bool is_specialized = true;
    static constexpr int digits = 8;
    static constexpr bfloat lowest() { return bfloat(-3.38953139e38f); }
    static constexpr bfloat max() { return bfloat(3.38953139e38f); }
    static constexpr bfloat min() { return bfloat(1.175494351e-38f); }
    static constexpr bfloat epsilon() { return bfloat(0.0078125f); }
    static constexpr bfloat infinity() { return bfloat(__builtin_inff()); }
    static constexpr bfloat quiet_NaN() { return bfloat(__builtin_nanf("")); }
};
template <class T>
struct numeric_limits : _numeric_limits_impl<T> {};

// ============================================================================ vectors

template <class T, int N>
struct vec;
template <class T, int N>
struct packed_vec;

namespace detail {
template <class A>
struct count { static constexpr int value = is_scalar<A> ? 1 : -100; };
template <class T, int N>
struct count<vec<T, N>> { static constexpr int value = N; };
template <class T, int N>
struct count<packed_vec<T, N>> { static constexpr int value = N; };
template <class A, class T>
constexpr void put(T* v, int& k, const A& a) {
    if constexpr (is_scalar<A>) {
        v[k++] = T(a);
    } else {
        for (int i = 0; i < count<A>::value; i++) v[k++] = T(a.v[i]);
    }
}
template <class T, int... I>
struct swizzle_ref { // the left side of `a.xy = ...`
    T* v;
    typedef vec<T, int(sizeof...(I))> V;
#define MSL_OP(op)                                                                               \
    void operator op(const V& o) {                                                               \
        int k = 0;                                                                               \
        ((v[I] op o.v[k++]), ...);                                                               \
    }
    MSL_OP(=) MSL_OP(+=) MSL_OP(-=) MSL_OP(*=) MSL_OP(/=) MSL_OP(&=) MSL_OP(|=) MSL_OP(^=)
#undef MSL_OP
};
} // namespace detail

#define MSL_SW2(name, i, j)                                                                      \
    constexpr vec<T, 2> name() const { return vec<T, 2>(v[i], v[j]); }                           \
    detail::swizzle_ref<T, i, j> set_##name() { return {v}; }
#define MSL_SW3(name, i, j, k)                                                                   \
    constexpr vec<T, 3> name() const { return vec<T, 3>(v[i], v[j], v[k]); }                     \
    detail::swizzle_ref<T, i, j, k> set_##name() { return {v}; }
#define MSL_SW4(name, i, j, k, l)                                                                \
    constexpr vec<T, 4> name() const { return vec<T, 4>(v[i], v[j], v[k], v[l]); }               \
    detail::swizzle_ref<T, i, j, k, l> set_##name() { return {v}; }

#define MSL_BIN(op)                                                                              \
    friend constexpr vec operator op(const vec& a, const vec& b) {                               \
        vec r{};                                                                                 \
        for (int i = 0; i < size; i++) r.v[i] = T(a.v[i] op b.v[i]);                             \
        return r;                                                                                \
    }                                                                                            \
    constexpr vec& operator op##=(const vec& b) { return *this = *this op b; }
#define MSL_CMP(op)                                                                              \
    friend constexpr vec<bool, size> operator op(const vec& a, const vec& b) {                   \
        vec<bool, size> r{};                                                                     \
        for (int i = 0; i < size; i++) r.v[i] = a.v[i] op b.v[i];                                \
        return r;                                                                                \
    }
#define MSL_UN(op, R)                                                                            \
    constexpr vec<R, size> operator op() const {                                                 \
        vec<R, size> r{};                                                                        \
        for (int i = 0; i < size; i++) r.v[i] = R(op v[i]);                                      \
        return r;                                                                                \
    }
// Scalars splat implicitly, vectors of another element type convert only explicitly (as in MSL).
#define MSL_VEC_BODY(N)                                                                          \
    static constexpr int size = N;                                                               \
    vec() = default;                                                                             \
    template <class S, class = enable_if_t<detail::is_scalar<S>>>                                \
    constexpr vec(S s) : v{} {                                                                   \
        for (int i = 0; i < N; i++) v[i] = T(s);                                                 \
    }                                                                                            \
    template <class U, class = enable_if_t<!is_same_v<U, T>>>                                    \
    explicit constexpr vec(const vec<U, N>& o) : v{} {                                           \
        for (int i = 0; i < N; i++) v[i] = T(o.v[i]);                                            \
    }                                                                                            \
    template <class A, class B, class... R,                                                      \
              class = enable_if_t<detail::count<A>::value + detail::count<B>::value +            \
                                      (0 + ... + detail::count<R>::value) == N>>                 \
    constexpr vec(const A& a, const B& b, const R&... r) : v{} {                                 \
        int k = 0;                                                                               \
        detail::put(v, k, a);                                                                    \
        detail::put(v, k, b);                                                                    \
        (detail::put(v, k, r), ...);                                                             \
    }                                                                                            \
    constexpr T& operator[](int i) { return v[i]; }                                              \
    constexpr const T& operator[](int i) const { return v[i]; }                                  \
    MSL_BIN(+) MSL_BIN(-) MSL_BIN(*) MSL_BIN(/) MSL_BIN(%) MSL_BIN(&) MSL_BIN(|) MSL_BIN(^)      \
    MSL_BIN(<<) MSL_BIN(>>) MSL_CMP(<) MSL_CMP(<=) MSL_CMP(>) MSL_CMP(>=) MSL_CMP(==)            \
    MSL_CMP(!=) MSL_CMP(&&) MSL_CMP(||) MSL_UN(-, T) MSL_UN(~, T) MSL_UN(!, bool)

template <class T>
struct alignas(sizeof(T) * 2) vec<T, 2> {
    union {
        T v[2];
        struct { T x, y; };
        struct { T r, g; };
    };
    MSL_VEC_BODY(2)
    MSL_SWIZZLES_2
};
template <class T>
struct alignas(sizeof(T) * 4) vec<T, 3> {
    union {
        T v[3];
        struct { T x, y, z; };
        struct { T r, g, b; };
    };
    MSL_VEC_BODY(3)
    MSL_SWIZZLES_3
};
template <class T>
struct alignas(sizeof(T) * 4) vec<T, 4> {
    union {
        T v[4];
        struct { T x, y, z, w; };
        struct { T r, g, b, a; };
    };
    MSL_VEC_BODY(4)
    MSL_SWIZZLES_4
};
#undef MSL_BIN
#undef MSL_CMP
#undef MSL_UN
#undef MSL_VEC_BODY
#undef MSL_SW2
#undef MSL_SW3
#undef MSL_SW4

// packed_half4 and friends: scalar alignment; converts to and from the plain vector.
namespace detail {
template <class T, int N>
struct packed_data;
template <class T>
struct packed_data<T, 2> { union { T v[2]; struct { T x, y; }; }; };
template <class T>
struct packed_data<T, 3> { union { T v[3]; struct { T x, y, z; }; }; };
template <class T>
struct packed_data<T, 4> { union { T v[4]; struct { T x, y, z, w; }; }; };
} // namespace detail
template <class T, int N>
struct packed_vec : detail::packed_data<T, N> {
    using detail::packed_data<T, N>::v;
    packed_vec() = default;
    constexpr packed_vec(const vec<T, N>& o) : detail::packed_data<T, N>{} {
        for (int i = 0; i < N; i++) v[i] = o.v[i];
    }
    template <class A, class B, class... R>
    constexpr packed_vec(A a, B b, R... r) : packed_vec(vec<T, N>(a, b, r...)) {}
    constexpr operator vec<T, N>() const {
        vec<T, N> r{};
        for (int i = 0; i < N; i++) r.v[i] = v[i];
        return r;
    }
    constexpr T& operator[](int i) { return v[i]; }
    constexpr const T& operator[](int i) const { return v[i]; }
    template <class S>
    friend constexpr vec<T, N> operator*(const packed_vec& a, const S& b) { return vec<T, N>(a) * b; }
    template <class S>
    friend constexpr vec<T, N> operator+(const packed_vec& a, const S& b) { return vec<T, N>(a) + b; }
    template <class S>
    friend constexpr vec<T, N> operator-(const packed_vec& a, const S& b) { return vec<T, N>(a) - b; }
};

#define MSL_ALIASES(T)                                                                           \
    typedef vec<T, 2> T##2;                                                                      \
    typedef vec<T, 3> T##3;                                                                      \
    typedef vec<T, 4> T##4;                                                                      \
    typedef packed_vec<T, 2> packed_##T##2;                                                      \
    typedef packed_vec<T, 3> packed_##T##3;                                                      \
    typedef packed_vec<T, 4> packed_##T##4;
MSL_ALIASES(bool) MSL_ALIASES(char) MSL_ALIASES(uchar) MSL_ALIASES(short) MSL_ALIASES(ushort)
MSL_ALIASES(int) MSL_ALIASES(uint) MSL_ALIASES(long) MSL_ALIASES(ulong) MSL_ALIASES(half)
MSL_ALIASES(float) MSL_ALIASES(bfloat)
#undef MSL_ALIASES

template <class T>
struct vec_elements : integral_constant<int, 1> {};
template <class T, int N>
struct vec_elements<vec<T, N>> : integral_constant<int, N> {};

namespace detail {
// vec_of_t<A, B...>: the vector type among the arguments; substitution failure if none.
template <class... A>
struct vec_of {};
template <class T, int N, class... R>
struct vec_of<vec<T, N>, R...> { typedef vec<T, N> type; };
template <class S, class... R>
struct vec_of<S, R...> : vec_of<R...> {};
template <class... A>
using vec_of_t = typename vec_of<A...>::type;
} // namespace detail

template <class T, size_t N>
struct array {
    T __elems[N];
    constexpr T& operator[](size_t i) { return __elems[i]; }
    constexpr const T& operator[](size_t i) const { return __elems[i]; }
    static constexpr size_t size() { return N; }
};

// ============================================================================ matrices

template <class T, int C, int R>
struct matrix { // column-major: m[c] is a column vector
    vec<T, R> columns[C];
    matrix() = default;
    explicit constexpr matrix(T diagonal) : columns{} {
        for (int c = 0; c < C; c++) columns[c][c < R ? c : 0] = c < R ? diagonal : T(0);
    }
    template <class U, class = enable_if_t<!is_same_v<U, T>>>
    explicit constexpr matrix(const matrix<U, C, R>& o) : columns{} {
        for (int c = 0; c < C; c++) columns[c] = vec<T, R>(o.columns[c]);
    }
    template <class... V, class = enable_if_t<sizeof...(V) == C && C >= 2 &&
                                              (is_convertible_v<V, vec<T, R>> && ...)>>
    constexpr matrix(const V&... cols) : columns{vec<T, R>(cols)...} {}
    constexpr vec<T, R>& operator[](int c) { return columns[c]; }
    constexpr const vec<T, R>& operator[](int c) const { return columns[c]; }
    friend constexpr vec<T, R> operator*(const matrix& m, const vec<T, C>& x) {
        vec<T, R> r = m.columns[0] * x.v[0];
        for (int c = 1; c < C; c++) r += m.columns[c] * x.v[c];
        return r;
    }
    friend constexpr vec<T, C> operator*(const vec<T, R>& x, const matrix& m) {
        vec<T, C> r{};
        for (int c = 0; c < C; c++)
            for (int i = 0; i < R; i++) r.v[c] = T(r.v[c] + x.v[i] * m.columns[c].v[i]);
        return r;
    }
    friend constexpr matrix operator*(const matrix& m, T s) {
        matrix r = m;
        for (int c = 0; c < C; c++) r.columns[c] *= s;
        return r;
    }
    friend constexpr matrix operator*(T s, const matrix& m) { return m * s; }
    friend constexpr matrix operator+(const matrix& a, const matrix& b) {
        matrix r = a;
        for (int c = 0; c < C; c++) r.columns[c] += b.columns[c];
        return r;
    }
    friend constexpr matrix operator-(const matrix& a, const matrix& b) {
        matrix r = a;
        for (int c = 0; c < C; c++) r.columns[c] -= b.columns[c];
        return r;
    }
    constexpr matrix& operator+=(const matrix& b) { return *this = *this + b; }
    constexpr matrix& operator*=(T s) { return *this = *this * s; }
};
template <class T, int C, int R, int K>
constexpr matrix<T, K, R> operator*(const matrix<T, C, R>& a, const matrix<T, K, C>& b) {
    matrix<T, K, R> r;
    for (int k = 0; k < K; k++) r.columns[k] = a * b.columns[k];
    return r;
}
#define MSL_MATRICES(T)                                                                          \
    typedef matrix<T, 2, 2> T##2x2;                                                              \
    typedef matrix<T, 2, 3> T##2x3;                                                              \
    typedef matrix<T, 2, 4> T##2x4;                                                              \
    typedef matrix<T, 3, 2> T##3x2;                                                              \
    typedef matrix<T, 3, 3> T##3x3;                                                              \
    typedef matrix<T, 3, 4> T##3x4;                                                              \
    typedef matrix<T, 4, 2> T##4x2;                                                              \
    typedef matrix<T, 4, 3> T##4x3;                                                              \
    typedef matrix<T, 4, 4> T##4x4;
MSL_MATRICES(half) MSL_MATRICES(float)
#undef MSL_MATRICES

} // namespace metal
