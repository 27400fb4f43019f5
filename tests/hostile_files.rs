//! Model files that are damaged or lie: each is refused with an error that names the file and the field or tensor, or
//! read as far as it makes sense. None makes the reader panic or allocate what the file does not hold.

// The counting allocator below hands every call on to the system's.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::{Path, PathBuf};

use candle_pipeline::error::{Error, Result};
use candle_pipeline::weights::gguf::GgufFile;
use candle_pipeline::weights::safetensors::{HfNames, SafetensorsDir};
use candle_pipeline::weights::{WeightSource, WeightType};
use proptest::prelude::*;

struct Counting;

thread_local! {
    /// Bytes that this thread has allocated, whether or not they were freed since.
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: Every call goes to the system's allocator unchanged; counting touches a thread-local cell that needs no
// allocation of its own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATED.try_with(|bytes| bytes.set(bytes.get().saturating_add(layout.size())));
        // SAFETY: the caller's obligations are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's obligations are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Far above what the small files here need, far below what their lies claim.
const MOST_BYTES: usize = 4 << 20;

/// Runs `read` and checks what it allocates.
fn bounded<T>(read: impl FnOnce() -> T) -> T {
    let before = ALLOCATED.get();
    let result = read();
    let allocated = ALLOCATED.get() - before;
    assert!(allocated < MOST_BYTES, "{allocated} bytes were allocated for a small file");
    result
}

/// Checks that the result is an error whose message contains the path and every one of `words`.
fn assert_refused<T>(result: Result<T>, path: &Path, words: &[&str]) {
    let error = result.err().unwrap_or_else(|| panic!("{words:?}: {} was accepted", path.display()));
    let message = error.to_string();
    for word in words.iter().copied().chain(path.to_str()) {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

// ---- GGUF -----------------------------------------------------------------------------------------------------------

const U8: u32 = 0;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;

/// What a GGUF file is written from. Every field can be made to lie.
#[derive(Clone)]
struct Gguf {
    magic: [u8; 4],
    version: u32,
    metadata_count: Option<u64>,
    tensor_count: Option<u64>,
    /// Key, value type and the value's bytes.
    metadata: Vec<(Vec<u8>, u32, Vec<u8>)>,
    tensors: Vec<GgufTensor>,
    alignment: usize,
    data: Vec<u8>,
}

#[derive(Clone)]
struct GgufTensor {
    name: String,
    dims: Vec<u64>,
    type_id: u32,
    offset: u64,
}

fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

fn array(kind: u32, count: u64, elements: Vec<u8>) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), &elements].concat()
}

impl Gguf {
    /// A sound file with metadata of several types and three tensors.
    fn sound() -> Gguf {
        let tokens = [string("a"), string("bc"), string("")].concat();
        let mut file = Gguf {
            magic: *b"GGUF",
            version: 3,
            metadata_count: None,
            tensor_count: None,
            metadata: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
            data: (0..32 + 1088 + 256).map(|byte| byte as u8).collect(),
        };
        file.set("general.architecture", STRING, string("llama"));
        file.set("llama.block_count", U32, 2u32.to_le_bytes().to_vec());
        file.set("llama.rope.freq_base", F32, 1e4f32.to_le_bytes().to_vec());
        file.set("llama.flag", BOOL, vec![1]);
        file.set("llama.negative", I32, (-5i32).to_le_bytes().to_vec());
        file.set("llama.attention.head_count_kv", ARRAY, array(U8, 2, vec![4, 8]));
        file.set("tokenizer.ggml.tokens", ARRAY, array(STRING, 3, tokens));
        file.tensor("output_norm.weight", &[8], 0, 0);
        file.tensor("blk.1.attn_q.weight", &[32, 32], 8, 32);
        file.tensor("token_embd.weight", &[16, 8], 1, 32 + 1088);
        file
    }

    fn set(&mut self, key: &str, kind: u32, value: Vec<u8>) {
        self.metadata.retain(|(known, _, _)| known != key.as_bytes());
        self.metadata.push((key.as_bytes().to_vec(), kind, value));
    }

    fn tensor(&mut self, name: &str, dims: &[u64], type_id: u32, offset: u64) {
        self.tensors.push(GgufTensor { name: name.to_string(), dims: dims.to_vec(), type_id, offset });
    }

    fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.metadata_count.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            for dim in &tensor.dims {
                out.extend(dim.to_le_bytes());
            }
            out.extend(tensor.type_id.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        out
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.data);
        out
    }
}

