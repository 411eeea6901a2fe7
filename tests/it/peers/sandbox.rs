//! The example under its own filter: `--sandbox`.

use super::*;

/// One that logs makes no other calls: all of it is logged.
fn sandboxed(place: &Place, arguments: &[&str]) -> Command {
    let mut share = place.share();
    share.args(["--sandbox", "--ram", "8M"]).args(arguments);
    share.env("RUST_LOG", "trace");
    share
}

#[track_caller]
fn passes(command: &mut Command) {
    let run = Run::of(command);
    let (status, errors) = (run.status, &run.errors);
    let last = errors.lines().next_back().unwrap_or_default();
    assert!(status.success(), "{command:?}: {status}, {last}");
    let line = "are allowed, any other ends this process";
    assert!(run.out.contains(line), "{}", run.out);
    run.check_left_nothing();
}

#[test]
fn all_of_a_run_with_a_real_daemon_is_in_the_filter() {
    let place = Place::new();
    let [image, input, new, out] = ["image", "input", "new", "out"].map(|name| place.path(name));
    random_file(&image, 4 * MIB, 13);
    random_file(&input, MIB, 14);
    // One that is there already takes another way.
    fs::write(&out, "before").unwrap();
    let [input, new, out] = [&input, &new, &out].map(|path| path.to_str().unwrap());
    for arguments in [
        &[][..],
        &["--read-to", new],
        &["--read-to", out],
        &["--write-from", input],
        &["--hotplug", "8"],
        &["--hotplug", "8", "--backing", "shm", "--overwrite"],
        &["--hotplug", "8", "--daemons", "3", "--refuse", "2"],
    ] {
        let Some(daemon) = StorageDaemon::start(&image, None) else {
            return;
        };
        let mut share = sandboxed(&place, arguments);
        passes(share.arg("--socket").arg(&daemon.socket));
    }
    assert!(same(Path::new(new), Path::new(out)));
}

#[test]
fn all_of_a_run_in_one_process_is_in_the_filter() {
    let place = Place::new();
    let out = place.path("out");
    let out = out.to_str().unwrap();
    for arguments in [
        &["--disk", "4M"][..],
        &["--disk", "4M", "--backing", "shm"],
        &["--disk", "4M", "--read-to", out],
        &["--write-from", out],
        &["--hotplug", "8", "--daemons", "4", "--refuse", "3"],
    ] {
        passes(&mut sandboxed(&place, arguments));
    }
}

#[test]
fn what_fails_in_the_filter_is_said_as_ever() {
    let place = Place::new();
    let missing = place.path("missing");
    let mut share = place.share();
    share.args(["--sandbox", "--deadline", "0.2", "--socket"]);
    Run::of(share.arg(missing)).fails_with(&["no daemon can be reached at", "No such file"]);

    let builder = MockDaemon::builder().with_fault(3, Fault::Refuse);
    let daemon = builder.start(place.path("mock.sock")).unwrap();
    let mut share = place.share();
    share.args(["--sandbox", "--socket"]);
    Run::of(share.arg(daemon.path().unwrap())).fails_with(&["cannot hot-add RAM", "refused to"]);
}

/// What the kernel says of each thread's filter: 0 without one, 2 with one.
fn filters(pid: Pid) -> Vec<(String, u32)> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = threads.map(|thread| thread.unwrap().path().join("status"));
    let filter = status.map(|status| {
        let text = fs::read_to_string(status).unwrap();
        let field = |name| text.lines().find_map(|line| line.strip_prefix(name));
        let name = field("Name:\t").unwrap().to_owned();
        (name, field("Seccomp:\t").unwrap().parse().unwrap())
    });
    filter.collect()
}

#[test]
fn each_thread_has_the_filter() {
    let place = Place::new();
    let image = place.path("image");
    random_file(&image, 64 * MIB, 15);
    for (option, mode) in [(Some("--sandbox"), 2), (None, 0)] {
        // Its I/O takes longer than this test looks.
        let Some(daemon) = StorageDaemon::start(&image, Some(MIB)) else {
            return;
        };
        let mut share = place.share();
        share.args(["--hotplug", "400", "--daemons", "2", "--socket"]);
        share.arg(&daemon.socket).args(option);
        let share = share.env("RUST_LOG", "debug").stdout(Stdio::null());
        let mut share = support::Process(share.stderr(Stdio::piped()).spawn().unwrap());
        let lines = BufReader::new(share.0.stderr.take().unwrap()).lines();
        // Two for what it starts with; before the second that it adds, I/O went through the first.
        let created = lines.filter(|line| line.as_ref().unwrap().contains("created ShmBacking"));
        assert_eq!(created.take(4).count(), 4);
        share.stop();
        let filters = filters(share.pid());
        for name in ["share", "signals", "io-0", "io-1", "mock-daemon"] {
            assert!(filters.iter().any(|(own, _)| own == name), "{filters:?}");
        }
        assert!(filters.iter().all(|(_, is)| *is == mode), "{filters:?}");
        share.kill();
    }
}

#[test]
fn a_wait_that_a_stop_has_interrupted_goes_on() {
    let place = Place::new();
    let path = place.path("silent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut share = place.share();
    share.args(["--sandbox", "--ram", "8M", "--deadline", "2", "--socket"]);
    let share = share.arg(&path).stdout(Stdio::null()).stderr(Stdio::null());
    let mut share = support::Process(share.spawn().unwrap());
    let (mut daemon, _) = listener.accept().unwrap();
    // SET_OWNER and GET_FEATURES, which is not answered.
    daemon.read_exact(&mut [0; 24]).unwrap();
    let stat = format!("/proc/{}/stat", share.pid());
    while !fs::read_to_string(&stat).unwrap().contains(") S ") {
        std::thread::yield_now();
    }
    share.stop();
    kill(share.pid(), Signal::SIGCONT).unwrap();
    assert_eq!(share.0.wait().unwrap().code(), Some(1));
}
