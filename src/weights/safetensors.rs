//! Reading a Hugging Face model folder: one `model.safetensors`, or shards listed in `model.safetensors.index.json`.
//!
//! The headers are checked here and not with the `safetensors` crate's reader: its errors do not always name the
//! tensor, a type that it does not know makes it refuse the whole file, and offsets near 2^64 make it overflow.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::file::{ModelFile, TensorBytes};
use super::names::NameMap;
use super::{MappedTensor, StoredTensor, TensorMeta, WeightSource, WeightType};
use crate::error::{Error, Result, shorten};
use crate::files;

/// The file of a model that is not sharded.
pub(super) const SINGLE_FILE: &str = "model.safetensors";
/// The file that lists which shard holds which tensor.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
/// The limit that the format's own reader sets.
const MAX_HEADER_BYTES: usize = 100_000_000;
const HEADER_LENGTH_BYTES: usize = 8;

/// What a family calls its norms within a layer: `input_layernorm`, `post_attention_layernorm`, ... The same Hugging
/// Face name stands for different norms in different families, so the family has to say. `None`: it has no such norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HfNames {
    /// Before attention.
    pub attn_norm: Option<&'static str>,
    /// On attention's output, before the residual add.
    pub attn_post_norm: Option<&'static str>,
    /// Before the MLP.
    pub mlp_norm: Option<&'static str>,
    /// On the MLP's output, before the residual add.
    pub mlp_post_norm: Option<&'static str>,
}

/// The open safetensors files of a model folder.
#[derive(Debug)]
pub struct SafetensorsDir {
    /// The file to name when a tensor is in none: the index, or the single file.
    listing: PathBuf,
    shards: Vec<ModelFile>,
    /// By the file's name.
    tensors: HashMap<String, Located>,
    names: NameMap,
}

#[derive(Debug)]
struct Located {
    shard: usize,
    /// As the header has it: a type that cannot be used matters only when the tensor is asked for.
    dtype: String,
    shape: Vec<usize>,
    /// Bytes within the shard.
    range: Range<usize>,
}

impl SafetensorsDir {
    /// Opens the folder's safetensors files and checks their headers.
    pub fn open(dir: &Path, names: &HfNames) -> Result<SafetensorsDir> {
        let mut shards = Vec::new();
        let mut tensors = HashMap::new();
        let listing = match Layout::find(dir)? {
            Layout::Single(path) => {
                let shard = open_shard(&path)?;
                tensors.extend(shard.1.into_iter().map(|(name, entry)| (name, entry.locate(0))));
                shards.push(shard.0);
                path
            }
            Layout::Sharded { index, weight_map } => {
                // The index says which files there are. Names in it that no file holds matter when they are asked for;
                // of a name that several hold, the listed file's counts.
                for file in weight_map.values().collect::<BTreeSet<_>>() {
                    let (shard, entries) = open_shard(&dir.join(file))?;
                    for (name, entry) in entries {
                        if weight_map.get(&name) == Some(file) || !tensors.contains_key(&name) {
                            tensors.insert(name, entry.locate(shards.len()));
                        }
                    }
                    shards.push(shard);
                }
                index
            }
        };
        let names = hf_names(&tensors, names, &listing)?;
        Ok(SafetensorsDir { listing, shards, tensors, names })
    }

    fn find(&self, canonical: &str) -> Option<(String, &Located)> {
        let name = self.names.to_file(canonical)?;
        let located = self.tensors.get(&name)?;
        Some((name, located))
    }

    fn meta_of(&self, name: &str, located: &Located) -> Result<TensorMeta> {
        let dtype = weight_type(&located.dtype).ok_or_else(|| Error::Unsupported {
            what: "tensor type",
            value: format!(
                "{} of tensor `{}` in {}",
                shorten(&located.dtype),
                shorten(name),
                self.shards[located.shard].path().display()
            ),
            hint: format!("supported in safetensors are F32, F16 and BF16; {}", instead_of(&located.dtype)),
        })?;
        Ok(TensorMeta { dtype, shape: located.shape.clone() })
    }
}

/// What to do about a model in a type that is not supported.
fn instead_of(dtype: &str) -> &'static str {
    match dtype {
        "F64" | "C64" => {
            "convert the model (in Python: `AutoModelForCausalLM.from_pretrained(folder, \
             dtype=\"bfloat16\").save_pretrained(new_folder)`)"
        }
        // Integers and small floats hold the weights of quantised models.
        _ => "take the model that is not quantised, or a GGUF file",
    }
}

impl WeightSource for SafetensorsDir {
    fn meta(&self, name: &str) -> Result<Option<TensorMeta>> {
        self.find(name).map(|(name, located)| self.meta_of(&name, located)).transpose()
    }

