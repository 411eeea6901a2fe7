//! Regions that come and go under running I/O, and one that a daemon refuses.

use super::*;

#[test]
fn regions_come_and_go_under_many_daemons() {
    let place = Place::new();
    let run = Run::of(
        place
            .share()
            .args(["--hotplug", "30", "--daemons", "4", "--ram", "8M"]),
    );
    run.passes();
    for line in [
        "  added             30 regions of 2 MiB, told to all\n",
        "  removed           30 regions, and no daemon or guest holds them\n",
        "  data              every byte that was read is what was written\n",
    ] {
        assert!(run.out.contains(line), "{}", run.out);
    }
    assert!(place.names().is_empty());
}

#[test]
fn a_region_that_one_daemon_refuses_is_kept_by_none() {
    for daemon in ["1", "2", "3"] {
        let place = Place::new();
        let mut share = place.share();
        let run = Run::of(share.args(["--hotplug", "5", "--daemons", "3", "--refuse", daemon]));
        run.passes();
        let refused = format!(" nothing was changed: \"daemon {daemon}\" refuses the region\n");
        assert!(run.out.contains(&refused), "{}", run.out);
        let kept = "  kept by           none: neither the guest nor a daemon has it\n";
        assert!(run.out.contains(kept), "{}", run.out);
        // The daemon goes on: it takes the next ones.
        assert!(
            run.out.contains("added             5 regions"),
            "{}",
            run.out
        );
    }
}

#[test]
fn a_limit_is_met_before_any_daemon_is_told() {
    // The example has each region's descriptor twice: the daemon is a part of it.
    if !support::may_have_descriptors(2 * 510 + 100) {
        return;
    }
    let place = Place::new();
    let run = Run::of(place.share().args(["--hotplug", "510", "--ram", "4M"]));
    run.fails_with(&[
        "cannot hot-add region 508: nothing was changed: \"daemon 1\" refuses the region ",
        "the daemon has 509 memory slots",
    ]);
}

#[test]
fn a_daemon_that_is_not_there_cannot_refuse() {
    let place = Place::new();
    let run = Run::of(place.share().args(["--hotplug", "2", "--refuse", "2"]));
    run.is_misused(&["--refuse 2: the daemons are 1 to 1, see --daemons"]);
}

/// A real daemon: read from only, written to as well, and beside others.
#[test]
fn regions_come_and_go_under_a_real_daemon() {
    for (options, write) in [
        (&["--hotplug", "40"][..], false),
        (&["--hotplug", "40", "--overwrite"], true),
        (
            &[
                "--hotplug",
                "12",
                "--daemons",
                "3",
                "--overwrite",
                "--backing",
                "shm",
            ],
            true,
        ),
    ] {
        let place = Place::new();
        let (image, before) = (place.path("image"), place.path("before"));
        random_file(&image, 16 * MIB, 9);
        fs::copy(&image, &before).unwrap();
        let Some(daemon) = StorageDaemon::start(&image, None) else {
            return;
        };
        let mut share = place.share();
        let run = Run::of(share.args(options).arg("--socket").arg(&daemon.socket));
        run.passes();
        let regions = format!("  removed           {} regions, and no daemon", options[1]);
        assert!(run.out.contains(&regions), "{}", run.out);
        assert_eq!(same(&image, &before), !write, "{options:?}");
    }
}
