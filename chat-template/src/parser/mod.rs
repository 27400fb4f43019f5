//! Tokens to the syntax tree: statements. Places of variables are filled in afterwards.

mod expression;

pub(crate) use self::expression::{for_each_child, for_each_child_mut};

use std::sync::Arc;

use crate::ast::{Expr, ExprKind, For, LoopFilter, Macro, Parameter, Scoped, Stmt, StmtKind, Target};
use crate::error::{Error, Result};
use crate::lexer::{Spanned, Token};
use crate::value::Text;

/// A `{% block %}` as it was read.
pub(crate) struct ParsedBlock {
    pub(crate) name: Arc<str>,
    pub(crate) body: Vec<Stmt>,
    pub(crate) line: u32,
}

/// The statements of a template, and its blocks, which stand apart.
pub(crate) struct Parsed {
    pub(crate) body: Vec<Stmt>,
    pub(crate) blocks: Vec<ParsedBlock>,
}

pub(crate) fn parse(tokens: Vec<Spanned>, nesting: usize) -> Result<Parsed> {
    let mut parser = Parser { tokens, at: 0, depth: 0, nesting, blocks: Vec::new() };
    let body = parser.statements(&[])?;
    Ok(Parsed { body, blocks: parser.blocks })
}

struct Parser {
    tokens: Vec<Spanned>,
    at: usize,
    /// Levels that the parser is in: of statements, brackets and operators.
    depth: usize,
    nesting: usize,
    blocks: Vec<ParsedBlock>,
}

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.at].0
    }

    fn peek_after(&self) -> &Token {
        &self.tokens[(self.at + 1).min(self.tokens.len() - 1)].0
    }

    fn line(&self) -> u32 {
        self.tokens[self.at].1
    }

    /// Takes the current token. The last one, the end, stays.
    fn next(&mut self) -> Token {
        if self.at + 1 == self.tokens.len() {
            return Token::End;
        }
        self.at += 1;
        std::mem::replace(&mut self.tokens[self.at - 1].0, Token::End)
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::syntax(message, self.line()))
    }

    fn unexpected<T>(&self, expected: &str) -> Result<T> {
        self.fail(format!("expected {expected}, found {}", self.peek().describe()))
    }

    fn is_op(&self, op: &str) -> bool {
        matches!(self.peek(), Token::Op(found) if *found == op)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Token::Name(found) if found == name)
    }

    fn skip_op(&mut self, op: &str) -> bool {
        let found = self.is_op(op);
        if found {
            self.next();
        }
        found
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        if found {
            self.next();
        }
        found
    }

    fn expect_op(&mut self, op: &str) -> Result<()> {
        if self.skip_op(op) { Ok(()) } else { self.unexpected(&format!("`{op}`")) }
    }

    fn expect_name(&mut self) -> Result<String> {
        match self.peek() {
            Token::Name(_) => match self.next() {
                Token::Name(name) => Ok(name),
                _ => self.unexpected("a name"),
            },
            _ => self.unexpected("a name"),
        }
    }

    fn expect_block_end(&mut self) -> Result<()> {
        match self.peek() {
            Token::BlockEnd => {
                self.next();
                Ok(())
            }
            _ => self.unexpected("`%}`"),
        }
    }

    /// Runs a part of the parser one level deeper.
    fn nested<T>(&mut self, part: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.depth += 1;
        if self.depth > self.nesting {
            return Err(Error::limit("nesting", self.nesting).at(self.line()));
        }
        let result = part(self);
        self.depth -= 1;
        result
    }

    /// Statements up to a tag of one of these names, which becomes the current token; up to the end where there is none.
    fn statements(&mut self, ends: &[&str]) -> Result<Vec<Stmt>> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            match self.peek() {
                Token::End if ends.is_empty() => return Ok(body),
                Token::End => {
                    let ends: Vec<_> = ends.iter().map(|end| format!("`{{% {end} %}}`")).collect();
                    return self.fail(format!("the template ends where {} is expected", ends.join(" or ")));
                }
                Token::Text(_) => {
                    if let Token::Text(text) = self.next() {
                        body.push(Stmt { kind: StmtKind::Text(Text::free(text)), line });
                    }
                }
                Token::VariableBegin => {
                    self.next();
                    let value = self.tuple_or_expression(true, &[], false)?;
                    match self.peek() {
                        Token::VariableEnd => self.next(),
                        _ => return self.unexpected("`}}`"),
                    };
                    body.push(Stmt { kind: StmtKind::Print(value), line });
                }
                Token::BlockBegin => {
                    self.next();
                    let Token::Name(name) = self.peek() else { return self.unexpected("a tag") };
                    if ends.contains(&name.as_str()) {
                        return Ok(body);
                    }
                    self.nested(|parser| parser.statement(&mut body))?;
                    self.expect_block_end()?;
                }
                _ => return self.unexpected("text or a tag"),
            }
        }
    }

    /// The body of a tag, up to and with its end, or up to another tag of `ends`; returns that tag.
    fn body(&mut self, ends: &[&'static str]) -> Result<(Vec<Stmt>, String)> {
        // A colon is allowed, for the sake of people who write Python.
        self.skip_op(":");
        self.expect_block_end()?;
        let body = self.statements(ends)?;
        Ok((body, self.expect_name()?))
    }

    fn scoped(&mut self, end: &'static str) -> Result<Scoped> {
        Ok(Scoped { slots: Vec::new(), body: self.body(&[end])?.0 })
    }

    fn statement(&mut self, body: &mut Vec<Stmt>) -> Result<()> {
        let line = self.line();
        let name = self.expect_name()?;
        let kind = match name.as_str() {
            "for" => self.for_loop(line)?,
            "if" => self.if_chain()?,
            "set" => self.set()?,
            "macro" => {
                let name = self.expect_name()?;
                let function = self.function(Some(name.into()), "endmacro", line)?;
                StmtKind::Macro { function: Arc::new(function), place: Default::default(), export: false }
            }
            "call" => {
                let parameters = if self.is_op("(") { self.parameters()? } else { Vec::new() };
                let call = self.expression(true)?;
                if !matches!(call.kind, ExprKind::Call(..)) {
                    return Err(Error::syntax("expected a call", line));
                }
                let scoped = self.scoped("endcall")?;
                let caller = Macro { name: None, parameters, scoped, caller: None, kwargs: None, varargs: None, line };
                StmtKind::CallBlock { call, caller: Arc::new(caller) }
            }
            "filter" => {
                let filter = self.filter_chain(None, true)?;
                StmtKind::FilterBlock { filter, scoped: self.scoped("endfilter")? }
            }
            "with" => self.with()?,
            "generation" => {
                self.expect_block_end()?;
                let inner = self.statements(&["endgeneration"])?;
                self.next();
                StmtKind::Generation(Scoped { slots: Vec::new(), body: inner })
            }
            "autoescape" => {
                let flag = self.expression(true)?;
                if !matches!(flag.kind, ExprKind::Literal(crate::ast::Literal::Bool(false))) {
                    return Err(Error::syntax("autoescape is not supported: nothing is escaped", line));
                }
                StmtKind::Scope(self.scoped("endautoescape")?)
            }
            "block" => self.block(line)?,
            "print" => {
                let mut first = true;
                while !matches!(self.peek(), Token::BlockEnd) {
                    if !first {
                        self.expect_op(",")?;
                    }
                    first = false;
                    let value = self.expression(true)?;
                    body.push(Stmt { kind: StmtKind::Print(value), line });
                }
                return Ok(());
            }
            "break" => StmtKind::Break,
            "continue" => StmtKind::Continue,
            "include" | "import" | "from" | "extends" => {
                // The rest of the tag is not looked at: there is nothing that it could name.
                while !matches!(self.peek(), Token::BlockEnd | Token::End) {
                    self.next();
                }
                StmtKind::NoLoader(match name.as_str() {
                    "include" => "include",
                    "extends" => "extends",
                    _ => "import",
                })
            }
            other => {
                let name = crate::error::excerpt(other);
                return Err(Error::syntax(format!("unknown tag `{name}`"), line));
            }
        };
        body.push(Stmt { kind, line });
        Ok(())
    }

    fn for_loop(&mut self, line: u32) -> Result<StmtKind> {
        let target = self.target(false, &["in"])?;
        if !self.skip_name("in") {
            return self.unexpected("`in`");
        }
        let iter = self.tuple_or_expression(false, &["recursive"], false)?;
        let filter = match self.skip_name("if") {
            true => {
                let test = self.expression(true)?;
                Some(LoopFilter { target: copy_target(&target), slots: Vec::new(), test })
            }
            false => None,
        };
        let recursive = self.skip_name("recursive");
        let (body, end) = self.body(&["endfor", "else"])?;
        let otherwise = match end.as_str() {
            "else" => Some(self.scoped("endfor")?),
            _ => None,
        };
        let scoped = Scoped { slots: Vec::new(), body };
        Ok(StmtKind::For(Arc::new(For { target, iter, filter, recursive, scoped, loop_slot: 0, otherwise, line })))
    }

    fn if_chain(&mut self) -> Result<StmtKind> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple_or_expression(false, &[], false)?;
            let (body, end) = self.body(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match end.as_str() {
                "elif" => {}
                "else" => {
                    let (otherwise, _) = self.body(&["endif"])?;
                    return Ok(StmtKind::If { branches, otherwise });
                }
                _ => return Ok(StmtKind::If { branches, otherwise: Vec::new() }),
            }
        }
    }

    fn set(&mut self) -> Result<StmtKind> {
        let target = self.target(true, &[])?;
        if self.skip_op("=") {
            let value = self.tuple_or_expression(true, &[], false)?;
            return Ok(StmtKind::Assign { target, value, export: false });
        }
        let filter = if self.is_op("|") { Some(self.filter_chain(None, false)?) } else { None };
        let scoped = self.scoped("endset")?;
        Ok(StmtKind::AssignBlock { target, filter, scoped, export: false })
    }

    fn with(&mut self) -> Result<StmtKind> {
        let mut targets = Vec::new();
        while !matches!(self.peek(), Token::BlockEnd) {
            if !targets.is_empty() {
                self.expect_op(",")?;
            }
            let target = self.target(false, &[])?;
            self.expect_op("=")?;
            targets.push((target, self.expression(true)?));
        }
        Ok(StmtKind::With { targets, scoped: self.scoped("endwith")? })
    }

    fn block(&mut self, line: u32) -> Result<StmtKind> {
        let name: Arc<str> = self.expect_name()?.into();
        let locals = self.skip_name("scoped").then(Vec::new);
        let required = self.skip_name("required");
        if self.is_op("-") {
            return self.fail("the name of a block cannot contain a hyphen");
        }
        let (body, _) = self.body(&["endblock"])?;
        let is_blank = |stmt: &Stmt| matches!(&stmt.kind, StmtKind::Text(text) if text.trim().is_empty());
        if required && !body.iter().all(is_blank) {
            return Err(Error::syntax("required blocks can only contain comments or white space", line));
        }
        self.skip_name(&name);
        self.blocks.push(ParsedBlock { name: name.clone(), body, line });
        Ok(StmtKind::Block { name, required, locals })
    }

    fn function(&mut self, name: Option<Arc<str>>, end: &'static str, line: u32) -> Result<Macro> {
        let parameters = self.parameters()?;
        let scoped = self.scoped(end)?;
        Ok(Macro { name, parameters, scoped, caller: None, kwargs: None, varargs: None, line })
    }

    fn parameters(&mut self) -> Result<Vec<Parameter>> {
        self.expect_op("(")?;
        let mut parameters: Vec<Parameter> = Vec::new();
        while !self.is_op(")") {
            if !parameters.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.expect_name()?;
            check_assignable(&name, self.line())?;
            let default = if self.skip_op("=") { Some(self.expression(true)?) } else { None };
            if default.is_none() && parameters.iter().any(|parameter| parameter.default.is_some()) {
                return self.fail("a parameter without a default follows one that has one");
            }
            if parameters.iter().any(|parameter| *parameter.name == name) {
                return self.fail(format!("parameter `{}` comes twice", crate::error::excerpt(&name)));
            }
            parameters.push(Parameter { name: name.into(), slot: 0, default });
        }
        self.expect_op(")")?;
        Ok(parameters)
    }

    /// What is assigned to: a name, several of them, or where `namespace` is set an attribute of a namespace.
    fn target(&mut self, namespace: bool, ends: &[&str]) -> Result<Target> {
        let line = self.line();
        let expr = self.tuple_of_primaries(namespace, ends)?;
        into_target(expr, line)
    }
}

