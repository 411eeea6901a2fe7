//! The real QEMU and this crate accept and refuse the same strings, with a few exceptions.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use guest_memory_shm::{Access, Error, GuestRegionShm, GuestRom, RamOptions};
use vm_memory::GuestAddress;

use crate::isolation::HugePool;
use crate::support::{peer, skip};

mod strings;

const HUGE: u64 = 2 << 20;

/// Whether we take a string for what it says: read it and build it. Or why not.
fn accepted_by_us(text: &str) -> Result<(), String> {
    let build = |options: RamOptions| {
        let size = options.size().expect("a string has a size");
        match options.access() {
            Access::ReadOnly => GuestRom::new((GuestAddress(0), size), &options).map(drop),
            _ => GuestRegionShm::<()>::new((GuestAddress(0), size), &options).map(drop),
        }
        .map_err(Error::from)
    };
    text.parse()
        .map_err(Error::from)
        .and_then(build)
        .map_err(|error| error.to_string())
}

/// Where we do not do as QEMU does.
struct Exception {
    reason: &'static str,
    holds: fn(text: &str, ours: &Result<(), String>) -> bool,
}

/// Strings that QEMU accepts and we refuse, told by the text of the refusal.
const ONLY_QEMU: &[Exception] = &[
    Exception {
        reason: "RAM that cannot be shared cannot be expressed",
        holds: |_, ours| refused_with(ours, "share=off"),
    },
    Exception {
        reason: "and so its backend of private RAM is none of ours",
        holds: |_, ours| refused_with(ours, "qom-type=memory-backend-ram: "),
    },
    Exception {
        reason: "QEMU warns that persistence is not guaranteed and goes on",
        holds: |_, ours| refused_with(ours, "pmem=on is not supported: "),
    },
    Exception {
        reason: "touching what /dev/shm cannot hold is SIGBUS in QEMU",
        holds: |_, ours| {
            let short = " the file system of /dev/shm holds ";
            ours.as_ref().is_err_and(|refusal| refusal.contains(short))
        },
    },
    Exception {
        reason: "QEMU takes odd sizes of huge pages for powers of two",
        holds: |_, ours| refused_with(ours, "hugetlbsize=3.9 KiB (4095 bytes): "),
    },
    Exception {
        reason: "QEMU silently discards nothing of what is read-only",
        holds: |_, ours| refused_with(ours, "discard-data=on and readonly=on contradict "),
    },
    Exception {
        reason: "JSON is not read",
        holds: |text, _| text.starts_with('{'),
    },
    Exception {
        reason: "a list of properties is no backend",
        holds: |_, ours| refused_with(ours, "\"help\" is no property of "),
    },
];

/// Strings that we accept and QEMU refuses.
const ONLY_WE: &[Exception] = &[
    Exception {
        reason: "a name is optional",
        holds: |text, _| !text.contains("id=") && !text.contains("id,"),
    },
    Exception {
        reason: "thp is ours",
        holds: |text, _| {
            text.split(',')
                .any(|part| part.trim_start_matches("no").starts_with("thp"))
        },
    },
    Exception {
        reason: "populate is ours",
        holds: |text, _| text.contains(",populate="),
    },
    Exception {
        reason: "on-shortage is ours",
        holds: |text, _| text.contains(",on-shortage="),
    },
];

fn refused_with(ours: &Result<(), String>, start: &str) -> bool {
    matches!(ours, Err(refusal) if refusal.starts_with(start))
}

