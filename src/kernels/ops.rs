//! What a layer does to its rows besides products and attention: norms, rotary embeddings, activations, softmax.
//!
//! All are made of [`Simd`]'s operations in an order that does not depend on the instruction set, so each gives the same
//! bits on every one. A row's last lanes go through a padded copy, so its length can be any.

use super::simd::{Isa, Kernel, LANES, Simd};

/// What a gated layer applies to its gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU with the error function.
    Gelu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`. NaN where the sum of squares is beyond f32.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let len = x.len();
    assert!(weight.len() == len && out.len() == len, "norm of {len} values with wrong sizes");
    // SAFETY: an `Isa` is one that this CPU has; all three are `len` long.
    unsafe { isa.run(RmsNorm { x: x.as_ptr(), weight: weight.as_ptr(), out: out.as_mut_ptr(), len, eps }) }
}

/// [`rms_norm`] in place.
pub fn rms_norm_in_place(isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    let len = x.len();
    assert!(weight.len() == len, "norm of {len} values with {} weights", weight.len());
    let out = x.as_mut_ptr();
    // SAFETY: as above.
    unsafe { isa.run(RmsNorm { x: out, weight: weight.as_ptr(), out, len, eps }) }
}

/// `x = factor * y + x`, rounded once.
pub fn add_scaled(isa: Isa, x: &mut [f32], y: &[f32], factor: f32) {
    zip(isa, x, y, AddScaled(factor));
}

/// `gate = activation(gate) * up`.
pub fn activate_mul(isa: Isa, activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => zip(isa, gate, up, SiluMul),
        Activation::Gelu => zip(isa, gate, up, GeluMul),
        Activation::GeluTanh => zip(isa, gate, up, GeluTanhMul),
    }
}

/// `x = factor * x`.
pub fn scale(isa: Isa, x: &mut [f32], factor: f32) {
    each(isa, x, Scale(factor));
}

/// `x = cap * tanh(x / cap)`; NaN for infinite values.
pub fn soft_cap(isa: Isa, x: &mut [f32], cap: f32) {
    each(isa, x, SoftCap { cap, inverse: 1.0 / cap });
}

/// Rotates the pairs of `x`, the rotated part of one head, by the angles whose `cos` and `sin` are given, half as many as
/// there are values. A pair is `i` and `i + x.len() / 2`, or, where `interleaved`, `2 * i` and `2 * i + 1`.
pub fn rotate(isa: Isa, x: &mut [f32], cos: &[f32], sin: &[f32], interleaved: bool) {
    let pairs = cos.len();
    assert!(sin.len() == pairs && x.len() == 2 * pairs, "rotation of {} values by {pairs} angles", x.len());
    if interleaved {
        // Neighbours would have to change lanes. These are the operations that the vectors below do.
        for ((pair, cos), sin) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
            (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
        }
        return;
    }
    let (low, high) = x.split_at_mut(pairs);
    let (low, high) = (low.as_mut_ptr(), high.as_mut_ptr());
    // SAFETY: an `Isa` is one that this CPU has; all four are `pairs` long.
    unsafe { isa.run(Rotate { low, high, cos: cos.as_ptr(), sin: sin.as_ptr(), pairs }) }
}

/// `x = exp(x) / sum(exp(x))`. Minus infinity becomes 0; at least one value must be finite.
pub fn softmax(isa: Isa, x: &mut [f32]) {
    // SAFETY: an `Isa` is one that this CPU has.
    unsafe { isa.run(Softmax { x: x.as_mut_ptr(), len: x.len() }) }
}

/// Loads the first `len` lanes; the others are `rest`.
///
/// # Safety
/// As of [`Simd`]; `from` points to `len` values.
#[inline(always)]
pub(super) unsafe fn load_part<S: Simd>(from: *const f32, len: usize, rest: f32) -> S::F {
    // SAFETY: a whole vector is read only where there is one.
    unsafe {
        if len >= LANES {
            return S::load(from);
        }
        let mut all = [rest; LANES];
        std::ptr::copy_nonoverlapping(from, all.as_mut_ptr(), len);
        S::load(all.as_ptr())
    }
}

/// Stores the first `len` lanes.
///
/// # Safety
/// As of [`Simd`]; `to` points to `len` values.
#[inline(always)]
pub(super) unsafe fn store_part<S: Simd>(to: *mut f32, len: usize, value: S::F) {
    // SAFETY: a whole vector is written only where it fits.
    unsafe {
        if len >= LANES {
            return S::store(to, value);
        }
        let mut all = [0f32; LANES];
        S::store(all.as_mut_ptr(), value);
        std::ptr::copy_nonoverlapping(all.as_ptr(), to, len);
    }
}

/// Splits x into `n` and `r` with `x = n * ln(2) + r` and n whole, and returns 2^n, r and `exp(r) - 1 - r`.
///
/// # Safety
/// As of [`Simd`]; n must be in -127..=128.
#[inline(always)]
unsafe fn exp_parts<S: Simd>(x: S::F) -> (S::F, S::F, S::F) {
    // SAFETY: this function's conditions.
    unsafe {
        // One below and one above what `power_of_two` promises: there its bits are those of 0 and infinity.
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let whole = S::to_f32(n);
        // ln(2) in two parts. The first has few enough bits for its product with n to be exact.
        let r = S::fma(whole, S::splat(-0.693_145_75), x);
        let r = S::fma(whole, S::splat(-1.428_606_8e-6), r);
        // (exp(r) - 1 - r) / r^2 for r within half of ln(2), to 1.4e-8 of exp(r) - 1.
        let p = S::fma(S::splat(0.001_394_642_7), r, S::splat(0.008_366_571));
        let p = S::fma(p, r, S::splat(0.041_666_28));
        let p = S::fma(p, r, S::splat(0.166_665_43));
        let p = S::fma(p, r, S::splat(0.5));
        (S::power_of_two(n), r, S::mul(p, S::mul(r, r)))
    }
}

/// exp(x), to 2 units in the last place from -87.3 to 88.3. Exactly 0 below -87.7, and infinity above 88.4.
///
/// # Safety
/// As of [`Simd`].
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: this function's conditions; n is -127 at the lower limit and 128 at the upper. NaN stays NaN: the limits
    // come first, so that the comparisons give it back.
    unsafe {
        let x = S::min(S::splat(88.8), S::max(S::splat(-88.0), x));
        let (power, r, rest) = exp_parts::<S>(x);
        S::mul(power, S::add(S::splat(1.0), S::add(r, rest)))
    }
}

/// tanh(x), to a few units in the last place, near 0 too.
///
/// # Safety
/// As of [`Simd`].
#[inline(always)]
unsafe fn tanh<S: Simd>(x: S::F) -> S::F {
    // SAFETY: this function's conditions; n is at most 29.
    unsafe {
        // It is 1 in f32 from 9.1 on.
        let x = S::min(S::splat(10.0), S::max(S::splat(-10.0), x));
        // With e = exp(2 x) - 1, whose small values are exact: e / (e + 2).
        let (power, r, rest) = exp_parts::<S>(S::add(x, x));
        let e = S::fma(power, S::add(r, rest), S::sub(power, S::splat(1.0)));
        S::div(e, S::add(e, S::splat(2.0)))
    }
}

/// erfc(x) for x from 0 on, to 1e-7 of 1, and to 1e-5 of itself.
///
/// # Safety
/// As of [`Simd`].
#[inline(always)]
unsafe fn erfc<S: Simd>(x: S::F) -> S::F {
    // SAFETY: this function's conditions.
    unsafe {
        // exp(-x^2) times a polynomial in 1 / (1 + 0.3 x), fitted for x up to 10, behind which the first factor is 0.
        let t = S::div(S::splat(1.0), S::fma(x, S::splat(0.3), S::splat(1.0)));
        let p = S::fma(S::splat(-0.129_522_74), t, S::splat(0.485_562_38));
        let p = S::fma(p, t, S::splat(-0.512_276_4));
        let p = S::fma(p, t, S::splat(0.547_718_1));
        let p = S::fma(p, t, S::splat(-0.094_649_4));
        let p = S::fma(p, t, S::splat(0.214_925_5));
        let p = S::fma(p, t, S::splat(0.148_339_31));
        let p = S::fma(p, t, S::splat(0.170_715_2));
        let p = S::fma(p, t, S::splat(0.169_188));
        let square = S::mul(x, x);
        S::mul(exp::<S>(S::sub(S::splat(0.0), square)), S::mul(p, t))
    }
}

/// `x / (1 + exp(-y))`.
///
/// # Safety
/// As of [`Simd`].
#[inline(always)]
unsafe fn times_sigmoid<S: Simd>(x: S::F, y: S::F) -> S::F {
    // SAFETY: this function's conditions.
    unsafe { S::div(x, S::add(S::splat(1.0), exp::<S>(S::sub(S::splat(0.0), y)))) }
}

/// `cap * tanh(x / cap)`, given the inverse of the cap. Of an infinite value NaN: a cap would hide that arithmetic went
/// wrong.
///
/// # Safety
/// As of [`Simd`].
#[inline(always)]
pub(super) unsafe fn capped<S: Simd>(x: S::F, cap: f32, inverse: f32) -> S::F {
    // SAFETY: this function's conditions.
    unsafe { S::sub(S::mul(S::splat(cap), tanh::<S>(S::mul(x, S::splat(inverse)))), S::sub(x, x)) }
}

/// A function of each value.
trait Map {
    /// # Safety
    /// As of [`Simd`].
    unsafe fn map<S: Simd>(&self, x: S::F) -> S::F;
}

/// A function of two rows' values.
trait Map2 {
    /// # Safety
    /// As of [`Simd`].
    unsafe fn map<S: Simd>(&self, x: S::F, y: S::F) -> S::F;
}

struct Scale(f32);
struct SoftCap {
    cap: f32,
    inverse: f32,
}
struct AddScaled(f32);
struct SiluMul;
struct GeluMul;
struct GeluTanhMul;

// SAFETY of all blocks: the functions' conditions.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Map for Scale {
    #[inline(always)]
    unsafe fn map<S: Simd>(&self, x: S::F) -> S::F {
        unsafe { S::mul(x, S::splat(self.0)) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Map for SoftCap {
    #[inline(always)]
    unsafe fn map<S: Simd>(&self, x: S::F) -> S::F {
        unsafe { capped::<S>(x, self.cap, self.inverse) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Map2 for AddScaled {
    #[inline(always)]
    unsafe fn map<S: Simd>(&self, x: S::F, y: S::F) -> S::F {
        unsafe { S::fma(y, S::splat(self.0), x) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Map2 for SiluMul {
    #[inline(always)]
    unsafe fn map<S: Simd>(&self, gate: S::F, up: S::F) -> S::F {
        unsafe { S::mul(times_sigmoid::<S>(gate, gate), up) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Map2 for GeluMul {
    #[inline(always)]
    unsafe fn map<S: Simd>(&self, x: S::F, up: S::F) -> S::F {
        unsafe {
            // x * (1 - erfc(x / sqrt(2)) / 2), and as erfc(-x) is 2 - erfc(x), for both signs:
            // max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2. From 20 on the product is 0; of infinity it is NaN.
            let size = S::abs(x);
            let tail = erfc::<S>(S::mul(S::min(S::splat(20.0), size), S::splat(std::f32::consts::FRAC_1_SQRT_2)));
            let positive = S::max(S::splat(0.0), x);
            S::mul(S::fma(S::mul(size, S::splat(-0.5)), tail, positive), up)
        }
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Map2 for GeluTanhMul {
    #[inline(always)]
    unsafe fn map<S: Simd>(&self, x: S::F, up: S::F) -> S::F {
        unsafe {
            // x / 2 * (1 + tanh(y)) is x * sigmoid(2 y), with y = sqrt(2 / pi) * (x + 0.044715 x^3).
            let inner = S::fma(S::mul(x, x), S::splat(0.071_354_814), S::splat(1.595_769));
            S::mul(times_sigmoid::<S>(x, S::mul(x, inner)), up)
        }
    }
}

fn each(isa: Isa, x: &mut [f32], map: impl Map) {
    // SAFETY: an `Isa` is one that this CPU has.
    unsafe { isa.run(Each { x: x.as_mut_ptr(), len: x.len(), map }) }
}

fn zip(isa: Isa, x: &mut [f32], y: &[f32], map: impl Map2) {
    assert!(x.len() == y.len(), "{} values with {} others", x.len(), y.len());
    // SAFETY: as above; both are equally long.
    unsafe { isa.run(Zip { x: x.as_mut_ptr(), y: y.as_ptr(), len: x.len(), map }) }
}

struct Each<M> {
    x: *mut f32,
    len: usize,
    map: M,
}

impl<M: Map> Kernel for Each<M> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for i in (0..self.len).step_by(LANES) {
            let rest = self.len - i;
            // SAFETY: `x` has `rest` values from `i` on.
            unsafe {
                let x = load_part::<S>(self.x.add(i), rest, 0.0);
                store_part::<S>(self.x.add(i), rest, self.map.map::<S>(x));
            }
        }
    }
}

struct Zip<M> {
    x: *mut f32,
    y: *const f32,
    len: usize,
    map: M,
}

impl<M: Map2> Kernel for Zip<M> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for i in (0..self.len).step_by(LANES) {
            let rest = self.len - i;
            // SAFETY: `x` and `y` have `rest` values from `i` on.
            unsafe {
                let x = load_part::<S>(self.x.add(i), rest, 0.0);
                let y = load_part::<S>(self.y.add(i), rest, 0.0);
                store_part::<S>(self.x.add(i), rest, self.map.map::<S>(x, y));
            }
        }
    }
}

struct RmsNorm {
    x: *const f32,
    weight: *const f32,
    /// May be `x`.
    out: *mut f32,
    len: usize,
    eps: f32,
}

impl Kernel for RmsNorm {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: all three have `len - i` values from `i` on.
        unsafe {
            // Four sums, since each addition waits for the one before it.
            let mut sums = [S::splat(0.0); 4];
            for start in (0..self.len).step_by(4 * LANES) {
                for (j, sum) in sums.iter_mut().enumerate() {
                    let i = start + j * LANES;
                    if i < self.len {
                        let x = load_part::<S>(self.x.add(i), self.len - i, 0.0);
                        *sum = S::fma(x, x, *sum);
                    }
                }
            }
            let sum = S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
            let factor = 1.0 / (sum / self.len as f32 + self.eps).sqrt();
            // Not 0, which would make an ordinary row out of one that is lost.
            let factor = S::splat(if factor > 0.0 { factor } else { f32::NAN });
            for i in (0..self.len).step_by(LANES) {
                let rest = self.len - i;
                let x = load_part::<S>(self.x.add(i), rest, 0.0);
                let weight = load_part::<S>(self.weight.add(i), rest, 0.0);
                store_part::<S>(self.out.add(i), rest, S::mul(S::mul(x, factor), weight));
            }
        }
    }
}

struct Rotate {
    low: *mut f32,
    high: *mut f32,
    cos: *const f32,
    sin: *const f32,
    pairs: usize,
}

impl Kernel for Rotate {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for i in (0..self.pairs).step_by(LANES) {
            let rest = self.pairs - i;
            // SAFETY: all four have `rest` values from `i` on.
            unsafe {
                let (low, high) =
                    (load_part::<S>(self.low.add(i), rest, 0.0), load_part::<S>(self.high.add(i), rest, 0.0));
                let (cos, sin) =
                    (load_part::<S>(self.cos.add(i), rest, 0.0), load_part::<S>(self.sin.add(i), rest, 0.0));
                store_part::<S>(self.low.add(i), rest, S::sub(S::mul(low, cos), S::mul(high, sin)));
                store_part::<S>(self.high.add(i), rest, S::add(S::mul(high, cos), S::mul(low, sin)));
            }
        }
    }
}

struct Softmax {
    x: *mut f32,
    len: usize,
}

impl Kernel for Softmax {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `x` has `len - i` values from `i` on.
        unsafe {
            let mut most = S::splat(f32::NEG_INFINITY);
            for i in (0..self.len).step_by(LANES) {
                most = S::max(most, load_part::<S>(self.x.add(i), self.len - i, f32::NEG_INFINITY));
            }
            let most = S::splat(S::greatest(most));
            let mut sum = S::splat(0.0);
            for i in (0..self.len).step_by(LANES) {
                let rest = self.len - i;
                let weight = exp::<S>(S::sub(load_part::<S>(self.x.add(i), rest, f32::NEG_INFINITY), most));
                sum = S::add(sum, weight);
                store_part::<S>(self.x.add(i), rest, weight);
            }
            let sum = S::splat(S::sum(sum));
            for i in (0..self.len).step_by(LANES) {
                let rest = self.len - i;
                let weight = load_part::<S>(self.x.add(i), rest, 0.0);
                store_part::<S>(self.x.add(i), rest, S::div(weight, sum));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows as they may come: every number of values behind the last whole vector, with and without whole ones.
    const LENGTHS: std::ops::Range<usize> = 0..150;

    /// Seeded values in -1..1.
    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729 + 13) % 20_011) as f32 / 10_005.5 - 1.0).collect()
    }

    /// Values of every size, of both signs.
    fn wide() -> Vec<f32> {
        let mut wide =
            vec![0.0, f32::MIN_POSITIVE / 8.0, f32::MIN_POSITIVE, 1e-20, 87.0, 88.0, 100.0, 1e4, 1e20, f32::MAX];
        wide.extend((0..20_000).map(|i| (i as f32 * 0.0009).powi(3) / 50.0)); // dense near 0, up to 116
        let negative: Vec<f32> = wide.iter().map(|x| -x).collect();
        wide.extend(negative);
        wide
    }

    fn assert_near(found: f32, want: f64, absolute: f64, relative: f64, what: &dyn std::fmt::Debug) {
        let tolerance = absolute + relative * want.abs();
        assert!((found as f64 - want).abs() <= tolerance, "{what:?}: {found} for {want}");
    }

    /// Runs `op` on `x`, one element behind an aligned address, with every instruction set; all must give the same bits.
    fn on_every_isa(x: &[f32], op: impl Fn(Isa, &mut [f32])) -> Vec<f32> {
        let run = |isa| {
            let mut row = vec![0f32; x.len() + 33];
            let start = row.as_ptr().align_offset(64) + 1;
            row[start..][..x.len()].copy_from_slice(x);
            op(isa, &mut row[start..][..x.len()]);
            assert!(row[..start].iter().chain(&row[start + x.len()..]).all(|&v| v == 0.0), "{isa} writes outside");
            row[start..][..x.len()].to_vec()
        };
        let first = run(Isa::SCALAR);
        for isa in Isa::available() {
            for (i, (a, b)) in first.iter().zip(run(isa)).enumerate() {
                // What is not a number may have any bits.
                assert!(
                    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()),
                    "{isa} [{i}] of {}: {b} for {a}",
                    x.len()
                );
            }
        }
        first
    }

    fn erf(x: f64) -> f64 {
        if x.abs() > 6.0 {
            return x.signum();
        }
        // All terms have one sign: 2 / sqrt(pi) * exp(-x^2) * sum of 2^n x^(2n+1) / (1 * 3 * ... * (2n+1)).
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= 2.0 * x * x / (2 * n + 1) as f64;
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
    }

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        struct Exp;
        impl Map for Exp {
            #[inline(always)]
            unsafe fn map<S: Simd>(&self, x: S::F) -> S::F {
                // SAFETY: this function's conditions.
                unsafe { exp::<S>(x) }
            }
        }
        let x = wide();
        let found = on_every_isa(&x, |isa, x| each(isa, x, Exp));
        for (&x, found) in x.iter().zip(found) {
            match x {
                88.4.. => assert_eq!(found, f32::INFINITY),
                88.3.. => {}
                -87.3.. => assert_near(found, (x as f64).exp(), 0.0, 2.4e-7, &x),
                _ => assert!((0.0..1.3e-38).contains(&found) && (x > -87.7 || found == 0.0), "{x}: {found}"),
            }
        }
        let x = [0.0, -0.0, f32::NEG_INFINITY, f32::INFINITY, f32::NAN];
        let found = on_every_isa(&x, |isa, x| each(isa, x, Exp));
        assert_eq!(found[..4], [1.0, 1.0, 0.0, f32::INFINITY]);
        assert!(found[4].is_nan());
    }

    #[test]
    fn norms_are_right_and_may_be_in_place() {
        for len in LENGTHS.skip(1).chain([896, 4096]) {
            let (x, weight) = (values(len, 1), values(len, 2));
            for factor in [1.0, 1e-5, 1e4] {
                let x: Vec<f32> = x.iter().map(|x| x * factor).collect();
                let found = on_every_isa(&x, |isa, out| rms_norm(isa, &x, &weight, 1e-6, out));
                let squares: f64 = x.iter().map(|&x| x as f64 * x as f64).sum();
                let inverse = 1.0 / (squares / len as f64 + 1e-6).sqrt();
                for i in 0..len {
                    assert_near(found[i], x[i] as f64 * inverse * weight[i] as f64, 0.0, 1e-6, &(len, i));
                }
                assert_eq!(on_every_isa(&x, |isa, x| rms_norm_in_place(isa, x, &weight, 1e-6)), found);
            }
        }
    }

    #[test]
    fn sums_and_factors_are_right() {
        for len in LENGTHS {
            let (x, y) = (values(len, 1), values(len, 2));
            let added = on_every_isa(&x, |isa, x| add_scaled(isa, x, &y, 1.0));
            let scaled = on_every_isa(&x, |isa, x| add_scaled(isa, x, &y, 0.3));
            let multiplied = on_every_isa(&x, |isa, x| scale(isa, x, 0.3));
            for i in 0..len {
                assert_eq!(added[i], x[i] + y[i]);
                assert_eq!(scaled[i], y[i].mul_add(0.3, x[i]));
                assert_eq!(multiplied[i], x[i] * 0.3);
            }
        }
    }

    #[test]
    fn activations_are_right_for_every_length_and_size() {
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let gelu = |x: f64| x * 0.5 * (1.0 + erf(x / 2f64.sqrt()));
        let gelu_tanh =
            |x: f64| x * 0.5 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh());
        let all: [(Activation, &dyn Fn(f64) -> f64); 3] =
            [(Activation::Silu, &silu), (Activation::Gelu, &gelu), (Activation::GeluTanh, &gelu_tanh)];
        for (activation, reference) in all {
            for len in LENGTHS {
                let (gate, up) = (values(len, 1), values(len, 2));
                let found = on_every_isa(&gate, |isa, gate| activate_mul(isa, activation, gate, &up));
                for i in 0..len {
                    let want = reference(gate[i] as f64) * up[i] as f64;
                    assert_near(found[i], want, 1e-7, 1e-6, &(activation, gate[i]));
                }
            }
            let gate = wide();
            let up = vec![1f32; gate.len()];
            let found = on_every_isa(&gate, |isa, gate| activate_mul(isa, activation, gate, &up));
            for (&gate, found) in gate.iter().zip(found) {
                let want = reference(gate as f64);
                let absolute = if gate.abs() < 1e-6 { 1e-45 } else { 3e-7 };
                assert_near(found, want, absolute, 1e-6, &(activation, gate));
            }
            let extremes = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
            let found = on_every_isa(&extremes, |isa, gate| activate_mul(isa, activation, gate, &[1.0; 3]));
            assert!(found.iter().all(|value| !value.is_finite()), "{activation:?}: {found:?}");
        }
    }

    #[test]
    fn caps_are_right_near_zero_and_far_from_it() {
        for cap in [1.0, 30.0, 50.0] {
            let x = wide();
            let found = on_every_isa(&x, |isa, x| soft_cap(isa, x, cap));
            for (&x, found) in x.iter().zip(found) {
                let want = cap as f64 * (x as f64 / cap as f64).tanh();
                assert_near(found, want, 1e-44 * cap as f64, 1e-6, &(cap, x));
            }
            let found = on_every_isa(&[f32::INFINITY, f32::NEG_INFINITY, f32::NAN], |isa, x| soft_cap(isa, x, cap));
            assert!(found.iter().all(|value| value.is_nan()), "{found:?}");
        }
    }

    #[test]
    fn pairs_are_rotated() {
        for pairs in 0..70 {
            let x = values(2 * pairs, 1);
            let angles = values(pairs, 2);
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            for interleaved in [false, true] {
                let found = on_every_isa(&x, |isa, x| rotate(isa, x, &cos, &sin, interleaved));
                for i in 0..pairs {
                    let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + pairs) };
                    assert_eq!(found[a], x[a] * cos[i] - x[b] * sin[i]);
                    assert_eq!(found[b], x[b] * cos[i] + x[a] * sin[i]);
                }
            }
        }
    }

    #[test]
    fn softmax_is_right_and_masks_are_exact() {
        for len in LENGTHS.skip(1).chain([32_003]) {
            for factor in [1.0, 60.0, 1e30] {
                let mut x: Vec<f32> = values(len, 3).iter().map(|x| x * factor).collect();
                for masked in (1..len).step_by(3) {
                    x[masked] = f32::NEG_INFINITY;
                }
                let found = on_every_isa(&x, softmax);
                let most = x.iter().fold(f64::NEG_INFINITY, |most, &x| most.max(x as f64));
                let sum: f64 = x.iter().map(|&x| (x as f64 - most).exp()).sum();
                for (i, (&x, found)) in x.iter().zip(found).enumerate() {
                    // The difference from the greatest is rounded before it is an exponent.
                    assert_near(found, (x as f64 - most).exp() / sum, 1e-37, 1e-5, &(len, i));
                    assert!(x != f32::NEG_INFINITY || found == 0.0);
                }
            }
        }
    }
}
