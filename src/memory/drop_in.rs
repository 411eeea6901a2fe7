//! Constructors with the shapes of vm-memory's own type, for code that was written for it.
//!
//! They take ranges as `GuestMemoryMmap` does: sorted, of any size, at any address. A region is as
//! long as it was asked for, and the rest of its last page is mapped, but in no region. What
//! needs whole pages refuses such a region ([`InvalidRange::PartialPages`]); the builder never
//! makes one.
//!
//! [`InvalidRange::PartialPages`]: crate::InvalidRange::PartialPages

use std::borrow::Borrow;
use std::fs::File;
use std::sync::Arc;

use vm_memory::bitmap::NewBitmap;
use vm_memory::{FileOffset, GuestAddress};

use super::{GuestMemoryShm, check_sorted};
use crate::backing::ShmBacking;
use crate::options::RamOptions;
use crate::range::GuestRange;
use crate::region::{GuestRegionShm, Result};
#[cfg(doc)]
use crate::{GuestMemoryShmBuilder, InvalidRange, MemoryError};

impl<B: NewBitmap> GuestMemoryShm<B> {
    /// RAM in the given ranges (guest address, size in bytes), sorted by address, all on one
    /// sealed memfd, in that order.
    ///
    /// Sizes and addresses need not be multiples of the page size, as with `GuestMemoryMmap`. A
    /// region of another size can be used by this process, and populated; memory tables, memory
    /// slots and discards refuse it ([`InvalidRange::PartialPages`]).
    ///
    /// # Errors
    ///
    /// [`MemoryError::NoRanges`] without any range, [`MemoryError::Unsorted`], and those of
    /// [`GuestMemoryShmBuilder::build`].
    pub fn from_ranges(ranges: &[(GuestAddress, usize)]) -> Result<Self> {
        Self::from_ranges_with_files(ranges.iter().map(|(addr, size)| (*addr, *size, None)))
    }

    /// RAM as [`from_ranges`](Self::from_ranges), where each range may name a file and the offset
    /// in it at which it starts, in bytes, a multiple of the page size.
    ///
    /// Any file that can be mapped shared, for reading and writing, is taken: a memfd, one on a
    /// hugetlbfs or on a disk. It must be long enough, and may end inside the last page of the
    /// range, as the range may. One that is not sealed can be truncated by
    /// any process that has it, and touching what is gone is SIGBUS.
    ///
    /// ```
    /// use guest_memory_shm::GuestMemoryShm;
    /// use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
    ///
    /// let file = tempfile::tempfile()?;
    /// file.set_len(0x1400)?;
    /// let memory = GuestMemoryShm::<()>::from_ranges_with_files([
    ///     (GuestAddress(0), 0x400, Some(FileOffset::new(file, 0x1000))),
    ///     (GuestAddress(0x400), 0x400, None),
    /// ])?;
    /// let region = memory.find_region(GuestAddress(0x10)).expect("there is RAM");
    /// assert_eq!(region.file_offset().map(|file| file.start()), Some(0x1000));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`from_ranges`](Self::from_ranges) and [`ShmBacking::adopt`], and
    /// [`BackingError::EndsInPage`](crate::BackingError::EndsInPage).
    pub fn from_ranges_with_files<A, T>(ranges: T) -> Result<Self>
    where
        A: Borrow<(GuestAddress, usize, Option<FileOffset>)>,
        T: IntoIterator<Item = A>,
    {
        Self::from_ranges_with_options(ranges, &RamOptions::new())
    }

