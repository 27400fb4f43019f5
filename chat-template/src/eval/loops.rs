//! `for` loops and the special variable `loop`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::{Evaluator, Flow, Kept};
use crate::arguments::CallArgs;
use crate::ast::{For, Place};
use crate::error::{Error, Result};
use crate::limits;
use crate::value::{Frame, LoopState, Object, Text, Value, equal, iterate, length};

impl Evaluator<'_> {
    pub(super) fn for_loop(&mut self, node: &Arc<For>, frame: &Rc<Frame>) -> Result<Flow> {
        let items = self.eval(&node.iter, frame)?;
        if node.recursive {
            let text = self.capture(|this| this.run_loop(node, frame, &items, 0).map(drop))?;
            self.out.push_str(&text)?;
            return Ok(Flow::Next);
        }
        self.run_loop(node, frame, &items, 0)
    }

    /// Runs a loop. What its `else` does to an outer loop is passed on.
    fn run_loop(&mut self, node: &Arc<For>, frame: &Rc<Frame>, items: &Value, depth0: usize) -> Result<Flow> {
        let origin = (node.filter.is_some() || node.recursive).then(|| (node.clone(), frame.clone()));
        let known = if node.filter.is_none() { length(items)? } else { None };
        let state = Rc::new(LoopState {
            items: RefCell::new(iterate(items)?),
            length: Cell::new(known),
            begun: Cell::new(0),
            before: RefCell::default(),
            current: RefCell::default(),
            after: RefCell::default(),
            ended: Cell::new(false),
            filtered: Cell::new(node.filter.is_none()),
            changed: RefCell::default(),
            origin: RefCell::new(origin),
            depth0,
            value_depth: 1 + items.depth(),
        });
        limits::check_value_depth(state.value_depth)?;
        let result = self.run_bodies(node, frame, &state);
        // The frame may hold the loop, so the loop must not hold the frame for good.
        drop(state.origin.take());
        result
    }

    fn run_bodies(&mut self, node: &For, frame: &Rc<Frame>, state: &Rc<LoopState>) -> Result<Flow> {
        let mut completed = false;
        while let Some(item) = self.loop_next(state)? {
            let before = state.current.replace(Some(item.clone()));
            drop(state.before.replace(before));
            state.begun.set(state.begun.get() + 1);
            let inner = self.enter(&node.scoped.slots, Some(frame))?;
            inner.set(Place { up: 0, slot: node.loop_slot }, Value::Object(Object::Loop(state.clone())));
            self.assign(&node.target, item, &inner, false)?;
            match self.run(&node.scoped.body, &inner)? {
                Flow::Next => completed = true,
                Flow::Continue => {}
                Flow::Break => break,
            }
        }
        match &node.otherwise {
            // Jinja notes at the end of the body that there was an iteration: `continue` and `break` skip that.
            Some(otherwise) if !completed => self.run_scoped(otherwise, frame),
            _ => Ok(Flow::Next),
        }
    }

    /// The next element that the loop's condition lets through.
    fn loop_next(&mut self, state: &LoopState) -> Result<Option<Value>> {
        if let Some(item) = state.after.take() {
            return Ok(Some(item));
        }
        if state.ended.get() {
            return Ok(None);
        }
        loop {
            let item = state.items.borrow_mut().next()?;
            let Some(item) = item else {
                state.ended.set(true);
                return Ok(None);
            };
            if state.filtered.get() {
                return Ok(Some(item));
            }
            let origin = state.origin.borrow().clone();
            let Some((node, frame)) = origin else { return Ok(Some(item)) };
            let Some(filter) = &node.filter else { return Ok(Some(item)) };
            let inner = self.enter(&filter.slots, Some(&frame))?;
            self.assign(&filter.target, item.clone(), &inner, false)?;
            if self.eval(&filter.test, &inner)?.truth() {
                return Ok(Some(item));
            }
        }
    }

    fn loop_peek(&mut self, state: &LoopState) -> Result<Option<Value>> {
        if state.after.borrow().is_none() {
            let next = self.loop_next(state)?;
            drop(state.after.replace(next));
        }
        Ok(state.after.borrow().clone())
    }

    /// Number of elements. Where it is not known, all that are left are looked at.
    fn loop_length(&mut self, state: &LoopState) -> Result<usize> {
        if let Some(length) = state.length.get() {
            return Ok(length);
        }
        let mut rest = Vec::new();
        while let Some(item) = self.loop_next(state)? {
            rest.push(item);
        }
        let length = state.begun.get() + rest.len();
        state.length.set(Some(length));
        let rest = Value::list(rest)?;
        *state.items.borrow_mut() = iterate(&rest)?;
        state.ended.set(false);
        // These have passed the condition.
        state.filtered.set(true);
        Ok(length)
    }

    /// An attribute of `loop`; `None` where it has no such attribute.
    pub(crate) fn loop_attribute(&mut self, state: &Rc<LoopState>, name: &str) -> Result<Option<Value>> {
        let begun = state.begun.get();
        let int = |value: usize| Value::Int(value as i128);
        Ok(Some(match name {
            "index" => int(begun),
            "index0" => Value::Int(begun as i128 - 1),
            "first" => Value::Bool(begun == 1),
            "last" => Value::Bool(self.loop_peek(state)?.is_none()),
            "length" => int(self.loop_length(state)?),
            "revindex" => Value::Int(self.loop_length(state)? as i128 - begun as i128 + 1),
            "revindex0" => Value::Int(self.loop_length(state)? as i128 - begun as i128),
            "depth" => int(state.depth0 + 1),
            "depth0" => int(state.depth0),
            "previtem" => match begun {
                0 | 1 => Value::hint("there is no previous item"),
                _ => state.before.borrow().clone().unwrap_or(Value::None),
            },
            "nextitem" => self.loop_peek(state)?.unwrap_or_else(|| Value::hint("there is no next item")),
            _ => return Ok(None),
        }))
    }

    /// `loop.cycle` and `loop.changed`.
    pub(super) fn loop_method(&mut self, state: &Rc<LoopState>, name: &str, arguments: CallArgs) -> Result<Value> {
        if let Some((name, _)) = arguments.keywords.first() {
            return Err(Error::runtime(format!("unexpected keyword argument '{}'", crate::error::excerpt(name))));
        }
        let values = arguments.positional;
        if name == "cycle" {
            if values.is_empty() {
                return Err(Error::runtime("no items for cycling given"));
            }
            let at = (state.begun.get().max(1) - 1) % values.len();
            return Ok(values[at].clone());
        }
        let old = state.changed.borrow().clone();
        let same = match old {
            None => {
                self.kept.push(Kept::Loop(state.clone()));
                false
            }
            Some(old) => {
                let mut same = old.len() == values.len();
                for (a, b) in old.iter().zip(&values) {
                    same = same && equal(a, b)?;
                }
                same
            }
        };
        if !same {
            drop(state.changed.replace(Some(values)));
        }
        Ok(Value::Bool(!same))
    }

    /// `loop(items)` in a recursive loop.
    pub(super) fn loop_call(&mut self, state: &Rc<LoopState>, arguments: CallArgs) -> Result<Value> {
        let [items] = arguments.bind("loop", ["iterable"], 1)?;
        let items = items.unwrap_or(Value::None);
        let origin = state.origin.borrow().clone();
        match origin {
            Some((node, frame)) if node.recursive => {
                let depth = state.depth0 + 1;
                let text: Text =
                    self.deeper(|this| this.capture(|this| this.run_loop(&node, &frame, &items, depth).map(drop)))?;
                Ok(Value::Str(text))
            }
            _ => Err(Error::runtime("the loop must have the 'recursive' marker to be called recursively")),
        }
    }
}
