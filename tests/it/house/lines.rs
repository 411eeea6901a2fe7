//! Rules that each line of the sources keeps.

use std::fs;

use super::src;
use crate::support::sources;

/// The lines of all sources but comments, with the path below `src` of each, for which `broken`
/// says that they break a rule.
fn lines_that(broken: impl Fn(&str, &str) -> bool) -> Vec<String> {
    let source = src();
    let mut found = Vec::new();
    for path in sources(&source) {
        let text = fs::read_to_string(&path).unwrap();
        let path = path.strip_prefix(&source).unwrap().to_str().unwrap();
        let code = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        let lines = code.filter(|line| broken(path, line));
        found.extend(lines.map(|line| format!("{path}: {}", line.trim())));
    }
    found
}

/// The lines that people write, of all packages and comments too, for which `broken` says that
/// they break a rule.
fn written_lines_that(broken: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["src", "examples", "tests/it", "benches"] {
        let all = sources(&src().join("..").join(folder));
        assert!(all.len() > 5, "{folder}: {all:?}");
        for path in all {
            let text = fs::read_to_string(&path).unwrap();
            let lines = text.lines().enumerate().filter(|(_, line)| broken(line));
            found.extend(lines.map(|(at, _)| format!("{}:{}", path.display(), at + 1)));
        }
    }
    found
}

/// rustfmt sees to code, but to neither comments nor strings nor most macros. A row of a table in
/// the docs must be one line.
#[test]
fn lines_end_before_column_100() {
    let is_row = |line: &str| line.starts_with("/// |") || line.starts_with("//! |");
    let found =
        written_lines_that(|line| line.chars().count() >= 100 && !is_row(line.trim_start()));
    assert!(found.is_empty(), "{found:#?}");
}

/// One word for one thing: what talks to a daemon is a frontend.
#[test]
fn words_that_were_given_up_do_not_come_back() {
    let words = ["front-end", "for ever"];
    let has = |line: &str, word: &str| {
        let mut rests = line.split(word).skip(1);
        rests.any(|rest| !rest.starts_with(char::is_alphabetic)) // "for every" is fine
    };
    let found = written_lines_that(|line| {
        let is_list = line.contains("let words = ");
        words.iter().any(|word| has(line, word)) && !is_list
    });
    assert!(found.is_empty(), "{found:#?}");
}

/// A call that goes past `logs` panics when the logger does.
#[test]
fn all_lines_of_the_log_go_through_logs() {
    let calls = ["error!", "warn!", "info!", "debug!", "trace!", "log!"];
    let found = lines_that(|path, line| {
        let mut calls = calls.iter();
        path != "logs.rs" && calls.any(|call| line.contains(&format!("log::{call}")))
    });
    assert!(found.is_empty(), "{found:#?}");
}

/// Texts may name such files, but what stands at the start of a string is a path to be opened.
#[test]
fn only_host_reads_procfs_and_sysfs() {
    let opens = |line: &str| line.contains("\"/proc") || line.contains("\"/sys");
    // Where a limit stands, for people.
    let texts = ["report.rs", "shortage.rs"];
    let found = lines_that(|path, line| {
        opens(line) && !path.starts_with("host/") && !texts.contains(&path)
    });
    assert!(found.is_empty(), "{found:#?}");
    let of_host = lines_that(|path, line| opens(line) && path.starts_with("host/"));
    assert!(of_host.len() > 10, "{of_host:#?}");
}

/// The standard library panics where a hash table gets no seed: getrandom(2) may be forbidden.
#[test]
fn no_table_needs_a_random_seed() {
    let found = lines_that(|_, line| line.contains("HashMap") || line.contains("HashSet"));
    assert!(found.is_empty(), "{found:#?}");
}
