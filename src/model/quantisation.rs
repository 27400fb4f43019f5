//! What quantisation did to a model's weights: each tensor beside the same one of the model it was made from.

use crate::error::{Error, Result};
use crate::instrument::tracer::quant_error::{ErrorSums, QuantError};
use crate::kernels::dequantise_rows;
use crate::model::config::DecoderConfig;
use crate::weights::{TensorBytes, TensorMeta, WeightSource};

/// The weights of a model, and what says how they are meant.
#[derive(Clone, Copy)]
pub struct ModelWeights<'a> {
    /// The tensors.
    pub weights: &'a dyn WeightSource,
    /// The model's config.
    pub config: &'a DecoderConfig,
}

/// Values that are widened at a time: memory is bounded by this, whatever the size of a tensor.
const CHUNK: usize = 1 << 18;

/// Compares every tensor of `found` with the one of the same canonical name in `reference`, and tells each error as it is
/// known: embeddings, layers in order, final norm and head.
///
/// Values are compared as the decoder uses them. Files differ in what they store: GGUF files of some families have the
/// rows of q and k in the order of their rotation, Gemma's safetensors have norms less 1, and either may lack a head that
/// is the embedding table. Tables of rotary frequencies are no weights and are left out.
pub fn compare(found: ModelWeights, reference: ModelWeights, tell: &mut dyn FnMut(QuantError)) -> Result<()> {
    let mut names = reference.weights.names();
    names.retain(|name| !name.starts_with("rope_"));
    names.sort_by_key(|name| place(name));
    for name in &names {
        let beside = counterpart(name, reference, found)?;
        tell(compare_tensor(name, found, beside, reference)?);
    }
    for name in found.weights.names() {
        if !name.starts_with("rope_") && !names.contains(&name) {
            let beside = counterpart(&name, found, reference)?;
            // A head of its own, where the reference's is the embedding table.
            tell(compare_pair(&name, (found, &name), (reference, beside))?);
        }
    }
    Ok(())
}

/// Embeddings first, then the layers, then what is behind them.
fn place(name: &str) -> (usize, String) {
    let layer = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')?.0.parse::<usize>().ok());
    let place = match layer {
        Some(layer) => layer + 1,
        None if name.starts_with("embed_tokens") => 0,
        None => usize::MAX,
    };
    (place, name.to_string())
}

/// What the other model has for a tensor of one: the tensor of that name, or its embedding table for the head.
fn counterpart<'a>(name: &'a str, one: ModelWeights, other: ModelWeights) -> Result<&'a str> {
    if other.weights.meta(name)?.is_some() {
        return Ok(name);
    }
    if name == "lm_head.weight" && other.config.tie_word_embeddings {
        return Ok("embed_tokens.weight");
    }
    let reason = format!(
        "is missing, and {} has `{}`: compare files of the same model",
        one.weights.path_of(name).display(),
        one.weights.stored_name(name)
    );
    Err(wrong(other, name, reason))
}

fn compare_tensor(name: &str, found: ModelWeights, beside: &str, reference: ModelWeights) -> Result<QuantError> {
    compare_pair(name, (found, beside), (reference, name))
}

/// One tensor of each model, under the name `name`.
fn compare_pair(
    name: &str,
    (found, found_name): (ModelWeights, &str),
    (reference, reference_name): (ModelWeights, &str),
) -> Result<QuantError> {
    let (ours, theirs) = (Rows::open(found, found_name)?, Rows::open(reference, reference_name)?);
    if ours.meta.shape != theirs.meta.shape {
        let reason = format!(
            "has shape {:?}, and {:?} as `{}` in {}: compare files of the same model",
            ours.meta.shape,
            theirs.meta.shape,
            reference.weights.stored_name(reference_name),
            reference.weights.path_of(reference_name).display()
        );
        return Err(wrong(found, found_name, reason));
    }
    let mut sums = ErrorSums::default();
    // Whole heads at a time, so that their rows can be put in order.
    let unit = ours.head_rows.max(theirs.head_rows).max(1);
    let step = (CHUNK / ours.columns.max(1) / unit).max(1) * unit;
    for start in (0..ours.rows).step_by(step) {
        let rows = step.min(ours.rows - start);
        sums.add(&theirs.read(start, rows)?, &ours.read(start, rows)?)?;
    }
    Ok(QuantError { dtype: ours.meta.dtype.name().to_string(), ..sums.finish(name) })
}

