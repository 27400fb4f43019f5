//! What quantisation has made of a model's weights: how much smaller they are, which types hold how much, layer by layer.

use std::collections::BTreeMap;
use std::fmt;

use super::TensorFacts;

/// A model's weights by type and by place. [`Display`](fmt::Display) shows it as tables.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct QuantisationView {
    /// All weights.
    pub total: WeightGroup,
    /// The embeddings, each layer, and what is behind the last one, in the order in which a token meets them.
    pub places: Vec<WeightGroup>,
}

/// Weights that belong together.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct WeightGroup {
    /// What they are: `embeddings`, `layer 3`, `output`, `tables`, or `all`.
    pub place: String,
    /// Layer in the model, of those in one.
    pub layer: Option<usize>,
    /// Tensors.
    pub tensors: usize,
    /// Values.
    pub elements: u64,
    /// Bytes as stored.
    pub bytes: u64,
    /// Bits that a value takes on average.
    pub bits_per_weight: f64,
    /// Bytes of the same values in F32 over bytes as stored.
    pub compression_to_f32: f64,
    /// Bytes of the same values in F16 over bytes as stored. Below 1 where F32 is stored.
    pub compression_to_f16: f64,
    /// By type, the one with the most bytes first.
    pub types: Vec<TypeShare>,
}

/// What one type holds of a group.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct TypeShare {
    /// The type, as in the file.
    pub dtype: String,
    /// Tensors.
    pub tensors: usize,
    /// Values.
    pub elements: u64,
    /// Bytes as stored.
    pub bytes: u64,
    /// Share of the group's values, of 1.
    pub element_share: f64,
    /// Share of the group's bytes, of 1.
    pub byte_share: f64,
}

/// Where a weight is used, in the order in which a token meets them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Embeddings,
    Layer(usize),
    Output,
    Tables,
}

impl Place {
    /// By the canonical name.
    fn of(name: &str) -> Place {
        let layer = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')?.0.parse().ok());
        match (layer, name) {
            (Some(layer), _) => Place::Layer(layer),
            (None, name) if name.starts_with("embed") => Place::Embeddings,
            (None, name) if name.starts_with("rope") => Place::Tables,
            (None, _) => Place::Output,
        }
    }

    fn name(self) -> String {
        match self {
            Place::Embeddings => "embeddings".into(),
            Place::Layer(layer) => format!("layer {layer}"),
            Place::Output => "output".into(),
            Place::Tables => "tables".into(),
        }
    }
}

impl QuantisationView {
    /// Of the weights that a model has stored. A head that is tied to the embeddings is not stored.
    pub fn of(tensors: &[TensorFacts]) -> QuantisationView {
        let mut places: BTreeMap<Place, Vec<&TensorFacts>> = BTreeMap::new();
        for tensor in tensors {
            places.entry(Place::of(&tensor.name)).or_default().push(tensor);
        }
        let group = |(place, tensors): (Place, Vec<&TensorFacts>)| {
            let layer = if let Place::Layer(layer) = place { Some(layer) } else { None };
            WeightGroup::of(place.name(), layer, &tensors)
        };
        QuantisationView {
            total: WeightGroup::of("all".into(), None, &tensors.iter().collect::<Vec<_>>()),
            places: places.into_iter().map(group).collect(),
        }
    }
}

impl WeightGroup {
    fn of(place: String, layer: Option<usize>, tensors: &[&TensorFacts]) -> WeightGroup {
        let elements: u64 = tensors.iter().map(|tensor| tensor.element_count).sum();
        let bytes: u64 = tensors.iter().map(|tensor| tensor.memory_bytes).sum();
        let mut types: BTreeMap<&str, (usize, u64, u64)> = BTreeMap::new();
        for tensor in tensors {
            let (tensors, elements, bytes) = types.entry(&tensor.dtype).or_default();
            *tensors += 1;
            *elements += tensor.element_count;
            *bytes += tensor.memory_bytes;
        }
        let shares = types.into_iter().map(|(dtype, (tensors, type_elements, type_bytes))| TypeShare {
            dtype: dtype.to_string(),
            tensors,
            elements: type_elements,
            bytes: type_bytes,
            element_share: ratio(type_elements as f64, elements),
            byte_share: ratio(type_bytes as f64, bytes),
        });
        let mut types: Vec<TypeShare> = shares.collect();
        types.sort_by_key(|share| std::cmp::Reverse(share.bytes));
        WeightGroup {
            place,
            layer,
            tensors: tensors.len(),
            elements,
            bytes,
            bits_per_weight: ratio(bytes as f64 * 8.0, elements),
            compression_to_f32: ratio(elements as f64 * 4.0, bytes),
            compression_to_f16: ratio(elements as f64 * 2.0, bytes),
            types,
        }
    }
}

