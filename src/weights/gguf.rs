//! Reading a GGUF file. Opening one walks its header once and checks every length against the file before anything is
//! allocated for it. Metadata is decoded from the header's bytes each time it is asked for, so that a vocabulary of
//! 200,000 strings costs nothing until it is used.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

use super::file::{ModelFile, TensorBytes};
use super::names::NameMap;
use super::{MappedTensor, StoredTensor, TensorMeta, WeightSource, WeightType};
use crate::error::{Error, Result, shorten};

/// Where tensor data starts and every tensor in it, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// GGML's own limit.
const MAX_DIMENSIONS: u32 = 4;

/// The first part of a file that is searched for the end of its header; more is read until it is found.
const FIRST_HEADER_BYTES: usize = 1 << 20;
/// Far above the largest vocabularies, whose headers take some tens of megabytes.
const MAX_HEADER_BYTES: usize = 1 << 30;

/// An open GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    file: ModelFile,
    /// The file's first bytes, up to the end of its header.
    header: Vec<u8>,
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
    /// Opens the file and checks its whole header: versions 2 and 3, little endian. A tensor of a type that is not
    /// supported is refused here, before anything is loaded.
    pub fn open(path: &Path) -> Result<GgufFile> {
        let file = ModelFile::open(path)?;
        let mut header = file.start(FIRST_HEADER_BYTES)?;
        let (metadata, mut tensors) = loop {
            let mut reader = Reader { path, bytes: &header, file_len: file.len(), at: 0, is_short: false };
            let read = read_header(&mut reader);
            let (end, is_short) = (reader.at, reader.is_short);
            match read {
                Err(_) if is_short && header.len() < MAX_HEADER_BYTES => header = file.start(4 * header.len())?,
                Err(_) if is_short => {
                    let reason = format!("its header takes more than {MAX_HEADER_BYTES} bytes, the most that is read");
                    return Err(Error::file(path, reason));
                }
                read => {
                    header.truncate(end);
                    break read?;
                }
            }
        };
        header.shrink_to_fit();

        let mut gguf = GgufFile {
            file,
            header,
            metadata,
            tensors: Vec::new(),
            by_name: HashMap::new(),
            names: NameMap::default(),
        };
        gguf.refuse_split()?;
        gguf.place(&mut tensors)?;
        gguf.tensors = tensors;
        gguf.by_name = gguf.tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index)).collect();
        gguf.names = gguf_names(gguf.get_str("general.architecture")?.unwrap_or(""));
        Ok(gguf)
    }

    /// The file's path, as given.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// `general.architecture`: the family and the prefix of most other keys.
    pub fn architecture(&self) -> Result<&str> {
        self.get_str("general.architecture")?
            .ok_or_else(|| Error::file(self.path(), "metadata key `general.architecture` is missing"))
    }

    /// All metadata keys, sorted.
    pub fn metadata_keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// Every tensor under the file's own name, in the order of their data.
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

    /// Whether the file has the key, of whatever type.
    pub fn contains(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// Whether the key holds an array.
    pub fn is_array(&self, key: &str) -> bool {
        self.metadata.get(key).is_some_and(|value| value.count.is_some())
    }

    /// Numbers and booleans (0 and 1): those of an array, or a single one. `None` where the key is absent or holds
    /// something else.
    pub fn numbers(&self, key: &str) -> Option<Vec<f64>> {
        let value = self.metadata.get(key)?;
        let number =
            |found: Scalar<'_>| found.as_f64().or_else(|| found.as_bool().map(|flag| f64::from(u8::from(flag))));
        self.scalars(key, value).map(|found| number(found.ok()?)).collect()
    }

    /// The beginning of the key's value, for error messages.
    pub fn shown(&self, key: &str) -> String {
        const MOST: usize = 8;
        let Some(value) = self.metadata.get(key) else { return "nothing".to_string() };
        let shown = |found: Result<Scalar<'_>>| found.map_or_else(|_| "?".to_string(), Scalar::shown);
        let mut texts: Vec<String> = self.scalars(key, value).take(MOST).map(shown).collect();
        match value.count {
            None => texts.remove(0),
            Some(count) if count > MOST => format!("[{}, ...]", texts.join(", ")),
            Some(_) => format!("[{}]", texts.join(", ")),
        }
    }

    /// The elements of an array, or a single value.
    fn scalars<'a>(&'a self, key: &'a str, value: &Value) -> impl Iterator<Item = Result<Scalar<'a>>> {
        let (kind, mut reader) = (value.kind, self.reader_at(value.at));
        (0..value.count.unwrap_or(1)).map(move |_| reader.scalar(kind, format_args!("metadata `{key}`")))
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
        let Some(count) = value.count else {
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
        Reader { path: self.path(), bytes: &self.header, file_len: self.file.len(), at, is_short: false }
    }

    fn wrong_type(&self, key: &str, wanted: impl fmt::Display, found: impl fmt::Display) -> Error {
        Error::file(self.path(), format!("metadata key `{}` has to be {wanted}, and is {found}", shorten(key)))
    }

    fn refuse_split(&self) -> Result<()> {
        match self.get_u64("split.count")? {
            None | Some(0 | 1) => Ok(()),
            Some(count) => Err(Error::Unsupported {
                what: "split GGUF file",
                value: format!("{} (one of {count} parts)", self.path().display()),
                hint: "merge the parts with `llama-gguf-split --merge FIRST-PART MERGED.gguf`".to_string(),
            }),
        }
    }

    /// Turns the tensors' ranges from ones within the data section into ones within the file. Tensors lie in it in the
    /// order of their entries, each at the first multiple of the alignment behind the one before: an offset that says
    /// something else shows that a type or a shape is wrong.
    fn place(&self, tensors: &mut [TensorInfo]) -> Result<()> {
        let alignment = self.get_u64("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        let Some(alignment) = usize::try_from(alignment).ok().filter(|alignment| alignment.is_power_of_two()) else {
            let reason = format!("metadata key `general.alignment` is {alignment}, which is not a power of two");
            return Err(Error::file(self.path(), reason));
        };
        let size = self.file.len();
        let start = self.header.len().checked_next_multiple_of(alignment).unwrap_or(size).min(size);
        let mut expected = Some(0);
        for tensor in tensors {
            let Range { start: from, end: to } = tensor.range;
            let reason = if expected != Some(from) {
                format!(
                    "its data is at offset {from}, and behind the tensors before it, aligned to {alignment}, it would be \
                     at {}: the header is damaged, perhaps the type or shape of a tensor",
                    expected.map_or("the end of all files".to_string(), |expected| expected.to_string())
                )
            } else if to > size - start {
                format!(
                    "its data (offset {from}, {} bytes) reaches beyond the end of the file of {size} bytes, whose data \
                     starts at {start}: the download is not complete or the header is damaged",
                    to - from
                )
            } else {
                tensor.range = start + from..start + to;
                expected = to.checked_next_multiple_of(alignment);
                continue;
            };
            return Err(Error::Tensor { path: self.path().into(), tensor: tensor.name.clone(), reason });
        }
        // llama.cpp allows this, so it is no reason to refuse the file; a wrong type of the last tensor looks like this too.
        let behind = expected.map_or(0, |end| (size - start).saturating_sub(end));
        if behind > 0 {
            tracing::warn!("{}: {behind} bytes behind the last tensor belong to none", self.path().display());
        }
        Ok(())
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
            path: self.path().into(),
            tensor: self.stored_name(name),
            reason: "is missing from the file".to_string(),
        })?;
        let bytes = TensorBytes::File { file: &self.file, range: tensor.range.clone() };
        Ok(StoredTensor { meta: tensor.meta.clone(), bytes })
    }

    fn mapped(&self, name: &str) -> Result<Option<MappedTensor>> {
        let mapped = |tensor: &TensorInfo| Ok(MappedTensor { file: self.file.map()?, range: tensor.range.clone() });
        self.find(name).map(mapped).transpose()
    }

    fn names(&self) -> Vec<String> {
        self.tensors.iter().filter_map(|tensor| self.names.to_canonical(&tensor.name)).collect()
    }

    fn stored_name(&self, name: &str) -> String {
        self.names.to_file(name).unwrap_or_else(|| name.to_string())
    }

    fn path_of(&self, _name: &str) -> &Path {
        self.path()
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

/// GGML's types in the order of their ids. An id is never given to a second type.
const GGML_TYPES: &str = "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS \
                          IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 \
                          Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 IQ4_NL_8_8 MXFP4 NVFP4 Q1_0 Q2_0";

fn ggml_type_name(type_id: u32) -> Option<&'static str> {
    GGML_TYPES.split(' ').nth(type_id as usize)
}

