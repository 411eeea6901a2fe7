//! The texts of errors, which people act on.

use super::*;

#[test]
fn texts_name_the_values_and_the_way_out() {
    let range = |start, size| GuestRange::new(GuestAddress(start), size).unwrap();
    let cases: Vec<(Error, &str)> = vec![
        (
            Error::TooManyRegions {
                regions: 9,
                limit: 8,
                slots: SlotLimit::Message,
            },
            "the memory table has 9 regions, SET_MEM_TABLE carries 8: negotiate \
             CONFIGURE_MEM_SLOTS with the daemon or use fewer regions; nothing was sent",
        ),
        (
            Error::TooManyRegions {
                regions: 33,
                limit: 32,
                slots: SlotLimit::Daemon,
            },
            "the memory table has 33 regions, the daemon has 32 memory slots: use fewer \
             regions or another daemon; nothing was sent",
        ),
        (
            Error::TooManyRegions {
                regions: 65,
                limit: 64,
                slots: SlotLimit::Kernel,
            },
            "the memory table has 65 regions, in-kernel vhost takes 64: load the module vhost \
             with a larger max_mem_regions or use fewer regions; nothing was sent",
        ),
        (
            Error::DaemonRefused {
                change: MemTableChange::SetTable(2),
                source: "1".into(),
            },
            "the daemon refused to take a memory table of 2 regions: it may be out of memory, \
             address space or memory slots, or its policy (seals) forbids it: look at its log",
        ),
        (
            Error::DaemonSilent {
                change: MemTableChange::Add(range(1 << 32, 1 << 30)),
                limit: Duration::from_secs(5),
            },
            "the daemon did not answer within 5s when told to add the region \
             0x100000000..=0x13fffffff (1 GiB): the connection was closed, restart the daemon \
             or allow more with VhostUserShare::with_time_limit",
        ),
    ];
    for (error, text) in cases {
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn the_error_is_small_enough_to_return() {
    assert!(size_of::<Error>() <= 64, "{}", size_of::<Error>());
}
