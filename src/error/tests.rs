//! The size of the sum of all errors, and what it is asked.

use vm_memory::GuestAddress;

use super::*;
use crate::shortage::ResourceLimit;

#[test]
fn the_error_is_small_enough_to_return() {
    assert!(size_of::<Error>() <= 64, "{}", size_of::<Error>());
}

#[test]
fn a_shortage_is_found_wherever_it_stopped_something() {
    let shortage = || Shortage::new(2, 1, ResourceLimit::Descriptors { limit: 5 });
    let of_memory = || MemoryError::from(BackingError::from(shortage()));
    let of_region = ReceiveError::Region {
        index: 0,
        range: (GuestAddress(0), 1 << 20),
        cause: of_memory().into(),
    };
    let errors = [
        Error::from(shortage()),
        of_memory().into(),
        of_region.into(),
        #[cfg(feature = "vhost-user")]
        ShareError::Log(of_memory().into()).into(),
    ];
    for error in errors {
        let found = error.shortage().map(|found| (found.needed, found.left));
        assert_eq!(found, Some((2, 1)), "{error:?}");
    }
}
