//! A reconnection that the VMM's event loop goes through, step by step.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::time::Instant;

use guest_memory_shm::{
    AddressSpaceError, ListenerError, MemoryListener, SessionMessage, WaitFor,
};
use nix::libc::{
    SYS_clock_nanosleep, SYS_clone, SYS_clone3, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_epoll_wait,
    SYS_nanosleep, SYS_poll, SYS_ppoll, SYS_pselect6, SYS_select,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use seccompiler::{SeccompAction, SeccompCmpOp, apply_filter};
use vhost::vhost_user::message::FrontendReq;

use super::peer::Peer;
use super::*;
use crate::fork::dies_of;
use crate::isolation::in_own_process;
use crate::proc::{leaves_nothing_but_heaps, thread_count};
use crate::seccomp::{Call, deadly, filter};

/// What an event loop notes of what a session waits for.
pub(super) struct Wait {
    until: Instant,
    fd: Option<OwnedFd>,
    events: PollFlags,
}

impl Wait {
    pub(super) fn of(wait: &WaitFor<'_>) -> Self {
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, wait.is_for_reading());
        events.set(PollFlags::POLLOUT, wait.is_for_writing());
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        Self {
            until: wait.until(),
            fd: wait.fd().map(copy),
            events,
        }
    }

    /// Waits for it.
    pub(super) fn pass(self) {
        let left = self.until.saturating_duration_since(Instant::now());
        // Rounded up: it is not to be called before its time.
        let limit = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap();
        let mut fd = self
            .fd
            .as_ref()
            .map(|fd| PollFd::new(fd.as_fd(), self.events));
        poll(fd.as_mut_slice(), limit).unwrap();
    }
}

fn step(vmm: &Vmm) -> Result<Option<Wait>, AddressSpaceError> {
    step_of(&vmm.space, &vmm.disk)
}

fn step_of(
    space: &AddressSpace,
    disk: &ListenerId<VhostUserSession>,
) -> Result<Option<Wait>, AddressSpaceError> {
    space.reconnect_in_steps(disk, |wait| Wait::of(&wait))
}

/// The event loop, until all is done.
pub(super) fn until_back(vmm: &Vmm) -> Result<(), AddressSpaceError> {
    while let Some(wait) = step(vmm)? {
        wait.pass();
    }
    Ok(())
}

/// Goes through at most this many steps. Whether all is done.
pub(super) fn go(vmm: &Vmm, steps: usize) -> Result<bool, AddressSpaceError> {
    for _ in 0..steps {
        match step(vmm)? {
            Some(wait) => wait.pass(),
            None => return Ok(true),
        }
    }
    Ok(false)
}

fn in_order() -> SessionOptions {
    options().with_device_in_order()
}

fn vmm(place: &Place, options: SessionOptions) -> Vmm {
    Vmm::started(VhostUserSession::connect(place.socket(), options).unwrap())
}

fn works(vmm: &mut Vmm) {
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
}

/// What a step's failure says.
fn text(failed: &AddressSpaceError) -> String {
    assert!(matches!(failed, AddressSpaceError::Refresh { .. }));
    chain(failed)
}

#[test]
fn a_daemon_that_does_not_listen_yet_is_tried_again_after_twice_the_time() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let limit = Duration::from_secs(1);
    let mut vmm = vmm(&place, in_order().with_deadline(limit));
    drop(daemon);
    let begun = Instant::now();
    for pause in [10, 20, 40].map(Duration::from_millis) {
        let before = Instant::now();
        let wait = step(&vmm).unwrap().unwrap();
        assert!(wait.fd.is_none());
        let until = wait.until;
        assert!(before + pause <= until && until <= Instant::now() + pause);
        assert!(vmm.with(|session| session.broken().is_some()));
        wait.pass();
    }
    // The limit is that of the connection: until there is one, there is none.
    while begun.elapsed() <= limit {
        step(&vmm).unwrap().unwrap().pass();
    }
    // Called before its time, nothing is tried: it is there already.
    let wait = step(&vmm).unwrap().unwrap();
    let _daemon = place.serve(MockDaemon::builder());
    let again = step(&vmm).unwrap().unwrap();
    if Instant::now() < wait.until {
        assert_eq!((again.until, again.fd.is_none()), (wait.until, true));
    }
    until_back(&vmm).unwrap();
    works(&mut vmm);
}

