//! Gives every variable its place, by Jinja's rules of scoping, and makes the checks that its compiler makes.
//!
//! A scope knows all its variables before it is entered. One that is set in a scope hides an outer one from the start
//! and begins as its copy; one that is only read belongs to the outermost scope that mentions it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::ast::{Block, Expr, ExprKind, For, Load, Macro, Place, Scoped, Slot, Stmt, StmtKind, Target, Tree};
use crate::error::{Error, Result};
use crate::parser::{Parsed, for_each_child, for_each_child_mut};
use crate::{checks, filters};

/// One scope while it is analysed.
#[derive(Default)]
struct Level {
    slots: Vec<Slot>,
    /// Slots by name; only visible ones exist for the part of the template that is being analysed.
    names: HashMap<Arc<str>, (u32, bool)>,
    stores: HashSet<Arc<str>>,
    /// Names that became visible and names that were stored, in order, so that a branch can be taken back.
    journal: Vec<(Arc<str>, bool)>,
}

/// What a branch of an `if` added to its scope.
#[derive(Default)]
struct Branch {
    names: Vec<(Arc<str>, Load)>,
    stores: Vec<Arc<str>>,
}

impl Level {
    fn define(&mut self, name: &Arc<str>, load: Load) -> u32 {
        let next = self.slots.len() as u32;
        let (slot, visible) = self.names.entry(name.clone()).or_insert((next, false));
        if !*visible {
            *visible = true;
            self.journal.push((name.clone(), false));
        }
        match *slot == next {
            true => self.slots.push(Slot { name: name.clone(), load }),
            false => self.slots[*slot as usize].load = load,
        }
        *slot
    }

    fn add_store(&mut self, name: &Arc<str>) {
        if self.stores.insert(name.clone()) {
            self.journal.push((name.clone(), true));
        }
    }

    fn slot(&self, name: &str) -> Option<u32> {
        self.names.get(name).and_then(|&(slot, visible)| visible.then_some(slot))
    }

    fn take_back(&mut self, mark: usize) -> Branch {
        let mut branch = Branch::default();
        for (name, is_store) in self.journal.split_off(mark) {
            if is_store {
                self.stores.remove(&name);
                branch.stores.push(name);
            } else if let Some((slot, visible)) = self.names.get_mut(&name) {
                *visible = false;
                branch.names.push((name, self.slots[*slot as usize].load.clone()));
            }
        }
        branch
    }
}

/// Resolves a parsed template.
pub(crate) fn resolve(parsed: Parsed) -> Result<Tree> {
    let mut blocks = HashMap::new();
    for block in &parsed.blocks {
        if blocks.insert(block.name.clone(), None).is_some() {
            return Err(Error::syntax(format!("block `{}` is defined twice", block.name), block.line));
        }
    }
    let mut body = parsed.body;
    let mut resolver = Resolver { levels: vec![Level::default()], in_for: 0 };
    let this = resolver.special("self", &body);
    resolver.statements(&body);
    resolver.resolve_statements(&mut body, State { export: true, ..State::default() })?;
    let root = resolver.leave(body);

    for block in parsed.blocks {
        let mut body = block.body;
        let mut resolver = Resolver { levels: vec![Level::default()], in_for: 0 };
        let this = resolver.special("self", &body);
        let parent = resolver.special("super", &body);
        resolver.statements(&body);
        resolver.resolve_statements(&mut body, State::default())?;
        blocks.insert(block.name, Some(Block { scoped: resolver.leave(body), this, parent }));
    }
    let blocks = blocks.into_iter().filter_map(|(name, block)| Some((name, block?))).collect();
    Ok(Tree { root, this, blocks })
}

struct Resolver {
    levels: Vec<Level>,
    /// `for` loops around, in whose targets and bodies `loop` cannot be assigned to.
    in_for: usize,
}

/// Where a statement stands.
#[derive(Clone, Copy, Default)]
struct State {
    /// At the top level, also within an `if`: assignments are seen by blocks.
    export: bool,
    /// Within an `if`: a missing filter is an error when it is used, not before.
    soft: bool,
    in_loop: bool,
}

impl State {
    fn inner(self) -> Self {
        Self { export: false, soft: false, ..self }
    }

    /// Within something that Jinja makes a function of.
    fn function() -> Self {
        Self::default()
    }
}