/// A folder for one test, removed after it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// Opens the file and asks it for everything that it claims to have.
fn read_all_of_gguf(path: &Path) -> Result<()> {
    let file = GgufFile::open(path)?;
    for key in file.metadata_keys() {
        // Each is an answer or an error that names the key.
        for error in [
            file.get_u64(key).err(),
            file.get_f64(key).err(),
            file.get_bool(key).err(),
            file.get_str(key).err(),
            file.get_u64_or_array(key).err(),
            file.get_f64_array(key).err(),
            file.get_str_array(key).err(),
        ]
        .into_iter()
        .flatten()
        {
            // Long keys are shortened, and what a terminal would act on is escaped.
            let plain = key.len() < 80 && key.chars().all(|character| (' '..='~').contains(&character));
            assert!(!plain || error.to_string().contains(key), "{error}");
        }
    }
    let _ = file.architecture();
    read_all(&file);
    assert!(file.tensor_infos().all(|(_, meta)| meta.bytes() > 0));
    Ok(())
}

fn read_all(source: &dyn WeightSource) {
    for name in source.names() {
        let Ok(tensor) = source.tensor(&name) else { continue };
        assert_eq!(source.meta(&name).unwrap().as_ref(), Some(&tensor.meta));
        assert_eq!(tensor.bytes.len() as u64, tensor.meta.bytes());
        std::hint::black_box(tensor.bytes.read().unwrap().iter().fold(0u8, |all, byte| all ^ byte));
    }
}

fn assert_gguf_refused(file: &Gguf, words: &[&str]) {
    let folder = Folder::new();
    let path = folder.write("lying.gguf", file.bytes());
    assert_refused(bounded(|| GgufFile::open(&path)), &path, words);
}

#[test]
fn a_sound_gguf_file_reads() {
    let folder = Folder::new();
    for version in [2, 3] {
        let written = Gguf { version, ..Gguf::sound() };
        let path = folder.write("sound.gguf", written.bytes());
        bounded(|| read_all_of_gguf(&path)).unwrap();
        let file = GgufFile::open(&path).unwrap();
        assert_eq!(file.architecture().unwrap(), "llama");
        assert_eq!(file.get_u64("llama.block_count").unwrap(), Some(2));
        assert_eq!(file.get_u64("llama.absent").unwrap(), None);
        assert_eq!(file.get_f64("llama.rope.freq_base").unwrap(), Some(1e4));
        assert_eq!(file.get_f64("llama.negative").unwrap(), Some(-5.0));
        assert_eq!(file.get_bool("llama.flag").unwrap(), Some(true));
        assert_eq!(file.get_u64_or_array("llama.block_count").unwrap(), Some(vec![2]));
        assert_eq!(file.get_u64_or_array("llama.attention.head_count_kv").unwrap(), Some(vec![4, 8]));
        assert_eq!(file.get_f64_array("llama.attention.head_count_kv").unwrap(), Some(vec![4.0, 8.0]));
        assert_eq!(file.get_str_array("tokenizer.ggml.tokens").unwrap(), Some(vec!["a", "bc", ""]));

        let mut names = file.names();
        names.sort();
        assert_eq!(names, ["embed_tokens.weight", "layers.1.q_proj.weight", "norm.weight"]);
        let embed = file.tensor("embed_tokens.weight").unwrap();
        assert_eq!((embed.meta.dtype, &embed.meta.shape[..]), (WeightType::F16, &[8, 16][..]));
        assert_eq!(*embed.bytes.read().unwrap(), written.data[32 + 1088..]);
        assert_eq!(file.meta("layers.1.q_proj.weight").unwrap().unwrap().dtype, WeightType::Q8_0);
        assert_eq!(file.meta("lm_head.weight").unwrap(), None);
        assert_refused(file.tensor("layers.0.q_proj.weight").map(drop), &path, &["`blk.0.attn_q.weight`", "missing"]);
    }
}