/// 0 of nothing.
fn ratio(part: f64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part / whole as f64 }
}

impl fmt::Display for QuantisationView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = &self.total;
        writeln!(
            f,
            "{} tensors, {} weights in {} bytes: {:.2} bits a weight, {:.2}x smaller than F32, {:.2}x than F16",
            total.tensors,
            total.elements,
            total.bytes,
            total.bits_per_weight,
            total.compression_to_f32,
            total.compression_to_f16
        )?;
        writeln!(f, "\n{:<6} {:>8} {:>14} {:>7} {:>14} {:>7}", "type", "tensors", "weights", "", "bytes", "")?;
        for share in &total.types {
            writeln!(
                f,
                "{:<6} {:>8} {:>14} {:>6.1}% {:>14} {:>6.1}%",
                share.dtype,
                share.tensors,
                share.elements,
                100.0 * share.element_share,
                share.bytes,
                100.0 * share.byte_share
            )?;
        }
        writeln!(
            f,
            "\n{:<11} {:>8} {:>14} {:>14} {:>6} {:>7} {:>7}  types by bytes",
            "place", "tensors", "weights", "bytes", "bits", "to F32", "to F16"
        )?;
        for group in &self.places {
            let types = group.types.iter().map(|share| format!("{} {:.1}%", share.dtype, 100.0 * share.byte_share));
            writeln!(
                f,
                "{:<11} {:>8} {:>14} {:>14} {:>6.2} {:>6.2}x {:>6.2}x  {}",
                group.place,
                group.tensors,
                group.elements,
                group.bytes,
                group.bits_per_weight,
                group.compression_to_f32,
                group.compression_to_f16,
                types.collect::<Vec<_>>().join(", ")
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: &str, element_count: u64, memory_bytes: u64) -> TensorFacts {
        TensorFacts {
            name: name.into(),
            shape: vec![element_count as usize],
            dtype: dtype.into(),
            device: "cpu".into(),
            memory_bytes,
            element_count,
        }
    }

    #[test]
    fn ratios_and_shares_are_those_of_the_stored_bytes() {
        let view = QuantisationView::of(&[
            tensor("layers.10.q_proj.weight", "Q4_K", 2560, 1440),
            tensor("layers.2.q_proj.weight", "Q8_0", 320, 340),
            tensor("layers.2.attn_norm.weight", "F32", 10, 40),
            tensor("norm.weight", "F32", 10, 40),
            tensor("embed_tokens.weight", "F16", 100, 200),
            tensor("rope_freqs.weight", "F32", 5, 20),
        ]);
        let places: Vec<_> = view.places.iter().map(|group| group.place.as_str()).collect();
        assert_eq!(places, ["embeddings", "layer 2", "layer 10", "output", "tables"]);
        let second = &view.places[1];
        assert_eq!((second.layer, second.tensors, second.elements, second.bytes), (Some(2), 2, 330, 380));
        assert_eq!((second.compression_to_f32, second.compression_to_f16), (1320.0 / 380.0, 660.0 / 380.0));
        assert_eq!((second.types[0].dtype.as_str(), second.types[0].byte_share), ("Q8_0", 340.0 / 380.0));
        assert_eq!(view.places[2].bits_per_weight, 4.5);
        assert_eq!(view.places[3].compression_to_f16, 0.5);
        let (bytes, elements): (u64, u64) = (2080, 3005);
        assert_eq!((view.total.bytes, view.total.elements, view.total.types.len()), (bytes, elements, 4));
        let sums = |of: fn(&TypeShare) -> f64| view.total.types.iter().map(of).sum::<f64>();
        assert!((sums(|share| share.byte_share) - 1.0).abs() < 1e-12);
        assert!((sums(|share| share.element_share) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_tables_show_each_type_and_each_place() {
        let text = QuantisationView::of(&[
            tensor("embed_tokens.weight", "Q8_0", 3200, 3400),
            tensor("layers.0.up_proj.weight", "Q4_0", 3200, 1800),
            tensor("norm.weight", "F32", 100, 400),
        ])
        .to_string();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap_or_default().to_string();
        assert!(line("3 tensors, 6500 weights in 5600 bytes: 6.89 bits a weight, 4.64x").ends_with("2.32x than F16"));
        assert!(line("Q4_0").contains("49.2%") && line("Q4_0").contains("32.1%"), "{text}");
        assert!(line("layer 0").contains("7.11x") && line("layer 0").ends_with("Q4_0 100.0%"), "{text}");
    }

    #[test]
    fn no_weights_give_zeros() {
        let view = QuantisationView::of(&[]);
        assert_eq!((view.total.compression_to_f32, view.total.bits_per_weight, view.places.len()), (0.0, 0.0, 0));
    }
}
