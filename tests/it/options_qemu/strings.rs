//! The strings that are given to QEMU and to us: every property of every backend with valid,
//! boundary and malformed values, pairs of properties, and lists that are odd as lists.
//!
//! `DIR` stands for a directory that has the files `ram` (1 MiB), `short` (8 KiB) and `empty`, and
//! the directory `sub`.

use std::collections::BTreeSet;

/// A backend, and what it needs to be accepted.
const BACKENDS: [&str; 3] = [
    "memory-backend-memfd,id=m,size=1M",
    "memory-backend-shm,id=m,size=1M",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram,share=on",
];

const SIZES: [&str; 54] = [
    "",
    "0",
    "1",
    "4095",
    "4096",
    "5000",
    "8192",
    "0x2000",
    "0X2000",
    "0x",
    "0x2000k",
    "0x2.0K",
    "00x2000",
    " 8K",
    "+8K",
    "++8K",
    "+ 8K",
    "8K ",
    "8k",
    "8KB",
    "8KiB",
    "8 K",
    "8192b",
    "8192B",
    "1M",
    "1m",
    "2M",
    "3M",
    "0.5M",
    ".5M",
    "0.M",
    ".M",
    "1.5M",
    "1..5M",
    "1.5.5M",
    "0.0000001M",
    "0.9999999M",
    "1.0000004M",
    "0.9999995M",
    "8192.",
    "8192.0",
    "8192.5",
    "8192.5b",
    "8e3",
    "014K",
    "-1",
    "-0",
    "-4K",
    "8X",
    "inf",
    "8E",
    "16E",
    "18446744073709551615",
    "18446744073709551616",
];

const SWITCHES: [&str; 14] = [
    "on", "off", "true", "false", "yes", "no", "y", "n", "ON", "Off", "1", "", " on", "auto",
];

const SOME_SIZES: [&str; 13] = [
    "4K", "0", "4095", "4096", "2M", "3M", "0.5M", "1.5k", "0x2000", "8X", "-1", "8E", "16E",
];

const SOME_SWITCHES: [&str; 6] = ["on", "n", "ON", "off", "yes", ""];

const NUMBERS: [&str; 15] = [
    "",
    "0",
    "1",
    "4",
    "0x4",
    "010",
    "08",
    " 2",
    "+2",
    "2 ",
    "-1",
    "2k",
    "1.0",
    "4294967295",
    "4294967296",
];

const NODES: [&str; 25] = [
    "", "0", "00", "08", "0x0", "+0", " 0", "0 ", "1", "127", "128", "65535", "65536", "-1",
    "0-0", "0-1", "0-127", "0-128", "0-65535", "0-65536", "1-0", "0-", "0- 1", "0 -1", "0-1-2",
];

/// The switches that some backend has.
const SWITCH_NAMES: [&str; 12] = [
    "share",
    "reserve",
    "prealloc",
    "merge",
    "dump",
    "x-use-canonical-path-for-ramblock-id",
    "hugetlb",
    "seal",
    "discard-data",
    "readonly",
    "pmem",
    "thp",
];

/// One usual value of each property, and of some their opposites, for pairs.
const USUAL: [&str; 25] = [
    "share=on",
    "reserve=on",
    "reserve=off",
    "prealloc=on",
    "prealloc=off",
    "prealloc-threads=2",
    "policy=bind",
    "policy=default",
    "host-nodes=0",
    "merge=on",
    "dump=off",
    "x-use-canonical-path-for-ramblock-id=on",
    "hugetlb=on",
    "hugetlb=off",
    "hugetlbsize=2M",
    "seal=off",
    "align=2M",
    "offset=64K",
    "discard-data=on",
    "readonly=on",
    "readonly=off",
    "rom=on",
    "rom=off",
    "rom=auto",
    "pmem=off",
];

/// How many of [`AFTER`] come after every backend; the others are about lists as such.
const SOME_AFTER: usize = 15;

