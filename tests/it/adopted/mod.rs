//! Options of RAM on objects that other processes made: what created RAM takes, adopted RAM does.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use guest_memory_shm::{
    AdoptPolicy, Error, GuestMemoryShm, GuestRegionShm, RamOptions, ShmBacking,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress};

mod placed;
mod populated;
mod refused;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const START: GuestAddress = GuestAddress(4 << 30);

/// Files of other processes that can be RAM, and whether they are in memory.
fn files(len: u64) -> [(File, bool); 3] {
    let shm = tempfile::tempfile_in("/dev/shm").unwrap();
    let disk = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let files = [(memfd(len), true), (shm, true), (disk, false)];
    for (file, _) in &files {
        file.set_len(len).unwrap();
    }
    files
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("theirs", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.set_len(len).unwrap();
    file
}

fn fd_of(file: &File) -> OwnedFd {
    file.try_clone().unwrap().into()
}

fn adopt(file: &File, options: &RamOptions) -> Result<ShmBacking, Error> {
    let policy = AdoptPolicy::new()
        .with_disk_files()
        .with_options(options.clone());
    Ok(ShmBacking::adopt(fd_of(file), &policy)?)
}

/// Makes RAM of the first `size` bytes of a file, at [`START`].
type Way = fn(&File, u64, &RamOptions) -> Result<GuestMemoryShm, Error>;

/// Each way in which RAM on a file is given options.
const WAYS: [(&str, Way); 5] = [
    ("adopted with options", |file, size, options| {
        add(&adopt(file, options)?, size)
    }),
    ("given options later", |file, size, options| {
        add(
            &adopt(file, &RamOptions::new())?.with_options(options)?,
            size,
        )
    }),
    ("a region", |file, size, options| {
        let backing = adopt(file, options)?;
        one(GuestRegionShm::from_backing(&backing, 0, (START, size))?)
    }),
    ("ranges of files", |file, size, options| {
        let range = (START, size as usize, offset(file, 0));
        Ok(GuestMemoryShm::from_ranges_with_options([range], options)?)
    }),
    ("a range of a file", |file, size, options| {
        let file = offset(file, 0);
        one(GuestRegionShm::from_range_with_options(
            START,
            size as usize,
            file,
            options,
        )?)
    }),
];

fn add(backing: &ShmBacking, size: u64) -> Result<GuestMemoryShm, Error> {
    let builder = GuestMemoryShm::builder();
    Ok(builder.add_backing(backing, 0, [(START, size)]).build()?)
}

fn one(region: GuestRegionShm) -> Result<GuestMemoryShm, Error> {
    Ok(GuestMemoryShm::from_regions(vec![region])?)
}

fn offset(file: &File, at: u64) -> Option<FileOffset> {
    Some(FileOffset::new(file.try_clone().unwrap(), at))
}

fn region(memory: &GuestMemoryShm) -> GuestRegionShm {
    GuestRegionShm::clone(&memory.arc_regions()[0])
}

/// A memfd of this length that another process made, of huge pages.
fn huge_memfd(len: u64) -> OwnedFd {
    let page_size = guest_memory_shm::PageSize::Huge(Some(2 * MIB));
    let options = RamOptions::new().with_page_size(page_size);
    let theirs = ShmBacking::create(&options, len).unwrap();
    theirs.as_fd().try_clone_to_owned().unwrap()
}
