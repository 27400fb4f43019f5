//! Values that are neither data nor text: functions, macros, loops, namespaces, ranges, views of maps.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::{Dict, Iter, Lazy, Text, Value, equal};
use crate::ast;
use crate::error::{Error, Result};
use crate::limits::{self, Charge};

#[derive(Clone)]
pub(crate) enum Object {
    Range(Range),
    View(Rc<View>),
    Lazy(Lazy),
    Namespace(Rc<Namespace>),
    Macro(Rc<MacroValue>),
    Loop(Rc<LoopState>),
    Global(Global),
    Method(Rc<BoundMethod>),
    Cycler(Rc<Cycler>),
    Joiner(Rc<Joiner>),
    /// `self` in a template: its attributes are blocks.
    This,
    Block(BlockRef),
}

/// A function or class that every template can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Global {
    Range,
    Dict,
    Lipsum,
    Cycler,
    Joiner,
    Namespace,
    RaiseException,
    StrftimeNow,
}

/// Python's `range`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: i128,
    pub(crate) stop: i128,
    pub(crate) step: i128,
}

impl Range {
    pub(crate) fn len(&self) -> usize {
        let (low, high, step) = if self.step > 0 {
            (self.start, self.stop, self.step)
        } else {
            (self.stop, self.start, self.step.saturating_neg())
        };
        if low >= high {
            return 0;
        }
        let span = high.saturating_sub(low).saturating_sub(1);
        usize::try_from(span / step + 1).unwrap_or(usize::MAX)
    }

    pub(crate) fn get(&self, index: usize) -> Option<Value> {
        (index < self.len()).then(|| Value::Int(self.start + self.step * index as i128))
    }

    pub(crate) fn position(&self, value: i128) -> Option<usize> {
        let offset = value.checked_sub(self.start)?;
        let fits = offset % self.step == 0 && offset / self.step >= 0;
        let index = usize::try_from(offset / self.step).ok()?;
        (fits && index < self.len()).then_some(index)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ViewKind {
    Keys,
    Values,
    Items,
}

impl ViewKind {
    pub(super) fn element(self, (key, value): &(Value, Value)) -> Result<Value> {
        match self {
            Self::Keys => Ok(key.clone()),
            Self::Values => Ok(value.clone()),
            Self::Items => Value::tuple(vec![key.clone(), value.clone()]),
        }
    }
}

/// What `keys()`, `values()` and `items()` of a map give.
pub(crate) struct View {
    pub(crate) dict: Rc<Dict>,
    pub(crate) kind: ViewKind,
}

/// Jinja's `namespace`: the only thing that a template can change.
pub(crate) struct Namespace {
    attributes: RefCell<Vec<(Text, Value)>>,
    _charge: Charge,
}

impl Namespace {
    pub(crate) fn new(attributes: Vec<(Text, Value)>) -> Result<Rc<Self>> {
        let charge = Charge::new(320 + attributes.len() * 96)?;
        let namespace = Rc::new(Self { attributes: RefCell::default(), _charge: charge });
        for (name, value) in attributes {
            namespace.set(name, value)?;
        }
        Ok(namespace)
    }

    pub(crate) fn get(&self, name: &str) -> Option<Value> {
        self.attributes.borrow().iter().find(|(other, _)| **other == *name).map(|(_, value)| value.clone())
    }

    pub(crate) fn set(&self, name: Text, value: Value) -> Result<()> {
        if name.starts_with('_') {
            let name = crate::error::excerpt(&name);
            return Err(Error::runtime(format!("a namespace cannot store `{name}`: it begins with an underscore")));
        }
        let mut attributes = self.attributes.borrow_mut();
        limits::step(attributes.len() / 4)?;
        let old = match attributes.iter_mut().find(|(other, _)| **other == *name) {
            Some((_, place)) => std::mem::replace(place, value),
            None => {
                attributes.push((name, value));
                Value::None
            }
        };
        // What the old value's end sets off may look at this namespace.
        drop(attributes);
        drop(old);
        Ok(())
    }

    pub(crate) fn entries(&self) -> Vec<(Text, Value)> {
        self.attributes.borrow().clone()
    }

    pub(crate) fn clear(&self) {
        let attributes = std::mem::take(&mut *self.attributes.borrow_mut());
        drop(attributes);
    }
}

/// The variables of a scope that was entered.
pub(crate) struct Frame {
    pub(crate) slots: RefCell<Vec<Option<Value>>>,
    pub(crate) parent: Option<Rc<Frame>>,
    pub(crate) _charge: Charge,
}

impl Frame {
    pub(crate) fn get(&self, place: ast::Place) -> Option<Value> {
        let mut frame = self;
        for _ in 0..place.up {
            frame = frame.parent.as_deref()?;
        }
        frame.slots.borrow().get(place.slot as usize)?.clone()
    }

    pub(crate) fn set(&self, place: ast::Place, value: Value) {
        let mut frame = self;
        for _ in 0..place.up {
            match frame.parent.as_deref() {
                Some(parent) => frame = parent,
                None => return,
            }
        }
        let old = frame.slots.borrow_mut().get_mut(place.slot as usize).and_then(|slot| slot.replace(value));
        drop(old);
    }

    pub(crate) fn clear(&self) {
        let slots = std::mem::take(&mut *self.slots.borrow_mut());
        drop(slots);
    }
}

/// A macro with the variables that it was defined among.
pub(crate) struct MacroValue {
    pub(crate) function: Arc<ast::Macro>,
    pub(crate) frame: Rc<Frame>,
}

/// The special variable `loop`.
pub(crate) struct LoopState {
    pub(crate) items: RefCell<Iter>,
    /// Length of what is iterated over, where it has one.
    pub(crate) length: Cell<Option<usize>>,
    /// Number of elements begun.
    pub(crate) begun: Cell<usize>,
    pub(crate) before: RefCell<Option<Value>>,
    pub(crate) current: RefCell<Option<Value>>,
    /// The next element, where it was looked at already.
    pub(crate) after: RefCell<Option<Value>>,
    pub(crate) ended: Cell<bool>,
    /// Whether the elements that are left need no look at the loop's condition.
    pub(crate) filtered: Cell<bool>,
    pub(crate) changed: RefCell<Option<Vec<Value>>>,
    /// The statement and its frame: for the loop's condition and for recursion; gone when the loop has ended.
    pub(crate) origin: RefCell<Option<(Arc<ast::For>, Rc<Frame>)>>,
    pub(crate) depth0: usize,
    pub(crate) value_depth: usize,
}

/// A method with its receiver.
pub(crate) struct BoundMethod {
    pub(crate) receiver: Value,
    pub(crate) name: &'static str,
}

pub(crate) struct Cycler {
    pub(crate) items: Vec<Value>,
    pub(crate) position: Cell<usize>,
    pub(crate) depth: usize,
    pub(crate) _charge: Charge,
}

pub(crate) struct Joiner {
    pub(crate) separator: Value,
    pub(crate) used: Cell<bool>,
}

/// A block as a function.
#[derive(Clone)]
pub(crate) struct BlockRef(pub(crate) Arc<str>);

impl Object {
    pub(crate) fn depth(&self) -> usize {
        match self {
            Self::View(view) => view.dict.depth + 1,
            Self::Lazy(lazy) => lazy.depth(),
            Self::Method(method) => method.receiver.depth() + 1,
            Self::Cycler(cycler) => cycler.depth,
            Self::Joiner(joiner) => joiner.separator.depth() + 1,
            Self::Loop(state) => state.value_depth,
            // Namespaces and frames are kept till the end of the rendering and emptied one by one.
            _ => 0,
        }
    }

    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Self::Range(_) => "range",
            Self::View(view) => match view.kind {
                ViewKind::Keys => "dict_keys",
                ViewKind::Values => "dict_values",
                ViewKind::Items => "dict_items",
            },
            Self::Lazy(lazy) if lazy.kind().contains("do_") => "generator",
            Self::Lazy(lazy) => lazy.kind(),
            Self::Namespace(_) => "Namespace",
            Self::Macro(_) => "Macro",
            Self::Loop(_) => "LoopContext",
            Self::Global(Global::Cycler | Global::Joiner | Global::Namespace) => "type",
            Self::Global(_) => "function",
            Self::Method(_) => "builtin_function_or_method",
            Self::Cycler(_) => "Cycler",
            Self::Joiner(_) => "Joiner",
            Self::This => "TemplateReference",
            Self::Block(_) => "BlockReference",
        }
    }

