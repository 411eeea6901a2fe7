//! The unit tests of vm-memory and virtio-queue, with our types in the place of vm-memory's.
//!
//! Their sources are those that cargo has of the crates we are built with. They are copied to a
//! temporary folder when this runs, patched, and built offline; nothing of them is in this
//! repository. What differs is listed by name, and nothing else may.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use source::{Patched, registry_source};

use crate::support::{skip, top};

mod source;

/// A test of theirs that is not passed, and why that is meant.
struct Differs {
    test: &'static str,
    how: How,
    why: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// It does not compile: it calls what we do not have.
    LeftOut,
    /// It asserts something else.
    Fails,
}

const EACH_REGION_HAS_A_FILE: &str = "RAM without a file cannot be shared: each region has one";

/// Of the files of vm-memory that test its `GuestMemoryMmap` or its collection of regions. (Those
/// of iommu.rs need its feature `iommu`, and so the crate rangemap, which nothing else here
/// needs.)
const VM_MEMORY: [Differs; 4] = [
    Differs {
        test: "guest_memory::tests::test_guest_memory_mmap_is_hugetlbfs",
        how: How::Fails,
        why: "it is known of each region whether its pages come from a hugetlb pool",
    },
    Differs {
        test: "mmap::tests::test_change_region_addr",
        how: How::LeftOut,
        why: "a region has no MmapRegion to take out: GuestRegionShm::from_backing maps once more",
    },
    Differs {
        test: "mmap::tests::test_retrieve_fd_backing_memory_region",
        how: How::Fails,
        why: EACH_REGION_HAS_A_FILE,
    },
    Differs {
        test: "mmap::tests::test_retrieve_offset_from_fd_backing_memory_region",
        how: How::Fails,
        why: EACH_REGION_HAS_A_FILE,
    },
];

#[test]
fn the_unit_tests_of_vm_memory_pass_but_for_what_differs_by_design() {
    let Some(upstream) = registry_source("vm-memory", "0.18.0") else {
        return;
    };
    let left_out = VM_MEMORY.iter().filter(|test| test.how == How::LeftOut);
    let left_out: Vec<&str> = left_out.map(|test| test.test).collect();
    let patched = Patched::vm_memory(&upstream, &left_out);
    assert!(patched.tests.len() >= 40, "{:?}", patched.tests);
    check(&patched, &VM_MEMORY);
}

#[test]
fn the_unit_tests_of_virtio_queue_pass() {
    let Some(upstream) = registry_source("virtio-queue", "0.18.0") else {
        return;
    };
    let patched = Patched::virtio_queue(&upstream);
    assert!(patched.tests.len() >= 50, "{:?}", patched.tests);
    check(&patched, &[]);
}

/// Runs the tests, and asserts that those listed differ, and no others.
fn check(patched: &Patched, differing: &[Differs]) {
    let Some(results) = run(&patched.dir) else {
        return;
    };
    let not_passed: BTreeMap<&str, How> = patched
        .tests
        .iter()
        .filter_map(|test| match results.get(test.as_str()) {
            Some(true) => None,
            Some(false) => Some((test.as_str(), How::Fails)),
            None => Some((test.as_str(), How::LeftOut)),
        })
        .collect();
    let expected: BTreeMap<&str, How> =
        differing.iter().map(|test| (test.test, test.how)).collect();
    assert_eq!(not_passed, expected);
    // All that ran is known by name.
    let known: BTreeSet<&str> = patched.tests.iter().map(String::as_str).collect();
    let unknown: Vec<_> = results
        .keys()
        .filter(|test| !known.contains(test.as_str()))
        .collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    println!(
        "{} of their tests pass",
        results.values().filter(|passed| **passed).count()
    );
    for Differs { test, how, why } in differing {
        println!("{test} ({how:?}): {why}");
    }
}

/// Builds and runs the tests of a package: their names, and whether they passed. `None` if what it
/// needs is not there, which was printed.
fn run(package: &Path) -> Option<BTreeMap<String, bool>> {
    std::fs::copy(top().join("Cargo.lock"), package.join("Cargo.lock")).unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args([
            "test",
            "--offline",
            "--lib",
            "--no-fail-fast",
            "--target-dir",
        ])
        .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("upstream/target"))
        .env("CARGO_NET_OFFLINE", "true")
        .current_dir(package);
    let output = cargo.output().unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    // A crate that was never downloaded. What does not compile is a failure.
    if err.contains("--offline") && !err.contains("Compiling") {
        skip(&format!("cargo has not all crates that it needs: {err}"));
        return None;
    }
    let results: BTreeMap<String, bool> = out
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.rsplit_once(" ... "))
        .map(|(test, result)| (test.to_owned(), result == "ok"))
        .collect();
    assert!(!results.is_empty(), "{err}\n{out}");
    Some(results)
}
