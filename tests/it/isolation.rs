//! Tests that have something for themselves: a process, or a pool of huge pages.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;

use crate::support::{NO_HOST_CHANGES, host_changes, may_change_host, skip};

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
    let output = Command::new(std::env::current_exe().expect("procfs is mounted"))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(MARK, name)
        .output()
        .expect("this binary can be run");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    // The reason of a skip is for the one who runs the tests.
    for line in err.lines().filter(|line| line.starts_with("skipped: ")) {
        eprintln!("{line}");
    }
    if !output.status.success() {
        HugePool::restore_after_death();
        ShmemHuge::restore_after_death();
    }
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    // Without this a wrong name would pass: then no test is run at all.
    assert!(out.contains("1 passed"), "{name} was not run: {out}");
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

/// The base page size in bytes.
pub(crate) const PAGE: u64 = 4096;

/// A pool of huge pages that has as many to give as a test needs; it is put back on drop, also
/// when the test fails, and by whoever comes next when it dies.
///
/// One at a time on the whole machine: in this process, and among all that use this guard (a lock
/// on a file).
pub(crate) struct HugePool {
    page_size: u64,
    _lock: Flock<File>,
    _alone: MutexGuard<'static, ()>,
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
        if !may_change_host() {
            return Err(NO_HOST_CHANGES.to_owned());
        }
        if !geteuid().is_root() {
            return Err("only root may change the pools of huge pages".to_owned());
        }
        if !pool_dir(page_size).is_dir() {
            return Err(format!("the kernel has no huge pages of {page_size} bytes"));
        }
        let this = Self::lock(page_size);
        let in_use = this.number("nr_hugepages") - this.available();
        set_pool_total(page_size, in_use + pages);
        if this.available() != pages || this.number("nr_overcommit_hugepages") != 0 {
            return Err(format!(
                "{pages} huge pages of {page_size} bytes cannot be had"
            ));
        }
        Ok(this)
    }

    fn lock(page_size: u64) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        // A test that failed while it held it has been reported already.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let path = std::env::temp_dir().join("guest-memory-shm-hugepages.lock");
        let file = File::create(path).expect("the directory for temporary files can be written");
        let lock = Flock::lock(file, FlockArg::LockExclusive);
        let lock = lock.expect("a file can be locked");
        put_back();
        let total = pool_number(page_size, "nr_hugepages");
        fs::write(record(), format!("{page_size} {total}")).expect("the file can be written");
        Self {
            page_size,
            _lock: lock,
            _alone: alone,
        }
    }

    /// Puts back the pool that a process changed that died meanwhile.
    fn restore_after_death() {
        if geteuid().is_root() {
            drop(Self::lock(2 << 20));
        }
    }

    /// Unused pages.
    pub(crate) fn free(&self) -> u64 {
        self.number("free_hugepages")
    }

    /// Unused pages that are promised.
    pub(crate) fn reserved(&self) -> u64 {
        self.number("resv_hugepages")
    }

    fn available(&self) -> u64 {
        self.free() - self.reserved()
    }

    fn number(&self, name: &str) -> u64 {
        pool_number(self.page_size, name)
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        put_back();
    }
}

/// The file that says what is to be put back, also when the process that is to do it dies.
fn record() -> PathBuf {
    std::env::temp_dir().join("guest-memory-shm-hugepages.before")
}

/// Puts the pool back that the record names, if there is one.
fn put_back() {
    let Ok(text) = fs::read_to_string(record()) else {
        return;
    };
    if let Some((page_size, total)) = text.split_once(' ') {
        let page_size = page_size.parse().expect("it is a number");
        set_pool_total(page_size, total.parse().expect("it is a number"));
    }
    fs::remove_file(record()).expect("the file is ours");
}

/// The kernel gives as many pages as it can, and no error.
fn set_pool_total(page_size: u64, pages: u64) {
    let path = pool_dir(page_size).join("nr_hugepages");
    fs::write(path, pages.to_string()).expect("we are root");
}

fn pool_dir(page_size: u64) -> PathBuf {
    let kib = page_size / 1024;
    PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB"))
}

fn pool_number(page_size: u64, name: &str) -> u64 {
    let text = fs::read_to_string(pool_dir(page_size).join(name)).expect("sysfs is mounted");
    text.trim().parse().expect("it is a number")
}

/// Whether shared memory may have transparent huge pages, as a test needs it; the switch is put
/// back on drop, also when the test fails, and by whoever comes next when it dies.
///
/// One at a time on the whole machine, as [`HugePool`]; who needs both takes the pool first.
pub(crate) struct ShmemHuge {
    _lock: Flock<File>,
    _alone: MutexGuard<'static, ()>,
}

const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

impl ShmemHuge {
    /// Sets the switch, for example to `advise`, or prints why that is not possible.
    pub(crate) fn set(value: &str) -> Option<Self> {
        if !host_changes() {
            return None;
        }
        if !geteuid().is_root() {
            skip("only root may change whether shared memory has huge pages");
            return None;
        }
        if fs::read_to_string(SHMEM_ENABLED).is_err() {
            skip("the kernel has no transparent huge pages of shared memory");
            return None;
        }
        let this = Self::lock();
        fs::write(SHMEM_ENABLED, value).expect("we are root, and the kernel knows the value");
        Some(this)
    }

    fn lock() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        // A test that failed while it held it has been reported already.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let path = std::env::temp_dir().join("guest-memory-shm-shmem-huge.lock");
        let file = File::create(path).expect("the directory for temporary files can be written");
        let lock = Flock::lock(file, FlockArg::LockExclusive);
        let lock = lock.expect("a file can be locked");
        Self::put_back();
        fs::write(Self::record(), Self::now()).expect("the file can be written");
        Self {
            _lock: lock,
            _alone: alone,
        }
    }

    /// Puts back the switch that a process changed that died meanwhile.
    fn restore_after_death() {
        if geteuid().is_root() && Self::record().exists() {
            drop(Self::lock());
        }
    }

    /// What is chosen of `always within_size advise [never] deny force`.
    pub(crate) fn now() -> String {
        let text = fs::read_to_string(SHMEM_ENABLED).expect("sysfs is mounted");
        let chosen = text.split(['[', ']']).nth(1);
        chosen.expect("one is chosen").to_owned()
    }

    /// The file that says what is to be put back, also when the process that is to do it dies.
    fn record() -> PathBuf {
        std::env::temp_dir().join("guest-memory-shm-shmem-huge.before")
    }

    fn put_back() {
        if let Ok(before) = fs::read_to_string(Self::record()) {
            fs::write(SHMEM_ENABLED, before).expect("we are root");
            fs::remove_file(Self::record()).expect("the file is ours");
        }
    }
}

impl Drop for ShmemHuge {
    fn drop(&mut self) {
        Self::put_back();
    }
}

#[test]
fn the_switch_for_huge_shared_memory_is_put_back() {
    in_own_process(|| {
        let Some(switch) = ShmemHuge::set("advise") else {
            return;
        };
        let before = fs::read_to_string(ShmemHuge::record()).unwrap();
        assert_eq!(ShmemHuge::now(), "advise");
        drop(switch);
        // Another process may have the switch by now, but then it wrote down what we put back.
        let after = fs::read_to_string(ShmemHuge::record()).unwrap_or_else(|_| ShmemHuge::now());
        assert_eq!(after, before);
    });
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