#[test]
fn what_candle_writes_as_gguf_reads() {
    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
    use candle_core::{Device, Tensor};
    let values = Tensor::arange(0f32, 512.0, &Device::Cpu).unwrap().reshape((2, 256)).unwrap();
    let quantised = [("output.weight", GgmlDType::Q6K), ("blk.0.ffn_down.weight", GgmlDType::Q5_1)]
        .map(|(name, dtype)| (name, QTensor::quantize(&values, dtype).unwrap()));
    let tensors: Vec<(&str, &QTensor)> = quantised.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let epsilon = gguf_file::Value::F32(1e-5);
    let merges = gguf_file::Value::Array(vec![gguf_file::Value::String("a b".to_string()); 2]);
    let metadata = [("llama.epsilon", &epsilon), ("tokenizer.ggml.merges", &merges)];
    let folder = Folder::new();
    let path = folder.path().join("candle.gguf");
    gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &metadata, &tensors).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.get_f64("llama.epsilon").unwrap(), Some(f64::from(1e-5f32)));
    assert_eq!(file.get_str_array("tokenizer.ggml.merges").unwrap(), Some(vec!["a b", "a b"]));
    for (name, (_, written)) in ["lm_head.weight", "layers.0.down_proj.weight"].iter().zip(&quantised) {
        let read = file.tensor(name).unwrap();
        assert_eq!((read.meta.dtype.ggml(), &read.meta.shape[..]), (written.dtype(), &[2, 256][..]));
        assert_eq!(*read.bytes.read().unwrap(), written.data().unwrap()[..]);
    }
}

#[test]
fn the_alignment_of_a_gguf_file_moves_its_data() {
    let mut written = Gguf { alignment: 128, ..Gguf::sound() };
    written.set("general.alignment", U32, 128u32.to_le_bytes().to_vec());
    written.tensors.truncate(1);
    let folder = Folder::new();
    let path = folder.write("aligned.gguf", written.bytes());
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(*file.tensor("norm.weight").unwrap().bytes.read().unwrap(), written.data[..32]);
}

#[test]
fn a_gguf_file_truncated_anywhere_is_refused_by_name() {
    let folder = Folder::new();
    let whole = Gguf::sound().bytes();
    for length in 0..whole.len() {
        let path = folder.write("truncated.gguf", &whole[..length]);
        assert_refused(bounded(|| GgufFile::open(&path)), &path, &[]);
    }
}

#[test]
fn a_gguf_file_of_another_kind_is_refused_by_name() {
    let with = |magic: &[u8; 4], version| Gguf { magic: *magic, version, ..Gguf::sound() };
    assert_gguf_refused(&with(b"tjgg", 3), &["not a GGUF file"]);
    assert_gguf_refused(&with(b"GGUF", 1), &["version 1", "versions 2 and 3"]);
    assert_gguf_refused(&with(b"GGUF", 4), &["version 4"]);
    assert_gguf_refused(&with(b"GGUF", 3u32.swap_bytes()), &["big endian"]);
    let mut split = Gguf::sound();
    split.set("split.count", 2, 3u16.to_le_bytes().to_vec());
    assert_gguf_refused(&split, &["split GGUF file", "3 parts", "llama-gguf-split --merge"]);
}

#[test]
fn gguf_counts_and_lengths_that_lie_fail_at_once() {
    for huge in [1 << 40, 1 << 60, u64::MAX] {
        let count = huge.to_string();
        assert_gguf_refused(&Gguf { tensor_count: Some(huge), ..Gguf::sound() }, &["the tensor count", &count]);
        assert_gguf_refused(&Gguf { metadata_count: Some(huge), ..Gguf::sound() }, &["the metadata count", &count]);
        for kind in [U8, U64, STRING] {
            let mut file = Gguf::sound();
            file.set("llama.list", ARRAY, array(kind, huge, vec![1; 16]));
            assert_gguf_refused(&file, &["the array length of metadata `llama.list`", &count]);
        }
        let mut file = Gguf::sound();
        file.set("llama.text", STRING, huge.to_le_bytes().to_vec());
        assert_gguf_refused(&file, &["metadata `llama.text`", &count]);
        let mut file = Gguf::sound();
        file.set("llama.texts", ARRAY, array(STRING, 2, huge.to_le_bytes().repeat(2)));
        assert_gguf_refused(&file, &["metadata `llama.texts`", &count]);
    }
    assert_gguf_refused(&Gguf { tensor_count: Some(4), ..Gguf::sound() }, &["tensor 3 of 4"]);
}