fn weight_type(type_id: u32) -> Option<WeightType> {
    let name = ggml_type_name(type_id)?;
    WeightType::ALL.into_iter().find(|dtype| dtype.name() == name)
}

fn unsupported_type(path: &Path, tensor: &str, type_id: u32) -> Error {
    let name = ggml_type_name(type_id).unwrap_or("unknown");
    let supported = WeightType::ALL.map(WeightType::name).join(", ");
    Error::Unsupported {
        what: "tensor type",
        value: format!("{name} (id {type_id}) of tensor `{}` in {}", shorten(tensor), path.display()),
        hint: format!("supported are {supported}: convert the original model again to one of them"),
    }
}

/// The type of a metadata value, in the order of the format's ids.
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
            Some(count) => format!("an array of {count} {:?}", self.kind),
            None => format!("{:?}", self.kind),
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
        format!("{kind:?} {}", self.shown())
    }

    fn shown(self) -> String {
        match self {
            Scalar::Int(value) => value.to_string(),
            // As short as it can be written in the type that it was stored in.
            Scalar::Float(value) if f64::from(value as f32) == value => (value as f32).to_string(),
            Scalar::Float(value) => value.to_string(),
            Scalar::Bool(value) => value.to_string(),
            Scalar::Str(bytes) => format!("\"{}\"", bytes[..bytes.len().min(40)].escape_ascii()),
        }
    }
}

