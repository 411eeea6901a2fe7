//! The driver against a daemon that is not ours.

use super::data::{driver, ram, session, start};
use super::*;
use crate::support::StorageDaemon;
use std::os::unix::net::UnixStream;

#[test]
fn qemu_storage_daemon_reads_and_writes_through_the_driver() {
    const SIZE: usize = 256 * 1024;
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, pattern(SIZE, 0x11)).unwrap();
    let Some(daemon) = StorageDaemon::start(&image, None) else {
        return;
    };

    let memory = ram(&[(0, 1 << 20), (1 << 30, 1 << 20)]);
    let wanted = VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ;
    let mut session = session(UnixStream::connect(&daemon.socket).unwrap(), &memory);
    assert!(session.protocol_features().contains(wanted));
    let sectors = (SIZE as u64 / 512).to_le_bytes();
    assert_eq!(session.config(0, 8).unwrap(), sectors);

    let mut driver = driver(&memory, RINGS, 128);
    start(&mut session, 0, &driver);
    // The whole disk in 16 requests at once, read into one region and written from the other.
    let piece = |start: u64, index: u64| [(GuestAddress(start + index * 16384), 16384)];
    for index in 0..16 {
        driver
            .submit_read(index * 32, &piece(0x80000, index))
            .unwrap();
    }
    driver.wait_all().unwrap();
    let mut back = vec![0; SIZE];
    memory.read_slice(&mut back, GuestAddress(0x80000)).unwrap();
    assert_eq!(back, pattern(SIZE, 0x11));
    let data = pattern(SIZE, 0x77);
    memory.write_slice(&data, GuestAddress(1 << 30)).unwrap();
    for index in 0..16 {
        driver
            .submit_write(index * 32, &piece(1 << 30, index))
            .unwrap();
    }
    driver.wait_all().unwrap();
    driver.flush().unwrap();
    assert_eq!(std::fs::read(&image).unwrap(), data);

    let error = driver
        .read(SIZE as u64 / 512, &[(GuestAddress(0x80000), 512)])
        .unwrap_err();
    assert!(
        matches!(error, BlkError::Status { status: 1, .. }),
        "{error}"
    );
    assert_eq!(session.stop_ring(0).unwrap(), 34);
}