/// A tensor whose rows are read some at a time.
struct Rows<'a> {
    model: ModelWeights<'a>,
    name: &'a str,
    meta: TensorMeta,
    bytes: TensorBytes<'a>,
    rows: usize,
    columns: usize,
    /// Rows of a head, where those of each are stored in the order of their rotation; 0 elsewhere.
    head_rows: usize,
    /// Added to the stored values.
    offset: f32,
}

impl<'a> Rows<'a> {
    fn open(model: ModelWeights<'a>, name: &'a str) -> Result<Rows<'a>> {
        let stored = model.weights.tensor(name)?;
        let rotated = matches!(name.split('.').nth(2), Some("q_proj" | "k_proj")) && model.config.rope.interleaved;
        let head_rows = if rotated { model.config.head_dim } else { 0 };
        let (rows, columns) = match *stored.meta.shape {
            [rows, columns] => (rows, columns),
            // A bias has a value for each row of its matrix; a norm is one row, whole blocks of whatever type.
            [n] if rotated => (n, 1),
            [n] => (1, n),
            _ => {
                let reason = format!("has {} dimensions, expected 1 or 2", stored.meta.shape.len());
                return Err(wrong(model, name, reason));
            }
        };
        if head_rows > 0 && (!rows.is_multiple_of(head_rows) || !head_rows.is_multiple_of(2)) {
            return Err(wrong(model, name, format!("has {rows} rows, which are no heads of {head_rows}")));
        }
        let offset = if name.ends_with("norm.weight") { model.config.norm_offset } else { 0.0 };
        Ok(Rows { model, name, bytes: stored.bytes, meta: stored.meta, rows, columns, head_rows, offset })
    }

    /// Values of some rows, as the decoder uses them.
    fn read(&self, start: usize, rows: usize) -> Result<Vec<f32>> {
        let dtype = self.meta.dtype;
        let row_bytes = dtype.bytes_for(self.columns);
        let values = match row_bytes.filter(|bytes| (start + rows) * bytes <= self.bytes.len()) {
            Some(bytes) => {
                dequantise_rows(dtype, &self.bytes.part(start * bytes..(start + rows) * bytes).read()?, rows)
            }
            None => None,
        };
        let mut values = values.ok_or_else(|| {
            wrong(self.model, self.name, format!("rows of {} values are no whole blocks of {dtype}", self.columns))
        })?;
        if self.offset != 0.0 {
            values.iter_mut().for_each(|value| *value += self.offset);
        }
        if self.head_rows > 0 {
            values = apart(&values, self.head_rows, self.columns);
        }
        Ok(values)
    }
}

/// Rows of each head with those that rotate together half a head apart, from rows with those side by side.
fn apart(values: &[f32], head_rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0f32; values.len()];
    let heads = out.chunks_exact_mut(head_rows * columns).zip(values.chunks_exact(head_rows * columns));
    for (out, head) in heads {
        for (index, row) in head.chunks_exact(columns).enumerate() {
            let to = index % 2 * (head_rows / 2) + index / 2;
            out[to * columns..][..columns].copy_from_slice(row);
        }
    }
    out
}

fn wrong(model: ModelWeights, name: &str, reason: String) -> Error {
    Error::Tensor { path: model.weights.path_of(name).into(), tensor: model.weights.stored_name(name), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_rotate_together_are_put_half_a_head_apart() {
        // Two heads of four rows of one value, named by where they belong.
        let side_by_side = [0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0];
        assert_eq!(apart(&side_by_side, 4, 1), [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]);
    }

    #[test]
    fn tensors_are_told_in_the_order_in_which_a_token_meets_them() {
        let mut names = ["norm.weight", "layers.10.a.weight", "layers.2.a.weight", "embed_tokens.weight"].to_vec();
        names.sort_by_key(|name| place(name));
        assert_eq!(names, ["embed_tokens.weight", "layers.2.a.weight", "layers.10.a.weight", "norm.weight"]);
    }
}
