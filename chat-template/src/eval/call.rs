//! Calls of macros, functions, methods, filters and tests.

use std::cell::Cell;
use std::rc::Rc;

use super::{Evaluator, Kept};
use crate::arguments::CallArgs;
use crate::ast::Place;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{self, Charge};
use crate::methods;
use crate::strftime::strftime_now;
use crate::value::{
    Cycler, ELEMENT, Global, Joiner, MacroValue, Namespace, Object, Range, Text, Value, collect, display, iterate,
    length,
};

/// Longest range that the sandbox of Jinja makes.
const LONGEST_RANGE: usize = 100_000;

impl Evaluator<'_> {
    pub(crate) fn call(&mut self, callee: &Value, arguments: CallArgs) -> Result<Value> {
        limits::step(1)?;
        callee.check_defined()?;
        match callee {
            Value::Object(Object::Macro(value)) => self.deeper(|this| this.call_macro(value, arguments)),
            Value::Object(Object::Method(method)) => {
                if let Value::Object(Object::Loop(state)) = &method.receiver {
                    return self.loop_method(state, method.name, arguments);
                }
                methods::call(&method.receiver, method.name, arguments, self)
            }
            Value::Object(Object::Global(global)) => self.call_global(*global, arguments),
            Value::Object(Object::Loop(state)) => self.loop_call(state, arguments),
            Value::Object(Object::Joiner(joiner)) => {
                arguments.positional::<0>("joiner", 0)?;
                Ok(if joiner.used.replace(true) { joiner.separator.clone() } else { Value::str("")? })
            }
            Value::Object(Object::Block(block)) => {
                arguments.positional::<0>("block", 0)?;
                let Some(block) = self.tree.blocks.get(&block.0) else { return Ok(Value::None) };
                let text = self.deeper(|this| this.capture(|this| this.run_block(block)))?;
                Ok(Value::Str(text))
            }
            other => Err(Error::runtime(format!("'{}' object is not callable", other.type_name()))),
        }
    }

    fn call_macro(&mut self, value: &Rc<MacroValue>, arguments: CallArgs) -> Result<Value> {
        let function = &value.function;
        let name = function.name.as_deref().unwrap_or("caller");
        let CallArgs { mut positional, mut keywords } = arguments;
        let rest = positional.split_off(positional.len().min(function.parameters.len()));
        let given = positional.len();

        let frame = self.enter(&function.scoped.slots, Some(&value.frame))?;
        let set = |slot: u32, value: Value| frame.set(Place { up: 0, slot }, value);
        for (parameter, value) in function.parameters.iter().zip(positional) {
            set(parameter.slot, value);
        }
        let mut missing = Vec::new();
        for parameter in function.parameters.iter().skip(given) {
            match keywords.iter().position(|(name, _)| **name == *parameter.name) {
                Some(at) => set(parameter.slot, keywords.remove(at).1),
                None => missing.push(parameter),
            }
        }
        let explicit = function.parameters.iter().any(|parameter| *parameter.name == *"caller");
        if let (Some(slot), false) = (function.caller, explicit) {
            let caller = keywords.iter().position(|(name, _)| **name == *"caller").map(|at| keywords.remove(at).1);
            let caller = caller.filter(|caller| !caller.is_none());
            set(slot, caller.unwrap_or_else(|| Value::hint("no caller defined")));
        }
        match (function.kwargs, keywords.first()) {
            (Some(slot), _) => {
                let entries = keywords.into_iter().map(|(name, value)| (Value::Str(name), value)).collect();
                set(slot, Value::dict(entries)?);
            }
            (None, Some((keyword, _))) => {
                let keyword = crate::error::excerpt(keyword);
                return Err(Error::runtime(format!("macro '{name}' takes no keyword argument '{keyword}'")));
            }
            (None, None) => {}
        }
        if let Some(slot) = function.varargs {
            set(slot, Value::tuple(rest)?);
        } else if !rest.is_empty() {
            let most = function.parameters.len();
            return Err(Error::runtime(format!("macro '{name}' takes not more than {most} argument(s)")));
        }
        for parameter in missing {
            let value = match &parameter.default {
                Some(default) => self.eval(default, &frame)?,
                None => Value::hint(format!("parameter '{}' was not provided", parameter.name)),
            };
            frame.set(Place { up: 0, slot: parameter.slot }, value);
        }
        let text: Text = self.capture(|this| this.run(&function.scoped.body, &frame).map(drop))?;
        Ok(Value::Str(text))
    }

    fn call_global(&mut self, global: Global, arguments: CallArgs) -> Result<Value> {
        match global {
            Global::Range => {
                let [a, b, step] = arguments.positional("range", 1)?;
                let int = |value: Option<Value>| value.map(|value| value.need_int()).transpose();
                let (a, b, step) = (int(a)?.unwrap_or(0), int(b)?, int(step)?.unwrap_or(1));
                if step == 0 {
                    return Err(Error::runtime("range() arg 3 must not be zero"));
                }
                let range = match b {
                    Some(stop) => Range { start: a, stop, step },
                    None => Range { start: 0, stop: a, step },
                };
                if range.len() > LONGEST_RANGE {
                    return Err(Error::runtime(format!("a range of more than {LONGEST_RANGE} elements")));
                }
                Ok(Value::Object(Object::Range(range)))
            }
            Global::Dict => dict(arguments),
            Global::Lipsum => Err(Error::runtime("lipsum is not supported")),
            Global::Cycler => {
                let [] = CallArgs { positional: Vec::new(), keywords: arguments.keywords }.positional("cycler", 0)?;
                let items = arguments.positional;
                if items.is_empty() {
                    return Err(Error::runtime("at least one item has to be provided"));
                }
                let depth = 1 + items.iter().map(Value::depth).max().unwrap_or(0);
                limits::check_value_depth(depth)?;
                let charge = Charge::new(64 + items.len() * ELEMENT)?;
                let cycler = Cycler { items, position: Cell::new(0), depth, _charge: charge };
                Ok(Value::Object(Object::Cycler(Rc::new(cycler))))
            }
            Global::Joiner => {
                let [separator] = arguments.bind("joiner", ["sep"], 0)?;
                let separator = separator.map_or_else(|| Value::str(", "), Ok)?;
                limits::check_value_depth(separator.depth() + 1)?;
                Ok(Value::Object(Object::Joiner(Rc::new(Joiner { separator, used: Cell::new(false) }))))
            }
            Global::Namespace => {
                let Value::Dict(attributes) = dict(arguments)? else { return Ok(Value::None) };
                let mut entries = Vec::with_capacity(attributes.len());
                for (name, value) in attributes.entries() {
                    // A name that is no text can be given in a map, and never be asked for.
                    if let Value::Str(name) = name {
                        entries.push((name.clone(), value.clone()));
                    }
                }
                let namespace = Namespace::new(entries)?;
                self.kept.push(Kept::Namespace(namespace.clone()));
                Ok(Value::Object(Object::Namespace(namespace)))
            }
            Global::RaiseException => {
                let [message] = arguments.bind("raise_exception", ["message"], 1)?;
                let message = display(&message.unwrap_or(Value::None))?;
                let message: String = message.chars().take(2000).collect();
                Err(Error::new(ErrorKind::Raised, message))
            }
            Global::StrftimeNow => {
                let [format] = arguments.bind("strftime_now", ["format"], 1)?;
                let format = format.unwrap_or(Value::None);
                Value::str(strftime_now(format.need_text()?)?)
            }
        }
    }
}

