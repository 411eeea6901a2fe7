//! The kernel module vhost.

use std::fs::read_to_string;

/// How many regions it takes in a memory table, if it says so.
pub(crate) fn max_regions() -> Option<usize> {
    let parameter = read_to_string("/sys/module/vhost/parameters/max_mem_regions");
    parameter.ok()?.trim().parse().ok()
}
