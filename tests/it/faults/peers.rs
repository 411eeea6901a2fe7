//! Operations with a daemon.

use std::sync::Arc;
use std::time::Duration;

use guest_memory_shm::mock::{MockDaemon, MockDaemonBuilder};
use guest_memory_shm::{
    GuestMemoryShm, GuestRegionShm, MemoryTable, RamOptions, ShareError, VhostUserShare,
};
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
use vm_memory::GuestAddress;

use super::{Operation, Outcome, Stage, says_something};
use crate::frontend::agree;

pub(super) const MIB: u64 = 1 << 20;
/// For an answer that comes at once, unless a call fails for which the daemon falls silent.
pub(super) const LIMIT: Duration = Duration::from_secs(2);

pub(super) type Share = VhostUserShare;

pub(super) const SHARES: &[Operation] = &[
    Operation::new("negotiate", negotiate).by_vhost(),
    Operation::new("share by slots", |stage| {
        share(stage, MockDaemon::builder())
    }),
    Operation::new("share by tables", |stage| {
        share(stage, MockDaemon::builder().without_mem_slots())
    }),
    Operation::new("share without acknowledgements", |stage| {
        share(stage, MockDaemon::builder().without_reply_ack())
    }),
    Operation::new("change a share", |stage| {
        change(stage, MockDaemon::builder(), false)
    }),
    Operation::new("change a share by tables", |stage| {
        change(stage, MockDaemon::builder().without_mem_slots(), false)
    }),
    Operation::new("change a share that logs", |stage| {
        change(stage, MockDaemon::builder(), true)
    }),
    Operation::new("start a log", start_log),
    Operation::new("reconnect", reconnect),
    Operation::new("drop a share", drop_share),
];

/// What the daemon's calls, which are others' code, do to a share.
pub(super) const DAEMONS: &[Operation] =
    &[Operation::new("daemon's end of a share", share_of_daemon).of_others()];

/// Whose calls fail.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    Frontend,
    /// The threads of the mock daemons.
    Daemon,
}

impl Who {
    pub(super) fn start(self, stage: &Stage) -> MockDaemon {
        let start = || MockDaemon::builder().start_unnamed().unwrap();
        match self {
            Self::Frontend => start(),
            Self::Daemon => stage.watched(start),
        }
    }

    pub(super) fn attack<T: Send>(self, stage: &Stage, work: impl FnOnce() -> T + Send) -> T {
        match self {
            Self::Frontend => stage.attacked(work),
            Self::Daemon => stage.armed(work),
        }
    }
}

fn wanted() -> Features {
    Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS | Features::LOG_SHMFD
}

pub(super) fn connect(daemon: &MockDaemon) -> (Frontend, Features) {
    agree(daemon.connect().unwrap(), wanted()).unwrap()
}

pub(super) fn new_share(daemon: &MockDaemon) -> Share {
    let (frontend, features) = connect(daemon);
    let share = VhostUserShare::new(&frontend, features).unwrap();
    share.with_deadline(LIMIT)
}

pub(super) fn region(start: u64) -> Arc<GuestRegionShm> {
    let region = GuestRegionShm::new((GuestAddress(start * MIB), MIB), &RamOptions::new());
    Arc::new(region.unwrap())
}

pub(super) fn memory(starts: &[u64]) -> GuestMemoryShm {
    let regions = starts.iter().copied().map(region);
    GuestMemoryShm::from_arc_regions(regions.collect()).unwrap()
}

/// A memory with the regions of `memory` from 2 MiB on, and one more.
fn changed(memory: &GuestMemoryShm) -> GuestMemoryShm {
    let without = memory.remove_region(GuestAddress(0), MIB).unwrap().0;
    without.insert_region(region(20)).unwrap()
}

/// Whether the daemon maps exactly what is in `table`.
pub(super) fn holds(daemon: &MockDaemon, table: &MemoryTable) -> bool {
    let held = daemon.table();
    let held = held
        .iter()
        .map(|r| (r.guest_addr, r.size, r.mmap_offset, r.identity));
    held.eq(table.regions().iter().map(|region| {
        let (range, offset) = (region.range(), region.mmap_offset());
        let identity = region.backing().identity();
        (range.start_addr(), range.size(), offset, identity)
    }))
}

fn negotiate(stage: &Stage) -> Outcome {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let stream = daemon.connect().unwrap();
    match stage.attacked(|| agree(stream, wanted())) {
        Ok((_, features)) => {
            assert!(features.contains(Features::REPLY_ACK));
            Outcome::Done
        }
        Err(error) => says_something(&error),
    }
}

