//! A control group with a limit, and processes that are in it from their first instruction on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::Signal;

use crate::isolation::HugePool;
use crate::support::{host_changes, skip};

/// Names the scenario that a process is to play.
pub(super) const SCENARIO: &str = "GUEST_MEMORY_SHM_SCENARIO";

/// A control group with a limit on memory; it goes away with what is in it when it is dropped.
pub(super) struct Group {
    dir: PathBuf,
    limit_file: &'static str,
    /// Where the controller is to be switched off again.
    switched_on: Option<PathBuf>,
}

impl Group {
    /// A group that may have so many bytes, or none after printing why.
    pub(super) fn with_limit(bytes: u64) -> Option<Self> {
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
        Self::create(&root, &[(limit_file, bytes)], None)
    }

    /// A group of version 2 with these limits on huge pages, in bytes, or none after printing why.
    ///
    /// The controller is switched on for it: the test that does that holds the [pool](HugePool),
    /// which only one can.
    pub(super) fn of_huge_pages(_pool: &HugePool, limits: &[(&'static str, u64)]) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        let root = line.map(point).unwrap_or_default();
        let switch = root.join("cgroup.subtree_control");
        let is_on = fs::read_to_string(&switch).is_ok_and(|on| on.contains("hugetlb"));
        if !is_on && fs::write(&switch, "+hugetlb").is_err() {
            skip("control groups of version 2 do not limit huge pages here");
            return None;
        }
        Self::create(&root, limits, (!is_on).then_some(switch))
    }

    fn create(
        root: &Path,
        limits: &[(&'static str, u64)],
        switched_on: Option<PathBuf>,
    ) -> Option<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        remove_those_of_the_dead(root);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let this = Self {
            dir: root.join(format!("gms-test-{}-{count}", std::process::id())),
            limit_file: limits[0].0,
            switched_on,
        };
        if fs::create_dir(&this.dir).is_err() {
            skip("this process may not make control groups");
            return None;
        }
        for (file, bytes) in limits {
            this.set(file, *bytes);
        }
        Some(this)
    }

    /// Sets a limit, in bytes.
    pub(super) fn set(&self, file: &str, bytes: u64) {
        fs::write(self.dir.join(file), bytes.to_string()).unwrap();
    }

    /// The program in the group. Its shell moves itself, and becomes the program.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("sh");
        let script = r#"echo $$ >"$0/cgroup.procs" && exec "$@""#;
        command.arg("-c").arg(script).arg(&self.dir).arg(program);
        // The allocator and the tests themselves take little memory then, and always the same.
        command.env("RUST_BACKTRACE", "0");
        command
    }

    /// A process of its own in the group that plays a scenario.
    pub(super) fn play(&self, scenario: &str) -> Output {
        let mut command = self.command(&std::env::current_exe().unwrap());
        as_scenario(&mut command, scenario).output().unwrap()
    }

    /// Asserts that a scenario comes to its end.
    pub(super) fn plays(&self, scenario: &str) {
        let output = self.play(scenario);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(
            output.status.success() && out.contains("1 passed"),
            "{scenario}: {}\n{out}\n{err}",
            output.status
        );
    }

    pub(super) fn limit_path(&self) -> PathBuf {
        self.dir.join(self.limit_file)
    }
}

/// Where a line of mountinfo says that something is mounted.
fn point(line: &str) -> PathBuf {
    line.split(' ').nth(4).unwrap_or_default().into()
}

pub(super) fn as_scenario<'a>(command: &'a mut Command, scenario: &str) -> &'a mut Command {
    let test = [
        "--exact",
        "control_group::scenarios::scenario",
        "--nocapture",
    ];
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
            if pids.is_empty() && (fs::remove_dir(&self.dir).is_ok() || !self.dir.exists()) {
                if let Some(switch) = &self.switched_on {
                    let _ = fs::write(switch, "-hugetlb");
                }
                return;
            }
            std::thread::yield_now();
        }
        eprintln!("{} is left", self.dir.display());
    }
}
