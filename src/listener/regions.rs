//! Listeners that are told of one region at a time.

use std::fmt;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::error::ListenerError;
use super::memory::MemoryListener;
use crate::memory::GuestMemoryShm;
use crate::panics::{caught, discard};
use crate::range::{Difference, place_of};
use crate::region::GuestRegionShm;

/// A listener that is told of one region at a time, as hypervisors and VFIO are: wrapped in a
/// [`RegionAdapter`] it is a [`MemoryListener`].
///
/// One that answers that it is [away](ListenerError::away) holds nothing from then on: it is told
/// all regions anew once it is back.
///
/// ```
/// use guest_memory_shm::{
///     AddressSpace, GuestMemoryShm, GuestRegionShm, ListenerError, RegionAdapter, RegionListener,
/// };
/// use vm_memory::GuestAddress;
///
/// /// An IOMMU that needs a mapping for each region.
/// struct Iommu;
///
/// impl RegionListener for Iommu {
///     fn region_add(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
///         println!("map {} at {:p}", region.range(), region.as_ptr());
///         Ok(())
///     }
///     fn region_remove(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
///         println!("unmap {}", region.range());
///         Ok(())
///     }
/// }
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let space = AddressSpace::new(memory);
/// let iommu = space.attach("iommu", RegionAdapter::new(Iommu))?;
/// assert_eq!(space.with_listener(&iommu, |iommu| iommu.regions().len())?, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait RegionListener<B = ()>: Send + 'static {
    /// Whether it could hold this memory. Without a limit on the number of regions: always.
    ///
    /// # Errors
    ///
    /// Why it could not.
    fn check(&mut self, _memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        Ok(())
    }

    /// Takes one more region.
    ///
    /// # Errors
    ///
    /// Why it did not; it holds what it held before.
    fn region_add(&mut self, region: &GuestRegionShm<B>) -> Result<(), ListenerError>;

    /// Lets go of a region that it was given.
    ///
    /// # Errors
    ///
    /// Why it did not; it holds what it held before.
    fn region_remove(&mut self, region: &GuestRegionShm<B>) -> Result<(), ListenerError>;
}

/// A [`MemoryListener`] made of a [`RegionListener`]: it finds the difference to what is held, and
/// keeps what is held mapped.
///
/// Removals come first, highest address first, then additions, lowest first: a region that moves
/// or grows never overlaps its successor, and at no time are more regions held than before or
/// after. Dropped, it lets the regions go without telling the listener.
///
/// A listener that panics in `region_add` or `region_remove` may hold the region, or not: before
/// it is told anything else it is told to remove it, whatever it answers, and to add it anew where
/// it is to be. Where that answer is no success, the region stays mapped as long as this lives.
pub struct RegionAdapter<L, B = ()> {
    listener: L,
    /// Sorted by address.
    held: Vec<GuestRegionShm<B>>,
    /// The region that it is just being told of, or was when it panicked.
    doubtful: Option<GuestRegionShm<B>>,
    /// Regions whose removal, after a panic, ended in an error or another panic.
    lost: Vec<GuestRegionShm<B>>,
}

impl<L: RegionListener<B>, B> RegionAdapter<L, B> {
    /// A listener that holds no region yet.
    pub fn new(listener: L) -> Self {
        Self {
            listener,
            held: Vec::new(),
            doubtful: None,
            lost: Vec::new(),
        }
    }

    /// The regions that it was given and has not let go, sorted by address.
    pub fn regions(&self) -> &[GuestRegionShm<B>] {
        &self.held
    }

    /// Takes the listener out. It is not told, and keeps its regions, which nothing keeps mapped
    /// any more: let it go of them before, by `update(&GuestMemoryShm::new())`.
    pub fn into_inner(self) -> L {
        self.listener
    }

    /// The listener.
    pub fn get_ref(&self) -> &L {
        &self.listener
    }

    /// The listener, for its other uses.
    pub fn get_mut(&mut self) -> &mut L {
        &mut self.listener
    }
}

impl<L: RegionListener<B>, B: Bitmap + Send + Sync + 'static> MemoryListener<B>
    for RegionAdapter<L, B>
{
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        let answer = self.listener.check(memory);
        self.note(answer)
    }

    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        let answer = self.tell(memory);
        self.note(answer)
    }
}

impl<L: RegionListener<B>, B: Bitmap> RegionAdapter<L, B> {
    fn tell(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.settle();
        let held = self.held.clone();
        let change = Difference::between(&held, memory.iter(), |held, region| held.is(region));
        for region in change.removals {
            self.tell_one(region, L::region_remove)?;
            self.drop_held(region);
        }
        for region in change.additions {
            self.tell_one(region, L::region_add)?;
            let place = place_of(&self.held, region.start_addr());
            self.held
                .insert(place.unwrap_or_else(|place| place), region.clone());
        }
        Ok(())
    }

    /// Makes one call. The region is in doubt until it returns: if it panics, it stays so.
    fn tell_one(
        &mut self,
        region: &GuestRegionShm<B>,
        call: fn(&mut L, &GuestRegionShm<B>) -> Result<(), ListenerError>,
    ) -> Result<(), ListenerError> {
        self.doubtful = Some(region.clone());
        let answer = call(&mut self.listener, region);
        self.doubtful = None;
        answer.map_err(|error| error.at(region.range()))
    }

    /// After a panic it is not known whether the region is held: has it removed, so that it is
    /// not.
    fn settle(&mut self) {
        let Some(region) = self.doubtful.take() else {
            return;
        };
        self.drop_held(&region);
        match caught(|| self.listener.region_remove(&region)) {
            Ok(Ok(())) => {}
            answer => {
                discard(answer);
                self.lost.push(region);
            }
        }
    }

    fn drop_held(&mut self, region: &GuestRegionShm<B>) {
        if let Ok(at) = place_of(&self.held, region.start_addr())
            && self.held[at].is(region)
        {
            self.held.remove(at);
        }
    }

    /// What it held no longer matters once it is away.
    fn note(&mut self, answer: Result<(), ListenerError>) -> Result<(), ListenerError> {
        if answer.as_ref().is_err_and(ListenerError::is_away) {
            self.held.clear();
            self.doubtful = None;
            self.lost.clear();
        }
        answer
    }
}

impl<L: fmt::Debug, B> fmt::Debug for RegionAdapter<L, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionAdapter")
            .field("listener", &self.listener)
            .field(
                "held",
                &self
                    .held
                    .iter()
                    .map(GuestRegionShm::range)
                    .collect::<Vec<_>>(),
            )
            .finish()
    }
}
