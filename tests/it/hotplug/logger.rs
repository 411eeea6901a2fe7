//! A logger that panics in the middle of changes: `eprintln!`, when no process reads standard
//! error.

use std::io::pipe;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use guest_memory_shm::mock::Fault;
use nix::unistd::{dup, dup2_stderr};

use super::*;
use crate::isolation::in_own_process;

use crate::support::attach_as;

static LINES: AtomicUsize = AtomicUsize::new(0);

struct Eprints;

impl log::Log for Eprints {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        // The daemon is another process elsewhere, with a log of its own.
        if !record.target().contains("::mock") && record.target().starts_with("guest_memory_shm") {
            LINES.fetch_add(1, Ordering::Relaxed);
            eprintln!("{}", record.args());
        }
    }
    fn flush(&self) {}
}

/// Changes of all kinds, each of which has something to log.
fn changes() {
    let space = space();
    let daemons: Vec<_> = (0..3)
        .map(|_| MockDaemon::builder().start_unnamed().unwrap())
        .collect();
    let attach = |name: &str, daemon, required| {
        let share = share(daemon, PATIENCE);
        attach_as(&space, name, required, share).unwrap()
    };
    let first = attach("first", &daemons[0], true);
    let second = attach("second", &daemons[1], false);
    attach("third", &daemons[2], false);
    let all_map = |holders: &[&MockDaemon]| {
        for daemon in holders {
            assert_eq!(mapped(daemon), published(&space));
        }
    };
    space.insert(region(4)).told_all();
    all_map(&[&daemons[0], &daemons[1], &daemons[2]]);

    // A refusal, and one more that only the log tells of.
    daemons[1].inject(1, Fault::Refuse);
    daemons[2].inject(1, Fault::Refuse);
    let before = LINES.load(Ordering::Relaxed);
    space.insert(region(6)).unwrap_err();
    assert!(LINES.load(Ordering::Relaxed) > before, "nothing was logged");
    assert_eq!(published(&space).len(), 2);
    all_map(&[&daemons[0], &daemons[1], &daemons[2]]);

    // One that is away lags, and comes back.
    daemons[1].hang_up();
    daemons[1].wait_disconnected(PATIENCE).unwrap();
    let before = LINES.load(Ordering::Relaxed);
    let report = space.insert(region(8)).unwrap();
    assert!(LINES.load(Ordering::Relaxed) > before, "nothing was logged");
    assert!(report.stale()[0].is(&second) && report.stale().len() == 1);
    all_map(&[&daemons[0], &daemons[2]]);
    reconnect(&space, &second, &daemons[1]).unwrap();
    all_map(&[&daemons[0], &daemons[1], &daemons[2]]);

    // One that must not be away stops the change.
    daemons[0].hang_up();
    daemons[0].wait_disconnected(PATIENCE).unwrap();
    space.remove((GuestAddress(8 * MIB), MIB)).unwrap_err();
    assert_eq!(published(&space).len(), 3);
    all_map(&[&daemons[1], &daemons[2]]);
    reconnect(&space, &first, &daemons[0]).unwrap();
    drop(space.detach(first).unwrap());
    space.remove((GuestAddress(8 * MIB), MIB)).told_all();
    all_map(&[&daemons[1], &daemons[2]]);
    let statuses = space.listeners().unwrap();
    assert!(statuses.iter().all(|status| status.stale().is_none()));
}

#[test]
fn a_logger_that_panics_loses_its_lines_and_nothing_else() {
    in_own_process(|| {
        log::set_logger(&Eprints).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let shown = dup(std::io::stderr()).unwrap();
        dup2_stderr(writer.as_fd()).unwrap();
        let panics = std::panic::catch_unwind(|| eprintln!("this is not read"));
        let done = std::panic::catch_unwind(changes);
        dup2_stderr(shown).unwrap();
        assert!(panics.is_err(), "the logger does not panic");
        if let Err(payload) = done {
            let text = payload.downcast_ref::<String>();
            panic!("{text:?}");
        }
        assert!(LINES.load(Ordering::Relaxed) > 0);
    });
}