/// Python's `dict`: from a map or pairs, and keyword arguments.
pub(crate) fn dict(arguments: CallArgs) -> Result<Value> {
    let CallArgs { positional, keywords } = arguments;
    let mut positional = positional.into_iter();
    let mut entries = Vec::new();
    match positional.next() {
        None => {}
        Some(undefined @ Value::Undefined(_)) => undefined.check_defined()?,
        Some(Value::Dict(dict)) => entries.extend_from_slice(dict.entries()),
        Some(pairs) => {
            let mut pairs = iterate(&pairs)?;
            while let Some(pair) = pairs.next()? {
                if let Some(found) = length(&pair)?.filter(|&found| found != 2) {
                    let at = entries.len();
                    let message = format!("dictionary update sequence element #{at} has length {found}; 2 is required");
                    return Err(Error::runtime(message));
                }
                match <[Value; 2]>::try_from(collect(&pair)?) {
                    Ok([key, value]) => entries.push((key, value)),
                    Err(_) => return Err(Error::runtime("dictionary update sequence elements need length 2")),
                }
                limits::check_elements(entries.len(), 2 * ELEMENT)?;
            }
        }
    }
    if positional.next().is_some() {
        return Err(Error::runtime("dict expected at most 1 argument"));
    }
    entries.extend(keywords.into_iter().map(|(name, value)| (Value::Str(name), value)));
    Value::dict(entries)
}
