//! What all examples have in common: lines that fit, and a terminal that is left as it was.

use std::process::{Command, Stdio};

use crate::support::example;

mod small;
mod terminal;

const COLUMNS: usize = 80;

/// What a good run prints.
fn printed(name: &str, args: &[&str]) -> String {
    let mut command = Command::new(example(name));
    let command = command.env_remove("RUST_LOG").stdin(Stdio::null());
    let output = command.args(args).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn nothing_that_is_printed_is_wider_than_a_terminal() {
    let backends = [
        "memory-backend-shm,id=low,size=2M",
        "memory-backend-memfd,id=high,size=2M,merge=on,thp=on",
        "memory-backend-memfd,id=m2,size=1024G,reserve=on",
    ];
    let many = "memory-backend-memfd,id=m0,size=2M,policy=bind,host-nodes=0";
    for (name, args) in [
        ("share", &[][..]),
        ("share", &["--ram", "64G", "--disk", "1M"]),
        ("share", &["--backing", "shm", "--ram", "64M"]),
        (
            "share",
            &["--hotplug", "4", "--daemons", "3", "--refuse", "2"],
        ),
        ("share", &["-h"]),
        ("share", &["--help"]),
        ("memdev", &backends),
        ("memdev", &["--map", "--populate", backends[0], many]),
        ("memdev", &["-h"]),
        ("memdev", &["--help"]),
        ("blk_daemon", &["-h"]),
        ("blk_daemon", &["--help"]),
        ("kvm_guest", &[]),
        ("kvm_guest", &["--plug", "2048", "--pages", "100"]),
        ("kvm_guest", &["--device", "/nonexistent"]),
        ("kvm_guest", &["-h"]),
        ("kvm_guest", &["--help"]),
    ] {
        let text = printed(name, args);
        assert!(text.lines().count() > 1, "{text}");
        for line in text.lines() {
            let columns = line.chars().count();
            assert!(columns <= COLUMNS, "{name} {args:?}, {columns}: {line}");
        }
    }
}

#[test]
fn lines_are_broken_between_words_and_nothing_is_lost() {
    let text = printed("share", &["--help"]);
    let words: Vec<&str> = text.split_whitespace().collect();
    let phrase = "reads and writes through a virtqueue that lives in the shared RAM";
    assert!(words.join(" ").contains(phrase), "{text}");
    let indented = "\n          Connect to the daemon that listens on this Unix socket";
    assert!(text.contains(indented), "{text}");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    for (name, args) in [
        ("share", &["--disk", "1M"][..]),
        ("memdev", &["memory-backend-memfd,size=2M"]),
        ("kvm_guest", &["--help"]),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(example(name));
        let output = command.args(args).stdout(writer).output().unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
    }
}
