//! Reading a GGUF file in place. Opening one walks its header once and checks every length against the file before
//! anything is allocated for it; afterwards metadata is decoded from the mapped bytes each time it is asked for, so a
//! vocabulary of 200 000 strings costs nothing until somebody wants it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::mapped::{map_file, release_pages};
use super::names::NameMap;
use super::{StoredTensor, TensorMeta, WeightSource, WeightType};
use crate::error::{Error, Result};

/// Where tensor data starts and every tensor in it, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// GGML's own limit.
const MAX_DIMENSIONS: u32 = 4;
/// Arrays of arrays deeper than this are refused, since walking them takes a stack frame a level.
const MAX_ARRAY_DEPTH: u32 = 4;

/// A GGUF file, mapped.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<TensorInfo>,
    /// Index in `tensors` by the file's name.
    by_name: HashMap<String, usize>,
    names: NameMap,
}

#[derive(Debug)]
struct TensorInfo {
    name: String,
    meta: TensorMeta,
    /// Bytes within the file.
    range: Range<usize>,
}

impl GgufFile {
    /// Maps the file and checks its whole header: versions 2 and 3, little endian. A tensor of a type that is not
    /// supported is refused here, before anything is loaded.
    pub fn open(path: &Path) -> Result<GgufFile> {
        let map = map_file(path)?;
        let mut reader = Reader { path, bytes: &map, at: 0 };
        read_version(&mut reader)?;
        let tensor_count = reader.u64(format_args!("the tensor count"))?;
        let metadata_count = reader.u64(format_args!("the metadata count"))?;

        // A key's length, one value type and one byte; a tensor's two lengths, dimension, type and offset.
        reader.check_count(metadata_count, 8 + 4 + 1, format_args!("the metadata count"))?;
        let metadata = read_metadata(&mut reader, metadata_count)?;
        reader.check_count(tensor_count, 8 + 4 + 8 + 4 + 8, format_args!("the tensor count"))?;
        let entries = read_tensor_entries(&mut reader, tensor_count)?;
        let data_start = reader.at;

        let mut file = GgufFile {
            path: path.to_path_buf(),
            metadata,
            tensors: Vec::new(),
            by_name: HashMap::new(),
            names: NameMap::default(),
            map,
        };
        file.refuse_split()?;
        file.tensors = file.place_tensors(entries, data_start)?;
        file.by_name = file.tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index)).collect();
        file.names = gguf_names(file.get_str("general.architecture")?.unwrap_or(""));
        Ok(file)
    }

    /// The file's path, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `general.architecture`: the family and the prefix of most other keys.
    pub fn architecture(&self) -> Result<&str> {
        self.get_str("general.architecture")?
            .ok_or_else(|| Error::file(&self.path, "metadata key `general.architecture` is missing"))
    }

    /// All metadata keys, sorted.
    pub fn metadata_keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// Every tensor under the file's own name, in file order.
    pub fn tensor_infos(&self) -> impl Iterator<Item = (&str, &TensorMeta)> {
        self.tensors.iter().map(|tensor| (tensor.name.as_str(), &tensor.meta))
    }

    /// A non-negative integer, of whichever width and sign it is stored with.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        self.scalar(key, "a non-negative integer", Scalar::as_u64)
    }

    /// A number of any type.
    pub fn get_f64(&self, key: &str) -> Result<Option<f64>> {
        self.scalar(key, "a number", Scalar::as_f64)
    }

    /// A boolean.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.scalar(key, "a boolean", Scalar::as_bool)
    }

    /// A string.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        self.scalar(key, "a UTF-8 string", Scalar::as_str)
    }

    /// Non-negative integers: an array of them, or one that stands for every layer and comes back as one element.
    pub fn get_u64_or_array(&self, key: &str) -> Result<Option<Vec<u64>>> {
        match self.metadata.get(key) {
            Some(Value { count: None, .. }) => Ok(self.get_u64(key)?.map(|value| vec![value])),
            _ => self.get_u64_array(key),
        }
    }

    /// An array of non-negative integers.
    pub fn get_u64_array(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.array(key, "non-negative integers", Scalar::as_u64)
    }

    /// An array of numbers.
    pub fn get_f64_array(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.array(key, "numbers", Scalar::as_f64)
    }

    /// An array of booleans.
    pub fn get_bool_array(&self, key: &str) -> Result<Option<Vec<bool>>> {
        self.array(key, "booleans", Scalar::as_bool)
    }

    /// An array of strings.
    pub fn get_str_array(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.array(key, "UTF-8 strings", Scalar::as_str)
    }

    fn scalar<'a, T>(&'a self, key: &str, wanted: &str, as_wanted: fn(Scalar<'a>) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        if value.count.is_some() {
            return Err(self.wrong_type(key, wanted, value.describe()));
        }
        let found = self.reader_at(value.at).scalar(value.kind, format_args!("metadata `{key}`"))?;
        as_wanted(found).map(Some).ok_or_else(|| self.wrong_type(key, wanted, found.describe(value.kind)))
    }

    fn array<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        as_wanted: fn(Scalar<'a>) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let wanted = format_args!("an array of {wanted}");
        let (Some(count), false) = (value.count, value.kind == Kind::Array) else {
            return Err(self.wrong_type(key, wanted, value.describe()));
        };
        let mut reader = self.reader_at(value.at);
        // Opening has walked every element, so `count` of them are there.
        let mut elements = Vec::with_capacity(count);
        for index in 0..count {
            let found = reader.scalar(value.kind, format_args!("metadata `{key}`"))?;
            let element = as_wanted(found).ok_or_else(|| {
                self.wrong_type(key, wanted, format_args!("{} at index {index}", found.describe(value.kind)))
            })?;
            elements.push(element);
        }
        Ok(Some(elements))
    }

    fn reader_at(&self, at: usize) -> Reader<'_> {
        Reader { path: &self.path, bytes: &self.map, at }
    }

    fn wrong_type(&self, key: &str, wanted: impl fmt::Display, found: impl fmt::Display) -> Error {
        Error::file(&self.path, format!("metadata key `{key}` has to be {wanted}, and is {found}"))
    }

    fn refuse_split(&self) -> Result<()> {
        match self.get_u64("split.count")? {
            None | Some(0 | 1) => Ok(()),
            Some(count) => Err(Error::Unsupported {
                what: "split GGUF file",
                value: format!("{} (one of {count} parts)", self.path.display()),
                hint: "merge the parts with `llama-gguf-split --merge FIRST-PART MERGED.gguf`".to_string(),
            }),
        }
    }

    /// Turns the header's entries into types, shapes and byte ranges, all of which lie within the file, apart from
    /// one another.
    fn place_tensors(&self, entries: Vec<TensorEntry>, header_end: usize) -> Result<Vec<TensorInfo>> {
        let alignment = self.get_u64("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() {
            let reason = format!("metadata key `general.alignment` is {alignment}, which is not a power of two");
            return Err(Error::file(&self.path, reason));
        }
        let data_start = (header_end as u64).checked_next_multiple_of(alignment);

        let mut unsupported = None;
        let mut tensors = Vec::new();
        for entry in entries {
            let refused =
                |reason: String| Error::Tensor { path: self.path.clone(), tensor: entry.name.clone(), reason };
            let Some(dtype) = weight_type(entry.type_id) else {
                // Said only once the rest of the header is known to be sound: a damaged header also looks like this.
                unsupported.get_or_insert_with(|| unsupported_type(&self.path, &entry));
                continue;
            };
            let shape: Option<Vec<usize>> = entry.dims.iter().rev().map(|&dim| usize::try_from(dim).ok()).collect();
            let elements = shape.as_ref().and_then(|s| s.iter().try_fold(1usize, |all, &dim| all.checked_mul(dim)));
            let (Some(shape), Some(elements)) = (shape, elements) else {
                return Err(refused(format!("shape {:?} is too large", entry.dims)));
            };
            if elements == 0 {
                return Err(refused(format!("shape {:?} has a dimension of zero", entry.dims)));
            }
            let block = dtype.block_size();
            if shape.last().is_none_or(|row| !row.is_multiple_of(block)) {
                let reason =
                    format!("rows of {} elements are no whole number of {dtype} blocks of {block}", entry.dims[0]);
                return Err(refused(reason));
            }
            if !entry.offset.is_multiple_of(alignment) {
                let reason = format!("offset {} is not a multiple of the alignment {alignment}", entry.offset);
                return Err(refused(reason));
            }
            let start = data_start.and_then(|start| start.checked_add(entry.offset));
            let start = start.and_then(|start| usize::try_from(start).ok());
            let range = start.and_then(|start| Some(start..start.checked_add(dtype.bytes_for(elements)?)?));
            let Some(range) = range.filter(|range| range.end <= self.map.len()) else {
                return Err(refused(format!(
                    "its data ({dtype}, shape {shape:?}, offset {}) reaches beyond the end of the file of {} bytes: the \
                     download is not complete or the header is damaged",
                    entry.offset,
                    self.map.len(),
                )));
            };
            tensors.push(TensorInfo { name: entry.name, meta: TensorMeta { dtype, shape }, range });
        }

        let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
        by_offset.sort_by_key(|tensor| tensor.range.start);
        if let Some(pair) = by_offset.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
            let reason = format!("its data overlaps that of tensor `{}`: the header is damaged", pair[0].name);
            return Err(Error::Tensor { path: self.path.clone(), tensor: pair[1].name.clone(), reason });
        }
        unsupported.map_or(Ok(tensors), Err)
    }

    fn find(&self, canonical: &str) -> Option<&TensorInfo> {
        self.by_name.get(&self.names.to_file(canonical)?).map(|&index| &self.tensors[index])
    }
}