    fn tensor(&self, name: &str) -> Result<StoredTensor<'_>> {
        let (file_name, located) = self.find(name).ok_or_else(|| Error::Tensor {
            path: self.listing.clone(),
            tensor: self.stored_name(name),
            reason: "is missing from the model".to_string(),
        })?;
        let meta = self.meta_of(&file_name, located)?;
        let bytes = TensorBytes::File { file: &self.shards[located.shard], range: located.range.clone() };
        Ok(StoredTensor { meta, bytes })
    }

    fn mapped(&self, name: &str) -> Result<Option<MappedTensor>> {
        let mapped = |(_, located): (String, &Located)| {
            Ok(MappedTensor { file: self.shards[located.shard].map()?, range: located.range.clone() })
        };
        self.find(name).map(mapped).transpose()
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().filter_map(|name| self.names.to_canonical(name)).collect()
    }

    fn stored_name(&self, name: &str) -> String {
        self.names.to_file(name).unwrap_or_else(|| name.to_string())
    }

    fn path_of(&self, name: &str) -> &Path {
        self.find(name).map_or(&self.listing, |(_, located)| self.shards[located.shard].path())
    }
}

/// Which files of a folder hold the weights.
pub(super) enum Layout {
    Single(PathBuf),
    Sharded { index: PathBuf, weight_map: BTreeMap<String, String> },
}

impl Layout {
    pub(super) fn find(dir: &Path) -> Result<Layout> {
        let (single, index) = (dir.join(SINGLE_FILE), dir.join(INDEX_FILE));
        if single.exists() {
            return Ok(Layout::Single(single));
        }
        if index.exists() {
            let weight_map = read_index(&index)?;
            return Ok(Layout::Sharded { index, weight_map });
        }
        let files = file_names(dir)?;
        let safetensors: Vec<&String> =
            files.iter().filter(|name| name.ends_with(".safetensors") && !is_adapter(name)).collect();
        match safetensors[..] {
            [] if files.iter().any(|name| is_adapter(name)) => Err(Error::file(dir, ADAPTER)),
            [only] => Ok(Layout::Single(dir.join(only))),
            [] if files
                .iter()
                .any(|name| name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth")) =>
            {
                let reason = "has PyTorch files and no safetensors: convert the model to safetensors (in Python: \
                              `save_pretrained(folder, safe_serialization=True)`)";
                Err(Error::file(dir, reason))
            }
            [] => Err(Error::file(dir, format!("has neither {SINGLE_FILE} nor {INDEX_FILE}"))),
            ref several => Err(Error::file(
                dir,
                format!("has {} safetensors files and no {INDEX_FILE} to say what they hold", several.len()),
            )),
        }
    }

    /// The files.
    #[cfg_attr(not(feature = "hub"), allow(dead_code))]
    pub(super) fn files(&self) -> Vec<PathBuf> {
        match self {
            Layout::Single(path) => vec![path.clone()],
            Layout::Sharded { index, weight_map } => {
                let files: BTreeSet<&String> = weight_map.values().collect();
                files.into_iter().map(|file| index.with_file_name(file)).collect()
            }
        }
    }
}

/// Whether a file belongs to an adapter of the PEFT library.
pub(super) fn is_adapter(name: &str) -> bool {
    name == "adapter_config.json" || name.starts_with("adapter_model")
}

/// What a folder with such files is.
pub(super) const ADAPTER: &str = "holds an adapter, which changes a model and is none: merge it into its base model (in \
                                  Python: `AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()\
                                  .save_pretrained(new_folder)`) and give the new folder";

/// Names of the files in a folder, sorted. Names that are not UTF-8 are none that matter here.
pub(super) fn file_names(dir: &Path) -> Result<Vec<String>> {
    let unreadable = |error: std::io::Error| Error::file(dir, format!("cannot be read: {error}"));
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        if let Ok(name) = entry.map_err(unreadable)?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Reads the index: which shard holds which tensor. A shard is a plain file name, so that no index reaches out of its
/// folder.
pub(super) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let json = files::parse_json(path, &files::read_bounded(path, MAX_HEADER_BYTES as u64)?)?;
    let index: Index =
        serde_json::from_value(json).map_err(|error| Error::file(path, format!("is not a weight index: {error}")))?;
    if index.weight_map.is_empty() {
        return Err(Error::file(path, "`weight_map` is empty"));
    }
    for (tensor, file) in &index.weight_map {
        let mut components = Path::new(file).components();
        let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
        if !plain || file.contains(['/', '\\']) {
            let reason = format!("`weight_map` puts it into `{file}`, which is not a file name within the folder");
            return Err(Error::Tensor { path: path.into(), tensor: tensor.clone(), reason });
        }
    }
    Ok(index.weight_map)
}

/// A tensor as the header has it.
#[derive(Debug, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    /// From the end of the header; from the start of the file once checked.
    data_offsets: (usize, usize),
}