impl Resolver {
    fn level(&mut self) -> &mut Level {
        let last = self.levels.len() - 1;
        &mut self.levels[last]
    }

    fn enter(&mut self) {
        self.levels.push(Level::default());
    }

    fn leave(&mut self, body: Vec<Stmt>) -> Scoped {
        Scoped { slots: self.levels.pop().unwrap_or_default().slots, body }
    }

    fn find(&self, name: &str, from: usize) -> Option<Place> {
        let levels = self.levels.iter().rev().skip(from).enumerate();
        levels.into_iter().find_map(|(up, level)| Some(Place { up: (up + from) as u32, slot: level.slot(name)? }))
    }

    fn parameter(&mut self, name: &Arc<str>) -> u32 {
        self.level().add_store(name);
        self.level().define(name, Load::Parameter)
    }

    /// Declares a special variable where the statements use it before they set it.
    fn special(&mut self, name: &str, body: &[Stmt]) -> Option<u32> {
        let mut names = vec![name];
        let mut used = HashSet::new();
        undeclared(body, &mut names, &mut used);
        used.contains(name).then(|| self.parameter(&name.into()))
    }

    fn load(&mut self, name: &Arc<str>) {
        if self.find(name, 0).is_none() {
            self.level().define(name, Load::Resolve);
        }
    }

    fn store(&mut self, name: &Arc<str>) {
        self.level().add_store(name);
        if self.level().slot(name).is_none() {
            let load = self.find(name, 1).map_or(Load::Undefined, Load::Alias);
            self.level().define(name, load);
        }
    }

    // The analysis: which variables a scope has. It stops at inner scopes.

    fn statements(&mut self, body: &[Stmt]) {
        for stmt in body {
            self.statement(stmt);
        }
    }

    fn statement(&mut self, stmt: &Stmt) {
        match &stmt.kind {
            StmtKind::Print(value) => self.expression(value),
            StmtKind::Assign { target, value, .. } => {
                self.expression(value);
                self.stored(target);
            }
            StmtKind::AssignBlock { target, .. } => self.stored(target),
            StmtKind::If { branches, otherwise } => self.if_chain(branches, otherwise),
            StmtKind::For(node) => self.expression(&node.iter),
            StmtKind::With { targets, .. } => targets.iter().for_each(|(_, value)| self.expression(value)),
            StmtKind::FilterBlock { filter, .. } => self.expression(filter),
            StmtKind::Macro { function, .. } => {
                if let Some(name) = &function.name {
                    self.store(name);
                }
            }
            StmtKind::CallBlock { call, .. } => self.expression(call),
            StmtKind::Text(_)
            | StmtKind::Generation(_)
            | StmtKind::Scope(_)
            | StmtKind::Block { .. }
            | StmtKind::NoLoader(_)
            | StmtKind::Break
            | StmtKind::Continue => {}
        }
    }

    fn if_chain(&mut self, branches: &[(Expr, Vec<Stmt>)], otherwise: &[Stmt]) {
        let mut parts = Vec::new();
        let mut branches = branches.iter();
        if let Some((test, body)) = branches.next() {
            self.expression(test);
            parts.push(self.branch(|resolver| resolver.statements(body)));
        }
        parts.push(self.branch(|resolver| {
            for (test, body) in branches {
                resolver.expression(test);
                let part = resolver.branch(|resolver| resolver.statements(body));
                resolver.merge(vec![part]);
            }
        }));
        parts.push(self.branch(|resolver| resolver.statements(otherwise)));
        self.merge(parts);
    }

    /// Analyses a branch as if the others did not exist.
    fn branch(&mut self, visit: impl FnOnce(&mut Self)) -> Branch {
        let mark = self.level().journal.len();
        visit(self);
        self.level().take_back(mark)
    }

    fn merge(&mut self, branches: Vec<Branch>) {
        for (name, load) in branches.iter().flat_map(|branch| &branch.names) {
            self.level().define(name, load.clone());
        }
        for name in branches.iter().flat_map(|branch| &branch.stores) {
            if self.level().stores.contains(name) {
                continue;
            }
            self.level().add_store(name);
            let load = self.find(name, 1).map_or(Load::Resolve, Load::Alias);
            self.level().define(name, load);
        }
    }

