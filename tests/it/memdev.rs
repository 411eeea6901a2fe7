//! The example `memdev` as a person and as a program runs it, and QEMU's own answer beside it.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use guest_memory_shm::RamOptions;
use serde_json::Value;

use crate::support::{Process, example, peer};

fn memdev(args: &[&str]) -> Output {
    Command::new(example("memdev")).args(args).output().unwrap()
}

/// What a good run prints.
fn printed(args: &[&str]) -> String {
    let output = memdev(args);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// What QEMU's monitor prints for `info memdev`, or `None` if QEMU is missing.
fn qemu_info(options: &str) -> Option<String> {
    let program = peer("qemu-system-x86_64")?;
    let mut command = Command::new(program);
    command.args(["-machine", "none", "-nodefaults", "-display", "none"]);
    command.args(["-monitor", "stdio", "-object", options]);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = Process(piped.spawn().unwrap());
    let mut monitor = process.0.stdin.take().unwrap();
    monitor.write_all(b"info memdev\nquit\n").unwrap();
    let mut printed = String::new();
    let mut out = process.0.stdout.take().unwrap();
    std::io::Read::read_to_string(&mut out, &mut printed).unwrap();
    // The monitor echoes what it reads, between its prompts.
    let lines = printed.lines().map(|line| line.trim_end_matches('\r'));
    let from = lines.skip_while(|line| !line.starts_with("memory backend: "));
    let info: Vec<&str> = from.take_while(|line| !line.is_empty()).collect();
    Some(info.join("\n") + "\n")
}

#[test]
fn it_prints_what_qemu_prints_for_info_memdev() {
    for options in [
        "memory-backend-shm,id=ram0,size=2M",
        "memory-backend-shm,id=ram0,size=1M,prealloc=on,prealloc-threads=2,merge=off,dump=off",
        "memory-backend-memfd,id=a.b-c_d,size=1.5M,policy=bind,host-nodes=0",
        "memory-backend-memfd,id=ram0,size=4M,policy=interleave,host-nodes=0,seal=off,reserve=off",
        "memory-backend-memfd,id=ram0,size=0x100000,merge=on,dump=on,reserve=on",
        "memory-backend-file,id=ram0,size=1M,mem-path=/tmp,share=on",
    ] {
        let Some(theirs) = qemu_info(options) else {
            return;
        };
        let ours = printed(&[options]);
        let ours: String = ours.split_inclusive('\n').take(9).collect();
        assert_eq!(ours, theirs, "{options}");
    }
}

#[test]
fn each_option_string_is_built_and_its_facts_stand_in_columns() {
    let text = printed(&[
        "memory-backend-shm,id=low,size=2M,prealloc=on",
        "memory-backend-memfd,id=high,size=1G,merge=on",
    ]);
    let blocks = text.matches("memory backend: ").count();
    assert_eq!(blocks, 2, "{text}");
    let line = |name: &str| {
        let mut lines = text.lines();
        let line = lines.find(|line| line.starts_with("0x") && line.ends_with(name));
        line.unwrap_or_else(|| panic!("{name}: {text}")).to_owned()
    };
    let words = |name: &str| {
        line(name)
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(words("low")[1..5], ["2", "MiB", "2", "MiB"]);
    assert_eq!(words("high")[1..5], ["1", "GiB", "0", "B"]);
    // The columns are aligned.
    let heading = text
        .lines()
        .find(|line| line.starts_with("guest address"))
        .unwrap();
    let column = heading.find("name").unwrap();
    assert_eq!(line("low").find("low"), Some(column));
    assert_eq!(line("high").find("high"), Some(column));
    assert_eq!(text.matches("merge=on has no effect").count(), 1, "{text}");
}

#[test]
fn the_map_shows_what_is_allocated() {
    let text = printed(&[
        "--map",
        "memory-backend-shm,id=all,size=2M,populate=allocate",
        "memory-backend-memfd,id=none,size=2M",
    ]);
    let (_, map) = text.split_once("all from 0x0").unwrap();
    let (all, none) = map.split_once("none from 0x40000000").unwrap();
    // The last line explains the characters.
    let none = none.split_once("(·").unwrap().0;
    let count = |text: &str, what: char| text.chars().filter(|shade| *shade == what).count();
    assert_eq!((count(all, '█'), count(all, '·')), (512, 0));
    assert_eq!((count(none, '█'), count(none, '·')), (0, 512));
}

#[test]
fn a_program_reads_the_same_as_json() {
    let text = printed(&[
        "--json",
        "--populate",
        "memory-backend-memfd,id=ram0,size=2M,merge=on",
    ]);
    let found: Value = serde_json::from_str(&text).unwrap();
    let backend = &found["backends"][0];
    assert_eq!(backend["info"]["id"], "ram0");
    assert_eq!(backend["info"]["size"], 2 << 20);
    let options: RamOptions = serde_json::from_value(backend["options"].clone()).unwrap();
    assert_eq!(
        (options.name(), options.merge()),
        (Some("ram0"), Some(true))
    );
    let region = &found["stats"]["regions"][0];
    assert_eq!(region["allocated"], 2 << 20);
    assert_eq!(found["allocated"], 2 << 20);
    assert_eq!(found["notes"][0]["note"]["property"], "merge");
    let seals = region["seals"].as_str().unwrap();
    assert!(seals.contains("shrink|grow"), "{seals}");
}

#[test]
fn a_rom_is_built_beside_the_ram() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rom");
    std::fs::write(&path, vec![7; 8192]).unwrap();
    let options = format!(
        "memory-backend-file,id=bios,size=8K,mem-path={},share=on,readonly=on",
        path.display()
    );
    let text = printed(&[&options]);
    assert!(text.contains("bios: a ROM of 8.00 KiB at 0x0"), "{text}");
}

#[test]
fn more_than_the_machine_has_is_one_line_with_need_rest_and_remedy() {
    for args in [
        &["--populate", "memory-backend-memfd,size=64T"][..],
        &["memory-backend-memfd,size=64T,prealloc=on"],
        &["memory-backend-memfd,size=64T,populate=allocate"],
    ] {
        let output = memdev(args);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
        for part in [
            "64 TiB",
            "more are needed",
            "/proc/meminfo",
            "ask for less RAM",
            "(on-shortage=try-anyway)",
        ] {
            assert!(errors.contains(part), "{part} is missing: {errors}");
        }
    }
}

#[test]
fn bad_options_are_one_line_with_the_property_the_value_and_the_remedy() {
    for (status, options, parts) in [
        (
            2,
            &["memory-backend-shm,size=64X"][..],
            &["size=64X", "64M"][..],
        ),
        (
            2,
            &["memory-backend-shm,size=1M,share=off"],
            &["share=off", "share=on"],
        ),
        (2, &["memory-backend-shm"], &["size", "size=64M"]),
        (
            2,
            &["memory-backend-memfd,size=1M,seals=on"],
            &["seals", "seal"],
        ),
        (2, &["memory-backend-memfd,size=1M,pmem=on"], &["pmem"]),
        (2, &["--bogus"], &["--bogus", "--help"]),
        (2, &[], &["OPTIONS", "--help"]),
        (
            1,
            &["memory-backend-file,size=1M,share=on,mem-path=/nonexistent/x"],
            &["/nonexistent/x", "create"],
        ),
        (
            2,
            &[
                "memory-backend-shm,id=a,size=1M",
                "memory-backend-shm,id=a,size=1M",
            ],
            &["id=a", "another"],
        ),
        (
            1,
            &["memory-backend-memfd,size=1M,policy=bind,host-nodes=127"],
            &["host-nodes=127", "policy=bind", "choose"],
        ),
    ] {
        let output = memdev(options);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
        assert!(errors.starts_with("memdev: "), "{errors}");
        assert!(!errors.contains("::"), "{errors}");
        assert!(output.stdout.is_empty());
        for part in parts {
            assert!(errors.contains(part), "{part} is missing: {errors}");
        }
    }
}
