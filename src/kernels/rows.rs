//! The rows of a step, shared out over a pool's threads.

use super::pool::Pool;

/// Values below which waking other threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 14;

/// Rows of some width that lie one after the other.
pub struct RowsMut<'a, T> {
    values: &'a mut [T],
    width: usize,
}

impl<'a, T> RowsMut<'a, T> {
    /// Rows of `width` values.
    pub fn new(values: &'a mut [T], width: usize) -> Self {
        assert!(width > 0 && values.len().is_multiple_of(width), "{} values are no rows of {width}", values.len());
        RowsMut { values, width }
    }
}

/// Calls `work(i, row i of each buffer)` for each row, on several threads when there is enough to do.
pub fn each_row<T: Send, const N: usize>(
    pool: &Pool,
    buffers: [RowsMut<'_, T>; N],
    work: impl Fn(usize, [&mut [T]; N]) + Sync,
) {
    let rows = buffers[0].values.len() / buffers[0].width;
    for buffer in &buffers {
        // Whole rows, see `new`: a division cannot wrap as a product could.
        assert!(buffer.values.len() / buffer.width == rows, "buffers with different numbers of rows");
    }
    let values = buffers.iter().fold(0usize, |sum, buffer| sum.saturating_add(buffer.values.len()));
    let starts = Starts(buffers.map(|buffer| (buffer.values.as_mut_ptr(), buffer.width)));
    let row = |i: usize| {
        let starts = &starts;
        // SAFETY: row `i` lies within each buffer, which are borrowed for the whole call, and each row is given out once.
        work(i, starts.0.map(|(start, width)| unsafe { std::slice::from_raw_parts_mut(start.add(i * width), width) }));
    };
    match values < PARALLEL_FROM {
        true => (0..rows).for_each(row),
        false => pool.for_each(rows, row),
    }
}

/// Where buffers start, and the width of their rows.
struct Starts<T, const N: usize>([(*mut T, usize); N]);
// SAFETY: threads write different rows.
unsafe impl<T: Send, const N: usize> Sync for Starts<T, N> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "buffers with different numbers of rows")]
    fn buffers_with_different_numbers_of_rows_are_refused() {
        // Rows times width is 2^64 here, and of bytes as many can be had.
        let mut long = vec![0u8; 1 << 32];
        let buffers = [RowsMut::new(&mut long, 1), RowsMut::new(&mut [], 1 << 32)];
        each_row(&Pool::new(1).unwrap(), buffers, |_, [_, row]| row[0] = 1);
    }

    #[test]
    #[should_panic(expected = "0 values are no rows of 0")]
    fn rows_without_values_are_refused() {
        RowsMut::<f32>::new(&mut [], 0);
    }

    #[test]
    fn every_row_of_every_buffer_is_given_out_once() {
        let pool = Pool::new(3).unwrap();
        for rows in [0, 1, 7, 3000] {
            let (mut a, mut b) = (vec![0f32; rows * 5], vec![0f32; rows * 2]);
            each_row(&pool, [RowsMut::new(&mut a, 5), RowsMut::new(&mut b, 2)], |i, [a, b]| {
                a.iter_mut().for_each(|v| *v += i as f32);
                b.iter_mut().for_each(|v| *v -= i as f32);
            });
            assert!(a.iter().enumerate().all(|(i, &v)| v == (i / 5) as f32));
            assert!(b.iter().enumerate().all(|(i, &v)| v == -((i / 2) as f32)));
        }
    }
}
