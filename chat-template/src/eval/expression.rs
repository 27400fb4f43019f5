//! Evaluates expressions.

use std::rc::Rc;

use super::Evaluator;
use crate::arguments::CallArgs;
use crate::ast::{Arguments, Binary, Comparison, Expr, ExprKind, Literal, Unary};
use crate::error::{Error, Result};
use crate::format::percent;
use crate::limits;
use crate::value::{
    Builder, ELEMENT, Frame, Number, Object, Text, Undefined, Value, compare_order, contains, display_into, equal,
    iterate, number_binary,
};

impl Evaluator<'_> {
    pub(super) fn eval(&mut self, expr: &Expr, frame: &Rc<Frame>) -> Result<Value> {
        limits::step(1)?;
        match &expr.kind {
            ExprKind::Literal(literal) => Ok(match literal {
                Literal::None => Value::None,
                Literal::Bool(value) => Value::Bool(*value),
                Literal::Int(value) => Value::Int(*value),
                Literal::Float(value) => Value::Float(*value),
                Literal::Str(text) => Value::Str(text.clone()),
            }),
            ExprKind::Name { name, place } => Ok(match frame.get(*place) {
                Some(value) => value,
                None => Value::Undefined(Rc::new(Undefined::Name(name.clone()))),
            }),
            _ => self.deeper(|this| this.compound(expr, frame)).map_err(|error| error.at(expr.line)),
        }
    }

    fn eval_all(&mut self, items: &[Expr], frame: &Rc<Frame>) -> Result<Vec<Value>> {
        items.iter().map(|item| self.eval(item, frame)).collect()
    }

    fn compound(&mut self, expr: &Expr, frame: &Rc<Frame>) -> Result<Value> {
        match &expr.kind {
            ExprKind::Literal(_) | ExprKind::Name { .. } => self.eval(expr, frame),
            ExprKind::Tuple(items) => Value::tuple(self.eval_all(items, frame)?),
            ExprKind::List(items) => Value::list(self.eval_all(items, frame)?),
            ExprKind::Dict(entries) => {
                let mut values = Vec::with_capacity(entries.len());
                for (key, value) in entries {
                    values.push((self.eval(key, frame)?, self.eval(value, frame)?));
                }
                Value::dict(values)
            }
            ExprKind::Unary(op, value) => {
                let value = self.eval(value, frame)?;
                unary(*op, &value)
            }
            ExprKind::Binary(op, a, b) => {
                let (a, b) = (self.eval(a, frame)?, self.eval(b, frame)?);
                self.binary(*op, &a, &b)
            }
            ExprKind::And(a, b) => {
                let a = self.eval(a, frame)?;
                if a.truth() { self.eval(b, frame) } else { Ok(a) }
            }
            ExprKind::Or(a, b) => {
                let a = self.eval(a, frame)?;
                if a.truth() { Ok(a) } else { self.eval(b, frame) }
            }
            ExprKind::Compare(first, rest) => {
                let mut left = self.eval(first, frame)?;
                for (op, right) in rest {
                    let right = self.eval(right, frame)?;
                    if !compare(*op, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            ExprKind::Concat(parts) => {
                let values = self.eval_all(parts, frame)?;
                let mut out = Builder::new();
                for value in &values {
                    display_into(&mut out, value)?;
                }
                Ok(Value::Str(out.into_text()?))
            }
            ExprKind::Conditional { test, yes, no } => match (self.eval(test, frame)?.truth(), no) {
                (true, _) => self.eval(yes, frame),
                (false, Some(no)) => self.eval(no, frame),
                (false, None) => Ok(Value::hint("the inline if-expression was false and has no else")),
            },
            ExprKind::Attribute(value, name) => {
                let value = self.eval(value, frame)?;
                self.attribute(&value, name)
            }
            ExprKind::Item(value, index) => {
                let (value, index) = (self.eval(value, frame)?, self.eval(index, frame)?);
                self.item(&value, &index)
            }
            ExprKind::Slice(value, parts) => {
                let value = self.eval(value, frame)?;
                let mut bounds = [const { None }; 3];
                for (bound, part) in bounds.iter_mut().zip(parts.iter()) {
                    if let Some(part) = part {
                        *bound = match self.eval(part, frame)? {
                            Value::None => None,
                            other => Some(other.as_int().ok_or_else(|| {
                                Error::runtime("slice indices must be integers or None or have an __index__ method")
                            })?),
                        };
                    }
                }
                super::access::slice(&value, bounds)
            }
            ExprKind::Filter { input, name, arguments } => {
                let input = match input {
                    Some(input) => self.eval(input, frame)?,
                    None => return Err(Error::runtime("a filter has nothing to filter")),
                };
                let arguments = self.arguments(arguments, frame)?;
                self.filter(name, input, arguments)
            }
            ExprKind::Test { input, name, arguments } => {
                let input = self.eval(input, frame)?;
                let arguments = self.arguments(arguments, frame)?;
                Ok(Value::Bool(self.check(name, &input, arguments)?))
            }
            ExprKind::Call(callee, arguments) => {
                let callee = self.eval(callee, frame)?;
                let arguments = self.arguments(arguments, frame)?;
                self.call(&callee, arguments)
            }
        }
    }

    /// Filters of a block's text: the innermost has no input.
    pub(super) fn filter_block(&mut self, expr: &Expr, text: Value, frame: &Rc<Frame>) -> Result<Value> {
        let ExprKind::Filter { input, name, arguments } = &expr.kind else {
            return Err(Error::runtime("a filter has nothing to filter"));
        };
        let input = match input {
            Some(inner) => self.deeper(|this| this.filter_block(inner, text, frame))?,
            None => text,
        };
        let arguments = self.arguments(arguments, frame)?;
        self.filter(name, input, arguments).map_err(|error| error.at(expr.line))
    }

    pub(super) fn call_with_caller(&mut self, call: &Expr, caller: Value, frame: &Rc<Frame>) -> Result<Value> {
        let ExprKind::Call(callee, arguments) = &call.kind else {
            return Err(Error::runtime("expected a call"));
        };
        let callee = self.eval(callee, frame)?;
        let mut arguments = self.arguments(arguments, frame)?;
        if arguments.keywords.iter().any(|(name, _)| **name == *"caller") {
            return Err(Error::runtime("got multiple values for keyword argument 'caller'"));
        }
        arguments.keywords.push((Text::free("caller"), caller));
        self.call(&callee, arguments)
    }

    fn arguments(&mut self, arguments: &Arguments, frame: &Rc<Frame>) -> Result<CallArgs> {
        let mut positional = self.eval_all(&arguments.positional, frame)?;
        let mut keywords = Vec::with_capacity(arguments.keywords.len());
        for (name, value) in &arguments.keywords {
            keywords.push((name.clone(), self.eval(value, frame)?));
        }
        if let Some(star) = &arguments.star {
            let values = self.eval(star, frame)?;
            let mut items = iterate(&values)?;
            while let Some(item) = items.next()? {
                positional.push(item);
                limits::check_elements(positional.len(), ELEMENT)?;
            }
        }
        if let Some(double_star) = &arguments.double_star {
            match self.eval(double_star, frame)? {
                Value::Dict(dict) => {
                    for (key, value) in dict.entries() {
                        let Value::Str(name) = key else {
                            return Err(Error::runtime("keywords must be strings"));
                        };
                        if keywords.iter().any(|(other, _)| **other == **name) {
                            let name = crate::error::excerpt(name);
                            return Err(Error::runtime(format!("got multiple values for keyword argument '{name}'")));
                        }
                        limits::step(keywords.len())?;
                        keywords.push((name.clone(), value.clone()));
                    }
                }
                other => {
                    let kind = other.type_name();
                    return Err(Error::runtime(format!("argument after ** must be a mapping, not {kind}")));
                }
            }
        }
        Ok(CallArgs { positional, keywords })
    }

    pub(crate) fn binary(&mut self, op: Binary, a: &Value, b: &Value) -> Result<Value> {
        binary(op, a, b)
    }
}

fn unary(op: Unary, value: &Value) -> Result<Value> {
    if op == Unary::Not {
        return Ok(Value::Bool(!value.truth()));
    }
    value.check_defined()?;
    match (op, Number::of(value)) {
        (Unary::Negative, Some(Number::Int(value))) => {
            let negative = value.checked_neg();
            negative.map(Value::Int).ok_or_else(|| Error::runtime("integers of more than 127 bits are not supported"))
        }
        (Unary::Negative, Some(Number::Float(value))) => Ok(Value::Float(-value)),
        (_, Some(Number::Int(value))) => Ok(Value::Int(value)),
        (_, Some(Number::Float(value))) => Ok(Value::Float(value)),
        (op, None) => {
            let op = if op == Unary::Negative { '-' } else { '+' };
            Err(Error::runtime(format!("bad operand type for unary {op}: '{}'", value.type_name())))
        }
    }
}

/// Python's operators on any values.
pub(crate) fn binary(op: Binary, a: &Value, b: &Value) -> Result<Value> {
    if let (Some(a), Some(b)) = (Number::of(a), Number::of(b)) {
        return number_binary(op, a, b);
    }
    match (op, a, b) {
        (Binary::Modulo, Value::Str(format), values) => percent(format, values),
        (Binary::Add, Value::Str(a), Value::Str(b)) if a.is_markup() || b.is_markup() => {
            let mut out = Builder::new();
            out.push_str(&a.escaped()?)?;
            out.push_str(&b.escaped()?)?;
            Ok(Value::Str(out.into_text()?.into_markup()?))
        }
        (_, Value::Undefined(_), _) => a.check_defined().map(|()| Value::None),
        (_, _, Value::Undefined(_)) => b.check_defined().map(|()| Value::None),
        (Binary::Add, Value::Str(a), Value::Str(b)) => {
            limits::check_text(a.len().saturating_add(b.len()))?;
            limits::step((a.len() + b.len()) / 256)?;
            let mut text = String::with_capacity(a.len() + b.len());
            text.push_str(a);
            text.push_str(b);
            Value::str(text)
        }
        (Binary::Add, Value::List(a), Value::List(b)) => Value::list(joined(&a.values, &b.values)?),
        (Binary::Add, Value::Tuple(a), Value::Tuple(b)) => Value::tuple(joined(&a.values, &b.values)?),
        (Binary::Multiply, Value::Str(text), count) | (Binary::Multiply, count, Value::Str(text))
            if count.as_int().is_some() =>
        {
            let count = times(count);
            limits::check_text(text.len().saturating_mul(count))?;
            limits::step(text.len() * count / 256)?;
            Value::str(text.repeat(count))?.marked_like(text)
        }
        (Binary::Multiply, Value::List(items), count) | (Binary::Multiply, count, Value::List(items))
            if count.as_int().is_some() =>
        {
            Value::list(repeated(&items.values, times(count))?)
        }
        (Binary::Multiply, Value::Tuple(items), count) | (Binary::Multiply, count, Value::Tuple(items))
            if count.as_int().is_some() =>
        {
            Value::tuple(repeated(&items.values, times(count))?)
        }
        // Python 3.9 merges maps with `|`, which a template has no operator for.
        (op, a, b) => {
            let (kind_a, kind_b) = (a.type_name(), b.type_name());
            Err(Error::runtime(match (op, a) {
                (Binary::Add, Value::Str(_)) => format!("can only concatenate str (not \"{kind_b}\") to str"),
                (Binary::Add, Value::List(_)) => format!("can only concatenate list (not \"{kind_b}\") to list"),
                (op, _) => {
                    let op = match op {
                        Binary::Add => "+",
                        Binary::Subtract => "-",
                        Binary::Multiply => "*",
                        Binary::Divide => "/",
                        Binary::FloorDivide => "//",
                        Binary::Modulo => "%",
                        Binary::Power => "** or pow()",
                    };
                    format!("unsupported operand type(s) for {op}: '{kind_a}' and '{kind_b}'")
                }
            }))
        }
    }
}

fn times(count: &Value) -> usize {
    usize::try_from(count.as_int().unwrap_or(0).max(0)).unwrap_or(usize::MAX)
}

fn joined(a: &[Value], b: &[Value]) -> Result<Vec<Value>> {
    let length = a.len() + b.len();
    limits::check_elements(length, ELEMENT)?;
    limits::step(length / 4)?;
    let mut values = Vec::with_capacity(length);
    values.extend_from_slice(a);
    values.extend_from_slice(b);
    Ok(values)
}

fn repeated(items: &[Value], count: usize) -> Result<Vec<Value>> {
    let length = items.len().saturating_mul(count);
    limits::check_elements(length, ELEMENT)?;
    limits::step(length / 4)?;
    let mut values = Vec::with_capacity(length);
    for _ in 0..if items.is_empty() { 0 } else { count } {
        values.extend_from_slice(items);
    }
    Ok(values)
}

pub(crate) fn compare(op: Comparison, a: &Value, b: &Value) -> Result<bool> {
    Ok(match op {
        Comparison::Equal => equal(a, b)?,
        Comparison::NotEqual => !equal(a, b)?,
        Comparison::In => contains(b, a)?,
        Comparison::NotIn => !contains(b, a)?,
        Comparison::Less => compare_order(a, b, "<")?.is_some_and(|order| order.is_lt()),
        Comparison::LessOrEqual => compare_order(a, b, "<=")?.is_some_and(|order| order.is_le()),
        Comparison::Greater => compare_order(a, b, ">")?.is_some_and(|order| order.is_gt()),
        Comparison::GreaterOrEqual => compare_order(a, b, ">=")?.is_some_and(|order| order.is_ge()),
    })
}

/// Whether Python could call a value.
pub(crate) fn is_callable(value: &Value) -> bool {
    match value {
        Value::Object(Object::Loop(_)) => true,
        Value::Object(object) => object.is_callable(),
        // Undefined values define `__call__` to fail.
        Value::Undefined(_) => true,
        _ => false,
    }
}