impl WeightSource for GgufFile {
    fn meta(&self, name: &str) -> Result<Option<TensorMeta>> {
        Ok(self.find(name).map(|tensor| tensor.meta.clone()))
    }

    fn tensor(&self, name: &str) -> Result<StoredTensor<'_>> {
        let tensor = self.find(name).ok_or_else(|| Error::Tensor {
            path: self.path.clone(),
            tensor: self.names.to_file(name).unwrap_or_else(|| name.to_string()),
            reason: "is missing from the file".to_string(),
        })?;
        Ok(StoredTensor { meta: tensor.meta.clone(), bytes: &self.map[tensor.range.clone()] })
    }

    fn names(&self) -> Vec<String> {
        self.tensors.iter().filter_map(|tensor| self.names.to_canonical(&tensor.name)).collect()
    }

    fn release(&self, name: &str) {
        if let Some(tensor) = self.find(name) {
            release_pages(&self.map, tensor.range.clone());
        }
    }

    fn path_of(&self, _name: &str) -> &Path {
        &self.path
    }
}

/// GGUF's names. They are the same for every architecture but Phi-3's, whose `ffn_up` holds gate and up together.
fn gguf_names(architecture: &str) -> NameMap {
    let up = if architecture == "phi3" { "gate_up_proj" } else { "up_proj" };
    let model = [
        ("embed_tokens.weight", "token_embd.weight"),
        ("norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("rope_freqs.weight", "rope_freqs.weight"),
        ("rope_factors_long.weight", "rope_factors_long.weight"),
        ("rope_factors_short.weight", "rope_factors_short.weight"),
    ];
    let layer = vec![
        ("attn_norm", "attn_norm"),
        ("attn_post_norm", "post_attention_norm"),
        ("mlp_norm", "ffn_norm"),
        ("mlp_post_norm", "post_ffw_norm"),
        ("q_proj", "attn_q"),
        ("k_proj", "attn_k"),
        ("v_proj", "attn_v"),
        ("o_proj", "attn_output"),
        ("qkv_proj", "attn_qkv"),
        ("q_norm", "attn_q_norm"),
        ("k_norm", "attn_k_norm"),
        ("gate_proj", "ffn_gate"),
        (up, "ffn_up"),
        ("down_proj", "ffn_down"),
    ];
    let model = model.into_iter().map(|(canonical, file)| (canonical, file.to_string())).collect();
    NameMap { model, layer_prefix: "blk.".to_string(), layer }
}

fn weight_type(type_id: u32) -> Option<WeightType> {
    WeightType::ALL.into_iter().find(|dtype| ggml_type_name(type_id) == Some(dtype.name()))
}

fn unsupported_type(path: &Path, entry: &TensorEntry) -> Error {
    let name = ggml_type_name(entry.type_id).unwrap_or("unknown");
    let supported: Vec<&str> = WeightType::ALL.iter().map(|dtype| dtype.name()).collect();
    Error::Unsupported {
        what: "tensor type",
        value: format!("{name} (id {}) of tensor `{}` in {}", entry.type_id, entry.name, path.display()),
        hint: format!("supported are {}; take a file quantised to one of them", supported.join(", ")),
    }
}

/// What GGML calls a type id. It never gives an id to a second type.
fn ggml_type_name(type_id: u32) -> Option<&'static str> {
    Some(match type_id {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        4 => "Q4_2",
        5 => "Q4_3",
        6 => "Q5_0",
        7 => "Q5_1",
        8 => "Q8_0",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        30 => "BF16",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        39 => "MXFP4",
        40 => "NVFP4",
        41 => "Q1_0",
        42 => "Q2_0",
        _ => return None,
    })
}

