//! QEMU's syntax of options, `-object memory-backend-...`, in and out.
//!
//! What is accepted, and what it means, is QEMU 10.0's behaviour; an integration test compares
//! both.

mod backend_type;
mod pairs;
mod read;
mod values;
mod write;

pub(super) use backend_type::BackendType;
