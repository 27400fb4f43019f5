//! Choices that change speed and nothing else.

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
