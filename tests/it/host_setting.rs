//! Settings of this machine that a test changes: a file of sysfs, put back however the test ends.
//!
//! Only with `HOST_CHANGES=1`, see [`crate::support::host_changes`].

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use crate::support::{NO_HOST_CHANGES, Process, may_change_host, skip};

/// A file of sysfs that this test alone may write, until it is dropped.
///
/// One at a time on the whole machine: the file itself is locked, so that other checkouts and
/// other users' tests wait as well. A process of its own holds the lock, too, and puts the setting
/// back when this end of its pipe is closed, which the kernel does when a test is killed.
pub(crate) struct HostSetting {
    path: PathBuf,
    before: String,
    keeper: Child,
    _lock: Flock<File>,
}

impl HostSetting {
    /// Waits until no other test has the setting; says why if it is not to be had.
    ///
    /// `chosen` finds the value in the text of the file.
    pub(crate) fn take(path: &Path, chosen: fn(&str) -> &str) -> Result<Self, String> {
        if !may_change_host() {
            return Err(NO_HOST_CHANGES.to_owned());
        }
        if !geteuid().is_root() {
            return Err(format!("only root may change {}", path.display()));
        }
        let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).expect("a file can be locked");
        let before = chosen(&fs::read_to_string(path).expect("it can be read")).to_owned();
        let setting = File::options().write(true).open(path);
        let setting = setting.map_err(|error| format!("{}: {error}", path.display()))?;
        // Signals of the terminal reach all of the group that has it: this is not in it. What it
        // has as its standard error is the lock, of which it is a second owner.
        let keeper = Command::new("sh")
            .args(["-c", "trap '' INT TERM HUP; read -r _; printf %s \"$0\""])
            .arg(&before)
            .stdin(Stdio::piped())
            .stdout(setting)
            .stderr(lock.try_clone().expect("there are descriptors"))
            .process_group(0)
            .spawn()
            .expect("there is a shell");
        Ok(Self {
            path: path.to_owned(),
            before,
            keeper,
            _lock: lock,
        })
    }

    /// Changes it. The kernel may do less than that, without an error.
    pub(crate) fn set(&self, value: &str) {
        let mut file = File::options().write(true).open(&self.path).expect("there");
        file.write_all(value.as_bytes())
            .unwrap_or_else(|error| panic!("{}: {value:?}: {error}", self.path.display()));
    }
}

/// What is chosen of `always within_size advise [never] deny force`.
pub(crate) fn chosen_of(switch: &str) -> &str {
    switch.split(['[', ']']).nth(1).expect("one is chosen")
}

impl Drop for HostSetting {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let put_back = self.keeper.wait().is_ok_and(|status| status.success());
        if !put_back {
            self.set(&self.before);
        }
    }
}

const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The switch, taken and changed to something else, and what it was; or `None` after the reason.
fn changed() -> Option<(HostSetting, String)> {
    let setting = HostSetting::take(Path::new(SWITCH), chosen_of);
    let setting = setting.inspect_err(|reason| skip(reason)).ok()?;
    let before = setting.before.clone();
    let other = ["never", "advise"].into_iter().find(|it| *it != before);
    setting.set(other.expect("there are two"));
    assert_ne!(now(), before);
    Some((setting, before))
}

fn now() -> String {
    chosen_of(&fs::read_to_string(SWITCH).unwrap()).to_owned()
}

/// What the switch is when no test has it.
fn untouched() -> String {
    let setting = HostSetting::take(Path::new(SWITCH), chosen_of);
    setting
        .unwrap_or_else(|reason| panic!("{reason}"))
        .before
        .clone()
}

#[test]
fn a_setting_is_put_back_when_it_is_dropped_and_when_a_test_fails() {
    let Some((setting, before)) = changed() else {
        return;
    };
    drop(setting);
    assert_eq!(untouched(), before);
    let failed = std::panic::catch_unwind(|| {
        let _setting = changed();
        // No message of it among those of the tests.
        std::panic::resume_unwind(Box::new("on purpose"));
    });
    assert!(failed.is_err());
    assert_eq!(untouched(), before);
}

#[test]
fn a_setting_is_put_back_when_the_test_is_killed() {
    const MARK: &str = "GUEST_MEMORY_SHM_IS_KILLED";
    if std::env::var_os(MARK).is_some() {
        let _setting = changed();
        println!("changed");
        loop {
            std::thread::park();
        }
    }
    let Some((setting, before)) = changed() else {
        return;
    };
    drop(setting);
    let name = "host_setting::a_setting_is_put_back_when_the_test_is_killed";
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(MARK, "")
        .stdout(Stdio::piped())
        .spawn();
    let mut child = Process(child.unwrap());
    let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    assert!(
        lines
            .map_while(Result::ok)
            .any(|line| line.contains("changed"))
    );
    assert_ne!(now(), before);
    child.kill();
    assert_eq!(untouched(), before);
}