/// The type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_id(id: u32) -> Option<Kind> {
        use Kind::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, Str, Array, U64, I64, F64].get(usize::try_from(id).ok()?).copied()
    }

    fn name(self) -> &'static str {
        match self {
            Kind::U8 => "u8",
            Kind::I8 => "i8",
            Kind::U16 => "u16",
            Kind::I16 => "i16",
            Kind::U32 => "u32",
            Kind::I32 => "i32",
            Kind::F32 => "f32",
            Kind::Bool => "bool",
            Kind::Str => "string",
            Kind::Array => "array",
            Kind::U64 => "u64",
            Kind::I64 => "i64",
            Kind::F64 => "f64",
        }
    }

    /// Bytes of a value; for strings and arrays the least there can be, their length fields.
    fn min_bytes(self) -> u64 {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 | Kind::Str => 8,
            Kind::Array => 12,
        }
    }
}

/// Where a metadata value lies in the file. Opening has walked it to its end.
#[derive(Debug)]
struct Value {
    /// The value's type, or that of the array's elements.
    kind: Kind,
    /// Number of elements when it is an array.
    count: Option<usize>,
    at: usize,
}

impl Value {
    fn describe(&self) -> String {
        match self.count {
            Some(count) => format!("an array of {count} {}", self.kind.name()),
            None => self.kind.name().to_string(),
        }
    }
}

