//! Expressions, with Jinja's precedence.

use super::Parser;
use crate::ast::{Arguments, Binary, Comparison, Expr, ExprKind, Literal, Unary};
use crate::error::{Error, Result};
use crate::lexer::Token;
use crate::value::Text;

impl Parser {
    /// A node one level above its children.
    fn node(&self, kind: ExprKind, line: u32) -> Result<Expr> {
        let height = 1 + tallest(&kind);
        if height > self.nesting {
            return Err(Error::limit("nesting", self.nesting).at(line));
        }
        Ok(Expr { kind, line, height })
    }

    fn binary(&self, op: Binary, left: Expr, right: Expr, line: u32) -> Result<Expr> {
        self.node(ExprKind::Binary(op, Box::new(left), Box::new(right)), line)
    }

    /// An expression, or a tuple where commas follow. `ends` are names that end a tuple after a comma;
    /// `parentheses` allow an empty one.
    pub(super) fn tuple_or_expression(&mut self, conditional: bool, ends: &[&str], parentheses: bool) -> Result<Expr> {
        self.tuple_of(ends, parentheses, |parser| parser.expression(conditional))
    }

    /// Names and literals only, as they stand left of an assignment.
    pub(super) fn tuple_of_primaries(&mut self, namespace: bool, ends: &[&str]) -> Result<Expr> {
        self.tuple_of(ends, false, |parser| parser.primary(namespace))
    }

