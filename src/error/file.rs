//! Why a file cannot be RAM.

/// Why a file cannot be RAM.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum FileError {}