    /// RAM as [`from_ranges_with_files`](Self::from_ranges_with_files), with options: ranges
    /// without a file are created with them, and those of files take what RAM on an object that
    /// exists can have ([`ShmBacking::with_options`]).
    ///
    /// What has no effect is logged, and is in the [report](GuestRegionShm::report) of each
    /// region.
    ///
    /// ```
    /// use guest_memory_shm::{GuestMemoryShm, Populate, RamOptions};
    /// use vm_memory::{FileOffset, GuestAddress};
    ///
    /// let file = tempfile::tempfile_in("/dev/shm")?;
    /// file.set_len(2 << 20)?;
    /// let memory = GuestMemoryShm::<()>::from_ranges_with_options(
    ///     [
    ///         (GuestAddress(0), 1 << 20, Some(FileOffset::new(file, 1 << 20))),
    ///         (GuestAddress(1 << 20), 1 << 20, None),
    ///     ],
    ///     &RamOptions::new().with_populate(Populate::Allocate),
    /// )?;
    /// assert_eq!(memory.stats()?.allocated(), 2 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`from_ranges_with_files`](Self::from_ranges_with_files) and
    /// [`ShmBacking::with_options`], and [`MemoryError::Populate`].
    pub fn from_ranges_with_options<A, T>(ranges: T, options: &RamOptions) -> Result<Self>
    where
        A: Borrow<(GuestAddress, usize, Option<FileOffset>)>,
        T: IntoIterator<Item = A>,
    {
        let mut checked = Vec::new();
        let mut new = Vec::new();
        let mut on_files = Vec::new();
        for range in ranges {
            let (addr, size, file) = range.borrow();
            checked.push(GuestRange::new(*addr, *size as u64)?);
            match file {
                None => new.push((*addr, *size as u64)),
                Some(file) => on_files.push((*addr, *size as u64, file.clone())),
            }
        }
        check_sorted(checked.into_iter())?;
        let mut builder = Self::builder().of_any_size();
        if !new.is_empty() {
            builder = builder.add_ram(options.clone(), new);
        }
        // Ranges of one file share its backing, and so what is known of it.
        let mut backings: Vec<(Arc<File>, ShmBacking)> = Vec::new();
        for (addr, size, file) in on_files {
            let known = backings
                .iter()
                .find(|(known, _)| Arc::ptr_eq(known, file.arc()));
            let backing = match known {
                Some((_, backing)) => backing.clone(),
                None => ShmBacking::of_file(file.arc().clone(), options)?,
            };
            backing.check_inside_file(file.start(), size)?;
            builder = builder.add_backing(&backing, file.start(), [(addr, size)]);
            backings.push((file.arc().clone(), backing));
        }
        builder.build()
    }
}

impl<B: NewBitmap> GuestRegionShm<B> {
    /// A region of `size` bytes at `start`, on a part of a file, or on a sealed memfd of its own:
    /// one range of [`GuestMemoryShm::from_ranges_with_files`].
    ///
    /// ```
    /// use guest_memory_shm::GuestRegionShm;
    /// use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
    ///
    /// let region = GuestRegionShm::<()>::from_range(GuestAddress(0x1000), 300, None)?;
    /// assert!(region.write_obj(1u8, MemoryRegionAddress(299)).is_ok());
    /// assert!(region.write_obj(1u8, MemoryRegionAddress(300)).is_err());
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`GuestMemoryShm::from_ranges_with_files`].
    pub fn from_range(start: GuestAddress, size: usize, file: Option<FileOffset>) -> Result<Self> {
        Self::from_range_with_options(start, size, file, &RamOptions::new())
    }

    /// A region as [`from_range`](Self::from_range), with options: one range of
    /// [`GuestMemoryShm::from_ranges_with_options`].
    ///
    /// ```
    /// use guest_memory_shm::{CoreDump, GuestRegionShm, RamOptions};
    /// use vm_memory::{FileOffset, GuestAddress};
    ///
    /// let file = tempfile::tempfile_in("/dev/shm")?;
    /// file.set_len(1 << 20)?;
    /// let region = GuestRegionShm::<()>::from_range_with_options(
    ///     GuestAddress(4 << 30),
    ///     1 << 20,
    ///     Some(FileOffset::new(file, 0)),
    ///     &RamOptions::new().with_core_dump(CoreDump::Include),
    /// )?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`GuestMemoryShm::from_ranges_with_options`].
    pub fn from_range_with_options(
        start: GuestAddress,
        size: usize,
        file: Option<FileOffset>,
        options: &RamOptions,
    ) -> Result<Self> {
        let memory = GuestMemoryShm::from_ranges_with_options([(start, size, file)], options)?;
        Ok(Self::clone(&memory.regions[0]))
    }
}
