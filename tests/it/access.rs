//! The inherent accesses of `GuestMemoryShm` against vm-memory's `Bytes`, and both against a model
//! of a byte per address.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;

use guest_memory_shm::{GuestMemoryShm, GuestRange, RamOptions};
use proptest::prelude::*;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::guest_memory::Error as AccessError;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

use crate::model::runner;

type Tracked = GuestMemoryShm<AtomicBitmap>;

/// A bit for each byte, so that marks are compared to the byte.
fn bit_per_byte(range: GuestRange) -> AtomicBitmap {
    AtomicBitmap::new(range.size() as usize, NonZeroUsize::MIN)
}

fn memory(ranges: &[(u64, u64)]) -> Tracked {
    let ranges = ranges.iter().map(|(at, size)| (GuestAddress(*at), *size));
    GuestMemoryShm::<()>::builder()
        .with_bitmap(bit_per_byte)
        .add_ram(RamOptions::new(), ranges)
        .build()
        .unwrap()
}

/// What there is at each address, which of it was written, and what the answers must be.
#[derive(Default)]
struct Model {
    bytes: BTreeMap<u64, u8>,
    dirty: BTreeSet<u64>,
}

impl Model {
    fn new(ranges: &[(u64, u64)]) -> Self {
        let addresses = ranges.iter().flat_map(|(at, size)| *at..at + size);
        Self {
            bytes: addresses.map(|addr| (addr, 0)).collect(),
            dirty: BTreeSet::new(),
        }
    }

