//! Backings of every kind: what they are, and what is refused.

use super::error::Result;
use super::*;
use crate::options::{BackingSource, OptionsError, PageSize, RamOptions};
use crate::range::InvalidRange;

fn create(options: &RamOptions, len: u64) -> Result<ShmBacking> {
    ShmBacking::create(options, len)
}

#[test]
fn a_created_backing_has_its_size_and_no_page() {
    for kind in [BackingSource::Memfd, BackingSource::PosixShm] {
        let backing = create(&RamOptions::new().with_backing(kind), 1 << 20).unwrap();
        assert_eq!(backing.file().metadata().unwrap().len(), 1 << 20);
        assert_eq!(backing.allocated().unwrap(), 0);
        assert_eq!(backing.page_size(), base_page_size());
    }
}

#[test]
fn a_bad_length_is_refused() {
    for kind in [BackingSource::Memfd, BackingSource::PosixShm] {
        let options = RamOptions::new().with_backing(kind);
        assert!(matches!(
            create(&options, 0),
            Err(BackingError::Length { len: 0, .. })
        ));
        assert!(matches!(
            create(&options, 5000),
            Err(BackingError::Range(InvalidRange::Unaligned {
                value: 5000,
                ..
            }))
        ));
        assert!(matches!(
            create(&options, 1 << 63),
            Err(BackingError::Length { .. })
        ));
    }
}

#[test]
fn huge_pages_of_posix_shm_are_refused() {
    let options = RamOptions::new()
        .with_backing(BackingSource::PosixShm)
        .with_page_size(PageSize::Huge(None));
    assert!(matches!(
        create(&options, 2 << 20),
        Err(BackingError::Options(OptionsError::NotOfBacking { .. }))
    ));
}

#[test]
fn a_huge_page_size_that_does_not_exist_is_refused() {
    let options = RamOptions::new().with_page_size(PageSize::Huge(Some(4 << 20)));
    assert!(matches!(
        create(&options, 4 << 20),
        Err(BackingError::NoSuchHugePageSize { page_size, .. }) if page_size == 4 << 20
    ));
}

#[test]
fn a_range_outside_the_backing_is_refused() {
    let page = base_page_size();
    let backing = create(&RamOptions::new(), 4 * page).unwrap();
    assert!(backing.check_inside(0, 4 * page).is_ok());
    assert!(matches!(
        backing.check_inside(page, 4 * page),
        Err(BackingError::Outside { .. })
    ));
    assert!(matches!(
        backing.check_inside(u64::MAX - page + 1, page),
        Err(BackingError::Outside { .. })
    ));
    assert!(matches!(
        backing.check_inside(1, page),
        Err(BackingError::Range(InvalidRange::Unaligned {
            value: 1,
            ..
        }))
    ));
}

#[test]
fn clones_are_the_same_file_and_others_are_not() {
    let one = create(&RamOptions::new(), 1 << 20).unwrap();
    let other = create(&RamOptions::new(), 1 << 20).unwrap();
    assert_eq!(one, one.clone());
    assert_ne!(one, other);
}
