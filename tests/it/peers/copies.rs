//! Runs that succeed: in one process, and with a foreign disk.

use super::*;

/// Copies a disk of qemu-storage-daemon out, and another one in, with RAM of one kind.
fn copy_both_ways(backing: &str) {
    let place = Place::new();
    let [image, other, out] = ["image", "other", "out"].map(|name| place.path(name));
    random_file(&image, DISK, 1);
    random_file(&other, DISK, 2);
    assert!(!same(&image, &other));

    for (option, file) in [("--read-to", &out), ("--write-from", &other)] {
        // It serves one frontend and takes its socket away then.
        let Some(daemon) = StorageDaemon::start(&image, None) else {
            return;
        };
        let run = Run::of(
            place
                .share()
                .args(["--backing", backing, "--socket"])
                .arg(&daemon.socket)
                .arg(option)
                .arg(file),
        );
        run.passes();
        assert!(run.out.contains("256 MiB, "), "{}", run.out);
        // Every third buffer of 128 KiB.
        assert!(
            run.out.contains("carried           87296 KiB"),
            "{}",
            run.out
        );
        assert!(same(&image, file), "{option} with {backing}");
        println!("{backing} {option}:{}", rate(&run.out));
        drop(daemon);
    }
    let mut names = place.names();
    names.retain(|name| !name.ends_with(".sock"));
    assert_eq!(names, ["image", "other", "out"]);
}

fn rate(report: &str) -> &str {
    let line = report.lines().find(|line| line.contains("MiB/s"));
    line.unwrap_or_default()
}

#[test]
fn a_disk_is_copied_both_ways_through_a_memfd() {
    copy_both_ways("memfd");
}

#[test]
fn a_disk_is_copied_both_ways_through_posix_shm() {
    copy_both_ways("shm");
}

#[test]
fn a_disk_is_copied_both_ways_through_huge_pages() {
    // 256 MiB of RAM and the region of 2 MiB beside it.
    if let Some(_pool) = HugePool::with_available(2 << 20, 129) {
        copy_both_ways("hugetlb");
    }
}

#[test]
fn the_run_without_options_reports_what_it_promises() {
    let place = Place::new();
    let run = Run::of(&mut place.share());
    run.passes();
    for text in [
        "256 MiB around a PCI hole, and 2 MiB hot-added",
        // Two regions on one descriptor, and the one that is hot-added.
        "0x0..=0x7ffffff           128 MiB 4 KiB ",
        "0x8000000 yes    memfd",
        "0x140000000..=0x1401fffff   2 MiB",
        "VERSION_1",
        "REPLY_ACK, CONFIG, CONFIGURE_MEM_SLOTS",
        "memory slots      509",
        "capacity          64 MiB",
        "read              64 MiB, ",
        "written, flushed  64 MiB, ",
        "verified          the guest read what the daemon's disk held",
        "the daemon's disk holds what the guest wrote",
        // Every third buffer of 128 KiB, both ways.
        "carried           43648 KiB of the I/O",
        "the daemon gave 1 region back and holds 2",
        "out of reach      the removed region, as it must be: the daemon refused to",
    ] {
        assert!(run.out.contains(text), "no {text:?} in:\n{}", run.out);
    }
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn ram_beyond_three_gigabytes_goes_on_at_four() {
    let place = Place::new();
    let run = Run::of(
        place
            .share()
            .args(["--ram", "4G", "--disk", "4M", "--backing", "shm"]),
    );
    run.passes();
    for text in [
        "0x0..=0xbfffffff          3 GiB ",
        "0x100000000..=0x13fffffff 1 GiB ",
        "0xc0000000 no     posix-shm",
    ] {
        assert!(run.out.contains(text), "no {text:?} in:\n{}", run.out);
    }
}

#[test]
fn the_disk_in_this_process_is_copied_to_a_file_and_back() {
    let place = Place::new();
    let file = place.path("disk");
    // The size is no multiple of a request's.
    let disk = 5 * MIB + 512;
    let size = disk.to_string();
    let run = Run::of(
        place
            .share()
            .args(["--ram", "4M", "--disk", &size, "--read-to"])
            .arg(&file),
    );
    run.passes();
    let bytes = fs::read(&file).unwrap();
    assert_eq!(bytes.len() as u64, disk);
    for (offset, word) in (0u64..).step_by(8).zip(bytes.chunks(8)) {
        let expected = offset.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        assert_eq!(word, expected.to_le_bytes(), "at {offset}");
    }

    let run = Run::of(
        place
            .share()
            .args(["--ram", "4M", "--write-from"])
            .arg(&file),
    );
    run.passes();
    let verified = "verified          the daemon's disk holds what the file holds";
    assert!(run.out.contains(verified), "{}", run.out);
    // A smaller file leaves the rest of the disk alone, and the report says so.
    let run = Run::of(
        place
            .share()
            .args(["--disk", "6M", "--write-from"])
            .arg(&file),
    );
    run.passes();
    let rest = "the last 1048064 bytes of the disk";
    assert!(
        run.out.contains(rest) && run.out.contains(verified),
        "{}",
        run.out
    );
    assert_eq!(place.names(), ["disk"]);
}

#[test]
fn a_foreign_disk_is_read_and_not_written() {
    let place = Place::new();
    let [image, copy] = ["image", "copy"].map(|name| place.path(name));
    random_file(&image, 65 * MIB, 3);
    fs::copy(&image, &copy).unwrap();
    let Some(daemon) = StorageDaemon::start(&image, None) else {
        return;
    };
    let run = Run::of(place.share().arg("--socket").arg(&daemon.socket));
    run.passes();
    assert!(
        run.out
            .contains("two reads through different buffers are equal"),
        "{}",
        run.out
    );
    assert!(same(&image, &copy));
}

#[test]
fn a_file_that_is_smaller_than_the_disk_leaves_the_rest_alone() {
    let place = Place::new();
    let [image, copy, file] = ["image", "copy", "file"].map(|name| place.path(name));
    random_file(&image, 4 * MIB, 4);
    fs::copy(&image, &copy).unwrap();
    random_file(&file, MIB + 512, 5);
    let Some(daemon) = StorageDaemon::start(&image, None) else {
        return;
    };
    let mut command = place.share();
    command
        .arg("--socket")
        .arg(&daemon.socket)
        .arg("--write-from")
        .arg(&file);
    Run::of(&mut command).passes();
    let (image, copy) = (fs::read(image).unwrap(), fs::read(copy).unwrap());
    let split = usize::try_from(MIB + 512).unwrap();
    assert_eq!(image[..split], fs::read(file).unwrap());
    assert_eq!(image[split..], copy[split..]);
}