#[test]
fn memory_that_changes_between_steps_is_what_the_daemon_has_at_last() {
    let other = GuestAddress(PLUG.0 + MIB);
    for changes in 0..16 {
        let place = Place::new();
        let daemon = place.serve(MockDaemon::builder());
        let mut vmm = vmm(&place, in_order());
        drop(daemon);
        let daemon = place.serve(MockDaemon::builder());
        for change in 0..changes {
            let Some(wait) = step(&vmm).unwrap() else {
                break;
            };
            let space = &vmm.space;
            let changed = thread::scope(|scope| {
                let changed = scope.spawn(move || match change % 4 {
                    0 => space.insert(region(PLUG)),
                    1 => space.insert(region(other)),
                    2 => space.remove((PLUG, MIB)),
                    _ => space.remove((other, MIB)),
                });
                changed.join().unwrap().unwrap()
            });
            let [stale] = changed.stale() else {
                panic!("it is away until all is done");
            };
            assert!(stale.is(&vmm.disk));
            let why = format!("{stale:?}");
            assert!(why.contains("the daemon is being reconnected"), "{why}");
            wait.pass();
        }
        until_back(&vmm).unwrap();
        assert!(vmm.space.listeners().unwrap()[0].stale().is_none());
        let memory = vmm.space.published().memory();
        let held = daemon.table();
        let held: Vec<_> = held
            .iter()
            .map(|region| (region.guest_addr, region.size))
            .collect();
        let table = memory.memory_table();
        let wanted = table.regions().iter().map(|region| region.range());
        let wanted: Vec<_> = wanted
            .map(|range| (range.start_addr(), range.size()))
            .collect();
        assert_eq!(held, wanted, "{changes} changes");
        works(&mut vmm);
        vmm.space
            .insert(region(GuestAddress(2 * PLUG.0)))
            .told_all();
    }
}

#[test]
fn a_daemon_that_dies_at_any_step_is_followed_by_the_next() {
    let mut died = 0;
    for steps in 1.. {
        let place = Place::new();
        drop(place.serve(MockDaemon::builder()));
        let daemon = place.serve(MockDaemon::builder());
        let mut vmm = vmm(&place, in_order());
        drop(daemon);
        let daemon = place.serve(MockDaemon::builder());
        if go(&vmm, steps).unwrap() {
            break;
        }
        drop(daemon);
        if let Err(failed) = until_back(&vmm) {
            assert!(text(&failed).contains("hung up"), "{}", text(&failed));
            assert!(vmm.space.listeners().unwrap()[0].stale().is_some());
            died += 1;
        } // Otherwise it had answered all.
        let _daemon = place.serve(MockDaemon::builder());
        until_back(&vmm).unwrap();
        works(&mut vmm);
    }
    assert!(died > 0);
}

#[test]
fn one_that_never_answers_has_the_deadline_of_the_options() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let limit = Duration::from_secs(1);
    let mut vmm = vmm(&place, in_order().with_deadline(limit));
    drop(daemon);
    let silent = UnixListener::bind(place.socket()).unwrap();
    let before = Instant::now();
    let wait = step(&vmm).unwrap().unwrap();
    assert!(wait.fd.is_some());
    let until = wait.until;
    assert!(before + limit <= until && until <= Instant::now() + limit);
    // The same for all that it is asked.
    assert_eq!(step(&vmm).unwrap().unwrap().until, until);
    let failed = until_back(&vmm).unwrap_err();
    assert!(Instant::now() >= until);
    let said = "the daemon did not answer within 1s when told to agree on features";
    assert!(text(&failed).contains(said), "{}", text(&failed));
    drop(silent);
    std::fs::remove_file(place.socket()).unwrap();

    // At the memory, and after it was told.
    for fault in [Fault::NeverAnswer, Fault::NeverAnswerAfter] {
        let daemon = place.serve(MockDaemon::builder().with_fault(1, fault));
        let failed = until_back(&vmm).unwrap_err();
        let said = "did not answer within 1s when told to add the region";
        assert!(text(&failed).contains(said), "{}", text(&failed));
        drop(daemon);
    }
    let _daemon = place.serve(MockDaemon::builder());
    until_back(&vmm).unwrap();
    works(&mut vmm);
}