impl Entry {
    fn locate(self, shard: usize) -> Located {
        let range = self.data_offsets.0..self.data_offsets.1;
        Located { shard, dtype: self.dtype, shape: self.shape, range }
    }
}

#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    _metadata: Option<IgnoredAny>,
    #[serde(flatten)]
    tensors: HashMap<String, Entry>,
}

/// Opens one safetensors file and checks that its tensors cover its data, each with the bytes that its shape takes.
fn open_shard(path: &Path) -> Result<(ModelFile, HashMap<String, Entry>)> {
    let file = ModelFile::open(path)?;
    let damaged = |reason: String| Error::file(path, format!("{reason}: the file is truncated or damaged"));
    if file.len() < HEADER_LENGTH_BYTES {
        return Err(damaged(format!("has {} bytes, fewer than the header length takes", file.len())));
    }
    let mut length = [0; HEADER_LENGTH_BYTES];
    file.read_at(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    let room = (file.len() - HEADER_LENGTH_BYTES).min(MAX_HEADER_BYTES);
    let length = usize::try_from(length)
        .ok()
        .filter(|&length| length <= room)
        .ok_or_else(|| damaged(format!("the header length says {length} bytes, and there is room for {room}")))?;
    let mut header = vec![0; length];
    file.read_at(HEADER_LENGTH_BYTES, &mut header)?;
    let data_start = HEADER_LENGTH_BYTES + length;
    let data_bytes = file.len() - data_start;
    let Header { mut tensors, .. } =
        serde_json::from_slice(&header).map_err(|error| damaged(format!("the header does not parse: {error}")))?;

    let mut by_offset: Vec<(&String, &mut Entry)> = tensors.iter_mut().collect();
    by_offset.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut covered = 0;
    for (name, entry) in by_offset {
        let refused = |reason: String| Error::Tensor { path: path.into(), tensor: name.clone(), reason };
        let (start, end) = entry.data_offsets;
        if start != covered || end < start {
            let reason = format!("data_offsets are [{start}, {end}], where the data before it ends at {covered}");
            return Err(refused(format!("{reason}: tensors overlap or leave a gap")));
        }
        if end > data_bytes {
            let reason = format!("data_offsets are [{start}, {end}], and the file holds {} bytes of data", data_bytes);
            return Err(refused(format!("{reason}: the file is truncated or damaged")));
        }
        if let Some(dtype) = weight_type(&entry.dtype) {
            let elements = entry.shape.iter().try_fold(1usize, |all, &dim| all.checked_mul(dim));
            if elements.and_then(|elements| dtype.bytes_for(elements)) != Some(end - start) {
                let reason = format!("shape {:?} of {dtype} does not take the {} bytes", entry.shape, end - start);
                return Err(refused(format!("{reason} of data_offsets [{start}, {end}]")));
            }
        }
        covered = end;
        entry.data_offsets = (data_start + start, data_start + end);
    }
    if covered != data_bytes {
        return Err(damaged(format!("the header describes {covered} bytes of data, and there are {}", data_bytes)));
    }
    Ok((file, tensors))
}

fn weight_type(dtype: &str) -> Option<WeightType> {
    [WeightType::F32, WeightType::F16, WeightType::BF16].into_iter().find(|known| known.name() == dtype)
}

/// The standard Hugging Face names, behind whatever prefix this model has.
fn hf_names(tensors: &HashMap<String, Located>, norms: &HfNames, listing: &Path) -> Result<NameMap> {
    let prefix = decoder_prefix(tensors, listing)?;
    // The head stands beside the module that holds the layers, or outside of all.
    let wrapper = prefix.strip_suffix('.').map_or("", |path| &path[..path.rfind('.').map_or(0, |dot| dot + 1)]);
    let head = [wrapper, "", &prefix]
        .map(|before| format!("{before}lm_head.weight"))
        .into_iter()
        .find(|name| tensors.contains_key(name))
        .unwrap_or_else(|| "lm_head.weight".to_string());
    let mut layer = vec![
        ("q_proj", "self_attn.q_proj"),
        ("k_proj", "self_attn.k_proj"),
        ("v_proj", "self_attn.v_proj"),
        ("o_proj", "self_attn.o_proj"),
        ("qkv_proj", "self_attn.qkv_proj"),
        ("q_norm", "self_attn.q_norm"),
        ("k_norm", "self_attn.k_norm"),
        ("gate_proj", "mlp.gate_proj"),
        ("up_proj", "mlp.up_proj"),
        ("down_proj", "mlp.down_proj"),
        ("gate_up_proj", "mlp.gate_up_proj"),
    ];
    let norms = [
        ("attn_norm", norms.attn_norm),
        ("attn_post_norm", norms.attn_post_norm),
        ("mlp_norm", norms.mlp_norm),
        ("mlp_post_norm", norms.mlp_post_norm),
    ];
    layer.extend(norms.into_iter().filter_map(|(canonical, name)| Some((canonical, name?))));
    Ok(NameMap {
        model: vec![
            ("embed_tokens.weight", format!("{prefix}embed_tokens.weight")),
            ("norm.weight", format!("{prefix}norm.weight")),
            ("lm_head.weight", head),
        ],
        layer_prefix: format!("{prefix}layers."),
        layer,
    })
}

/// What stands before `layers.0.` in the decoder: `model.`, or more where another model wraps it (one that sees images,
/// say). The decoder is the one that also embeds tokens.
fn decoder_prefix(tensors: &HashMap<String, Located>, listing: &Path) -> Result<String> {
    let has_layers = |prefix: &str| {
        let attention = format!("{prefix}layers.0.self_attn.");
        tensors.keys().any(|name| name.starts_with(&attention))
    };
    let mut prefixes: Vec<&str> = tensors.keys().filter_map(|name| name.strip_suffix("embed_tokens.weight")).collect();
    prefixes.retain(|prefix| (prefix.is_empty() || prefix.ends_with('.')) && has_layers(prefix));
    prefixes.sort_unstable();
    match prefixes[..] {
        [only] => Ok(only.to_string()),
        // Nothing to go by: the tensors are then missing under their standard names.
        [] => Ok("model.".to_string()),
        ref several => Err(Error::file(
            listing,
            format!("holds more than one language model, under the prefixes `{}`", several.join("`, `")),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: HfNames = HfNames {
        attn_norm: Some("input_layernorm"),
        attn_post_norm: None,
        mlp_norm: Some("post_attention_layernorm"),
        mlp_post_norm: None,
    };

    fn names_of(tensors: &[&str]) -> Result<NameMap> {
        let located = || Located { shard: 0, dtype: "F32".to_string(), shape: vec![1], range: 0..4 };
        let tensors = tensors.iter().map(|name| (name.to_string(), located())).collect();
        hf_names(&tensors, &LLAMA, Path::new("model.safetensors"))
    }

    #[test]
    fn names_translate_both_ways() {
        let names = names_of(&["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]).unwrap();
        for (canonical, file) in [
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("norm.weight", "model.norm.weight"),
            ("lm_head.weight", "lm_head.weight"),
            ("layers.7.attn_norm.weight", "model.layers.7.input_layernorm.weight"),
            ("layers.7.mlp_norm.weight", "model.layers.7.post_attention_layernorm.weight"),
            ("layers.7.q_proj.bias", "model.layers.7.self_attn.q_proj.bias"),
            ("layers.7.qkv_proj.weight", "model.layers.7.self_attn.qkv_proj.weight"),
            ("layers.7.k_norm.weight", "model.layers.7.self_attn.k_norm.weight"),
            ("layers.7.gate_up_proj.weight", "model.layers.7.mlp.gate_up_proj.weight"),
            ("layers.7.down_proj.weight", "model.layers.7.mlp.down_proj.weight"),
        ] {
            assert_eq!(names.to_file(canonical).as_deref(), Some(file));
            assert_eq!(names.to_canonical(file).as_deref(), Some(canonical));
        }
        assert_eq!(names.to_file("layers.7.attn_post_norm.weight"), None);
        assert_eq!(names.to_file("rope_freqs.weight"), None);
        assert_eq!(names.to_canonical("model.layers.7.self_attn.rotary_emb.inv_freq"), None);
    }

    #[test]
    fn the_prefix_is_where_the_decoder_is() {
        for (prefix, head) in [
            ("model.", "lm_head.weight"),
            ("", "lm_head.weight"),
            ("language_model.model.", "language_model.lm_head.weight"),
            ("model.language_model.", "lm_head.weight"),
        ] {
            let embed = format!("{prefix}embed_tokens.weight");
            let layer = format!("{prefix}layers.0.self_attn.q_proj.weight");
            let vision = "vision_tower.encoder.layers.0.self_attn.q_proj.weight";
            let names = names_of(&[vision, &embed, &layer, head]).unwrap();
            assert_eq!(names.to_file("embed_tokens.weight"), Some(embed));
            assert_eq!(names.to_file("layers.0.q_proj.weight"), Some(layer));
            assert_eq!(names.to_file("lm_head.weight").as_deref(), Some(head));
            assert_eq!(names.to_canonical(vision), None);
        }
        let two = ["a.embed_tokens.weight", "a.layers.0.self_attn.q.weight", "b.embed_tokens.weight"];
        assert!(names_of(&two).is_ok());
        let error = names_of(&[two[0], two[1], two[2], "b.layers.0.self_attn.q.weight"]).unwrap_err().to_string();
        assert!(error.contains("`a.`, `b.`"), "{error}");
    }
}
