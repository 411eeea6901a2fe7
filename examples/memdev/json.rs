//! The report for programs. All sizes are in bytes.

use guest_memory_shm::{CoreDump, MemoryStats, Populate, Reserve};
use serde_json::{Value, json};

use crate::build::{Backend, Built};
use crate::text::merge;

pub(crate) fn report(built: &Built, stats: &MemoryStats) -> Value {
    let backend = |backend: &Backend| {
        json!({
            "info": info(backend),
            "options": backend.options,
            "start": backend.start.0,
            "rom": backend.rom.is_some(),
        })
    };
    json!({
        "backends": built.backends.iter().map(backend).collect::<Vec<_>>(),
        "size": stats.size(),
        "allocated": stats.allocated(),
        "huge": stats.huge(),
        "stats": stats,
        "notes": built.report,
    })
}

/// The fields of `info memdev`, named as QEMU's query-memdev names them.
fn info(backend: &Backend) -> Value {
    let options = &backend.options;
    json!({
        "id": backend.id,
        "size": options.size(),
        "merge": merge(options),
        "dump": options.core_dump() == CoreDump::Include,
        "prealloc": options.populate() == Populate::Prefault,
        "share": true,
        "reserve": options.reserve() != Some(Reserve::Off),
        "policy": options.numa().name(),
        "host-nodes": options.numa().nodes(),
    })
}
