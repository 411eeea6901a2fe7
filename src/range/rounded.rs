//! Ranges rounded to whole pages.

use std::ops::Range;

/// The whole pages in `range`; an empty range at its end if it has none.
pub(crate) fn inwards(range: Range<u64>, page: u64) -> Range<u64> {
    let end = range.end - range.end % page;
    match range.start.checked_next_multiple_of(page) {
        Some(start) if start <= end => start..end,
        _ => range.end..range.end,
    }
}

/// All pages that have a part of `range`, up to the last one that ends before 2^64.
pub(crate) fn outwards(range: Range<u64>, page: u64) -> Range<u64> {
    let end = range.end.checked_next_multiple_of(page);
    range.start - range.start % page..end.unwrap_or(range.end - range.end % page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_lie_inside() {
        for (range, whole) in [
            (0..20, 0..20),
            (5..25, 10..20),
            (5..15, 10..10),
            (12..18, 18..18),
            (10..18, 10..10),
            (12..20, 20..20),
            (u64::MAX - 2..u64::MAX, u64::MAX..u64::MAX),
        ] {
            assert_eq!(inwards(range.clone(), 10), whole, "{range:?}");
        }
    }

    #[test]
    fn pages_with_a_part_lie_around() {
        for (range, around) in [
            (0..20, 0..20),
            (5..25, 0..30),
            (12..18, 10..20),
            (u64::MAX - 5..u64::MAX, u64::MAX - 5..u64::MAX - 5),
        ] {
            assert_eq!(outwards(range.clone(), 10), around, "{range:?}");
        }
    }
}
