//! QEMU's syntax of options, `-object memory-backend-...`, in and out.
//!
//! What is accepted, and what it means, is QEMU 10.0's behaviour; an integration test compares both.

mod kind;
mod pairs;
mod read;
mod values;
mod write;