/// What QEMU makes of a string: nothing if it starts with it, else its complaint.
fn accepted_by_qemu(program: &Path, dir: &Path, text: &str) -> Result<(), String> {
    let mut child = Command::new(program)
        .args(["-machine", "none", "-nodefaults", "-display", "none"])
        .args(["-monitor", "stdio", "-object", text])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have refused and left before it reads.
    let _ = child.stdin.take().unwrap().write_all(b"quit\n");
    let output = child.wait_with_output().unwrap();
    match output.status.success() {
        true => Ok(()),
        // Killed by a signal, as it is by some strings, is not accepted either.
        false => Err(format!(
            "{}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}

/// Makes the directory what [`strings`] says, whatever the last string left there.
fn prepare(dir: &Path) {
    if dir.exists() {
        fs::remove_dir_all(dir).unwrap();
    }
    fs::create_dir_all(dir.join("sub")).unwrap();
    for (name, len) in [("ram", 1 << 20), ("short", 8 << 10), ("empty", 0)] {
        let file = File::create(dir.join(name)).unwrap();
        file.set_len(len).unwrap();
    }
}

/// What came out of comparing.
#[derive(Default)]
struct Outcome {
    compared: usize,
    accepted: usize,
    /// Which exceptions held, by their reasons.
    exceptions: Vec<&'static str>,
    differences: Vec<String>,
}

impl Outcome {
    fn add(&mut self, text: &str, qemu: Result<(), String>, ours: Result<(), String>) {
        self.compared += 1;
        let exceptions = match (&qemu, &ours) {
            (Ok(()), Ok(())) => {
                self.accepted += 1;
                return;
            }
            (Err(_), Err(_)) => return,
            (Ok(()), Err(_)) => ONLY_QEMU,
            (Err(_), Ok(())) => ONLY_WE,
        };
        if let Some(found) = exceptions.iter().find(|it| (it.holds)(text, &ours)) {
            self.exceptions.push(found.reason);
        } else {
            let difference = format!("{text}\n  QEMU: {qemu:?}\n  we:   {ours:?}");
            self.differences.push(difference);
        }
    }

    fn join(mut self, other: Self) -> Self {
        self.compared += other.compared;
        self.accepted += other.accepted;
        self.exceptions.extend(other.exceptions);
        self.differences.extend(other.differences);
        self
    }

    /// Prints what was compared, and fails if there was a difference without a reason.
    fn report(&self, what: &str) {
        println!(
            "{what}: {} strings compared, {} accepted by both, {} exceptions",
            self.compared,
            self.accepted,
            self.exceptions.len()
        );
        assert!(
            self.differences.is_empty(),
            "{} differences:\n{}",
            self.differences.len(),
            self.differences.join("\n")
        );
    }
}

/// Gives each string to QEMU and to us, two at a time.
fn compare(program: &Path, strings: &[String]) -> Outcome {
    let next = AtomicUsize::new(0);
    let work = || {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("d");
        let mut outcome = Outcome::default();
        while let Some(text) = strings.get(next.fetch_add(1, Ordering::Relaxed)) {
            let text = text.replace("DIR", dir.to_str().unwrap());
            prepare(&dir);
            let qemu = accepted_by_qemu(program, &dir, &text);
            prepare(&dir);
            outcome.add(&text, qemu, accepted_by_us(&text));
        }
        outcome
    };
    thread::scope(|scope| {
        let other = scope.spawn(work);
        let outcome = work();
        outcome.join(other.join().unwrap())
    })
}

/// A QEMU that has all our backends.
fn qemu() -> Option<PathBuf> {
    let program = peer("qemu-system-x86_64")?;
    let shm = "memory-backend-shm,id=m,size=1M";
    match accepted_by_qemu(&program, &std::env::temp_dir(), shm) {
        Ok(()) => Some(program),
        Err(refusal) => {
            skip(&format!("QEMU 9.1 or newer is needed: {refusal}"));
            None
        }
    }
}

#[test]
fn strings_are_accepted_and_refused_as_by_qemu() {
    let Some(program) = qemu() else {
        return;
    };
    let mut strings = strings::all();
    strings.retain(|text| !strings::is_about_a_pool(text));
    let outcome = compare(&program, &strings);
    outcome.report("options");
    // A comparison in which nothing is accepted, or nothing refused, would pass for nothing.
    assert!(outcome.accepted > 300, "{}", outcome.accepted);
    assert!(outcome.compared - outcome.accepted > 300);
    for exception in ONLY_QEMU.iter().chain(ONLY_WE) {
        let is_needed = outcome.exceptions.contains(&exception.reason);
        assert!(is_needed, "not an exception: {}", exception.reason);
    }
}

#[test]
fn strings_about_huge_pages_are_accepted_and_refused_as_by_qemu() {
    let Some(program) = qemu() else {
        return;
    };
    if let Some(_empty) = HugePool::with_available(HUGE, 0) {
        let mut strings = strings::all();
        strings.retain(|text| strings::is_about_a_pool(text));
        compare(&program, &strings).report("huge pages, empty pool");
    }
    if let Some(_two_pages) = HugePool::with_available(HUGE, 2) {
        // One after the other, because both would take the same pages.
        let mut outcome = Outcome::default();
        for text in strings::TWO_HUGE_PAGES {
            outcome = outcome.join(compare(&program, &[text.to_owned()]));
        }
        outcome.report("huge pages, two in the pool");
        assert_eq!(outcome.accepted, 5);
    }
}
