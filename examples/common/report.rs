//! What a run did, for people: sections, and lines with names and values that fit in a terminal.

use std::fmt;

use crate::failure::Result;
use crate::rim::{self, fold};

/// Where the values begin.
const VALUES: usize = 20;

/// The lines of the report so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    text: String,
}

impl Report {
    /// A headline, and a blank line before it.
    pub(crate) fn section(&mut self, title: impl fmt::Display) {
        let gap = if self.text.is_empty() { "" } else { "\n" };
        self.add(&format!("{gap}{title}"), 2);
    }

    /// A line with a name and a value.
    pub(crate) fn line(&mut self, name: &str, value: impl fmt::Display) {
        self.add(&format!("  {name:<18}{value}"), VALUES);
    }

    /// A line that is indented by `indent` where it is too long.
    pub(crate) fn add(&mut self, line: &str, indent: usize) {
        self.text += &fold(line, indent);
        self.text.push('\n');
    }

    /// Writes the report to standard output.
    pub(crate) fn print(&self) -> Result<()> {
        rim::print(&self.text)
    }
}
