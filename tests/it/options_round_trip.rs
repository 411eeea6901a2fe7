//! Options that are written and read again are the same, whatever they are.

use std::num::NonZeroU32;

use guest_memory_shm::{
    Access, BackingSource, CoreDump, DiscardData, GuestRange, NodeSet, NumaPolicy, OnShortage,
    PageSize, Populate, RamOptions, Reserve, Sealing, Seals,
};
use proptest::collection::btree_set;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::json;
use vm_memory::GuestAddress;

/// The backing, and what only it can have.
fn backings() -> impl Strategy<Value = RamOptions> {
    let memfd = (
        select(vec![
            PageSize::Base,
            PageSize::Transparent,
            PageSize::Huge(None),
            PageSize::Huge(Some(2 << 20)),
            PageSize::Huge(Some(1 << 30)),
        ]),
        select(vec![Sealing::Sealed, Sealing::Unsealed]),
    )
        .prop_map(|(pages, sealing)| {
            RamOptions::new()
                .with_page_size(pages)
                .with_sealing(sealing)
        });
    let small_pages = || select(vec![PageSize::Base, PageSize::Transparent]);
    let shm = small_pages().prop_map(|pages| {
        RamOptions::new()
            .with_backing(BackingSource::PosixShm)
            .with_page_size(pages)
    });
    let file = (
        // Commas, equals signs, spaces and letters that are not ASCII.
        "[^\0]{1,20}",
        small_pages(),
        option::of(12..40u32),
        0..1u64 << 40,
        // What is read-only cannot be discarded.
        select(vec![
            (Access::ReadWrite, DiscardData::Keep),
            (Access::ReadWrite, DiscardData::OnDrop),
            (Access::ReadOnly, DiscardData::Keep),
        ]),
    )
        .prop_map(|(path, pages, align, offset, (access, discard))| {
            let options = RamOptions::new()
                .with_backing(BackingSource::File(path.into()))
                .with_page_size(pages)
                .with_offset(offset << 12)
                .with_access(access)
                .with_discard_data(discard);
            match align {
                Some(align) => options.with_align(1 << align),
                None => options,
            }
        });
    prop_oneof![memfd, shm, file]
}

fn policies() -> impl Strategy<Value = NumaPolicy> {
    let nodes = btree_set(0..NodeSet::LIMIT, 1..10);
    let nodes = nodes.prop_map(|nodes| NodeSet::from_nodes(nodes).unwrap());
    let policy = select(vec![
        NumaPolicy::Preferred as fn(NodeSet) -> NumaPolicy,
        NumaPolicy::Bind,
        NumaPolicy::Interleave,
    ]);
    prop_oneof![
        Just(NumaPolicy::Default),
        (policy, nodes).prop_map(|(policy, nodes)| policy(nodes)),
    ]
}

fn valid_options() -> impl Strategy<Value = RamOptions> {
    let any = (
        backings(),
        option::of("[A-Za-z][-A-Za-z0-9._]{0,20}"),
        1..1u64 << 20,
        option::of(select(vec![Reserve::On, Reserve::Off])),
        select(vec![Populate::Lazy, Populate::Allocate, Populate::Prefault]),
        option::of(1..u32::MAX),
        policies(),
        select(vec![CoreDump::Include, CoreDump::Exclude]),
        option::of(select(vec!["on", "off"])),
    );
    any.prop_map(
        |(options, name, size, reserve, populate, threads, numa, dump, merge)| {
            let page_size = match options.page_size() {
                PageSize::Huge(Some(size)) => size,
                _ => 4096,
            };
            let mut options = options
                .with_size(size * page_size)
                .with_numa(numa)
                .with_core_dump(dump);
            if let Some(name) = name {
                options = options.with_name(name);
            }
            if let Some(threads) = threads.and_then(NonZeroU32::new) {
                options = options.with_populate_threads(threads);
            }
            if let Some(reserve) = reserve {
                options = options.with_reserve(reserve);
            }
            // Any number does: half of the options are to have it.
            if size % 2 == 0 {
                options = options.with_on_shortage(OnShortage::TryAnyway);
            }
            // What is populated is neither unreserved nor read-only.
            if reserve != Some(Reserve::Off) && options.access() == Access::ReadWrite {
                options = options.with_populate(populate);
            }
            match merge {
                Some(merge) => format!("{options},merge={merge}").parse().unwrap(),
                None => options,
            }
        },
    )
}

