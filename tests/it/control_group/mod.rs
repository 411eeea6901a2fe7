//! Real control groups, and processes in them that ask for more memory than they may have.
//!
//! Each process is this binary once more, with one scenario, or an example.

use std::os::unix::process::ExitStatusExt;

use nix::sys::signal::Signal;

use crate::isolation::HugePool;
use crate::populate::{HUGE, MIB};
use crate::support::{example, host_changes};

mod group;
mod scenarios;

use group::Group;

/// What most groups may have, and what is asked for in them.
const LIMIT: u64 = 64 * MIB;
const TOO_MUCH: u64 = 256 * MIB;

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
fn jobs_that_do_not_fit_together_end_in_time() {
    let Some(group) = Group::with_limit(TOO_MUCH) else {
        return;
    };
    group.plays("many in the background");
}

#[test]
fn when_another_process_takes_the_rest_it_ends_in_time() {
    let Some(group) = Group::with_limit(TOO_MUCH) else {
        return;
    };
    group.plays("another takes the rest");
}

#[test]
fn huge_pages_that_the_group_may_not_have_are_refused_before_the_first() {
    if !host_changes() {
        return;
    }
    let Some(pool) = HugePool::with_available(HUGE, 8) else {
        return;
    };
    let used = "hugetlb.2MB.max";
    let promised = "hugetlb.2MB.rsvd.max";
    let Some(group) = Group::of_huge_pages(&pool, &[(used, 4 * HUGE)]) else {
        return;
    };
    let free = pool.free();
    group.plays("huge pages");
    assert_eq!((pool.free(), pool.reserved()), (free, 0));
    // The same where only their promise is limited.
    group.set(used, 1 << 40);
    group.set(promised, 4 * HUGE);
    group.plays("huge pages");
    assert_eq!((pool.free(), pool.reserved()), (free, 0));
}

#[test]
fn lazy_ram_larger_than_the_group_is_noted() {
    let Some(group) = Group::with_limit(LIMIT) else {
        return;
    };
    group.plays("lazy");
}
