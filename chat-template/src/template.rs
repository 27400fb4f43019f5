//! The public face: compiles and renders on threads with a stack of their own.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use crate::ast::Tree;
use crate::error::{Error, ErrorKind, Result};
use crate::eval::Evaluator;
use crate::limits::{self, Limits, STACK};
use crate::value::from_json;
use crate::{lexer, parser, scope};

/// A compiled template. Clones share it, and threads may render it at the same time.
#[derive(Clone)]
pub struct Template {
    tree: Arc<Tree>,
    limits: Limits,
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Template").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Template {
    /// Compiles a template. The limits count for its renderings as well.
    pub fn compile(source: &str, limits: &Limits) -> Result<Self> {
        let limits = limits.within_stack();
        if source.len() > limits.source {
            return Err(Error::limit("source", limits.source));
        }
        let tree = apart("template-compile", || {
            let tokens = lexer::tokenize(source)?;
            let parsed = parser::parse(tokens, limits.nesting)?;
            scope::resolve(parsed)
        })?;
        Ok(Self { tree: Arc::new(tree), limits })
    }

    /// The text that the template makes of these variables.
    pub fn render(&self, variables: &serde_json::Map<String, serde_json::Value>) -> Result<String> {
        apart("template-render", || {
            limits::start(self.limits);
            let mut values = HashMap::with_capacity(variables.len());
            for (name, value) in variables {
                values.insert(Arc::from(name.as_str()), from_json(value)?);
            }
            Evaluator::new(&self.tree, values).render()
        })
    }
}

/// Runs a task on a thread with a large stack. A panic becomes an error.
fn apart<T: Send>(name: &str, task: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let internal = |reason: String| Error::new(ErrorKind::Internal, reason);
    let caught = || catch_unwind(AssertUnwindSafe(task)).unwrap_or_else(|panic| Err(internal(panic_text(&*panic))));
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn_scoped(scope, caught);
        match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| Err(internal(panic_text(&*panic)))),
            Err(error) => Err(internal(format!("no thread for the template: {error}"))),
        }
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the template engine failed ({}); please report the template", text.unwrap_or("no message"))
}
