//! What goes wrong on the other side: daemons that lack features, refuse, stall and die.

use super::*;

/// Starts a copy to `out` from a slow daemon, and calls `disturb` once part of it is done. Gives
/// back its one line of an error, without those of the log.
fn disturbed_copy(
    place: &Place,
    deadline: &str,
    disturb: impl FnOnce(&mut StorageDaemon),
) -> Option<String> {
    let image = place.path("image");
    random_file(&image, 64 * MIB, 6);
    // Slow enough that the copy takes 16 s: it cannot be over before it is disturbed.
    let mut daemon = StorageDaemon::start(&image, Some(4 * MIB))?;
    let child = place
        .share()
        .args(["--deadline", deadline, "--socket"])
        .arg(&daemon.socket)
        .arg("--read-to")
        .arg(place.path("out"))
        .env("RUST_LOG", "share=trace")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut share = support::Process(child);
    let mut lines = BufReader::new(share.0.stderr.take().unwrap()).lines();
    let copied = lines.any(|line| line.unwrap().contains("read 512 KiB of 64 MiB"));
    assert!(copied, "it ended too early");
    disturb(&mut daemon);
    // Ends with the process.
    let errors: Vec<String> = lines
        .map(Result::unwrap)
        .filter(|line| !line.starts_with('['))
        .collect();
    assert_eq!(share.0.wait().unwrap().code(), Some(1));
    let mut names = place.names();
    names.retain(|name| !name.ends_with(".sock"));
    assert_eq!(names, ["image"], "a part of a copy was left");
    let [line] = &errors[..] else {
        panic!("{errors:?}")
    };
    assert!(
        line.starts_with("share: cannot read the disk at byte "),
        "{line}"
    );
    Some(line.clone())
}

#[test]
fn a_daemon_that_is_killed_half_way_ends_the_copy() {
    let place = Place::new();
    if let Some(line) = disturbed_copy(&place, "10", |daemon| daemon.process.kill()) {
        assert!(line.contains("the daemon hung up"), "{line}");
    }
}

#[test]
fn a_daemon_that_falls_silent_half_way_ends_the_copy_at_the_deadline() {
    let place = Place::new();
    if let Some(line) = disturbed_copy(&place, "3", |daemon| daemon.process.stop()) {
        let text = "did not answer within 3s";
        assert!(line.contains(text) && line.contains("--deadline"), "{line}");
    }
}

#[test]
fn a_daemon_that_never_answers_is_given_up_at_the_deadline() {
    let place = Place::new();
    // It listens, and its backlog takes the connection, but it never accepts it.
    let path = place.path("silent.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let run = Run::of(
        place
            .share()
            .args(["--deadline", "0.2", "--socket"])
            .arg(&path),
    );
    run.fails_with(&["cannot use the daemon at", "did not answer within 200ms"]);

    let image = place.path("image");
    random_file(&image, MIB, 7);
    if let Some(daemon) = StorageDaemon::start(&image, None) {
        daemon.process.stop();
        let mut command = place.share();
        command
            .args(["--deadline", "1", "--socket"])
            .arg(&daemon.socket);
        Run::of(&mut command)
            .fails_with(&["cannot use the daemon at", "did not answer within 1s"]);
    }
}

#[test]
fn a_daemon_that_hangs_up_at_once_is_named() {
    let place = Place::new();
    let path = place.path("rude.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let rude = thread::spawn(move || drop(listener.accept().unwrap()));
    Run::of(place.share().arg("--socket").arg(&path)).fails_with(&["cannot use the daemon at"]);
    rude.join().unwrap();
}

/// Runs the example with a daemon in this process.
fn with_mock(builder: MockDaemonBuilder, arguments: &[&str]) -> (Run, MockDaemon, Place) {
    let place = Place::new();
    let contents = (0..MIB).map(|index| (index / 512 % 251) as u8).collect();
    let builder = builder.with_disk_contents(contents);
    let daemon = builder.start(place.path("mock.sock")).unwrap();
    let mut command = place.share();
    command
        .current_dir(place.0.path())
        .args(["--socket", "mock.sock"]);
    let run = Run::of(command.args(arguments));
    (run, daemon, place)
}

#[test]
fn a_daemon_without_slots_and_acknowledgements_is_served_too() {
    let builder = MockDaemon::builder()
        .without_mem_slots()
        .without_reply_ack();
    let (run, daemon, place) = with_mock(builder, &["--read-to", "out"]);
    run.passes();
    let slots = "memory slots      none: it takes whole tables of up to 8 regions";
    assert!(run.out.contains(slots), "{}", run.out);
    let mut disk = vec![0; 1 << 20];
    daemon.disk().read(0, &mut disk).unwrap();
    assert!(fs::read(place.path("out")).unwrap() == disk);
    // Two regions, three with the one that was hot-added, and two again.
    let requests = daemon.requests();
    let tables = requests.iter().filter_map(|request| match request {
        LoggedRequest::SetMemTable(regions) => Some(regions.len()),
        _ => None,
    });
    assert_eq!(tables.collect::<Vec<_>>(), [2, 3, 2]);
    assert_eq!(daemon.disk().flush_count(), 0);
}

#[test]
fn an_input_that_is_no_file_is_refused_before_the_daemon_hears_of_it() {
    let (run, daemon, _place) = with_mock(MockDaemon::builder(), &["--write-from", "/dev/null"]);
    run.fails_with(&["cannot read /dev/null", "no regular file"]);
    assert_eq!(daemon.requests(), []);
}

#[test]
fn what_is_written_is_flushed() {
    let place = Place::new();
    random_file(&place.path("file"), MIB, 8);
    let file = place.path("file");
    let arguments = ["--write-from", file.to_str().unwrap()];
    let (run, daemon, _place) = with_mock(MockDaemon::builder(), &arguments);
    run.passes();
    let mut disk = vec![0; 1 << 20];
    daemon.disk().read(0, &mut disk).unwrap();
    assert!(fs::read(file).unwrap() == disk);
    assert_eq!(daemon.disk().flush_count(), 1);
}

#[test]
fn a_daemon_that_will_not_have_the_hot_added_region_is_named() {
    // The RAM around the hole is the first two changes.
    let add = "add the region 0x140000000..=0x1401fffff (2 MiB)";
    for (fault, text) in [
        (Fault::Refuse, "the daemon refused to"),
        (Fault::AnswerThenHangUp, "the daemon hung up when told to"),
        (Fault::HangUpBefore, "the daemon hung up when told to"),
        (
            Fault::NeverAnswer,
            "the daemon did not answer within 5s when told to",
        ),
    ] {
        // What it is told before, it answers: within the time that it has on a busy machine, too.
        let builder = MockDaemon::builder().with_fault(3, fault);
        let (run, _daemon, place) = with_mock(builder, &["--deadline", "5", "--read-to", "out"]);
        run.fails_with(&["cannot hot-add RAM", text, add]);
        assert_eq!(place.names(), ["mock.sock"]);
    }
}

#[test]
fn a_daemon_with_too_few_slots_is_named() {
    let builder = MockDaemon::builder().with_max_mem_slots(2);
    let (run, daemon, _place) = with_mock(builder, &[]);
    run.fails_with(&[
        "cannot hot-add RAM",
        "has 3 regions, the daemon has 2 memory slots",
    ]);
    assert_eq!(daemon.table().len(), 2);
}
