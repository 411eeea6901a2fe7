//! Tests that have something for themselves: a process, or a pool of huge pages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;
use tempfile::TempDir;

use crate::fork::inherits_no_descriptor;
use crate::host_setting::{HostSetting, chosen_of};
use crate::support::{host_changes, skip};

/// Runs a test in a process of its own: this binary once more, with nothing but that test.
///
/// For tests that count what the process has, or change what belongs to all of it: limits, the
/// mount namespace. To be called from the test itself, with all of it as the closure: the name of
/// the closure's type says which test it is.
pub(crate) fn in_own_process<F: FnOnce()>(test: F) {
    const MARK: &str = "GUEST_MEMORY_SHM_OWN_PROCESS";
    let path = std::any::type_name::<F>();
    let name = path
        .split_once("::")
        .and_then(|(_, name)| name.strip_suffix("::{{closure}}"))
        .expect("the closure is written in a test");
    if std::env::var_os(MARK).is_some() {
        return test();
    }
    // What it leaves there, should it die, goes with this.
    let place = TempDir::with_prefix("gms-own-").expect("there is room for a directory");
    let mut command = Command::new(std::env::current_exe().expect("procfs is mounted"));
    command
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(MARK, name)
        .env("TMPDIR", place.path())
        // A heap of its own for each thread is address space set aside, which shrinks as it grows.
        .env("MALLOC_ARENA_MAX", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    inherits_no_descriptor(&mut command);
    let child = command.spawn().expect("this binary can be run");
    let pid = child.id();
    let output = child.wait_with_output().expect("it is our child");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    // The reason of a skip is for the one who runs the tests.
    for line in err.lines().filter(|line| line.starts_with("skipped: ")) {
        eprintln!("{line}");
    }
    if !output.status.success() {
        remove_names_of(pid);
    }
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    // Without this a wrong name would pass: then no test is run at all.
    assert!(out.contains("1 passed"), "{name} was not run: {out}");
}

/// A directory in /dev/shm, removed when it is dropped, and when this process is one of a test's
/// own ([`in_own_process`]) and dies.
pub(crate) fn shm_dir() -> TempDir {
    let prefix = format!("gms-{}-dir-", std::process::id());
    TempDir::with_prefix_in(prefix, SHM).expect("there is room for a directory")
}

/// Removes what a process that failed has left in /dev/shm.
pub(crate) fn remove_names_of(pid: u32) {
    let prefix = format!("gms-{pid}-");
    for entry in fs::read_dir(SHM).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            let path = entry.path();
            let removed = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
            eprintln!("{} was left: {removed:?}", path.display());
        }
    }
}

/// Gives this process its own mounts, to change those of /dev/shm, or prints why it cannot.
pub(crate) fn own_mounts() -> bool {
    if !geteuid().is_root() || unshare(CloneFlags::CLONE_NEWNS).is_err() {
        skip("this process may not have its own mounts");
        return false;
    }
    // Nothing of what follows reaches the other mount namespaces.
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("the root is a mount");
    true
}

/// Mounts a tmpfs with these options, as `size=8m`.
pub(crate) fn mount_tmpfs(at: &str, flags: MsFlags, data: &str) {
    mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(data)).expect("mounted");
}

const SHM: &str = "/dev/shm";

/// The base page size in bytes.
pub(crate) const PAGE: u64 = 4096;

/// A pool of huge pages that has as many to give as a test needs; put back however the test ends.
///
/// One at a time on the whole machine, see [`HostSetting`].
pub(crate) struct HugePool {
    page_size: u64,
    /// What it was made to have.
    total: u64,
    available: u64,
    setting: HostSetting,
}

impl HugePool {
    /// Sets the pool of `page_size` bytes so that exactly `pages` can be had, or prints why that
    /// is not possible.
    pub(crate) fn with_available(page_size: u64, pages: u64) -> Option<Self> {
        let pool = Self::try_with_available(page_size, pages);
        pool.inspect_err(|reason| skip(reason)).ok()
    }

    /// As [`with_available`](Self::with_available), but without a word on failure.
    pub(crate) fn try_with_available(page_size: u64, pages: u64) -> Result<Self, String> {
        let path = pool_dir(page_size).join("nr_hugepages");
        let mut this = Self {
            page_size,
            total: 0,
            available: pages,
            setting: HostSetting::take(&path, str::trim)?,
        };
        let overcommit = this.number("nr_overcommit_hugepages");
        if overcommit != 0 {
            return Err(format!(
                "nr_overcommit_hugepages is {overcommit}: pools have more than they say"
            ));
        }
        // Another program may take some in between.
        for _ in 0..3 {
            let in_use = this.number("nr_hugepages") - this.now_available();
            this.total = in_use + pages;
            this.setting.set(&this.total.to_string());
            if this.now_available() == pages {
                return Ok(this);
            }
        }
        let available = this.now_available();
        Err(format!(
            "{pages} huge pages of {page_size} bytes cannot be had, but {available}"
        ))
    }

    /// Unused pages.
    pub(crate) fn free(&self) -> u64 {
        self.number("free_hugepages")
    }

    /// Unused pages that are promised.
    pub(crate) fn reserved(&self) -> u64 {
        self.number("resv_hugepages")
    }

    fn now_available(&self) -> u64 {
        self.free().saturating_sub(self.reserved())
    }

    fn number(&self, name: &str) -> u64 {
        let file = pool_dir(self.page_size).join(name);
        let text = fs::read_to_string(file).expect("sysfs is mounted");
        text.trim().parse().expect("it is a number")
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        // What the test had is dropped by now: it was declared later.
        let now = (self.number("nr_hugepages"), self.now_available());
        if std::thread::panicking() && now != (self.total, self.available) {
            eprintln!(
                "the pool of huge pages was disturbed, by another program or by what this test \
                 left: it has {} pages of which {} can be had, and had {} and {}",
                now.0, now.1, self.total, self.available
            );
        }
    }
}

fn pool_dir(page_size: u64) -> PathBuf {
    let kib = page_size / 1024;
    PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB"))
}

/// Whether shared memory may have transparent huge pages, as a test needs it; put back however the
/// test ends.
///
/// One at a time on the whole machine, as [`HugePool`]; who needs both takes the pool first.
pub(crate) struct ShmemHuge {
    _setting: HostSetting,
}

impl ShmemHuge {
    /// Sets the switch, for example to `advise`, or prints why that is not possible.
    pub(crate) fn set(value: &str) -> Option<Self> {
        if !host_changes() {
            return None;
        }
        let path = Path::new("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
        match HostSetting::take(path, chosen_of) {
            Ok(setting) => {
                setting.set(value);
                Some(Self { _setting: setting })
            }
            Err(reason) => {
                skip(&reason);
                None
            }
        }
    }
}

/// Asserts that a result is an error of a variant, with exactly this text.
macro_rules! assert_refused {
    ($result:expr, $variant:pat, $text:expr $(,)?) => {
        match $result {
            Err(error) => {
                assert!(matches!(error, $variant), "{error:?}");
                assert_eq!(error.to_string(), $text);
            }
            Ok(accepted) => panic!("accepted: {accepted:?}"),
        }
    };
}
pub(crate) use assert_refused;

/// Runs `scenario` in a process of its own, and asserts that it leaves nothing.
///
/// It runs twice: what the first call makes for good, in libraries, is not counted.
macro_rules! in_own_process_leaving_nothing {
    ($scenario:expr) => {
        $crate::isolation::in_own_process(|| {
            $scenario();
            $crate::proc::leaves_nothing($scenario);
        })
    };
}
pub(crate) use in_own_process_leaving_nothing;
