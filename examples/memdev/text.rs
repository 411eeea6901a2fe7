//! The report for people: what `info memdev` prints, then facts in columns.

use std::fmt::Write;

use guest_memory_shm::{CoreDump, MemoryStats, Populate, RamOptions, Reserve};
use indicatif::BinaryBytes;
use vm_memory::GuestMemoryBackend;

use crate::build::{Backend, Built};

/// All of the report.
pub(crate) fn report(built: &Built, stats: &MemoryStats) -> String {
    let mut text = String::new();
    for backend in &built.backends {
        text += &info_memdev(&backend.id, &backend.options);
    }
    text.push('\n');
    for backend in &built.backends {
        if let Some(rom) = &backend.rom {
            let _ = writeln!(
                text,
                "{}: a ROM of {} at {:#x}, which no memory table has: {}",
                backend.id,
                BinaryBytes(rom.range().size()),
                rom.range().start_addr().0,
                rom.backing().kind(),
            );
        }
    }
    let facts = stats.to_string();
    if built.memory.num_regions() > 0 {
        let _ = writeln!(text, "{facts}");
    }
    // Notes about a region stand in its facts already.
    for (backing, note) in built.report.notes() {
        if !facts.contains(&note.to_string()) {
            let _ = writeln!(text, "{backing}: {note}");
        }
    }
    text
}

/// What QEMU's monitor prints for `info memdev`, down to the spaces.
fn info_memdev(id: &str, options: &RamOptions) -> String {
    let nodes: Vec<String> = options
        .numa()
        .nodes()
        .iter()
        .map(|node| node.to_string())
        .collect();
    format!(
        "memory backend: {id}\n  size:  {}\n  merge: {}\n  dump: {}\n  prealloc: {}\n\
         \x20 share: true\n  reserve: {}\n  policy: {}\n  host nodes: {}\n",
        options.size().unwrap_or_default(),
        merge(options),
        options.core_dump() == CoreDump::Include,
        options.populate() == Populate::Prefault,
        options.reserve() != Some(Reserve::Off),
        options.numa().name(),
        nodes.join(" "),
    )
}

/// QEMU merges unless told otherwise, which has no effect on shared memory there either.
pub(crate) fn merge(options: &RamOptions) -> bool {
    options.merge() != Some(false)
}

/// The heading of a backend's map.
pub(crate) fn heading(backend: &Backend) -> String {
    format!("{} from {:#x}", backend.id, backend.start.0)
}
