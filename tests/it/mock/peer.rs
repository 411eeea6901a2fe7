//! The driver against a daemon that is not ours.

use super::*;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

/// Ended with the test, whether it passes or not.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_storage_daemon_reads_and_writes_through_the_driver() {
    const DISK: usize = 256 * 1024;
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, pattern(DISK, 0x11)).unwrap();
    let socket = directory.path().join("blk.sock");
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on",
        socket.display()
    );
    let blockdev = format!("driver=file,node-name=f,filename={}", image.display());
    // Its monitor greets after the export is there: no need to poll for the socket.
    let spawned = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &blockdev, "--export", &export])
        .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut daemon = match spawned {
        Ok(child) => Process(child),
        Err(error) => {
            assert!(
                std::env::var_os("REQUIRE_PEERS").is_none(),
                "REQUIRE_PEERS is set, but qemu-storage-daemon cannot be run: {error}"
            );
            eprintln!("skipped: qemu-storage-daemon cannot be run: {error}");
            return;
        }
    };
    let mut greeting = String::new();
    let output = daemon.0.stdout.take().unwrap();
    BufReader::new(output).read_line(&mut greeting).unwrap();
    assert!(greeting.contains("QMP"), "{greeting}");

    let memory = guest(&[(0, 1 << 20), (1 << 30, 1 << 20)]);
    let wanted = VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ;
    let mut frontend = Frontend::from_stream(UnixStream::connect(&socket).unwrap(), 1);
    let device = BlkDevice::negotiate(&mut frontend, wanted).unwrap();
    println!("{device:?}");
    assert_eq!(device.protocol_features(), wanted);
    assert_eq!(device.capacity(), Some(DISK as u64));
    assert_eq!(device.features() & (1 << 32 | 1 << 30), 1 << 32 | 1 << 30);
    frontend.set_mem_table(&infos(&memory)).unwrap();

    let mut driver = started(&memory, &mut frontend, &device, 128);
    // The whole disk in 16 requests at once, read into one region and written from the other.
    let piece = |start: u64, index: u64| [(GuestAddress(start + index * 16384), 16384)];
    for index in 0..16 {
        driver
            .submit_read(index * 32, &piece(0x80000, index))
            .unwrap();
    }
    driver.wait_all().unwrap();
    let mut back = vec![0; DISK];
    memory.read_slice(&mut back, GuestAddress(0x80000)).unwrap();
    assert_eq!(back, pattern(DISK, 0x11));
    let data = pattern(DISK, 0x77);
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
        .read(DISK as u64 / 512, &[(GuestAddress(0x80000), 512)])
        .unwrap_err();
    assert!(
        matches!(error, BlkError::Status { status: 1, .. }),
        "{error}"
    );
    assert_eq!(device.stop_queue(&mut frontend, 0).unwrap(), 34);
}
