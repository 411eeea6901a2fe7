//! Listeners that are told of one region at a time.

use std::fmt;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::listener::{ListenerError, MemoryListener};
use crate::memory::GuestMemoryShm;
use crate::panics::{caught, discard};
use crate::region::GuestRegionShm;

/// Somebody who is told of one region at a time, as hypervisors and VFIO are: wrapped in
/// [`PerRegion`] it is a [`MemoryListener`].
///
/// ```
/// use guest_memory_shm::{
///     AddressSpace, GuestMemoryShm, GuestRegionShm, ListenerError, PerRegion, RegionListener,
/// };
/// use vm_memory::GuestAddress;
///
/// /// An IOMMU in the guest's way.
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
/// let iommu = space.attach("iommu", PerRegion::new(Iommu))?;
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

    /// Takes one region more.
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

/// A [`MemoryListener`] out of a [`RegionListener`]: it finds the difference to what is held, and
/// keeps what is held mapped.
///
/// Removals come first, highest address first, then additions, lowest first: a region that moves
/// or grows never overlaps its successor, and no more are held at once than before or after.
/// Dropped, it lets the regions go without telling the listener.
///
/// A listener that panics in `region_add` or `region_remove` may hold the region, or not: before
/// it is told anything else it is told to remove it, whatever it answers, and to add it anew where
/// it is to be. Where that answer is no success, the region stays mapped as long as this lives.
///
/// A listener that was [away](ListenerError::away) once is told nothing more until
/// [`begin_anew`](Self::begin_anew) says that it is back.
pub struct PerRegion<L, B = ()> {
    listener: L,
    /// Sorted by address.
    held: Vec<GuestRegionShm<B>>,
    /// The region that it is just being told of, or was when it panicked.
    doubtful: Option<GuestRegionShm<B>>,
    /// Regions that it said to hold no more by an error or a panic only.
    lost: Vec<GuestRegionShm<B>>,
    /// Why it is away.
    away: Option<String>,
}

impl<L: RegionListener<B>, B> PerRegion<L, B> {
    /// A listener that holds no region yet.
    pub fn new(listener: L) -> Self {
        Self {
            listener,
            held: Vec::new(),
            doubtful: None,
            lost: Vec::new(),
            away: None,
        }
    }

    /// Goes on with a listener that holds no region, after it was away. It is told all of them at
    /// the next change, or by [`AddressSpace::refresh`](crate::AddressSpace::refresh).
    pub fn begin_anew(&mut self) {
        self.let_go();
        self.away = None;
    }

    fn let_go(&mut self) {
        self.held.clear();
        self.doubtful = None;
        self.lost.clear();
    }

    /// The regions that it was given and has not let go, sorted by address.
    pub fn regions(&self) -> &[GuestRegionShm<B>] {
        &self.held
    }

    /// Takes the listener out. It is not told: what it holds, it goes on holding. Before that,
    /// `update(&GuestMemoryShm::new())` has it let go of everything.
    pub fn into_inner(self) -> L {
        self.listener
    }

    /// What is told.
    pub fn get_ref(&self) -> &L {
        &self.listener
    }

    /// What is told, to use it otherwise.
    pub fn get_mut(&mut self) -> &mut L {
        &mut self.listener
    }
}

impl<L: RegionListener<B>, B: Bitmap + Send + Sync + 'static> MemoryListener<B>
    for PerRegion<L, B>
{
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.check_present()?;
        let answer = self.listener.check(memory);
        self.note(answer)
    }

    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.check_present()?;
        let answer = self.tell(memory);
        self.note(answer)
    }
}

impl<L: RegionListener<B>, B: Bitmap> PerRegion<L, B> {
    fn tell(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.settle();
        for at in (0..self.held.len()).rev() {
            let region = &self.held[at];
            let there = memory.find_region(region.start_addr());
            if there.is_some_and(|there| there.is(region)) {
                continue;
            }
            let region = region.clone();
            self.tell_one(&region, L::region_remove)?;
            self.held.remove(at);
        }
        for region in memory.iter() {
            let Err(place) = self.place_of(region) else {
                continue;
            };
            self.tell_one(region, L::region_add)?;
            self.held.insert(place, region.clone());
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

    /// After a panic it is not known whether the region is held: has it removed, so that it is not.
    fn settle(&mut self) {
        let Some(region) = self.doubtful.take() else {
            return;
        };
        if let Ok(at) = self.place_of(&region) {
            self.held.remove(at);
        }
        match caught(|| self.listener.region_remove(&region)) {
            Ok(Ok(())) => {}
            answer => {
                discard(answer);
                self.lost.push(region);
            }
        }
    }

    fn place_of(&self, region: &GuestRegionShm<B>) -> Result<usize, usize> {
        let range = region.range();
        self.held
            .binary_search_by_key(&range, GuestRegionShm::range)
    }

    fn check_present(&self) -> Result<(), ListenerError> {
        match &self.away {
            Some(reason) => Err(ListenerError::away(reason.clone())),
            None => Ok(()),
        }
    }

    /// What it holds is nobody's business any more once it is away.
    fn note(&mut self, mut answer: Result<(), ListenerError>) -> Result<(), ListenerError> {
        if let Err(error) = &mut answer
            && error.is_away()
        {
            self.away = Some(error.reason());
            self.let_go();
        }
        answer
    }
}

impl<L: fmt::Debug, B> fmt::Debug for PerRegion<L, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerRegion")
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