#[test]
fn one_that_refuses_or_is_another_is_away_and_the_next_call_begins_anew() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder().with_queues(2));
    let mut vmm = vmm(&place, in_order());
    drop(daemon);
    // It does not offer MQ any more, which the guest's driver has.
    let other = place.serve(MockDaemon::builder());
    let failed = until_back(&vmm).unwrap_err();
    let said = "does not offer the virtio features 0x1000, which are required";
    assert!(text(&failed).contains(said), "{}", text(&failed));
    assert!(vmm.with(|session| session.broken().is_some()));
    drop(other);

    let refuses = MockDaemon::builder().with_queues(2);
    let _daemon = place.serve(refuses.with_fault(1, Fault::Refuse));
    let failed = until_back(&vmm).unwrap_err();
    let said = "refused to add the region";
    assert!(text(&failed).contains(said), "{}", text(&failed));
    until_back(&vmm).unwrap();
    works(&mut vmm);
}

#[test]
fn nothing_else_can_be_said_meanwhile() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder().with_queues(2));
    let mut vmm = vmm(&place, in_order());
    drop(daemon);
    let _daemon = place.serve(MockDaemon::builder().with_queues(2));
    assert!(!go(&vmm, 1).unwrap());
    let ring = vmm.ring();
    vmm.with(|session| {
        let calls: [(&str, Result<(), SessionError>); 7] = [
            ("config", session.config(0, 8).map(drop)),
            ("set_config", session.set_config(0, &[0; 8])),
            ("start_ring", session.start_ring(1, ring)),
            ("stop_ring", session.stop_ring(0).map(drop)),
            ("start_log", session.start_log()),
            ("send", session.send(SessionMessage::new(1000_u32))),
            (
                "request",
                session.request(SessionMessage::new(1000_u32)).map(drop),
            ),
        ];
        for (call, result) in calls {
            let refused = result.unwrap_err();
            assert!(matches!(refused, SessionError::Reconnecting), "{call}");
        }
        let refused = session.config(0, 8).unwrap_err();
        let said = "the daemon is being reconnected: go on with that first";
        assert_eq!(refused.to_string(), said);
    });
    until_back(&vmm).unwrap();
    works(&mut vmm);
}

#[test]
fn one_call_does_all_in_the_middle_of_the_steps() {
    for steps in 0..6 {
        let place = Place::new();
        let daemon = place.serve(MockDaemon::builder());
        let mut vmm = vmm(&place, in_order());
        drop(daemon);
        // Nobody listens at first.
        assert!(!go(&vmm, 1).unwrap());
        let _daemon = place.serve(MockDaemon::builder());
        go(&vmm, steps).unwrap();
        vmm.space.reconnect_session(&vmm.disk).unwrap();
        assert!(step(&vmm).unwrap().is_none());
        works(&mut vmm);
    }
}

#[test]
fn a_daemon_that_is_there_is_told_nothing() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let mut vmm = vmm(&place, options());
    daemon.clear_requests();
    for _ in 0..3 {
        assert!(step(&vmm).unwrap().is_none());
    }
    assert_eq!(daemon.requests(), []);
    works(&mut vmm);
    assert!(!vmm.with(|session| session.needs_reset()));
}

/// A session that is no listener.
fn steps(session: &mut VhostUserSession, memory: &GuestMemoryShm) -> Result<(), SessionError> {
    while !session.reconnect_in_steps(memory)? {
        Wait::of(&session.waits_for()).pass();
    }
    Ok(())
}