#[test]
fn gguf_metadata_that_lies_is_refused_by_key() {
    let refused = |key: &str, kind: u32, value: &[u8], words: &[&str]| {
        let mut file = Gguf::sound();
        file.set(key, kind, value.to_vec());
        assert_gguf_refused(&file, words);
    };
    refused("llama.odd", 13, &[0; 8], &["metadata `llama.odd`", "value type 13"]);
    refused("llama.odd", ARRAY, &array(13, 1, vec![0; 8]), &["metadata `llama.odd`", "value type 13"]);
    let inner = array(ARRAY, 1, array(ARRAY, 1, array(U8, 1, vec![0])));
    refused("llama.nested", ARRAY, &inner, &["metadata `llama.nested`", "array of arrays"]);
    for alignment in [0u64, 3, 48, u64::MAX] {
        let words = ["`general.alignment`", &alignment.to_string(), "power of two"];
        refused("general.alignment", U64, &alignment.to_le_bytes(), &words);
    }
    refused("general.alignment", U64, &(1u64 << 63).to_le_bytes(), &["tensor `output_norm.weight`", "beyond the end"]);
    refused("general.alignment", F32, &1f32.to_le_bytes(), &["`general.alignment`", "F32 1"]);
    refused("general.architecture", U32, &[0; 4], &["`general.architecture`", "string"]);
    refused("split.count", BOOL, &[1], &["`split.count`"]);

    let mut twice = Gguf::sound();
    twice.metadata.push(twice.metadata[1].clone());
    assert_gguf_refused(&twice, &["`llama.block_count`", "twice"]);
    let mut not_text = Gguf::sound();
    not_text.metadata[2].0 = vec![0xff, 0xfe];
    assert_gguf_refused(&not_text, &["metadata key 2 of 7", "UTF-8"]);
}

