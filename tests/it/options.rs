//! Options as strings: what each property means, and what is refused with which words.

use std::num::NonZeroU32;

use guest_memory_shm::{
    Access, BackingSource, CoreDump, DiscardData, NodeSet, NumaPolicy, OnShortage, PageSize,
    Populate, RamOptions, Reserve, Sealing,
};

const MIB: u64 = 1 << 20;

/// Options of this backing as a string has them that says nothing but the size.
fn plain(backing: BackingSource) -> RamOptions {
    RamOptions::new()
        .with_backing(backing)
        .with_size(MIB)
        .with_core_dump(CoreDump::Include)
}

fn memfd() -> RamOptions {
    plain(BackingSource::Memfd)
}

fn file() -> RamOptions {
    plain(BackingSource::File("/x".into()))
}

fn nodes(nodes: impl IntoIterator<Item = u32>) -> NodeSet {
    NodeSet::from_nodes(nodes).unwrap()
}

/// What follows `memory-backend-memfd,size=1M,`, or the same of a file with its path and share=on.
fn with(backing: &BackingSource, properties: &str) -> String {
    match backing {
        BackingSource::File(_) => {
            format!("memory-backend-file,size=1M,mem-path=/x,share=on,{properties}")
        }
        BackingSource::PosixShm => format!("memory-backend-shm,size=1M,{properties}"),
        _ => format!("memory-backend-memfd,size=1M,{properties}"),
    }
}

#[test]
fn every_property_of_every_backend_is_read() {
    let threads = |n| NonZeroU32::new(n).unwrap();
    let common = |options: RamOptions| {
        [
            ("", options.clone()),
            ("id=ram-0.a_B", options.clone().with_name("ram-0.a_B")),
            ("id=a,id=b", options.clone().with_name("a")),
            ("size=2M", options.clone().with_size(2 * MIB)),
            ("size=abc,size=2M", options.clone().with_size(2 * MIB)),
            ("share=on", options.clone()),
            ("share", options.clone()),
            ("reserve=on", options.clone().with_reserve(Reserve::On)),
            ("noreserve", options.clone().with_reserve(Reserve::Off)),
            ("prealloc=off", options.clone()),
            (
                "prealloc=y",
                options.clone().with_populate(Populate::Prefault),
            ),
            ("populate=lazy", options.clone()),
            (
                "populate=allocate",
                options.clone().with_populate(Populate::Allocate),
            ),
            (
                "populate=prefault",
                options.clone().with_populate(Populate::Prefault),
            ),
            (
                "prealloc,populate=prefault",
                options.clone().with_populate(Populate::Prefault),
            ),
            (
                "prealloc-threads=0x4",
                options.clone().with_populate_threads(threads(4)),
            ),
            ("on-shortage=refuse", options.clone()),
            (
                "on-shortage=try-anyway",
                options.clone().with_on_shortage(OnShortage::TryAnyway),
            ),
            ("prealloc-context=", options.clone()),
            ("policy=default", options.clone()),
            (
                "policy=bind,host-nodes=0,host-nodes=2-3",
                options
                    .clone()
                    .with_numa(NumaPolicy::Bind(nodes([0, 2, 3]))),
            ),
            (
                "host-nodes=127,policy=preferred",
                options
                    .clone()
                    .with_numa(NumaPolicy::Preferred(nodes([127]))),
            ),
            (
                "policy=interleave,host-nodes=0-127",
                options
                    .clone()
                    .with_numa(NumaPolicy::Interleave(nodes(0..128))),
            ),
            ("dump=true", options.clone()),
            ("dump=n", options.clone().with_core_dump(CoreDump::Exclude)),
            (
                "thp=on",
                options.clone().with_page_size(PageSize::Transparent),
            ),
            ("thp=off", options),
        ]
    };
    let mut cases: Vec<_> = common(memfd())
        .into_iter()
        .chain(common(plain(BackingSource::PosixShm)))
        .chain(common(file()))
        .collect();
    let huge = |size| {
        memfd()
            .with_size(2 * MIB)
            .with_page_size(PageSize::Huge(size))
    };
    cases.extend([
        ("hugetlb=off", memfd()),
        ("hugetlb=on,size=2M", huge(None)),
        ("hugetlb=on,hugetlbsize=2M,size=2M", huge(Some(2 * MIB))),
        ("seal=on", memfd()),
        ("seal=off", memfd().with_sealing(Sealing::Unsealed)),
        (
            "mem-path=/a,,b=c,share=on",
            plain(BackingSource::File("/a,b=c".into())),
        ),
        ("align=0", file().with_align(0)),
        ("align=2M", file().with_align(2 * MIB)),
        ("offset=1.5M", file().with_offset(3 * MIB / 2)),
        (
            "discard-data=on",
            file().with_discard_data(DiscardData::OnDrop),
        ),
        ("discard-data=off", file()),
        ("readonly=off,rom=off", file()),
        ("rom=auto", file()),
        ("readonly=on", file().with_access(Access::ReadOnly)),
        ("readonly=on,rom=on", file().with_access(Access::ReadOnly)),
        ("readonly=on,rom=auto", file().with_access(Access::ReadOnly)),
        ("pmem=off", file()),
    ]);
    for (properties, options) in cases {
        let text = with(options.backing(), properties);
        assert_eq!(text.parse::<RamOptions>().unwrap(), options, "{text}");
    }
    let typed: RamOptions = "size=1M,qom-type=memory-backend-ram,qom-type=memory-backend-shm"
        .parse()
        .unwrap();
    assert_eq!(typed, plain(BackingSource::PosixShm));
}

