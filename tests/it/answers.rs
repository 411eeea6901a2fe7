//! What a memory answers to all calls of vm-memory's traits, in a form that can be compared.

use std::fmt::{Debug, Display};
use std::sync::atomic::Ordering;

use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

/// Answers to calls, to be compared.
#[derive(Default, Debug, PartialEq)]
pub(crate) struct Answers(Vec<(&'static str, String)>);

impl Answers {
    fn note(&mut self, call: &'static str, answer: impl Debug) {
        self.0.push((call, format!("{answer:?}")));
    }

    /// An answer that can be an error, which is compared by variant, values and text.
    fn note_result<T: Debug>(
        &mut self,
        call: &'static str,
        answer: Result<T, impl Debug + Display>,
    ) {
        let answer = answer.map_err(|error| format!("{error:?}, {error}"));
        self.note(call, answer);
    }
}

/// All that can be asked about an address without changing the memory.
pub(crate) fn ask<M: GuestMemoryBackend>(memory: &M, addr: GuestAddress, count: usize) -> Answers {
    let mut answers = Answers::default();
    let place = |region: &M::R| (region.start_addr(), region.len(), region.last_addr());
    // Host addresses differ; what must agree is where they lie in the region.
    let host = |ptr: *mut u8, at: GuestAddress| {
        let region = memory.find_region(at).expect("it has a host address");
        let start = region
            .get_host_address(MemoryRegionAddress(0))
            .expect("it has pages");
        (region.start_addr(), ptr.addr() - start.addr())
    };
    answers.note("find_region", memory.find_region(addr).map(place));
    let found = memory.to_region_addr(addr);
    answers.note(
        "to_region_addr",
        found.map(|(region, at)| (place(region), at)),
    );
    answers.note("address_in_range", memory.address_in_range(addr));
    answers.note("check_address", memory.check_address(addr));
    answers.note("check_range", memory.check_range(addr, count));
    answers.note("checked_offset", memory.checked_offset(addr, count));
    answers.note("last_addr", memory.last_addr());
    answers.note("num_regions", memory.num_regions());
    let ptr = memory.get_host_address(addr);
    answers.note_result("get_host_address", ptr.map(|ptr| host(ptr, addr)));
    let slice = memory.get_slice(addr, count);
    let slice = slice.map(|slice| (slice.len(), host(slice.ptr_guard_mut().as_ptr(), addr)));
    answers.note_result("get_slice", slice);
    let mut at = addr;
    for slice in GuestMemoryBackend::get_slices(memory, addr, count) {
        let slice = slice.map(|slice| {
            let place = (slice.len(), host(slice.ptr_guard_mut().as_ptr(), at));
            at = GuestAddress(at.0.wrapping_add(slice.len() as u64));
            place
        });
        answers.note_result("get_slices", slice);
    }
    if let Some((region, offset)) = memory.to_region_addr(addr) {
        ask_region(region, offset, count, &mut answers);
    }
    answers
}

fn ask_region<R: GuestMemoryRegion>(
    region: &R,
    offset: MemoryRegionAddress,
    count: usize,
    answers: &mut Answers,
) {
    for at in [
        offset,
        MemoryRegionAddress(region.len()),
        MemoryRegionAddress(u64::MAX),
    ] {
        answers.note("region.check_address", region.check_address(at));
        answers.note("region.checked_offset", region.checked_offset(at, count));
        let start = region
            .get_host_address(MemoryRegionAddress(0))
            .expect("it has pages");
        let ptr = region.get_host_address(at);
        answers.note_result(
            "region.get_host_address",
            ptr.map(|ptr| ptr.addr() - start.addr()),
        );
        for count in [0, 1, count] {
            let slice = region.get_slice(at, count);
            answers.note_result("region.get_slice", slice.map(|slice| slice.len()));
        }
    }
    let all = region.as_volatile_slice();
    answers.note_result("region.as_volatile_slice", all.map(|slice| slice.len()));
}

/// All that reads or writes at an address.
pub(crate) fn read_and_write<M: GuestMemoryBackend>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
) -> Answers {
    let mut answers = Answers::default();
    // Buffers have to exist, so they are no longer than any two regions.
    let len = count.min(40_000);
    let mut pattern = (addr.0 ^ count as u64) | 1;
    let mut bytes: Vec<u8> = Vec::with_capacity(len);
    bytes.resize_with(len, || {
        pattern = pattern
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (pattern >> 56) as u8
    });
    let mut buffer = vec![0xee; len];

    answers.note_result("read", memory.read(&mut buffer, addr));
    answers.note("read bytes", &buffer);
    answers.note_result("write", memory.write(&bytes, addr));
    buffer.fill(0xee);
    answers.note_result("read_slice", memory.read_slice(&mut buffer, addr));
    answers.note("read_slice bytes", &buffer);
    bytes.reverse();
    answers.note_result("write_slice", memory.write_slice(&bytes, addr));
    answers.note_result("read_obj", memory.read_obj::<u64>(addr));
    answers.note_result(
        "write_obj",
        memory.write_obj(0x0123_4567_89ab_cdef_u64, addr),
    );
    answers.note_result("read_obj, 16 bytes", memory.read_obj::<u128>(addr));
    atomics(memory, addr, 0x5a_u8, &mut answers);
    atomics(memory, addr, 0x5a5a_u16, &mut answers);
    atomics(memory, addr, 0x5a5a_5a5a_u32, &mut answers);
    atomics(memory, addr, 0x5a5a_5a5a_5a5a_5a5a_u64, &mut answers);

    // A source that is shorter than what is asked for, and one that is not.
    for source_len in [len / 2, len] {
        let mut source = &bytes[..source_len];
        let taken = memory.read_volatile_from(addr, &mut source, count);
        answers.note_result("read_volatile_from", taken);
        answers.note("left in the source", source.len());
        let mut source = &bytes[..source_len];
        let taken = memory.read_exact_volatile_from(addr, &mut source, count);
        answers.note_result("read_exact_volatile_from", taken);
    }
    let mut sink = Vec::new();
    answers.note_result(
        "write_volatile_to",
        memory.write_volatile_to(addr, &mut sink, count),
    );
    answers.note("sink", &sink);
    let mut sink = &mut buffer[..];
    let given = memory.write_all_volatile_to(addr, &mut sink, count);
    answers.note_result("write_all_volatile_to", given);
    answers.note("left in the sink", sink.len());
    answers.note("buffer", &buffer);
    answers
}

fn atomics<M: GuestMemoryBackend, T: AtomicAccess + Debug>(
    memory: &M,
    addr: GuestAddress,
    value: T,
    answers: &mut Answers,
) {
    answers.note_result("load", memory.load::<T>(addr, Ordering::Acquire));
    answers.note_result("store", memory.store(value, addr, Ordering::Release));
    answers.note_result("load again", memory.load::<T>(addr, Ordering::Acquire));
}
