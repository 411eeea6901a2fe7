//! Builds guest RAM from QEMU's memory backend options and says what came of it.

use std::io::{Write, stdout};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

mod args;
mod build;
mod json;
mod map;
mod text;

use args::Args;
use build::{Built, Result, one_line};

fn main() -> ExitCode {
    // What has no effect is in the report: the log is for those who ask for it.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("error")).init();
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            // --help is no error; clap's own status for errors is 2.
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            };
        }
    };
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("memdev: {line}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let backends = build::parse(&args.options)?;
    let built = build::build(backends, args.populate)?;
    let text =
        output(args, &built).map_err(|error| one_line("cannot ask for the facts", &error))?;
    // A reader that has seen enough is no error.
    match stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(one_line("cannot write the report", &error))
        }
        _ => Ok(()),
    }
}

fn output(args: &Args, built: &Built) -> guest_memory_shm::Result<String> {
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
    Ok(text)
}
