//! The table of docs/porting.md of the system calls that each operation makes: under a filter
//! that allows these and a base set, each operation works; without any one of them the process
//! dies.
//!
//! Each case is a child of a process with one thread, and has nothing cached but what making what
//! it works on leaves. The daemons are threads that were there before the filter, which is for
//! those that it is installed in and that they start. The calls are those of glibc on x86_64.

use std::collections::BTreeMap;
use std::fs;

use nix::libc::{SYS_clone, SYS_clone3, SYS_fork, SYS_vfork, c_long};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, socket};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

use crate::fork::dies_of;
use crate::isolation::in_own_process;
use crate::seccomp::filter;
use crate::support::top;
use operations::Work;
use table::{Argument, BASE, Call, Row, TABLE};

/// Above the table in the docs.
const HEAD: &str = "| for | always | where it is needed |";

/// The filter of the example `share`.
#[path = "../../../examples/share/sandbox.rs"]
mod example;
mod operations;
mod table;

impl Row {
    /// Its calls, each once, by name.
    fn all(&self) -> Vec<Call> {
        let all = self.calls.iter().copied().flatten();
        let by_name: BTreeMap<_, _> = all.map(|call| (call.shown(), *call)).collect();
        by_name.into_values().collect()
    }

    /// What processes die of that do this with `calls` and the base set, by case, if they die.
    fn killers(&self, calls: &[Call]) -> Vec<Option<Signal>> {
        self.killers_under(&only(calls.iter().chain(self.sometimes).chain(BASE)))
    }

    fn killers_under(&self, program: &BpfProgram) -> Vec<Option<Signal>> {
        // The child may do anything: there is no other thread that could hold a lock.
        let killer = |prepare: &fn() -> Work| {
            dies_of(|| {
                let work = prepare();
                apply_filter(program).unwrap();
                // To drop it is another operation.
                std::mem::forget(work());
            })
        };
        self.cases.iter().map(killer).collect()
    }

    fn shown(&self) -> String {
        let [always, sometimes] = [&self.all()[..], self.sometimes].map(|calls| {
            let calls: Vec<_> = calls.iter().map(Call::shown).collect();
            calls.join(", ")
        });
        let row = format!("| {} | {always} | {sometimes} |", self.operation);
        row.replace("|  |", "| |").replace("|  |", "| |")
    }
}

impl Call {
    fn shown(&self) -> String {
        match self.argument {
            None => format!("`{}`", self.name),
            Some(Argument { name, .. }) => format!("`{}` ({name})", self.name),
        }
    }
}

/// A filter that kills the process at anything else.
fn only<'a>(calls: impl Iterator<Item = &'a Call>) -> BpfProgram {
    let mut rules: BTreeMap<_, Vec<SeccompRule>> = BTreeMap::new();
    for call in calls {
        let rules = rules.entry(call.number).or_default();
        if let Some(Argument { which, value, .. }) = call.argument {
            let (len, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
            let condition = SeccompCondition::new(which, len, equal, value).unwrap();
            rules.push(SeccompRule::new(vec![condition]).unwrap());
        }
    }
    let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, kill, allow, arch).unwrap();
    BpfProgram::try_from(filter).unwrap()
}

/// Does something with each row that can be done here.
fn each(mut look: impl FnMut(&Row)) {
    for row in TABLE {
        if let Some(_kept) = (row.needs)() {
            look(row);
        }
    }
}

#[test]
fn each_operation_makes_no_other_call_than_the_table_says() {
    in_own_process(|| {
        let mut died = Vec::new();
        each(|row| {
            let killers = row.killers(&row.all());
            if killers.iter().any(Option::is_some) {
                died.push((row.operation, killers));
            }
        });
        assert!(died.is_empty(), "{died:?}: `strace -ff` says of what");
    });
}

#[test]
fn each_operation_makes_each_call_that_the_table_says() {
    in_own_process(|| {
        let mut lived = Vec::new();
        each(|row| {
            let all = row.all();
            for (at, left_out) in all.iter().enumerate() {
                let mut rest = all.clone();
                rest.remove(at);
                let killers = row.killers(&rest);
                if killers.iter().any(|killer| *killer != Some(Signal::SIGSYS)) {
                    lived.push((row.operation, left_out.shown(), killers));
                }
            }
        });
        assert!(lived.is_empty(), "it did without: {lived:#?}");
    });
}

/// A VMM's filter ends it where a thread starts another: each row that does not say so works where
/// everything else is allowed.
#[test]
fn no_operation_starts_a_thread_but_populating() {
    const STARTING: [c_long; 4] = [SYS_clone, SYS_clone3, SYS_fork, SYS_vfork];
    in_own_process(|| {
        let deadly = filter(
            &STARTING.map(|call| (call, None)),
            SeccompAction::KillProcess,
        );
        each(|row| {
            let calls = row.calls.iter().copied().flatten().chain(row.sometimes);
            let starts = calls.clone().any(|call| STARTING.contains(&call.number));
            assert_eq!(starts, row.operation.starts_with("populating"));
            let expected = starts.then_some(Signal::SIGSYS);
            let killers = row.killers_under(&deadly);
            assert_eq!(
                killers,
                vec![expected; row.cases.len()],
                "{}",
                row.operation
            );
        });
    });
}

#[test]
fn the_docs_say_what_the_table_says() {
    let text = fs::read_to_string(top().join("docs/porting.md")).unwrap();
    let rows = text.lines().skip_while(|line| *line != HEAD);
    let rows: Vec<_> = rows.skip(2).take_while(|line| !line.is_empty()).collect();
    let expected: Vec<_> = TABLE.iter().map(Row::shown).collect();
    assert_eq!(rows, expected, "it is to be:\n{}", expected.join("\n"));

    let base: Vec<_> = BASE.iter().map(Call::shown).collect();
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let base = base.join(", ");
    assert!(
        words(&text).contains(&base),
        "the base set is to be: {base}"
    );
}

/// The example lists them by hand, as a VMM does.
#[test]
fn the_example_allows_nothing_for_the_crate_that_the_table_does_not() {
    let sometimes = TABLE.iter().flat_map(|row| row.sometimes);
    let all = TABLE.iter().flat_map(Row::all).chain(sometimes.copied());
    let all = all.chain(BASE.iter().copied());
    let pair = |argument: Argument| (argument.which, argument.value);
    let all: Vec<_> = all
        .map(|call| (call.number, call.argument.map(pair)))
        .collect();
    let more: Vec<_> = example::CRATE
        .iter()
        .filter(|call| !all.contains(call))
        .collect();
    assert!(more.is_empty(), "{more:?}");
}

#[test]
fn what_the_example_does_not_allow_ends_it() {
    in_own_process(|| {
        for (daemons, dies) in [(true, None), (false, Some(Signal::SIGSYS))] {
            let died = dies_of(|| {
                example::enter(daemons).unwrap();
                std::hint::black_box(nix::unistd::getpid());
                // A call for the daemons in its process.
                let (family, kind) = (AddressFamily::Unix, SockType::Stream);
                let socket = socket(family, kind, SockFlag::empty(), None).unwrap();
                let _ = nix::sys::socket::listen(&socket, Backlog::MAXCONN);
            });
            assert_eq!(died, dies);
        }
    });
}