    pub(crate) fn truth(&self) -> bool {
        match self {
            Self::Range(range) => range.len() != 0,
            Self::View(view) => !view.dict.is_empty(),
            // A loop has a length, which is not 0 while its body runs.
            _ => true,
        }
    }

    pub(crate) fn is_callable(&self) -> bool {
        matches!(
            self,
            Self::Macro(_) | Self::Loop(_) | Self::Global(_) | Self::Method(_) | Self::Joiner(_) | Self::Block(_)
        )
    }

    pub(crate) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Range(a), Self::Range(b)) => a == b,
            (Self::View(a), Self::View(b)) => Rc::ptr_eq(a, b),
            (Self::Lazy(a), Self::Lazy(b)) => a.same(b),
            (Self::Namespace(a), Self::Namespace(b)) => Rc::ptr_eq(a, b),
            (Self::Macro(a), Self::Macro(b)) => Rc::ptr_eq(a, b),
            (Self::Loop(a), Self::Loop(b)) => Rc::ptr_eq(a, b),
            (Self::Global(a), Self::Global(b)) => a == b,
            (Self::Method(a), Self::Method(b)) => Rc::ptr_eq(a, b),
            (Self::Cycler(a), Self::Cycler(b)) => Rc::ptr_eq(a, b),
            (Self::Joiner(a), Self::Joiner(b)) => Rc::ptr_eq(a, b),
            (Self::This, Self::This) => true,
            _ => false,
        }
    }

    pub(crate) fn equal(&self, other: &Self) -> Result<bool> {
        match (self, other) {
            (Self::Range(a), Self::Range(b)) => {
                let length = a.len();
                Ok(length == b.len() && (length == 0 || a.start == b.start && (length == 1 || a.step == b.step)))
            }
            (Self::View(a), Self::View(b)) if a.kind == b.kind && a.kind != ViewKind::Values => {
                let (a, b) = (&a.dict, &b.dict);
                if a.len() != b.len() {
                    return Ok(false);
                }
                for (key, value) in a.entries() {
                    match b.get(key)? {
                        Some(other) if matches!(self, Self::View(view) if view.kind == ViewKind::Keys) => {
                            let _ = other;
                        }
                        Some(other) if equal(value, other)? => {}
                        _ => return Ok(false),
                    }
                }
                Ok(true)
            }
            (Self::Method(a), Self::Method(b)) => Ok(a.name == b.name && a.receiver.same(&b.receiver)),
            _ => Ok(self.same(other)),
        }
    }
}
