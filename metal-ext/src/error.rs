//! What can go wrong.

/// An error of this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape, a type or an offset that the kernels do not take.
    #[error("{what}: {reason}")]
    Unsupported {
        /// Which kernel or argument.
        what: String,
        /// What it takes instead.
        reason: String,
    },
    /// The GPU, its compiler, or what stands in for them.
    #[error("{kernel}: {message}")]
    Gpu {
        /// The kernel.
        kernel: String,
        /// The message.
        message: String,
    },
}

/// The result of encoding.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What a kernel does not take, and why.
    pub fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Unsupported { what: what.into(), reason: reason.into() }
    }
}
