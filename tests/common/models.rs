//! Models whose files can be made to lie.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value as Meta};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use serde_json::Value;
use tempfile::TempDir;

/// A copy of a fixture whose files can be made to lie.
pub struct Model(TempDir);

impl Model {
    pub fn of(fixture: &str) -> Model {
        let model = Model(tempfile::tempdir().unwrap());
        for name in ["config.json", "generation_config.json", "model.safetensors"] {
            std::fs::copy(super::fixture("families").join(fixture).join(name), model.path(name)).unwrap();
        }
        model
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    pub fn config(&self) -> Value {
        serde_json::from_reader(File::open(self.path("config.json")).unwrap()).unwrap()
    }

    /// Writes the value into the config, or takes the field out.
    pub fn set(&self, pointer: &str, value: Option<Value>) {
        let mut config = self.config();
        set(&mut config, pointer, value);
        self.write("config.json", config.to_string());
    }

    /// Rewrites the tensors.
    pub fn change(&self, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
        let path = self.path("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, path).unwrap();
    }
}

/// Sets the field that a JSON pointer points to, or takes it out, where the object around it is there.
pub fn set(config: &mut Value, pointer: &str, value: Option<Value>) {
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    match (config.pointer_mut(parent), value) {
        (Some(Value::Object(fields)), Some(value)) => drop(fields.insert(field.to_string(), value)),
        (Some(Value::Object(fields)), None) => drop(fields.remove(field)),
        _ => {}
    }
}

/// A fixture's GGUF file with other metadata and tensors.
pub fn gguf(
    fixture: &str,
    change: impl FnOnce(&mut HashMap<String, Meta>, &mut HashMap<String, QTensor>),
) -> (TempDir, PathBuf) {
    let mut file = File::open(super::fixture("families").join(fixture).join("model-f32.gguf")).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let names = content.tensor_infos.keys();
    let mut tensors: HashMap<String, QTensor> =
        names.map(|name| (name.clone(), content.tensor(&mut file, name, &Device::Cpu).unwrap())).collect();
    let mut metadata = content.metadata;
    change(&mut metadata, &mut tensors);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lying.gguf");
    let metadata: Vec<(&str, &Meta)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(&path).unwrap(), &metadata, &tensors).unwrap();
    (folder, path)
}

/// A tensor of the given values.
pub fn vector(values: &[f32]) -> QTensor {
    QTensor::quantize(&Tensor::new(values, &Device::Cpu).unwrap(), GgmlDType::F32).unwrap()
}