fn check_assignable(name: &str, line: u32) -> Result<()> {
    match name {
        "true" | "false" | "none" | "True" | "False" | "None" => {
            Err(Error::syntax(format!("cannot assign to `{name}`"), line))
        }
        _ => Ok(()),
    }
}

fn into_target(expr: Expr, line: u32) -> Result<Target> {
    match expr.kind {
        ExprKind::Name { name, place } => Ok(Target::Name { name, place }),
        ExprKind::Tuple(items) => {
            Ok(Target::Tuple(items.into_iter().map(|item| into_target(item, line)).collect::<Result<_>>()?))
        }
        // Only `tuple_of_primaries` makes these, of `namespace.attribute`.
        ExprKind::Attribute(of, attribute) => match of.kind {
            ExprKind::Name { name: namespace, place } => Ok(Target::Attribute { namespace, place, attribute }),
            _ => Err(Error::syntax("cannot assign to this expression", line)),
        },
        _ => Err(Error::syntax("cannot assign to this expression", line)),
    }
}

fn copy_target(target: &Target) -> Target {
    match target {
        Target::Name { name, place } => Target::Name { name: name.clone(), place: *place },
        Target::Tuple(items) => Target::Tuple(items.iter().map(copy_target).collect()),
        Target::Attribute { namespace, place, attribute } => {
            Target::Attribute { namespace: namespace.clone(), place: *place, attribute: attribute.clone() }
        }
    }
}
