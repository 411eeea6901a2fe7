//! A frontend of the daemon: RAM that it shares, and a guest's driver for each queue.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use guest_memory_shm::mock::{BlkDriver, BlkError, RingLayout};
use guest_memory_shm::{GuestMemoryShm, VhostUserShare};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Features};
use vm_memory::{Bytes, GuestAddress};

use crate::frontend::{agree, start_queue};

const PATIENCE: Duration = Duration::from_secs(60);
const RAM: usize = 4 << 20;
const RINGS: u64 = 0x1000;
const RINGS_STEP: u64 = 0x1000;
const QUEUE_SIZE: u16 = 16;

/// Where data goes.
pub(super) const DATA: GuestAddress = GuestAddress(0x10_0000);

/// Flags of a descriptor.
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;

pub(super) struct Guest {
    pub(super) memory: Arc<GuestMemoryShm>,
    pub(super) frontend: Frontend,
    pub(super) share: VhostUserShare,
    pub(super) drivers: Vec<BlkDriver<Arc<GuestMemoryShm>>>,
}

impl Guest {
    /// Connects, and starts the first queue.
    pub(super) fn connect(socket: &Path) -> Self {
        Self::connect_with(socket, 1)
    }

    pub(super) fn connect_with(socket: &Path, queues: usize) -> Self {
        let memory = GuestMemoryShm::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let memory = Arc::new(memory);
        let driver = |queue| {
            let rings = GuestAddress(RINGS + queue as u64 * RINGS_STEP);
            let driver = BlkDriver::new(Arc::clone(&memory), rings, QUEUE_SIZE).unwrap();
            driver.with_deadline(PATIENCE)
        };
        let drivers = (0..queues).map(driver).collect();
        Self::share(socket, Arc::clone(&memory), drivers)
    }

    /// Connects the same guest to another daemon, which goes on where the last one was.
    pub(super) fn reconnect(self, socket: &Path) -> Self {
        Self::share(socket, self.memory, self.drivers)
    }

    fn share(
        socket: &Path,
        memory: Arc<GuestMemoryShm>,
        drivers: Vec<BlkDriver<Arc<GuestMemoryShm>>>,
    ) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        let (frontend, features) = agree(stream, Features::all()).unwrap();
        let share = VhostUserShare::new(&frontend, features).unwrap();
        let mut share = share.with_deadline(PATIENCE);
        share.update_table(&memory.memory_table()).unwrap();
        let mut this = Self {
            memory,
            frontend,
            share,
            drivers,
        };
        for queue in 0..this.drivers.len() {
            this.start_queue(queue);
        }
        this
    }

    fn start_queue(&mut self, queue: usize) {
        let translate = |addr| self.share.table().user_addr(addr);
        start_queue(&mut self.frontend, queue, &self.drivers[queue], translate);
    }

    pub(super) fn features(&mut self) -> u64 {
        self.frontend.get_features().unwrap()
    }

    pub(super) fn queues(&mut self) -> u64 {
        self.frontend.get_queue_num().unwrap()
    }

    pub(super) fn capacity(&mut self) -> u64 {
        let none = VhostUserConfigFlags::empty();
        let (_, sectors) = self.frontend.get_config(0, 8, none, &[0; 8]).unwrap();
        u64::from_le_bytes(sectors[..].try_into().unwrap()) * 512
    }

    pub(super) fn read(&mut self, sector: u64, len: u32) -> Result<Vec<u8>, BlkError> {
        let mut bytes = vec![0xee; len as usize];
        self.memory.write_slice(&bytes, DATA).unwrap();
        self.drivers[0].read(sector, &[(DATA, len)])?;
        self.memory.read_slice(&mut bytes, DATA).unwrap();
        Ok(bytes)
    }

    pub(super) fn write(&mut self, sector: u64, bytes: &[u8]) -> Result<(), BlkError> {
        self.memory.write_slice(bytes, DATA).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.drivers[0].write(sector, &[(DATA, len)])
    }

    /// Stops the queue of the driver, and starts it again for chains of one's own.
    pub(super) fn into_raw(mut self) -> RawQueue {
        self.frontend.get_vring_base(0).unwrap();
        self.drivers[0].reset().unwrap();
        self.start_queue(0);
        RawQueue {
            layout: self.drivers[0].ring_layout(),
            guest: self,
            used: 0,
        }
    }
}

