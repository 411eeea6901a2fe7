//! The texts of errors of options.

use super::*;

#[test]
fn texts_name_the_property_the_value_and_the_way_out() {
    let cases = [
        (
            OptionsError::MissingType,
            "the type of the backend is missing: begin with memory-backend-memfd, \
             memory-backend-shm or memory-backend-file",
        ),
        (
            OptionsError::UnknownType {
                found: "memory-backend-ram".into(),
            },
            "qom-type=memory-backend-ram: expected memory-backend-memfd, memory-backend-shm or \
             memory-backend-file",
        ),
        (
            OptionsError::UnknownProperty {
                property: "siz".into(),
                of: "memory-backend-shm",
                known: &["id", "size"],
            },
            "\"siz\" is no property of memory-backend-shm: it has id, size",
        ),
        (
            OptionsError::Missing { property: "size" },
            "size is missing: write size=64M, or another amount of RAM",
        ),
        (
            OptionsError::Value {
                property: "merge",
                value: "maybe".into(),
            },
            "merge=maybe: expected on or off",
        ),
        (
            OptionsError::Unsupported {
                property: "pmem",
                value: "on".into(),
            },
            "pmem=on is not supported: persistence is not guaranteed here, leave pmem out",
        ),
        (
            OptionsError::NotShared { by_default: false },
            "share=off: RAM that cannot be shared cannot be expressed, write share=on",
        ),
        (
            OptionsError::NotShared { by_default: true },
            "share=off, the default of memory-backend-file: RAM that cannot be shared cannot be \
             expressed, write share=on",
        ),
        (
            OptionsError::Conflict {
                first: "prealloc=on",
                second: "reserve=off",
            },
            "prealloc=on and reserve=off contradict each other: populated RAM is always reserved, \
             drop one of the two",
        ),
        (
            OptionsError::NotOfBacking {
                property: "align",
                of: "memory-backend-memfd",
            },
            "align does not go with a memfd: only a file has it, use BackingSource::File",
        ),
        (
            OptionsError::NotOfExisting {
                property: "mem-path",
                value: "/dev/shm/ram".into(),
            },
            "mem-path=/dev/shm/ram does not go with RAM on a descriptor that is there already: \
             nothing is created, leave the kind of backing out (BackingSource::Memfd)",
        ),
        (
            OptionsError::NotItsPages {
                asked: Some(2 << 20),
                page_size: 4096,
            },
            "hugetlb=on,hugetlbsize=2 MiB does not go with a descriptor whose pages are 4 KiB: \
             leave it out, or use a descriptor of such pages",
        ),
        (
            OptionsError::NotItsPages {
                asked: None,
                page_size: 4096,
            },
            "hugetlb=on does not go with a descriptor whose pages are 4 KiB: leave it out, or use \
             a descriptor of such pages",
        ),
        (
            OptionsError::Size {
                size: 0,
                limit: 1 << 62,
            },
            "size=0 bytes: RAM has at least one page, and at most the 4 EiB that a file can have",
        ),
        (
            OptionsError::HugePageSize { size: 3 << 20 },
            "hugetlbsize=3 MiB: the size of a huge page is a power of two, usually 2M or 1G",
        ),
        (
            OptionsError::Align {
                align: 0x400,
                page_size: 4096,
            },
            "align=0x400: expected a power of two that is at least the page size 4 KiB",
        ),
        (
            OptionsError::PastLongestFile {
                offset: 0x7fff_ffff_ffff_f000,
                size: 8192,
            },
            "offset=0x7ffffffffffff000 and a size of 8 KiB end past 2^63, longer than any file: \
             lower the offset or the size",
        ),
        (
            OptionsError::SizeMismatch {
                set: 1 << 20,
                ram: 2 << 20,
            },
            "size=1 MiB does not match the RAM of 2 MiB: leave the size out, or make the ranges \
             as large",
        ),
        (
            OptionsError::PolicyWithoutNodes { policy: "bind" },
            "policy=bind: it needs nodes, write host-nodes=0, or the nodes that are meant",
        ),
        (
            OptionsError::NodesWithoutPolicy {
                nodes: NodeSet::from_nodes([0, 2, 3]).unwrap(),
            },
            "host-nodes=0,2-3: policy=default chooses no nodes, write policy=bind, preferred or \
             interleave",
        ),
        (
            OptionsError::NodeNumber { node: 128 },
            "host-nodes: there is no node 128, the highest that can be named is 127",
        ),
    ];
    for (error, text) in cases {
        assert_eq!(error.to_string(), text);
    }
}
