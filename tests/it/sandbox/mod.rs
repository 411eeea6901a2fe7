//! The table of docs/porting.md of the system calls that each operation makes: under a filter
//! that allows these and a base set, each operation works; without any one of them the process
//! dies.
//!
//! Each case is a child of a process with one thread, and has nothing cached. The daemons are
//! threads that were there before the filter, which is for those that it is installed in and
//! that they start. The calls are those of glibc on x86_64.

use std::collections::BTreeMap;
use std::fs;

use nix::sys::signal::Signal;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

use crate::fork::dies_of;
use crate::isolation::in_own_process;
use crate::support::top;
use table::{Argument, BASE, Call, Row, TABLE};

/// Above the table in the docs.
const HEAD: &str = "| for | always | where it is needed |";

mod operations;
mod table;

impl Row {
    /// Its calls, each once, by name.
    fn all(&self) -> Vec<Call> {
        let all = self.calls.iter().copied().flatten();
        let by_name: BTreeMap<_, _> = all.map(|call| (call.shown(), *call)).collect();
        by_name.into_values().collect()
    }

    /// What a process dies of that does this with `calls` and the base set, if it dies.
    fn killer(&self, calls: &[Call]) -> Option<Signal> {
        let program = only(calls.iter().chain(self.sometimes).chain(BASE));
        // The child may do anything: there is no other thread that could hold a lock.
        dies_of(|| {
            let work = (self.prepare)();
            apply_filter(&program).unwrap();
            // To drop it is another operation.
            std::mem::forget(work());
        })
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

fn possible() -> impl Iterator<Item = &'static Row> {
    TABLE.iter().filter(|row| (row.possible)())
}

#[test]
fn each_operation_makes_no_other_call_than_the_table_says() {
    in_own_process(|| {
        let died: Vec<_> = possible()
            .filter_map(|row| Some((row.operation, row.killer(&row.all())?)))
            .collect();
        assert!(died.is_empty(), "{died:?}: `strace -ff` says of what");
    });
}

#[test]
fn each_operation_makes_each_call_that_the_table_says() {
    in_own_process(|| {
        let mut lived = Vec::new();
        for row in possible() {
            let all = row.all();
            for (at, left_out) in all.iter().enumerate() {
                let mut rest = all.clone();
                rest.remove(at);
                if row.killer(&rest) != Some(Signal::SIGSYS) {
                    lived.push((row.operation, left_out.shown()));
                }
            }
        }
        assert!(lived.is_empty(), "it did without: {lived:#?}");
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
