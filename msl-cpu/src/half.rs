//! Half floats for tests, by integer arithmetic alone, so that they are no echo of the shim's.

/// The bits of the half nearest to `x`, ties to even.
pub fn f16(x: f32) -> u16 {
    let b = x.to_bits();
    let (s, e, m) = (((b >> 16) & 0x8000) as u16, ((b >> 23) & 255) as i32 - 112, b & 0x7f_ffff);
    if e >= 31 {
        let nan = (b & 0x7fff_ffff) > 0x7f80_0000;
        return s | 0x7c00 | if nan { 0x200 } else { 0 };
    }
    if e < -10 {
        return s;
    }
    let (m, shift) = if e <= 0 { (m | 0x80_0000, (14 - e) as u32) } else { (m, 13) };
    let half = (m >> shift) as u16 + if e > 0 { (e as u16) << 10 } else { 0 };
    let (rem, mid) = (m & ((1 << shift) - 1), 1u32 << (shift - 1));
    s | (half + u16::from(rem > mid || (rem == mid && half & 1 == 1)))
}
/// The value of these bits.
pub fn f32_of(h: u16) -> f32 {
    let (s, e, m) = (u32::from(h & 0x8000) << 16, u32::from(h >> 10) & 31, u32::from(h & 0x3ff));
    match e {
        0 => (m as f32 * 2f32.powi(-24)) * if s != 0 { -1.0 } else { 1.0 },
        31 => f32::from_bits(s | 0x7f80_0000 | (m << 13)),
        _ => f32::from_bits(s | ((e + 112) << 23) | (m << 13)),
    }
}
