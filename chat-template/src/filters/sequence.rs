//! Filters of lists and the like.

use std::hash::{BuildHasher, RandomState};

use super::path_of;
use crate::arguments::CallArgs;
use crate::ast::Binary;
use crate::error::{Error, ErrorKind, Result};
use crate::eval::{Evaluator, binary};
use crate::limits;
use crate::value::{Builder, ELEMENT, Lazy, Object, Value, collect, display_into, iterate, length};

pub(super) fn filter(name: &str, input: &Value, arguments: CallArgs) -> Result<Value> {
    match name {
        "batch" => {
            let [count, fill] = arguments.bind(name, ["linecount", "fill_with"], 1)?;
            lazily("do_batch", || batch(input, &count.unwrap_or(Value::None), fill.unwrap_or(Value::None)))
        }
        "slice" => {
            let [slices, fill] = arguments.bind(name, ["slices", "fill_with"], 1)?;
            lazily("sync_do_slice", || slice(input, &slices.unwrap_or(Value::None), fill.unwrap_or(Value::None)))
        }
        name => {
            let [] = arguments.positional(name, 0)?;
            match name {
                "first" => {
                    let first = iterate(input)?.next()?;
                    Ok(first.unwrap_or_else(|| Value::hint("no first item, the sequence was empty")))
                }
                "last" => {
                    let Some(values) = reversed(input)? else {
                        return Err(Error::runtime(format!("'{}' object is not reversible", input.type_name())));
                    };
                    let last = values.into_iter().next();
                    Ok(last.unwrap_or_else(|| Value::hint("no last item, the sequence was empty")))
                }
                "list" => Value::list(collect(input)?),
                "items" => match input {
                    Value::Undefined(_) => Value::generator(Vec::new(), "do_items"),
                    Value::Dict(dict) => lazily("do_items", || {
                        let pairs = dict.entries().iter();
                        Ok((pairs.map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()])).collect::<Result<_>>()?, None))
                    }),
                    _ => lazily("do_items", || Err(Error::runtime("can only get item pairs from a mapping"))),
                },
                "random" => {
                    let is_mapping = matches!(input, Value::Dict(_) | Value::Object(Object::View(_)));
                    let Some(length) = length(input)?.filter(|_| !is_mapping) else {
                        return Err(Error::runtime(format!("cannot choose from '{}'", input.type_name())));
                    };
                    if length == 0 {
                        return Ok(Value::hint("no random item, the sequence was empty"));
                    }
                    let at = RandomState::new().hash_one(0) as usize % length;
                    Ok(collect(input)?.swap_remove(at))
                }
                _ => match input {
                    Value::Str(text) => {
                        limits::scan(text.len())?;
                        limits::check_text(text.len())?;
                        Value::str(text.chars().rev().collect::<String>())?.marked_like(text)
                    }
                    other => match reversed(other)? {
                        Some(values) => {
                            let is_list = matches!(other, Value::List(_));
                            Value::generator(values, if is_list { "list_reverseiterator" } else { "reversed" })
                        }
                        None => {
                            let mut values =
                                collect(other).map_err(|_| Error::runtime("the argument must be iterable"))?;
                            values.reverse();
                            Value::list(values)
                        }
                    },
                },
            }
        }
    }
}

/// Elements from the last to the first; `None` for what Python cannot reverse.
fn reversed(input: &Value) -> Result<Option<Vec<Value>>> {
    match input {
        Value::Object(Object::Range(_) | Object::View(_)) => {}
        Value::Object(_) | Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => return Ok(None),
        _ => {}
    }
    let mut values = collect(input)?;
    values.reverse();
    Ok(Some(values))
}

type Partial = (Vec<Value>, Option<Error>);

/// A generator whose values are made now, and whose error comes when it is used. Limits count at once.
fn lazily(kind: &'static str, make: impl FnOnce() -> Result<Partial>) -> Result<Value> {
    let (values, error) = match make() {
        Ok(made) => made,
        Err(error) if error.kind() == ErrorKind::Limit => return Err(error),
        Err(error) => (Vec::new(), Some(error)),
    };
    match error {
        Some(error) if error.kind() == ErrorKind::Limit => Err(error),
        error => Ok(Value::Object(Object::Lazy(Lazy::new(values, error, kind)?))),
    }
}

fn batch(input: &Value, count: &Value, fill: Value) -> Result<Partial> {
    let mut batches = Vec::new();
    let mut current: Vec<Value> = Vec::new();
    let mut items = iterate(input)?;
    let size = count.as_int();
    while let Some(item) = items.next()? {
        if Some(current.len() as i128) == size {
            batches.push(Value::list(std::mem::take(&mut current))?);
        }
        current.push(item);
    }
    if !current.is_empty() {
        if !fill.is_none() {
            let size = usize::try_from(count.need_int()?).unwrap_or(0);
            limits::check_elements(size, ELEMENT)?;
            limits::step(size / 4)?;
            while current.len() < size {
                current.push(fill.clone());
            }
        }
        batches.push(Value::list(current)?);
    }
    Ok((batches, None))
}

