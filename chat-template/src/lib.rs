//! Renders the chat templates that come with language models.
//!
//! They are written for Python's Jinja2 as transformers sets it up: a sandbox in which lists and maps do not change,
//! `trim_blocks` and `lstrip_blocks`, `break` and `continue`, `{% generation %}`, a `tojson` that is `json.dumps`,
//! `raise_exception` and `strftime_now`. Values behave and print as Python's do.
//!
//! A template is foreign code. Everything that it can use up is bounded by [`Limits`], and compiling and rendering run
//! on a thread of their own, so that a template can neither exhaust the memory nor overflow the caller's stack.
//!
//! ```
//! use candle_pipeline_template::{Limits, Template};
//!
//! let source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}";
//! let template = Template::compile(source, &Limits::default())?;
//! let variables = serde_json::json!({"messages": [{"role": "user", "content": " Hi "}]});
//! assert_eq!(template.render(variables.as_object().unwrap())?, "<user>Hi");
//! # Ok::<(), candle_pipeline_template::Error>(())
//! ```

mod arguments;
mod ast;
mod checks;
mod error;
mod eval;
mod filters;
mod format;
mod lexer;
mod limits;
mod methods;
mod parser;
mod scope;
mod strftime;
mod template;
mod unicode;
mod value;

pub use self::error::{Error, ErrorKind, Result};
pub use self::limits::Limits;
pub use self::template::Template;
