//! Cases that are known to fail: none is to be left.

/// Patterns of cases (see `play::is_like`), each with what happens. They are played only with
/// `FAULTS_KNOWN=1`.
pub(super) const KNOWN: &[(&str, &str)] = &[];
