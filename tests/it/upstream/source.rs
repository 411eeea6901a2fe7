//! Where the sources of a crate are, and what is changed in a copy of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{skip, sources, top};

/// A copy of a crate's tests, with our types in it.
pub(super) struct Patched {
    pub(super) dir: PathBuf,
    /// The names of all its tests, those left out, too.
    pub(super) tests: Vec<String>,
}

/// The sources that cargo has of a crate that we are built with. Prints why the test is skipped if
/// they are not there, or are of another version than the patches.
pub(super) fn registry_source(name: &str, version: &str) -> Option<PathBuf> {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--format-version", "1"])
        .current_dir(top())
        .output()
        .unwrap();
    let found = serde_json::from_slice::<serde_json::Value>(&metadata.stdout).ok();
    let found = found.and_then(|metadata| {
        let packages = metadata["packages"].as_array()?.iter();
        let mut packages = packages.filter(|package| package["name"] == name);
        let package = packages.find(|package| package["version"] == version)?;
        let dir = Path::new(package["manifest_path"].as_str()?).parent()?;
        dir.join("src/lib.rs").is_file().then(|| dir.to_owned())
    });
    if found.is_none() {
        skip(&format!("cargo has no sources of {name} {version}"));
    }
    found
}

/// The parts of vm-memory that have tests of its memory, or what those tests need: a module of
/// ours with its name, its file, and what the file imports that the tests use.
const VM_MEMORY: [(&str, &str, &str); 6] = [
    (
        "atomic",
        "atomic.rs",
        "pub use vm_memory::atomic::*;
         use crate::GuestAddressSpace; use std::sync::Arc;",
    ),
    (
        "bitmap",
        "bitmap/mod.rs",
        "pub use vm_memory::bitmap::*;
         use crate::{GuestMemoryBackend, GuestMemoryRegion}; use std::fmt::Debug;",
    ),
    (
        "bytes",
        "bytes.rs",
        "pub use vm_memory::bytes::*;
         use crate::{ReadVolatile, WriteVolatile};
         use std::mem::size_of; use std::sync::atomic::Ordering;",
    ),
    (
        "guest_memory",
        "guest_memory.rs",
        "pub use vm_memory::guest_memory::*;
         use crate::{Address, Bytes, GuestMemoryRegion}; use std::fs::File;",
    ),
    (
        "mmap",
        "mmap/mod.rs",
        "pub use crate::{GuestMemoryMmap, GuestRegionMmap};
         use vm_memory::mmap::MmapRegion;
         use crate::{Address, FileOffset, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};
         use crate::VolatileMemory; use std::mem::size_of; use std::sync::Arc;",
    ),
    ("region", "region.rs", "pub use vm_memory::region::*;"),
];

/// What stands for vm-memory's own crate: its names, but for those that are ours.
const FACADE: &str = "
#![cfg(test)]
#![allow(warnings)]

pub use guest_memory_shm::{
    GuestMemoryShm as GuestMemoryMmap, GuestRegionShm as GuestRegionMmap, MemoryError,
};
pub use vm_memory::*;

