//! Why memory could not be given back.

/// Why memory could not be given back.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {}
