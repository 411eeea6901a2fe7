//! The outer form of QEMU's options: `first,key=value,flag,noflag`, commas in values doubled.

/// A `key=value` list, read: each key with its value, in the order in which they were written.
pub(super) struct Pairs<'a> {
    pairs: Vec<(&'a str, String)>,
}

impl<'a> Pairs<'a> {
    /// Reads `text`; every text is such a list, if perhaps one of unknown keys.
    ///
    /// A first part without `=` is the value of `first_key`. Any other part without `=` is a flag:
    /// `key` means `key=on`, `nokey` means `key=off`. One comma at the end is allowed.
    pub(super) fn read(text: &'a str, first_key: &'static str) -> Self {
        let mut pairs = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let end = rest.find(['=', ',']).unwrap_or(rest.len());
            let (key, after) = rest.split_at(end);
            if let Some(value) = after.strip_prefix('=') {
                let (value, after) = read_value(value);
                pairs.push((key, value));
                rest = after;
            } else if pairs.is_empty() {
                let (value, after) = read_value(rest);
                pairs.push((first_key, value));
                rest = after;
            } else {
                // A flag has no value in which a comma could be doubled.
                let (key, value) = match key.strip_prefix("no") {
                    Some(key) => (key, "off"),
                    None => (key, "on"),
                };
                pairs.push((key, value.to_owned()));
                rest = after.strip_prefix(',').unwrap_or(after);
            }
        }
        Self { pairs }
    }

    /// The keys, in order and with repetitions.
    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.pairs.iter().map(|(key, _)| *key)
    }

    /// All values of a key, in order.
    pub(super) fn all(&self, key: &str) -> impl DoubleEndedIterator<Item = &str> {
        let of_key = self.pairs.iter().filter(move |(found, _)| *found == key);
        of_key.map(|(_, value)| value.as_str())
    }

    /// The value of a key that counts where it is given several times.
    pub(super) fn last(&self, key: &str) -> Option<&str> {
        self.all(key).next_back()
    }
}

/// The value at the start of `text`, with its commas single, and what follows the comma after it.
fn read_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        match rest.split_once(',') {
            None => {
                value.push_str(rest);
                return (value, "");
            }
            Some((part, after)) => {
                value.push_str(part);
                match after.strip_prefix(',') {
                    Some(after) => {
                        value.push(',');
                        rest = after;
                    }
                    None => return (value, after),
                }
            }
        }
    }
}

/// A value as it is written: its commas doubled.
pub(super) fn write_value(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_qemu_reads_them() {
        for (text, pairs) in [
            ("", &[][..]),
            ("x", &[("type", "x")]),
            ("x,", &[("type", "x")]),
            (",", &[("type", "")]),
            ("a=1", &[("a", "1")]),
            ("x,a=1,b=2,", &[("type", "x"), ("a", "1"), ("b", "2")]),
            ("x,a=1,a=2", &[("type", "x"), ("a", "1"), ("a", "2")]),
            ("x,a,nob", &[("type", "x"), ("a", "on"), ("b", "off")]),
            ("x,no", &[("type", "x"), ("", "off")]),
            (
                "x,a,,b=1",
                &[("type", "x"), ("a", "on"), ("", "on"), ("b", "1")],
            ),
            ("x,a=,b=1", &[("type", "x"), ("a", ""), ("b", "1")]),
            ("x,a=1,,2", &[("type", "x"), ("a", "1,2")]),
            ("x,a=1,,,b=2", &[("type", "x"), ("a", "1,"), ("b", "2")]),
            ("x,a=b=c", &[("type", "x"), ("a", "b=c")]),
            ("x,,a=1", &[("type", "x,a=1")]),
            ("=x", &[("", "x")]),
        ] {
            let read = Pairs::read(text, "type");
            let found: Vec<_> = read.pairs.iter().map(|(k, v)| (*k, v.as_str())).collect();
            assert_eq!(found, pairs, "{text}");
        }
    }

    #[test]
    fn a_written_value_is_read_again() {
        for value in ["", ",", ",,", "a,b", "a=b", ",a,,b,"] {
            let text = format!("x,k={},l=1", write_value(value));
            assert_eq!(Pairs::read(&text, "type").last("k"), Some(value), "{text}");
        }
    }
}
