//! The memory as readers see it.

use std::fmt;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard};

use super::error::{AddressSpaceError, Result};
use crate::memory::GuestMemoryShm;
use crate::panics::caught;

/// The memory of an [`AddressSpace`](crate::AddressSpace), as it is published: for devices and the
/// threads of virtqueues.
///
/// vm-memory's `GuestAddressSpace` that can only be read: what publishes is the address space,
/// after all listeners were told. Taking the memory out of it (`memory()`) costs as much as with
/// `GuestMemoryAtomic`, and never waits. A clone costs one reference count, and outlives the
/// address space.
///
/// Device code that names `GuestMemoryAtomic` in its types gets
/// [`AddressSpace::atomic`](crate::AddressSpace::atomic).
///
/// ```
/// use guest_memory_shm::{AddressSpace, GuestMemoryShm, PublishedMemory};
/// use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
///
/// struct Device {
///     memory: PublishedMemory,
/// }
///
/// let boot = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let space = AddressSpace::new(boot);
/// let device = Device { memory: space.published() };
/// // Once for each batch of a queue.
/// let memory = device.memory.memory();
/// memory.write_obj(7u64, GuestAddress(0x1000)).expect("there is RAM");
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
pub struct PublishedMemory<B: Bitmap + Send + Sync + 'static = ()> {
    memory: GuestMemoryAtomic<GuestMemoryShm<B>>,
}

impl<B: Bitmap + Send + Sync + 'static> GuestAddressSpace for PublishedMemory<B> {
    type M = GuestMemoryShm<B>;
    type T = GuestMemoryLoadGuard<GuestMemoryShm<B>>;

    /// The present memory, which stays as it is while it is held.
    #[inline]
    fn memory(&self) -> Self::T {
        self.memory.memory()
    }
}

impl<B: Bitmap + Send + Sync + 'static> Clone for PublishedMemory<B> {
    fn clone(&self) -> Self {
        Self {
            memory: self.memory.clone(),
        }
    }
}

impl<B: Bitmap + Send + Sync + 'static> fmt::Debug for PublishedMemory<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PublishedMemory")
            .field(&*self.memory())
            .finish()
    }
}

/// What an address space publishes by: to readers, and a second time for those who want
/// vm-memory's type, with which they could publish, too.
pub(super) struct Publisher<B: Bitmap + Send + Sync + 'static> {
    readers: PublishedMemory<B>,
    mirror: GuestMemoryAtomic<GuestMemoryShm<B>>,
    /// Other code replaced what was in the mirror, and a publication found that out.
    replaced: AtomicBool,
}

impl<B: Bitmap + Send + Sync + 'static> Publisher<B> {
    pub(super) fn new(memory: GuestMemoryShm<B>) -> Self {
        Self {
            mirror: GuestMemoryAtomic::new(memory.clone()),
            readers: PublishedMemory {
                memory: GuestMemoryAtomic::new(memory),
            },
            replaced: AtomicBool::new(false),
        }
    }

    pub(super) fn readers(&self) -> PublishedMemory<B> {
        self.readers.clone()
    }

    pub(super) fn mirror(&self) -> GuestMemoryAtomic<GuestMemoryShm<B>> {
        self.mirror.clone()
    }

    pub(super) fn current(&self) -> GuestMemoryShm<B> {
        GuestMemoryShm::clone(&self.readers.memory())
    }

    /// To be called during a change only, so that there is one publication at a time.
    pub(super) fn publish(&self, memory: &GuestMemoryShm<B>) {
        self.put_into_mirror(memory);
        replace(&self.readers.memory, memory, || ());
    }

    /// Whether the mirror is what was published. If it is not, it is now, and that is the error.
    pub(super) fn check_mirror(&self) -> Result<()> {
        let current = self.readers.memory();
        if !self.mirror.memory().is(&current) {
            self.put_into_mirror(&current);
        }
        match self.replaced.swap(false, Ordering::Relaxed) {
            true => Err(AddressSpaceError::MirrorReplaced),
            false => Ok(()),
        }
    }

    fn put_into_mirror(&self, memory: &GuestMemoryShm<B>) {
        // With its lock, so that nothing gets in between.
        replace(&self.mirror, memory, || {
            if !self.mirror.memory().is(&self.readers.memory()) {
                self.replaced.store(true, Ordering::Relaxed);
            }
        });
    }
}

/// Replaces what is in `atomic`, `first` under its lock.
fn replace<B: Bitmap + Send + Sync + 'static>(
    atomic: &GuestMemoryAtomic<GuestMemoryShm<B>>,
    memory: &GuestMemoryShm<B>,
    first: impl FnOnce(),
) {
    // A holder of the lock may have panicked.
    let exclusive = atomic.lock().unwrap_or_else(PoisonError::into_inner);
    first();
    // The new memory is there before the old one is dropped, whose bitmaps may panic then.
    let _ = caught(|| exclusive.replace(memory.clone()));
}
