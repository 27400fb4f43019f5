//! Random data, references in f64, and comparisons, for all kernel tests.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]
#![allow(dead_code)] // each test file uses its part
#![allow(clippy::print_stderr)] // shown with --nocapture

pub mod attention;
pub mod kv;

use std::path::PathBuf;

use half::{bf16, f16};
use metal_ext::encoder::Argument;
use metal_ext::pack::{Format, MatrixLayout};
use metal_ext::{Dispatch, Encoder};
pub mod gpu;

use gpu::{Check, Gpu, GpuBuffer};

/// candle's own kernels, unmodified, where cargo unpacked them.
pub fn candle(name: &str) -> Option<PathBuf> {
    let home = std::env::var("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|_| std::env::var("HOME").map(|h| PathBuf::from(h).join(".cargo")))
        .ok()?;
    let found = std::fs::read_dir(home.join("registry/src"))
        .ok()?
        .flatten()
        .map(|d| d.path().join("candle-metal-kernels-0.11.1/src/metal_src").join(name))
        .find(|p| p.exists());
    if found.is_none() {
        eprintln!("skipped: candle-metal-kernels 0.11.1 is not in the cargo registry");
    }
    found
}

/// xorshift64*
pub struct Rng(pub u64);
impl Rng {
    pub fn next(&mut self) -> u64 {
        let mut x = self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0 = x;
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// in [-1, 1)
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
    pub fn halves(&mut self, n: usize) -> Vec<u16> {
        (0..n).map(|_| f16::from_f32(self.float()).to_bits()).collect()
    }
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| (self.next() >> 32) as u8).collect()
    }
    /// Random Q8_0 rows and their dequantised values.
    pub fn q8_0(&mut self, n: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
        let stored = self.stored(Format::Q8_0, n, k);
        let dense = dequantise(Format::Q8_0, &stored).iter().map(|&v| v as f32).collect();
        (stored, dense)
    }
    /// Random rows as a file stores them, of values of about 1.
    pub fn stored(&mut self, format: Format, n: usize, k: usize) -> Vec<u8> {
        let half = |v: f32| f16::from_f32(v).to_le_bytes();
        match format {
            Format::F16 | Format::F16Blocked => self.halves(n * k).iter().flat_map(|h| h.to_le_bytes()).collect(),
            Format::BF16 => self.floats(n * k).iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            Format::Q8_0 => self.blocks(n * k / 32, |r| [half(r.float() / 128.0).as_slice(), &r.bytes(32)].concat()),
            Format::Q4_0 => self.blocks(n * k / 32, |r| [half(r.float() / 8.0).as_slice(), &r.bytes(16)].concat()),
            Format::Q4_K => self.blocks(n * k / 256, |r| {
                [half(r.float() / 512.0).as_slice(), &half(r.float() / 64.0), &r.bytes(140)].concat()
            }),
            Format::Q6_K => self.blocks(n * k / 256, |r| [r.bytes(208).as_slice(), &half(r.float() / 4096.0)].concat()),
        }
    }
    fn blocks(&mut self, count: usize, mut block: impl FnMut(&mut Rng) -> Vec<u8>) -> Vec<u8> {
        (0..count).flat_map(|_| block(self)).collect()
    }
}

fn half_at(bytes: &[u8], at: usize) -> f64 {
    f64::from(f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32())
}

