//! What goes wrong on this side: one line, and nothing is left.

use super::*;

#[test]
fn what_cannot_be_is_said_in_one_line_before_anything_is_done() {
    let place = Place::new();
    let [odd, large, refused, missing] =
        ["odd", "large", "refused", "missing"].map(|name| place.path(name));
    fs::write(&odd, [1; 1000]).unwrap();
    fs::write(&large, [1; 4096]).unwrap();
    drop(UnixListener::bind(&refused).unwrap());
    let path = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let misuses: [(&[&str], &[&str]); 8] = [
        (&["--ram", "2M"], &["guest RAM of 2 MiB", "4 MiB", "--ram"]),
        (&["--ram", "5000000"], &["guest RAM of 5000000 bytes"]),
        (&["--ram", "99999999T"], &["more than 2^64"]),
        (&["--ram", "64M?"], &["--ram", "K, M, G or T"]),
        (&["--backing", "paper"], &["memfd, shm, hugetlb"]),
        (&["--disk", "1000"], &["--disk", "whole sectors"]),
        (&["--overwrite"], &["--hotplug", "--socket", "--help"]),
        (&["--ramm", "1G"], &["--ramm", "--help"]),
    ];
    for (arguments, texts) in misuses {
        Run::of(place.share().args(arguments)).is_misused(texts);
    }
    let cases: [(&[&str], &[&str]); 11] = [
        (
            &["--deadline", "0.2", "--socket", &path(&missing)],
            &["no daemon can be reached at", "missing", "No such file"],
        ),
        (
            &["--deadline", "0.2", "--socket", &path(&refused)],
            &["no daemon can be reached at", "Connection refused"],
        ),
        (
            &["--deadline", "0.2", "--socket", &path(&odd)],
            &["no daemon can be reached at"],
        ),
        (&["--ram", "8388608T"], &["cannot create 8388608 TiB"]),
        (
            &["--ram", "64G", "--backing", "hugetlb"],
            &[
                "32769 more huge pages of 2 MiB are needed",
                "nr_hugepages",
                "--backing memfd",
            ],
        ),
        (&["--disk", "8000T"], &["does not fit in memory"]),
        (
            &["--write-from", &path(&missing)],
            &["cannot read", "No such file"],
        ),
        (
            &["--write-from", &path(&odd)],
            &["1000 bytes", "truncate -s 1024"],
        ),
        (
            &["--disk", "512", "--write-from", &path(&large)],
            &["4 KiB", "512 bytes", "nothing"],
        ),
        (
            &["--read-to", "/proc/self/copy"],
            &["cannot write /proc/self/copy"],
        ),
        (
            &["--read-to", "/dev/null"],
            &["/dev/null", "no regular file"],
        ),
    ];
    for (arguments, texts) in cases {
        Run::of(place.share().args(arguments)).fails_with(texts);
    }
    assert_eq!(place.names(), ["large", "odd", "refused"]);
    assert_eq!(fs::read(&odd).unwrap(), [1; 1000]);
    assert!(fs::metadata("/dev/null").is_ok_and(|metadata| !metadata.is_file()));
}

#[test]
fn a_report_that_cannot_be_printed_is_an_error() {
    let place = Place::new();
    let output = place
        .share()
        .args(["--disk", "1M"])
        .stdout(File::options().write(true).open("/dev/full").unwrap())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(
        line.starts_with("share: cannot print the report: No space left"),
        "{line}"
    );
}

#[test]
fn an_output_that_grows_too_large_is_removed() {
    let place = Place::new();
    // dash and bash count files by 512 or 1024 bytes: 4 to 8 MiB, enough for the RAM.
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "ulimit -f 8192; exec \"$0\" --ram 4M --disk 64M --read-to \"$1\"",
        ])
        .arg(crate::support::example("share"))
        .arg(place.path("out"))
        .env("TMPDIR", place.0.path());
    Run::of(&mut command).fails_with(&["cannot write", "out", "64 MiB exceeds RLIMIT_FSIZE"]);
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn an_output_on_a_full_disk_is_removed() {
    let place = Place::new();
    let small = place.path("small");
    fs::create_dir(&small).unwrap();
    // A file system of its own, which goes with the last process that sees it.
    let script = "mount -t tmpfs -o size=2m tmpfs \"$1\" 2>/dev/null || { echo no mount; exit 9; }
                  \"$0\" --disk 64M --read-to \"$1/out\"; status=$?; ls -A \"$1\"; exit $status";
    let Some(unshare) = support::peer("unshare") else {
        return;
    };
    let mut command = Command::new(unshare);
    command
        .args(["-m", "sh", "-c", script])
        .arg(crate::support::example("share"))
        .arg(&small);
    command.env("TMPDIR", place.0.path());
    let run = Run::of(&mut command);
    if run.status.code() != Some(1) || !run.errors.starts_with("share: ") {
        support::skip(&format!(
            "no file system can be mounted: {}{}",
            run.out, run.errors
        ));
        return;
    }
    run.fails_with(&["cannot write", "small/out at byte", "No space left"]);
    assert_eq!(place.names(), ["small"]);
}
