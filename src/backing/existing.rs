//! Options of RAM on an object that exists.

use super::error::{BackingError, Result};
use super::kind::BackingKind;
use super::notes;
use super::request::check_nodes;
use super::shm_backing::ShmBacking;
use crate::host::pools;
use crate::options::{OptionsError, PageSize, RamOptions};
use crate::report::{BuildNote, log_notes};

impl ShmBacking {
    /// The same object, for RAM with these options: it may be an adopted one, a part of which is
    /// to be on another NUMA node than the rest, or one that is to be populated when it is mapped
    /// again.
    ///
    /// Regions that are made on what this returns follow these options, all of them; those that
    /// are there keep theirs. The default options are those that a backing is adopted with unless
    /// the [policy](crate::AdoptPolicy::with_options) says otherwise.
    ///
    /// ```
    /// use std::os::fd::AsFd;
    ///
    /// use guest_memory_shm::{
    ///     AdoptPolicy, GuestMemoryShm, NodeSet, NumaPolicy, Populate, RamOptions, ShmBacking,
    /// };
    /// use vm_memory::GuestAddress;
    ///
    /// # let theirs = ShmBacking::create(&RamOptions::new(), 32 << 20)?;
    /// # let fd = theirs.as_fd().try_clone_to_owned().expect("a descriptor is free");
    /// // One descriptor from another process: half of it is on a node and populated.
    /// let backing = ShmBacking::adopt(fd, &AdoptPolicy::new().with_required_seals())?;
    /// let first_node = NodeSet::from_nodes([0]).expect("0 is below 128");
    /// let near = RamOptions::new()
    ///     .with_numa(NumaPolicy::Preferred(first_node))
    ///     .with_populate(Populate::Prefault);
    ///
    /// let (low, high) = ((GuestAddress(0), 16 << 20), (GuestAddress(4 << 30), 16 << 20));
    /// let memory = GuestMemoryShm::<()>::builder()
    ///     .add_backing(&backing.with_options(&near)?, 0, [low])
    ///     .add_backing(&backing, 16 << 20, [high])
    ///     .build()?;
    /// assert_eq!(backing.allocated()?, 16 << 20);
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    ///
    /// | option | for RAM on an object that exists |
    /// |---|---|
    /// | [`numa`](RamOptions::with_numa) | as for new RAM; pages that are there are moved |
    /// | [`populate`](RamOptions::with_populate), threads, [`on_shortage`](RamOptions::with_on_shortage) | as for new RAM, whenever a region is made: what is missing |
    /// | [`page_size`](RamOptions::with_page_size) | [`Transparent`](PageSize::Transparent) as for new RAM, for pages that are not there yet; [`Huge`](PageSize::Huge) only if its pages are such |
    /// | [`reserve`](RamOptions::with_reserve) | huge pages of a pool as for new RAM; the room in its file system is checked if it is populated, or with [`Reserve::On`](crate::Reserve::On) |
    /// | [`core_dump`](RamOptions::with_core_dump), [`align`](RamOptions::with_align) | as for new RAM, of any kind |
    /// | [`name`](RamOptions::with_name) | what reports and stats call it; the name that it has unless set |
    /// | [`size`](RamOptions::with_size) | that of the whole backing, or unset |
    /// | [`backing`](RamOptions::with_backing), [`sealing`](RamOptions::with_sealing), [`offset`](RamOptions::with_offset), [`access`](RamOptions::with_access), [`discard_data`](RamOptions::with_discard_data) | of what is created: refused unless they are the default |
    ///
    /// A NUMA policy is one of the object, for all processes, and stays even if making the region
    /// fails. Pages that another process maps cannot be moved, and that is an error if they are
    /// elsewhere.
    ///
    /// If populating fails, what was allocated is given back, if it was a hole before and holds
    /// nothing but zeros: pages that others made stay. A write of another process at that very
    /// moment may be lost ([`OnFailure::GiveBack`](crate::OnFailure::GiveBack)): leave RAM lazy
    /// that is in use, and [populate](crate::GuestMemoryShm::populate) it with
    /// [`OnFailure::Keep`](crate::OnFailure::Keep).
    ///
    /// # Errors
    ///
    /// [`BackingError::Options`] with [`OptionsError::NotOfExisting`],
    /// [`OptionsError::NotItsPages`], [`OptionsError::SizeMismatch`], and for what
    /// [`RamOptions::check`] refuses; [`BackingError::NoSuchNodes`].
    pub fn with_options(&self, options: &RamOptions) -> Result<Self> {
        check(options, self.kind(), self.page_size())?;
        check_size(options, self.size())?;
        let mut options = options.clone().with_access(self.options().access());
        options.check_writing()?;
        if let (None, Some(name)) = (options.name(), self.name()) {
            options = options.with_name(name);
        }
        let mut notes = notes::of_options(&options, self.kind());
        log_notes(options.name().unwrap_or(&self.label()), &notes);
        // They are about the object.
        let limits = self.notes().iter();
        notes.extend(
            limits
                .filter(|note| matches!(note, BuildNote::Shortage(_)))
                .cloned(),
        );
        Ok(self.seen_with(options, notes))
    }
}

/// Refuses options that RAM on an object of this kind cannot have.
pub(super) fn check(options: &RamOptions, kind: BackingKind, page_size: u64) -> Result<()> {
    options.check_existing()?;
    if let PageSize::Huge(asked) = options.page_size() {
        let wanted = asked.or_else(pools::default_page_size);
        if !kind.is_hugetlb() || wanted.is_some_and(|wanted| wanted != page_size) {
            return Err(OptionsError::NotItsPages { asked, page_size }.into());
        }
    }
    options.check_align(page_size)?;
    check_nodes(options.numa())
}

/// Refuses a size that is not that of the whole object.
pub(super) fn check_size(options: &RamOptions, size: u64) -> Result<()> {
    match options.size() {
        Some(set) if set != size => {
            let ram = size;
            Err(BackingError::from(OptionsError::SizeMismatch { set, ram }))
        }
        _ => Ok(()),
    }
}
