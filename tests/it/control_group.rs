//! Real control groups, and processes in them that ask for more memory than they may have.
//!
//! Each process is this binary once more, with one scenario, or an example. It is in the group from
//! its first instruction on.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use guest_memory_shm::{
    Error, GuestMemoryShm, MemoryLimit, OnFailure, OnShortage, Populate, PopulateError,
    PopulateOptions, RamOptions,
};
use nix::sys::signal::Signal;
use vm_memory::{Bytes, GuestAddress};

use crate::populate::{MIB, allocated, memory, threads};
use crate::support::{Process, example, host_changes, skip};

/// Names the scenario that a process is to play.
const SCENARIO: &str = "GUEST_MEMORY_SHM_SCENARIO";
const LIMIT: u64 = 64 * MIB;
const TOO_MUCH: u64 = 256 * MIB;

/// A control group with a limit on memory; it goes away with what is in it when it is dropped.
struct Group {
    dir: PathBuf,
    limit_file: &'static str,
}

impl Group {
    /// A group that may have so many bytes, or none after printing why.
    fn with_limit(bytes: u64) -> Option<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        if !host_changes() {
            return None;
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let one = mounts.lines().find(|line| {
            line.split_once(" - cgroup ")
                .is_some_and(|(_, options)| options.split([',', ' ']).any(|name| name == "memory"))
        });
        let two = mounts.lines().find(|line| {
            let point = point(line);
            let given = fs::read_to_string(point.join("cgroup.subtree_control"));
            line.contains(" - cgroup2 ") && given.is_ok_and(|given| given.contains("memory"))
        });
        let (root, limit_file) = match (one, two) {
            (Some(line), _) => (point(line), "memory.limit_in_bytes"),
            (None, Some(line)) => (point(line), "memory.max"),
            (None, None) => {
                skip("no control groups that limit memory are mounted");
                return None;
            }
        };
        remove_those_of_the_dead(&root);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let dir = root.join(format!("gms-test-{}-{count}", std::process::id()));
        if fs::create_dir(&dir).is_err() {
            skip("this process may not make control groups");
            return None;
        }
        let this = Self { dir, limit_file };
        fs::write(this.dir.join(limit_file), bytes.to_string()).unwrap();
        Some(this)
    }

    /// The program in the group. Its shell moves itself, and becomes the program.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("sh");
        let script = r#"echo $$ >"$0/cgroup.procs" && exec "$@""#;
        command.arg("-c").arg(script).arg(&self.dir).arg(program);
        // The allocator and the tests themselves take little memory then, and always the same.
        command.env("RUST_BACKTRACE", "0");
        command
    }

    /// A process of its own in the group that plays a scenario.
    fn play(&self, scenario: &str) -> Output {
        let mut command = self.command(&std::env::current_exe().unwrap());
        as_scenario(&mut command, scenario).output().unwrap()
    }

    /// Asserts that a scenario comes to its end.
    fn plays(&self, scenario: &str) {
        let output = self.play(scenario);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(
            output.status.success() && out.contains("1 passed"),
            "{scenario}: {}\n{out}\n{err}",
            output.status
        );
    }

    fn limit_path(&self) -> PathBuf {
        self.dir.join(self.limit_file)
    }
}

/// Where a line of mountinfo says that something is mounted.
fn point(line: &str) -> PathBuf {
    line.split(' ').nth(4).unwrap_or_default().into()
}

fn as_scenario<'a>(command: &'a mut Command, scenario: &str) -> &'a mut Command {
    let test = ["--exact", "control_group::scenario", "--nocapture"];
    command.args(test).arg("--test-threads=1");
    command.env(SCENARIO, scenario)
}

/// Removes what tests left that were killed.
fn remove_those_of_the_dead(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let pid = name
            .strip_prefix("gms-test-")
            .and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Not if something is in it.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What a failed test left running, for as long as it takes to end.
        for _ in 0..10_000 {
            let pids = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
            for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
            }
            if pids.is_empty() && fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::yield_now();
        }
        eprintln!("{} is left", self.dir.display());
    }
}

#[test]
fn more_than_the_group_may_have_is_refused_before_the_first_page() {
    let Some(group) = Group::with_limit(LIMIT) else {
        return;
    };
    for scenario in ["build", "build from a string", "later", "in the background"] {
        group.plays(scenario);
    }
    // The controls: the group does bite, and what fits is had.
    for scenario in ["try anyway", "build and try anyway", "touch"] {
        let status = group.play(scenario).status;
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32), "{scenario}");
    }
    group.plays("fit");
}

