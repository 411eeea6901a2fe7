//! The guest's RAM: two regions around a PCI hole on one descriptor, and those to be hot-added.

use std::sync::Arc;

use guest_memory_shm::mock::RingLayout;
use guest_memory_shm::{
    AddressSpace, GuestMemoryShm, GuestRange, GuestRegionShm, InvalidRange, PublishedMemory,
    RamOptions, ram_around_hole,
};
use vm_memory::{GuestAddress, GuestAddressSpace};

use crate::ending;
use crate::facts::size;
use crate::failure::{Failure, OrFail, Result};

const GIB: u64 = 1 << 30;
/// Where a PC has its PCI hole at the latest, and where RAM goes on above it.
const HOLE_START: u64 = 3 * GIB;
const HOLE_END: u64 = 4 * GIB;
/// Regions begin and end at multiples of this, which suits huge pages too.
const REGION_ALIGN: u64 = 2 << 20;

/// Where the virtqueue of the first daemon lies, with the headers and the status bytes of
/// requests; those of others lie after it.
const RINGS: GuestAddress = GuestAddress(0x1000);
pub(crate) const QUEUE_SIZE: u16 = 128;
const RINGS_STRIDE: u64 = 16 << 10;
/// What the lowest region keeps for the virtqueues.
const RINGS_END: u64 = 512 << 10;
/// How many daemons there can be.
pub(crate) const MAX_DAEMONS: usize = 16;

/// Bytes of a buffer, and how many of them each region carries.
pub(crate) const BUFFER: u32 = 128 << 10;
const BUFFERS_PER_REGION: u64 = 8;
const BUFFERS_SIZE: u64 = BUFFER as u64 * BUFFERS_PER_REGION;

/// The size of a region that is hot-added.
pub(crate) const PLUG_SIZE: u64 = REGION_ALIGN;

// Also the smallest region has room for all of it.
const _: () = assert!(RINGS_END + BUFFERS_SIZE <= REGION_ALIGN);
const _: () = assert!(RINGS.0 + MAX_DAEMONS as u64 * RINGS_STRIDE <= RINGS_END);

/// The RAM as the guest and the daemons see it, and a region beside it.
#[derive(Debug)]
pub(crate) struct Ram {
    space: AddressSpace,
    plug: Arc<GuestRegionShm>,
    options: RamOptions,
}

impl Ram {
    /// RAM of `size` bytes, and the region that will be hot-added.
    ///
    /// Both are made at once, so that a shortage shows now and not when the guest is running.
    pub(crate) fn new(ram_size: u64, options: &RamOptions) -> Result<Self> {
        if ram_size < 2 * REGION_ALIGN || !ram_size.is_multiple_of(REGION_ALIGN) {
            return Err(Failure::usage(format!(
                "guest RAM of {} cannot be: the rings and buffers on both sides of the hole need \
                 {}, and the regions are whole huge pages of {}: give a larger multiple with \
                 --ram",
                size(ram_size),
                size(2 * REGION_ALIGN),
                size(REGION_ALIGN)
            )));
        }
        debug_assert!(RingLayout::required_size(QUEUE_SIZE) <= RINGS_STRIDE);

        let doing = || format!("cannot create {} of guest RAM", size(ram_size));
        let ranges = around_hole(ram_size).or_fail(doing)?;
        let end = ranges.iter().map(|range| range.last_addr().0 + 1).max();
        let plug_addr = end.and_then(|end| end.checked_next_multiple_of(GIB));
        let plug_addr = GuestAddress(plug_addr.unwrap_or(u64::MAX));

        // POSIX shared memory has a name for a moment.
        let whole = ending::whole();
        let all = GuestMemoryShm::<()>::builder()
            .add_ram(options.clone(), ranges)
            .add_ram(options.clone(), [(plug_addr, PLUG_SIZE)])
            .build()
            .or_fail(doing)?;
        drop(whole);
        let (booted, plug) = all.remove_region(plug_addr, PLUG_SIZE).or_fail(doing)?;
        Ok(Self {
            space: AddressSpace::new(booted),
            plug,
            options: options.clone(),
        })
    }

    /// The RAM, with all who are told of its changes.
    pub(crate) fn space(&self) -> &AddressSpace {
        &self.space
    }

    /// For the guest's driver, which sees every change from then on.
    pub(crate) fn published(&self) -> PublishedMemory {
        self.space.published()
    }

    /// What the guest sees now.
    pub(crate) fn memory(&self) -> GuestMemoryShm {
        GuestMemoryShm::clone(&self.space.published().memory())
    }

    /// The region that is hot-added and removed.
    pub(crate) fn plug(&self) -> &Arc<GuestRegionShm> {
        &self.plug
    }

    /// Another region, above the first that can be hot-added and `nth` others.
    pub(crate) fn another_plug(&self, nth: u64) -> Result<GuestRegionShm> {
        let start = self.plug.range().start_addr().0 + nth * PLUG_SIZE;
        let _whole = ending::whole();
        GuestRegionShm::new((GuestAddress(start), PLUG_SIZE), &self.options)
            .or_fail(|| format!("cannot create {} of guest RAM to hot-add", size(PLUG_SIZE)))
    }
}

/// Where the virtqueue of the n-th daemon lies.
pub(crate) fn rings(daemon: usize) -> GuestAddress {
    GuestAddress(RINGS.0 + daemon as u64 * RINGS_STRIDE)
}

/// PC-like RAM: the hole ends at 4 GiB. RAM that would fit below it is split all the same, by a
/// hole that starts in its middle.
fn around_hole(size: u64) -> std::result::Result<Vec<GuestRange>, InvalidRange> {
    let half = size / 2;
    let start = match size > HOLE_START {
        true => HOLE_START,
        false => half - half % REGION_ALIGN,
    };
    let hole = GuestRange::new(GuestAddress(start), HOLE_END - start)?;
    ram_around_hole(size, hole)
}

/// The buffers of `memory`, one region after the other in turn, so that neighbours in the list lie
/// in different regions.
pub(crate) fn buffers(memory: &GuestMemoryShm) -> Vec<GuestAddress> {
    let starts: Vec<u64> = memory
        .arc_regions()
        .iter()
        .map(|region| region.range())
        .map(|range| match range.start_addr() < RINGS {
            true => RINGS_END,
            false => range.start_addr().0,
        })
        .collect();
    (0..BUFFERS_PER_REGION)
        .flat_map(|index| {
            starts
                .iter()
                .map(move |start| start + index * u64::from(BUFFER))
        })
        .map(GuestAddress)
        .collect()
}
