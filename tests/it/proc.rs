//! What the kernel says about this process: its mappings, its descriptors, its names in /dev/shm.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

/// A line of /proc/self/maps.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MapsLine {
    pub(crate) range: Range<u64>,
    /// For example `rw-s`.
    pub(crate) permissions: String,
    pub(crate) offset: u64,
    pub(crate) path: String,
}

impl MapsLine {
    /// The line that `text` is, if it is one.
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let range = hex(start)?..hex(end)?;
        let permissions = words.next()?.to_owned();
        let offset = hex(words.next()?)?;
        let path = words.skip(2).collect::<Vec<_>>().join(" ");
        Some(Self {
            range,
            permissions,
            offset,
            path,
        })
    }
}

/// All mappings of this process, by address.
pub(crate) fn maps() -> Vec<MapsLine> {
    let text = fs::read_to_string("/proc/self/maps").expect("procfs is mounted");
    text.lines().filter_map(MapsLine::parse).collect()
}

/// The mappings that have an address in `range`.
pub(crate) fn maps_in(range: Range<u64>) -> Vec<MapsLine> {
    let mut maps = maps();
    maps.retain(|line| line.range.start < range.end && range.start < line.range.end);
    maps
}

/// The mapping that starts at `start`, in full: the lines of its entry in /proc/self/smaps.
pub(crate) fn smaps_at(start: *const u8) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/smaps").expect("procfs is mounted");
    let mut lines = text.lines().skip_while(|line| {
        MapsLine::parse(line).is_none_or(|line| line.range.start != start.addr() as u64)
    });
    let head = lines.next().expect("a mapping starts there");
    let rest = lines.take_while(|line| MapsLine::parse(line).is_none());
    std::iter::once(head)
        .chain(rest)
        .map(str::to_owned)
        .collect()
}

/// A value of an entry of smaps, for example that of `KernelPageSize`.
pub(crate) fn smaps_value(entry: &[String], name: &str) -> String {
    let value = entry
        .iter()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.expect("smaps has the value").trim().to_owned()
}

/// Whether an entry of smaps has a flag, for example `dd` (left out of core dumps).
pub(crate) fn has_vm_flag(entry: &[String], flag: &str) -> bool {
    let flags = smaps_value(entry, "VmFlags");
    flags.split_ascii_whitespace().any(|found| found == flag)
}

/// What this process holds that memory is made of, to be compared before and after.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// What the descriptors stand for, in their order.
    descriptors: Vec<(i32, String)>,
    /// Mappings of shared memory.
    mappings: Vec<MapsLine>,
    /// Inaccessible address space that is no part of a file: reservations and guards, in bytes.
    reserved: u64,
    /// Names of this process in /dev/shm.
    names: Vec<String>,
}

impl Holdings {
    /// Whether the process has no more than it had before.
    ///
    /// Only a process that does nothing else can say so: see `isolation::in_own_process`.
    pub(crate) fn now() -> Self {
        let mut mappings = maps();
        // The allocators of AddressSanitizer and ThreadSanitizer set aside what they like.
        let sanitizers = ["ASAN_OPTIONS", "TSAN_OPTIONS"];
        let sanitized = sanitizers
            .iter()
            .any(|name| std::env::var_os(name).is_some());
        let counted = mappings.iter().filter(|_| !sanitized);
        let reserved = counted
            .filter(|line| line.permissions == "---p" && line.path.is_empty())
            .map(|line| line.range.end - line.range.start)
            .sum();
        mappings.retain(|line| {
            ["/memfd:", "/dev/shm", "/anon_hugepage", "/SYSV"]
                .iter()
                .any(|path| line.path.starts_with(path))
        });
        Self {
            descriptors: descriptors(),
            mappings,
            reserved,
            names: shm_names(),
        }
    }
}

impl Holdings {
    /// As [`now`](Self::now), but for address space that is set aside, for the heaps of threads
    /// too.
    pub(crate) fn beside_heaps() -> Self {
        Self {
            reserved: 0,
            ..Self::now()
        }
    }

    /// As [`now`](Self::now), but for what the C library sets aside for threads: the guard page of
    /// a stack, which it keeps for the next thread, and the rest of a heap, which ends at 64 MiB.
    pub(crate) fn beside_threads() -> Self {
        const HEAP: u64 = 64 << 20;
        let all = maps();
        let lone = all.iter().filter(|line| {
            let size = line.range.end - line.range.start;
            let is_guard = size == crate::isolation::PAGE;
            let is_heap = line.range.end.is_multiple_of(HEAP) && size < HEAP;
            line.permissions == "---p" && line.path.is_empty() && !is_guard && !is_heap
        });
        Self {
            reserved: lone.map(|line| line.range.end - line.range.start).sum(),
            ..Self::now()
        }
    }
}

