//! What a decode step costs, by a dry run, and what the fused path refuses.

use metal_ext::decode::{
    AngleTable, CHIPS, FusedHead, FusedLayer, FusedMatrix, FusedStage, KvCache, LayerShape, Prediction, Rope, Row,
    Scratch,
};
use metal_ext::gemv::Gate;
use metal_ext::heads::NormOver;
use metal_ext::pack::{Format, MatrixLayout};
use metal_ext::{DryRun, MetalExtOptions, Region};

/// A model by its config.
struct Model {
    name: &'static str,
    shape: LayerShape,
    layers: usize,
    vocab_size: usize,
    qkv_bias: bool,
}

fn llama(hidden_size: usize, intermediate_size: usize, heads: usize, kv_heads: usize, head_dim: usize) -> LayerShape {
    LayerShape {
        hidden_size,
        intermediate_size,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        rms_norm_eps: 1e-5,
        qk_norm: None,
        rope: Some(Rope { rotary_dim: head_dim, interleaved: false, table: AngleTable::Global }),
        sliding_window: None,
        attention_scale: 1.0 / (head_dim as f32).sqrt(),
        attn_logit_softcapping: None,
        residual_multiplier: 1.0,
        gate: Gate::Silu,
    }
}

fn models() -> [Model; 4] {
    let model = |name, shape, layers, vocab_size| Model { name, shape, layers, vocab_size, qkv_bias: false };
    [
        model("TinyLlama-1.1B", llama(2048, 5632, 32, 4, 64), 22, 32000),
        model("Llama-3.2-1B", llama(2048, 8192, 32, 8, 64), 16, 128256),
        Model { qkv_bias: true, ..model("Qwen2.5-0.5B", llama(896, 4864, 14, 2, 64), 24, 151936) },
        model("demo", llama(256, 256, 8, 2, 32), 8, 768),
    ]
}

/// Rows of 896 values are no whole number of Q4_K's blocks; GGUF files hold them as Q8_0.
fn matrix(format: Format, n: usize, k: usize) -> FusedMatrix<()> {
    let layout = MatrixLayout::new(format, n, k).or_else(|_| MatrixLayout::new(Format::Q8_0, n, k)).unwrap();
    FusedMatrix { layout, buffer: (), offset: 0 }
}

fn stage(model: &Model, format: Format) -> FusedStage<()> {
    let shape = &model.shape;
    let (hidden, inner) = (shape.hidden_size, shape.intermediate_size);
    let layer = FusedLayer {
        attn_norm: Some(()),
        attn_post_norm: None,
        mlp_norm: Some(()),
        mlp_post_norm: None,
        q_proj: matrix(format, shape.q_width(), hidden),
        k_proj: matrix(format, shape.kv_width(), hidden),
        v_proj: matrix(format, shape.kv_width(), hidden),
        qkv_bias: model.qkv_bias.then_some(()),
        q_norm: None,
        k_norm: None,
        o_proj: matrix(format, hidden, shape.q_width()),
        o_bias: None,
        gate_proj: matrix(format, inner, hidden),
        up_proj: matrix(format, inner, hidden),
        gate_up_bias: None,
        down_proj: matrix(format, hidden, inner),
        down_bias: None,
    };
    layer.check(shape).unwrap();
    let projection = matrix(format, model.vocab_size, hidden);
    FusedStage {
        layers: vec![(shape.clone(), layer); model.layers],
        head: Some(FusedHead { norm: (), rms_norm_eps: 1e-5, projection }),
    }
}

fn scratch() -> Scratch<()> {
    Scratch { qkv: (), mixed: (), gated: (), branch: (), partials: (), logits: () }
}

