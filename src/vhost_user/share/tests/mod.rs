//! The share without a socket: a connection that plays a daemon by a script.

use std::sync::Mutex;

use vm_memory::GuestAddress;

use super::connection::Answer;
use super::*;
use crate::memory::GuestMemoryShm;
use crate::options::RamOptions;

mod former;
mod panics;
mod postcopy;
mod refused;
use crate::vhost_user::table::TableRegion;

/// What the share told the daemon, in order; addresses in MiB.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Acks,
    Slots,
    Set(Vec<u64>),
    Add(u64),
    Remove(u64),
    /// An acknowledgement of the bases of what was said before.
    AckBases(DaemonRequest),
    /// The size in words.
    Log(u64),
    Barrier,
}

#[derive(Debug, Default)]
struct Script {
    said: Vec<Said>,
    slots: u64,
    /// What was said and not failed.
    held: Vec<u64>,
    keeps_table: bool,
    /// The n-th message after `Acks`, counted from 0, is answered like this.
    fail: Option<(usize, fn() -> DaemonFailure)>,
    /// Nothing that is said after that is answered.
    leaves: bool,
    base: Option<u64>,
    /// How many bases come for a whole table, if not as many as it has regions.
    bases: Option<usize>,
    /// What the handler of bases was told, and how much that was at each acknowledgement.
    told: Told,
    told_at_acks: Vec<usize>,
    /// What answers the log.
    process: Option<u32>,
    panics: Option<Panics>,
}

/// What a handler of bases was told; addresses in MiB.
type Told = Arc<Mutex<Vec<(u64, u64)>>>;

/// Where the connection panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Panics {
    AtAcks,
    AtHangUp,
}

impl Script {
    fn say(&mut self, what: Said) -> Answer<()> {
        self.said.push(what);
        let at = self.said.iter().filter(|said| **said != Said::Acks).count() - 1;
        match self.fail {
            Some((fail, error)) if fail == at => Err(error()),
            Some((fail, _)) if self.leaves && at > fail => Err(DaemonFailure::hung_up("gone")),
            _ => Ok(()),
        }
    }
}

fn mib(region: &TableRegion) -> u64 {
    region.range().start_addr().0 >> 20
}

impl DaemonConnection for Script {
    fn request_acks(&mut self) {
        assert_ne!(self.panics.take(), Some(Panics::AtAcks));
        self.said.push(Said::Acks);
    }
    fn set_mem_table(&mut self, regions: &[TableRegion]) -> Answer<Option<Vec<u64>>> {
        self.say(Said::Set(regions.iter().map(mib).collect()))?;
        self.held = regions.iter().map(mib).collect();
        let bases = self.bases.unwrap_or(regions.len());
        Ok(self.base.map(|base| (base..).take(bases).collect()))
    }
    fn add_mem_region(&mut self, region: &TableRegion) -> Answer<Option<u64>> {
        self.say(Said::Add(mib(region)))?;
        self.held.push(mib(region));
        self.held.sort_unstable();
        Ok(self.base)
    }
    fn remove_mem_region(&mut self, region: &TableRegion) -> Answer<()> {
        self.say(Said::Remove(mib(region)))?;
        self.held.retain(|start| *start != mib(region));
        Ok(())
    }
    fn max_mem_slots(&mut self) -> Answer<u64> {
        self.say(Said::Slots)?;
        Ok(self.slots)
    }
    fn acknowledge_bases(&mut self, change: DaemonRequest) -> Answer<()> {
        self.told_at_acks.push(self.told.lock().unwrap().len());
        self.say(Said::AckBases(change))
    }
    fn barrier(&mut self) -> Answer<()> {
        self.say(Said::Barrier)
    }
    fn set_log_base(&mut self, log: &DaemonLog) -> Answer<Option<u32>> {
        self.say(Said::Log(log.size() / 8))?;
        Ok(self.process)
    }
    fn refusal_keeps_table(&self) -> bool {
        self.keeps_table
    }
    fn disconnector(&self) -> Option<Disconnector> {
        assert_ne!(self.panics, Some(Panics::AtHangUp));
        None
    }
}

/// A connection with nothing but what it must have, which takes all, and returns these bases.
struct Plain(Option<u64>);

impl DaemonConnection for Plain {
    fn request_acks(&mut self) {}
    fn set_mem_table(&mut self, regions: &[TableRegion]) -> Answer<Option<Vec<u64>>> {
        Ok(self.0.map(|base| vec![base; regions.len()]))
    }
    fn add_mem_region(&mut self, _: &TableRegion) -> Answer<Option<u64>> {
        Ok(self.0)
    }
    fn remove_mem_region(&mut self, _: &TableRegion) -> Answer<()> {
        Ok(())
    }
    fn max_mem_slots(&mut self) -> Answer<u64> {
        Ok(8)
    }
    fn barrier(&mut self) -> Answer<()> {
        assert_eq!(
            self.0, None,
            "nothing is said to a daemon that waits for an acknowledgement"
        );
        Ok(())
    }
    fn disconnector(&self) -> Option<Disconnector> {
        None
    }
}

fn starts(table: &MemoryTable) -> Vec<u64> {
    table.regions().iter().map(mib).collect()
}

