//! The address space with listeners that play by a script.

use std::sync::{Arc, Barrier, Mutex};

use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use guest_memory_shm::*;
use vm_memory::{GuestAddress, GuestMemoryAtomic};

use crate::support::{ToldAll, attach_as, chain};

mod inside;
mod listeners;
mod order;
mod panics;
mod panics_around;
mod published;

const MIB: u64 = 1 << 20;

/// What was said, by whom: `("a", "update 0 4")`.
type Said = Arc<Mutex<Vec<(&'static str, String)>>>;

struct Script {
    name: &'static str,
    said: Said,
    /// What the n-th update answers; all others are taken.
    answers: Vec<(usize, fn() -> ListenerError)>,
    updates: usize,
    limit: usize,
    waits: bool,
    held: Vec<u64>,
    /// What readers see while it is told.
    readers: Option<PublishedMemory>,
}

fn mib(memory: &GuestMemoryShm) -> Vec<u64> {
    memory
        .iter()
        .map(|region| region.range().start_addr().0 / MIB)
        .collect()
}

impl MemoryListener for Script {
    fn check(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        if memory.num_regions() > self.limit {
            return Err(ListenerError::refused("too many"));
        }
        Ok(())
    }

    fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        self.updates += 1;
        let mut what = format!("{:?}", mib(memory));
        if let Some(readers) = &self.readers {
            what += &format!(" while readers see {:?}", mib(&readers.memory()));
        }
        self.said.lock().unwrap().push((self.name, what));
        if let Some((_, error)) = self.answers.iter().find(|(at, _)| *at == self.updates) {
            return Err(error());
        }
        self.held = mib(memory);
        Ok(())
    }

    fn waits(&self) -> bool {
        self.waits
    }
}

fn script(name: &'static str, said: &Said) -> Script {
    Script {
        name,
        said: said.clone(),
        answers: Vec::new(),
        updates: 0,
        limit: usize::MAX,
        waits: false,
        held: Vec::new(),
        readers: None,
    }
}

fn refused() -> ListenerError {
    ListenerError::refused("no room")
}

fn away() -> ListenerError {
    ListenerError::away("it died")
}

fn space() -> AddressSpace {
    AddressSpace::new(GuestMemoryShm::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap())
}

fn region(at: u64) -> GuestRegionShm {
    GuestRegionShm::new((GuestAddress(at * MIB), MIB), &RamOptions::new()).unwrap()
}

fn present(space: &AddressSpace) -> Vec<u64> {
    mib(&space.published().memory())
}

fn said(said: &Said) -> Vec<(&'static str, String)> {
    std::mem::take(&mut said.lock().unwrap())
}

fn held<L: MemoryListener>(
    space: &AddressSpace,
    id: &ListenerId<L>,
    of: fn(&L) -> &[u64],
) -> Vec<u64> {
    space
        .with_listener(id, |listener| of(listener).to_vec())
        .unwrap()
}

fn all(script: &Script) -> &[u64] {
    &script.held
}