/// Dispatches of a step of `rows` sequences at `position`.
fn step(stage: &FusedStage<()>, rows: usize, position: usize) -> DryRun {
    let kv = vec![KvCache { keys: (), values: (), capacity: position + 1 }; stage.layers.len()];
    let angles = || [Region::at(&(), 0), Region::at(&(), 0)];
    let row = || Row { position, kv: &kv, global_angles: angles(), local_angles: Some(angles()) };
    let rows: Vec<Row<()>> = (0..rows).map(|_| row()).collect();
    let wanted: Vec<usize> = (0..rows.len()).collect();
    let mut list = DryRun::new();
    stage.encode(&mut list, &(), &rows, &wanted, &scratch(), &MetalExtOptions::default()).unwrap();
    list
}

/// Bytes that no step can do without: every weight of layers and head once, and the keys and values so far.
fn least_bytes(stage: &FusedStage<()>, position: usize) -> usize {
    let weights = |layer: &FusedLayer<()>| {
        [&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj, &layer.gate_proj, &layer.up_proj, &layer.down_proj]
            .iter()
            .map(|matrix| matrix.layout.stored_bytes())
            .sum::<usize>()
    };
    let layers = stage.layers.iter().map(|(shape, layer)| weights(layer) + (position + 1) * shape.kv_width() * 2 * 2);
    layers.sum::<usize>() + stage.head.as_ref().map_or(0, |head| head.projection.layout.stored_bytes())
}

const FORMATS: [Format; 3] = [Format::F16, Format::Q8_0, Format::Q4_K];

/// The kernels of a layer, without their formats.
fn kernels(list: &DryRun, dispatches: usize) -> Vec<&str> {
    let name = |kernel: &'static str, found: &str| found.starts_with(kernel).then_some(kernel);
    let known = |found: &str| ["gemv", "attend_merge", "attend"].into_iter().find_map(|kernel| name(kernel, found));
    list.dispatches[..dispatches].iter().map(|dispatch| known(&dispatch.kernel).unwrap()).collect()
}

#[test]
fn a_llama_layer_is_five_dispatches_and_one_more_where_attention_is_split() {
    for model in models() {
        for format in FORMATS {
            let stage = stage(&model, format);
            for (position, dispatches) in [(0, 5), (300, 5), (510, 5), (511, 6), (4000, 6), (100_000, 6)] {
                let list = step(&stage, 1, position);
                let what = format!("{} {format:?} at {position}", model.name);
                assert_eq!(list.dispatches.len(), dispatches * model.layers + 1, "{what}");
                let expected: &[&str] = match dispatches {
                    5 => &["gemv", "attend", "gemv", "gemv", "gemv"],
                    _ => &["gemv", "attend", "attend_merge", "gemv", "gemv", "gemv"],
                };
                assert_eq!(kernels(&list, dispatches), expected, "{what}");
            }
        }
    }
}

#[test]
fn no_llama_layer_is_more_than_six_dispatches_at_any_position() {
    let [mut model, ..] = models();
    model.layers = 1;
    let rope = |rotary_dim, interleaved, table| Some(Rope { rotary_dim, interleaved, table });
    let ropes = [
        None,
        rope(64, false, AngleTable::Global),
        rope(64, true, AngleTable::Local),
        rope(20, false, AngleTable::Local),
    ];
    for norm in [None, Some(NormOver::Head), Some(NormOver::Projection)] {
        for window in [None, Some(1000)] {
            for rope in ropes {
                (model.shape.qk_norm, model.shape.sliding_window, model.shape.rope) = (norm, window, rope);
                let mut stage = stage(&model, Format::Q8_0);
                stage.head = None;
                let (_, layer) = &mut stage.layers[0];
                (layer.q_norm, layer.k_norm) = (norm.map(|_| ()), norm.map(|_| ()));
                for position in (0..8192).step_by(97).chain([510, 511, 512, 999, 1000, 1001, 131_071]) {
                    let dispatches = step(&stage, 1, position).dispatches.len();
                    assert!(dispatches <= 6, "{:?} at {position}: {dispatches}", model.shape);
                }
            }
        }
    }
}

