//! Why options are refused: each error names the property, the value, and what to write instead.

use crate::host::NodeSet;
use crate::range::InvalidRange;
use crate::units::HumanSize;

pub(crate) type Result<T, E = OptionsError> = std::result::Result<T, E>;

/// What is wrong with [`RamOptions`](crate::RamOptions), whether set or read from a string.
///
/// The properties are named as in QEMU's `-object`, which the setters name too.
///
/// ```
/// use guest_memory_shm::{OptionsError, RamOptions};
///
/// let refused = "memory-backend-shm,size=1M,share=off".parse::<RamOptions>();
/// assert!(matches!(
///     refused,
///     Err(OptionsError::NotShared { by_default: false, .. })
/// ));
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// A string names no type of backend.
    #[error(
        "the type of the backend is missing: begin with memory-backend-memfd, memory-backend-shm \
         or memory-backend-file"
    )]
    MissingType,

    /// A string names something other than a backend of RAM that can be shared.
    #[error(
        "qom-type={found}: expected memory-backend-memfd, memory-backend-shm or \
         memory-backend-file"
    )]
    #[non_exhaustive]
    UnknownType {
        /// What it names.
        found: Box<str>,
    },

    /// A string has a property that its type of backend does not have.
    #[error("{property:?} is no property of {of}: it has {}", .known.join(", "))]
    #[non_exhaustive]
    UnknownProperty {
        /// The property.
        property: Box<str>,
        /// The type of backend.
        of: &'static str,
        /// The properties that it has.
        known: &'static [&'static str],
    },

    /// A string lacks a property.
    #[error("{property} is missing: {}", how_to_write(.property))]
    #[non_exhaustive]
    Missing {
        /// The property.
        property: &'static str,
    },

    /// A property cannot have this value.
    #[error("{property}={value}: expected {}", expected(.property))]
    #[non_exhaustive]
    Value {
        /// The property.
        property: &'static str,
        /// Its value.
        value: Box<str>,
    },

    /// A property asks for what QEMU can do and this crate cannot.
    #[error("{property}={value} is not supported: {}", instead_of(.property))]
    #[non_exhaustive]
    Unsupported {
        /// The property.
        property: &'static str,
        /// Its value.
        value: Box<str>,
    },

    /// A string asks for RAM that no other process could see.
    #[error(
        "share=off{}: RAM that cannot be shared cannot be expressed, write share=on",
        if *.by_default { ", the default of memory-backend-file" } else { "" }
    )]
    #[non_exhaustive]
    NotShared {
        /// Whether it is only QEMU's default.
        by_default: bool,
    },

    /// Two properties contradict each other.
    #[error("{first} and {second} contradict each other: {}", why_not_both(.first, .second))]
    #[non_exhaustive]
    Conflict {
        /// The first property, with its value.
        first: &'static str,
        /// The second property, with its value.
        second: &'static str,
    },

    /// A property that this kind of backing does not have.
    #[error("{property} does not go with {}: {}", backing(.of), where_it_goes(.property, .of))]
    #[non_exhaustive]
    NotOfBacking {
        /// The property.
        property: &'static str,
        /// The type of backend.
        of: &'static str,
    },

    /// A property of what is created, for RAM on an object that exists
    /// ([`ShmBacking::with_options`](crate::ShmBacking::with_options)).
    #[error(
        "{property}={value} does not go with RAM on a descriptor that is there already: {}",
        instead_on_existing(.property)
    )]
    #[non_exhaustive]
    NotOfExisting {
        /// The property.
        property: &'static str,
        /// Its value.
        value: Box<str>,
    },

    /// Huge pages of a pool were asked for, for RAM on an object that has other pages.
    #[error(
        "hugetlb=on{} does not go with a descriptor whose pages are {}: leave it out, or use a \
         descriptor of such pages",
        hugetlb_size(*.asked), HumanSize(*.page_size)
    )]
    #[non_exhaustive]
    NotItsPages {
        /// The size that was asked for in bytes, if not the default one.
        asked: Option<u64>,
        /// The size of the pages in bytes.
        page_size: u64,
    },

    /// A size or an offset does not consist of whole pages.
    #[error(transparent)]
    Range(#[from] InvalidRange),

    /// A size that no RAM can have.
    #[error(
        "size={}: RAM has at least one page, and at most the {} that a file can have",
        HumanSize(*.size), HumanSize(*.limit)
    )]
    #[non_exhaustive]
    Size {
        /// The size in bytes.
        size: u64,
        /// The largest size in bytes.
        limit: u64,
    },

    /// A size of huge pages that is no power of two.
    #[error(
        "hugetlbsize={}: the size of a huge page is a power of two, usually 2M or 1G",
        HumanSize(*.size)
    )]
    #[non_exhaustive]
    HugePageSize {
        /// The size in bytes.
        size: u64,
    },

    /// An alignment that is no power of two, or less than a page.
    #[error(
        "align={align:#x}: expected a power of two that is at least the page size {}",
        HumanSize(*.page_size)
    )]
    #[non_exhaustive]
    Align {
        /// The alignment in bytes.
        align: u64,
        /// The page size in bytes.
        page_size: u64,
    },

    /// RAM that ends past the end that a file can have.
    #[error(
        "offset={offset:#x} and a size of {} end past 2^63, longer than any file: lower the \
         offset or the size",
        HumanSize(*.size)
    )]
    #[non_exhaustive]
    PastLongestFile {
        /// The offset in bytes.
        offset: u64,
        /// The size in bytes, 0 if none is set.
        size: u64,
    },

    /// The size that is set is not that of the RAM.
    #[error(
        "size={} does not match the RAM of {}: leave the size out, or make the ranges as large",
        HumanSize(*.set), HumanSize(*.ram)
    )]
    #[non_exhaustive]
    SizeMismatch {
        /// The size that is set, in bytes.
        set: u64,
        /// The size of all ranges together, in bytes.
        ram: u64,
    },

    /// A NUMA policy without the nodes that it applies to.
    #[error("policy={policy}: it needs nodes, write host-nodes=0, or the nodes that are meant")]
    #[non_exhaustive]
    PolicyWithoutNodes {
        /// The policy.
        policy: &'static str,
    },

    /// NUMA nodes without a policy that says what they are for.
    #[error(
        "host-nodes={nodes}: policy=default chooses no nodes, write policy=bind, preferred or \
         interleave"
    )]
    #[non_exhaustive]
    NodesWithoutPolicy {
        /// The nodes.
        nodes: NodeSet,
    },

    /// A NUMA node above the highest that can be named.
    #[error("host-nodes: there is no node {node}, the highest that can be named is 127")]
    #[non_exhaustive]
    NodeNumber {
        /// The node that was asked for.
        node: u32,
    },
}