fn table(starts: &[u64]) -> MemoryTable {
    let ranges: Vec<_> = starts
        .iter()
        .map(|start| (GuestAddress(start << 20), 1 << 20))
        .collect();
    GuestMemoryShm::<()>::builder()
        .add_ram(RamOptions::new(), ranges)
        .build()
        .unwrap()
        .memory_table()
}

fn share(slots: u64, features: Features) -> VhostUserShare<Script> {
    let script = Script {
        slots,
        ..Script::default()
    };
    VhostUserShare::new(script, features)
}

const SLOTS: Features = Features::CONFIGURE_MEM_SLOTS;
const ACK: Features = Features::REPLY_ACK;

#[test]
fn with_slots_and_acks_only_the_difference_is_sent_and_confirmed_once() {
    use Said::*;
    let mut share = share(8, SLOTS | ACK);
    share.update_table(&table(&[0, 2])).unwrap();
    assert_eq!(
        share.connection().said,
        [Acks, Slots, Add(0), Add(2), Barrier]
    );

    share.connection_mut().said.clear();
    let report = share.update_table(&table(&[1, 3, 5])).unwrap();
    assert_eq!((report.removed, report.added), (2, 3));
    assert_eq!(
        share.connection().said,
        [Remove(2), Remove(0), Add(1), Add(3), Add(5), Barrier]
    );

    share.connection_mut().said.clear();
    let held = share.table().clone();
    assert_eq!(share.update_table(&held).unwrap(), ShareReport::default());
    assert_eq!(share.connection().said, []);
}

#[test]
fn without_acks_every_change_is_followed_by_a_round_trip() {
    use Said::*;
    let mut share = share(8, SLOTS);
    share.update_table(&table(&[0, 2])).unwrap();
    assert_eq!(
        share.connection().said,
        [Slots, Add(0), Barrier, Add(2), Barrier]
    );
}

#[test]
fn without_slots_the_whole_table_is_sent() {
    use Said::*;
    let mut share = share(0, ACK);
    share.update_table(&table(&[0, 2])).unwrap();
    share.update_table(&table(&[0, 2, 4])).unwrap();
    assert_eq!(
        share.connection().said,
        [Acks, Set(vec![0, 2]), Barrier, Set(vec![0, 2, 4]), Barrier]
    );
}

#[test]
fn too_many_regions_are_refused_before_anything_is_sent() {
    let nine: Vec<u64> = (0..9).collect();
    let mut plain = share(0, ACK);
    plain.update_table(&table(&nine[..8])).unwrap();
    let said = plain.connection().said.len();
    assert!(matches!(
        plain.update_table(&table(&nine)),
        Err(ShareError::Table(TableError::TooManyRegions {
            regions: 9,
            limit: 8,
            slots: SlotLimit::Message
        }))
    ));
    assert!(matches!(
        plain.update_table(&MemoryTable::default()),
        Err(ShareError::Table(TableError::Empty))
    ));
    assert_eq!(plain.connection().said.len(), said);
    assert!(plain.broken().is_none());

    let mut slots = share(8, SLOTS | ACK);
    assert!(matches!(
        slots.update_table(&table(&nine)),
        Err(ShareError::Table(TableError::TooManyRegions {
            regions: 9,
            limit: 8,
            slots: SlotLimit::Daemon
        }))
    ));
    // The share goes on: 8 other regions take the place of 8.
    slots.update_table(&table(&nine[..8])).unwrap();
    slots
        .update_table(&table(&[10, 11, 12, 13, 14, 15, 16, 17]))
        .unwrap();
    slots.update_table(&MemoryTable::default()).unwrap();
    assert_eq!(slots.table(), &MemoryTable::default());
}

#[test]
fn a_check_asks_for_the_slots_once_and_changes_nothing() {
    use Said::*;
    let mut share = share(2, SLOTS | ACK);
    share.check_table(&MemoryTable::default()).unwrap();
    assert_eq!(
        share.connection().said,
        [],
        "nothing changes: nothing to ask"
    );
    share.check_table(&table(&[0, 1])).unwrap();
    assert!(matches!(
        share.check_table(&table(&[0, 1, 2])),
        Err(ShareError::Table(TableError::TooManyRegions {
            regions: 3,
            limit: 2,
            slots: SlotLimit::Daemon
        }))
    ));
    assert_eq!(share.connection().said, [Acks, Slots]);
    assert_eq!(share.table(), &MemoryTable::default());
    share.update_table(&table(&[0, 1])).unwrap();
    share.check_table(&MemoryTable::default()).unwrap();
    share.connection_mut().fail = Some((share.connection().said.len() - 1, || {
        DaemonFailure::hung_up("gone")
    }));
    share.update_table(&table(&[0])).unwrap_err();
    let held = share.table().clone();
    assert!(matches!(
        share.check_table(&held),
        Err(ShareError::Broken { .. })
    ));
}

#[test]
fn a_check_whose_question_fails_breaks_the_share() {
    let mut share = share(2, SLOTS | ACK);
    share.connection_mut().fail = Some((0, || DaemonFailure::hung_up("gone")));
    let lost = share.check_table(&table(&[0])).unwrap_err();
    assert!(
        matches!(lost.failure(), Some(DaemonFailure::HungUp(_))),
        "{lost}"
    );
    assert!(share.broken().is_some());
}
