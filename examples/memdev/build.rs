//! From option strings to RAM.

use guest_memory_shm::{
    Access, BuildReport, GuestMemoryShm, GuestRom, OnShortage, Populate, PopulateOptions,
    RamOptions,
};
use vm_memory::GuestAddress;

use crate::bar::with_bar;
use crate::failure::{Failure, OrFail, Result};

/// Where the next backing may start: each begins at a whole GiB.
const SPACING: u64 = 1 << 30;

/// What the option strings became.
pub(crate) struct Built {
    pub(crate) backends: Vec<Backend>,
    /// All that is RAM.
    pub(crate) memory: GuestMemoryShm,
    pub(crate) report: BuildReport,
}

/// One option string.
pub(crate) struct Backend {
    /// Its id, or one made up.
    pub(crate) id: String,
    pub(crate) options: RamOptions,
    pub(crate) start: GuestAddress,
    /// The mapping, if it is read-only and so no part of the memory.
    pub(crate) rom: Option<GuestRom>,
}

/// Reads all strings before anything is built.
pub(crate) fn parse(texts: &[String]) -> Result<Vec<Backend>> {
    let mut next = 0u64;
    let mut backends: Vec<Backend> = Vec::new();
    for (at, text) in texts.iter().enumerate() {
        let options = text.parse::<RamOptions>().or_fail(|| text);
        let options = options.map_err(Failure::into_usage)?;
        let id = options.name().map_or(format!("m{at}"), str::to_owned);
        if backends.iter().any(|backend| backend.id == id) {
            return Err(Failure::usage(format!(
                "{text}: id={id} is that of another backend: choose another one"
            )));
        }
        let start = GuestAddress(next);
        let end = options.size().and_then(|size| next.checked_add(size));
        next = end
            .and_then(|end| end.checked_next_multiple_of(SPACING))
            .ok_or_else(|| {
                let problem = "size is more than the guest addresses that are left";
                Failure::usage(format!("{text}: {problem}"))
            })?;
        backends.push(Backend {
            id,
            options,
            start,
            rom: None,
        });
    }
    Ok(backends)
}

/// Builds all backends; with `populate` lazily, to be populated under a progress bar.
pub(crate) fn build(mut backends: Vec<Backend>, populate: bool) -> Result<Built> {
    let mut builder = GuestMemoryShm::builder();
    let mut ram = false;
    let mut on_shortage = OnShortage::Refuse;
    for backend in &mut backends {
        let named = backend.options.clone().with_name(&backend.id);
        let size = named.size().unwrap_or_default();
        if named.access() == Access::ReadOnly {
            let rom = GuestRom::new((backend.start, size), &named);
            backend.rom = Some(rom.or_fail(|| backend.id.clone())?);
            continue;
        }
        if named.on_shortage() == OnShortage::TryAnyway {
            on_shortage = OnShortage::TryAnyway;
        }
        let options = if populate {
            named.with_populate(Populate::Lazy)
        } else {
            named
        };
        builder = builder.add_ram(options, [(backend.start, size)]);
        ram = true;
    }
    let (memory, report) = if ram {
        let built = builder.build_with_report();
        built.or_fail(|| "cannot build the RAM")?
    } else {
        (GuestMemoryShm::new(), BuildReport::default())
    };
    if populate && ram {
        fault_in(&memory, on_shortage)?;
    }
    Ok(Built {
        backends,
        memory,
        report,
    })
}

/// All of the RAM together, and so anyway if that is asked for with any of it.
fn fault_in(memory: &GuestMemoryShm, on_shortage: OnShortage) -> Result<()> {
    let populated = with_bar("populating", 0, |bar| {
        let shown = bar.clone();
        let options = PopulateOptions::new(Populate::Prefault)
            .with_on_shortage(on_shortage)
            .with_progress(move |progress| {
                shown.set_length(progress.total);
                shown.set_position(progress.done);
            });
        memory.populate(options)
    });
    populated.or_fail(|| "cannot populate the RAM").map(drop)
}
