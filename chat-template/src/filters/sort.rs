//! Filters that compare elements.

use super::{ignore_case, path_of};
use crate::arguments::CallArgs;
use crate::error::{Error, Result};
use crate::eval::Evaluator;
use crate::limits;
use crate::value::{ELEMENT, Value, collect, equal, is_hashable, iterate, python_less};

/// Positions of the keys in ascending order, or in descending order with equal ones still in theirs. Python's `<` can
/// fail, so this is a merge sort of its own.
pub(super) fn stable_sort(keys: Vec<Value>, reverse: bool) -> Result<Vec<usize>> {
    limits::check_elements(keys.len(), 2 * size_of::<usize>())?;
    let mut order: Vec<usize> = (0..keys.len()).collect();
    let mut spare = order.clone();
    let mut width = 1;
    while width < keys.len() {
        for start in (0..keys.len()).step_by(2 * width) {
            let middle = (start + width).min(keys.len());
            let end = (start + 2 * width).min(keys.len());
            let (mut left, mut right) = (start, middle);
            for place in &mut spare[start..end] {
                let take_right = left == middle
                    || right < end && {
                        let (a, b) = (&keys[order[left]], &keys[order[right]]);
                        if reverse { python_less(a, b)? } else { python_less(b, a)? }
                    };
                let from = if take_right { &mut right } else { &mut left };
                *place = order[*from];
                *from += 1;
            }
        }
        std::mem::swap(&mut order, &mut spare);
        width *= 2;
    }
    Ok(order)
}

fn flag(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.truth())
}

impl Evaluator<'_> {
    pub(super) fn filter_sorted(&mut self, name: &str, input: &Value, arguments: CallArgs) -> Result<Value> {
        match name {
            "sort" => {
                let [reverse, case, attribute] = arguments.bind(name, ["reverse", "case_sensitive", "attribute"], 0)?;
                let paths = match attribute.unwrap_or(Value::None) {
                    Value::Str(text) => {
                        text.split(',').map(|path| path_of(&Value::str(path)?)).collect::<Result<Vec<_>>>()?
                    }
                    other => vec![path_of(&other)?],
                };
                let values = collect(input)?;
                let case = flag(case);
                let mut keys = Vec::with_capacity(values.len());
                for value in &values {
                    let mut parts = Vec::with_capacity(paths.len());
                    for path in &paths {
                        let part = self.path(value, path, None)?;
                        parts.push(if case { part } else { ignore_case(part)? });
                    }
                    keys.push(Value::list(parts)?);
                }
                let order = stable_sort(keys, flag(reverse))?;
                Value::list(order.into_iter().map(|at| values[at].clone()).collect())
            }
            "dictsort" => {
                let [case, by, reverse] = arguments.bind(name, ["case_sensitive", "by", "reverse"], 0)?;
                let by_value = match by.as_ref().and_then(Value::as_str).unwrap_or("key") {
                    "key" => false,
                    "value" => true,
                    _ => return Err(Error::runtime("you can only sort by either \"key\" or \"value\"")),
                };
                input.check_defined()?;
                let Value::Dict(dict) = input else {
                    return Err(Error::runtime(format!("dictsort needs a mapping, not {}", input.type_name())));
                };
                let case = flag(case);
                let mut keys = Vec::with_capacity(dict.len());
                for (key, value) in dict.entries() {
                    let key = if by_value { value } else { key }.clone();
                    keys.push(if case { key } else { ignore_case(key)? });
                }
                let order = stable_sort(keys, flag(reverse))?;
                let pair = |at: usize| {
                    let (key, value) = &dict.entries()[at];
                    Value::tuple(vec![key.clone(), value.clone()])
                };
                Value::list(order.into_iter().map(pair).collect::<Result<_>>()?)
            }
            "max" | "min" => {
                let [case, attribute] = arguments.bind(name, ["case_sensitive", "attribute"], 0)?;
                let path = path_of(&attribute.unwrap_or(Value::None))?;
                let case = flag(case);
                let mut best: Option<(Value, Value)> = None;
                let mut items = iterate(input)?;
                while let Some(item) = items.next()? {
                    let key = self.path(&item, &path, None)?;
                    let key = if case { key } else { ignore_case(key)? };
                    let better = match &best {
                        None => true,
                        Some((_, other)) if name == "max" => python_less(other, &key)?,
                        Some((_, other)) => python_less(&key, other)?,
                    };
                    if better {
                        best = Some((item, key));
                    }
                }
                Ok(best.map_or_else(|| Value::hint("no aggregated item, the sequence was empty"), |(item, _)| item))
            }
            "unique" => {
                let [case, attribute] = arguments.bind(name, ["case_sensitive", "attribute"], 0)?;
                let path = path_of(&attribute.unwrap_or(Value::None))?;
                let case = flag(case);
                let mut entries = Vec::new();
                let mut items = iterate(input)?;
                while let Some(item) = items.next()? {
                    let key = self.path(&item, &path, None)?;
                    let key = if case { key } else { ignore_case(key)? };
                    if !is_hashable(&key) {
                        return Err(Error::runtime(format!("unhashable type: '{}'", key.type_name())));
                    }
                    limits::check_elements(entries.len(), 3 * ELEMENT)?;
                    entries.push((key, item));
                }
                // A map keeps the place of the first of equal keys and the value of the last.
                let places = entries.iter().enumerate().rev();
                let places = places.map(|(at, (key, _))| (key.clone(), Value::Int(at as i128))).collect();
                let Value::Dict(places) = Value::dict(places)? else { return Ok(Value::None) };
                let mut firsts: Vec<i128> = places.entries().iter().filter_map(|(_, at)| at.as_int()).collect();
                firsts.sort_unstable();
                let unique = firsts.into_iter().map(|at| entries[at as usize].1.clone()).collect();
                Value::generator(unique, "sync_do_unique")
            }
            _ => self.group_by(input, arguments),
        }
    }

    fn group_by(&mut self, input: &Value, arguments: CallArgs) -> Result<Value> {
        let [attribute, default, case] = arguments.bind("groupby", ["attribute", "default", "case_sensitive"], 1)?;
        let path = path_of(&attribute.unwrap_or(Value::None))?;
        let default = default.filter(|default| !default.is_none());
        let case = flag(case);
        let values = collect(input)?;
        let (mut keys, mut groupers) = (Vec::new(), Vec::new());
        for value in &values {
            let grouper = self.path(value, &path, default.as_ref())?;
            keys.push(if case { grouper.clone() } else { ignore_case(grouper.clone())? });
            groupers.push(grouper);
        }
        let order = stable_sort(keys.clone(), false)?;
        let mut groups: Vec<(usize, Vec<Value>)> = Vec::new();
        for at in order {
            match groups.last_mut() {
                Some((first, members)) if equal(&keys[*first], &keys[at])? => members.push(values[at].clone()),
                _ => groups.push((at, vec![values[at].clone()])),
            }
        }
        let group = |(first, members): (usize, Vec<Value>)| {
            Value::named_tuple(&["grouper", "list"], vec![groupers[first].clone(), Value::list(members)?])
        };
        Value::list(groups.into_iter().map(group).collect::<Result<_>>()?)
    }
}
