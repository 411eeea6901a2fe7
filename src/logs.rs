//! Writing to the log, by macros that are named as those of `log`.
//!
//! The logger is the user's, and may panic: `eprintln!` does when standard error is closed. This
//! crate logs from the middle of changes and from `Drop`, where a panic would leave a thing half
//! done, or end the process. So a logger that panics has lost its line, and nothing else happens.

use std::fmt::Arguments;

use log::{Level, Record, STATIC_MAX_LEVEL};

use crate::panics::caught;

macro_rules! error_ {
    ($($args:tt)+) => { $crate::logs::write!(Error, $($args)+) };
}

macro_rules! warn_ {
    ($($args:tt)+) => { $crate::logs::write!(Warn, $($args)+) };
}

macro_rules! debug_ {
    ($($args:tt)+) => { $crate::logs::write!(Debug, $($args)+) };
}

macro_rules! write_ {
    ($level:ident, $($args:tt)+) => {
        $crate::logs::line(
            ::log::Level::$level,
            format_args!($($args)+),
            (module_path!(), file!(), line!()),
        )
    };
}

pub(crate) use {debug_ as debug, error_ as error, warn_ as warn, write_ as write};

/// Hands one line to the logger, from this module, file and line.
pub(crate) fn line(
    level: Level,
    args: Arguments<'_>,
    (module, file, line): (&'static str, &'static str, u32),
) {
    if level > STATIC_MAX_LEVEL || level > log::max_level() {
        return;
    }
    let record = || {
        log::logger().log(
            &Record::builder()
                .args(args)
                .level(level)
                .target(module)
                .module_path_static(Some(module))
                .file_static(Some(file))
                .line(Some(line))
                .build(),
        );
    };
    // Whatever it says about itself went to standard error already.
    let _ = caught(record);
}
