//! Hundreds of daemons.

use std::io::{self, Read, Write};
use std::sync::{Arc, Barrier};
use std::thread;

use super::*;
use crate::support::may_have_descriptors;

const COUNT: usize = 300;
/// Where a region is that one of them refuses.
const REFUSED: u64 = 8 * MIB;

/// A daemon that takes everything but that region, if it `refuses`; once all have been told of one
/// at 4 MiB.
fn serve(mut socket: UnixStream, refuses: bool, all: &Barrier) -> io::Result<()> {
    const ADD_MEM_REG: u32 = 37;
    let mut header = [0; 12];
    loop {
        socket.read_exact(&mut header)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(8) as usize];
        socket.read_exact(&mut body)?;
        let start = body.get(8..16).map(|start| start.try_into().unwrap());
        let start = start.map_or(0, u64::from_ne_bytes);
        let answer: u64 = match (word(0), start / MIB) {
            (1 | 36, _) => 8,
            (ADD_MEM_REG, 4) => {
                all.wait();
                0
            }
            (ADD_MEM_REG, _) => u64::from(refuses && start == REFUSED),
            _ => 0,
        };
        let header = [word(0), 1 | 4, 8].map(u32::to_ne_bytes);
        socket.write_all(&[header.as_flattened(), &answer.to_ne_bytes()].concat())?;
    }
}

#[test]
fn hundreds_of_daemons_are_told_side_by_side_and_put_back() {
    if !may_have_descriptors(4096) {
        return;
    }
    let (space, all) = (space(), Arc::new(Barrier::new(COUNT)));
    let start = |at| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let all = Arc::clone(&all);
        let thread = thread::Builder::new().stack_size(128 << 10);
        let thread = thread.spawn(move || serve(theirs, at == COUNT / 2, &all));
        let share = Share::new(ours, Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS);
        let share = share.unwrap().with_deadline(PATIENCE);
        let id = space.attach(format!("daemon {at}"), share).unwrap();
        (id, thread.unwrap())
    };
    let daemons: Vec<_> = (0..COUNT).map(start).collect();
    let check = || {
        let table = space.published().memory().memory_table();
        for (id, _) in &daemons {
            let held = space.with_listener(id, |share| share.table().clone());
            assert_eq!(held.unwrap(), table);
        }
    };
    // None answers before the last one is told.
    space.insert(region(4)).told_all();
    check();
    let error = crate::support::chain(&space.insert(region(8)).unwrap_err());
    assert!(error.contains("\"daemon 150\" refuses"), "{error}");
    let stale = |listener: &guest_memory_shm::ListenerStatus| listener.stale().is_some();
    assert!(!space.listeners().unwrap().iter().any(stale));
    check();
    space.remove((GuestAddress(4 * MIB), MIB)).told_all();
    check();
    drop(space);
    for (_, thread) in daemons {
        // It was hung up on.
        thread.join().unwrap().unwrap_err();
    }
}
