//! Runs the statements of a template.

mod access;
mod call;
mod expression;
mod loops;

pub(crate) use self::expression::{binary, compare, is_callable};

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use crate::ast::{Block, Load, Place, Scoped, Slot, Stmt, StmtKind, Target, Tree};
use crate::error::{Error, Result};
use crate::limits::{self, Charge};
use crate::value::{
    Builder, Frame, Global, LoopState, MacroValue, Namespace, Object, Text, Value, display_into, iterate,
};

/// One rendering of a template.
pub(crate) struct Evaluator<'t> {
    tree: &'t Tree,
    variables: HashMap<Arc<str>, Value>,
    /// Variables set at the top level, which blocks see.
    exported: HashMap<Arc<str>, Value>,
    /// Variables that scoped blocks get from where they stand.
    locals: Vec<HashMap<Arc<str>, Value>>,
    out: Builder,
    depth: usize,
    recursion: usize,
    kept: Vec<Kept>,
}

/// Objects that may contain themselves. They are kept till the end and then emptied one by one, so that nothing is
/// leaked and no chain of them is dropped recursively.
enum Kept {
    Namespace(Rc<Namespace>),
    Frame(Rc<Frame>),
    Loop(Rc<LoopState>),
}

/// How a statement ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

impl Drop for Evaluator<'_> {
    fn drop(&mut self) {
        for kept in &self.kept {
            match kept {
                Kept::Namespace(namespace) => namespace.clear(),
                Kept::Frame(frame) => frame.clear(),
                Kept::Loop(state) => drop(state.changed.take()),
            }
        }
    }
}

impl<'t> Evaluator<'t> {
    pub(crate) fn new(tree: &'t Tree, variables: HashMap<Arc<str>, Value>) -> Self {
        Self {
            tree,
            variables,
            exported: HashMap::new(),
            locals: Vec::new(),
            out: Builder::output(),
            depth: 0,
            recursion: limits::current().recursion,
            kept: Vec::new(),
        }
    }

    /// The template's text.
    pub(crate) fn render(mut self) -> Result<String> {
        let frame = self.enter(&self.tree.root.slots, None)?;
        if let Some(slot) = self.tree.this {
            frame.set(Place { up: 0, slot }, Value::Object(Object::This));
        }
        self.run(&self.tree.root.body, &frame)?;
        // A macro may have kept the frame.
        frame.clear();
        Ok(std::mem::take(&mut self.out).into_string())
    }

    /// Runs a part one level deeper.
    pub(crate) fn deeper<T>(&mut self, part: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth >= self.recursion {
            return Err(Error::limit("recursion", self.recursion));
        }
        self.depth += 1;
        let result = part(self);
        self.depth -= 1;
        result
    }

    /// Runs a part whose output is a text of its own.
    fn capture(&mut self, part: impl FnOnce(&mut Self) -> Result<()>) -> Result<Text> {
        let outer = std::mem::take(&mut self.out);
        let result = part(self);
        let captured = std::mem::replace(&mut self.out, outer);
        result?;
        captured.into_text()
    }

    /// The text that a body prints, and how the body ends.
    fn capture_body(&mut self, scoped: &Scoped, inner: &Rc<Frame>) -> Result<(Text, Flow)> {
        let mut flow = Flow::Next;
        let text = self.capture(|this| {
            flow = this.run(&scoped.body, inner)?;
            Ok(())
        })?;
        Ok((text, flow))
    }

    /// A frame for a scope, its variables as they are at first.
    fn enter(&self, slots: &[Slot], parent: Option<&Rc<Frame>>) -> Result<Rc<Frame>> {
        limits::step(1 + slots.len())?;
        let value = |slot: &Slot| match &slot.load {
            Load::Parameter | Load::Undefined => None,
            Load::Resolve => self.resolve(&slot.name),
            Load::Alias(place) => parent?.get(Place { up: place.up - 1, slot: place.slot }),
        };
        let charge = Charge::new(96 + slots.len() * size_of::<Option<Value>>())?;
        let slots = slots.iter().map(value).collect::<Vec<_>>();
        Ok(Rc::new(Frame { slots: slots.into(), parent: parent.cloned(), _charge: charge }))
    }

