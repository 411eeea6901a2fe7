//! Sizes for people: `4 GiB` where that is exact, with the bytes beside it where it is not.

use std::fmt;

/// A number of bytes that prints in binary units.
#[derive(Clone, Copy)]
pub(crate) struct HumanSize(pub(crate) u64);

const UNITS: [(u64, &str); 6] = [
    (1 << 60, "EiB"),
    (1 << 50, "PiB"),
    (1 << 40, "TiB"),
    (1 << 30, "GiB"),
    (1 << 20, "MiB"),
    (1 << 10, "KiB"),
];

impl fmt::Display for HumanSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The largest unit that divides the size exactly, unless that needs a long number.
        let exact = UNITS
            .iter()
            .find(|(unit, _)| self.0 >= *unit && self.0.is_multiple_of(*unit));
        f.pad(&match (exact, rounded(self.0)) {
            (Some((unit, name)), _) if self.0 / unit < 10_000 => {
                format!("{} {name}", self.0 / unit)
            }
            (_, Some(rounded)) => format!("{rounded} ({} bytes)", self.0),
            (_, None) => Counted(self.0, "byte").to_string(),
        })
    }
}

/// In the largest binary unit, with one decimal, rounded down; none below the smallest.
fn rounded(bytes: u64) -> Option<String> {
    let (unit, name) = UNITS.iter().find(|(unit, _)| bytes >= *unit)?;
    let tenths = u128::from(bytes) * 10 / u128::from(*unit);
    Some(format!("{}.{} {name}", tenths / 10, tenths % 10))
}

/// A number of things, with a noun that agrees with it.
#[derive(Clone, Copy)]
pub(crate) struct Counted<N>(pub(crate) N, pub(crate) &'static str);

impl<N: fmt::Display> fmt::Display for Counted<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number, noun) = self;
        let number = number.to_string();
        let plural = if number == "1" { "" } else { "s" };
        write!(f, "{number} {noun}{plural}")
    }
}

/// A number of bytes for a column: in the largest binary unit, with one decimal, rounded down,
/// where that is not exact.
#[derive(Clone, Copy)]
pub(crate) struct ShortSize(pub(crate) u64);

impl fmt::Display for ShortSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().find(|(unit, _)| self.0 >= *unit);
        f.pad(&match unit {
            Some((unit, name)) if self.0.is_multiple_of(*unit) => {
                format!("{} {name}", self.0 / unit)
            }
            _ => rounded(self.0).unwrap_or_else(|| format!("{} B", self.0)),
        })
    }
}

/// Serializes types as the texts that they are displayed as.
#[cfg(feature = "serde")]
macro_rules! serialized_as_text {
    ($($type:ty),+) => { $(
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )+ };
}
#[cfg(feature = "serde")]
pub(crate) use serialized_as_text;

/// Rows of a table for people, in columns that are as wide as what is in them; those whose letter
/// in `sides` is `r` stand to the right. A row may end early. No line ends with blanks.
pub(crate) fn columns(sides: &str, rows: &[Vec<String>]) -> String {
    let width = |at: usize| {
        let texts = rows.iter().filter_map(|row| row.get(at));
        texts.map(|text| text.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..sides.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let fields = row.iter().zip(&widths).zip(sides.chars());
        let fields = fields.map(|((text, width), side)| match side {
            'r' => format!("{text:>width$}"),
            _ => format!("{text:<width$}"),
        });
        fields.collect::<Vec<_>>().join(" ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_print_exactly() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1024, "1 KiB"),
            (5000, "4.8 KiB (5000 bytes)"),
            (64 << 20, "64 MiB"),
            (1536 << 20, "1536 MiB"),
            (4 << 30, "4 GiB"),
            ((4 << 30) + 4096, "4.0 GiB (4294971392 bytes)"),
            (1 << 40, "1 TiB"),
            (u64::MAX, "15.9 EiB (18446744073709551615 bytes)"),
        ] {
            assert_eq!(HumanSize(bytes).to_string(), text);
        }
    }

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let row = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let rows = [
            row(&["what", "size", "note"]),
            row(&["a", "1024", ""]),
            row(&["·····", "7"]),
        ];
        let lines = ["what  size note", "a     1024", "·····    7"];
        assert_eq!(columns("lrl", &rows), lines.join("\n"));
    }
}
