//! Translating canonical tensor names to a file's own and back.

/// The names of one kind of file, as pairs of (canonical, the file's).
#[derive(Debug, Default)]
pub(super) struct NameMap {
    /// Whole names of the tensors outside the layers.
    pub(super) model: Vec<(&'static str, String)>,
    /// What stands before the index of a layer in the file: `blk.`, `model.layers.`.
    pub(super) layer_prefix: String,
    /// Modules within a layer, without the layer in front and `.weight` or `.bias` behind.
    pub(super) layer: Vec<(&'static str, &'static str)>,
}

impl NameMap {
    /// The file's name of a canonical tensor; `None` when such a file has no name for it.
    pub(super) fn to_file(&self, canonical: &str) -> Option<String> {
        if let Some((_, file)) = self.model.iter().find(|(name, _)| *name == canonical) {
            return Some(file.clone());
        }
        let (index, module, ending) = layer_parts(canonical, "layers.")?;
        let (_, module) = self.layer.iter().find(|(name, _)| *name == module)?;
        Some(format!("{}{index}.{module}.{ending}", self.layer_prefix))
    }

    /// The canonical name of one of the file's tensors; `None` when the decoder has no use for it.
    pub(super) fn to_canonical(&self, file: &str) -> Option<String> {
        if let Some((canonical, _)) = self.model.iter().find(|(_, name)| name == file) {
            return Some((*canonical).to_string());
        }
        let (index, module, ending) = layer_parts(file, &self.layer_prefix)?;
        let (module, _) = self.layer.iter().find(|(_, name)| *name == module)?;
        Some(format!("layers.{index}.{module}.{ending}"))
    }
}

/// Splits `{prefix}{index}.{module}.{weight or bias}`.
fn layer_parts<'a>(name: &'a str, prefix: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let (index, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    let (module, ending) = rest.rsplit_once('.')?;
    let is_index = !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit());
    (is_index && matches!(ending, "weight" | "bias")).then_some((index, module, ending))
}