    fn stored(&mut self, target: &Target) {
        match target {
            Target::Name { name, .. } => self.store(name),
            Target::Tuple(items) => items.iter().for_each(|item| self.stored(item)),
            Target::Attribute { namespace, .. } => self.load(namespace),
        }
    }

    fn parameters_of(&mut self, target: &Target) {
        match target {
            Target::Name { name, .. } => {
                self.parameter(name);
            }
            Target::Tuple(items) => items.iter().for_each(|item| self.parameters_of(item)),
            Target::Attribute { namespace, .. } => self.load(namespace),
        }
    }

    fn expression(&mut self, expr: &Expr) {
        if let ExprKind::Name { name, .. } = &expr.kind {
            self.load(name);
        }
        for_each_child(&expr.kind, &mut |child| self.expression(child));
    }

    // The second pass: places, inner scopes and checks.

    fn resolve_statements(&mut self, body: &mut [Stmt], state: State) -> Result<()> {
        for stmt in body {
            self.resolve_statement(stmt, state)?;
        }
        Ok(())
    }

    fn resolve_statement(&mut self, stmt: &mut Stmt, state: State) -> Result<()> {
        let line = stmt.line;
        match &mut stmt.kind {
            StmtKind::Text(_) | StmtKind::NoLoader(_) => {}
            StmtKind::Print(value) => self.resolve_expression(value, state.soft)?,
            StmtKind::Assign { target, value, export } => {
                self.resolve_expression(value, state.soft)?;
                self.resolve_target(target, line)?;
                *export = state.export;
            }
            StmtKind::AssignBlock { target, filter, scoped, export } => {
                self.enter();
                self.statements(&scoped.body);
                filter.iter().for_each(|filter| self.expression(filter));
                self.resolve_statements(&mut scoped.body, state.inner())?;
                filter.iter_mut().try_for_each(|filter| self.resolve_expression(filter, false))?;
                *scoped = self.leave(std::mem::take(&mut scoped.body));
                self.resolve_target(target, line)?;
                *export = state.export;
            }
            StmtKind::If { branches, otherwise } => {
                let state = State { soft: true, ..state };
                for (test, body) in branches {
                    self.resolve_expression(test, true)?;
                    self.resolve_statements(body, state)?;
                }
                self.resolve_statements(otherwise, state)?;
            }
            StmtKind::For(node) => {
                let node = unshared(node, line)?;
                self.in_for += 1;
                self.resolve_for(node, state)?;
                self.in_for -= 1;
            }
            StmtKind::With { targets, scoped } => {
                targets.iter_mut().try_for_each(|(_, value)| self.resolve_expression(value, state.soft))?;
                self.enter();
                targets.iter().for_each(|(target, _)| self.parameters_of(target));
                self.statements(&scoped.body);
                targets.iter_mut().try_for_each(|(target, _)| self.resolve_target(target, line))?;
                self.resolve_statements(&mut scoped.body, state.inner())?;
                *scoped = self.leave(std::mem::take(&mut scoped.body));
            }
            StmtKind::FilterBlock { filter, scoped } => {
                self.enter();
                self.statements(&scoped.body);
                self.expression(filter);
                self.resolve_statements(&mut scoped.body, state.inner())?;
                self.resolve_expression(filter, false)?;
                *scoped = self.leave(std::mem::take(&mut scoped.body));
            }
            StmtKind::Macro { function, place, export } => {
                let function = unshared(function, line)?;
                self.resolve_macro(function)?;
                if let Some(name) = &function.name {
                    *place = self.place(name);
                }
                *export = state.export;
            }
            StmtKind::CallBlock { call, caller } => {
                self.resolve_macro(unshared(caller, line)?)?;
                self.resolve_expression(call, state.soft)?;
            }
            StmtKind::Generation(scoped) => self.resolve_scoped(scoped, State::function())?,
            StmtKind::Scope(scoped) => self.resolve_scoped(scoped, state.inner())?,
            StmtKind::Block { locals: Some(locals), .. } => {
                let mut seen = HashSet::new();
                for (up, level) in self.levels.iter().rev().enumerate() {
                    let stores = level.stores.iter().filter(|name| seen.insert((*name).clone()));
                    locals.extend(
                        stores
                            .filter_map(|name| Some((name.clone(), Place { up: up as u32, slot: level.slot(name)? }))),
                    );
                }
            }
            StmtKind::Block { .. } => {}
            StmtKind::Break | StmtKind::Continue => {
                if !state.in_loop {
                    return Err(Error::syntax("`break` and `continue` belong in a loop", line));
                }
            }
        }
        Ok(())
    }

