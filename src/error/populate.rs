//! Why RAM could not be populated.

/// Why RAM could not be populated.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum PopulateError {}
