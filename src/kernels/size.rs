//! Sizes that unsafe code relies on, computed without wrapping: in a release build `+` and `*` would give a small number
//! for a size that no memory has, and what was checked against it would lie outside.

/// The product of sizes, if memory can have it.
pub(super) fn product_of(factors: &[usize]) -> Option<usize> {
    let product = factors.iter().try_fold(1usize, |product, factor| product.checked_mul(*factor));
    product.filter(|product| isize::try_from(*product).is_ok())
}

/// The product of sizes. Panics, naming `what` and the sizes, if memory cannot have it.
#[track_caller]
#[inline]
pub(super) fn product<const N: usize>(what: &str, factors: [usize; N]) -> usize {
    product_of(&factors).unwrap_or_else(|| panic!("{what}: {factors:?} multiplied is more than memory can have"))
}

/// The end of `len` from `start` on. Panics, naming `what` and the sizes, if there is none.
#[track_caller]
#[inline]
pub(super) fn end(what: &str, start: usize, len: usize) -> usize {
    start.checked_add(len).unwrap_or_else(|| panic!("{what}: {len} from {start} on end beyond any number"))
}

/// Bytes of `len` values of type `T`. Panics, naming `what` and the length, if memory cannot have them.
#[track_caller]
#[inline]
pub(super) fn bytes_of<T>(what: &str, len: usize) -> usize {
    product(what, [len, size_of::<T>()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_memory_has_are_computed() {
        assert_eq!(product("rows", [3, 5, 7]), 105);
        assert_eq!(product("rows", [usize::MAX, 0]), 0);
        assert_eq!(product_of(&[]), Some(1));
        assert_eq!(product_of(&[isize::MAX as usize, 1]), Some(isize::MAX as usize));
        assert_eq!((end("rows", 3, 4), end("rows", usize::MAX, 0)), (7, usize::MAX));
        assert_eq!(bytes_of::<u64>("words", 3), 24);
    }

    #[test]
    fn sizes_beyond_memory_are_none() {
        for factors in [[usize::MAX, 2], [1 << 32, 1 << 32], [1 << 32, 1 << 31], [usize::MAX / 2 + 1, 1]] {
            assert_eq!(product_of(&factors), None, "{factors:?}");
        }
        assert_eq!(product_of(&[usize::MAX, 2, 0]), None);
    }

    #[test]
    #[should_panic(expected = "rows: [4294967296, 4294967296] multiplied is more than memory can have")]
    fn a_product_beyond_memory_is_refused_with_its_factors() {
        product("rows", [1 << 32, 1 << 32]);
    }

    #[test]
    #[should_panic(expected = "positions: 2 from 18446744073709551615 on end beyond any number")]
    fn an_end_beyond_any_number_is_refused() {
        end("positions", usize::MAX, 2);
    }

    #[test]
    #[should_panic(expected = "attempt to add with overflow")]
    #[cfg(debug_assertions)]
    fn debug_builds_of_kernels_check_arithmetic() {
        let most = std::hint::black_box(usize::MAX);
        std::hint::black_box(most + std::hint::black_box(1));
    }
}
