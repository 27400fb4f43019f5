//! Fields of a JSON file, read one by one.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result, shorten};
use crate::files;

/// A JSON object with typed access; errors name the file and the field.
pub(super) struct Json {
    pub(super) path: PathBuf,
    pub(super) value: Value,
}

impl Json {
    pub(super) fn read(path: PathBuf) -> Result<Json> {
        let value = files::parse_json(&path, &files::read_bounded(&path, files::MAX_CONFIG_BYTES)?)?;
        Ok(Json { path, value })
    }

    /// One without fields, for what the file at `path` leaves out.
    pub(super) fn empty(path: &Path) -> Json {
        Json { path: path.into(), value: Value::Object(Default::default()) }
    }

    pub(super) fn missing(&self, field: &str) -> Error {
        Error::file(&self.path, format!("field `{field}` is missing"))
    }

    pub(super) fn wrong(&self, field: &str, value: &Value, wanted: &str) -> Error {
        Error::file(&self.path, format!("field `{field}` is {}, expected {wanted}", shorten(&value.to_string())))
    }

    pub(super) fn unsupported(&self, what: &'static str, value: &str, field: &str, supported: &str) -> Error {
        let hint = format!("`{field}` in {}; supported are {supported}", self.path.display());
        Error::Unsupported { what, value: shorten(value), hint }
    }

    /// The field's value; absent and null are `None`.
    pub(super) fn get<'a>(&'a self, field: &str) -> Option<&'a Value> {
        self.value.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn read_as<'a, T>(
        &'a self,
        field: &str,
        wanted: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| self.wrong(field, value, wanted)),
        }
    }

    pub(super) fn size(&self, field: &str) -> Result<Option<usize>> {
        self.read_as(field, "a whole number", |v| {
            v.as_u64()
                .or_else(|| v.as_f64().filter(|f| f.fract() == 0.0 && (0.0..1e15).contains(f)).map(|f| f as u64))
                .map(|n| n as usize)
        })
    }

    pub(super) fn number(&self, field: &str) -> Result<Option<f64>> {
        self.read_as(field, "a number", Value::as_f64)
    }

    /// A number that makes no sense at or below 0.
    pub(super) fn positive(&self, field: &str) -> Result<Option<f64>> {
        self.read_as(field, "a number above 0", |v| v.as_f64().filter(|&n| n > 0.0))
    }

    pub(super) fn flag(&self, field: &str) -> Result<Option<bool>> {
        self.read_as(field, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<String>> {
        self.read_as(field, "a text", |v| v.as_str().map(str::to_string))
    }

    pub(super) fn numbers(&self, field: &str) -> Result<Option<Vec<f32>>> {
        self.read_as(field, "a list of numbers", |v| {
            v.as_array()?.iter().map(|n| n.as_f64().map(|n| n as f32)).collect()
        })
    }

    /// A token id or a list of them. Ids that no vocabulary has stand for none in some files (-1, mostly) and are left out.
    pub(super) fn token_ids(&self, field: &str) -> Result<Option<Vec<u32>>> {
        let integers = |value: &Value| match value.as_array() {
            Some(ids) => ids.iter().map(integer).collect(),
            None => integer(value).map(|id| vec![id]),
        };
        let ids: Option<Vec<i128>> = self.read_as(field, "a token id or a list of them", integers)?;
        Ok(ids.map(|ids| self.possible_ids(field, ids)))
    }

    /// Lists of token ids, as [`token_ids`](Self::token_ids).
    pub(super) fn token_id_lists(&self, field: &str) -> Result<Vec<Vec<u32>>> {
        let lists: Option<Vec<Vec<i128>>> = self.read_as(field, "a list of lists of token ids", |value| {
            value.as_array()?.iter().map(|list| list.as_array()?.iter().map(integer).collect()).collect()
        })?;
        Ok(lists.unwrap_or_default().into_iter().map(|ids| self.possible_ids(field, ids)).collect())
    }

    fn possible_ids(&self, field: &str, ids: Vec<i128>) -> Vec<u32> {
        let possible: Vec<u32> = ids.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        if possible.len() < ids.len() {
            let path = self.path.display();
            tracing::warn!("{path}: `{field}` has token ids that no vocabulary can have; they are left out");
        }
        possible
    }

    /// A nested object with the same error messages.
    pub(super) fn object(&self, field: &str) -> Result<Option<Json>> {
        self.read_as(field, "an object", |v| v.as_object().map(|_| v.clone()))
            .map(|value| value.map(|value| Json { path: self.path.clone(), value }))
    }
}

fn integer(value: &Value) -> Option<i128> {
    value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from))
}
