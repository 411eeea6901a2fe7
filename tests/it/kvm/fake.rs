//! A hypervisor that runs no guest: it keeps slots as KVM does, and fails as it is told.
#![expect(
    unsafe_code,
    reason = "a hypervisor promises what becomes of the memory that it is given"
)]

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::panic::panic_any;
use std::sync::{Arc, Mutex, PoisonError};

use guest_memory_shm::{HypervisorVm, LogBuffer, SlotFlags, SlotMapping};
use nix::libc;

use super::PAGE;
use crate::proc::maps_in;

/// The four calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Set,
    Remove,
    Log,
    Clear,
}

/// How a call fails. Nothing is done then.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    Errno(i32),
    Panics,
    /// It is done, and then it panics with something whose drop panics, too.
    PanicsAfterwards,
}

pub(super) struct Fake {
    state: Mutex<State>,
    limit: u32,
}

#[derive(Default)]
struct State {
    slots: BTreeMap<u32, (SlotMapping, Vec<u64>)>,
    calls: Vec<(Call, u32)>,
    faults: VecDeque<(Call, Fault)>,
    /// The next log comes in another buffer, with room for so many pages.
    other_buffer: Option<u64>,
}

/// A panic's payload that panics.
struct Grenade;

impl Drop for Grenade {
    fn drop(&mut self) {
        panic!("a payload was dropped");
    }
}

impl Fake {
    pub(super) fn new(limit: u32) -> Arc<Self> {
        let state = Mutex::default();
        Arc::new(Self { state, limit })
    }

    /// The next call of this kind fails, after those that were told to before.
    pub(super) fn fail(&self, call: Call, fault: Fault) {
        self.with(|state| state.faults.push_back((call, fault)));
    }

    /// The next log comes in a buffer of the hypervisor's own, with room for so many pages.
    pub(super) fn exchange_buffer(&self, pages: u64) {
        self.with(|state| state.other_buffer = Some(pages));
    }

    /// The numbers and guest addresses of the slots. Asserts that their memory is mapped.
    pub(super) fn slots(&self) -> Vec<(u32, u64)> {
        self.with(|state| {
            let slots = state.slots.values();
            slots
                .map(|(slot, _)| {
                    let host = slot.host_addr().addr() as u64;
                    let maps = maps_in(host..host + slot.range().size());
                    assert!(
                        maps.iter().any(|line| line.path.contains("memfd")),
                        "{slot:?}"
                    );
                    (slot.number(), slot.range().start_addr().0)
                })
                .collect()
        })
    }

    /// What it was asked since it was last asked this.
    pub(super) fn calls(&self) -> Vec<(Call, u32)> {
        self.with(|state| std::mem::take(&mut state.calls))
    }

    /// The guest writes these pages, by their bits.
    pub(super) fn guest_writes(&self, number: u32, word: u64) {
        self.with(|state| {
            let (slot, log) = state.slots.get_mut(&number).expect("there is the slot");
            if slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES) {
                log[0] |= word;
            }
        });
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes a call and does it, or fails.
    fn call<T>(
        &self,
        call: Call,
        number: u32,
        work: impl FnOnce(&mut State) -> io::Result<T>,
    ) -> io::Result<T> {
        let fault = self.with(|state| {
            state.calls.push((call, number));
            let at = state.faults.iter().position(|(other, _)| *other == call)?;
            state.faults.remove(at).map(|(_, fault)| fault)
        });
        match fault {
            None => self.with(work),
            Some(Fault::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Fault::Panics) => panic!("the hypervisor is told to panic"),
            Some(Fault::PanicsAfterwards) => {
                let _ = self.with(work);
                panic_any(Grenade)
            }
        }
    }
}

// SAFETY: it never looks at the memory.
unsafe impl HypervisorVm for Fake {
    unsafe fn set_slot(&self, slot: &SlotMapping) -> io::Result<()> {
        self.call(Call::Set, slot.number(), |state| {
            let mut others = state.slots.values().map(|(other, _)| other);
            let overlaps = |other: &SlotMapping| {
                other.number() != slot.number() && other.range().overlaps(&slot.range())
            };
            if others.any(overlaps) {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            let words = (slot.range().size() / PAGE).div_ceil(64);
            let log = vec![0; words.try_into().unwrap()];
            state.slots.insert(slot.number(), (*slot, log));
            Ok(())
        })
    }

    fn remove_slot(&self, slot: &SlotMapping) -> io::Result<()> {
        self.call(Call::Remove, slot.number(), |state| {
            let removed = state.slots.remove(&slot.number());
            removed
                .map(drop)
                .ok_or(io::Error::from_raw_os_error(libc::EINVAL))
        })
    }

    fn dirty_log(&self, slot: &SlotMapping, log: &mut LogBuffer) -> io::Result<()> {
        self.call(Call::Log, slot.number(), |state| {
            let slot = state.slots.get_mut(&slot.number());
            let (_, words) = slot.ok_or(io::Error::from_raw_os_error(libc::ENOENT))?;
            if let Some(pages) = state.other_buffer.take() {
                *log = LogBuffer::new(pages).unwrap();
                log.words_mut().fill(1 << 63);
                return Ok(());
            }
            log.words_mut().copy_from_slice(words);
            words.fill(0);
            Ok(())
        })
    }

    fn clear_dirty_log(&self, slot: &SlotMapping, _first: u64, _bits: &[u64]) -> io::Result<()> {
        self.call(Call::Clear, slot.number(), |_| Ok(()))
    }

    fn max_slots(&self) -> u32 {
        self.limit
    }
}
