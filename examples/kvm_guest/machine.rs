//! The machine: guest memory that KVM and a daemon know, and the daemon's disk.

use std::sync::Arc;
use std::time::Duration;

use guest_memory_shm::mock::{BlkDriver, MockDaemon};
use guest_memory_shm::{
    AddressSpace, DirtyPages, GuestMemoryShm, GuestRange, GuestRegionShm, KvmSlots, ListenerId,
    PublishedMemory, RamOptions, SessionOptions, VhostUserSession,
};
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::failure::{Failure, OrFail, Result};
use crate::guest::{CODE, Exit, Guest, PAGE, PROGRAM, Pages};

/// RAM that is there from the start, for the code and the virtqueue.
const BOOT_RAM: usize = 1 << 20;
/// Where the virtqueue is.
const RINGS: GuestAddress = GuestAddress(0x10000);
const SECTOR: u32 = 512;
/// The one queue that is used.
const QUEUE: u32 = 0;
/// `VIRTIO_BLK_F_FLUSH`, which the driver knows.
const FLUSH: u64 = 1 << 9;
/// How long the daemon may take for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A virtual machine with a disk.
pub(crate) struct Machine {
    space: AddressSpace,
    kvm: ListenerId<KvmSlots>,
    guest: Guest,
    disk: ListenerId<VhostUserSession>,
    driver: BlkDriver<PublishedMemory>,
    daemon: MockDaemon,
}

impl Machine {
    /// A machine whose disk has room for so many pages.
    pub(crate) fn new(vm: Arc<VmFd>, pages: u32) -> Result<Self> {
        let boot = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), BOOT_RAM)])
            .or_fail(|| "cannot make guest RAM")?;
        boot.write_slice(&PROGRAM, CODE)
            .or_fail(|| "cannot load the guest's code")?;
        let space = AddressSpace::new(boot);

        // The hypervisor comes first: the guest never learns of memory that it does not have.
        let guest = Guest::new(&vm)?;
        let slots = KvmSlots::new(vm).or_fail(|| "cannot use KVM's memory slots")?;
        let kvm = space
            .attach("kvm", slots)
            .or_fail(|| "cannot give KVM the guest's RAM")?;

        let doing = || "cannot use the daemon";
        let daemon = MockDaemon::builder()
            .with_disk_size(u64::from(pages) * u64::from(PAGE))
            .start_unnamed()
            .or_fail(doing)?;
        let stream = daemon.connect().or_fail(doing)?;
        let options = SessionOptions::new(FLUSH).with_deadline(PATIENCE);
        let session = VhostUserSession::on_socket(stream, options).or_fail(doing)?;
        let disk = space.attach_required("disk", session).or_fail(doing)?;

        let driver = BlkDriver::new(space.published(), RINGS, 16).or_fail(doing)?;
        let driver = driver.with_deadline(PATIENCE);
        let ring = driver.session_ring().or_fail(doing)?;
        space
            .with_listener(&disk, |session| session.start_ring(QUEUE, ring))
            .or_fail(doing)?
            .or_fail(doing)?;
        Ok(Self {
            space,
            kvm,
            guest,
            disk,
            driver,
            daemon,
        })
    }

    /// Plugs a region: when this returns the guest and the daemon can use it.
    pub(crate) fn plug(&self, range: GuestRange) -> Result<()> {
        let doing = || format!("cannot plug {range}");
        let region = GuestRegionShm::new(range, &RamOptions::new());
        // The daemon may not lag, so there is nothing in the report.
        let plugged = self.space.insert(region.or_fail(doing)?);
        plugged.map(drop).or_fail(doing)
    }

    /// Unplugs it, which a guest must have agreed to.
    pub(crate) fn unplug(&self, range: GuestRange) -> Result<()> {
        let doing = || format!("cannot unplug {range}");
        let removed = self.space.remove(range);
        removed.map(drop).or_fail(doing)
    }

    /// Has the guest's code write the pages.
    pub(crate) fn guest_writes(&mut self, pages: Pages) -> Result<Exit> {
        self.guest.write(pages)
    }

    /// KVM's slots, a line for each.
    pub(crate) fn slots(&self) -> Result<Vec<String>> {
        self.kvm(|slots| {
            let line = |slot: &guest_memory_shm::KvmSlot| {
                format!("slot {} is {}", slot.number(), slot.range())
            };
            slots.slots().map(line).collect()
        })
    }

    pub(crate) fn start_dirty_logging(&self) -> Result<()> {
        self.kvm(KvmSlots::start_dirty_logging)?
            .or_fail(|| "cannot start KVM's dirty log")
    }

    /// What the guest has written since the log was started, or this was called.
    pub(crate) fn dirty_log(&self) -> Result<Vec<DirtyPages>> {
        self.kvm(KvmSlots::dirty_log)?
            .or_fail(|| "cannot read KVM's dirty log")
    }

    /// The addresses of the regions that the daemon maps.
    pub(crate) fn daemon_regions(&self) -> Vec<GuestAddress> {
        let table = self.daemon.table();
        table.iter().map(|region| region.guest_addr).collect()
    }

    /// Has the daemon write the pages to its disk, one after the other.
    ///
    /// The driver does what the guest's kernel would do: it puts the addresses of the pages into
    /// the virtqueue. The bytes are read by the daemon, through its own mapping.
    pub(crate) fn daemon_writes(&mut self, pages: Pages) -> Result<()> {
        let sectors = (0..).step_by((PAGE / SECTOR) as usize);
        for (sector, page) in sectors.zip(pages.starts()) {
            let buffer = (GuestAddress(page.into()), PAGE);
            self.driver
                .write(sector, &[buffer])
                .or_fail(|| format!("the daemon cannot write the page at {page:#x}"))?;
        }
        self.driver
            .flush()
            .or_fail(|| "the daemon cannot flush its disk")
    }

    /// Compares the disk with what the guest's code computes, without the virtqueue.
    pub(crate) fn check_disk(&self, pages: Pages) -> Result<()> {
        let mut found = vec![0; PAGE as usize];
        let offsets = (0..).step_by(PAGE as usize);
        for (offset, page) in offsets.zip(pages.starts()) {
            let read = self.daemon.disk().read(offset, &mut found);
            read.or_fail(|| "cannot look at the daemon's disk")?;
            if found != Pages::pattern(page) {
                let problem = "the daemon's disk does not hold what the guest wrote to the page";
                return Err(Failure::new(format!("{problem} at {page:#x}")));
            }
        }
        Ok(())
    }

    /// Stops the queue and hangs up; then KVM's slots go with the address space.
    pub(crate) fn end(self) -> Result<()> {
        let doing = || "cannot stop the queue";
        let stop = |session: &mut VhostUserSession| session.stop_ring(QUEUE);
        let stopped = self.space.with_listener(&self.disk, stop);
        stopped.or_fail(doing)?.map(drop).or_fail(doing)
    }

    fn kvm<T>(&self, work: impl FnOnce(&mut KvmSlots) -> T) -> Result<T> {
        let answer = self.space.with_listener(&self.kvm, work);
        answer.or_fail(|| "KVM's slots are gone")
    }
}
