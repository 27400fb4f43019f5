//! Maps with the order of insertion and Python's keys: `1`, `1.0` and `True` are the same one.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};

use super::{ELEMENT, Object, Value, equal};
use crate::error::{Error, Result};
use crate::limits::{self, Charge};

/// A map that does not change any more.
pub(crate) struct Dict {
    entries: Vec<(Value, Value)>,
    index: Option<Index>,
    /// Levels of containers below, itself included.
    pub(crate) depth: usize,
    _charge: Charge,
}

/// Positions by the hash of their key; small maps are searched without.
struct Index {
    hasher: RandomState,
    positions: HashMap<u64, Vec<u32>>,
}

const SMALL: usize = 8;

/// A key that was found to be hashable.
struct Key<'v>(&'v Value);

impl<'v> Key<'v> {
    fn new(value: &'v Value) -> Result<Self> {
        match is_hashable(value) {
            true => Ok(Self(value)),
            false => Err(Error::runtime(format!("unhashable type: '{}'", value.type_name()))),
        }
    }
}

/// Whether Python would take a value as a key.
pub(crate) fn is_hashable(value: &Value) -> bool {
    match value {
        Value::List(_) | Value::Dict(_) => false,
        Value::Tuple(items) => items.values.iter().all(is_hashable),
        Value::Object(object) => !matches!(object, Object::View(_)),
        _ => true,
    }
}

impl Hash for Key<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self.0 {
            Value::None => 1u8.hash(state),
            Value::Bool(value) => i128::from(*value).hash(state),
            Value::Int(value) => value.hash(state),
            Value::Float(value) if value.fract() == 0.0 && value.abs() < 1e38 => (*value as i128).hash(state),
            Value::Float(value) => value.to_bits().hash(state),
            Value::Str(text) => text.hash(state),
            Value::Bytes(bytes) => bytes.hash(state),
            Value::Tuple(items) => items.values.iter().for_each(|item| Key(item).hash(state)),
            // All undefined values are equal, and of other objects there are few.
            _ => 2u8.hash(state),
        }
    }
}

/// Puts a map together; a key that comes again keeps its place and gets the new value.
struct Maker {
    entries: Vec<(Value, Value)>,
    index: Option<Index>,
}

impl Maker {
    fn find(&self, key: &Value) -> Result<Option<usize>> {
        find(&self.entries, self.index.as_ref(), key)
    }

    fn insert(&mut self, key: Value, value: Value) -> Result<()> {
        if let Some(at) = self.find(&key)? {
            self.entries[at].1 = value;
            return Ok(());
        }
        limits::step(1)?;
        if let Some(index) = &mut self.index {
            let hash = index.hasher.hash_one(Key::new(&key)?);
            index.positions.entry(hash).or_default().push(self.entries.len() as u32);
        }
        self.entries.push((key, value));
        if self.index.is_none() && self.entries.len() > SMALL {
            let mut index = Index { hasher: RandomState::new(), positions: HashMap::new() };
            for (at, (key, _)) in self.entries.iter().enumerate() {
                let hash = index.hasher.hash_one(Key::new(key)?);
                index.positions.entry(hash).or_default().push(at as u32);
            }
            self.index = Some(index);
        }
        Ok(())
    }
}

fn find(entries: &[(Value, Value)], index: Option<&Index>, key: &Value) -> Result<Option<usize>> {
    let hashable = Key::new(key)?;
    let Some(index) = index else {
        for (at, (other, _)) in entries.iter().enumerate() {
            if equal(other, key)? {
                return Ok(Some(at));
            }
        }
        return Ok(None);
    };
    for &at in index.positions.get(&index.hasher.hash_one(hashable)).map_or(&[][..], Vec::as_slice) {
        if equal(&entries[at as usize].0, key)? {
            return Ok(Some(at as usize));
        }
    }
    Ok(None)
}

impl Dict {
    pub(crate) fn new(entries: Vec<(Value, Value)>) -> Result<Self> {
        Self::make(entries, true)
    }

    /// A map that came from the caller.
    pub(crate) fn free(entries: Vec<(Value, Value)>) -> Result<Self> {
        Self::make(entries, false)
    }

    fn make(entries: Vec<(Value, Value)>, charge: bool) -> Result<Self> {
        limits::check_elements(entries.len(), if charge { 2 * ELEMENT } else { 0 })?;
        let mut maker = Maker { entries: Vec::with_capacity(entries.len()), index: None };
        for (key, value) in entries {
            maker.insert(key, value)?;
        }
        let Maker { entries, index } = maker;
        let depth = 1 + entries.iter().map(|(key, value)| key.depth().max(value.depth())).max().unwrap_or(0);
        limits::check_value_depth(depth)?;
        let each = 2 * ELEMENT + if index.is_some() { 120 } else { 0 };
        let charge = if charge { Charge::new(entries.capacity() * each + 96)? } else { Charge::FREE };
        Ok(Self { entries, index, depth, _charge: charge })
    }

    pub(crate) fn get(&self, key: &Value) -> Result<Option<&Value>> {
        Ok(find(&self.entries, self.index.as_ref(), key)?.map(|at| &self.entries[at].1))
    }

    pub(crate) fn get_str(&self, key: &str) -> Option<&Value> {
        if self.index.is_none() {
            let is_key = |other: &Value| other.as_str() == Some(key);
            return self.entries.iter().find(|(other, _)| is_key(other)).map(|(_, value)| value);
        }
        self.get(&Value::Str(super::Text::free(key))).ok().flatten()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }
}