/// Reads the whole header: where metadata values lie, and the tensors with ranges within the data section.
fn read_header(reader: &mut Reader<'_>) -> Result<(BTreeMap<String, Value>, Vec<TensorInfo>)> {
    read_version(reader)?;
    let tensor_count = reader.u64(format_args!("the tensor count"))?;
    let metadata_count = reader.u64(format_args!("the metadata count"))?;
    // A key's length, one value type and one byte; a tensor's two lengths, dimension, type and offset.
    reader.check_count(metadata_count, 8 + 4 + 1, format_args!("the metadata count"))?;
    let metadata = read_metadata(reader, metadata_count)?;
    reader.check_count(tensor_count, 8 + 4 + 8 + 4 + 8, format_args!("the tensor count"))?;
    let tensors = read_tensors(reader, tensor_count)?;
    Ok((metadata, tensors))
}

fn read_version(reader: &mut Reader<'_>) -> Result<()> {
    let path = reader.path;
    let magic = reader.take(4, format_args!("the magic"))?;
    if magic != b"GGUF" {
        return Err(Error::file(path, "is not a GGUF file: it does not start with `GGUF`"));
    }
    let version = reader.u32(format_args!("the version"))?;
    match version {
        2 | 3 => Ok(()),
        1 => Err(Error::file(path, "is GGUF version 1; versions 2 and 3 are read: convert the model again")),
        _ if matches!(version.swap_bytes(), 1..=3) => Err(Error::file(path, "is big endian: convert the model again")),
        _ => Err(Error::file(path, format!("is GGUF version {version}; versions 2 and 3 are read"))),
    }
}