    fn resolve(&self, name: &Arc<str>) -> Option<Value> {
        let local = self.locals.last().and_then(|locals| locals.get(name));
        let found = local.or_else(|| self.exported.get(name)).or_else(|| self.variables.get(name));
        found.cloned().or_else(|| {
            Some(Value::Object(Object::Global(match &**name {
                "range" => Global::Range,
                "dict" => Global::Dict,
                "lipsum" => Global::Lipsum,
                "cycler" => Global::Cycler,
                "joiner" => Global::Joiner,
                "namespace" => Global::Namespace,
                "raise_exception" => Global::RaiseException,
                "strftime_now" => Global::StrftimeNow,
                _ => return None,
            })))
        })
    }

    /// Keeps a frame that a macro refers to, and those around it.
    fn keep_frame(&mut self, frame: &Rc<Frame>) -> Result<()> {
        let mut next = Some(frame);
        while let Some(frame) = next {
            limits::step(1)?;
            let is_frame = |kept: &Kept| matches!(kept, Kept::Frame(other) if Rc::ptr_eq(other, frame));
            // The outer frames of one that was kept are kept as well; the last ones are the likely ones.
            if self.kept.iter().rev().take(16).any(is_frame) {
                break;
            }
            self.kept.push(Kept::Frame(frame.clone()));
            next = frame.parent.as_ref();
        }
        Ok(())
    }