    fn resolve_scoped(&mut self, scoped: &mut Scoped, state: State) -> Result<()> {
        self.enter();
        self.statements(&scoped.body);
        self.resolve_statements(&mut scoped.body, state)?;
        *scoped = self.leave(std::mem::take(&mut scoped.body));
        Ok(())
    }

    fn resolve_for(&mut self, node: &mut For, state: State) -> Result<()> {
        self.resolve_expression(&mut node.iter, state.soft)?;
        if let Some(filter) = &mut node.filter {
            self.enter();
            self.parameters_of(&filter.target);
            self.expression(&filter.test);
            self.resolve_target(&mut filter.target, node.line)?;
            self.resolve_expression(&mut filter.test, false)?;
            filter.slots = self.leave(Vec::new()).slots;
        }
        // A recursive loop is a function, whose loop is in it.
        let inner = if node.recursive { State::function() } else { state.inner() };
        self.enter();
        node.loop_slot = self.parameter(&"loop".into());
        self.parameters_of(&node.target);
        self.statements(&node.scoped.body);
        self.resolve_target(&mut node.target, node.line)?;
        self.resolve_statements(&mut node.scoped.body, State { in_loop: true, ..inner })?;
        node.scoped = self.leave(std::mem::take(&mut node.scoped.body));
        if let Some(otherwise) = &mut node.otherwise {
            self.resolve_scoped(otherwise, inner)?;
        }
        Ok(())
    }

    fn resolve_macro(&mut self, node: &mut Macro) -> Result<()> {
        self.enter();
        for parameter in &mut node.parameters {
            parameter.slot = self.parameter(&parameter.name);
        }
        node.parameters.iter().filter_map(|parameter| parameter.default.as_ref()).for_each(|d| self.expression(d));
        self.statements(&node.scoped.body);

        let mut used = HashSet::new();
        undeclared(&node.scoped.body, &mut vec!["caller", "kwargs", "varargs"], &mut used);
        let explicit = |name: &str| node.parameters.iter().find(|parameter| *parameter.name == *name);
        if used.contains("caller") {
            match explicit("caller") {
                Some(parameter) if parameter.default.is_none() => {
                    let message = "the special argument `caller` must be omitted or have a default";
                    return Err(Error::syntax(message, node.line));
                }
                Some(parameter) => node.caller = Some(parameter.slot),
                None => node.caller = Some(self.parameter(&"caller".into())),
            }
        }
        for (name, slot) in [("kwargs", &mut node.kwargs), ("varargs", &mut node.varargs)] {
            if used.contains(name) && explicit(name).is_none() {
                *slot = Some(self.parameter(&name.into()));
            }
        }

        for parameter in &mut node.parameters {
            parameter.default.iter_mut().try_for_each(|default| self.resolve_expression(default, false))?;
        }
        self.resolve_statements(&mut node.scoped.body, State::function())?;
        node.scoped = self.leave(std::mem::take(&mut node.scoped.body));
        Ok(())
    }

    /// Every name has a place once its scope is analysed.
    fn place(&self, name: &str) -> Place {
        self.find(name, 0).unwrap_or_default()
    }

    fn resolve_target(&mut self, target: &mut Target, line: u32) -> Result<()> {
        match target {
            Target::Name { name, place } => {
                if self.in_for > 0 && **name == *"loop" {
                    return Err(Error::syntax("cannot assign to the special variable `loop`", line));
                }
                *place = self.place(name);
            }
            Target::Tuple(items) => {
                for item in items {
                    self.resolve_target(item, line)?;
                }
            }
            Target::Attribute { namespace, place, .. } => *place = self.place(namespace),
        }
        Ok(())
    }

