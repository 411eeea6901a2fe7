//! What a daemon demands of the memory that it is sent.

use crate::backing::AdoptPolicy;

/// How many regions a daemon takes unless it offers more (vhost-user specification, "Memory
/// regions description").
const BASELINE_REGIONS: usize = 8;

/// What a daemon demands of the memory that it is sent.
///
/// Unless set otherwise: at most 8 regions, of any size, on memfds, POSIX shared memory and
/// hugetlbfs files, sealed or not. A frontend that is not trusted must be made to seal its files:
/// it could truncate one that is not, and the daemon's next touch would be SIGBUS.
///
/// ```
/// use guest_memory_shm::receive::ReceivePolicy;
/// use guest_memory_shm::{AdoptPolicy};
///
/// let policy = ReceivePolicy::new()
///     .with_mem_slots(509) // the answer to GET_MAX_MEM_SLOTS
///     .with_max_size(1 << 40)
///     .with_descriptors(AdoptPolicy::new().with_required_seals());
/// assert_eq!(policy.mem_slots(), 509);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivePolicy {
    mem_slots: usize,
    max_size: u64,
    descriptors: AdoptPolicy,
}

impl ReceivePolicy {
    /// Takes 8 regions on shared memory of any kind and size, sealed or not.
    pub fn new() -> Self {
        Self {
            mem_slots: BASELINE_REGIONS,
            max_size: u64::MAX,
            descriptors: AdoptPolicy::new(),
        }
    }

    /// Sets how many regions a table may have, also by SET_MEM_TABLE: what the daemon answers to
    /// GET_MAX_MEM_SLOTS; 8 unless set.
    #[must_use]
    pub fn with_mem_slots(mut self, mem_slots: usize) -> Self {
        self.mem_slots = mem_slots;
        self
    }

    /// Sets how many bytes all regions together may have; any number unless set.
    ///
    /// Untouched pages cost a frontend nothing, but address space and the dirty bitmaps
    /// of regions cost the daemon: a bitmap of 64 TiB is 2 GiB of its own memory.
    #[must_use]
    pub fn with_max_size(mut self, max_size: u64) -> Self {
        self.max_size = max_size;
        self
    }

    /// Sets what is demanded of descriptors: their kinds and seals; that of [`AdoptPolicy::new`]
    /// unless set.
    ///
    /// The length in it ([`AdoptPolicy::with_min_len`]) is not used: a file must always be long
    /// enough for its region.
    #[must_use]
    pub fn with_descriptors(mut self, descriptors: AdoptPolicy) -> Self {
        self.descriptors = descriptors;
        self
    }

    /// How many regions a table may have: the daemon's answer to GET_MAX_MEM_SLOTS.
    pub fn mem_slots(&self) -> usize {
        self.mem_slots
    }

    /// How many bytes all regions together may have.
    pub fn max_size(&self) -> u64 {
        self.max_size
    }

    /// What is demanded of descriptors.
    pub fn descriptors(&self) -> &AdoptPolicy {
        &self.descriptors
    }
}

impl Default for ReceivePolicy {
    fn default() -> Self {
        Self::new()
    }
}