/// The rows of QEMU's answers that are refusals: ours, in our words.
#[test]
fn what_qemu_refuses_is_refused_with_a_remedy() {
    let size = "a number of bytes, or one with K, M, G, T, P or E after it (64M, 1.5G), or 0x \
                and digits";
    for (text, refusal) in [
        (
            "memory-backend-shm,size=0",
            "size=0 bytes: RAM has at least one page, and at most the 7.9 EiB \
             (9223372036854775807 bytes) that a file can have",
        ),
        (
            "memory-backend-shm",
            "size is missing: write size=64M, or another amount of RAM",
        ),
        (
            "memory-backend-shm,size=-1",
            &format!("size=-1: expected {size}"),
        ),
        (
            "memory-backend-shm,size=64X",
            &format!("size=64X: expected {size}"),
        ),
        (
            "memory-backend-shm,size=1M,share=off",
            "share=off: RAM that cannot be shared cannot be expressed, write share=on",
        ),
        (
            "memory-backend-file,size=1M,mem-path=/x",
            "share=off, the default of memory-backend-file: RAM that cannot be shared cannot be \
             expressed, write share=on",
        ),
        (
            "memory-backend-shm,size=1M,prealloc=on,reserve=off",
            "prealloc=on and reserve=off contradict each other: populated RAM is always \
             reserved, drop one of the two",
        ),
        (
            "memory-backend-shm,size=1M,prealloc-threads=0",
            "prealloc-threads=0: expected a number from 1 to 4294967295",
        ),
        (
            "memory-backend-shm,size=1M,host-nodes=128,policy=bind",
            "host-nodes: there is no node 128, the highest that can be named is 127",
        ),
        (
            "memory-backend-shm,size=1M,host-nodes=0",
            "host-nodes=0: policy=default chooses no nodes, write policy=bind, preferred or \
             interleave",
        ),
        (
            "memory-backend-shm,size=1M,policy=bind",
            "policy=bind: it needs nodes, write host-nodes=0, or the nodes that are meant",
        ),
        (
            "memory-backend-memfd,size=1M,hugetlbsize=3M",
            "hugetlbsize=3 MiB: the size of a huge page is a power of two, usually 2M or 1G",
        ),
        (
            "memory-backend-memfd,size=3M,hugetlb=on,hugetlbsize=2M",
            "size 3 MiB is not a multiple of the page size 2 MiB: the nearest larger is 4 MiB",
        ),
        (
            "memory-backend-memfd,size=5000",
            "size 4.8 KiB (5000 bytes) is not a multiple of the page size 4 KiB: the nearest \
             larger is 8 KiB",
        ),
        (
            &with(file().backing(), "align=0x300000"),
            "align=0x300000: expected a power of two that is at least the page size 4 KiB",
        ),
        (
            &with(file().backing(), "align=0x400"),
            "align=0x400: expected a power of two that is at least the page size 4 KiB",
        ),
        (
            &with(file().backing(), "offset=0x400"),
            "offset 0x400 is not a multiple of the page size 4 KiB: the nearest is 0x0",
        ),
        (
            &with(file().backing(), "rom=on"),
            "rom=on and readonly=off contradict each other: a ROM that is shared must be \
             read-only, write readonly=on",
        ),
    ] {
        let refused = text.parse::<RamOptions>().unwrap_err();
        assert_eq!(refused.to_string(), refusal, "{text}");
    }
}

