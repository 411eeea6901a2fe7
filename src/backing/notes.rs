//! What of the options has no effect on a backing, known before it is mapped.

use super::kind::BackingKind;
use crate::host::nodes;
use crate::options::{Merge, NumaPolicy, RamOptions, Reserve};
use crate::report::Note;

pub(super) fn of_options(options: &RamOptions, kind: BackingKind) -> Vec<Note> {
    let unused = options.unused();
    let mut notes = Vec::new();
    if options.merge() == Some(Merge::On) {
        notes.push(Note::Merge);
    }
    if options.reserve() == Some(Reserve::On) && !kind.is_hugetlb() {
        notes.push(Note::Reserve);
    }
    let one_node = nodes::with_memory().is_some_and(|nodes| nodes.len() == 1);
    if options.numa() != NumaPolicy::Default && one_node {
        notes.push(Note::OneNode {
            policy: options.numa(),
        });
    }
    if let Some(size) = unused.hugetlb_size {
        notes.push(Note::HugetlbSize { size });
    }
    if unused.canonical_path.is_some() {
        notes.push(Note::CanonicalPath);
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_for_and_has_no_effect_is_noted() {
        let notes = |options: &RamOptions, kind| -> Vec<_> {
            let notes = of_options(options, kind);
            notes.iter().filter_map(Note::property).collect()
        };
        let plain = RamOptions::new();
        assert!(notes(&plain, BackingKind::PosixShm).is_empty());
        assert!(notes(&plain.clone().with_merge(Merge::Off), BackingKind::Memfd).is_empty());

        let all = plain.with_merge(Merge::On).with_reserve(Reserve::On);
        assert_eq!(notes(&all, BackingKind::PosixShm), ["merge", "reserve"]);
        assert_eq!(notes(&all, BackingKind::HugetlbMemfd), ["merge"]);
    }
}
