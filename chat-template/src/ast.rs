//! The syntax tree. Names carry the place of their variable, which the pass in `scope.rs` fills in.

use std::sync::Arc;

use crate::value::Text;

/// Where a variable is: so many frames up, in this slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) up: u32,
    pub(crate) slot: u32,
}

#[derive(Debug)]
pub(crate) struct Expr {
    pub(crate) kind: ExprKind,
    pub(crate) line: u32,
    /// Levels of expressions below, itself included.
    pub(crate) height: usize,
}

#[derive(Debug, Clone)]
pub(crate) enum Literal {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Text),
}

#[derive(Debug)]
pub(crate) enum ExprKind {
    Literal(Literal),
    Name {
        name: Arc<str>,
        place: Place,
    },
    Tuple(Vec<Expr>),
    List(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Unary(Unary, Box<Expr>),
    Binary(Binary, Box<Expr>, Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    Concat(Vec<Expr>),
    Conditional {
        test: Box<Expr>,
        yes: Box<Expr>,
        no: Option<Box<Expr>>,
    },
    Attribute(Box<Expr>, Text),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<Expr>, Box<[Option<Expr>; 3]>),
    /// The input is missing in filter blocks, where it is the block's text.
    Filter {
        input: Option<Box<Expr>>,
        name: Arc<str>,
        arguments: Box<Arguments>,
    },
    Test {
        input: Box<Expr>,
        name: Arc<str>,
        arguments: Box<Arguments>,
    },
    Call(Box<Expr>, Box<Arguments>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unary {
    Not,
    Negative,
    Positive,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Binary {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    NotIn,
}

#[derive(Debug, Default)]
pub(crate) struct Arguments {
    pub(crate) positional: Vec<Expr>,
    pub(crate) keywords: Vec<(Text, Expr)>,
    pub(crate) star: Option<Expr>,
    pub(crate) double_star: Option<Expr>,
}

impl Arguments {
    pub(crate) fn expressions(&self) -> impl Iterator<Item = &Expr> {
        let keywords = self.keywords.iter().map(|(_, value)| value);
        self.positional.iter().chain(keywords).chain(&self.star).chain(&self.double_star)
    }

    pub(crate) fn expressions_mut(&mut self) -> impl Iterator<Item = &mut Expr> {
        let keywords = self.keywords.iter_mut().map(|(_, value)| value);
        self.positional.iter_mut().chain(keywords).chain(&mut self.star).chain(&mut self.double_star)
    }
}

/// What is assigned to.
#[derive(Debug)]
pub(crate) enum Target {
    Name {
        name: Arc<str>,
        place: Place,
    },
    Tuple(Vec<Target>),
    /// An attribute of a namespace.
    Attribute {
        namespace: Arc<str>,
        place: Place,
        attribute: Text,
    },
}

/// How a variable of a scope begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Load {
    /// Set by whoever enters the scope.
    Parameter,
    /// Looked up among the variables of the rendering.
    Resolve,
    /// A copy of an outer variable.
    Alias(Place),
    Undefined,
}

#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) name: Arc<str>,
    pub(crate) load: Load,
}

/// Statements with variables of their own.
#[derive(Debug, Default)]
pub(crate) struct Scoped {
    pub(crate) slots: Vec<Slot>,
    pub(crate) body: Vec<Stmt>,
}

#[derive(Debug)]
pub(crate) struct Stmt {
    pub(crate) kind: StmtKind,
    pub(crate) line: u32,
}

#[derive(Debug)]
pub(crate) enum StmtKind {
    Text(Text),
    Print(Expr),
    /// `export`: the variables can be seen in blocks.
    Assign {
        target: Target,
        value: Expr,
        export: bool,
    },
    AssignBlock {
        target: Target,
        filter: Option<Expr>,
        scoped: Scoped,
        export: bool,
    },
    If {
        branches: Vec<(Expr, Vec<Stmt>)>,
        otherwise: Vec<Stmt>,
    },
    For(Arc<For>),
    With {
        targets: Vec<(Target, Expr)>,
        scoped: Scoped,
    },
    FilterBlock {
        filter: Expr,
        scoped: Scoped,
    },
    Macro {
        function: Arc<Macro>,
        place: Place,
        export: bool,
    },
    CallBlock {
        call: Expr,
        caller: Arc<Macro>,
    },
    /// `{% generation %}`, which transformers adds: marks what the assistant said and changes nothing in the text.
    Generation(Scoped),
    Scope(Scoped),
    Block {
        name: Arc<str>,
        required: bool,
        locals: Option<Vec<(Arc<str>, Place)>>,
    },
    /// `include`, `import`, `from` and `extends`: there is nothing to load from.
    NoLoader(&'static str),
    Break,
    Continue,
}

#[derive(Debug)]
pub(crate) struct For {
    pub(crate) target: Target,
    pub(crate) iter: Expr,
    /// The condition, with the scope in which it is evaluated and the target's places in that scope.
    pub(crate) filter: Option<LoopFilter>,
    pub(crate) recursive: bool,
    pub(crate) scoped: Scoped,
    /// Slot of the special variable `loop`.
    pub(crate) loop_slot: u32,
    pub(crate) otherwise: Option<Scoped>,
    pub(crate) line: u32,
}

#[derive(Debug)]
pub(crate) struct LoopFilter {
    pub(crate) target: Target,
    pub(crate) slots: Vec<Slot>,
    pub(crate) test: Expr,
}

#[derive(Debug)]
pub(crate) struct Macro {
    pub(crate) name: Option<Arc<str>>,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) scoped: Scoped,
    /// Slots of the special variables that the body uses.
    pub(crate) caller: Option<u32>,
    pub(crate) kwargs: Option<u32>,
    pub(crate) varargs: Option<u32>,
    pub(crate) line: u32,
}

#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) name: Arc<str>,
    pub(crate) slot: u32,
    pub(crate) default: Option<Expr>,
}

/// A `{% block %}`: rendered where it stands and by `self.name()`.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) scoped: Scoped,
    pub(crate) this: Option<u32>,
    pub(crate) parent: Option<u32>,
}

#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) root: Scoped,
    /// Slot of `self` in the root.
    pub(crate) this: Option<u32>,
    pub(crate) blocks: std::collections::HashMap<Arc<str>, Block>,
}
