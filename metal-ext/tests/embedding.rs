//! Embeddings of tokens that were found on the same device, through the encoder, against f64.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]

mod common;

#[cfg(not(target_os = "macos"))]
use common::Shortened;
use common::gpu::{Check, Gpu, GpuBuffer};
use common::{Rng, Weights, close};
use metal_ext::embedding::{Embedding, Table};
use metal_ext::pack::Format;
use metal_ext::sampling::{TopK, scratch_bytes};
use metal_ext::{Encoder, Region};

fn ids(tokens: &[u32]) -> GpuBuffer {
    GpuBuffer::from_bytes(&tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>())
}

fn look_up(
    encoder: &mut impl Encoder<Buffer = GpuBuffer>,
    table: Table<'_, GpuBuffer>,
    width: usize,
    tokens: &[u32],
) -> metal_ext::Result<Vec<f32>> {
    let (ids, out) = (ids(tokens), GpuBuffer::new(tokens.len() * width * 4));
    let embedding =
        Embedding { table, ids: Region::at(&ids, 0), rows: tokens.len(), multiplier: 3.0, out: Region::at(&out, 0) };
    embedding.encode(encoder)?;
    Ok(out.floats())
}

/// The rows of a table, times the multiplier.
fn rows(values: &[f64], width: usize, tokens: &[u32]) -> Vec<f64> {
    tokens.iter().flat_map(|&token| &values[token as usize * width..][..width]).map(|v| 3.0 * v).collect()
}

#[test]
fn rows_of_every_format_and_of_floats() {
    let tokens = [5, 0, 5, 8];
    for format in Format::ALL {
        for k in [256, 768] {
            let weights = Weights::random(&mut Rng(k as u64), format, 9, k);
            let table = Table::Packed(weights.packed());
            let got = look_up(&mut Gpu::new(Check::AllOrders), table, k, &tokens).unwrap();
            close(&got, &rows(&weights.values, k, &tokens), 1e-6, &format!("{format:?}, rows of {k}"));
        }
    }
    for k in [8, 520] {
        let floats = Rng(1).floats(9 * k);
        let buffer = GpuBuffer::from_floats(&floats);
        let table = Table::F32 { values: Region::at(&buffer, 0), vocab_size: 9, hidden_size: k };
        let got = look_up(&mut Gpu::new(Check::AllOrders), table, k, &tokens).unwrap();
        let want: Vec<f64> = floats.iter().map(|&v| f64::from(v)).collect();
        close(&got, &rows(&want, k, &tokens), 1e-7, &format!("floats, rows of {k}"));
    }
}

#[test]
fn an_id_outside_the_vocabulary_reads_nothing_outside_the_table() {
    let weights = Weights::random(&mut Rng(1), Format::Q8_0, 6, 64);
    for token in [6, u32::MAX] {
        let table = Table::Packed(weights.packed());
        let got = look_up(&mut Gpu::new(Check::AllOrders), table, 64, &[token]).unwrap();
        close(&got, &rows(&weights.values, 64, &[5]), 1e-6, &format!("token {token}"));
    }
}

#[test]
fn a_token_goes_from_logits_to_its_embedding_without_the_host() {
    let mut logits = Rng(4).floats(1200);
    logits[1100] = 7.0;
    let logits = GpuBuffer::from_floats(&logits);
    let weights = Weights::random(&mut Rng(2), Format::F16, 1200, 40);
    let (ids, values, first_not_finite) = (GpuBuffer::new(4), GpuBuffer::new(4), GpuBuffer::new(4));
    let (scratch, out) = (GpuBuffer::new(scratch_bytes(1200, 1, 1)), GpuBuffer::new(40 * 4));
    let mut encoder = Gpu::new(Check::AllOrders);
    let top_k = TopK {
        logits: Region::at(&logits, 0),
        stride: 1200,
        vocab_size: 1200,
        rows: 1,
        k: 1,
        ids: Region::at(&ids, 0),
        values: Region::at(&values, 0),
        first_not_finite: Region::at(&first_not_finite, 0),
        scratch: Region::at(&scratch, 0),
    };
    top_k.encode(&mut encoder).unwrap();
    let table = Table::Packed(weights.packed());
    let embedding = Embedding { table, ids: Region::at(&ids, 0), rows: 1, multiplier: 3.0, out: Region::at(&out, 0) };
    embedding.encode(&mut encoder).unwrap();
    close(&out.floats(), &rows(&weights.values, 40, &[1100]), 1e-6, "token 1100");
}

#[cfg(not(target_os = "macos"))] // a GPU does not tell
#[test]
fn a_dispatch_names_no_byte_more_than_the_kernel_touches() {
    let floats = GpuBuffer::from_floats(&Rng(1).floats(3 * 16));
    for (index, what) in [(0, "w"), (1, "out"), (2, "tokens")] {
        let table = Table::F32 { values: Region::at(&floats, 0), vocab_size: 3, hidden_size: 16 };
        let error = look_up(&mut Shortened::new(index), table, 16, &[2]).unwrap_err().to_string();
        assert!(error.contains(&format!("`{what}`")), "{error}");
    }
}

#[test]
fn what_the_kernels_do_not_take_is_refused_by_name_and_value() {
    let region = |offset| Region::at(&(), offset);
    let embedding = |hidden_size, rows, offset| {
        let table = Table::F32 { values: region(offset), vocab_size: 5, hidden_size };
        Embedding { table, ids: region(0), rows, multiplier: 1.0, out: region(0) }.dispatch().unwrap_err().to_string()
    };
    assert_eq!(embedding(20, 1, 0), "embedding: 5 by 20 floats, expected at least a row of a multiple of 8");
    assert_eq!(embedding(16, 9, 0), "embedding: 9 tokens, expected 1 to 8");
    assert_eq!(embedding(16, 1, 8), "embedding: the table's rows begin at byte 8, expected a multiple of 16");
}