    fn run(&mut self, body: &[Stmt], frame: &Rc<Frame>) -> Result<Flow> {
        for stmt in body {
            let flow = self.statement(stmt, frame).map_err(|error| error.at(stmt.line))?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn run_scoped(&mut self, scoped: &Scoped, frame: &Rc<Frame>) -> Result<Flow> {
        let inner = self.enter(&scoped.slots, Some(frame))?;
        self.run(&scoped.body, &inner)
    }

    fn statement(&mut self, stmt: &Stmt, frame: &Rc<Frame>) -> Result<Flow> {
        limits::step(1)?;
        match &stmt.kind {
            StmtKind::Text(text) => self.out.push_str(text)?,
            StmtKind::Print(value) => {
                let value = self.eval(value, frame)?;
                self.print(&value)?;
            }
            StmtKind::Assign { target, value, export } => {
                let value = self.eval(value, frame)?;
                self.assign(target, value, frame, *export)?;
            }
            StmtKind::If { branches, otherwise } => {
                for (test, body) in branches {
                    if self.eval(test, frame)?.truth() {
                        return self.deeper(|this| this.run(body, frame));
                    }
                }
                return self.deeper(|this| this.run(otherwise, frame));
            }
            StmtKind::For(node) => return self.deeper(|this| this.for_loop(node, frame)),
            other => return self.deeper(|this| this.block_statement(other, frame)),
        }
        Ok(Flow::Next)
    }

    /// The less frequent statements, which have bodies.
    fn block_statement(&mut self, stmt: &StmtKind, frame: &Rc<Frame>) -> Result<Flow> {
        match stmt {
            StmtKind::AssignBlock { target, filter, scoped, export } => {
                let inner = self.enter(&scoped.slots, Some(frame))?;
                let (text, flow) = self.capture_body(scoped, &inner)?;
                if flow != Flow::Next {
                    return Ok(flow);
                }
                let mut value = Value::Str(text);
                if let Some(filter) = filter {
                    value = self.filter_block(filter, value, &inner)?;
                }
                self.assign(target, value, frame, *export)?;
            }
            StmtKind::With { targets, scoped } => {
                let inner = self.enter(&scoped.slots, Some(frame))?;
                for (target, value) in targets {
                    let value = self.eval(value, frame)?;
                    self.assign(target, value, &inner, false)?;
                }
                return self.run(&scoped.body, &inner);
            }
            StmtKind::FilterBlock { filter, scoped } => {
                let inner = self.enter(&scoped.slots, Some(frame))?;
                let (text, flow) = self.capture_body(scoped, &inner)?;
                if flow != Flow::Next {
                    return Ok(flow);
                }
                let value = self.filter_block(filter, Value::Str(text), &inner)?;
                self.print_text(&value)?;
            }
            StmtKind::Macro { function, place, export } => {
                self.keep_frame(frame)?;
                let value = MacroValue { function: function.clone(), frame: frame.clone() };
                let value = Value::Object(Object::Macro(Rc::new(value)));
                if let (true, Some(name)) = (*export, &function.name) {
                    self.export(name, &value);
                }
                frame.set(*place, value);
            }
            StmtKind::CallBlock { call, caller } => {
                self.keep_frame(frame)?;
                let caller = MacroValue { function: caller.clone(), frame: frame.clone() };
                let value = self.call_with_caller(call, Value::Object(Object::Macro(Rc::new(caller))), frame)?;
                self.print_text(&value)?;
            }
            StmtKind::Generation(scoped) => {
                self.run_scoped(scoped, frame)?;
            }
            StmtKind::Scope(scoped) => return self.run_scoped(scoped, frame),
            StmtKind::Block { name, required, locals } => {
                if *required {
                    return Err(Error::runtime(format!("required block '{name}' not found")));
                }
                let Some(block) = self.tree.blocks.get(name) else { return Ok(Flow::Next) };
                if let Some(places) = locals {
                    let mut locals = self.locals.last().cloned().unwrap_or_default();
                    let values = places.iter().filter_map(|(name, place)| Some((name.clone(), frame.get(*place)?)));
                    locals.extend(values);
                    self.locals.push(locals);
                }
                self.run_block(block)?;
                if locals.is_some() {
                    self.locals.pop();
                }
            }
            StmtKind::NoLoader(tag) => {
                return Err(Error::runtime(format!("`{tag}` needs another template, and there is none to load")));
            }
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Continue => return Ok(Flow::Continue),
            StmtKind::Text(_)
            | StmtKind::Print(_)
            | StmtKind::Assign { .. }
            | StmtKind::If { .. }
            | StmtKind::For(_) => {}
        }
        Ok(Flow::Next)
    }

    fn run_block(&mut self, block: &Block) -> Result<()> {
        let frame = self.enter(&block.scoped.slots, None)?;
        if let Some(slot) = block.this {
            frame.set(Place { up: 0, slot }, Value::Object(Object::This));
        }
        if let Some(slot) = block.parent {
            frame.set(Place { up: 0, slot }, Value::hint("there is no parent block"));
        }
        self.run(&block.scoped.body, &frame)?;
        Ok(())
    }

    fn print(&mut self, value: &Value) -> Result<()> {
        display_into(&mut self.out, value)
    }

    /// Prints what `filter` and `call` blocks give: Jinja does not make texts of other values there.
    fn print_text(&mut self, value: &Value) -> Result<()> {
        match value {
            Value::Str(text) => self.out.push_str(text),
            other => Err(Error::runtime(format!("the block must give a text, not {}", other.type_name()))),
        }
    }

    fn export(&mut self, name: &Arc<str>, value: &Value) {
        if !self.tree.blocks.is_empty() {
            self.exported.insert(name.clone(), value.clone());
        }
    }

    fn assign(&mut self, target: &Target, value: Value, frame: &Rc<Frame>, export: bool) -> Result<()> {
        match target {
            Target::Name { name, place } => {
                if export {
                    self.export(name, &value);
                }
                frame.set(*place, value);
            }
            Target::Attribute { place, attribute, .. } => match frame.get(*place) {
                Some(Value::Object(Object::Namespace(namespace))) => namespace.set(attribute.clone(), value)?,
                _ => return Err(Error::runtime("cannot assign an attribute of something that is no namespace")),
            },
            Target::Tuple(targets) => {
                value.check_defined().or_else(|error| if targets.is_empty() { Ok(()) } else { Err(error) })?;
                let mut items = iterate(&value)
                    .map_err(|_| Error::runtime(format!("cannot unpack non-iterable {} object", value.type_name())))?;
                let expected = targets.len();
                for (found, target) in targets.iter().enumerate() {
                    let Some(item) = items.next()? else {
                        let message = format!("not enough values to unpack (expected {expected}, got {found})");
                        return Err(Error::runtime(message));
                    };
                    self.assign(target, item, frame, export)?;
                }
                if items.next()?.is_some() {
                    return Err(Error::runtime(format!("too many values to unpack (expected {expected})")));
                }
            }
        }
        Ok(())
    }
}