fn read_metadata(reader: &mut Reader<'_>, count: u64) -> Result<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = reader.name(format_args!("metadata key {index} of {count}"))?;
        let value = reader.value(&key)?;
        if metadata.contains_key(&key) {
            return Err(Error::file(reader.path, format!("metadata key `{}` appears twice", shorten(&key))));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

/// Reads the tensors' entries, with ranges within the data section.
fn read_tensors(reader: &mut Reader<'_>, count: u64) -> Result<Vec<TensorInfo>> {
    let path = reader.path;
    let mut names = HashSet::new();
    let mut tensors = Vec::new();
    let mut unsupported = None;
    for index in 0..count {
        let name = reader.name(format_args!("the name of tensor {index} of {count}"))?;
        let refused = |reason: String| Err(Error::Tensor { path: path.into(), tensor: name.clone(), reason });
        if !names.insert(name.clone()) {
            return refused("appears twice".to_string());
        }
        let shown = shorten(&name);
        let what = format_args!("the entry of tensor `{shown}`");
        let dimensions = reader.u32(what)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return refused(format!("has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(usize::try_from(reader.u64(what)?).unwrap_or(usize::MAX));
        }
        let row = shape[0];
        shape.reverse();
        let type_id = reader.u32(what)?;
        let offset = usize::try_from(reader.u64(what)?).unwrap_or(usize::MAX);
        let Some(dtype) = weight_type(type_id) else {
            // Said once the other entries are known to be sound: damage also looks like this.
            unsupported.get_or_insert_with(|| unsupported_type(path, &name, type_id));
            continue;
        };
        if shape.contains(&0) {
            return refused(format!("shape {shape:?} has a dimension of zero"));
        }
        if !row.is_multiple_of(dtype.block_size()) {
            return refused(format!("rows of {row} are no whole number of {dtype} blocks of {}", dtype.block_size()));
        }
        let bytes = shape.iter().try_fold(1usize, |all, &dim| all.checked_mul(dim)).and_then(|n| dtype.bytes_for(n));
        let Some(end) = bytes.and_then(|bytes| offset.checked_add(bytes)) else {
            return refused(format!("shape {shape:?} of {dtype} at offset {offset} is impossibly large"));
        };
        tensors.push(TensorInfo { name, meta: TensorMeta { dtype, shape }, range: offset..end });
    }
    unsupported.map_or(Ok(tensors), Err)
}

/// Reads little endian values from the file's first bytes. `what` says in errors what was being read.
struct Reader<'a> {
    path: &'a Path,
    /// The file's first bytes.
    bytes: &'a [u8],
    file_len: usize,
    at: usize,
    /// Whether reading has failed for want of bytes that the file has.
    is_short: bool,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: u64, what: fmt::Arguments<'_>) -> Result<&'a [u8]> {
        let end = usize::try_from(count).ok().and_then(|count| self.at.checked_add(count));
        let Some(end) = end.filter(|&end| end <= self.file_len) else {
            let left = self.file_len - self.at;
            return Err(
                self.damaged(format_args!("{what} takes {count} bytes at byte {}, where {left} are left", self.at))
            );
        };
        let Some(taken) = self.bytes.get(self.at..end) else {
            self.is_short = true;
            return Err(self.damaged(format_args!("{what} lies beyond the bytes read")));
        };
        self.at = end;
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
        match std::str::from_utf8(bytes) {
            Ok("") => Err(self.damaged(format_args!("{what} is empty"))),
            Ok(text) => Ok(text.to_string()),
            Err(_) => Err(self.damaged(format_args!("{what} is not UTF-8"))),
        }
    }

    fn kind(&mut self, what: fmt::Arguments<'_>) -> Result<Kind> {
        let id = self.u32(what)?;
        Kind::from_id(id).ok_or_else(|| self.damaged(format_args!("{what} has the unknown value type {id}")))
    }

    /// Walks over a metadata value and keeps where it is.
    fn value(&mut self, key: &str) -> Result<Value> {
        let key = shorten(key);
        let what = format_args!("metadata `{key}`");
        let kind = self.kind(what)?;
        if kind != Kind::Array {
            let at = self.at;
            self.scalar(kind, what)?;
            return Ok(Value { kind, count: None, at });
        }
        let kind = self.kind(what)?;
        let count = self.u64(what)?;
        self.check_count(count, kind.min_bytes(), format_args!("the array length of {what}"))?;
        let at = self.at;
        match kind {
            Kind::Str => {
                for _ in 0..count {
                    self.string(what)?;
                }
            }
            // GGML's own reader refuses these too.
            Kind::Array => return Err(self.damaged(format_args!("{what} is an array of arrays"))),
            _ => {
                self.take(count * kind.min_bytes(), what)?; // does not overflow: the check found room for it
            }
        }
        Ok(Value { kind, count: Some(count as usize), at }) // lossless: no more than the bytes of the file
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
        let room = (self.file_len - self.at) as u64 / min_bytes;
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