    fn tuple_of(
        &mut self,
        ends: &[&str],
        parentheses: bool,
        mut part: impl FnMut(&mut Self) -> Result<Expr>,
    ) -> Result<Expr> {
        let line = self.line();
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            if !items.is_empty() {
                self.expect_op(",")?;
            }
            let at_end = match self.peek() {
                Token::VariableEnd | Token::BlockEnd => true,
                Token::Op(op) => *op == ")",
                Token::Name(name) => ends.contains(&name.as_str()),
                _ => false,
            };
            if at_end {
                break;
            }
            items.push(part(self)?);
            if !self.is_op(",") {
                break;
            }
            is_tuple = true;
        }
        match (is_tuple, items.len()) {
            (false, 1) => Ok(items.remove(0)),
            (false, 0) if !parentheses => self.unexpected("an expression"),
            _ => self.node(ExprKind::Tuple(items), line),
        }
    }

    pub(super) fn expression(&mut self, conditional: bool) -> Result<Expr> {
        match conditional {
            true => self.nested(Self::conditional),
            false => self.nested(Self::or),
        }
    }

    fn conditional(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut yes = self.or()?;
        while self.skip_name("if") {
            let test = self.or()?;
            let no = if self.skip_name("else") { Some(Box::new(self.nested(Self::conditional)?)) } else { None };
            yes = self.node(ExprKind::Conditional { test: Box::new(test), yes: Box::new(yes), no }, line)?;
        }
        Ok(yes)
    }

    fn or(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.and()?;
        while self.skip_name("or") {
            let right = self.and()?;
            left = self.node(ExprKind::Or(Box::new(left), Box::new(right)), line)?;
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.not()?;
        while self.skip_name("and") {
            let right = self.not()?;
            left = self.node(ExprKind::And(Box::new(left), Box::new(right)), line)?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Expr> {
        let line = self.line();
        if !self.skip_name("not") {
            return self.compare();
        }
        let value = self.nested(Self::not)?;
        self.node(ExprKind::Unary(Unary::Not, Box::new(value)), line)
    }

    fn compare(&mut self) -> Result<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let op = match self.peek() {
                Token::Op("==") => Comparison::Equal,
                Token::Op("!=") => Comparison::NotEqual,
                Token::Op("<") => Comparison::Less,
                Token::Op("<=") => Comparison::LessOrEqual,
                Token::Op(">") => Comparison::Greater,
                Token::Op(">=") => Comparison::GreaterOrEqual,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name)
                    if name == "not" && matches!(self.peek_after(), Token::Name(name) if name == "in") =>
                {
                    self.next();
                    Comparison::NotIn
                }
                _ => break,
            };
            self.next();
            rest.push((op, self.sum()?));
        }
        match rest.is_empty() {
            true => Ok(first),
            false => self.node(ExprKind::Compare(Box::new(first), rest), line),
        }
    }

    fn sum(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.concat()?;
        loop {
            let op = match self.peek() {
                Token::Op("+") => Binary::Add,
                Token::Op("-") => Binary::Subtract,
                _ => return Ok(left),
            };
            self.next();
            let right = self.concat()?;
            left = self.binary(op, left, right, line)?;
        }
    }

    fn concat(&mut self) -> Result<Expr> {
        let line = self.line();
        let first = self.product()?;
        if !self.is_op("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_op("~") {
            parts.push(self.product()?);
        }
        self.node(ExprKind::Concat(parts), line)
    }

    fn product(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.power()?;
        loop {
            let op = match self.peek() {
                Token::Op("*") => Binary::Multiply,
                Token::Op("/") => Binary::Divide,
                Token::Op("//") => Binary::FloorDivide,
                Token::Op("%") => Binary::Modulo,
                _ => return Ok(left),
            };
            self.next();
            let right = self.power()?;
            left = self.binary(op, left, right, line)?;
        }
    }

    fn power(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.unary(true)?;
        while self.skip_op("**") {
            let right = self.unary(true)?;
            left = self.binary(Binary::Power, left, right, line)?;
        }
        Ok(left)
    }

    fn unary(&mut self, filters: bool) -> Result<Expr> {
        let line = self.line();
        let op = match self.peek() {
            Token::Op("-") => Some(Unary::Negative),
            Token::Op("+") => Some(Unary::Positive),
            _ => None,
        };
        let value = match op {
            Some(op) => {
                self.next();
                let value = self.nested(|parser| parser.unary(false))?;
                self.node(ExprKind::Unary(op, Box::new(value)), line)?
            }
            None => self.primary(false)?,
        };
        let value = self.postfix(value)?;
        if filters { self.filters_and_tests(value) } else { Ok(value) }
    }

    /// A name, a literal or something in brackets. `namespace` allows `name.attribute`, for assignments.
    pub(super) fn primary(&mut self, namespace: bool) -> Result<Expr> {
        let line = self.line();
        let kind = match self.peek() {
            Token::Name(_) => {
                let name = self.expect_name()?;
                match name.as_str() {
                    "true" | "True" => ExprKind::Literal(Literal::Bool(true)),
                    "false" | "False" => ExprKind::Literal(Literal::Bool(false)),
                    "none" | "None" => ExprKind::Literal(Literal::None),
                    _ => {
                        let name = ExprKind::Name { name: name.into(), place: Default::default() };
                        if namespace && self.skip_op(".") {
                            let attribute = Text::free(self.expect_name()?);
                            ExprKind::Attribute(Box::new(self.node(name, line)?), attribute)
                        } else {
                            name
                        }
                    }
                }
            }
            Token::Str(_) => {
                let mut text = String::new();
                while let Token::Str(_) = self.peek() {
                    if let Token::Str(part) = self.next() {
                        text.push_str(&part);
                    }
                }
                ExprKind::Literal(Literal::Str(Text::free(text)))
            }
            &Token::Int(value) => {
                self.next();
                ExprKind::Literal(Literal::Int(value))
            }
            &Token::Float(value) => {
                self.next();
                ExprKind::Literal(Literal::Float(value))
            }
            Token::Op("(") => {
                self.next();
                let value = self.nested(|parser| parser.tuple_or_expression(true, &[], true))?;
                self.expect_op(")")?;
                return Ok(value);
            }
            Token::Op("[") => {
                self.next();
                let mut items = Vec::new();
                while !self.is_op("]") {
                    if !items.is_empty() {
                        self.expect_op(",")?;
                    }
                    if self.is_op("]") {
                        break;
                    }
                    items.push(self.expression(true)?);
                }
                self.expect_op("]")?;
                ExprKind::List(items)
            }
            Token::Op("{") => {
                self.next();
                let mut entries = Vec::new();
                while !self.is_op("}") {
                    if !entries.is_empty() {
                        self.expect_op(",")?;
                    }
                    if self.is_op("}") {
                        break;
                    }
                    let key = self.expression(true)?;
                    self.expect_op(":")?;
                    entries.push((key, self.expression(true)?));
                }
                self.expect_op("}")?;
                ExprKind::Dict(entries)
            }
            _ => return self.unexpected("an expression"),
        };
        self.node(kind, line)
    }

    fn postfix(&mut self, mut value: Expr) -> Result<Expr> {
        loop {
            value = match self.peek() {
                Token::Op(".") => self.attribute(value)?,
                Token::Op("[") => self.subscript(value)?,
                Token::Op("(") => self.call(value)?,
                _ => return Ok(value),
            };
        }
    }

    fn attribute(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        self.next();
        match self.next() {
            Token::Name(name) => self.node(ExprKind::Attribute(Box::new(value), Text::free(name)), line),
            Token::Int(index) => {
                let index = self.node(ExprKind::Literal(Literal::Int(index)), line)?;
                self.node(ExprKind::Item(Box::new(value), Box::new(index)), line)
            }
            _ => Err(Error::syntax("expected a name or a number after the dot", line)),
        }
    }

    fn subscript(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        self.next();
        let mut items = Vec::new();
        let mut slice = None;
        let mut is_tuple = false;
        while !self.is_op("]") {
            if !items.is_empty() || slice.is_some() {
                self.expect_op(",")?;
                is_tuple = true;
            }
            let first = if self.is_op(":") { None } else { Some(self.expression(true)?) };
            if !self.skip_op(":") {
                items.extend(first);
                continue;
            }
            let part = |parser: &mut Self| -> Result<Option<Expr>> {
                let ends = parser.is_op(":") || parser.is_op("]") || parser.is_op(",");
                Ok(if ends { None } else { Some(parser.expression(true)?) })
            };
            let stop = part(self)?;
            let step = if self.skip_op(":") { part(self)? } else { None };
            slice = Some(Box::new([first, stop, step]));
        }
        self.expect_op("]")?;
        match slice {
            Some(_) if is_tuple => Err(Error::syntax("a slice stands alone in its brackets", line)),
            Some(slice) => self.node(ExprKind::Slice(Box::new(value), slice), line),
            None => {
                let index = match items.len() {
                    1 => items.remove(0),
                    _ => self.node(ExprKind::Tuple(items), line)?,
                };
                self.node(ExprKind::Item(Box::new(value), Box::new(index)), line)
            }
        }
    }

    fn call(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        let arguments = self.arguments()?;
        self.node(ExprKind::Call(Box::new(value), Box::new(arguments)), line)
    }

    fn arguments(&mut self) -> Result<Arguments> {
        self.expect_op("(")?;
        let mut arguments = Arguments::default();
        let mut first = true;
        while !self.is_op(")") {
            if !first {
                self.expect_op(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            first = false;
            let no_stars = arguments.star.is_none() && arguments.double_star.is_none();
            if no_stars && self.skip_op("*") {
                arguments.star = Some(self.expression(true)?);
            } else if arguments.double_star.is_none() && self.skip_op("**") {
                arguments.double_star = Some(self.expression(true)?);
            } else if matches!((self.peek(), self.peek_after()), (Token::Name(_), Token::Op("="))) {
                if arguments.double_star.is_some() {
                    return self.fail("an argument follows `**`");
                }
                let name = self.expect_name()?;
                self.next();
                if arguments.keywords.iter().any(|(other, _)| **other == *name) {
                    return self.fail(format!("argument `{}` comes twice", crate::error::excerpt(&name)));
                }
                let value = self.expression(true)?;
                arguments.keywords.push((Text::free(name), value));
            } else if no_stars && arguments.keywords.is_empty() {
                arguments.positional.push(self.expression(true)?);
            } else {
                return self.fail("a positional argument follows a keyword argument");
            }
        }
        self.expect_op(")")?;
        Ok(arguments)
    }

    fn filters_and_tests(&mut self, mut value: Expr) -> Result<Expr> {
        loop {
            value = match self.peek() {
                Token::Op("|") => self.filter_chain(Some(value), false)?,
                Token::Name(name) if name == "is" => self.test(value)?,
                // Calls are valid after filters and tests as well.
                Token::Op("(") => self.call(value)?,
                _ => return Ok(value),
            };
        }
    }

    fn dotted_name(&mut self) -> Result<String> {
        let mut name = self.expect_name()?;
        while self.skip_op(".") {
            name = name + "." + &self.expect_name()?;
        }
        Ok(name)
    }

    /// Filters after a value, or after nothing in the tags that filter their body. `inline` chains begin without `|`.
    pub(super) fn filter_chain(&mut self, mut value: Option<Expr>, inline: bool) -> Result<Expr> {
        let mut first = inline;
        while first || self.is_op("|") {
            if !first {
                self.next();
            }
            first = false;
            let line = self.line();
            let name = self.dotted_name()?.into();
            let arguments = if self.is_op("(") { self.arguments()? } else { Arguments::default() };
            let kind = ExprKind::Filter { input: value.take().map(Box::new), name, arguments: Box::new(arguments) };
            value = Some(self.node(kind, line)?);
        }
        value.map_or_else(|| self.unexpected("a filter"), Ok)
    }

    fn test(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        self.next();
        let negated = self.skip_name("not");
        let name = self.dotted_name()?;
        let mut arguments = Arguments::default();
        let has_argument = match self.peek() {
            Token::Op("(") => {
                arguments = self.arguments()?;
                false
            }
            Token::Name(name) if name == "is" => return self.fail("tests cannot be chained with `is`"),
            Token::Name(name) => !matches!(name.as_str(), "else" | "or" | "and"),
            Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Op("[" | "{") => true,
            _ => false,
        };
        if has_argument {
            let argument = self.primary(false)?;
            arguments.positional.push(self.postfix(argument)?);
        }
        let kind = ExprKind::Test { input: Box::new(value), name: name.into(), arguments: Box::new(arguments) };
        let test = self.node(kind, line)?;
        if negated { self.node(ExprKind::Unary(Unary::Not, Box::new(test)), line) } else { Ok(test) }
    }
}

/// Height of the tallest child.
fn tallest(kind: &ExprKind) -> usize {
    let mut most = 0;
    for_each_child(kind, &mut |child| most = most.max(child.height));
    most
}

/// Calls `visit` with every expression directly below, in the order of Jinja's nodes.
pub(crate) fn for_each_child<'e>(kind: &'e ExprKind, visit: &mut dyn FnMut(&'e Expr)) {
    match kind {
        ExprKind::Literal(_) | ExprKind::Name { .. } => {}
        ExprKind::Tuple(items) | ExprKind::List(items) | ExprKind::Concat(items) => items.iter().for_each(visit),
        ExprKind::Dict(entries) => entries.iter().for_each(|(key, value)| {
            visit(key);
            visit(value);
        }),
        ExprKind::Unary(_, value) | ExprKind::Attribute(value, _) => visit(value),
        ExprKind::Binary(_, a, b) | ExprKind::And(a, b) | ExprKind::Or(a, b) | ExprKind::Item(a, b) => {
            visit(a);
            visit(b);
        }
        ExprKind::Compare(first, rest) => {
            visit(first);
            rest.iter().for_each(|(_, value)| visit(value));
        }
        ExprKind::Conditional { test, yes, no } => {
            visit(test);
            visit(yes);
            no.iter().for_each(|no| visit(no));
        }
        ExprKind::Slice(value, parts) => {
            visit(value);
            parts.iter().flatten().for_each(visit);
        }
        ExprKind::Filter { input, arguments, .. } => {
            input.iter().for_each(|input| visit(input));
            arguments.expressions().for_each(visit);
        }
        ExprKind::Test { input: value, arguments, .. } | ExprKind::Call(value, arguments) => {
            visit(value);
            arguments.expressions().for_each(visit);
        }
    }
}

/// The same for a pass that changes the tree.
pub(crate) fn for_each_child_mut(kind: &mut ExprKind, visit: &mut dyn FnMut(&mut Expr)) {
    match kind {
        ExprKind::Literal(_) | ExprKind::Name { .. } => {}
        ExprKind::Tuple(items) | ExprKind::List(items) | ExprKind::Concat(items) => items.iter_mut().for_each(visit),
        ExprKind::Dict(entries) => entries.iter_mut().for_each(|(key, value)| {
            visit(key);
            visit(value);
        }),
        ExprKind::Unary(_, value) | ExprKind::Attribute(value, _) => visit(value),
        ExprKind::Binary(_, a, b) | ExprKind::And(a, b) | ExprKind::Or(a, b) | ExprKind::Item(a, b) => {
            visit(a);
            visit(b);
        }
        ExprKind::Compare(first, rest) => {
            visit(first);
            rest.iter_mut().for_each(|(_, value)| visit(value));
        }
        ExprKind::Conditional { test, yes, no } => {
            visit(test);
            visit(yes);
            no.iter_mut().for_each(|no| visit(no));
        }
        ExprKind::Slice(value, parts) => {
            visit(value);
            parts.iter_mut().flatten().for_each(visit);
        }
        ExprKind::Filter { input, arguments, .. } => {
            input.iter_mut().for_each(|input| visit(input));
            arguments.expressions_mut().for_each(visit);
        }
        ExprKind::Test { input: value, arguments, .. } | ExprKind::Call(value, arguments) => {
            visit(value);
            arguments.expressions_mut().for_each(visit);
        }
    }
}