#[test]
fn memdev_says_on_one_line_what_is_short_and_where() {
    let memdev = example("memdev");
    let Some(group) = Group::with_limit(LIMIT) else {
        return;
    };
    for args in [
        &["memory-backend-memfd,size=256M,prealloc=on"][..],
        &["memory-backend-shm,size=256M,populate=allocate"],
        &["--populate", "memory-backend-memfd,size=256M"],
    ] {
        let output = group.command(&memdev).args(args).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        for part in [
            "more are needed",
            group.limit_path().to_str().unwrap(),
            "raise it",
        ] {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
    }
    for args in [
        &["memory-backend-memfd,size=256M,prealloc=on,on-shortage=try-anyway"][..],
        &[
            "--populate",
            "memory-backend-memfd,size=256M,on-shortage=try-anyway",
        ],
    ] {
        let output = group.command(&memdev).args(args).output().unwrap();
        assert_eq!(
            output.status.signal(),
            Some(Signal::SIGKILL as i32),
            "{args:?}"
        );
    }
    let small = group
        .command(&memdev)
        .args(["--populate", "memory-backend-memfd,size=32M"])
        .output();
    assert!(small.unwrap().status.success());
}

#[test]
fn what_is_there_already_and_what_can_be_dropped_do_not_count() {
    let Some(group) = Group::with_limit(LIMIT) else {
        return;
    };
    group.plays("there already");
    group.plays("beside a file");
}

#[test]
fn when_another_process_takes_the_rest_it_ends_in_time() {
    let Some(group) = Group::with_limit(TOO_MUCH) else {
        return;
    };
    group.plays("another takes the rest");
}

#[test]
fn lazy_ram_larger_than_the_group_is_noted() {
    let Some(group) = Group::with_limit(LIMIT) else {
        return;
    };
    group.plays("lazy");
}

/// What a process in a group plays; nothing without one.
#[test]
fn scenario() {
    let Ok(scenario) = std::env::var(SCENARIO) else {
        return;
    };
    match scenario.as_str() {
        "build" => build(),
        "build from a string" => build_from_a_string(),
        "later" => later(),
        "in the background" => in_the_background(),
        "try anyway" => try_anyway(),
        "build and try anyway" => {
            let options = RamOptions::new().with_on_shortage(OnShortage::TryAnyway);
            memory(options.with_populate(Populate::Prefault), TOO_MUCH);
        }
        "touch" => {
            let memory = memory(RamOptions::new(), TOO_MUCH);
            let all = vec![1; MIB as usize];
            for at in (0..TOO_MUCH).step_by(MIB as usize) {
                memory.write_slice(&all, GuestAddress(at)).unwrap();
            }
        }
        "fit" => fit(),
        "there already" => there_already(),
        "beside a file" => beside_a_file(),
        "another takes the rest" => another_takes_the_rest(),
        "the other" => the_other(),
        "lazy" => lazy(),
        other => panic!("{other}"),
    }
}

const MODES: [Populate; 2] = [Populate::Allocate, Populate::Prefault];

/// Asserts that it is refused by the limit of the group, and says so.
fn assert_short<T: std::fmt::Debug>(result: Result<T, Error>, needed: u64) {
    match result {
        Err(error @ Error::Populate(PopulateError::NotEnoughMemory { .. })) => {
            let text = error.to_string();
            let Error::Populate(PopulateError::NotEnoughMemory { shortage, .. }) = error else {
                unreachable!();
            };
            assert!(
                matches!(shortage.limit, MemoryLimit::ControlGroup { .. }),
                "{text}"
            );
            assert!(shortage.limit.path().is_file(), "{text}");
            // And at most one byte in 128 besides.
            assert!(shortage.needed >= needed, "{text}");
            assert!(shortage.needed <= needed + needed / 100, "{text}");
            assert!(shortage.left < LIMIT, "{text}");
            assert!(
                text.contains(shortage.limit.path().to_str().unwrap()),
                "{text}"
            );
            assert!(text.contains("OnShortage::TryAnyway"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

fn build() {
    for mode in MODES {
        let options = RamOptions::new().with_populate(mode);
        let built = GuestMemoryShm::<()>::builder()
            .with_ram(options.clone(), [(GuestAddress(0), TOO_MUCH / 2)])
            .with_ram(options, [(GuestAddress(1 << 32), TOO_MUCH / 2)])
            .build();
        assert_short(built, TOO_MUCH);
    }
}

fn build_from_a_string() {
    for text in [
        "memory-backend-memfd,size=256M,prealloc=on",
        "memory-backend-shm,size=256M,populate=allocate",
        "memory-backend-file,size=256M,mem-path=/dev/shm,share=on,prealloc=on",
    ] {
        let options: RamOptions = text.parse().unwrap();
        let built = GuestMemoryShm::<()>::builder()
            .with_ram(options, [(GuestAddress(0), TOO_MUCH)])
            .build();
        assert_short(built, TOO_MUCH);
    }
}

fn later() {
    let memory = memory(RamOptions::new(), TOO_MUCH);
    memory.write_obj(7u8, GuestAddress(5 * MIB)).unwrap();
    let before = allocated(&memory);
    for mode in MODES {
        let populated = memory.populate(PopulateOptions::new(mode));
        assert_short(populated, TOO_MUCH - before);
        assert_eq!(allocated(&memory), before, "{mode:?}");
    }
}

fn in_the_background() {
    let memory = memory(RamOptions::new(), TOO_MUCH);
    for mode in MODES {
        let started = memory.populate_in_background(PopulateOptions::new(mode));
        assert_short(started, TOO_MUCH);
        assert_eq!(allocated(&memory), 0, "{mode:?}");
    }
}

fn try_anyway() {
    let memory = memory(RamOptions::new(), TOO_MUCH);
    let options = PopulateOptions::new(Populate::Allocate);
    let populated = memory.populate(options.with_on_shortage(OnShortage::TryAnyway));
    panic!("it was not ended: {populated:?}");
}

fn fit() {
    for mode in MODES {
        let fits = memory(RamOptions::new().with_populate(mode), LIMIT / 2);
        assert_eq!(allocated(&fits), LIMIT / 2);
        let part = memory(RamOptions::new(), TOO_MUCH);
        let range = crate::populate::range(0, LIMIT / 8);
        part.populate(PopulateOptions::new(mode).with_range(range))
            .unwrap();
        assert_eq!(allocated(&part), LIMIT / 8);
    }
}

fn there_already() {
    let size = LIMIT * 5 / 8;
    let memory = memory(RamOptions::new().with_populate(Populate::Allocate), size);
    for mode in MODES {
        memory.populate(PopulateOptions::new(mode)).unwrap();
        let handle = memory
            .populate_in_background(PopulateOptions::new(mode))
            .unwrap();
        assert_eq!(handle.wait().unwrap().bytes, size);
    }
}

/// The pages of a file on a disk fill the group, and are dropped.
fn beside_a_file() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("file");
    let mut file = fs::File::create(&path).unwrap();
    for _ in 0..LIMIT / MIB {
        file.write_all(&vec![1; MIB as usize]).unwrap();
    }
    file.sync_all().unwrap();
    // Read again, so that the pages are there, and are not as new as those that were written.
    let mut file = fs::File::open(&path).unwrap();
    assert_eq!(
        std::io::copy(&mut file, &mut std::io::sink()).unwrap(),
        LIMIT
    );
    fit();
}

fn another_takes_the_rest() {
    // More than half of the group, and the other takes nearly half.
    let size = 200 * MIB;
    for (count, mode) in [
        (1, Populate::Prefault),
        (2, Populate::Prefault),
        (2, Populate::Allocate),
    ] {
        for on_failure in [OnFailure::GiveBack, OnFailure::Keep] {
            let memory = memory(RamOptions::new(), size);
            let mut other = None;
            let mut done = 0;
            let options = PopulateOptions::new(mode)
                .with_threads(threads(count))
                .with_on_failure(on_failure)
                .with_progress(|progress| {
                    done = progress.done;
                    other.get_or_insert_with(start_the_other);
                    std::ops::ControlFlow::Continue(())
                });
            match memory.populate(options) {
                Err(Error::Populate(PopulateError::NotEnoughMemory { shortage, .. })) => {
                    assert!(shortage.needed > shortage.left, "{shortage}");
                    assert!(shortage.needed <= size, "{shortage}");
                }
                other => panic!("{other:?}"),
            }
            assert!(done > 0 && done < size, "{done}");
            let left = allocated(&memory);
            match on_failure {
                OnFailure::GiveBack => assert_eq!(left, 0),
                OnFailure::Keep => assert!(left >= done && left < size, "{left} {done}"),
            }
            // When the other is gone it can be had.
            drop(other);
            memory.populate(PopulateOptions::new(mode)).unwrap();
        }
    }
}

/// Another process in this group that takes memory, and has it when this returns.
fn start_the_other() -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let piped = as_scenario(&mut command, "the other")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut process = Process(piped.spawn().unwrap());
    let out = BufReader::new(process.0.stdout.take().unwrap());
    let has_it = out.lines().any(|line| line.unwrap().contains("has it"));
    assert!(has_it, "the other took the memory");
    process
}

fn the_other() {
    let taken = vec![1_u8; 100 * MIB as usize];
    println!("has it");
    // Until it is killed.
    let _ = std::io::stdin().read_line(&mut String::new());
    assert!(taken.iter().all(|byte| *byte == 1));
}

fn lazy() {
    let builder = GuestMemoryShm::<()>::builder();
    let (_, report) = builder
        .with_ram(RamOptions::new(), [(GuestAddress(0), TOO_MUCH)])
        .build_with_report()
        .unwrap();
    let text = report.to_string();
    assert!(text.contains("256 MiB of RAM are more than the "), "{text}");
    assert!(text.contains("control group's limit in "), "{text}");
    assert_eq!(report.lines().len(), 1, "{text}");
}
