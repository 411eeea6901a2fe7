//! The example `kvm_guest` as a person runs it.

use std::process::{Command, Output};

use super::*;
use crate::support::example;

fn kvm_guest(args: &[&str]) -> Output {
    Command::new(example("kvm_guest"))
        .args(args)
        .output()
        .unwrap()
}

/// What a good run prints.
fn printed(args: &[&str]) -> String {
    let output = kvm_guest(args);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    assert_eq!(errors, "");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn it_says_what_the_guest_wrote_and_who_saw_it() {
    if new_vm().is_none() {
        return;
    }
    let text = printed(&["--plug", "1", "--pages", "4"]);
    for line in [
        "slot 1 is 0x40000000..=0x400fffff (1 MiB)",
        "maps the regions at 0x0 and 0x40000000",
        "guest writes      4 pages, without an exit",
        "dirty log         0x40000000..=0x40000fff (4 KiB)",
        "0x40040000..=0x40040fff (4 KiB)",
        "0x40080000..=0x40080fff (4 KiB)",
        "0x400c0000..=0x400c0fff (4 KiB)",
        "daemon reads      16 KiB",
        "verified          its disk holds what the guest wrote",
    ] {
        assert!(text.contains(line), "{line} is missing: {text}");
    }
    // Before the plug and after the unplug.
    assert_eq!(text.matches("no RAM at 0x40000000").count(), 2, "{text}");
    assert_eq!(
        text.matches("maps the regions at 0x0\n").count(),
        2,
        "{text}"
    );

    // Every page there is, as one range.
    let text = printed(&["--plug", "2", "--pages", "512"]);
    let whole = "dirty log         0x40000000..=0x401fffff (2 MiB)\n";
    assert!(text.contains(whole), "{text}");
}

#[test]
fn where_there_is_no_kvm_it_says_so_and_ends_well() {
    let text = printed(&["--device", "/nonexistent/kvm"]);
    let start = "kvm_guest: there is no /nonexistent/kvm here, so no guest was run: ";
    assert!(text.replace("\n  ", " ").starts_with(start), "{text}");
}

#[test]
fn bad_arguments_are_one_line() {
    for (status, args, part) in [
        (2, &["--pages", "257", "--plug", "1"][..], "has 256 pages"),
        (2, &["--pages", "0"], "--pages"),
        (2, &["--plug", "4096"], "--plug"),
        (1, &["--device", "/dev/null"], "with /dev/null"),
        (1, &["--device", "/dev"], "cannot use /dev "),
    ] {
        if new_vm().is_none() {
            return;
        }
        let output = kvm_guest(args);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
        assert!(errors.starts_with("kvm_guest: "), "{errors}");
        assert!(errors.contains(part), "{part} is missing: {errors}");
    }
    assert!(printed(&["--help"]).contains("--plug"));
}