#[test]
fn gguf_metadata_of_another_type_is_an_error_that_says_what_it_is() {
    let mut written = Gguf::sound();
    written.set("llama.bad_flag", BOOL, vec![2]);
    written.set("llama.bad_text", STRING, string([b'x', 0xff]));
    written.set("llama.bad_texts", ARRAY, array(STRING, 2, [string("fine"), string([0xff])].concat()));
    written.metadata.retain(|(key, _, _)| key != b"general.architecture");
    let folder = Folder::new();
    let path = folder.write("types.gguf", written.bytes());
    let file = GgufFile::open(&path).unwrap();
    assert_refused(file.get_u64("llama.negative"), &path, &["`llama.negative`", "non-negative integer", "I32 -5"]);
    assert_refused(file.get_u64("llama.rope.freq_base"), &path, &["`llama.rope.freq_base`", "F32 10000"]);
    assert_refused(file.get_f64("llama.flag"), &path, &["`llama.flag`", "a number", "Bool 1"]);
    assert_refused(file.get_bool("llama.bad_flag"), &path, &["`llama.bad_flag`", "Bool 2"]);
    assert_refused(file.get_str("llama.bad_text"), &path, &["`llama.bad_text`", "UTF-8", r#""x\xff""#]);
    let words = ["`llama.attention.head_count_kv`", "an array of 2 U8"];
    assert_refused(file.get_u64("llama.attention.head_count_kv"), &path, &words);
    assert_refused(file.get_str_array("llama.bad_texts"), &path, &["`llama.bad_texts`", "index 1"]);
    assert_refused(file.get_str_array("llama.flag"), &path, &["`llama.flag`", "array of UTF-8 strings", "Bool"]);
    assert_refused(file.architecture(), &path, &["`general.architecture`", "missing"]);
}

#[test]
fn gguf_tensors_that_lie_are_refused_by_name() {
    let refused = |change: &dyn Fn(&mut GgufTensor), words: &[&str]| {
        let mut file = Gguf::sound();
        change(&mut file.tensors[1]);
        assert_gguf_refused(&file, &[words, &["`blk.1.attn_q.weight`"]].concat());
    };
    refused(&|tensor| tensor.dims = vec![32, 0], &["dimension of zero"]);
    refused(&|tensor| tensor.dims = vec![], &["0 dimensions"]);
    refused(&|tensor| tensor.dims = vec![1; 5], &["5 dimensions"]);
    refused(&|tensor| tensor.dims = vec![33, 32], &["rows of 33", "Q8_0 blocks of 32"]);
    refused(&|tensor| tensor.dims = vec![1 << 32, 1 << 32], &["impossibly large"]);
    refused(&|tensor| tensor.dims = vec![u64::MAX - 31], &["impossibly large"]);
    refused(&|tensor| tensor.dims = vec![1 << 60], &["beyond the end of the file"]);
    refused(&|tensor| tensor.dims = vec![32, 1 << 20], &["beyond the end of the file"]);
    refused(&|tensor| tensor.offset = u64::MAX - 31, &["impossibly large"]);
    for offset in [0, 33, 64, 1 << 62] {
        refused(&|tensor| tensor.offset = offset, &[&format!("offset {offset},"), "aligned to 32", "at 32"]);
    }

    let mut twice = Gguf::sound();
    twice.tensors[2].name = "output_norm.weight".to_string();
    assert_gguf_refused(&twice, &["`output_norm.weight`", "twice"]);
}

#[test]
fn a_gguf_tensor_of_another_type_or_place_than_its_data_is_refused() {
    // Q8_0 takes 34 bytes for 32 numbers, Q4_0 18 and Q5_1 24: what comes behind lies elsewhere then.
    for type_id in [2, 7] {
        let mut file = Gguf::sound();
        file.tensors[1].type_id = type_id;
        assert_gguf_refused(&file, &["`token_embd.weight`", "offset 1120", "type or shape"]);
    }
    // A larger type at the end reaches beyond the file.
    let mut file = Gguf::sound();
    file.tensors[2].type_id = 0;
    assert_gguf_refused(&file, &["`token_embd.weight`", "beyond the end of the file"]);
    // A gap, and entries in another order than their data: llama.cpp refuses both.
    let mut file = Gguf::sound();
    file.tensors[2].offset += 32;
    file.data.extend([0; 32]);
    assert_gguf_refused(&file, &["`token_embd.weight`", "offset 1152", "at 1120"]);
    let mut file = Gguf::sound();
    file.tensors.swap(0, 1);
    assert_gguf_refused(&file, &["`blk.1.attn_q.weight`", "offset 32", "at 0"]);
    // Padding behind the last tensor may be missing, and more than that may be there.
    let folder = Folder::new();
    for bytes in [0, 8, 1000] {
        let mut file = Gguf::sound();
        file.data.extend(vec![0; bytes]);
        bounded(|| read_all_of_gguf(&folder.write("longer.gguf", file.bytes()))).unwrap();
    }
}

#[test]
fn the_demo_models_tensors_lie_as_ggml_demands() {
    for name in ["demo-q8_0.gguf", "demo-q4_0.gguf"] {
        let path = Path::new(candle_pipeline::DEMO_MODEL).join(name);
        assert!(GgufFile::open(&path).unwrap().tensor_infos().count() > 70);
    }
}

#[test]
fn gguf_tensor_types_that_are_not_supported_are_refused_with_their_names() {
    for (type_id, name) in [(23, "IQ4_XS"), (15, "Q8_K"), (28, "F64"), (39, "MXFP4"), (40, "NVFP4"), (777, "unknown")] {
        let mut file = Gguf::sound();
        file.tensors[2].type_id = type_id;
        let name = format!("`{name} (id {type_id}) of tensor `token_embd.weight`");
        assert_gguf_refused(&file, &["unsupported tensor type", &name, "Q4_K, Q5_K, Q6_K"]);
    }
}

// ---- safetensors ----------------------------------------------------------------------------------------------------

const LLAMA: HfNames = HfNames {
    attn_norm: Some("input_layernorm"),
    attn_post_norm: None,
    mlp_norm: Some("post_attention_layernorm"),
    mlp_post_norm: None,
};

const SOUND_HEADER: &str = r#"{
    "__metadata__": {"format": "pt"},
    "model.embed_tokens.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]},
    "model.layers.0.self_attn.q_proj.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]},
    "model.layers.0.self_attn.inv_freq": {"dtype": "I64", "shape": [2], "data_offsets": [32, 48]}
}"#;

fn safetensors(header: &str, data_bytes: usize) -> Vec<u8> {
    let data = (0..data_bytes).map(|byte| byte as u8);
    (header.len() as u64).to_le_bytes().into_iter().chain(header.bytes()).chain(data).collect()
}

fn read_all_of_folder(folder: &Path) -> Result<()> {
    read_all(&SafetensorsDir::open(folder, &LLAMA)?);
    Ok(())
}

fn assert_safetensors_refused(bytes: &[u8], words: &[&str]) {
    let folder = Folder::new();
    let path = folder.write("model.safetensors", bytes);
    assert_refused(bounded(|| SafetensorsDir::open(folder.path(), &LLAMA)), &path, words);
}

#[test]
fn a_sound_safetensors_file_reads() {
    let folder = Folder::new();
    let bytes = safetensors(SOUND_HEADER, 48);
    let path = folder.write("model.safetensors", &bytes);
    bounded(|| read_all_of_folder(folder.path())).unwrap();
    let files = SafetensorsDir::open(folder.path(), &LLAMA).unwrap();
    let query = files.tensor("layers.0.q_proj.weight").unwrap();
    assert_eq!((query.meta.dtype, &query.meta.shape[..]), (WeightType::F32, &[2, 2][..]));
    let data_start = bytes.len() - 48;
    assert_eq!(*query.bytes.read().unwrap(), bytes[data_start + 16..data_start + 32]);
    assert_eq!(files.path_of("layers.0.q_proj.weight"), path);
    assert_eq!(files.meta("lm_head.weight").unwrap(), None);
    let missing = files.tensor("layers.1.down_proj.weight").map(drop);
    assert_refused(missing, &path, &["`model.layers.1.mlp.down_proj.weight`", "missing"]);
}

#[test]
fn what_the_safetensors_crate_writes_reads() {
    let data = [1u8, 2, 3, 4, 5, 6, 7, 8];
    let view = |dtype, shape| safetensors::tensor::TensorView::new(dtype, shape, &data).unwrap();
    let tensors = [
        ("model.norm.weight", view(safetensors::Dtype::F16, vec![4])),
        ("lm_head.weight", view(safetensors::Dtype::F32, vec![2, 1])),
        ("model.embed_tokens.weight", view(safetensors::Dtype::U8, vec![8])),
    ];
    let folder = Folder::new();
    folder.write("model.safetensors", safetensors::serialize(tensors, None).unwrap());
    let files = SafetensorsDir::open(folder.path(), &LLAMA).unwrap();
    assert_eq!(*files.tensor("norm.weight").unwrap().bytes.read().unwrap(), data);
    assert_eq!(files.tensor("lm_head.weight").unwrap().meta.shape, [2, 1]);
    assert!(files.tensor("embed_tokens.weight").is_err());
}

#[test]
fn a_safetensors_file_truncated_anywhere_is_refused_by_name() {
    let folder = Folder::new();
    let whole = safetensors(SOUND_HEADER, 48);
    for length in 0..whole.len() {
        let path = folder.write("model.safetensors", &whole[..length]);
        assert_refused(bounded(|| SafetensorsDir::open(folder.path(), &LLAMA)), &path, &[]);
    }
    assert_safetensors_refused(&safetensors(SOUND_HEADER, 49), &["48 bytes of data", "there are 49"]);
}

#[test]
fn a_safetensors_header_that_lies_is_refused_by_field() {
    for length in [u64::MAX, 1 << 60, 1 << 32, 1000] {
        let mut bytes = safetensors(SOUND_HEADER, 48);
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        assert_safetensors_refused(&bytes, &["header length", &length.to_string()]);
    }
    let deep = format!(r#"{{"a": {}"#, "[".repeat(10_000));
    for header in ["", "[]", "{", "{\"a\": 1}", r#"{"a": {"dtype": "F32", "shape": [1]}}"#, &deep] {
        assert_safetensors_refused(&safetensors(header, 4), &["the header does not parse"]);
    }
    let mut not_text = safetensors(SOUND_HEADER, 48);
    not_text[20] = 0xff;
    assert_safetensors_refused(&not_text, &["the header does not parse"]);
}

#[test]
fn safetensors_tensors_that_lie_are_refused_by_name() {
    let entry = |name: &str, dtype: &str, shape: &str, start: u64, end: u64| {
        format!(r#""{name}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {end}]}}"#)
    };
    let refused = |second: String, words: &[&str]| {
        let header = format!("{{{}, {second}}}", entry("first", "F32", "[2]", 0, 8));
        assert_safetensors_refused(&safetensors(&header, 16), &[words, &["`second`"]].concat());
    };
    refused(entry("second", "F32", "[2]", 4, 12), &["[4, 12]", "overlap"]);
    refused(entry("second", "F32", "[1]", 12, 16), &["[12, 16]", "gap"]);
    refused(entry("second", "F32", "[2]", 8, 4), &["[8, 4]", "overlap"]);
    refused(entry("second", "F32", "[4]", 8, 24), &["[8, 24]", "16 bytes of data"]);
    refused(entry("second", "U8", "[9]", 8, u64::MAX), &["data_offsets", "16 bytes of data"]);
    refused(entry("second", "F32", "[3]", 8, 16), &["shape [3] of F32", "8 bytes"]);
    refused(entry("second", "BF16", "[2]", 8, 16), &["shape [2] of BF16", "8 bytes"]);
    refused(entry("second", "F32", "[4294967296, 4294967296]", 8, 16), &["shape", "8 bytes"]);
    refused(entry("second", "F32", "[4611686018427387905]", 8, 16), &["shape", "8 bytes"]);
    // Eight tensors whose sizes add up to nearly 2^64.
    let part = (1u64 << 61) - 1;
    let all: Vec<_> =
        (0..8).map(|i| entry(&format!("t{i}"), "U8", &format!("[{part}]"), i * part, (i + 1) * part)).collect();
    assert_safetensors_refused(&safetensors(&format!("{{{}}}", all.join(",")), 16), &["`t0`", "16 bytes of data"]);
}

#[test]
fn a_safetensors_type_that_is_not_supported_matters_when_it_is_asked_for() {
    for dtype in ["F8_E4M3", "I64", "U8", "F4_OF_TOMORROW"] {
        let folder = Folder::new();
        let header = SOUND_HEADER.replace("BF16", dtype);
        let path = folder.write("model.safetensors", safetensors(&header, 48));
        let files = SafetensorsDir::open(folder.path(), &LLAMA).unwrap();
        assert!(files.tensor("layers.0.q_proj.weight").is_ok());
        for result in [files.meta("embed_tokens.weight").map(drop), files.tensor("embed_tokens.weight").map(drop)] {
            assert!(matches!(result, Err(Error::Unsupported { what: "tensor type", .. })));
            assert_refused(result, &path, &[dtype, "`model.embed_tokens.weight`", "F32, F16 and BF16"]);
        }
    }
}

const FIRST_SHARD: &str = r#"{"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#;
const SECOND_SHARD: &str = r#"{"lm_head.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}"#;
const INDEX: &str = r#"{"metadata": {"total_size": 12}, "weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}"#;

fn sharded() -> Folder {
    let folder = Folder::new();
    folder.write("a.safetensors", safetensors(FIRST_SHARD, 4));
    folder.write("b.safetensors", safetensors(SECOND_SHARD, 8));
    folder.write("model.safetensors.index.json", INDEX);
    folder
}

#[test]
fn a_sharded_folder_reads() {
    let folder = sharded();
    bounded(|| read_all_of_folder(folder.path())).unwrap();
    let files = SafetensorsDir::open(folder.path(), &LLAMA).unwrap();
    assert_eq!(files.path_of("lm_head.weight"), folder.path().join("b.safetensors"));
    assert_eq!(files.path_of("embed_tokens.weight"), folder.path().join("model.safetensors.index.json"));
    assert_eq!(*files.tensor("lm_head.weight").unwrap().bytes.read().unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn an_index_that_reaches_out_of_its_folder_is_refused() {
    let outside = Folder::new();
    let target = outside.write("b.safetensors", safetensors(SECOND_SHARD, 8));
    let target = target.to_str().unwrap();
    for file in
        [target, "../b.safetensors", "..", ".", "", "sub/b.safetensors", "./b.safetensors", "sub\\b.safetensors"]
    {
        let folder = sharded();
        let index = INDEX.replace("b.safetensors", &file.replace('\\', "\\\\"));
        let path = folder.write("model.safetensors.index.json", index);
        let words = ["`lm_head.weight`", "weight_map", &format!("`{file}`")];
        assert_refused(SafetensorsDir::open(folder.path(), &LLAMA), &path, &words);
    }
}

#[test]
fn an_index_and_its_shards_have_to_agree() {
    let folder = sharded();
    let shard = folder.path().join("b.safetensors");
    std::fs::remove_file(&shard).unwrap();
    assert_refused(SafetensorsDir::open(folder.path(), &LLAMA), &shard, &["cannot be read"]);
    // What the index promises is missed when it is asked for.
    folder.write("b.safetensors", safetensors(FIRST_SHARD, 4));
    let files = SafetensorsDir::open(folder.path(), &LLAMA).unwrap();
    let words = ["`lm_head.weight`", "index.json", "missing"];
    assert_refused(files.tensor("lm_head.weight").map(drop), folder.path(), &words);
    // Of a tensor that two files hold, the listed one counts.
    assert_eq!(files.path_of("norm.weight"), folder.path().join("a.safetensors"));
    let index =
        INDEX.replace("\"a.safetensors\"", "\"b.safetensors\"").replace("\"lm_head.weight\": \"b", "\"x\": \"a");
    folder.write("model.safetensors.index.json", index);
    let files = SafetensorsDir::open(folder.path(), &LLAMA).unwrap();
    assert_eq!(files.path_of("norm.weight"), folder.path().join("b.safetensors"));
    for index in ["", "{}", "[]", r#"{"weight_map": {}}"#, r#"{"weight_map": {"a": 1}}"#, "\u{0}"] {
        let path = folder.write("model.safetensors.index.json", index);
        assert_refused(bounded(|| SafetensorsDir::open(folder.path(), &LLAMA)), &path, &[]);
    }
}

#[test]
fn a_folder_without_usable_weights_says_what_it_has() {
    let folder = Folder::new();
    let refused = |words: &[&str]| assert_refused(SafetensorsDir::open(folder.path(), &LLAMA), folder.path(), words);
    refused(&["model.safetensors", "model.safetensors.index.json"]);
    folder.write("pytorch_model.bin", "x");
    refused(&["PyTorch", "convert the model to safetensors"]);
    folder.write("other.safetensors", safetensors(FIRST_SHARD, 4));
    assert!(SafetensorsDir::open(folder.path(), &LLAMA).is_ok());
    folder.write("another.safetensors", safetensors(SECOND_SHARD, 8));
    refused(&["2 safetensors files"]);
    assert_refused(SafetensorsDir::open(&folder.path().join("absent"), &LLAMA), folder.path(), &["cannot be read"]);
}

// ---- random damage --------------------------------------------------------------------------------------------------

/// One piece of damage to a file.
#[derive(Debug, Clone)]
enum Damage {
    Flip { at: prop::sample::Index, bits: u8 },
    Number { at: prop::sample::Index, value: u64 },
    Cut { at: prop::sample::Index },
    Remove { at: prop::sample::Index, count: usize },
    Repeat { at: prop::sample::Index, count: usize },
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    let number = prop_oneof![
        Just(0),
        Just(1),
        Just(u64::from(u32::MAX)),
        Just(1 << 60),
        Just(i64::MAX as u64),
        Just(u64::MAX),
        0..2000u64,
        any::<u64>(),
    ];
    prop_oneof![
        6 => (at(), 1..=255u8).prop_map(|(at, bits)| Damage::Flip { at, bits }),
        4 => (at(), number).prop_map(|(at, value)| Damage::Number { at, value }),
        1 => at().prop_map(|at| Damage::Cut { at }),
        1 => (at(), 1..40usize).prop_map(|(at, count)| Damage::Remove { at, count }),
        1 => (at(), 1..40usize).prop_map(|(at, count)| Damage::Repeat { at, count }),
    ]
}

/// Applies the damage within the first `header` bytes, where the lies matter.
fn damaged(mut bytes: Vec<u8>, header: usize, damage: &[Damage]) -> Vec<u8> {
    for piece in damage {
        let header = header.min(bytes.len());
        if header == 0 {
            break;
        }
        match piece {
            Damage::Flip { at, bits } => bytes[at.index(header)] ^= bits,
            Damage::Number { at, value } => {
                let at = at.index(header);
                let end = (at + 8).min(bytes.len());
                bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            }
            Damage::Cut { at } => bytes.truncate(at.index(header)),
            Damage::Remove { at, count } => {
                let at = at.index(header);
                bytes.drain(at..(at + count).min(header));
            }
            Damage::Repeat { at, count } => {
                let at = at.index(header);
                let piece = bytes[at..(at + count).min(header)].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
    bytes
}

/// Damaged files are read or refused with an error that names them; anything else fails the test by itself.
fn check(result: Result<()>, folder: &Path) {
    if let Err(error) = result {
        assert!(error.to_string().contains(folder.to_str().unwrap()), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_randomly_damaged_gguf_file_is_read_or_refused(pieces in prop::collection::vec(damage(), 1..6)) {
        let folder = Folder::new();
        let written = Gguf::sound();
        let path = folder.write("damaged.gguf", damaged(written.bytes(), written.header().len(), &pieces));
        check(bounded(|| read_all_of_gguf(&path)), folder.path());
    }

    #[test]
    fn a_randomly_damaged_safetensors_file_is_read_or_refused(pieces in prop::collection::vec(damage(), 1..6)) {
        let folder = Folder::new();
        let bytes = safetensors(SOUND_HEADER, 48);
        folder.write("model.safetensors", damaged(bytes, 8 + SOUND_HEADER.len(), &pieces));
        check(bounded(|| read_all_of_folder(folder.path())), folder.path());
    }

    #[test]
    fn a_randomly_damaged_index_is_read_or_refused(pieces in prop::collection::vec(damage(), 1..4)) {
        let folder = sharded();
        folder.write("model.safetensors.index.json", damaged(INDEX.as_bytes().to_vec(), INDEX.len(), &pieces));
        check(bounded(|| read_all_of_folder(folder.path())), folder.path());
    }
}