/// What the value of a property can be.
fn expected(property: &str) -> &'static str {
    match property {
        "id" => "a letter, then letters, digits, '-', '.' and '_'",
        "size" | "hugetlbsize" | "align" | "offset" => {
            "a number of bytes, or one with K, M, G, T, P or E after it (64M, 1.5G), or 0x and \
             digits"
        }
        "prealloc-threads" => "a number from 1 to 4294967295",
        "host-nodes" => "a node or a range of nodes (0 or 0-3); for others write host-nodes again",
        "policy" => "default, preferred, bind or interleave",
        "rom" => "on, off or auto",
        "populate" => "lazy, allocate or prefault",
        "on-shortage" => "refuse or try-anyway",
        "mem-path" => "the path of a file or a directory, not empty and without a zero byte",
        _ => "on or off",
    }
}

fn how_to_write(property: &str) -> &'static str {
    match property {
        "mem-path" => "write mem-path=PATH of a file, or of a directory for a nameless file",
        _ => "write size=64M, or another amount of RAM",
    }
}

fn instead_of(property: &str) -> &'static str {
    match property {
        "pmem" => "persistence is not guaranteed here, leave pmem out",
        _ => "there are no other objects to name here, use prealloc-threads",
    }
}

fn instead_on_existing(property: &str) -> &'static str {
    match property {
        "seal" => "its seals are what they are, leave seal out (AdoptPolicy adds some)",
        "offset" => "leave offset out, and give it where the RAM is placed",
        "readonly" => "RAM is written, leave readonly out, or map the file with GuestRom",
        "discard-data" => "it belongs to others, too, leave discard-data out",
        _ => "nothing is created, leave the kind of backing out (BackingSource::Memfd)",
    }
}

fn hugetlb_size(asked: Option<u64>) -> String {
    asked.map_or_else(String::new, |size| {
        format!(",hugetlbsize={}", HumanSize(size))
    })
}

fn why_not_both(first: &str, second: &str) -> &'static str {
    match (first, second) {
        // QEMU takes it, and then silently discards nothing.
        ("discard-data=on", _) => "discarding writes, drop one of the two",
        (_, "reserve=off") => "populated RAM is always reserved, drop one of the two",
        // QEMU dies of SIGSEGV: it populates by writing.
        ("prealloc=on" | "populate=allocate", "readonly=on") => {
            "populating writes, drop one of the two"
        }
        ("hugetlb=on", _) => "pages are of a pool or gathered by the kernel, drop one of the two",
        ("readonly=on", _) => "what is shared and read-only is a ROM, leave rom=off out",
        ("rom=on", _) => "a ROM that is shared must be read-only, write readonly=on",
        _ => "prealloc=on is populate=prefault, drop one of the two",
    }
}

/// What a type of backend makes.
fn backing(of: &str) -> &'static str {
    match of {
        "memory-backend-memfd" => "a memfd",
        "memory-backend-shm" => "POSIX shared memory",
        _ => "a file",
    }
}

fn where_it_goes(property: &str, of: &str) -> &'static str {
    match (property, of) {
        ("hugetlb", "memory-backend-file") => {
            "its pages are those of its file system, name a path on a hugetlbfs"
        }
        ("hugetlb", _) => {
            "it has no huge pages of a pool, use a memfd backing, or page size transparent \
             (thp=on)"
        }
        ("seal=off", _) => "it cannot be sealed at all, leave seal out or use a memfd",
        _ => "only a file has it, use BackingSource::File",
    }
}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
