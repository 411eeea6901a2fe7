//! The share without a socket: a sink that plays a daemon by a script.

use vm_memory::GuestAddress;

use super::*;
use crate::memory::GuestMemoryShm;
use crate::options::RamOptions;

/// What the share told the daemon, in order; addresses in MiB.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Acks,
    Slots,
    Set(Vec<u64>),
    Add(u64),
    Remove(u64),
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
    fail: Option<(usize, fn() -> SinkError)>,
    base: Option<u64>,
}

impl Script {
    fn say(&mut self, what: Said) -> std::result::Result<(), SinkError> {
        self.said.push(what);
        let at = self.said.iter().filter(|said| **said != Said::Acks).count() - 1;
        match self.fail {
            Some((fail, error)) if fail == at => Err(error()),
            _ => Ok(()),
        }
    }
}

fn mib(region: &TableRegion) -> u64 {
    region.range().start_addr().0 >> 20
}

impl MemTableSink for Script {
    fn request_acks(&mut self) {
        self.said.push(Said::Acks);
    }
    fn set_mem_table(
        &mut self,
        regions: &[TableRegion],
    ) -> std::result::Result<Option<Vec<u64>>, SinkError> {
        self.say(Said::Set(regions.iter().map(mib).collect()))?;
        self.held = regions.iter().map(mib).collect();
        Ok(self.base.map(|base| (base..).take(regions.len()).collect()))
    }
    fn add_mem_region(
        &mut self,
        region: &TableRegion,
    ) -> std::result::Result<Option<u64>, SinkError> {
        self.say(Said::Add(mib(region)))?;
        self.held.push(mib(region));
        self.held.sort_unstable();
        Ok(self.base)
    }
    fn remove_mem_region(&mut self, region: &TableRegion) -> std::result::Result<(), SinkError> {
        self.say(Said::Remove(mib(region)))?;
        self.held.retain(|start| *start != mib(region));
        Ok(())
    }
    fn max_mem_slots(&mut self) -> std::result::Result<u64, SinkError> {
        self.say(Said::Slots)?;
        Ok(self.slots)
    }
    fn barrier(&mut self) -> std::result::Result<(), SinkError> {
        self.say(Said::Barrier)
    }
    fn set_log_base(&mut self, log: &DaemonLog) -> Answer<()> {
        self.say(Said::Log(log.size() / 8))
    }
    fn refusal_keeps_table(&self) -> bool {
        self.keeps_table
    }
    fn hang_up(&self) -> Option<HangUp> {
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
        .with_ram(RamOptions::new(), ranges)
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
    share.update(&table(&[0, 2])).unwrap();
    assert_eq!(share.sink().said, [Acks, Slots, Add(0), Add(2), Barrier]);

    share.sink_mut().said.clear();
    let report = share.update(&table(&[1, 3, 5])).unwrap();
    assert_eq!((report.removed(), report.added()), (2, 3));
    assert_eq!(
        share.sink().said,
        [Remove(2), Remove(0), Add(1), Add(3), Add(5), Barrier]
    );

    share.sink_mut().said.clear();
    let held = share.table().clone();
    assert_eq!(share.update(&held).unwrap(), ShareReport::default());
    assert_eq!(share.sink().said, []);
}

#[test]
fn without_acks_every_change_is_followed_by_a_round_trip() {
    use Said::*;
    let mut share = share(8, SLOTS);
    share.update(&table(&[0, 2])).unwrap();
    assert_eq!(share.sink().said, [Slots, Add(0), Barrier, Add(2), Barrier]);
}

#[test]
fn without_slots_the_whole_table_is_sent() {
    use Said::*;
    let mut share = share(0, ACK);
    share.update(&table(&[0, 2])).unwrap();
    share.update(&table(&[0, 2, 4])).unwrap();
    assert_eq!(
        share.sink().said,
        [Acks, Set(vec![0, 2]), Barrier, Set(vec![0, 2, 4]), Barrier]
    );
}

#[test]
fn too_many_regions_are_refused_before_anything_is_sent() {
    let nine: Vec<u64> = (0..9).collect();
    let mut plain = share(0, ACK);
    plain.update(&table(&nine[..8])).unwrap();
    let said = plain.sink().said.len();
    assert!(matches!(
        plain.update(&table(&nine)),
        Err(Error::TooManyRegions {
            regions: 9,
            limit: 8,
            slots: SlotLimit::Message
        })
    ));
    assert!(matches!(
        plain.update(&MemoryTable::default()),
        Err(Error::EmptyTable)
    ));
    assert_eq!(plain.sink().said.len(), said);
    assert_eq!(plain.broken(), None);

    let mut slots = share(8, SLOTS | ACK);
    assert!(matches!(
        slots.update(&table(&nine)),
        Err(Error::TooManyRegions {
            regions: 9,
            limit: 8,
            slots: SlotLimit::Daemon
        })
    ));
    // The share goes on: 8 other regions take the place of 8.
    slots.update(&table(&nine[..8])).unwrap();
    slots
        .update(&table(&[10, 11, 12, 13, 14, 15, 16, 17]))
        .unwrap();
    slots.update(&MemoryTable::default()).unwrap();
    assert_eq!(slots.table(), &MemoryTable::default());
}

#[test]
fn a_failure_at_any_step_breaks_the_share_until_it_is_connected_anew() {
    type Make = fn() -> SinkError;
    let ways: [(Make, &str); 3] = [
        (|| SinkError::Refused("no".into()), "refused"),
        (|| SinkError::HungUp("gone".into()), "hung up"),
        (|| SinkError::Protocol("what".into()), "failed"),
    ];
    for features in [SLOTS | ACK, SLOTS, ACK, Features::empty()] {
        // How many messages a good exchange of two updates takes.
        let (first, second) = (table(&[0, 2]), table(&[2, 3]));
        let mut good = share(8, features);
        good.update(&first).unwrap();
        good.update(&second).unwrap();
        let steps = good
            .sink()
            .said
            .iter()
            .filter(|said| **said != Said::Acks)
            .count();

        for (make, word) in ways {
            for step in 0..steps {
                let mut share = share(8, features);
                share.sink_mut().fail = Some((step, make));
                let error = share
                    .update(&first)
                    .err()
                    .or_else(|| share.update(&second).err());
                let error = error.expect("a step fails").to_string();
                assert!(error.contains(word), "{error}");
                let said = share.sink().said.clone();
                let at = said.iter().filter(|said| **said != Said::Acks).nth(step);
                if word == "refused" && matches!(at, Some(Said::Add(_) | Said::Remove(_))) {
                    // The one failure that tells what the daemon holds, and it is still there.
                    assert_eq!(share.broken(), None);
                    assert_eq!(said.last(), Some(&Said::Barrier));
                    assert_eq!(starts(share.table()), share.sink().held);
                    share.update(&second).unwrap();
                    assert_eq!(share.sink().held, [2, 3]);
                    assert_eq!(share.table(), &second);
                    continue;
                }
                assert_eq!(share.broken(), Some(error.as_str()));

                let said = share.sink().said.len();
                assert!(matches!(
                    share.update(&first),
                    Err(Error::ShareBroken { .. })
                ));
                assert_eq!(
                    share.sink().said.len(),
                    said,
                    "a broken share sends nothing"
                );

                let fresh = Script {
                    slots: 8,
                    ..Script::default()
                };
                let _ = share.reconnect(fresh, features);
                assert_eq!(share.update(&second).unwrap().added(), 2);
                assert_eq!((share.broken(), share.table()), (None, &second));
            }
        }
    }
}

#[test]
fn what_was_acknowledged_before_a_failure_is_known() {
    let mut share = share(8, SLOTS | ACK);
    share.sink_mut().fail = Some((2, || SinkError::Refused("no".into())));
    assert!(matches!(
        share.update(&table(&[0, 2])),
        Err(Error::DaemonRefused { change: MemTableChange::Add(range), .. })
            if range.start_addr() == GuestAddress(2 << 20)
    ));
    assert_eq!(starts(share.table()), [0]);
}

#[test]
fn a_refusal_followed_by_silence_breaks_the_share() {
    /// Refuses the region at 2 MiB, and does not answer after that.
    #[derive(Default)]
    struct Leaves(Script, bool);
    impl MemTableSink for Leaves {
        fn request_acks(&mut self) {}
        fn set_mem_table(&mut self, _: &[TableRegion]) -> Answer<Option<Vec<u64>>> {
            unreachable!()
        }
        fn add_mem_region(&mut self, region: &TableRegion) -> Answer<Option<u64>> {
            self.1 = mib(region) == 2;
            match self.1 {
                true => Err(SinkError::Refused("no".into())),
                false => self.0.add_mem_region(region),
            }
        }
        fn remove_mem_region(&mut self, _: &TableRegion) -> Answer<()> {
            unreachable!()
        }
        fn max_mem_slots(&mut self) -> Answer<u64> {
            Ok(8)
        }
        fn barrier(&mut self) -> Answer<()> {
            match self.1 {
                true => Err(SinkError::HungUp("gone".into())),
                false => Ok(()),
            }
        }
        fn hang_up(&self) -> Option<HangUp> {
            None
        }
    }
    let mut share = VhostUserShare::new(Leaves::default(), SLOTS | ACK);
    let refused = share.update(&table(&[0, 2])).unwrap_err();
    assert!(matches!(refused, Error::DaemonRefused { .. }), "{refused}");
    assert_eq!(share.broken(), Some(refused.to_string().as_str()));
}

#[test]
fn a_refused_whole_table_breaks_the_share_unless_the_sink_says_it_keeps_the_old_one() {
    for keeps_table in [false, true] {
        let mut share = share(0, Features::empty());
        share.sink_mut().keeps_table = keeps_table;
        share.update(&table(&[0, 2])).unwrap();
        let steps = share.sink().said.len();
        share.sink_mut().fail = Some((steps, || SinkError::Refused("no".into())));
        let refused = share.update(&table(&[4])).unwrap_err();
        assert!(matches!(refused, Error::DaemonRefused { .. }), "{refused}");
        assert_eq!(share.broken().is_none(), keeps_table);
        assert_eq!(starts(share.table()), [0, 2]);
        assert_eq!(share.update(&table(&[4])).is_ok(), keeps_table);
    }
}

#[test]
fn a_check_asks_for_the_slots_once_and_changes_nothing() {
    use Said::*;
    let mut share = share(2, SLOTS | ACK);
    share.check(&MemoryTable::default()).unwrap();
    assert_eq!(share.sink().said, [Acks], "nothing changes: nothing to ask");
    share.check(&table(&[0, 1])).unwrap();
    assert!(matches!(
        share.check(&table(&[0, 1, 2])),
        Err(Error::TooManyRegions {
            regions: 3,
            limit: 2,
            slots: SlotLimit::Daemon
        })
    ));
    assert_eq!(share.sink().said, [Acks, Slots]);
    assert_eq!(share.table(), &MemoryTable::default());
    share.update(&table(&[0, 1])).unwrap();
    share.check(&MemoryTable::default()).unwrap();
    share.sink_mut().fail = Some((share.sink().said.len() - 1, || {
        SinkError::HungUp("gone".into())
    }));
    share.update(&table(&[0])).unwrap_err();
    let held = share.table().clone();
    assert!(matches!(share.check(&held), Err(Error::ShareBroken { .. })));
}

#[test]
fn a_check_whose_question_fails_breaks_the_share() {
    let mut share = share(2, SLOTS | ACK);
    share.sink_mut().fail = Some((0, || SinkError::HungUp("gone".into())));
    let lost = share.check(&table(&[0])).unwrap_err();
    assert!(matches!(lost, Error::DaemonHungUp { .. }), "{lost}");
    assert!(share.broken().is_some());
}

#[test]
fn bases_of_postcopy_are_handed_on() {
    for features in [SLOTS | ACK, ACK] {
        let mut share = share(8, features);
        share.sink_mut().base = Some(7);
        let report = share.update(&table(&[1, 4])).unwrap();
        let starts: Vec<u64> = report
            .bases()
            .iter()
            .map(|(addr, _)| addr.0 >> 20)
            .collect();
        assert_eq!(starts, [1, 4]);
    }
}

#[test]
fn bases_of_a_failed_update_and_of_a_dropped_report_are_kept() {
    let mut share = share(8, SLOTS | ACK);
    share.sink_mut().base = Some(7);
    // The third region is refused, after GET_MAX_MEM_SLOTS and two regions.
    share.sink_mut().fail = Some((3, || SinkError::Refused("no".into())));
    share.update(&table(&[1, 2, 3])).unwrap_err();
    let mib = |start: u64| GuestAddress(start << 20);
    assert_eq!(share.take_bases(), [(mib(1), 7), (mib(2), 7)]);
    assert_eq!(share.take_bases(), []);

    let held = share.table().clone();
    let more = table(&[4, 5]);
    let mut all = held.clone();
    more.regions().iter().for_each(|region| all.insert(region));
    let report = share.update(&all).unwrap();
    share.keep_bases(report);
    // What is gone has no base.
    let mut fewer = all.clone();
    fewer.remove(&more.regions()[0]);
    share.update(&fewer).unwrap();
    assert_eq!(share.take_bases(), [(mib(5), 7)]);
}

#[test]
fn a_refused_log_fails_the_update_and_is_sent_by_the_next() {
    use Said::*;
    // A word is 64 pages, so a region of 1 MiB needs 4 of them.
    let (first, second) = (table(&[0]), table(&[0, 2]));
    for features in [SLOTS | ACK, ACK] {
        let features = features | Features::LOG_SHMFD;
        let good = {
            let mut share = share(8, features);
            share.update(&first).unwrap();
            share.start_log().unwrap();
            share.sink_mut().said.clear();
            share.update(&second).unwrap();
            share.into_sink().said
        };
        let logs = good
            .iter()
            .enumerate()
            .filter(|(_, said)| **said == Log(12));
        let places: Vec<usize> = logs.map(|(at, _)| at).collect();
        assert_eq!(places.len(), 2, "{good:?}");
        for at in places {
            let mut share = share(8, features);
            share.update(&first).unwrap();
            share.start_log().unwrap();
            share.sink_mut().said.clear();
            share.sink_mut().fail = Some((at, || SinkError::Refused("no".into())));
            let refused = share.update(&second).unwrap_err();
            let text = "refused to take a dirty log of 96 bytes";
            assert!(refused.to_string().contains(text), "{refused}");
            assert_eq!(share.broken(), None);
            // Before the table it stands in its way, after it it does not undo it.
            let held = if at == 0 { &first } else { &second };
            assert_eq!(share.table(), held);

            share.sink_mut().said.clear();
            share.sink_mut().fail = None;
            share.update(&second).unwrap();
            assert_eq!(share.table(), &second);
            assert_eq!(
                share.sink().said.iter().rfind(|said| **said != Barrier),
                Some(&Log(12))
            );
            share.sink_mut().said.clear();
            share.update(&second).unwrap();
            assert_eq!(share.sink().said, []);
        }
    }
}

#[test]
fn a_log_that_does_not_start_leaves_nothing_behind() {
    let mut share = share(8, SLOTS | ACK | Features::LOG_SHMFD);
    share.update(&table(&[0])).unwrap();
    share.sink_mut().said.clear();
    share.sink_mut().fail = Some((0, || SinkError::Refused("no".into())));
    share.start_log().unwrap_err();
    assert!(!share.is_logging());
    assert_eq!(share.broken(), None);
    share.sink_mut().fail = None;
    share.start_log().unwrap();
    assert!(share.is_logging());
}

#[test]
fn a_sink_without_logs_refuses_them() {
    #[derive(Default)]
    struct Plain;
    impl MemTableSink for Plain {
        fn request_acks(&mut self) {}
        fn set_mem_table(&mut self, _: &[TableRegion]) -> Answer<Option<Vec<u64>>> {
            Ok(None)
        }
        fn add_mem_region(&mut self, _: &TableRegion) -> Answer<Option<u64>> {
            Ok(None)
        }
        fn remove_mem_region(&mut self, _: &TableRegion) -> Answer<()> {
            Ok(())
        }
        fn max_mem_slots(&mut self) -> Answer<u64> {
            Ok(8)
        }
        fn barrier(&mut self) -> Answer<()> {
            Ok(())
        }
        fn hang_up(&self) -> Option<HangUp> {
            None
        }
    }
    let mut share = VhostUserShare::new(Plain, ACK | Features::LOG_SHMFD);
    share.update(&table(&[0])).unwrap();
    let refused = share.start_log().unwrap_err();
    assert!(matches!(refused, Error::DaemonRefused { .. }), "{refused}");
    assert_eq!((share.is_logging(), share.broken()), (false, None));
    share.update(&table(&[1])).unwrap();
}