mod matches {
    macro_rules! assert_matches {
        ($value:expr, $($pattern:tt)*) => {
            match $value {
                $($pattern)* => {}
                ref other => panic!(\"{other:?}\"),
            }
        };
    }
    pub(crate) use assert_matches;
}

macro_rules! new_region {
    (start: $start:expr, len: $len:expr $(,)?) => {
        crate::GuestRegionMmap::from_range($start, $len as usize, None).unwrap()
    };
    ($start:ident, $len:ident) => {
        crate::new_region!(start: $start, len: $len)
    };
}
pub(crate) use new_region;
";

/// What is replaced in the tests of a module.
const PATCHES: [(&str, &str, &str); 15] = [
    ("mmap", "use matches::", "use crate::matches::"),
    ("region", "use matches::", "use crate::matches::"),
    // Aliases of types that are ours.
    (
        "mmap",
        "super::GuestRegionCollection<GuestRegionMmap>",
        "super::GuestMemoryMmap<()>",
    ),
    (
        "region",
        "type Collection = GuestRegionCollection<MockRegion>",
        "type Collection = crate::GuestMemoryMmap<()>",
    ),
    // Regions without memory: ours have some.
    (
        "region",
        "MockRegion { start, len }",
        "crate::new_region! { start, len }",
    ),
    (
        "region",
        "Arc::new(MockRegion {",
        "Arc::new(crate::new_region! {",
    ),
    (
        "atomic",
        "Arc::new(MockRegion {",
        "Arc::new(crate::new_region! {",
    ),
    ("region", "&mmap.start)", "&mmap.start_addr())"),
    ("region", "&mmap.len)", "&mmap.len())"),
    ("region", "[0].start,", "[0].start_addr(),"),
    ("region", "[1].start,", "[1].start_addr(),"),
    // Errors say more.
    (
        "region",
        "Collection, GuestRegionCollectionError>",
        "Collection, crate::MemoryError>",
    ),
    (
        "region",
        "GuestRegionCollectionError::NoMemoryRegion",
        "crate::MemoryError::NoRanges",
    ),
    (
        "region",
        "GuestRegionCollectionError::MemoryRegionOverlap",
        "crate::MemoryError::Range(_)",
    ),
    (
        "region",
        "GuestRegionCollectionError::UnsortedMemoryRegions",
        "crate::MemoryError::Unsorted { .. }",
    ),
];

impl Patched {
    /// The tests of vm-memory's memory and collection of regions, as a crate of their own.
    pub(super) fn vm_memory(upstream: &Path, left_out: &[&str]) -> Self {
        let mut lib = FACADE.to_owned();
        let mut tests = Vec::new();
        for (module, file, imports) in VM_MEMORY {
            let text = fs::read_to_string(upstream.join("src").join(file)).unwrap();
            let (_, text) = text.split_once("\n#[cfg(test)]\n").expect("it has tests");
            let names = names(text).map(|name| format!("{module}::tests::{name}"));
            tests.extend(names);
            let mut text = text.to_owned();
            for (_, from, to) in PATCHES.iter().filter(|(of, ..)| *of == module) {
                assert!(text.contains(from), "{file} has no {from:?}");
                text = text.replace(from, to);
            }
            for name in left_out
                .iter()
                .filter_map(|name| name.strip_prefix(&format!("{module}::tests::")))
            {
                text = without(&text, name);
            }
            lib += &format!("\npub mod {module} {{\n{imports}\n{text}}}\n");
        }
        let dir = folder("vm-memory");
        write(&dir, "lib.rs", &lib);
        manifest(
            &dir,
            "[features]
             default = [\"backend-atomic\", \"backend-bitmap\", \"backend-mmap\", \"rawfd\"]
             backend-atomic = []
             backend-bitmap = []
             backend-mmap = []
             rawfd = []",
        );
        Self { dir, tests }
    }

    /// All of virtio-queue.
    pub(super) fn virtio_queue(upstream: &Path) -> Self {
        let facade = "pub mod facade {
            pub use ::vm_memory::*;
            pub use guest_memory_shm::GuestMemoryShm as GuestMemoryMmap;
        }";
        let dir = folder("virtio-queue");
        let mut tests = Vec::new();
        for file in sources(&upstream.join("src")) {
            let text = fs::read_to_string(&file).unwrap();
            let file = file.strip_prefix(upstream.join("src")).unwrap();
            let module = file.with_extension("").to_str().unwrap().replace('/', "::");
            let module = module.strip_suffix("::mod").unwrap_or(&module);
            tests.extend(names(&text).map(|name| format!("{module}::tests::{name}")));
            let mut text = text.replace("use vm_memory::", "use crate::facade::");
            if module == "lib" {
                text = text.replace("#![deny(missing_docs)]", "#![allow(warnings)]");
                text += facade;
            }
            write(&dir, file.to_str().unwrap(), &text);
        }
        manifest(
            &dir,
            "[dev-dependencies]
             log = \"0.4\"
             memoffset = \"0.9\"
             virtio-bindings = \"0.2\"",
        );
        Self { dir, tests }
    }
}

/// The names of the tests in a file.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split("#[test]\n").skip(1).filter_map(|rest| {
        let (_, rest) = rest.split_once("fn ")?;
        Some(rest.split_once('(')?.0)
    })
}

/// A file without one of its tests, which rustfmt has laid out.
fn without(text: &str, test: &str) -> String {
    let at = text
        .find(&format!("    fn {test}("))
        .expect("there is such a test");
    let start = text[..at].rfind("    #[test]\n").expect("it is a test");
    let end = at + text[at..].find("\n    }\n").expect("it ends") + "\n    }\n".len();
    format!("{}{}", &text[..start], &text[end..])
}

fn folder(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("upstream")
        .join(name);
    fs::create_dir_all(dir.join("src")).unwrap();
    dir
}

/// Writes what is new, so that the rest need not be built again.
fn write(dir: &Path, file: &str, text: &str) {
    let path = dir.join("src").join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    if fs::read_to_string(&path).ok().as_deref() != Some(text) {
        fs::write(path, text).unwrap();
    }
}

fn manifest(dir: &Path, more: &str) {
    let text = format!(
        "[package]
         name = \"upstream\"
         version = \"0.0.0\"
         edition = \"2021\"
         [workspace]
         [dependencies]
         guest-memory-shm = {{ path = {:?}, default-features = false }}
         vmm-sys-util = \"0.15\"
         [dependencies.vm-memory]
         version = \"0.18\"
         features = [\"backend-atomic\", \"backend-bitmap\", \"backend-mmap\"]
         {more}",
        top()
    );
    fs::write(dir.join("Cargo.toml"), text).unwrap();
}
