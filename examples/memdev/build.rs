//! From option strings to RAM.

use std::ops::ControlFlow;

use guest_memory_shm::{
    Access, BuildReport, GuestMemoryShm, GuestRom, OnShortage, Populate, PopulateOptions,
    RamOptions,
};
use indicatif::{ProgressBar, ProgressStyle};
use vm_memory::GuestAddress;

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

/// An error, as one line.
pub(crate) type Result<T> = std::result::Result<T, String>;

/// Reads all strings before anything is built.
pub(crate) fn parse(texts: &[String]) -> Result<Vec<Backend>> {
    let mut next = 0u64;
    let mut backends: Vec<Backend> = Vec::new();
    for (at, text) in texts.iter().enumerate() {
        let options: RamOptions = text.parse().map_err(|error| one_line(text, &error))?;
        let id = options.name().map_or(format!("m{at}"), str::to_owned);
        if backends.iter().any(|backend| backend.id == id) {
            return Err(format!(
                "{text}: id={id} is that of another backend: choose another one"
            ));
        }
        let start = GuestAddress(next);
        let end = options.size().and_then(|size| next.checked_add(size));
        next = end
            .and_then(|end| end.checked_next_multiple_of(SPACING))
            .ok_or_else(|| {
                format!("{text}: size is more than the guest addresses that are left")
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
            let rom = GuestRom::new(backend.start, size, &named);
            backend.rom = Some(rom.map_err(|error| one_line(&backend.id, &error))?);
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
        builder = builder.with_ram(options, [(backend.start, size)]);
        ram = true;
    }
    let (memory, report) = if ram {
        let built = builder.build_with_report();
        built.map_err(|error| one_line("cannot build the RAM", &error))?
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
    let bar = ProgressBar::new(0);
    let template =
        "populating {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let shown = bar.clone();
    let options = PopulateOptions::new(Populate::Prefault)
        .with_on_shortage(on_shortage)
        .with_progress(move |progress| {
            shown.set_length(progress.total);
            shown.set_position(progress.done);
            ControlFlow::Continue(())
        });
    let populated = memory.populate(options);
    bar.finish_and_clear();
    populated
        .map(|_| ())
        .map_err(|error| one_line("cannot populate the RAM", &error))
}

/// What failed, and the whole chain of causes.
pub(crate) fn one_line(what: &str, error: &dyn std::error::Error) -> String {
    let mut line = format!("{what}: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    // Paths may contain anything.
    line.replace(char::is_control, " ")
}
