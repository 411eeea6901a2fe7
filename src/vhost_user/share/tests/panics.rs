//! Sinks that panic.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;

fn panics<T>(work: impl FnOnce() -> T) {
    assert!(catch_unwind(AssertUnwindSafe(work)).is_err());
}

#[test]
fn one_that_could_not_ask_for_acknowledgements_is_not_spoken_to() {
    let mut share = share(8, Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS);
    share.connection_mut().panics = Some(Panics::AtAcks);
    panics(|| share.update_table(&table(&[0])));
    let broken = share.update_table(&table(&[0])).unwrap_err();
    assert!(matches!(broken, ShareError::Broken { .. }), "{broken}");
    assert_eq!(share.connection().said, []);

    let connection = Script {
        slots: 8,
        ..Script::default()
    };
    share.reconnect(
        connection,
        Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS,
    );
    share.update_table(&table(&[0])).unwrap();
    assert_eq!(share.connection().said[0], Said::Acks);
}

#[test]
fn one_that_cannot_say_how_to_hang_up_leaves_the_connection_before() {
    let mut share = share(8, Features::CONFIGURE_MEM_SLOTS);
    share.update_table(&table(&[0])).unwrap();
    let connection = Script {
        panics: Some(Panics::AtHangUp),
        ..Script::default()
    };
    panics(|| share.reconnect(connection, Features::empty()));
    // One region is added, by the connection that was there.
    share.update_table(&table(&[0, 10])).unwrap();
    assert!(share.connection().said.contains(&Said::Add(10)));
    assert_eq!(share.connection().held, [0, 10]);
    assert_eq!(starts(share.table()), [0, 10]);
}
