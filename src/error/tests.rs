//! The size of the sum of all errors.

use super::*;

#[test]
fn the_error_is_small_enough_to_return() {
    assert!(size_of::<Error>() <= 64, "{}", size_of::<Error>());
}
