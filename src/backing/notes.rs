//! Options without effect on a backing, as far as known before it is mapped.

use super::kind::BackingKind;
use crate::host::nodes;
use crate::options::{NumaPolicy, RamOptions, Reserve};
use crate::report::BuildNote;

pub(super) fn of_options(options: &RamOptions, kind: BackingKind) -> Vec<BuildNote> {
    let unused = options.unused();
    let mut notes = Vec::new();
    if options.merge() == Some(true) {
        notes.push(BuildNote::Merge);
    }
    if options.reserve() == Some(Reserve::On) && !kind.is_hugetlb() {
        notes.push(BuildNote::Reserve);
    }
    let policy = options.numa();
    let one_node = || nodes::with_memory().is_some_and(|nodes| nodes.len() == 1);
    if policy != NumaPolicy::Default && kind.is_on_disk() {
        notes.push(BuildNote::NotPlaced { policy });
    } else if policy != NumaPolicy::Default && one_node() {
        notes.push(BuildNote::OneNode { policy });
    }
    if let Some(size) = unused.hugetlb_size {
        notes.push(BuildNote::HugetlbSize { size });
    }
    if unused.canonical_path.is_some() {
        notes.push(BuildNote::CanonicalPath);
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
            notes.iter().filter_map(BuildNote::property).collect()
        };
        let plain = RamOptions::new();
        assert!(notes(&plain, BackingKind::PosixShm).is_empty());
        let read = |text: &str| text.parse::<RamOptions>().unwrap();
        let off = read("memory-backend-memfd,size=1M,merge=off");
        assert!(notes(&off, BackingKind::Memfd).is_empty());

        let placed = read("memory-backend-memfd,size=1M,policy=bind,host-nodes=0");
        assert_eq!(notes(&placed, BackingKind::AdoptedFile), ["policy"]);
        let [BuildNote::NotPlaced { .. }] = of_options(&placed, BackingKind::File)[..] else {
            panic!("a file on a disk is placed");
        };

        let all = read("memory-backend-memfd,size=1M,merge=on,reserve=on");
        assert_eq!(notes(&all, BackingKind::PosixShm), ["merge", "reserve"]);
        assert_eq!(notes(&all, BackingKind::HugetlbMemfd), ["merge"]);
    }
}
