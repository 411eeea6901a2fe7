//! A listener that is told of each region, as a hypervisor or VFIO: it keeps a descriptor of each
//! and maps it, and runs out of slots, descriptors or address space.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use guest_memory_shm::{
    FileIdentity, GuestMemoryShm, GuestRange, GuestRegionShm, ListenerError, RegionListener,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestMemoryBackend, MmapRegion};

use super::matrix_case::{Fault, Planned};

/// What it says about itself.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("no slot is free")]
    NoSlot,
    #[error("the device is dead")]
    Dead,
}

#[derive(Debug)]
struct Slot {
    range: GuestRange,
    mapping: MmapRegion,
}

#[derive(Debug)]
pub(super) struct Hypervisor {
    pub(super) slots: usize,
    held: Vec<Slot>,
    messages: usize,
    faults: Vec<Planned>,
    dead: bool,
}

impl Hypervisor {
    pub(super) fn new(slots: usize) -> Self {
        Self {
            slots,
            held: Vec::new(),
            messages: 0,
            faults: Vec::new(),
            dead: false,
        }
    }

    /// Counts messages from now on.
    pub(super) fn arm(&mut self, faults: Vec<Planned>) {
        self.messages = 0;
        self.faults = faults;
    }

    /// How many faults have not fired.
    pub(super) fn pending(&self) -> usize {
        self.faults.len()
    }

    /// Has slots for anything, and no faults any more. If it was dead, it has lost what it held.
    pub(super) fn heal(&mut self) {
        self.slots = usize::MAX;
        self.faults.clear();
        if std::mem::take(&mut self.dead) {
            self.held.clear();
        }
    }

    /// What it maps: guest address, size, offset in the file, the file.
    pub(super) fn table(&self) -> Vec<(u64, u64, u64, FileIdentity)> {
        let mut table: Vec<_> = self.held.iter().map(Slot::facts).collect();
        table.sort_unstable_by_key(|(start, ..)| *start);
        table
    }

    fn meets(&mut self) -> Option<Fault> {
        self.messages += 1;
        let messages = self.messages;
        let at = self.faults.iter().position(|f| f.message == messages)?;
        Some(self.faults.remove(at).fault)
    }

    fn alive(&self) -> Result<(), ListenerError> {
        match self.dead {
            true => Err(ListenerError::away(Refusal::Dead)),
            false => Ok(()),
        }
    }
}

impl Slot {
    fn new(region: &GuestRegionShm) -> io::Result<Self> {
        use std::os::fd::AsFd;
        let file = File::from(region.backing().as_fd().try_clone_to_owned()?);
        let file = FileOffset::new(file, region.offset());
        let range = region.range();
        let mapping = MmapRegion::from_file(file, range.size() as usize);
        let mapping = mapping.map_err(|error| match error {
            MmapRegionError::Mmap(error) => error,
            error => io::Error::other(error),
        })?;
        Ok(Self { range, mapping })
    }

    fn facts(&self) -> (u64, u64, u64, FileIdentity) {
        let file = self.mapping.file_offset().expect("it maps a file");
        let metadata = file.file().metadata().unwrap();
        let identity = FileIdentity {
            dev: metadata.dev(),
            ino: metadata.ino(),
        };
        let size = self.mapping.size() as u64;
        (self.range.start_addr().0, size, file.start(), identity)
    }
}

impl RegionListener for Hypervisor {
    fn check(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        match memory.num_regions() > self.slots {
            true => {
                self.faults.retain(|f| f.fault != Fault::OutOfSlots);
                Err(ListenerError::refused(Refusal::NoSlot))
            }
            false => Ok(()),
        }
    }

    fn region_add(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        self.alive()?;
        let slot = match self.meets() {
            Some(Fault::Refuse) => return Err(ListenerError::refused(Refusal::NoSlot)),
            Some(Fault::Dies) => {
                self.dead = true;
                return self.alive();
            }
            Some(Fault::NoDescriptors) => without_descriptors(|| Slot::new(region)),
            Some(Fault::NoMemory) => without_address_space(|| Slot::new(region)),
            _ => Slot::new(region),
        };
        self.held.push(slot.map_err(ListenerError::refused)?);
        Ok(())
    }

    fn region_remove(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        self.alive()?;
        match self.meets() {
            Some(Fault::Refuse) => return Err(ListenerError::refused(Refusal::NoSlot)),
            Some(Fault::Dies) => {
                self.dead = true;
                return self.alive();
            }
            _ => {}
        }
        let held = self
            .held
            .iter()
            .position(|slot| slot.range == region.range());
        self.held.remove(held.expect("it was told of it"));
        Ok(())
    }
}

/// What `work` does while this process may have no descriptor more.
pub(super) fn without_descriptors<T>(work: impl FnOnce() -> T) -> T {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    limit_descriptors();
    let done = work();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    done
}

fn without_address_space<T>(work: impl FnOnce() -> T) -> T {
    let (soft, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
    limit_address_space();
    let done = work();
    setrlimit(Resource::RLIMIT_AS, soft, hard).unwrap();
    done
}

/// Leaves this process no descriptor more than it has.
pub(super) fn limit_descriptors() {
    use std::os::fd::AsRawFd;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let next = File::open("/dev/null").unwrap().as_raw_fd();
    setrlimit(Resource::RLIMIT_NOFILE, next.try_into().unwrap(), hard).unwrap();
}

/// Leaves this process less address space than any region of the matrix needs.
pub(super) fn limit_address_space() {
    let (_, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    setrlimit(Resource::RLIMIT_AS, pages * 4096 + (1 << 20), hard).unwrap();
}