#[test]
fn a_step_moves_the_weights_and_the_kv_once_and_little_else() {
    for model in models() {
        for format in FORMATS {
            let stage = stage(&model, format);
            for position in [0, 300, 4000] {
                let (moved, least) = (step(&stage, 1, position).bytes() as f64, least_bytes(&stage, position) as f64);
                // The demo model's matrices are so small that its activations, which never leave the GPU's caches, are more
                // than a few hundredths of them.
                let most = if model.name == "demo" { 1.12 } else { 1.03 };
                let ratio = moved / least;
                assert!((1.0..most).contains(&ratio), "{} {format:?} at {position}: {ratio:.4}", model.name);
            }
        }
    }
}

#[test]
fn rows_of_a_step_share_the_weights() {
    let stage = stage(&models()[0], Format::Q8_0);
    let (one, four) = (step(&stage, 1, 10).bytes() as f64, step(&stage, 4, 10).bytes() as f64);
    assert!(four < 1.01 * one, "{four} bytes for four rows, {one} for one");
    // Attention is dispatched for each sequence, and their splits are brought together at once.
    assert_eq!(step(&stage, 4, 10).dispatches.len(), (4 + 4) * 22 + 1);
    assert_eq!(step(&stage, 4, 4000).dispatches.len(), (4 + 4 + 1) * 22 + 1);
}

#[test]
fn what_is_not_covered_is_refused_by_name() {
    let shape = LayerShape { head_dim: 72, ..models()[0].shape.clone() };
    let error = shape.check().unwrap_err().to_string();
    assert_eq!(error, "fused decode: head_dim is 72, expected a multiple of 16 up to 256");
    let mut stage = stage(&models()[0], Format::Q8_0);
    let (shape, layer) = &mut stage.layers[0];
    layer.up_proj = matrix(Format::F16, shape.intermediate_size, shape.hidden_size);
    let error = layer.check(shape).unwrap_err().to_string();
    assert_eq!(error, "fused decode: gate_proj is q8_0, up_proj is f16");
    layer.up_proj = matrix(Format::Q8_0, 7, shape.hidden_size);
    let error = layer.check(shape).unwrap_err().to_string();
    assert_eq!(error, "fused decode: up_proj is 7 by 2048, expected 5632 by 2048");
}

/// Prints the tables of the README; `cargo test -p metal-ext --test decode tables -- --nocapture`.
#[test]
fn the_readme_holds_the_tables_of_dispatches_and_predictions() {
    let mut tables = String::from(
        "| model | weights | dispatches a token | MB a token | over weights and KV |\n|---|---|---|---|---|\n",
    );
    for model in models() {
        for format in FORMATS {
            let stage = stage(&model, format);
            let list = step(&stage, 1, 300);
            let over = list.bytes() as f64 / least_bytes(&stage, 300) as f64 - 1.0;
            tables += &format!(
                "| {} | {} | {} | {:.1} | {:.2} % |\n",
                model.name,
                format.name(),
                list.dispatches.len(),
                list.bytes() as f64 / 1e6,
                over * 100.0
            );
        }
    }
    tables += "\n| chip | GB/s | TinyLlama F16 | TinyLlama Q8_0 | TinyLlama Q4_K | Llama-3.2-1B Q8_0 |\n|---|---|---|---|---|---|\n";
    let [tiny, llama, ..] = models();
    for chip in CHIPS {
        let mut row = format!("| {} | {} |", chip.name, chip.bandwidth);
        for (model, format) in [(&tiny, FORMATS[0]), (&tiny, FORMATS[1]), (&tiny, FORMATS[2]), (&llama, FORMATS[1])] {
            let prediction = Prediction::new(&step(&stage(model, format), 1, 300), chip);
            row += &format!(" {:.0} |", prediction.tokens_per_second());
        }
        tables += &row;
        tables += "\n";
    }
    println!("{tables}");
    let readme = include_str!("../README.md");
    for line in tables.lines() {
        assert!(readme.contains(line), "metal-ext/README.md lacks the line\n{line}\nof\n{tables}");
    }
}