/// A queue whose chains are written by hand, so that they can be wrong.
pub(super) struct RawQueue {
    pub(super) guest: Guest,
    layout: RingLayout,
    used: u16,
}

/// What the device made of a chain.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) len: u32,
    /// What is at [`RawQueue::STATUS`]; 0xaa where the device wrote nothing.
    pub(super) status: u8,
}

impl RawQueue {
    pub(super) const HEADER: u64 = 0x2_0000;
    pub(super) const STATUS: u64 = 0x2_1000;

    /// Has the device carry out one chain of (address, length, flags, next), whose first
    /// descriptor is the table's first.
    pub(super) fn chain(&mut self, descriptors: &[(u64, u32, u16, u16)]) -> Used {
        let memory = &*self.guest.memory;
        for (index, (addr, len, flags, next)) in (0u64..).zip(descriptors) {
            let at = |offset| GuestAddress(self.layout.descriptors.0 + index * 16 + offset);
            memory.write_obj(*addr, at(0)).unwrap();
            memory.write_obj(*len, at(8)).unwrap();
            memory.write_obj(*flags, at(12)).unwrap();
            memory.write_obj(*next, at(14)).unwrap();
        }
        memory
            .write_obj(0xaau8, GuestAddress(Self::STATUS))
            .unwrap();
        let slot = u64::from(self.used % QUEUE_SIZE);
        let avail = self.layout.avail.0;
        memory
            .write_obj(0u16, GuestAddress(avail + 4 + slot * 2))
            .unwrap();
        self.used = self.used.wrapping_add(1);
        memory
            .store(self.used, GuestAddress(avail + 2), Ordering::Release)
            .unwrap();
        self.guest.drivers[0].kick().write(1).unwrap();

        let used = self.layout.used.0;
        let started = Instant::now();
        loop {
            let index: u16 = memory
                .load(GuestAddress(used + 2), Ordering::Acquire)
                .unwrap();
            if index == self.used {
                break;
            }
            assert!(started.elapsed() < PATIENCE, "the device does nothing");
            std::thread::yield_now();
        }
        let entry = used + 4 + slot * 8;
        assert_eq!(memory.read_obj::<u32>(GuestAddress(entry)).unwrap(), 0);
        Used {
            len: memory.read_obj(GuestAddress(entry + 4)).unwrap(),
            status: memory.read_obj(GuestAddress(Self::STATUS)).unwrap(),
        }
    }

    pub(super) fn put_header(&self, kind: u32, sector: u64) {
        let memory = &*self.guest.memory;
        memory.write_obj(kind, GuestAddress(Self::HEADER)).unwrap();
        memory
            .write_obj(sector, GuestAddress(Self::HEADER + 8))
            .unwrap();
    }

    /// A well-formed request with the data at [`DATA`].
    pub(super) fn request(&mut self, kind: u32, sector: u64, len: u32, flags: u16) -> Used {
        self.put_header(kind, sector);
        self.chain(&[
            (Self::HEADER, 16, NEXT, 1),
            (DATA.0, len, NEXT | flags, 2),
            (Self::STATUS, 1, WRITE, 0),
        ])
    }

    /// A request to discard or zero, with ranges of (sector, sectors, flags).
    pub(super) fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> Used {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.guest.memory.write_slice(&bytes, DATA).unwrap();
        self.request(kind, 0, u32::try_from(bytes.len()).unwrap(), 0)
    }
}
