//! What surrounds the work of all examples: the command line, what is printed, and the end.

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::failure::{Failure, OrFail, Result};

/// The usual width of a terminal.
const COLUMNS: usize = 80;

/// Reads the command line, does the work, and says what failed. `RUST_LOG` says what is logged, or
/// `log` if it is not set.
pub(crate) fn run<A: Parser>(
    name: &str,
    log: &str,
    work: impl FnOnce(&A) -> Result<()>,
) -> ExitCode {
    let log = env_logger::Env::default().default_filter_or(log);
    env_logger::Builder::from_env(log).init();
    let done = match A::try_parse() {
        Ok(args) => work(&args),
        Err(help) if !help.use_stderr() => {
            // As it is indented itself.
            let indent = |line: &str| line.len() - line.trim_start().len();
            print(&fold_lines(&help.render().to_string(), indent))
        }
        Err(error) => Err(usage(name, &error)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Where even that fails, the exit status is all that is left to say.
            let _ = writeln!(io::stderr(), "{name}: {failure}");
            failure.exit_code().into()
        }
    }
}

/// Writes a report to standard output. A reader that has seen enough is no error.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed.or_fail(|| "cannot print the report"),
    }
}

/// What clap says on several lines, on one.
fn usage(name: &str, error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let paragraph = text.lines().take_while(|line| !line.trim().is_empty());
    let line = paragraph.map(str::trim).collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    Failure::usage(format!("{line}; see {name} --help"))
}

/// Breaks lines that are too long, each as [`fold`] does.
pub(crate) fn fold_lines(text: &str, indent: impl Fn(&str) -> usize) -> String {
    let lines = text.lines().map(|line| fold(line, indent(line)));
    lines.map(|line| line + "\n").collect()
}

/// Breaks a line at blanks where it is too long; what follows is indented by `indent`. A word
/// that is too long for any line stays whole.
pub(crate) fn fold(line: &str, indent: usize) -> String {
    let mut folded = String::new();
    let mut rest = line.to_owned();
    loop {
        let blanks = rest.char_indices().enumerate();
        let blanks = blanks.filter(|(column, (_, c))| *c == ' ' && *column > indent);
        let mut blanks = blanks.map(|(column, (at, _))| (column, at)).peekable();
        let first = blanks.peek().copied();
        let last = blanks.take_while(|(column, _)| *column <= COLUMNS).last();
        match last.or(first) {
            Some((_, at)) if rest.chars().count() > COLUMNS => {
                folded += rest[..at].trim_end();
                folded.push('\n');
                rest = " ".repeat(indent) + rest[at..].trim_start();
            }
            _ => return folded + &rest,
        }
    }
}
