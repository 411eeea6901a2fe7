//! A frontend that sends anything to the mock daemon.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use guest_memory_shm::mock::MockDaemon;
use guest_memory_shm::{GuestMemoryShm, SessionOptions, VhostUserSession};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::GuestAddress;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::Random;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

/// All requests but those that start a ring: a device that reads a ring may touch what is beyond
/// the end of a file, which the mock does not look at, as it says.
const REQUESTS: [u32; 19] = [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 15, 16, 17, 24, 36, 37, 38, 41, 99,
];
const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// Has the mock hear anything; then it serves a good frontend.
pub(super) fn converse(mut random: Random) {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    for _ in 0..2 {
        let stream = daemon.connect().unwrap();
        // It may well hang up.
        let _ = talk(&stream, &mut random);
        drop(stream);
    }
    let options = SessionOptions::new(0).with_deadline(PATIENCE);
    let mut session = VhostUserSession::on_socket(daemon.connect().unwrap(), options).unwrap();
    let ranges = [
        (GuestAddress(0), MIB as usize),
        (GuestAddress(4 * MIB), MIB as usize),
    ];
    let memory = GuestMemoryShm::<()>::from_ranges(&ranges).unwrap();
    session.update_memory(&memory).unwrap();
    assert_eq!(daemon.table().len(), 2);
}

fn talk(mut stream: &UnixStream, random: &mut Random) -> std::io::Result<()> {
    // For answers that do not come.
    stream.set_read_timeout(Some(Duration::from_millis(1)))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    if random.below(4) > 0 {
        // As far as a good one would go: what is sent afterwards is taken more seriously.
        for (request, value) in [(3, None), (2, Some(1 << 32 | 1 << 30)), (16, Some(0x8009))] {
            let body = value.map(u64::to_ne_bytes);
            send(
                stream,
                request,
                1,
                body.as_ref().map_or(&[], |body| &body[..]),
                &[],
            )?;
        }
    }
    let file = memfd_create("theirs", MFdFlags::MFD_CLOEXEC)?;
    let file = std::fs::File::from(file);
    file.set_len(64 * MIB)?;
    for _ in 0..random.below(30) {
        let request = random.of(&REQUESTS);
        let regions = match request {
            SET_MEM_TABLE => random.below(10),
            ADD_MEM_REG | REM_MEM_REG => 1,
            _ => 0,
        };
        let mut body: Vec<u8> = match request {
            SET_MEM_TABLE => [regions as u32, 0].map(u32::to_ne_bytes).concat(),
            ADD_MEM_REG | REM_MEM_REG => vec![0; 8],
            _ => {
                let words = random.below(5);
                (0..words)
                    .flat_map(|_| random.word().to_ne_bytes())
                    .collect()
            }
        };
        for _ in 0..regions {
            let place = random.below(8) * 2 * MIB;
            let mut words = [place, MIB, (1 << 40) + place, 0];
            if random.below(4) == 0 {
                words[random.below(4) as usize] = random.word();
            }
            body.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        }
        let mut fds = vec![file.as_raw_fd(); regions as usize];
        match random.below(12) {
            0 => body = random.bytes(400),
            1 => fds.clear(),
            2 => fds = vec![file.as_raw_fd(); random.below(34) as usize],
            _ => {}
        }
        let flags = match random.below(12) {
            0 => random.word() as u32,
            even if even % 2 == 0 => 1,
            _ => 1 | 8,
        };
        send(stream, request, flags, &body, &fds)?;
        match random.below(30) {
            0 => stream.write_all(&random.bytes(64))?,
            1 => return Ok(()),
            _ => {}
        }
        // Answers are not waited for, but taken.
        let _ = stream.read(&mut [0; 4096]);
    }
    Ok(())
}

fn send(
    stream: &UnixStream,
    request: u32,
    flags: u32,
    body: &[u8],
    fds: &[i32],
) -> std::io::Result<()> {
    let header = [request, flags, body.len() as u32].map(u32::to_ne_bytes);
    stream.send_with_fds(&[header.as_flattened(), body], fds)?;
    Ok(())
}