/// Looks at a share after an update, and brings it to where the update should have.
fn look(
    daemon: &MockDaemon,
    mut share: Share,
    updated: Result<(), ShareError>,
    memory: &GuestMemoryShm,
) -> Outcome {
    let table = memory.memory_table();
    let outcome = match &updated {
        Ok(()) => {
            assert!(share.broken().is_none());
            assert_eq!(*share.table(), table);
            Outcome::Done
        }
        Err(error) => says_something(error),
    };
    match share.broken() {
        None => assert!(holds(daemon, share.table()), "{:?}", daemon.table()),
        Some(reason) => {
            assert!(!reason.to_string().is_empty());
            drop(share);
            share = new_share(daemon);
        }
    }
    share.update_table(&table).unwrap();
    assert!(holds(daemon, &table));
    outcome
}

fn share(stage: &Stage, builder: MockDaemonBuilder) -> Outcome {
    let daemon = builder.start_unnamed().unwrap();
    let (frontend, features) = connect(&daemon);
    let memory = memory(&[0, 2, 4]);
    let table = memory.memory_table();
    let shared = stage.attacked(|| {
        let share = VhostUserShare::new(&frontend, features)?;
        let mut share = share.with_deadline(LIMIT);
        let updated = share.update_table(&table).map(drop);
        Ok((share, updated))
    });
    drop(frontend);
    let (share, updated) = match shared {
        Ok(shared) => shared,
        // Nothing was sent.
        Err(error) => (new_share(&daemon), Err(error)),
    };
    look(&daemon, share, updated, &memory)
}

fn share_of_daemon(stage: &Stage) -> Outcome {
    let daemon = Who::Daemon.start(stage);
    let mut share = new_share(&daemon);
    let memory = memory(&[0, 2, 4]);
    let updated = stage.armed(|| share.update_table(&memory.memory_table()).map(drop));
    // It may be able to do nothing any more.
    let other = MockDaemon::builder().start_unnamed().unwrap();
    if updated.is_err() {
        assert!(share.broken().is_some() || holds(&daemon, share.table()));
        drop(share);
        share = new_share(&other);
        share.update_table(&memory.memory_table()).unwrap();
        return look(&other, share, updated, &memory);
    }
    look(&daemon, share, updated, &memory)
}

fn change(stage: &Stage, builder: MockDaemonBuilder, logs: bool) -> Outcome {
    let daemon = builder.start_unnamed().unwrap();
    let mut share = new_share(&daemon);
    let before = memory(&[0, 2, 4]);
    share.update_table(&before.memory_table()).unwrap();
    if logs {
        share.start_log().unwrap();
    }
    let after = changed(&before);
    let table = after.memory_table();
    let updated = stage.attacked(|| share.update_table(&table).map(drop));
    assert_eq!(share.is_logging(), logs);
    let _ = share.drain_dirty();
    look(&daemon, share, updated, &after)
}

fn start_log(stage: &Stage) -> Outcome {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut share = new_share(&daemon);
    let memory = memory(&[0, 2, 4]);
    share.update_table(&memory.memory_table()).unwrap();
    let started = stage.attacked(|| share.start_log());
    assert_eq!(share.is_logging(), started.is_ok());
    look(&daemon, share, started, &memory)
}

fn reconnect(stage: &Stage) -> Outcome {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut share = new_share(&daemon);
    let memory = memory(&[0, 2, 4]);
    let table = memory.memory_table();
    share.update_table(&table).unwrap();
    daemon.hang_up();
    daemon.wait_disconnected(LIMIT).unwrap();
    let (frontend, features) = connect(&daemon);
    let updated = stage.attacked(|| {
        share.reconnect(&frontend, features)?;
        share.update_table(&table).map(drop)
    });
    drop(frontend);
    if let Err(ShareError::Socket { .. }) = updated {
        // It is what it was, on the connection from before.
        assert!(share.broken().is_none());
        assert_eq!(*share.table(), table);
        share = new_share(&daemon);
    }
    look(&daemon, share, updated, &memory)
}

fn drop_share(stage: &Stage) -> Outcome {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut share = new_share(&daemon);
    share.update_table(&memory(&[0]).memory_table()).unwrap();
    stage.attacked(move || drop(share));
    daemon.wait_disconnected(LIMIT).unwrap();
    Outcome::Done
}