#[test]
fn one_call_does_not_wait_for_what_the_steps_have_no_deadline_for() {
    let place = Place::new();
    let memory = GuestMemoryShm::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let daemon = place.serve(MockDaemon::builder());
    let options = options().with_deadline(Duration::from_secs(1));
    let mut session = VhostUserSession::connect(place.socket(), options).unwrap();
    session.update_memory(&memory).unwrap();
    drop(daemon);
    assert!(!session.reconnect_in_steps(&memory).unwrap());
    let refused = session.update_memory(&memory).unwrap_err();
    assert!(matches!(refused, SessionError::Reconnecting), "{refused}");
    session.reconnect().unwrap();
    let refused = session.update_memory(&memory).unwrap_err();
    assert!(matches!(refused, SessionError::Connect { .. }), "{refused}");
    let _daemon = place.serve(MockDaemon::builder());
    steps(&mut session, &memory).unwrap();
    session.update_memory(&memory).unwrap();
}

#[test]
fn a_daemon_that_dies_after_any_message_is_followed_by_the_next() {
    let memory = GuestMemoryShm::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    for features in [
        Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS | Features::INFLIGHT_SHMFD,
        Features::MQ | Features::INFLIGHT_SHMFD,
    ] {
        let peer = |messages| Peer::living(messages, features, |_| None);
        let (_first, socket) = peer(usize::MAX);
        let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
        session.update_memory(&memory).unwrap();
        session
            .start_ring(0, driver.session_ring().unwrap())
            .unwrap();
        let mut messages = 0;
        let last = loop {
            let (peer, socket) = peer(messages);
            session.reconnect_on(socket);
            let Err(failed) = steps(&mut session, &memory) else {
                break peer;
            };
            assert!(failed.to_string().contains("hung up"), "{failed}");
            assert!(session.broken().is_some());
            // On a socket there is nowhere to connect to.
            let refused = session.reconnect_in_steps(&memory).unwrap_err();
            assert!(matches!(refused, SessionError::NoPath), "{refused}");
            messages += 1;
        };
        let told = last.take();
        assert_eq!(told.len(), messages);
        for code in [
            FrontendReq::SET_FEATURES,
            FrontendReq::SET_INFLIGHT_FD,
            FrontendReq::SET_VRING_ENABLE,
        ] {
            let count = told.iter().filter(|told| told.is(code)).count();
            assert_eq!(count, 1, "{code:?}");
        }
        assert_eq!(session.table().regions().len(), 1);
        assert!(!session.needs_reset());
    }
}

/// What waits, and what starts a thread.
const WAITS: [Call; 11] = [
    // For no time it does not wait.
    (SYS_poll, Some((2, SeccompCmpOp::Ne, 0))),
    (SYS_ppoll, None),
    (SYS_select, None),
    (SYS_pselect6, None),
    (SYS_epoll_wait, None),
    (SYS_epoll_pwait, None),
    (SYS_epoll_pwait2, None),
    (SYS_nanosleep, None),
    (SYS_clock_nanosleep, None),
    (SYS_clone, None),
    (SYS_clone3, None),
];

#[test]
fn no_step_waits_or_starts_a_thread() {
    in_own_process(|| {
        let place = Place::new();
        let serve = || {
            let builder = MockDaemon::builder().with_inflight().with_backend_channel();
            place.serve(builder)
        };
        let daemon = serve();
        let mut vmm = vmm(&place, options().with_backend_channel());
        drop(daemon);
        assert_eq!(vmm.space.insert(region(PLUG)).unwrap().stale().len(), 1);
        let mut daemon = None;
        let (space, disk) = (&vmm.space, &vmm.disk);
        for calls in 1.. {
            let Some(wait) = deadly(&WAITS, || step_of(space, disk)).unwrap() else {
                break;
            };
            if calls == 3 {
                daemon = Some(serve());
            }
            wait.pass();
        }
        works(&mut vmm);
        vmm.copies(2, PLUG, BUFFER);
        drop(daemon);
        let (space, disk) = (&vmm.space, &vmm.disk);
        // One that is silent is not waited for either.
        let _silent = UnixListener::bind(place.socket()).unwrap();
        let wait = deadly(&WAITS, || step_of(space, disk)).unwrap().unwrap();
        assert!(wait.fd.is_some() && wait.events == PollFlags::POLLIN);
        // The control: to do all by one call is to wait.
        let program = filter(&WAITS, SeccompAction::KillProcess);
        let killer = dies_of(|| {
            apply_filter(&program).unwrap();
            let _ = space.reconnect_session(disk);
        });
        assert_eq!(killer, Some(Signal::SIGSYS));
    });
}