/// What comes after the backends.
const AFTER: [&str; 45] = [
    "",
    ",",
    ",foo",
    ",share,merge=off",
    ",id=n",
    ",policy=bind,host-nodes=0,host-nodes=1",
    ",host-nodes=0,policy=default",
    ",prealloc=on,reserve=off,prealloc=off",
    ",prealloc=on,reserve=off,reserve=on",
    ",prealloc-context=",
    ",prealloc-context=x",
    ",populate=allocate",
    ",on-shortage=try-anyway",
    ",size=x,size=1M",
    ",qom-type=memory-backend-foo,qom-type=memory-backend-shm,share=on",
    ",,",
    ",,,",
    ",=",
    ",=on",
    ",no",
    ",foo=bar",
    ",nofoo",
    ",Share=on",
    ", share=on",
    ",share,,merge=off",
    ",share=on,,",
    ",share=on,,,merge=off",
    ",share=on,share=x",
    ",share=x,share=on",
    ",size=1M,size=0",
    ",id=1",
    ",id=",
    ",qom-type=",
    ",qom-type=memory-backend-foo",
    ",share.x=on",
    ",host-nodes.0=0,policy=bind",
    ",policy=bind,host-nodes=1,host-nodes=0",
    ",policy=bind,host-nodes=0,host-nodes=0",
    ",policy=bind,host-nodes=0,host-nodes=128",
    ",policy=bind,host-nodes=0,host-nodes=x",
    ",policy=bind,policy=default",
    ",policy=default,policy=interleave,host-nodes=0",
    ",parent=x",
    ",type=x",
    ",hugetlbsize=3M,hugetlbsize=2M",
];

/// Strings that are like no other.
const WHOLE: &[&str] = &[
    "",
    ",",
    "=",
    "=x",
    "size=1M",
    "memory-backend-memfd",
    "memory-backend-memfd,",
    "memory-backend-memfd,size=1M",
    "memory-backend-shm,id=m",
    "memory-backend-memfd,id=m,size=1M,help",
    "memory-backend-memfd,id=m,size=64T",
    "memory-backend-memfd,id=m,size=1P",
    "memory-backend-shm,id=m,size=1T",
    "memory-backend-shm,id=m,size=1P",
    "memory-backend-memfd,id=ram-0._Z,size=1M",
    "memory-backend-memfd,id=1m,size=1M",
    "memory-backend-memfd,id=-m,size=1M",
    "memory-backend-memfd,id=m/n,size=1M",
    "memory-backend-memfd,id=m,,n,size=1M",
    "memory-backend-memfd,id=m n,size=1M",
    "memory-backend-memfd,id=1m,id=m,size=1M",
    "memory-backend-memfd,id,size=1M",
    "memory-backend-memfd,noid,size=1M",
    "memory-backend-ram,id=m,size=1M",
    "memory-backend-foo,id=m,size=1M",
    "Memory-backend-shm,id=m,size=1M",
    " memory-backend-shm,id=m,size=1M",
    "memory-backend-shm ,id=m,size=1M",
    "memory-backend-shm,,id=m,size=1M",
    "qom-type=memory-backend-shm,id=m,size=1M",
    "qom-type=memory-backend-shm,,id=m,size=1M",
    "id=m,size=1M,qom-type=memory-backend-shm",
    "id=m,memory-backend-shm,size=1M",
    "{\"qom-type\":\"memory-backend-memfd\",\"id\":\"m\",\"size\":1048576}",
    "memory-backend-file,id=m,size=1M,share=on",
    "memory-backend-file,id=m,size=1M,mem-path=,share=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram,share=off",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram,readonly=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram,readonly=on,rom=off",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/new,share=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/new,share=on,readonly=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/new,share=on,offset=64K",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/empty,share=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/short,share=on",
    "memory-backend-file,id=m,size=8K,mem-path=DIR/short,share=on",
    "memory-backend-file,id=m,size=8K,mem-path=DIR/short,share=on,offset=4K",
    "memory-backend-file,id=m,size=4K,mem-path=DIR/short,share=on,offset=4K",
    "memory-backend-file,id=m,size=64K,mem-path=DIR/ram,share=on,offset=0x7ffffffffffff000",
    "memory-backend-file,id=m,size=64K,mem-path=DIR/ram,share=on,offset=0xfffffffffffff000",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/sub,share=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/sub,share=on,readonly=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/sub/no/x,share=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/sub/a,,b=c d,share=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/no/x,mem-path=DIR/ram,share=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram,mem-path=DIR/no/x,share=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram,share=on,readonly=on,rom=on",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram,share=on,readonly=on,rom",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram,share=on,rom=yes",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram,share=on,align=1G",
    "memory-backend-file,id=m,size=1M,mem-path=DIR/ram,share=on,align=1E",
];

