//! What a person can give it, and what it says to that.

use std::os::unix::net::UnixListener;
use std::process::Command;

use nix::mount::MsFlags;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::daemon::{BlkDaemon, bare_command, command, run};
use super::frontend::Guest;
use super::*;
use crate::isolation::{in_own_process, mount_tmpfs, own_mounts};

/// Asserts that it ends at once, with one line that has all of `texts`.
#[track_caller]
fn refused(command: &mut Command, texts: &[&str]) {
    ends_with(1, command, texts);
}

/// As [`refused`], because of its command line.
#[track_caller]
fn misused(command: &mut Command, texts: &[&str]) {
    ends_with(2, command, texts);
}

#[track_caller]
fn ends_with(code: i32, command: &mut Command, texts: &[&str]) {
    let output = run(command);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{errors}");
    assert!(errors.starts_with("blk_daemon: "), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    for text in texts {
        assert!(errors.contains(text), "no {text:?} in: {errors}");
    }
    assert!(output.stdout.is_empty());
}

#[test]
fn a_bad_command_line_is_one_line_that_tells_the_way_out() {
    let place = Place::new();
    let (socket, image) = (place.socket(), place.image(4096));
    for (args, texts) in [
        (&[][..], &["--socket", "--file", "--help"][..]),
        (&["--socket", "x"], &["--file"]),
        (
            &["--socket", "x", "--file", "y", "--queue", "1"],
            &["--queue"],
        ),
    ] {
        misused(bare_command().args(args), texts);
    }
    for queues in ["0", "65", "-1", "many"] {
        misused(
            command(&socket, &image).args(["--queues", queues]),
            &["--queues", queues],
        );
    }
    assert!(!socket.exists());
}

#[test]
fn an_image_that_cannot_be_served_is_named_with_the_reason() {
    let place = Place::new();
    let socket = place.socket();
    let [missing, empty, fifo] = ["missing", "empty", "fifo"].map(|name| place.path(name));
    sparse(&empty, 0);
    mkfifo(&fifo, Mode::S_IRUSR).unwrap();
    for (image, reason) in [
        (&missing, "No such file"),
        (&empty, "truncate -s 1G"),
        (&fifo, "no regular file and no block device"),
        (&place.path("."), "no regular file and no block device"),
        (&"/dev/null".into(), "no regular file and no block device"),
    ] {
        let name = image.display().to_string();
        refused(&mut command(&socket, image), &[&name, reason]);
        refused(command(&socket, image).arg("--read-only"), &[&name, reason]);
    }
    assert!(!socket.exists());
}

#[test]
fn a_socket_that_cannot_be_had_is_named_with_the_reason() {
    let place = Place::new();
    let image = place.image(4096);
    let taken = place.path("taken");
    let _listener = UnixListener::bind(&taken).unwrap();
    let long = place.path(&"x".repeat(108));
    for (socket, reason) in [
        (&image, "no socket"),
        (&place.path("missing/blk.sock"), "No such file"),
        (&taken, "another process listens there"),
        (&long, "SUN_LEN"),
    ] {
        let name = socket.display().to_string();
        refused(&mut command(socket, &image), &[&name, reason]);
    }
    // Nothing was taken away.
    assert_eq!(fs::read(&image).unwrap(), pattern(0, 4096));
    assert!(taken.exists());
}

#[test]
fn an_image_is_written_by_one_daemon_and_read_by_many() {
    let place = Place::new();
    let image = place.image(4096);
    let [one, two] = ["one", "two"].map(|name| place.path(name));
    let writer = BlkDaemon::start(&one, &image, NO_ARGS);
    refused(&mut command(&two, &image), &["disk.img", "locked"]);
    refused(command(&two, &image).arg("--read-only"), &["locked"]);
    writer.end(Signal::SIGTERM);

    let readers = [&one, &two].map(|socket| BlkDaemon::start(socket, &image, &["--read-only"]));
    refused(&mut command(&place.socket(), &image), &["locked"]);
    for reader in readers {
        assert!(reader.greeting().contains("4096 bytes, read-only"));
        reader.end(Signal::SIGTERM);
    }
}

#[test]
fn a_file_that_may_not_be_written_is_served_read_only() {
    in_own_process(|| {
        let place = Place::new();
        if !own_mounts() {
            return;
        }
        let at = "/dev/shm";
        mount_tmpfs(at, MsFlags::empty(), "size=1m");
        let image = Path::new(at).join("disk.img");
        fs::write(&image, pattern(0, 512)).unwrap();
        mount_tmpfs(at, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, "");
        let daemon = place.daemon(&image);
        assert!(
            daemon.greeting().contains("read-only"),
            "{}",
            daemon.greeting()
        );
        let mut guest = Guest::connect(daemon.socket());
        assert_eq!(guest.read(0, 512).unwrap(), pattern(0, 512));
        daemon.end(Signal::SIGTERM);
    });
}

#[test]
fn the_help_shows_how_qemu_uses_it_and_what_becomes_of_a_partial_sector() {
    let output = run(bare_command().arg("--help"));
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "qemu-system-x86_64",
        "memory-backend-shm",
        "no multiple of 512 bytes",
    ] {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
}
