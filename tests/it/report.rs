//! What has no effect is said: in the report that building returns, on the backing, in the log.

use guest_memory_shm::{
    BackingSource, BuildNote, BuildReport, GuestMemoryShm, GuestRegionShm, PageSize, RamOptions,
    Reserve, ResourceLimit, ShmBacking, ThpObstacle,
};
use vm_memory::GuestAddress;

use crate::isolation::{ShmemHuge, in_own_process};

const MIB: u64 = 1 << 20;

fn report(options: RamOptions, size: u64) -> BuildReport {
    let builder = GuestMemoryShm::<()>::builder();
    let builder = builder.add_ram(options, [(GuestAddress(0), size)]);
    builder.build_with_report().unwrap().1
}

fn properties(report: &BuildReport) -> Vec<&'static str> {
    let notes = report.notes();
    notes.filter_map(|(_, note)| note.property()).collect()
}

#[test]
fn ram_as_asked_for_has_nothing_to_report() {
    for backing in [BackingSource::Memfd, BackingSource::PosixShm] {
        let found = report(RamOptions::new().with_backing(backing), MIB);
        assert!(found.is_empty(), "{found}");
    }
}

#[test]
fn merging_and_reserving_shared_memory_is_reported_without_effect() {
    let options = "memory-backend-shm,id=ram0,size=1M,merge=on,reserve=on";
    let found = report(options.parse().unwrap(), MIB);
    assert_eq!(properties(&found), ["merge", "reserve"]);
    assert_eq!(
        found.to_string(),
        "ram0: merge=on has no effect: the kernel merges private pages only, never shared ones\n\
         ram0: reserve=on reserves nothing here: only huge pages of a pool are reserved; \
         populate the RAM to be sure of it"
    );
}

#[test]
fn properties_of_qemu_that_mean_nothing_here_are_reported() {
    let options: RamOptions =
        "memory-backend-memfd,size=1M,hugetlbsize=2M,x-use-canonical-path-for-ramblock-id=on"
            .parse()
            .unwrap();
    assert_eq!(
        properties(&report(options, MIB)),
        ["hugetlbsize", "x-use-canonical-path-for-ramblock-id"]
    );
}

#[test]
fn ram_larger_than_the_machine_is_reported_and_built() {
    // More than any machine has.
    let size = 1 << 46;
    let found = report(RamOptions::new(), size);
    let notes = found.notes().map(|(_, note)| note);
    let notes: Vec<_> = notes
        .filter(|note| matches!(note, BuildNote::Shortage(_)))
        .collect();
    let [BuildNote::Shortage(short)] = notes[..] else {
        panic!("{found}");
    };
    assert!(short.needed == size && short.left < size);
    assert!(matches!(short.limit, ResourceLimit::Machine { size: total, .. } if total < size));
    let text = notes[0].to_string();
    assert!(
        text.starts_with(
            "using all of the RAM would end a process or slow it down: 64 TiB more are needed, \
             and "
        ),
        "{text}"
    );
    assert!(
        text.contains("of memory and swap (/proc/meminfo)"),
        "{text}"
    );
    assert!(!text.contains("OnShortage"), "{text}");
    // A file on a disk is not in memory as a whole.
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let on_disk = RamOptions::new()
        .with_backing(BackingSource::File(disk.path().to_owned()))
        .with_reserve(Reserve::Off);
    let found = report(on_disk, 1 << 43);
    assert!(!found.to_string().contains("this machine"), "{found}");
}

#[test]
fn a_region_and_a_backing_report_as_building_does() {
    let options = RamOptions::new().with_reserve(Reserve::On);
    let region = GuestRegionShm::<()>::new((GuestAddress(0), MIB), &options).unwrap();
    assert_eq!(properties(&region.report()), ["reserve"]);
    let backing = ShmBacking::create(&options, MIB).unwrap();
    assert!(matches!(backing.notes(), [BuildNote::Reserve]));
}

#[test]
fn transparent_huge_pages_of_ram_too_small_or_uneven_are_reported() {
    in_own_process(|| {
        let Some(_switch) = ShmemHuge::set("advise") else {
            return;
        };
        let options = RamOptions::new().with_page_size(PageSize::Transparent);
        for (size, expected) in [
            (MIB, Some("size")),
            (3 * MIB, Some("alignment")),
            (4 * MIB, None),
        ] {
            let found = report(options.clone(), size);
            let why = found.notes().next().map(|(_, note)| match note {
                BuildNote::NotHuge(ThpObstacle::Size { .. }) => "size",
                BuildNote::NotHuge(ThpObstacle::Alignment { .. }) => "alignment",
                other => panic!("{other}"),
            });
            assert_eq!(why, expected, "{size:#x}: {found}");
        }
    });
}

#[test]
fn the_log_says_it_too() {
    use std::sync::Mutex;

    static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

    struct Collector;

    impl log::Log for Collector {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            if record.level() <= log::Level::Warn {
                LINES.lock().unwrap().push(record.args().to_string());
            }
        }
        fn flush(&self) {}
    }

    in_own_process(|| {
        log::set_logger(&Collector).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
        let options = RamOptions::new()
            .with_name("ram0")
            .with_reserve(Reserve::On);
        let found = report(options, MIB);
        let lines = LINES.lock().unwrap().clone();
        assert_eq!(lines, [found.to_string()]);
    });
}