fn slice(input: &Value, slices: &Value, fill: Value) -> Result<Partial> {
    let values = collect(input)?;
    let slices = slices.need_int()?;
    if slices == 0 {
        return Err(Error::runtime("integer division or modulo by zero"));
    }
    let slices = usize::try_from(slices.max(0)).unwrap_or(usize::MAX);
    limits::check_elements(slices, ELEMENT + 64)?;
    let (each, extra) = (values.len() / slices.max(1), values.len() % slices.max(1));
    let mut columns = Vec::new();
    let mut start = 0;
    for number in 0..slices {
        let end = start + each + usize::from(number < extra);
        let mut column = values[start..end].to_vec();
        if !fill.is_none() && number >= extra {
            column.push(fill.clone());
        }
        limits::step(1)?;
        columns.push(Value::list(column)?);
        start = end;
    }
    Ok((columns, None))
}

impl Evaluator<'_> {
    /// Filters that look at every element with a filter, a test or an attribute.
    pub(super) fn filter_each(&mut self, name: &str, input: &Value, arguments: CallArgs) -> Result<Value> {
        match name {
            "join" => {
                let [separator, attribute] = arguments.bind(name, ["d", "attribute"], 0)?;
                let path = path_of(&attribute.unwrap_or(Value::None))?;
                let separator = separator.map_or_else(|| Value::str(""), Ok)?;
                let mut out = Builder::new();
                let mut items = iterate(input)?;
                let mut first = true;
                while let Some(item) = items.next()? {
                    if !first {
                        display_into(&mut out, &separator)?;
                    }
                    first = false;
                    display_into(&mut out, &self.path(&item, &path, None)?)?;
                }
                Ok(Value::Str(out.into_text()?))
            }
            "sum" => {
                let [attribute, start] = arguments.bind(name, ["attribute", "start"], 0)?;
                let path = path_of(&attribute.unwrap_or(Value::None))?;
                let mut total = start.unwrap_or(Value::Int(0));
                if matches!(total, Value::Str(_)) {
                    return Err(Error::runtime("sum() can't sum strings [use ''.join(seq) instead]"));
                }
                let mut items = iterate(input)?;
                while let Some(item) = items.next()? {
                    total = binary(Binary::Add, &total, &self.path(&item, &path, None)?)?;
                }
                Ok(total)
            }
            "map" => self.each("sync_do_map", input, |this, items, out| this.map(items, arguments, out)),
            _ => {
                let by_attribute = name.ends_with("attr");
                let wanted = name.starts_with("select");
                let kind = if wanted { "sync_do_select" } else { "sync_do_reject" };
                self.each(kind, input, |this, items, out| this.select(items, arguments, by_attribute, wanted, out))
            }
        }
    }

    /// A generator over the elements of a value; one that is false has none, whatever it is.
    fn each(
        &mut self,
        kind: &'static str,
        input: &Value,
        run: impl FnOnce(&mut Self, &Value, &mut Vec<Value>) -> Result<()>,
    ) -> Result<Value> {
        let mut values = Vec::new();
        let result = if input.truth() { self.deeper(|this| run(this, input, &mut values)) } else { Ok(()) };
        lazily(kind, || Ok((values, result.err())))
    }

    fn map(&mut self, input: &Value, arguments: CallArgs, out: &mut Vec<Value>) -> Result<()> {
        let CallArgs { mut positional, mut keywords } = arguments;
        let attribute = keywords.iter().position(|(name, _)| **name == *"attribute");
        if let (true, Some(at)) = (positional.is_empty(), attribute) {
            let path = path_of(&keywords.remove(at).1)?;
            let default = keywords.iter().position(|(name, _)| **name == *"default").map(|at| keywords.remove(at).1);
            let default = default.filter(|default| !default.is_none());
            if let Some((name, _)) = keywords.first() {
                let name = crate::error::excerpt(name);
                return Err(Error::runtime(format!("unexpected keyword argument '{name}'")));
            }
            let mut items = iterate(input)?;
            while let Some(item) = items.next()? {
                let value = self.path(&item, &path, default.as_ref())?;
                push(out, value)?;
            }
            return Ok(());
        }
        if positional.is_empty() {
            return Err(Error::runtime("map requires a filter argument"));
        }
        let name = positional.remove(0).need_text()?.clone();
        let mut items = iterate(input)?;
        while let Some(item) = items.next()? {
            let arguments = CallArgs { positional: positional.clone(), keywords: keywords.clone() };
            let value = self.filter(&name, item, arguments)?;
            push(out, value)?;
        }
        Ok(())
    }

    fn select(
        &mut self,
        input: &Value,
        arguments: CallArgs,
        by_attribute: bool,
        wanted: bool,
        out: &mut Vec<Value>,
    ) -> Result<()> {
        let CallArgs { mut positional, keywords } = arguments;
        let mut path = Vec::new();
        if by_attribute {
            if positional.is_empty() {
                return Err(Error::runtime("missing parameter for attribute name"));
            }
            path = path_of(&positional.remove(0))?;
        }
        let test = if positional.is_empty() { None } else { Some(positional.remove(0).need_text()?.clone()) };
        let mut items = iterate(input)?;
        while let Some(item) = items.next()? {
            let value = self.path(&item, &path, None)?;
            let holds = match &test {
                Some(test) => {
                    let arguments = CallArgs { positional: positional.clone(), keywords: keywords.clone() };
                    self.check(test, &value, arguments)?
                }
                None => value.truth(),
            };
            if holds == wanted {
                push(out, item)?;
            }
        }
        Ok(())
    }
}

fn push(out: &mut Vec<Value>, value: Value) -> Result<()> {
    out.push(value);
    if out.len().is_power_of_two() {
        limits::check_elements(out.len() * 2, ELEMENT)?;
    }
    Ok(())
}
