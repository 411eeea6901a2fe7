//! Cases that are known to fail: none is to be left.

/// Patterns of cases (see `play::is_like`), each with what happens. They are played only with
/// `FAULTS_KNOWN=1`.
pub(super) const KNOWN: &[(&str, &str)] = &[
    (
        "madvise(23) #1+ EAGAIN",
        "populating tries again for as long as the kernel says EAGAIN",
    ),
    (
        "futex(133) #1+ EAGAIN",
        "so does touching pages on Linux before 5.14",
    ),
];
