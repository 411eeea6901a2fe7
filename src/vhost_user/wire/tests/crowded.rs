//! More descriptors on their way than the user may have, who is one without CAP_SYS_RESOURCE.

use std::io::Read;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Uid, geteuid, setresuid};

use super::*;

/// The most descriptors on their way. More are open than that: only new ones have a limit.
const LIMIT: u64 = 100;

/// Runs a test in a process of its own: this binary once more, with nothing but that test. To be
/// called from the test itself, with all of it as the closure.
fn in_own_process<F: FnOnce()>(test: F) {
    const MARK: &str = "GUEST_MEMORY_SHM_OWN_PROCESS";
    let path = std::any::type_name::<F>();
    let name = path
        .split_once("::")
        .and_then(|(_, name)| name.strip_suffix("::{{closure}}"))
        .unwrap();
    if std::env::var_os(MARK).is_some() {
        return test();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(MARK, name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    text.lines()
        .filter(|line| line.starts_with("skipped: "))
        .for_each(|line| eprintln!("{line}"));
    assert!(output.status.success(), "{text}");
    // Without this a wrong name would pass.
    assert!(text.contains("1 passed"), "{text}");
}

/// Has this process be one of a user without privileges and with this limit. Whether it worked.
fn become_limited() -> bool {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, LIMIT, hard).unwrap();
    // A user who has no other process.
    let user = Uid::from_raw((1 << 30) + std::process::id());
    !geteuid().is_root() || setresuid(user, user, user).is_ok()
}

/// Sends descriptors that no one receives, until there are too many. Whether there are.
fn crowd(socket: &UnixStream) -> bool {
    let fds = [region(0).as_fd().as_raw_fd()];
    loop {
        match socket::send(socket.as_fd(), &[0], &fds) {
            Ok(_) => {}
            Err(errno) => return errno == Errno::ETOOMANYREFS,
        }
    }
}

#[track_caller]
fn assert_waits_by_timer(pair: &mut Pair, is_for_reading: bool) {
    for _ in 0..3 {
        let before = Instant::now();
        assert!(pair.advance().is_none());
        assert!(matches!(pair.wire.blocked, Blocked::Short(_)));
        let wait = pair.waits_for();
        // At once is what would spin.
        assert!(wait.until() >= before + RETRY);
        assert!(wait.until() <= Instant::now() + RETRY);
        // Also where that is asked again and again, because others go on.
        assert_eq!(pair.waits_for().until(), wait.until());
        assert!(!wait.is_for_writing());
        assert_eq!(wait.is_for_reading(), is_for_reading);
        let deadline = before - RETRY;
        assert_eq!(pair.wire.waits_for(deadline).until(), deadline);
    }
}

#[test]
fn descriptors_of_others_that_are_in_the_way_are_waited_for() {
    in_own_process(|| {
        region(0);
        let mut others = Pair::new();
        if !become_limited() || !crowd(&others.ours) {
            eprintln!("skipped: this process cannot give up its privileges");
            return;
        }

        // Nothing is sent; that what comes all the same is not waited for.
        let mut waiting = Pair::new();
        waiting.push(Message::add_region(region(1), Reply::Ack));
        waiting.push(Message::set_table(regions(), Reply::Ack));
        waiting.push(barrier());
        assert_waits_by_timer(&mut waiting, false);
        waiting.peer.say(OTHERS);
        assert_waits_by_timer(&mut waiting, false);
        let mut others_bytes = [0; OTHERS.len()];
        waiting.ours.read_exact(&mut others_bytes).unwrap();
        assert_eq!(others_bytes, OTHERS);
        assert_eq!(waiting.peer.read_all(), 0);

        // What was sent before is answered meanwhile.
        let mut asked = Pair::asking(barrier());
        asked.push(Message::add_region(region(2), Reply::Ack));
        assert_waits_by_timer(&mut asked, true);
        asked.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
        assert!(asked.is_ready());
        assert!(asked.advance().is_some());
        assert_waits_by_timer(&mut asked, false);

        // A daemon that is gone is not waited for.
        let mut left = Pair::new();
        left.push(Message::add_region(region(1), Reply::Ack));
        assert_waits_by_timer(&mut left, false);
        let Pair { mut wire, peer, .. } = left;
        drop(peer);
        assert_hung_up(&wire.advance().unwrap_err());

        // What waits for room with nothing sent can be cancelled, and is not sent later.
        asked.wire.cancel_unsent();
        assert!(asked.wire.is_idle());
        assert!(asked.advance().is_none());

        // The others' have arrived.
        others.peer.read_all();
        asked.advance();
        asked.peer.read_all();
        assert_eq!(asked.peer.bytes.len(), HEADER);
        assert!(waiting.advance().is_none());
        assert_eq!(waiting.wire.blocked, Blocked::Not);
        waiting.peer.read_all();
        waiting.check_peer_got_all();
        for code in [FrontendReq::ADD_MEM_REG, FrontendReq::SET_MEM_TABLE] {
            waiting.peer.say(&acknowledgement(code));
        }
        waiting.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
        assert_eq!(waiting.answers().len(), 3);
        assert!(waiting.wire.is_idle());
    });
}
