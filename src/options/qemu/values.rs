//! The values of properties: sizes, numbers, switches and node numbers, in all of QEMU's
//! spellings.

/// A number of bytes: `4096`, `64M`, `1.5G`, `0x1000`.
///
/// Suffixes are powers of 1024, in either case; `B` is one byte. A fraction needs a suffix larger
/// than that, and is rounded to the nearest byte. Hexadecimal takes neither fraction nor suffix.
pub(super) fn size(text: &str) -> Option<u64> {
    let text = unsigned(text);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return digits_only(digits, 16);
    }
    let is_no_digit = |c: char| !c.is_ascii_digit();
    let (whole, rest) = text.split_at(text.find(is_no_digit).unwrap_or(text.len()));
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(rest.find(is_no_digit).unwrap_or(rest.len())),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let unit = unit(suffix)?;
    let whole = match whole {
        "" => 0,
        digits => digits_only(digits, 10)?,
    };
    if unit == 1 && fraction.bytes().any(|digit| digit != b'0') {
        return None;
    }
    whole
        .checked_mul(unit)?
        .checked_add(part_of(fraction, unit))
}

/// A whole number: decimal, hexadecimal after `0x`, octal after `0`.
pub(super) fn number(text: &str) -> Option<u64> {
    let text = unsigned(text);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return digits_only(digits, 16);
    }
    match text.strip_prefix('0') {
        Some(digits) if !digits.is_empty() => digits_only(digits, 8),
        _ => digits_only(text, 10),
    }
}

/// `on`, `off` and their other spellings; only small letters.
pub(super) fn switch(text: &str) -> Option<bool> {
    match text {
        "on" | "true" | "yes" | "y" => Some(true),
        "off" | "false" | "no" | "n" => Some(false),
        _ => None,
    }
}

/// A number, or two with a `-` between them: the first and the last of a range.
pub(super) fn range(text: &str) -> Option<(u64, u64)> {
    match text.split_once('-') {
        None => number(text).map(|node| (node, node)),
        Some((first, last)) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some((first, last))
        }
    }
}

/// The size that reads as `bytes` again: with the largest suffix that is exact.
pub(super) fn write_size(bytes: u64) -> String {
    const SUFFIXES: [(u32, &str); 6] = [
        (60, "E"),
        (50, "P"),
        (40, "T"),
        (30, "G"),
        (20, "M"),
        (10, "K"),
    ];
    match SUFFIXES
        .iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
    {
        Some((shift, suffix)) => format!("{}{suffix}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// Without what strtoull(3) skips: white space, then a plus sign.
fn unsigned(text: &str) -> &str {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    text.strip_prefix('+').unwrap_or(text)
}

/// A number of digits and nothing else: the standard library alone would take a sign.
fn digits_only(digits: &str, radix: u32) -> Option<u64> {
    if !digits.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

fn unit(suffix: &str) -> Option<u64> {
    Some(match suffix {
        "" | "b" | "B" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        "p" | "P" => 1 << 50,
        "e" | "E" => 1 << 60,
        _ => return None,
    })
}

/// The decimal fraction `0.digits` of `unit`, rounded to the nearest.
fn part_of(digits: &str, unit: u64) -> u64 {
    // Units have at most 61 bits and 10^20 has 67: the product fits. Digits past the twentieth
    // are worth less than a thousandth of a byte of the largest unit.
    const DIGITS: usize = 20;
    const ONE: u128 = 10u128.pow(20);
    let mut fraction = 0u128;
    for place in 0..DIGITS {
        let digit = digits.as_bytes().get(place).map_or(0, |digit| digit - b'0');
        fraction = fraction * 10 + u128::from(digit);
    }
    let part = (fraction * u128::from(unit) + ONE / 2) / ONE;
    // The fraction was below 1, so the part is at most the unit.
    u64::try_from(part).unwrap_or(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("014", Some(14)),
            ("1b", Some(1)),
            ("1B", Some(1)),
            ("64k", Some(64 << 10)),
            ("1M", Some(1 << 20)),
            ("3G", Some(3 << 30)),
            ("1t", Some(1 << 40)),
            ("1P", Some(1 << 50)),
            ("15e", Some(15 << 60)),
            ("16E", None),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("1.5G", Some(1536 << 20)),
            (".5M", Some(512 << 10)),
            ("1.M", Some(1 << 20)),
            ("4096.0", Some(4096)),
            ("4096.", Some(4096)),
            ("4096.5", None),
            ("4096.5b", None),
            ("4096.00000000000000000000000001", None),
            ("0.9999999M", Some(1 << 20)),
            ("1.0000004M", Some(1 << 20)),
            ("1.0000005M", Some((1 << 20) + 1)),
            ("15.9999999999999999999E", None),
            ("0.00000000000000000000000000001K", Some(0)),
            ("0x1000", Some(4096)),
            ("0X1000", Some(4096)),
            ("0x0B", Some(11)),
            ("0x10k", None),
            ("0x", None),
            ("0x1.8M", None),
            ("00x10", None),
            (" 1M", Some(1 << 20)),
            ("\t+1M", Some(1 << 20)),
            ("1M ", None),
            ("+ 1M", None),
            ("++1M", None),
            ("-1", None),
            ("-0", None),
            ("", None),
            (".", None),
            (".M", None),
            ("M", None),
            ("1..5M", None),
            ("1e3", None),
            ("1MB", None),
            ("1MiB", None),
            ("64X", None),
            ("inf", None),
            ("1_000", None),
            ("٣", None),
        ] {
            assert_eq!(size(text), bytes, "{text:?}");
        }
    }

    #[test]
    fn numbers_are_read_as_qemu_reads_them() {
        for (text, value) in [
            ("0", Some(0)),
            ("4", Some(4)),
            (" +4", Some(4)),
            ("0x10", Some(16)),
            ("010", Some(8)),
            ("08", None),
            ("0x", None),
            ("-1", None),
            ("-0", None),
            ("4k", None),
            ("1.0", None),
            ("4 ", None),
            ("", None),
        ] {
            assert_eq!(number(text), value, "{text:?}");
        }
    }

    #[test]
    fn ranges_are_read_as_qemu_reads_them() {
        for (text, nodes) in [
            ("0", Some((0, 0))),
            ("0-3", Some((0, 3))),
            ("0- 3", Some((0, 3))),
            ("0-+3", Some((0, 3))),
            ("2-2", Some((2, 2))),
            ("3-0", None),
            ("0-", None),
            ("-1", None),
            ("0--1", None),
            ("0-1-2", None),
            ("0 -1", None),
            ("", None),
        ] {
            assert_eq!(range(text), nodes, "{text:?}");
        }
    }

    #[test]
    fn a_written_size_is_read_again() {
        let sizes = [
            0,
            1,
            1023,
            1024,
            5000,
            1536 << 20,
            3 << 30,
            u64::MAX,
            1 << 63,
        ];
        for bytes in sizes {
            assert_eq!(size(&write_size(bytes)), Some(bytes));
        }
        assert_eq!(write_size(1536 << 20), "1536M");
        assert_eq!(write_size(4 << 30), "4G");
        assert_eq!(write_size(5000), "5000");
    }
}