/// All strings, each once, always in the same order.
pub(super) fn all() -> Vec<String> {
    let mut strings: Vec<String> = WHOLE.iter().map(|&text| text.to_owned()).collect();
    let long = "a".repeat(300);
    strings.push(format!("memory-backend-memfd,id={long},size=1M"));
    for backend in BACKENDS {
        // How a value is spelt is the same for all: one backend, and one property of each type of
        // value, is given all spellings, the others some.
        let first = backend == BACKENDS[0];
        let all_or_some = |all: &'static [&str], some: &'static [&str]| match first {
            true => all,
            false => some,
        };
        let mut add = |after: String| strings.push(format!("{backend}{after}"));
        for after in all_or_some(&AFTER, &AFTER[..SOME_AFTER]) {
            add((*after).to_owned());
        }
        for (name, values) in [
            ("size", all_or_some(&SIZES, &SOME_SIZES)),
            ("hugetlbsize", &SOME_SIZES),
            ("align", &SOME_SIZES),
            ("offset", &SOME_SIZES),
            ("share", all_or_some(&SWITCHES, &SOME_SWITCHES)),
            ("rom", &SWITCHES),
            ("prealloc-threads", all_or_some(&NUMBERS, &["0", "1", "x"])),
            (
                "policy",
                &["default", "preferred", "bind", "Bind", "local", ""],
            ),
            (
                "policy=bind,host-nodes",
                all_or_some(&NODES, &["0", "1", "0-1"]),
            ),
            ("policy=preferred,host-nodes", &["0", "1", "0-1"]),
            ("policy=interleave,host-nodes", &["0", "1", "0-1"]),
            ("host-nodes", &["0", "128", ""]),
        ] {
            // A property that a backend does not have is refused whatever its value.
            let values = if has(backend, name) {
                values
            } else {
                &values[..1]
            };
            values
                .iter()
                .for_each(|value| add(format!(",{name}={value}")));
        }
        let some = all_or_some(&SOME_SWITCHES, &SOME_SWITCHES[..3]);
        for name in SWITCH_NAMES {
            let values = if has(backend, name) { some } else { &["off"] };
            values
                .iter()
                .for_each(|value| add(format!(",{name}={value}")));
            add(format!(",{name}"));
            add(format!(",no{name}"));
        }
        // POSIX shm has no property that memfds do not have.
        if backend.contains("memory-backend-shm") {
            continue;
        }
        let usual: Vec<_> = USUAL.iter().filter(|text| has(backend, text)).collect();
        for (at, first) in usual.iter().enumerate() {
            for second in &usual[at + 1..] {
                add(format!(",{first},{second}"));
            }
        }
    }
    let mut seen = BTreeSet::new();
    strings.retain(|text| seen.insert(text.clone()));
    strings
}

/// Whether a backend has a property, which `property` begins with.
fn has(backend: &str, property: &str) -> bool {
    let name = property.split('=').next().unwrap_or_default();
    let of_memfd = ["hugetlb", "hugetlbsize", "seal"];
    let of_file = ["align", "offset", "discard-data", "readonly", "rom", "pmem"];
    match backend.split(',').next() {
        Some("memory-backend-memfd") => !of_file.contains(&name),
        Some("memory-backend-shm") => !of_file.contains(&name) && !of_memfd.contains(&name),
        _ => !of_memfd.contains(&name),
    }
}

/// Strings for a pool that has as many pages of 2 MiB as RAM of 4 MiB needs.
pub(super) const TWO_HUGE_PAGES: [&str; 8] = [
    "memory-backend-memfd,id=m,size=2M,hugetlb=on",
    "memory-backend-memfd,id=m,size=4M,hugetlb=on,hugetlbsize=2M",
    "memory-backend-memfd,id=m,size=4M,hugetlb=on,seal=off",
    "memory-backend-memfd,id=m,size=4M,hugetlb=on,prealloc=on",
    "memory-backend-memfd,id=m,size=6M,hugetlb=on",
    "memory-backend-memfd,id=m,size=6M,hugetlb=on,reserve=off",
    "memory-backend-memfd,id=m,size=3M,hugetlb=on",
    "memory-backend-memfd,id=m,size=2M,hugetlb=on,hugetlbsize=4K",
];

/// Whether a string says something about huge pages of a pool, of which others may take some.
pub(super) fn is_about_a_pool(text: &str) -> bool {
    let mut parts = text.split(',');
    parts.any(|part| part == "hugetlb" || part.starts_with("hugetlb="))
}