#[test]
fn no_round_leaves_a_descriptor_or_a_thread() {
    /// Reconnections, every fourth to a daemon that dies on the way.
    fn rounds(count: usize) {
        let place = Place::new();
        let serve = || {
            let builder = MockDaemon::builder().with_inflight().with_backend_channel();
            place.serve(builder)
        };
        let mut daemon = serve();
        let mut vmm = vmm(&place, options().with_backend_channel());
        works(&mut vmm);
        let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = (descriptors(), thread_count());
        for round in 0..count {
            drop(daemon);
            if round % 4 == 3 {
                let dies = serve();
                go(&vmm, round / 4 % 6).unwrap();
                drop(dies);
            }
            daemon = serve();
            // The one that died may be seen to be gone only now, or to have answered all before.
            let _ = until_back(&vmm);
            until_back(&vmm).unwrap();
            works(&mut vmm);
        }
        assert_eq!((descriptors(), thread_count()), before);
    }
    in_own_process(|| {
        rounds(4);
        leaves_nothing_but_heaps(|| rounds(200));
    });
}

#[test]
fn what_a_daemon_gets_in_steps_is_what_it_gets_at_once() {
    let codes = |in_steps: bool| {
        let place = Place::new();
        let daemon = place.serve(MockDaemon::builder());
        let vmm = vmm(&place, in_order());
        vmm.with(|session| session.start_log()).unwrap();
        drop(daemon);
        let daemon = place.serve(MockDaemon::builder());
        match in_steps {
            true => until_back(&vmm).unwrap(),
            false => vmm.space.reconnect_session(&vmm.disk).unwrap(),
        }
        let requests = daemon.requests();
        let line = |request: &LoggedRequest| match request {
            // Each memory has user addresses of its own.
            LoggedRequest::AddMemRegion(region) => format!("ADD_MEM_REG {:?}", region.guest_addr),
            other => other.to_string(),
        };
        requests.iter().map(line).collect::<Vec<_>>()
    };
    assert_eq!(codes(true), codes(false));
}

#[test]
fn a_daemon_that_is_there_is_told_the_memory_and_keeps_its_rings() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let session = VhostUserSession::connect(place.socket(), options()).unwrap();
    let mut vmm = Vmm::started(session);
    let more = vmm.space.published().memory();
    let more = more.insert_region(region(PLUG).into()).unwrap();
    let step = || {
        vmm.with(|session| session.reconnect_in_steps(&more))
            .unwrap()
    };
    let until = std::time::Instant::now() + PATIENCE;
    while !step() {
        assert!(std::time::Instant::now() < until);
        std::thread::yield_now();
    }
    assert_eq!(daemon.table().len(), 2);
    assert!(!vmm.with(|session| session.needs_reset()));
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
}

/// Waits in its update until it is let go.
struct Slow(mpsc::Sender<()>, mpsc::Receiver<()>);

impl MemoryListener for Slow {
    fn check(&mut self, _memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        Ok(())
    }

    fn update(&mut self, _memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        self.0.send(()).unwrap();
        self.1.recv().unwrap();
        Ok(())
    }
}

#[test]
fn a_step_does_not_wait_for_a_change_of_another_thread() {
    let place = Place::new();
    let _daemon = place.serve(MockDaemon::builder());
    let vmm = Vmm::new(VhostUserSession::connect(place.socket(), options()).unwrap());
    let (told, is_told) = mpsc::channel();
    let (go, may_go) = mpsc::channel();
    go.send(()).unwrap(); // for being attached
    vmm.space.attach("slow", Slow(told, may_go)).unwrap();
    is_told.recv().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| vmm.space.insert(region(PLUG)).unwrap().into_removed());
        is_told.recv().unwrap();
        let before = Instant::now();
        let until = vmm.space.reconnect_in_steps(&vmm.disk, |wait| {
            assert!(wait.fd().is_none());
            wait.until()
        });
        assert!(until.unwrap().unwrap() > before);
        go.send(()).unwrap();
    });
    let done = vmm.space.reconnect_in_steps(&vmm.disk, |_| ());
    assert!(done.unwrap().is_none());
}