/// How many threads this process has.
pub(crate) fn thread_count() -> usize {
    let tasks = fs::read_dir("/proc/self/task").expect("procfs is mounted");
    tasks.count()
}

/// The open descriptors and what they stand for, without the one that is open to look.
fn descriptors() -> Vec<(i32, String)> {
    let dir = fs::read_dir("/proc/self/fd").expect("procfs is mounted");
    let names: Vec<_> = dir.flatten().map(|entry| entry.path()).collect();
    let mut found: Vec<_> = names
        .into_iter()
        .filter_map(|path| {
            let target = fs::read_link(&path).ok()?;
            let number = path.file_name()?.to_str()?.parse().ok()?;
            Some((number, target.to_string_lossy().into_owned()))
        })
        .collect();
    found.sort();
    found
}

/// How many descriptors of `file` this process has.
pub(crate) fn descriptors_of(file: &fs::File) -> usize {
    let inode = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let ours = inode(file.metadata().expect("it is open"));
    let open = fs::read_dir("/proc/self/fd").expect("procfs is mounted");
    let open = open.flatten();
    open.filter(|entry| fs::metadata(entry.path()).is_ok_and(|it| inode(it) == ours))
        .count()
}

/// The names in /dev/shm that this process would use.
pub(crate) fn shm_names() -> Vec<String> {
    let prefix = format!("gms-{}-", std::process::id());
    let Ok(dir) = fs::read_dir("/dev/shm") else {
        return Vec::new();
    };
    let names = dir.flatten().map(|entry| entry.file_name());
    let mut names: Vec<_> = names
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.retain(|name| name.starts_with(&prefix));
    names.sort();
    names
}

/// Runs `scenario` and asserts that this process has afterwards what it had before.
pub(crate) fn leaves_nothing<R>(scenario: impl FnOnce() -> R) -> R {
    let before = Holdings::now();
    let result = scenario();
    assert_eq!(Holdings::now(), before, "something is left");
    result
}

/// As [`leaves_nothing`], for what starts threads: the C library sets address space aside for the
/// heap of a thread, and keeps it for the next.
pub(crate) fn leaves_nothing_but_heaps<R>(scenario: impl FnOnce() -> R) -> R {
    let before = Holdings::beside_heaps();
    let result = scenario();
    assert_eq!(Holdings::beside_heaps(), before, "something is left");
    result
}

#[test]
fn holdings_are_the_same_however_large_the_heap_is() {
    super::isolation::in_own_process(|| {
        let before = Holdings::now();
        let heap: Vec<_> = (0..1000).map(|_| vec![1u8; 10_000]).collect();
        assert_eq!(Holdings::now(), before);
        drop(heap);
        assert_eq!(Holdings::now(), before);
    });
}

#[test]
fn holdings_of_a_process_of_its_own_are_no_inheritance() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    // Here and in the process of its own; were it inherited, there would be two there.
    let file = memfd_create("inherited", MFdFlags::empty()).expect("created");
    super::isolation::in_own_process(|| {
        let held = format!("{:?}", Holdings::now());
        assert_eq!(held.matches("/memfd:inherited").count(), 1, "{held}");
    });
    drop(file);
}

#[test]
fn holdings_see_a_descriptor_a_mapping_and_a_reservation() {
    super::isolation::in_own_process(|| {
        let nothing = Holdings::now();
        let backing =
            guest_memory_shm::ShmBacking::create(&guest_memory_shm::RamOptions::new(), 4096)
                .expect("created");
        let one = Holdings::now();
        assert_eq!(one.descriptors.len(), nothing.descriptors.len() + 1);
        let start = vm_memory::GuestAddress(0);
        let region =
            guest_memory_shm::GuestRegionShm::<()>::from_backing(&backing, 0, (start, 4096))
                .expect("mapped");
        let two = Holdings::now();
        assert_eq!(two.mappings.len(), nothing.mappings.len() + 1);
        assert_eq!(two.reserved, nothing.reserved + 8192);
        drop(region);
        assert_eq!(Holdings::now(), one);
        drop(backing);
        assert_eq!(Holdings::now(), nothing);
        let named = super::isolation::shm_dir();
        assert_eq!(Holdings::now().names.len(), 1);
        drop(named);
        assert_eq!(Holdings::now(), nothing);
    });
}
