//! Cases: which call of an operation fails how; and what has to hold after each.

use std::collections::HashSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::call::Call;
use super::filter;
use super::known::KNOWN;
use super::stage::{Fault, Missing, Stage, When};
use crate::proc::{Holdings, MapsLine, maps, shm_names, thread_count};
use crate::watchdog::Watchdog;

/// How long what ends by itself may take to end: a thread that was joined, a daemon's descriptors.
const PATIENCE: Duration = Duration::from_secs(10);

/// How many equal calls at either end fail, if there are many.
const ENDS: usize = 20;

/// Something that the crate does, by many system calls.
pub(super) struct Operation {
    pub(super) name: &'static str,
    pub(super) run: fn(&Stage) -> Outcome,
    pub(super) missing: Missing,
    /// Whether it is others' calls that fail, which may not try again after a signal.
    of_others: bool,
    /// Whether vhost sends and receives, which tries again for as long as there is no memory.
    by_vhost: bool,
}

impl Operation {
    pub(super) const fn new(name: &'static str, run: fn(&Stage) -> Outcome) -> Self {
        Self {
            name,
            run,
            missing: &[],
            of_others: false,
            by_vhost: false,
        }
    }

    /// Of which the calls of other programs fail.
    pub(super) const fn of_others(self) -> Self {
        Self {
            of_others: true,
            ..self
        }
        .by_vhost()
    }

    /// Of which vhost sends and receives.
    pub(super) const fn by_vhost(self) -> Self {
        Self {
            by_vhost: true,
            ..self
        }
    }

    /// On a kernel that does not know some calls.
    pub(super) const fn without(self, missing: Missing) -> Self {
        Self { missing, ..self }
    }
}

/// What came of an operation, looked at already.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It was done, in truth.
    Done,
    /// It gave an error, and everything is as it was before.
    Refused(String),
}

/// One call of one operation that fails.
struct Case<'a> {
    operation: &'a Operation,
    fault: Fault,
}

impl fmt::Display for Case<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fault { call, when, errno } = self.fault;
        let (number, more) = match when {
            When::Only(number) => (number, ""),
            When::From(number) => (number, "+"),
        };
        let name = self.operation.name;
        write!(f, "{name}: {call} #{number}{more} {errno:?}")
    }
}

/// What the process has that no operation may leave, or panic about.
#[derive(Debug, PartialEq, Eq)]
struct State {
    holdings: Option<Holdings>,
    threads: usize,
    panics: usize,
}

static PANICS: AtomicUsize = AtomicUsize::new(0);

impl State {
    /// All of it, or only what runs.
    fn now(holdings: bool) -> Self {
        Self {
            holdings: holdings.then(Holdings::beside_threads),
            threads: thread_count(),
            panics: PANICS.load(Ordering::SeqCst),
        }
    }

    /// What is different from `before`, once what ends by itself has ended.
    fn left_since(before: &Self, patience: Duration) -> Option<Self> {
        let deadline = Instant::now() + patience;
        loop {
            let now = Self::now(before.holdings.is_some());
            if now == *before {
                return None;
            }
            if Instant::now() >= deadline || now.panics != before.panics {
                return Some(now);
            }
            std::thread::yield_now();
        }
    }
}

/// Plays the cases of all operations, in a process of its own, and asserts that each has a good
/// end.
pub(super) fn play(operations: &[Operation]) {
    let Some(failures) = failures_of(operations, PATIENCE) else {
        return;
    };
    let count = failures.len();
    assert!(count == 0, "{count} failed:\n{}", failures.join("\n"));
}

/// Plays the cases of all operations; gives those that have no good end, and what is wrong. `None`
/// where system calls cannot be made to fail.
pub(super) fn failures_of(operations: &[Operation], patience: Duration) -> Option<Vec<String>> {
    if let Err(errno) = filter::can_install() {
        crate::support::skip(&format!("no system call can be made to fail: {errno}"));
        return None;
    }
    filter::calm_the_allocator();
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        default(panic);
    }));
    let watchdog = Watchdog::start();
    let mut cases = Vec::new();
    for operation in operations {
        watchdog.expect(operation.name);
        // What is made once in a process stays.
        for _ in 0..2 {
            succeeds(operation, patience)
                .unwrap_or_else(|failure| panic!("{}: {failure}", operation.name));
        }
        cases.extend(cases_of(operation));
    }
    let total = cases.len();
    let (seed, cases) = chosen(cases);
    eprintln!("FAULTS_SEED={seed}: {} cases of {total}", cases.len());

    let (mut failures, mut fired) = (Vec::new(), 0);
    let start = Instant::now();
    for case in &cases {
        watchdog.expect(&format!("FAULTS='{case}'"));
        match attack(case, patience) {
            Ok(has_fired) => fired += usize::from(has_fired),
            Err(failure) => {
                let failure = format!("FAULTS='{case}': {failure}");
                eprintln!("failed: {failure}");
                failures.push(failure);
            }
        }
    }
    watchdog.end();
    let (played, time) = (cases.len() - failures.len(), start.elapsed());
    eprintln!("{fired} of {played} faults happened, in {time:?}");
    // Threads race, and the stack of one is kept for another: not each call comes each time.
    assert!(fired * 2 >= played, "too few faults happened");
    Some(failures)
}