/// Strings of parts that mean something, or nearly.
fn strings() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        "(no)?(share|reserve|prealloc|merge|dump|hugetlb|seal|thp|readonly|discard-data)\
         (=(on|off|y|no))?",
        "(size|hugetlbsize|align|offset)=[0-9]{1,3}(\\.5)?[KMG]?",
        "(policy=(bind|default)|host-nodes=[0-9](-[0-9])?|prealloc-threads=[0-9])",
        "(id=[a-c1]|mem-path=[/a,=]{1,4}|rom=(on|off|auto)|\
         populate=(lazy|allocate)|on-shortage=(refuse|try-anyway))",
        "x-use-canonical-path-for-ramblock-id(=off)?",
    ];
    let kind = select(vec!["memfd", "shm", "file"]);
    (kind, proptest::collection::vec(part, 0..4)).prop_map(|(kind, parts)| {
        let start = match kind {
            "file" => "memory-backend-file,size=1M,mem-path=/x,share".to_owned(),
            kind => format!("memory-backend-{kind},size=1M"),
        };
        std::iter::once(start)
            .chain(parts)
            .collect::<Vec<_>>()
            .join(",")
    })
}

proptest! {
    #[test]
    fn valid_options_are_the_same_when_written_and_read(options in valid_options()) {
        prop_assert!(options.check().is_ok(), "{:?}", options.check());
        let text = options.to_string();
        prop_assert_eq!(text.parse::<RamOptions>().map_err(|e| e.to_string()), Ok(options));
    }

    #[test]
    fn valid_options_are_the_same_when_serialized_and_read(options in valid_options()) {
        let text = serde_json::to_string(&options).unwrap();
        let read = serde_json::from_str::<RamOptions>(&text).map_err(|error| error.to_string());
        prop_assert_eq!(read, Ok(options));
    }

    #[test]
    fn what_is_read_is_the_same_when_written_and_read(text in strings()) {
        if let Ok(options) = text.parse::<RamOptions>() {
            let written = options.to_string();
            prop_assert_eq!(written.parse::<RamOptions>().map_err(|e| e.to_string()), Ok(options));
        }
    }
}

#[test]
fn plain_data_is_serialized_by_name_and_read_again() {
    macro_rules! same {
        ($value:expr, $json:expr) => {
            let (value, json) = ($value, $json);
            assert_eq!(serde_json::to_value(&value).unwrap(), json);
            let mut read = value.clone();
            read.clone_from(&serde_json::from_value(json).unwrap());
            assert_eq!(read, value);
        };
    }
    same!(PageSize::Huge(Some(2 << 20)), json!({ "huge": 2 << 20 }));
    same!(BackingSource::PosixShm, json!("posix-shm"));
    same!(BackingSource::File("/x".into()), json!({ "file": "/x" }));
    let nodes = NodeSet::from_nodes([0, 2]).unwrap();
    same!(NumaPolicy::Bind(nodes), json!({ "bind": [0, 2] }));
    same!(Seals::RESIZE, json!("shrink|grow"));
    same!(Seals::empty(), json!("none"));
    same!(Seals::SEAL, json!("none possible"));
    let range = GuestRange::new(GuestAddress(4096), 8192).unwrap();
    same!(range, json!({ "start": 4096, "size": 8192 }));
}

#[test]
fn data_that_cannot_be_is_not_read() {
    for json in [
        json!({ "start": 0, "size": 0 }),
        json!({ "start": u64::MAX, "size": 2 }),
        json!({ "start": 0 }),
    ] {
        assert!(serde_json::from_value::<GuestRange>(json).is_err());
    }
    assert!(serde_json::from_value::<NodeSet>(json!([128])).is_err());
    assert!(serde_json::from_value::<Seals>(json!("shrink|grwo")).is_err());
    assert!(serde_json::from_value::<RamOptions>(json!({ "page-size": "base" })).is_err());
    let default = serde_json::from_value::<RamOptions>(json!({})).unwrap();
    assert_eq!(default, RamOptions::new());
}