/// The values of stored bytes, by GGML's definition of each format, one value at a time.
pub fn dequantise(format: Format, stored: &[u8]) -> Vec<f64> {
    let mut out = Vec::new();
    match format {
        Format::F16 | Format::F16Blocked => out.extend((0..stored.len() / 2).map(|i| half_at(stored, 2 * i))),
        Format::BF16 => {
            out.extend(stored.chunks_exact(2).map(|b| f64::from(bf16::from_le_bytes([b[0], b[1]]).to_f32())));
        }
        Format::Q8_0 => {
            for block in stored.chunks_exact(34) {
                out.extend(block[2..].iter().map(|&q| half_at(block, 0) * f64::from(q as i8)));
            }
        }
        Format::Q4_0 => {
            for block in stored.chunks_exact(18) {
                let value = |i: usize| i32::from(block[2 + i % 16] >> (i / 16 * 4) & 15) - 8;
                out.extend((0..32).map(|i| half_at(block, 0) * f64::from(value(i))));
            }
        }
        Format::Q4_K => {
            for block in stored.chunks_exact(144) {
                let (d, dmin, q) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
                for i in 0..256 {
                    let j = i / 32;
                    let (scale, min) = match j < 4 {
                        true => (q[j] & 63, q[j + 4] & 63),
                        false => ((q[j + 4] & 15) | (q[j - 4] >> 6 << 4), (q[j + 4] >> 4) | (q[j] >> 6 << 4)),
                    };
                    let nibble = block[16 + j / 2 * 32 + i % 32] >> (j % 2 * 4) & 15;
                    out.push(d * f64::from(scale) * f64::from(nibble) - dmin * f64::from(min));
                }
            }
        }
        Format::Q6_K => {
            for block in stored.chunks_exact(210) {
                let d = half_at(block, 208);
                for i in 0..256 {
                    let (part, at) = (i / 128, i % 128);
                    let low = block[part * 64 + at % 64] >> (at / 64 * 4) & 15;
                    let high = block[128 + part * 32 + at % 32] >> (at / 32 * 2) & 3;
                    let scale = f64::from(block[192 + i / 16] as i8);
                    out.push(d * scale * f64::from(i32::from(low | high << 4) - 32));
                }
            }
        }
    }
    out
}

/// A packed random matrix in a buffer of exactly its size, and its values.
pub struct Weights {
    pub layout: MatrixLayout,
    pub buffer: GpuBuffer,
    pub values: Vec<f64>,
}

impl Weights {
    pub fn random(rng: &mut Rng, format: Format, n: usize, k: usize) -> Weights {
        Weights::new(format, n, k, &rng.stored(format, n, k))
    }
    pub fn new(format: Format, n: usize, k: usize, stored: &[u8]) -> Weights {
        let layout = MatrixLayout::new(format, n, k).unwrap();
        let mut packed = vec![0; layout.bytes];
        layout.pack(stored, &mut packed).unwrap();
        Weights { layout, buffer: GpuBuffer::from_bytes(&packed), values: dequantise(format, stored) }
    }
    pub fn packed(&self) -> metal_ext::gemv::PackedMatrix<'_, GpuBuffer> {
        metal_ext::gemv::PackedMatrix { layout: self.layout, buffer: &self.buffer, offset: 0 }
    }
    /// The product with x, and for each value the sum of the products' magnitudes, by which a float sum may be off.
    pub fn times(&self, x: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let rows = self.values.chunks_exact(self.layout.k);
        rows.map(|row| {
            let products = row.iter().zip(x).map(|(w, x)| w * x);
            (products.clone().sum::<f64>(), products.map(f64::abs).sum::<f64>())
        })
        .unzip()
    }
}

/// Row-major dense matrix times vector, in f64.
pub fn gemv(w: &[f32], x: &[f32], n: usize, k: usize) -> Vec<f64> {
    (0..n).map(|i| (0..k).map(|j| f64::from(w[i * k + j]) * f64::from(x[j])).sum()).collect()
}

/// |got - want| <= tol * max(1, largest |want|), with the GPU's slack
pub fn close(got: &[f32], want: &[f64], tol: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1.0f64, |m, v| m.max(v.abs()));
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(g) - w).abs() <= gpu::SLACK * tol * scale, "{what}: element {i} is {g}, expected {w}");
        // NaN fails too
    }
}

/// An encoder that gives the kernel one byte less of a buffer than the dispatch says.
pub struct Shortened {
    encoder: Gpu,
    index: u32,
}

impl Shortened {
    /// Of the buffer with this index.
    pub fn new(index: u32) -> Shortened {
        Shortened { encoder: Gpu::new(Check::Accesses), index }
    }
}

impl Encoder for Shortened {
    type Buffer = GpuBuffer;

    fn dispatch(&mut self, dispatch: &Dispatch<'_, GpuBuffer>) -> metal_ext::Result<()> {
        let mut shorter = dispatch.clone();
        for (index, argument) in &mut shorter.arguments {
            if let (true, Argument::Read(region) | Argument::Write(region) | Argument::Update(region, _)) =
                (*index == self.index, argument)
            {
                region.span -= 1;
            }
        }
        self.encoder.dispatch(&shorter)
    }
}
