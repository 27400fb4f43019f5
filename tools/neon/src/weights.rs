//! The stored types.

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum WeightType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

use WeightType::*;

impl WeightType {
    pub const ALL: [WeightType; 13] = [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K];

    /// Elements and bytes of a block, and where its two-byte floats lie.
    pub fn layout(self) -> (usize, usize, &'static [usize]) {
        match self {
            F32 => (1, 4, &[]),
            F16 | BF16 => (1, 2, &[]),
            Q4_0 => (32, 18, &[0]),
            Q4_1 => (32, 20, &[0, 2]),
            Q5_0 => (32, 22, &[0]),
            Q5_1 => (32, 24, &[0, 2]),
            Q8_0 => (32, 34, &[0]),
            Q2_K => (256, 84, &[80, 82]),
            Q3_K => (256, 110, &[108]),
            Q4_K => (256, 144, &[0, 2]),
            Q5_K => (256, 176, &[0, 2]),
            Q6_K => (256, 210, &[208]),
        }
    }

    pub fn ggml(self) -> WeightType {
        self
    }

    pub fn block_size(self) -> usize {
        self.layout().0
    }

    pub fn type_size(self) -> usize {
        self.layout().1
    }

    pub fn bytes_for(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_size()) {
            return None;
        }
        (elements / self.block_size()).checked_mul(self.type_size())
    }

    pub fn is_dense(self) -> bool {
        self.block_size() == 1
    }
}

impl std::fmt::Display for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}
