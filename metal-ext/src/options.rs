//! Choices that change speed and nothing else.

/// How the kernels of this crate are used. The default suits every GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetalExtOptions {
    /// Threads of a threadgroup in products.
    pub columns_per_threadgroup: ColumnsPerThreadgroup,
    /// Whose softmax prefill uses; a decode step's is part of its attention.
    pub softmax_backend: SoftmaxBackend,
    /// Whether decode steps take the fused path where types and shapes allow it.
    pub fused: bool,
}

impl Default for MetalExtOptions {
    fn default() -> Self {
        MetalExtOptions {
            columns_per_threadgroup: ColumnsPerThreadgroup::default(),
            softmax_backend: SoftmaxBackend::default(),
            fused: true,
        }
    }
}

/// Whose softmax.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SoftmaxBackend {
    /// candle's, until a measurement on a Mac says that this crate's is faster; `softmax_backend_benchmark` compares them.
    #[default]
    Auto,
    /// This crate's, on rows that it takes (a multiple of 4 values); candle's on others.
    Kernel,
    /// candle's kernel for Metal. There is no MPS behind it.
    Candle,
}

impl std::str::FromStr for SoftmaxBackend {
    type Err = crate::Error;

    fn from_str(name: &str) -> crate::Result<Self> {
        match name {
            "auto" => Ok(SoftmaxBackend::Auto),
            "kernel" | "compute" | "pipeline" => Ok(SoftmaxBackend::Kernel),
            "candle" | "metal" | "mps" => Ok(SoftmaxBackend::Candle),
            _ => Err(crate::Error::unsupported(
                "softmax backend",
                format!("`{name}` is none of auto, kernel (compute, pipeline) and candle (metal, mps)"),
            )),
        }
    }
}

/// Simdgroups of a threadgroup in a matrix-vector product: 64, 128 or 256 threads. Each computes a group of neighbouring
/// columns of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ColumnsPerThreadgroup {
    /// 64 threads.
    Two,
    /// 128 threads.
    #[default]
    Four,
    /// 256 threads.
    Eight,
}

impl ColumnsPerThreadgroup {
    /// All of them.
    pub const ALL: [ColumnsPerThreadgroup; 3] =
        [ColumnsPerThreadgroup::Two, ColumnsPerThreadgroup::Four, ColumnsPerThreadgroup::Eight];

    pub(crate) fn simdgroups(self) -> usize {
        match self {
            ColumnsPerThreadgroup::Two => 2,
            ColumnsPerThreadgroup::Four => 4,
            ColumnsPerThreadgroup::Eight => 8,
        }
    }
}

impl TryFrom<usize> for ColumnsPerThreadgroup {
    type Error = crate::Error;

    fn try_from(columns: usize) -> crate::Result<Self> {
        ColumnsPerThreadgroup::ALL.into_iter().find(|choice| choice.simdgroups() == columns).ok_or_else(|| {
            crate::Error::unsupported("columns per threadgroup", format!("{columns} is none of 2, 4 and 8"))
        })
    }
}
