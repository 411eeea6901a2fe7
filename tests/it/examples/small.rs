//! The small examples, which the documentation names: each runs by itself, quickly, and says what
//! it shows.

use std::process::Command;
use std::time::{Duration, Instant};

use super::printed;
use crate::support::{example, top};

/// What each example prints, among others.
const SMALL: [(&str, &[&str]); 6] = [
    (
        "ram",
        &[
            "reserve=on reserves nothing",
            "Read back: 0xcafe, hello",
            "In the hole: ",
            "After the device: 0xbeef",
            "total         4 GiB     8 KiB",
        ],
    ),
    (
        "hotplug",
        &[
            "  gpu: map 0x100000000..=0x1001fffff (2 MiB)\n",
            "nothing was changed: listener \"gpu\" refuses",
            "it can hold no more regions",
            "  net: unmap 0x100000000..=0x1001fffff (2 MiB)\n",
            "1 region was given back",
        ],
    ),
    (
        "daemon_end",
        &[
            "memory-backend-memfd,size=2M:\n  the daemon reads 0xcafe\n",
            "the daemon refuses: region 0x0..=0x1fffff (2 MiB): cannot adopt a file whose size is \
             not sealed",
            "the frontend: the daemon hung up",
        ],
    ),
    (
        "session",
        &[
            "The disk holds what is in the plugged RAM: 7",
            "Its successor completed what waited: 9",
        ],
    ),
    (
        "discard",
        &[
            "Populated: 16384 KiB are allocated",
            "Discarded: 8192 bytes are free and 4096 stay",
            "16376 KiB are allocated",
            "the page reads as 0",
            "Inhibited: ",
            "and then 1024 KiB are free",
            "Collected: 4096 KiB are free, 0 wait",
        ],
    ),
    (
        "option_strings",
        &[
            "memory-backend-memfd,size=1G,hugetlb=on,hugetlbsize=2M,policy=bind,host-nodes=0",
            "size=64X: ",
            "share=off: ",
            "policy=bind: ",
            "hugetlbsize=3 MiB: ",
            "mem-path is missing",
            "memory-backend-memfd,id=fast,size=1G,thp=on,policy=interleave,host-nodes=0,dump=off",
        ],
    ),
];

#[test]
fn each_small_example_runs_by_itself_and_prints_what_it_shows() {
    for (name, texts) in SMALL {
        // Built, if it is not yet, before the time is taken.
        example(name);
        let started = Instant::now();
        let text = printed(name, &[]);
        let took = started.elapsed();
        assert!(took < Duration::from_secs(2), "{name} took {took:?}");
        for expected in texts {
            assert!(
                text.contains(expected),
                "{name}: {expected:?} is not in\n{text}"
            );
        }
    }
}

#[test]
fn small_examples_are_small_and_the_documentation_names_each() {
    let files = std::fs::read_dir(top().join("examples")).unwrap();
    let files = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<String> = files.filter(|name| name.ends_with(".rs")).collect();
    files.sort();
    let mut expected = SMALL.map(|(name, _)| format!("{name}.rs"));
    expected.sort();
    assert_eq!(files, expected);
    for file in files {
        let path = format!("examples/{file}");
        let text = std::fs::read_to_string(top().join(&path)).unwrap();
        assert!(text.lines().count() <= 60, "{path} is too long");
        let mut grep = Command::new("grep");
        let named = grep.args(["-rqF", &path, "src"]).current_dir(top());
        assert!(named.status().unwrap().success(), "no docs name {path}");
    }
}
