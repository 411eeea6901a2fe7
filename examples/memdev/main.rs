//! Builds guest RAM from QEMU's memory backend options and reports what it became.

use std::process::ExitCode;

mod args;
#[path = "../common/bar.rs"]
mod bar;
mod build;
#[path = "../common/ending.rs"]
mod ending;
#[path = "../common/failure.rs"]
mod failure;
mod json;
mod map;
#[path = "../common/rim.rs"]
mod rim;
mod text;

use args::Args;
use build::Built;
use failure::{OrFail, Result, Words};
use rim::fold_lines;

/// The remedies of the crate's errors, in the words of the options.
const WORDS: Words = &[
    ("use a memfd backing", "use memory-backend-memfd"),
    ("use BackingSource::File", "use memory-backend-file"),
    (
        "(OnShortage::TryAnyway, on-shortage=try-anyway)",
        "(on-shortage=try-anyway)",
    ),
];

fn main() -> ExitCode {
    // What has no effect is in the report: the log is for those who ask for it.
    rim::run("memdev", "error", run)
}

fn run(args: &Args) -> Result<()> {
    ending::watch()?;
    let backends = build::parse(&args.options)?;
    let built = build::build(backends, args.populate)?;
    let text = output(args, &built).or_fail(|| "cannot ask for the facts")?;
    rim::print(&text)
}

fn output(args: &Args, built: &Built) -> std::result::Result<String, guest_memory_shm::Error> {
    let stats = built.memory.stats()?;
    if args.json {
        return Ok(format!("{:#}\n", json::report(built, &stats)));
    }
    let mut text = text::report(built, &stats);
    if args.map {
        let heading = |start| {
            let backend = built.backends.iter().find(|backend| backend.start == start);
            backend.map(text::heading).unwrap_or_default()
        };
        text.push('\n');
        text += &map::draw(&built.memory, |range| heading(range.start_addr()))?;
    }
    Ok(fold_lines(&text, |_| 2))
}
