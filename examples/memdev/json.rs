//! The report for programs. All sizes are in bytes.

use guest_memory_shm::{CoreDump, MemoryStats, Populate, RegionStats, Reserve};
use serde_json::{Value, json};
use vm_memory::GuestMemoryBackend;

use crate::build::{Backend, Built};
use crate::text::merge;

pub(crate) fn report(built: &Built, stats: &MemoryStats) -> Value {
    let backends: Vec<Value> = built
        .backends
        .iter()
        .map(|backend| {
            let region = stats
                .regions
                .iter()
                .find(|region| region.range.start_addr() == backend.start);
            json!({
                "info": info(backend),
                "options": backend.options.to_string(),
                "region": region.map(facts),
                "rom": backend.rom.is_some(),
            })
        })
        .collect();
    let nodes: Vec<Value> = stats
        .nodes
        .iter()
        .map(|(node, allocated)| json!({ "node": node, "allocated": allocated }))
        .collect();
    let notes: Vec<Value> = built
        .report
        .notes()
        .map(|(backing, note)| {
            json!({
                "backend": backing,
                "property": note.property(),
                "text": note.to_string(),
            })
        })
        .collect();
    json!({
        "backends": backends,
        "regions": built.memory.num_regions(),
        "size": stats.size(),
        "allocated": stats.allocated(),
        "huge": stats.huge(),
        "unlocated": stats.unlocated,
        "locked": stats.locked,
        "nodes": nodes,
        "notes": notes,
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
        "host-nodes": options.numa().nodes().iter().collect::<Vec<_>>(),
    })
}

fn facts(region: &RegionStats) -> Value {
    json!({
        "start": region.range.start_addr().0,
        "size": region.size(),
        "kind": region.kind.to_string(),
        "page-size": region.page_size,
        "allocated": region.allocated,
        "huge": region.huge,
        "seals": region.seals.to_string(),
    })
}