/// Wrong values and wrong places of every property, and which property the error names.
#[test]
fn every_property_that_is_wrong_is_named() {
    let (memfd, shm, file) = (
        BackingSource::Memfd,
        BackingSource::PosixShm,
        BackingSource::File("/x".into()),
    );
    for (backing, properties, start) in [
        (
            &memfd,
            "id=1a",
            "id=1a: expected a letter, then letters, digits, '-', '.' and '_'",
        ),
        (&memfd, "id=", "id=: expected a letter"),
        (&memfd, "size=", "size=: expected a number of bytes"),
        (&memfd, "size", "size=on: expected a number of bytes"),
        (&memfd, "size=8E", "size=8 EiB: RAM has at least one page"),
        (&memfd, "share=ON", "share=ON: expected on or off"),
        (&memfd, "reserve=1", "reserve=1: expected on or off"),
        (&memfd, "prealloc=", "prealloc=: expected on or off"),
        (
            &memfd,
            "prealloc-threads=08",
            "prealloc-threads=08: expected a number from 1",
        ),
        (
            &memfd,
            "prealloc-context=tc0",
            "prealloc-context=tc0 is not supported: there are no",
        ),
        (
            &memfd,
            "host-nodes=3-0",
            "host-nodes=3-0: expected a node or a range",
        ),
        (
            &memfd,
            "host-nodes=99999999999",
            "host-nodes=99999999999: expected a node",
        ),
        (
            &memfd,
            "policy=local",
            "policy=local: expected default, preferred, bind or",
        ),
        (&memfd, "merge=off ", "merge=off : expected on or off"),
        (&memfd, "dump=o", "dump=o: expected on or off"),
        (
            &memfd,
            "x-use-canonical-path-for-ramblock-id=2",
            "x-use-canonical-path-for-ramblock-id=2: expected on or off",
        ),
        (&memfd, "hugetlb=auto", "hugetlb=auto: expected on or off"),
        (
            &memfd,
            "hugetlbsize=0",
            "hugetlbsize=0 bytes: the size of a huge page is a power of two",
        ),
        (
            &memfd,
            "hugetlbsize=2X",
            "hugetlbsize=2X: expected a number of bytes",
        ),
        (&memfd, "seal=all", "seal=all: expected on or off"),
        (
            &memfd,
            "align=4K",
            "\"align\" is no property of memory-backend-memfd: it has id, size",
        ),
        (
            &memfd,
            "Size=1M",
            "\"Size\" is no property of memory-backend-memfd",
        ),
        (&memfd, "=", "\"\" is no property of memory-backend-memfd"),
        (&memfd, "thp=always", "thp=always: expected on or off"),
        (
            &memfd,
            "thp,hugetlb",
            "hugetlb=on and thp=on contradict each other: pages are of a",
        ),
        (
            &memfd,
            "populate=on",
            "populate=on: expected lazy, allocate or prefault",
        ),
        (
            &memfd,
            "on-shortage=on",
            "on-shortage=on: expected refuse or try-anyway",
        ),
        (
            &memfd,
            "prealloc,populate=lazy",
            "prealloc=on and populate=lazy contradict",
        ),
        (
            &memfd,
            "noprealloc,populate=allocate",
            "prealloc=off and populate=allocate contradict",
        ),
        (
            &memfd,
            "populate=allocate,reserve=off",
            "populate=allocate and reserve=off contradict",
        ),
        (
            &shm,
            "seal=off",
            "\"seal\" is no property of memory-backend-shm: it has id, size",
        ),
        (
            &shm,
            "hugetlb=off",
            "\"hugetlb\" is no property of memory-backend-shm",
        ),
        (
            &file,
            "hugetlb=off",
            "\"hugetlb\" is no property of memory-backend-file",
        ),
        (
            &file,
            "mem-path=",
            "mem-path=: expected the path of a file or a directory",
        ),
        (
            &file,
            "mem-path=/a\0b",
            "mem-path=/a\\u{0}b: expected the path",
        ),
        (&file, "align=4X", "align=4X: expected a number of bytes"),
        (
            &file,
            "offset=0x7ffffffffffff000",
            "offset=0x7ffffffffffff000 and a size of 1 MiB end",
        ),
        (
            &file,
            "offset=0xfffffffffffff000",
            "offset=0xfffffffffffff000 and a size of 1 MiB end",
        ),
        (
            &file,
            "discard-data=x",
            "discard-data=x: expected on or off",
        ),
        (&file, "readonly=x", "readonly=x: expected on or off"),
        (&file, "rom=yes", "rom=yes: expected on, off or auto"),
        (
            &file,
            "readonly=on,rom=off",
            "readonly=on and rom=off contradict each other",
        ),
        (
            &file,
            "readonly=on,discard-data=on",
            "discard-data=on and readonly=on contradict each other",
        ),
        (
            &file,
            "readonly=on,prealloc=on",
            "prealloc=on and readonly=on contradict each other",
        ),
        (
            &file,
            "pmem=on",
            "pmem=on is not supported: persistence is not guaranteed here",
        ),
    ] {
        let text = with(backing, properties);
        let refused = text.parse::<RamOptions>().unwrap_err().to_string();
        assert!(refused.starts_with(start), "{text}: {refused}");
    }
    for (text, start) in [
        (
            "",
            "the type of the backend is missing: begin with memory-backend-memfd",
        ),
        ("size=1M", "the type of the backend is missing"),
        (",", "qom-type=: expected memory-backend-memfd"),
        (
            "memory-backend-ram,size=1M",
            "qom-type=memory-backend-ram: expected",
        ),
        (
            "memory-backend-file,size=1M,share=on",
            "mem-path is missing: write mem-path=PATH",
        ),
    ] {
        let refused = text.parse::<RamOptions>().unwrap_err().to_string();
        assert!(refused.starts_with(start), "{text}: {refused}");
    }
}

#[test]
fn merging_is_read_and_has_no_setter() {
    for (property, merge) in [
        ("", None),
        (",merge=yes", Some(true)),
        (",merge=false", Some(false)),
    ] {
        let text = format!("memory-backend-memfd,size=1M{property}");
        let options: RamOptions = text.parse().unwrap();
        assert_eq!(options.merge(), merge, "{text}");
        assert_eq!(options.to_string().contains("merge="), merge.is_some());
    }
}