    fn resolve_expression(&mut self, expr: &mut Expr, soft: bool) -> Result<()> {
        let line = expr.line;
        let soft = soft || matches!(expr.kind, ExprKind::Conditional { .. });
        match &mut expr.kind {
            ExprKind::Name { name, place } => *place = self.place(name),
            ExprKind::Filter { name, .. } if !soft && !filters::exists(name) => {
                return Err(Error::syntax(format!("no filter named `{}`", crate::error::excerpt(name)), line));
            }
            ExprKind::Test { name, .. } if !soft && !checks::exists(name) => {
                return Err(Error::syntax(format!("no test named `{}`", crate::error::excerpt(name)), line));
            }
            _ => {}
        }
        let mut result = Ok(());
        for_each_child_mut(&mut expr.kind, &mut |child| {
            if result.is_ok() {
                result = self.resolve_expression(child, soft);
            }
        });
        result
    }
}

/// Nodes are shared with macros and loops only when the template runs.
fn unshared<T>(node: &mut Arc<T>, line: u32) -> Result<&mut T> {
    Arc::get_mut(node).ok_or_else(|| Error::syntax("a node is shared before the template is compiled", line))
}

/// Which of the names are read before they are set, anywhere in the statements but not in blocks.
fn undeclared<'n>(body: &[Stmt], names: &mut Vec<&'n str>, used: &mut HashSet<&'n str>) {
    for stmt in body {
        if names.iter().all(|name| used.contains(name)) {
            return;
        }
        match &stmt.kind {
            StmtKind::Print(value) => undeclared_in(value, names, used),
            StmtKind::Assign { target, value, .. } => {
                forget(target, names);
                undeclared_in(value, names, used);
            }
            StmtKind::AssignBlock { target, filter, scoped, .. } => {
                forget(target, names);
                filter.iter().for_each(|filter| undeclared_in(filter, names, used));
                undeclared(&scoped.body, names, used);
            }
            StmtKind::If { branches, otherwise } => {
                for (test, body) in branches {
                    undeclared_in(test, names, used);
                    undeclared(body, names, used);
                }
                undeclared(otherwise, names, used);
            }
            StmtKind::For(node) => {
                forget(&node.target, names);
                undeclared_in(&node.iter, names, used);
                undeclared(&node.scoped.body, names, used);
                node.otherwise.iter().for_each(|otherwise| undeclared(&otherwise.body, names, used));
                node.filter.iter().for_each(|filter| undeclared_in(&filter.test, names, used));
            }
            StmtKind::With { targets, scoped } => {
                targets.iter().for_each(|(target, _)| forget(target, names));
                targets.iter().for_each(|(_, value)| undeclared_in(value, names, used));
                undeclared(&scoped.body, names, used);
            }
            StmtKind::FilterBlock { filter, scoped } => {
                undeclared(&scoped.body, names, used);
                undeclared_in(filter, names, used);
            }
            StmtKind::Macro { function, .. } => undeclared_in_macro(function, names, used),
            StmtKind::CallBlock { call, caller } => {
                undeclared_in(call, names, used);
                undeclared_in_macro(caller, names, used);
            }
            StmtKind::Generation(scoped) | StmtKind::Scope(scoped) => undeclared(&scoped.body, names, used),
            StmtKind::Text(_)
            | StmtKind::Block { .. }
            | StmtKind::NoLoader(_)
            | StmtKind::Break
            | StmtKind::Continue => {}
        }
    }
}

fn undeclared_in_macro<'n>(node: &Macro, names: &mut Vec<&'n str>, used: &mut HashSet<&'n str>) {
    names.retain(|name| !node.parameters.iter().any(|parameter| *parameter.name == **name));
    let defaults = node.parameters.iter().filter_map(|parameter| parameter.default.as_ref());
    defaults.for_each(|default| undeclared_in(default, names, used));
    undeclared(&node.scoped.body, names, used);
}

fn undeclared_in<'n>(expr: &Expr, names: &[&'n str], used: &mut HashSet<&'n str>) {
    if let ExprKind::Name { name, .. } = &expr.kind {
        used.extend(names.iter().find(|other| ***other == **name));
    }
    for_each_child(&expr.kind, &mut |child| undeclared_in(child, names, used));
}

fn forget(target: &Target, names: &mut Vec<&str>) {
    match target {
        Target::Name { name, .. } => names.retain(|other| **other != **name),
        Target::Tuple(items) => items.iter().for_each(|item| forget(item, names)),
        Target::Attribute { .. } => {}
    }
}
