//! Listeners: attached and detached, by regions.

use super::*;

#[test]
fn attaching_undoes_itself_and_gives_the_listener_back() {
    let (space, log) = (space(), Said::default());
    for told in both_ways() {
        let refusing = Script {
            answers: vec![(1, refused)],
            told,
            ..script("a", &log)
        };
        let error = space.attach("a", refusing).unwrap_err();
        let text = "listener \"a\" was not attached because it refuses the memory: no room";
        assert_eq!(chain(&error), text);
        assert!(error.into_listener().held.is_empty());
        assert_eq!(said(&log).last().unwrap().1, "[]");
    }

    // One that was only asked is not told anything.
    let full = Script {
        limit: 0,
        ..script("b", &log)
    };
    let error = space.attach("b", full).unwrap_err();
    assert!(matches!(Error::from(error), Error::AddressSpace(_)));
    assert_eq!(said(&log), []);
    assert!(space.listeners().unwrap().is_empty());
}

#[test]
fn a_detached_listener_is_told_no_more_and_its_name_is_void() {
    let (space, other) = (space(), self::space());
    let log = Said::default();
    let a = space.attach("a", script("a", &log)).unwrap();
    let copy = a.clone();
    let gone = |done| matches!(done, Err(AddressSpaceError::NoSuchListener));
    assert!(gone(other.with_listener(&a, |_| ())));
    let listener = space.detach(a).unwrap();
    assert_eq!(listener.held, [0]);
    assert!(gone(space.refresh(&copy)));
    space.insert(region(4)).told_all();
    assert_eq!(listener.held, [0]);
}

/// Takes one region more, or not.
struct Regions(Arc<Mutex<Vec<String>>>, Option<u64>);

impl RegionListener for Regions {
    fn region_add(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        let at = region.range().start_addr().0 / MIB;
        self.0.lock().unwrap().push(format!("+{at}"));
        match self.1 {
            Some(refused) if refused == at => Err(ListenerError::refused("full")),
            _ => Ok(()),
        }
    }
    fn region_remove(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        let at = region.range().start_addr().0 / MIB;
        self.0.lock().unwrap().push(format!("-{at}"));
        Ok(())
    }
}

#[test]
fn regions_go_from_above_and_come_from_below_and_the_one_that_failed_is_named() {
    let space = space();
    let log = Arc::new(Mutex::new(Vec::new()));
    let id = space
        .attach("dma", RegionAdapter::new(Regions(log.clone(), Some(8))))
        .unwrap();
    space
        .transaction()
        .insert(region(6))
        .insert(region(4))
        .commit()
        .told_all();
    let change = space
        .transaction()
        .remove((GuestAddress(4 * MIB), MIB))
        .remove((GuestAddress(6 * MIB), MIB))
        .insert(region(8))
        .insert(region(2));
    let error = change.commit().unwrap_err();
    assert!(
        error
            .to_string()
            .contains("\"dma\" refuses the region 0x800000..="),
        "{error}"
    );
    assert_eq!(
        *log.lock().unwrap(),
        ["+0", "+4", "+6", "-6", "-4", "+2", "+8", "-2", "+4", "+6"]
    );
    let held = space.with_listener(&id, |dma| dma.regions().len()).unwrap();
    assert_eq!(held, 3);
}

#[test]
fn a_listener_of_regions_that_was_away_is_told_all_of_them_when_it_is_back() {
    struct Dma(Arc<Mutex<bool>>);
    impl RegionListener for Dma {
        fn region_add(&mut self, _: &GuestRegionShm) -> Result<(), ListenerError> {
            match *self.0.lock().unwrap() {
                true => Err(away()),
                false => Ok(()),
            }
        }
        fn region_remove(&mut self, _: &GuestRegionShm) -> Result<(), ListenerError> {
            panic!("it is not there");
        }
    }
    let (space, gone) = (space(), Arc::new(Mutex::new(false)));
    let dma = space
        .attach_required("dma", RegionAdapter::new(Dma(gone.clone())))
        .unwrap();
    *gone.lock().unwrap() = true;
    // It cannot be put back either: it stays stale.
    for _ in 0..2 {
        let error = space.insert(region(4)).unwrap_err().to_string();
        assert!(
            error.starts_with(
                "nothing was changed, but \"dma\" is stale: listener \"dma\" is away"
            ),
            "{error}"
        );
    }
    space.refresh(&dma).unwrap_err();
    *gone.lock().unwrap() = false;
    space.refresh(&dma).unwrap();
    let held = space.with_listener(&dma, |dma| dma.regions().len());
    assert_eq!(held.unwrap(), 1);
    space.insert(region(4)).told_all();
    let held = space.with_listener(&dma, |dma| dma.regions().len());
    assert_eq!(held.unwrap(), 2);
}

#[test]
fn a_removed_region_stays_mapped_while_it_is_read() {
    let space = space();
    space.insert(region(4)).told_all();
    let address = GuestAddress(4 * MIB);
    let held = space.published().memory();
    held.write_obj(42_u64, address).unwrap();
    drop(space.remove((address, MIB)).unwrap());

    assert_eq!(held.read_obj::<u64>(address).unwrap(), 42);
    assert!(space.published().memory().read_obj::<u64>(address).is_err());
}