/// Plays a case. Says whether the fault happened, or what is wrong.
fn attack(case: &Case<'_>, patience: Duration) -> Result<bool, String> {
    let before = State::now(true);
    let mappings = maps();
    let stage = Stage::attacking(case.fault, case.operation.missing);
    let played = catch_unwind(AssertUnwindSafe(|| {
        let outcome = (case.operation.run)(&stage);
        let fired = stage.has_fired();
        stage.end();
        (outcome, fired)
    }));
    let played = played.map_err(|panic| text_of(panic.as_ref()));
    if case.fault.call.gives_back() {
        sweep(&mappings);
    }
    let left = State::left_since(&before, patience);
    let (outcome, fired) = played?;
    if let Some(left) = left {
        return Err(format!(
            "{outcome:?}, and left: {left:#?}\nbefore: {before:#?}"
        ));
    }
    if let Outcome::Refused(error) = &outcome
        && !fired
    {
        return Err(format!("nothing failed, but it was refused: {error}"));
    }
    if let (Outcome::Refused(error), Errno::EINTR) = (&outcome, case.fault.errno)
        && !case.operation.of_others
    {
        return Err(format!("a signal is no failure: {error}"));
    }
    succeeds(case.operation, patience).map_err(|failure| format!("the next: {failure}"))?;
    Ok(fired)
}

/// Gives back, in the place of a call that failed to, what has come since `before`.
fn sweep(before: &[MapsLine]) {
    for line in maps() {
        let is_reservation = line.permissions == "---p" && line.path.is_empty();
        let is_ram = ["/memfd:", "/dev/shm", "/anon_hugepage", "/tmp"]
            .iter()
            .any(|path| line.path.starts_with(path));
        if (is_reservation || is_ram) && !before.contains(&line) {
            filter::unmap(line.range);
        }
    }
    for name in shm_names() {
        std::fs::remove_file(Path::new("/dev/shm").join(name)).unwrap();
    }
}

/// Runs an operation without a fault.
fn succeeds(operation: &Operation, patience: Duration) -> Result<(), String> {
    let before = State::now(false);
    let stage = Stage::calm();
    let done = catch_unwind(AssertUnwindSafe(|| (operation.run)(&stage)));
    match done.map_err(|panic| text_of(panic.as_ref()))? {
        Outcome::Done => {}
        Outcome::Refused(error) => return Err(format!("it was refused: {error}")),
    }
    match State::left_since(&before, patience) {
        // The first in a process makes what stays.
        Some(left) if left.panics != before.panics => Err("something panicked".to_owned()),
        _ => Ok(()),
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("without a text"))
}

/// Each call of an operation, failing by each error.
fn cases_of(operation: &Operation) -> Vec<Case<'_>> {
    let stage = Stage::counting(operation.missing);
    let outcome = (operation.run)(&stage);
    assert!(matches!(outcome, Outcome::Done), "{}", operation.name);
    let calls = stage.end();
    let mut cases = Vec::new();
    let distinct: HashSet<Call> = calls.iter().copied().collect();
    let mut distinct: Vec<Call> = distinct.into_iter().collect();
    distinct.retain(|call| !call.is_exempt());
    distinct.sort();
    for call in distinct {
        let count = calls.iter().filter(|other| **other == call).count();
        for errno in call.errors() {
            let mut add = |when| {
                let errno: Errno = *errno;
                let fault = Fault { call, when, errno };
                cases.push(Case { operation, fault });
            };
            for number in numbers(count) {
                add(When::Only(number));
            }
            let tries = operation.by_vhost && call.is_tried_again_by_vhost(*errno);
            if call.may_last(*errno) && !tries {
                add(When::From(1));
            }
        }
    }
    cases
}

/// Which of so many equal calls fail: all of a few; of many, those at both ends.
fn numbers(count: usize) -> impl Iterator<Item = usize> {
    (1..=count).filter(move |number| *number <= ENDS || *number + ENDS > count)
}

/// The cases that are to be played: all with `FAULTS=all`, those that contain a text with
/// `FAULTS=text`, otherwise a sample that has each call of each operation, each error of each
/// call, and each call that fails for good. The sample is made by a seed, which is given back.
fn chosen(mut cases: Vec<Case<'_>>) -> (u64, Vec<Case<'_>>) {
    let seed = std::env::var("FAULTS_SEED").map(|seed| seed.parse().expect("a number"));
    let seed = seed.unwrap_or_else(|_| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        u64::from(now.expect("it is after 1970").subsec_nanos())
    });
    let with_known = std::env::var_os("FAULTS_KNOWN").is_some();
    cases.retain(|case| {
        let text = case.to_string();
        with_known || !KNOWN.iter().any(|(known, _)| is_like(&text, known))
    });
    match std::env::var("FAULTS") {
        Ok(text) if text == "all" => return (seed, cases),
        Ok(text) => {
            cases.retain(|case| case.to_string().contains(&text));
            return (seed, cases);
        }
        Err(_) => {}
    }
    shuffle(&mut cases, seed);
    let mut known = HashSet::new();
    cases.retain(|case| {
        let Fault { call, when, errno } = case.fault;
        let lasts = matches!(when, When::From(_));
        let name = case.operation.name;
        let new = known.insert((Some(name), call, None, lasts));
        let new_error = known.insert((None, call, Some(errno as i32), lasts));
        new || new_error
    });
    (seed, cases)
}

/// Whether a case is one of those that `pattern` describes: parts of it, in their order, with `*`
/// between them.
fn is_like(text: &str, pattern: &str) -> bool {
    let mut rest = text;
    pattern.split('*').all(|part| match rest.find(part) {
        Some(at) => {
            rest = &rest[at + part.len()..];
            true
        }
        None => false,
    })
}

fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut state = seed;
    for at in (1..items.len()).rev() {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let random = mixed ^ (mixed >> 31);
        items.swap(at, (random % (at as u64 + 1)) as usize);
    }
}

/// Asserts that an error has something to say, and so has everything that led to it.
pub(super) fn says_something(error: &dyn std::error::Error) -> Outcome {
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        assert!(text.trim().len() > 8 && text.contains(' '), "{text:?}");
        next = error.source();
    }
    Outcome::Refused(error.to_string())
}