    /// Does something with each byte up to the first hole.
    fn each(
        &mut self,
        addr: GuestAddress,
        expected: usize,
        mut access: impl FnMut(&mut Self, usize, u64),
    ) -> Result<(), AccessError> {
        for completed in 0..expected {
            match addr.0.checked_add(completed as u64) {
                Some(at) if self.bytes.contains_key(&at) => access(self, completed, at),
                _ if completed == 0 => return Err(AccessError::InvalidGuestAddress(addr)),
                _ => {
                    return Err(AccessError::PartialBuffer {
                        expected,
                        completed,
                    });
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, buf: &[u8], addr: GuestAddress) -> Result<(), AccessError> {
        self.each(addr, buf.len(), |model, n, at| {
            model.bytes.insert(at, buf[n]);
            model.dirty.insert(at);
        })
    }

    fn read(&mut self, buf: &mut [u8], addr: GuestAddress) -> Result<(), AccessError> {
        self.each(addr, buf.len(), |model, n, at| buf[n] = model.bytes[&at])
    }
}

fn outcome<T: std::fmt::Debug>(result: Result<T, AccessError>) -> String {
    format!("{result:?}")
}

/// Every byte and every mark, with their addresses.
fn contents(memory: &Tracked) -> (BTreeMap<u64, u8>, BTreeSet<u64>) {
    let (mut bytes, mut dirty) = (BTreeMap::new(), BTreeSet::new());
    for region in memory.iter() {
        let range = region.range();
        let mut content = vec![0; range.size() as usize];
        region
            .read_slice(&mut content, vm_memory::MemoryRegionAddress(0))
            .unwrap();
        let addresses = range.start_addr().0..=range.last_addr().0;
        for (at, (addr, byte)) in addresses.zip(content).enumerate() {
            bytes.insert(addr, byte);
            if region.dirty_bitmap().is_bit_set(at) {
                dirty.insert(addr);
            }
        }
    }
    (bytes, dirty)
}

/// Three memories that are told the same: through the methods, through the trait, in the model.
struct Three {
    inherent: Tracked,
    by_trait: Tracked,
    model: Model,
}

impl Three {
    fn new(ranges: &[(u64, u64)]) -> Self {
        Self {
            inherent: memory(ranges),
            by_trait: memory(ranges),
            model: Model::new(ranges),
        }
    }

    fn write_slice(&mut self, buf: &[u8], addr: GuestAddress) -> String {
        let answer = outcome(self.inherent.write_slice(buf, addr));
        let by_trait = outcome(Bytes::write_slice(&self.by_trait, buf, addr));
        let model = outcome(self.model.write(buf, addr));
        assert_eq!([&answer, &by_trait], [&model; 2], "{addr:?} {}", buf.len());
        answer
    }

    fn read_slice(&mut self, len: usize, addr: GuestAddress) -> String {
        // What is not read must stay.
        let mut bufs = [vec![0xee; len], vec![0xee; len], vec![0xee; len]];
        let [inherent, by_trait, model] = &mut bufs;
        let answer = outcome(self.inherent.read_slice(inherent, addr));
        let from_trait = outcome(Bytes::read_slice(&self.by_trait, by_trait, addr));
        let from_model = outcome(self.model.read(model, addr));
        assert_eq!([&answer, &from_trait], [&from_model; 2], "{addr:?} {len}");
        assert!(bufs[0] == bufs[2] && bufs[1] == bufs[2], "{addr:?} {len}");
        answer
    }

    fn object<T: ByteValued + std::fmt::Debug>(&mut self, val: T, addr: GuestAddress) {
        let answer = outcome(self.inherent.write_obj(val, addr));
        let by_trait = outcome(Bytes::write_obj(&self.by_trait, val, addr));
        let model = outcome(self.model.write(val.as_slice(), addr));
        assert_eq!([answer, by_trait], [&*model; 2], "{addr:?} {val:?}");
        let answer = outcome(self.inherent.read_obj::<T>(addr));
        let by_trait = outcome(Bytes::read_obj::<T>(&self.by_trait, addr));
        let mut read = T::zeroed();
        let model = self.model.read(read.as_mut_slice(), addr);
        let model = outcome(model.map(|()| read));
        assert_eq!([answer, by_trait], [&*model; 2], "{addr:?} {val:?}");
    }

    fn objects(&mut self, seed: u64, addr: GuestAddress) {
        self.object(seed as u8, addr);
        self.object(seed as u16, addr);
        self.object(seed as u32, addr);
        self.object(seed, addr);
        self.object([seed as u8; 7], addr);
        self.object([seed as u32; 3], addr);
        self.object(u128::from(seed) << 60, addr);
        self.object([seed; 9], addr);
        self.object([0u64; 0], addr);
    }

    fn assert_same(&self) {
        let (bytes, dirty) = contents(&self.inherent);
        assert!(bytes == self.model.bytes && dirty == self.model.dirty);
        let (bytes, dirty) = contents(&self.by_trait);
        assert!(bytes == self.model.bytes && dirty == self.model.dirty);
    }
}

const PAGE: u64 = 4096;
/// The last range that can be had: the byte after it has an address.
const LAST: u64 = u64::MAX - 2 * PAGE + 1;

/// Regions next to each other and with holes between, near 0 and near the end, so far apart that
/// some share a bucket of the index.
fn layouts() -> [Vec<(u64, u64)>; 4] {
    [
        vec![(0, PAGE)],
        vec![(PAGE, PAGE), (2 * PAGE, 2 * PAGE), (5 * PAGE, PAGE)],
        vec![(3 * PAGE, PAGE), (4 * PAGE, PAGE), (LAST, PAGE)],
        vec![
            (0, PAGE),
            (PAGE, PAGE),
            (1 << 62, PAGE),
            ((1 << 62) + PAGE, PAGE),
        ],
    ]
}

fn edges(ranges: &[(u64, u64)]) -> Vec<u64> {
    let ends = ranges.iter().flat_map(|(at, size)| [*at, at + size]);
    ends.chain([0, 1 << 40, u64::MAX]).collect()
}

#[test]
fn all_answers_and_marks_at_every_edge_are_those_of_the_trait() {
    for ranges in layouts() {
        let mut three = Three::new(&ranges);
        for edge in edges(&ranges) {
            for delta in -17..=17 {
                let addr = GuestAddress(edge.wrapping_add_signed(delta));
                three.objects(addr.0.wrapping_mul(0x9e37_79b9_7f4a_7c15), addr);
                let long = if delta % 8 == 0 { [4096, 9000] } else { [0, 1] };
                for len in [2, 3, 8, 16, 17, 33].into_iter().chain(long) {
                    let bytes = vec![(addr.0 % 251) as u8 ^ len as u8; len];
                    three.write_slice(&bytes, addr);
                    three.read_slice(len, addr);
                }
            }
        }
        three.assert_same();
    }
}

#[test]
fn random_accesses_are_those_of_the_trait() {
    let (whole, partial, none) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let count = |answer: String| {
        let counter = match answer.as_str() {
            "Ok(())" => &whole,
            _ if answer.contains("PartialBuffer") => &partial,
            _ => &none,
        };
        counter.set(counter.get() + 1);
    };
    let access = (
        any::<prop::sample::Index>(),
        prop_oneof![4 => -40..40i64, 2 => -5000..5000i64, 1 => any::<i64>()],
        prop_oneof![4 => 0..40usize, 1 => 0..10_000usize],
        any::<u64>(),
    );
    let cases = (0..4usize, prop::collection::vec(access, 1..40));
    let result = runner(40).run(&cases, |(layout, accesses)| {
        let ranges = &layouts()[layout];
        let mut three = Three::new(ranges);
        for (edge, delta, len, seed) in accesses {
            let addr = GuestAddress(edge.get(&edges(ranges)).wrapping_add_signed(delta));
            let bytes: Vec<u8> = (0..len).map(|n| (seed >> (n % 57)) as u8).collect();
            count(three.write_slice(&bytes, addr));
            count(three.read_slice(len, addr));
            three.objects(seed, addr);
        }
        three.assert_same();
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    // The control: the accesses hit, miss, and are cut off.
    let counts = [whole.get(), partial.get(), none.get()];
    assert!(counts.iter().all(|count| *count >= 40), "{counts:?}");
}

#[test]
fn without_regions_there_is_nothing_to_access() {
    let memory = GuestMemoryShm::<()>::new();
    for addr in [0, PAGE, u64::MAX] {
        let addr = GuestAddress(addr);
        let refused = memory.write_obj(1u8, addr);
        assert!(matches!(refused, Err(AccessError::InvalidGuestAddress(at)) if at == addr));
        let refused = memory.read_obj::<u8>(addr);
        assert!(matches!(refused, Err(AccessError::InvalidGuestAddress(at)) if at == addr));
        assert!(memory.write_slice(&[], addr).is_ok());
        assert!(memory.read_slice(&mut [], addr).is_ok());
    }
}
