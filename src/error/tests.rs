//! The texts of errors, which people act on.

use super::*;

#[test]
fn texts_name_the_values_and_the_way_out() {
    let cases: Vec<(Error, &str)> = vec![
        (
            Error::NoSuchHugePageSize {
                page_size: 3 << 20,
                offered: vec![2 << 20, 1 << 30],
            },
            "huge pages of 3 MiB are not offered by this kernel, which has 2 MiB, 1 GiB",
        ),
        (
            Error::ShmUnavailable {
                source: io::Error::from_raw_os_error(30),
            },
            "cannot create POSIX shared memory: /dev/shm is read-only, remount it read-write; \
             or use a memfd backing",
        ),
    ];
    for (error, text) in cases {
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn the_error_is_small_enough_to_return() {
    assert!(size_of::<Error>() <= 64, "{}", size_of::<Error>());
    assert!(size_of::<AdoptError>() <= 16);
}