/// A decoded metadata value that is not an array.
#[derive(Clone, Copy)]
enum Scalar<'a> {
    Int(i128),
    Float(f64),
    Bool(u8),
    Str(&'a [u8]),
}

impl<'a> Scalar<'a> {
    fn as_u64(self) -> Option<u64> {
        match self {
            Scalar::Int(value) => value.try_into().ok(),
            _ => None,
        }
    }

    fn as_f64(self) -> Option<f64> {
        match self {
            Scalar::Int(value) => Some(value as f64),
            Scalar::Float(value) => Some(value),
            _ => None,
        }
    }

    fn as_bool(self) -> Option<bool> {
        match self {
            Scalar::Bool(value @ (0 | 1)) => Some(value == 1),
            _ => None,
        }
    }

    fn as_str(self) -> Option<&'a str> {
        match self {
            Scalar::Str(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    fn describe(self, kind: Kind) -> String {
        let kind = kind.name();
        match self {
            Scalar::Int(value) => format!("{kind} {value}"),
            Scalar::Float(value) => format!("{kind} {value}"),
            Scalar::Bool(value) => format!("{kind} {value}"),
            Scalar::Str(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => format!("{kind} {:?}", text.chars().take(40).collect::<String>()),
                Err(_) => format!("{kind} of {} bytes that are not UTF-8", bytes.len()),
            },
        }
    }
}

/// A tensor as the header has it.
struct TensorEntry {
    name: String,
    /// In GGUF's order: the first one is contiguous.
    dims: Vec<u64>,
    type_id: u32,
    /// From the start of the data section.
    offset: u64,
}

fn read_version(reader: &mut Reader<'_>) -> Result<()> {
    let path = reader.path;
    let magic = reader.take(4, format_args!("the magic"))?;
    match magic {
        b"GGUF" => {}
        b"FUGG" => return Err(Error::file(path, "is a big endian GGUF file: convert the model for little endian")),
        b"tjgg" | b"fmgg" | b"lmgg" => {
            return Err(Error::file(path, "is in a GGML format from before GGUF: convert the model again"));
        }
        _ => return Err(Error::file(path, "is not a GGUF file: it does not start with `GGUF`")),
    }
    let version = reader.u32(format_args!("the version"))?;
    match version {
        2 | 3 => Ok(()),
        1 => Err(Error::file(path, "is GGUF version 1; versions 2 and 3 are read: convert the model again")),
        // Big endian writers differ in the magic's order and agree on the version's.
        _ if matches!(version.swap_bytes(), 1..=3) => {
            Err(Error::file(path, "is a big endian GGUF file: convert the model for little endian"))
        }
        _ => Err(Error::file(path, format!("is GGUF version {version}; versions 2 and 3 are read"))),
    }
}

fn read_metadata(reader: &mut Reader<'_>, count: u64) -> Result<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = reader.name(format_args!("metadata key {index} of {count}"))?;
        let value = reader.value(&key)?;
        if metadata.contains_key(&key) {
            return Err(Error::file(reader.path, format!("metadata key `{key}` appears twice")));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn read_tensor_entries(reader: &mut Reader<'_>, count: u64) -> Result<Vec<TensorEntry>> {
    let mut names = std::collections::HashSet::new();
    let mut entries = Vec::new();
    for index in 0..count {
        let name = reader.name(format_args!("the name of tensor {index} of {count}"))?;
        let refused = |reason: String| Error::Tensor { path: reader.path.into(), tensor: name.clone(), reason };
        if !names.insert(name.clone()) {
            return Err(refused("appears twice".to_string()));
        }
        let dimensions = reader.u32(format_args!("the number of dimensions of tensor `{name}`"))?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(refused(format!("has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")));
        }
        let mut dims = Vec::new();
        for _ in 0..dimensions {
            dims.push(reader.u64(format_args!("the shape of tensor `{name}`"))?);
        }
        let type_id = reader.u32(format_args!("the type of tensor `{name}`"))?;
        let offset = reader.u64(format_args!("the offset of tensor `{name}`"))?;
        entries.push(TensorEntry { name, dims, type_id, offset });
    }
    Ok(entries)
}

/// Reads little endian values off the mapped bytes. `what` says in errors what was being read.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: u64, what: fmt::Arguments<'_>) -> Result<&'a [u8]> {
        let left = &self.bytes[self.at..];
        let taken = usize::try_from(count).ok().and_then(|count| left.get(..count)).ok_or_else(|| {
            self.damaged(format_args!("{what} takes {count} bytes at byte {}, where {} are left", self.at, left.len()))
        })?;
        self.at += taken.len();
        Ok(taken)
    }

    fn number<const N: usize>(&mut self, what: fmt::Arguments<'_>) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N as u64, what)?);
        Ok(bytes)
    }

    fn u32(&mut self, what: fmt::Arguments<'_>) -> Result<u32> {
        self.number(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: fmt::Arguments<'_>) -> Result<u64> {
        self.number(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: fmt::Arguments<'_>) -> Result<&'a [u8]> {
        let length = self.u64(what)?;
        self.take(length, what)
    }

    /// A key or a tensor's name.
    fn name(&mut self, what: fmt::Arguments<'_>) -> Result<String> {
        let bytes = self.string(what)?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.damaged(format_args!("{what} is not UTF-8")))?;
        Ok(text.to_string())
    }

    fn kind(&mut self, what: fmt::Arguments<'_>) -> Result<Kind> {
        let id = self.u32(what)?;
        Kind::from_id(id).ok_or_else(|| self.damaged(format_args!("{what} has the unknown value type {id}")))
    }

    /// Walks over a metadata value and keeps where it is.
    fn value(&mut self, key: &str) -> Result<Value> {
        let what = format_args!("metadata `{key}`");
        let kind = self.kind(what)?;
        if kind != Kind::Array {
            let at = self.at;
            self.scalar(kind, what)?;
            return Ok(Value { kind, count: None, at });
        }
        let (kind, count) = self.array_header(what)?;
        let at = self.at;
        self.skip_elements(kind, count, 1, what)?;
        Ok(Value { kind, count: Some(count), at })
    }

    fn array_header(&mut self, what: fmt::Arguments<'_>) -> Result<(Kind, usize)> {
        let kind = self.kind(what)?;
        let count = self.u64(what)?;
        self.check_count(count, kind.min_bytes(), format_args!("the array length of {what}"))?;
        Ok((kind, count as usize)) // lossless: at most the file's length, which is mapped
    }

    fn skip_elements(&mut self, kind: Kind, count: usize, depth: u32, what: fmt::Arguments<'_>) -> Result<()> {
        match kind {
            Kind::Str => {
                for _ in 0..count {
                    self.string(what)?;
                }
            }
            Kind::Array if depth == MAX_ARRAY_DEPTH => {
                return Err(self.damaged(format_args!("{what} nests arrays more than {MAX_ARRAY_DEPTH} deep")));
            }
            Kind::Array => {
                for _ in 0..count {
                    let (kind, count) = self.array_header(what)?;
                    self.skip_elements(kind, count, depth + 1, what)?;
                }
            }
            _ => {
                self.take(count as u64 * kind.min_bytes(), what)?; // `check_count` has seen that these bytes are there
            }
        }
        Ok(())
    }

    fn scalar(&mut self, kind: Kind, what: fmt::Arguments<'_>) -> Result<Scalar<'a>> {
        Ok(match kind {
            Kind::U8 => Scalar::Int(u8::from_le_bytes(self.number(what)?).into()),
            Kind::I8 => Scalar::Int(i8::from_le_bytes(self.number(what)?).into()),
            Kind::U16 => Scalar::Int(u16::from_le_bytes(self.number(what)?).into()),
            Kind::I16 => Scalar::Int(i16::from_le_bytes(self.number(what)?).into()),
            Kind::U32 => Scalar::Int(self.u32(what)?.into()),
            Kind::I32 => Scalar::Int(i32::from_le_bytes(self.number(what)?).into()),
            Kind::U64 => Scalar::Int(self.u64(what)?.into()),
            Kind::I64 => Scalar::Int(i64::from_le_bytes(self.number(what)?).into()),
            Kind::F32 => Scalar::Float(f32::from_le_bytes(self.number(what)?).into()),
            Kind::F64 => Scalar::Float(f64::from_le_bytes(self.number(what)?)),
            Kind::Bool => Scalar::Bool(u8::from_le_bytes(self.number(what)?)),
            Kind::Str => Scalar::Str(self.string(what)?),
            Kind::Array => return Err(self.damaged(format_args!("{what} is an array where a single value has to be"))),
        })
    }

    /// Refuses a count whose items cannot all be in the rest of the file.
    fn check_count(&self, count: u64, min_bytes: u64, what: fmt::Arguments<'_>) -> Result<()> {
        let room = (self.bytes.len() - self.at) as u64 / min_bytes;
        if count > room {
            return Err(self.damaged(format_args!("{what} is {count}, and there is room for at most {room}")));
        }
        Ok(())
    }

    fn damaged(&self, reason: fmt::Arguments<'_>) -> Error {
        Error::file(self.path, format!("{reason}: the file is truncated or damaged"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_translate_both_ways() {
        let names = gguf_names("llama");
        for (canonical, file) in [
            ("embed_tokens.weight", "token_embd.weight"),
            ("norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
            ("rope_freqs.weight", "rope_freqs.weight"),
            ("layers.0.attn_norm.weight", "blk.0.attn_norm.weight"),
            ("layers.3.attn_post_norm.weight", "blk.3.post_attention_norm.weight"),
            ("layers.3.mlp_norm.weight", "blk.3.ffn_norm.weight"),
            ("layers.3.mlp_post_norm.weight", "blk.3.post_ffw_norm.weight"),
            ("layers.12.q_proj.bias", "blk.12.attn_q.bias"),
            ("layers.12.o_proj.weight", "blk.12.attn_output.weight"),
            ("layers.12.qkv_proj.weight", "blk.12.attn_qkv.weight"),
            ("layers.12.k_norm.weight", "blk.12.attn_k_norm.weight"),
            ("layers.12.gate_proj.weight", "blk.12.ffn_gate.weight"),
            ("layers.12.up_proj.weight", "blk.12.ffn_up.weight"),
            ("layers.12.down_proj.weight", "blk.12.ffn_down.weight"),
        ] {
            assert_eq!(names.to_file(canonical).as_deref(), Some(file));
            assert_eq!(names.to_canonical(file).as_deref(), Some(canonical));
        }
        assert_eq!(names.to_file("layers.1.gate_up_proj.weight"), None);
        for other in ["blk.x.attn_q.weight", "blk..attn_q.weight", "blk.1.attn_q", "blk.1.ffn_gate_exps.weight", "blk."]
        {
            assert_eq!(names.to_canonical(other), None, "{other}");
        }
    }

    #[test]
    fn phi3_stacks_gate_and_up() {
        let names = gguf_names("phi3");
        assert_eq!(names.to_file("layers.1.gate_up_proj.weight").as_deref(), Some("blk.1.ffn_up.weight"));
        assert_eq!(names.to_canonical("blk.1.ffn_up.weight").as_deref(), Some("layers.1.gate_up_proj.weight"));
        assert_eq!(names.to_file("layers.1.up_proj.weight"), None);
    }

    #[test]
    fn every_supported_type_has_one_id_and_candle_agrees_on_it() {
        for dtype in WeightType::ALL {
            let ids: Vec<u32> = (0..100).filter(|&id| weight_type(id) == Some(dtype)).collect();
            assert_eq!(ids.len(), 1, "{dtype}");
        }
        assert_eq!(weight_type(12), Some(WeightType::Q4_K));
        assert_eq!(weight_type(30), Some(WeightType::BF16));
        assert_eq!(weight_type(15), None);
    }
}
