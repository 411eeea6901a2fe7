//! SIGINT and SIGTERM at any point of a run: nothing is left, and the end is that of the signal.

use std::os::unix::process::ExitStatusExt;

use super::*;

const SIGNALS: [Signal; 2] = [Signal::SIGINT, Signal::SIGTERM];

/// How a run that was interrupted ended.
struct Ended {
    status: ExitStatus,
    /// Lines of its log until then.
    lines: usize,
}

/// Runs `command`, and sends `signal` when it has logged so many lines.
fn interrupted(command: &mut Command, after: usize, signal: Signal) -> Ended {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
    let child = quiet.env("RUST_LOG", "trace").stderr(Stdio::piped());
    let mut share = support::Process(child.spawn().unwrap());
    let log = BufReader::new(share.0.stderr.take().unwrap());
    let mut lines = 0;
    for line in log.lines() {
        line.unwrap();
        lines += 1;
        if lines == after {
            kill(share.pid(), signal).unwrap();
        }
    }
    let status = share.0.wait().unwrap();
    let left = format!("gms-{}-", share.pid());
    let names = names_in(Path::new("/dev/shm"));
    assert!(!names.iter().any(|name| name.starts_with(&left)));
    Ended { status, lines }
}

/// Interrupts the command that `make` makes at many points, spread over a whole run, and calls
/// `check` after each, with whether the run was complete by then.
fn interrupt_everywhere(make: impl Fn() -> Command, check: impl Fn(bool)) {
    const POINTS: usize = 16;
    let whole = interrupted(&mut make(), usize::MAX, Signal::SIGINT);
    assert!(whole.status.success());
    check(true);
    assert!(whole.lines > POINTS, "{} lines", whole.lines);
    let mut by_signal = 0;
    for point in 0..POINTS {
        let signal = SIGNALS[point % 2];
        let after = 1 + point * (whole.lines - 1) / POINTS;
        let ended = interrupted(&mut make(), after, signal);
        if !ended.status.success() {
            // What shells show as status 130 and 143.
            let status = ended.status;
            assert_eq!(status.signal(), Some(signal as i32), "{after}: {status}");
            by_signal += 1;
        }
        check(ended.status.success());
    }
    // It may be done before the last ones arrive.
    assert!(by_signal > POINTS / 2, "{by_signal}");
}

#[test]
fn an_interrupted_self_test_leaves_nothing() {
    for options in [
        &["--ram", "4M", "--disk", "2M"][..],
        &["--ram", "4M", "--disk", "2M", "--backing", "shm"],
        &["--ram", "4M", "--disk", "2M", "--sandbox"],
        &[
            "--ram",
            "4M",
            "--hotplug",
            "3",
            "--daemons",
            "2",
            "--backing",
            "shm",
        ],
    ] {
        let place = Place::new();
        let make = || {
            let mut share = place.share();
            share.args(options);
            share
        };
        interrupt_everywhere(make, |_| assert_eq!(place.names(), [""; 0]));
    }
}

#[test]
fn an_interrupted_copy_is_whole_or_not_there() {
    // Where nothing has the name yet, and where another file has.
    for before in [None, Some("before")] {
        let place = Place::new();
        let out = place.path("out");
        let make = || {
            match before {
                Some(text) => fs::write(&out, text).unwrap(),
                None => drop(fs::remove_file(&out)),
            }
            let mut share = place.share();
            share.args(["--ram", "4M", "--disk", "2M", "--read-to"]);
            share.arg(&out);
            share
        };
        interrupt_everywhere(make, |complete| match fs::read(&out) {
            Ok(bytes) if bytes.len() == 2 << 20 => assert_eq!(place.names(), ["out"]),
            Ok(bytes) => {
                assert!(!complete);
                assert_eq!(Some(bytes.as_slice()), before.map(str::as_bytes));
                assert_eq!(place.names(), ["out"]);
            }
            Err(_) => {
                assert!(!complete && before.is_none());
                assert_eq!(place.names(), [""; 0]);
            }
        });
    }
}

/// Without procfs a file cannot be given a name later: it has one from the start.
#[test]
fn an_interrupted_copy_to_a_file_with_a_name_is_removed() {
    let script = "mount -t tmpfs tmpfs /proc 2>/dev/null || exit 9; exec \"$@\"";
    let place = Place::new();
    let make = || {
        let _ = fs::remove_file(place.path("out"));
        let mut share = Command::new("unshare");
        share.args(["-m", "sh", "-c", script, "sh"]);
        share.arg(support::example("share"));
        share.args(["--ram", "4M", "--disk", "2M", "--read-to"]);
        share.arg(place.path("out")).env("TMPDIR", place.0.path());
        share
    };
    let tried = interrupted(&mut make(), usize::MAX, Signal::SIGINT);
    if !tried.status.success() {
        return support::skip("no file system can be mounted over /proc");
    }
    interrupt_everywhere(make, |_| {
        let mut names = place.names();
        names.retain(|name| name != "out");
        assert_eq!(names, [""; 0]);
    });
}

#[test]
fn an_interrupted_copy_from_a_real_daemon_leaves_nothing() {
    for signal in SIGNALS {
        let place = Place::new();
        let image = place.path("image");
        random_file(&image, 64 * MIB, 11);
        // The copy would take 16 s.
        let Some(daemon) = StorageDaemon::start(&image, Some(4 * MIB)) else {
            return;
        };
        let mut share = place.share();
        share.arg("--socket").arg(&daemon.socket);
        share.arg("--read-to").arg(place.path("out"));
        let ended = interrupted(&mut share, 200, signal);
        assert_eq!(ended.status.signal(), Some(signal as i32));
        drop(daemon);
        let mut names = place.names();
        names.retain(|name| !name.ends_with(".sock"));
        assert_eq!(names, ["image"]);
    }
}

#[test]
fn regions_under_a_real_daemon_are_interrupted_at_any_point() {
    let place = Place::new();
    let image = place.path("image");
    random_file(&image, 4 * MIB, 12);
    for (signal, after) in SIGNALS.into_iter().zip([30, 120]) {
        let Some(daemon) = StorageDaemon::start(&image, None) else {
            return;
        };
        let mut share = place.share();
        share.args(["--hotplug", "400", "--daemons", "2", "--backing", "shm"]);
        share.arg("--socket").arg(&daemon.socket);
        let ended = interrupted(&mut share, after, signal);
        assert_eq!(ended.status.signal(), Some(signal as i32));
    }
    let mut names = place.names();
    names.retain(|name| !name.ends_with(".sock"));
    assert_eq!(names, ["image"]);
}

#[test]
fn no_run_but_a_copy_writes_to_any_directory() {
    for arguments in [&["--disk", "1M"][..], &["--hotplug", "2", "--daemons", "2"]] {
        let mut share = Place::new().share();
        Run::of(share.args(arguments).env("TMPDIR", "/nonexistent")).passes();
    }
    let guest = Command::new(support::example("kvm_guest"))
        .env("TMPDIR", "/nonexistent")
        .output()
        .unwrap();
    assert!(guest.status.success(), "{guest:?}");
}
