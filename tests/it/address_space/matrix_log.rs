//! What a daemon of the matrix writes and notes, and what is harvested of it.

use std::collections::BTreeSet;

use guest_memory_shm::mock::MockWriter;
use guest_memory_shm::{GuestRange, StoppedLog};
use vm_memory::GuestAddress;

use super::matrix_case::{BOOT, Operation, Region};
use super::matrix_server::Server;
use super::matrix_world::World;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// How many pages of a region are written to; after them, in the first region, are rings.
pub(super) const PAGES: u64 = 480;

/// The writes of one listener's daemons, all of them: also those that were hung up on.
#[derive(Default)]
pub(super) struct Writes {
    /// One for each connection. They write to what they map, and note it in the log that they
    /// have, as long as they live.
    writers: Vec<MockWriter>,
    /// They do so with what they mapped when the operation began.
    frozen: Vec<MockWriter>,
    /// Numbers of pages.
    written: BTreeSet<u64>,
    harvested: BTreeSet<u64>,
    /// What was written is known to be noted at the end.
    at_last: BTreeSet<u64>,
    /// Of the next page in each region.
    next: u64,
}

impl Writes {
    /// The daemon that is connected writes from now on.
    pub(super) fn add(&mut self, server: &Server) {
        if let Server::Mock(daemon) = server {
            self.writers.extend(daemon.writer());
        }
    }

    pub(super) fn freeze(&mut self) {
        self.frozen = self.writers.iter().map(MockWriter::frozen).collect();
    }

    /// Lets go of what was mapped when the operation began.
    pub(super) fn thaw(&mut self) {
        self.frozen.clear();
    }

    /// Each daemon writes to a page of its own in each region that it maps; one in a process of
    /// its own only if it is told of as `process`.
    pub(super) fn write(&mut self, operation: Operation, process: Option<&Server>) {
        let starts: BTreeSet<u64> = regions(operation).map(|(start, _)| start * MIB).collect();
        let mut page = || {
            self.next += 1;
            self.next * PAGE
        };
        for writer in self.writers.iter().chain(&self.frozen) {
            let page = page();
            let addresses = starts.iter().map(|start| start + page);
            let written = addresses.filter(|at| writer.write(GuestAddress(*at)));
            self.written.extend(written.map(|at| at / PAGE));
        }
        if let Some(Server::Process(daemon)) = process {
            let page = page();
            let addresses: Vec<_> = starts.iter().map(|start| start + page).collect();
            let written = daemon.lock().unwrap().write(&addresses);
            self.written.extend(written.iter().map(|at| at / PAGE));
        }
        assert!(self.next < PAGES, "regions are not longer");
    }

    /// These pages are written to by devices, that note it a moment later.
    pub(super) fn writes_at_last(&mut self, pages: [u64; 2]) {
        self.at_last.extend(pages);
    }

    pub(super) fn harvest(&mut self, dirty: &[GuestRange]) {
        for range in dirty {
            let first = range.start_addr().0 / PAGE;
            self.harvested.extend(first..first + range.size() / PAGE);
        }
    }

    /// Asserts that all that was written until now was harvested.
    pub(super) fn are_harvested(&self, name: &str) {
        let lost: Vec<_> = self.written.difference(&self.harvested).collect();
        assert!(lost.is_empty(), "{name} wrote pages {lost:?}");
    }

    pub(super) fn are_some(&self) -> bool {
        !self.written.is_empty()
    }
}

impl World<'_> {
    /// Has all daemons write that log, each in the regions that it maps.
    pub(super) fn write(&mut self) {
        for member in &mut self.members {
            member.write(self.case, true);
        }
    }

    /// As `write`, also with what was mapped when the operation began.
    pub(super) fn write_again(&mut self) {
        for member in &mut self.members {
            let dead = self.case.is_process(member.at);
            member.write(self.case, !dead);
            member.writes.thaw();
        }
    }

    pub(super) fn freeze(&mut self) {
        self.members.iter_mut().for_each(|m| m.writes.freeze());
    }

    /// Harvests what was written until now.
    pub(super) fn harvest(&mut self) {
        for member in &mut self.members {
            let dirty = member.with_daemon(&self.space, |told| told.drain_dirty());
            member.writes.harvest(&dirty.unwrap_or_default());
            if self.case.logs {
                member.writes.are_harvested(&member.name);
            }
        }
    }

    /// Ends the logs, and looks whether anything was lost.
    pub(super) fn stop(&mut self) {
        for (at, member) in self.members.iter_mut().enumerate() {
            member.stop_ring(&self.space);
            let stopped = member.with_daemon(&self.space, |told| told.stop_log());
            let (true, Some(stopped)) = (self.case.logs, stopped) else {
                continue;
            };
            member.writes.harvest(&stopped.dirty);
            member.writes.written.append(&mut member.writes.at_last);
            member.writes.are_harvested(&member.name);
            assert!(member.writes.are_some(), "{} wrote nothing", member.name);
            let lost = self.expected.broken[at] && self.case.subject() != Some(at);
            let lost = lost && !self.case.is_process(at);
            names_the_living(&stopped, lost, &member.name);
        }
    }
}

/// Asserts that daemons that may write are named, and those that are known to be dead are not.
fn names_the_living(stopped: &StoppedLog, lost: bool, name: &str) {
    let named = &stopped.former_daemons;
    assert!(!lost || !named.is_empty(), "{name} may write");
    for daemon in named {
        // All others were killed.
        assert_eq!(daemon.process, Some(std::process::id()), "{daemon}");
    }
}

/// All regions that a daemon may be told of.
fn regions(operation: Operation) -> impl Iterator<Item = Region> {
    let (removed, added) = operation.changes();
    let others = BOOT.iter().chain(&[(40, 2), (96, 2)]);
    others.chain(removed).chain(added).copied()
}
