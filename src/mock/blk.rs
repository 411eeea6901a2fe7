//! One virtio-blk request, from its descriptor chain to its status byte.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::disk::{RamDisk, SECTOR_SIZE};
use crate::logs;

/// Bytes of a request's header: type `u32`, reserved `u32`, sector `u64`, all little-endian.
pub(super) const REQUEST_HEADER_SIZE: usize = 16;

/// What GET_ID answers, padded with zeros to 20 bytes.
const SERIAL: &[u8] = b"guest-memory-shm";

/// Carries out the request of `chain` and returns how many bytes were written to its buffers.
///
/// Everything in the chain is the guest's word. A malformed request gets the status IOERR where
/// the chain has a place for a status, and is dropped where it has none.
pub(super) fn serve<M: GuestMemory>(
    chain: impl IntoIterator<Item = Descriptor>,
    memory: &M,
    disk: &RamDisk,
) -> u32 {
    let descriptors: Vec<Descriptor> = chain.into_iter().collect();
    // The iterator ends early where a link leads nowhere, a chain loops or a table is not mapped.
    let whole = descriptors.last().is_some_and(|last| !last.has_next());
    let mut output = Buffers::of(&descriptors, Direction::ToDriver);
    let mut input = Buffers::of(&descriptors, Direction::FromDriver);
    let Some(status_addr) = output.take_last_byte() else {
        logs::warn!("mock daemon: dropped a request without room for its status");
        return 0;
    };

    let (status, written) = match whole {
        true => carry_out(&mut input, &mut output, memory, disk),
        false => (VIRTIO_BLK_S_IOERR, 0),
    };
    // The three status values fit one byte.
    let status = status.to_le_bytes()[0];
    match memory.write_obj(status, status_addr) {
        Ok(()) => written.saturating_add(1),
        Err(error) => {
            logs::warn!("mock daemon: cannot write the status at {status_addr:?}: {error}");
            written
        }
    }
}

/// The status of the request, and the bytes written to the driver's buffers.
fn carry_out<M: GuestMemory>(
    input: &mut Buffers,
    output: &mut Buffers,
    memory: &M,
    disk: &RamDisk,
) -> (u32, u32) {
    let mut header = [0; REQUEST_HEADER_SIZE];
    if input.copy_to(memory, &mut header).is_none() {
        return (VIRTIO_BLK_S_IOERR, 0);
    }
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let mut bytes = disk.bytes();
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => {
            let length = output.remaining();
            let copied = sectors(&mut bytes, sector, length)
                .and_then(|part| output.copy_from(memory, part));
            match (copied, u32::try_from(length)) {
                (Some(()), Ok(written)) => (VIRTIO_BLK_S_OK, written),
                _ => (VIRTIO_BLK_S_IOERR, 0),
            }
        }
        VIRTIO_BLK_T_OUT => {
            let length = input.remaining();
            let copied =
                sectors(&mut bytes, sector, length).and_then(|part| input.copy_to(memory, part));
            match copied {
                Some(()) => (VIRTIO_BLK_S_OK, 0),
                None => (VIRTIO_BLK_S_IOERR, 0),
            }
        }
        VIRTIO_BLK_T_FLUSH => {
            disk.count_flush();
            (VIRTIO_BLK_S_OK, 0)
        }
        VIRTIO_BLK_T_GET_ID => {
            let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
            id[..SERIAL.len()].copy_from_slice(SERIAL);
            match output.copy_from(memory, &id) {
                Some(()) => (VIRTIO_BLK_S_OK, VIRTIO_BLK_ID_BYTES),
                None => (VIRTIO_BLK_S_IOERR, 0),
            }
        }
        _ => (VIRTIO_BLK_S_UNSUPP, 0),
    }
}

/// The disk's bytes for `length` bytes at `sector`; none if they are not whole sectors on it.
fn sectors(disk: &mut [u8], sector: u64, length: u64) -> Option<&mut [u8]> {
    if !length.is_multiple_of(SECTOR_SIZE) {
        return None;
    }
    let start = sector.checked_mul(SECTOR_SIZE)?;
    let end = usize::try_from(start.checked_add(length)?).ok()?;
    disk.get_mut(usize::try_from(start).ok()?..end)
}

enum Direction {
    FromDriver,
    ToDriver,
}

/// The buffers of one direction, consumed from the front.
struct Buffers {
    parts: Vec<(GuestAddress, u32)>,
}

impl Buffers {
    fn of(descriptors: &[Descriptor], direction: Direction) -> Buffers {
        let wanted = matches!(direction, Direction::ToDriver);
        Buffers {
            parts: descriptors
                .iter()
                .filter(|descriptor| descriptor.is_write_only() == wanted)
                .map(|descriptor| (descriptor.addr(), descriptor.len()))
                .collect(),
        }
    }

    fn remaining(&self) -> u64 {
        self.parts
            .iter()
            .map(|(_, length)| u64::from(*length))
            .sum()
    }

    /// Splits off the last byte, the place of the status, and returns its address.
    fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let (addr, length) = self.parts.iter_mut().rfind(|(_, length)| *length > 0)?;
        *length -= 1;
        Some(GuestAddress(addr.0.checked_add(u64::from(*length))?))
    }

    /// Copies guest memory to `target`, which it must fill.
    fn copy_to<M: GuestMemory>(&mut self, memory: &M, target: &mut [u8]) -> Option<()> {
        self.each(target.len(), |addr, range| {
            memory.read_slice(&mut target[range], addr).ok()
        })
    }

    /// Copies `source` to guest memory, which must have room for it.
    fn copy_from<M: GuestMemory>(&mut self, memory: &M, source: &[u8]) -> Option<()> {
        self.each(source.len(), |addr, range| {
            memory.write_slice(&source[range], addr).ok()
        })
    }

    /// Consumes `total` bytes and calls `copy` for each piece of them.
    fn each(
        &mut self,
        total: usize,
        mut copy: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Option<()>,
    ) -> Option<()> {
        let mut done = 0;
        for (addr, length) in &mut self.parts {
            if done == total {
                break;
            }
            let step = u32::try_from(total - done).map_or(*length, |left| left.min(*length));
            let end = done + step as usize;
            copy(*addr, done..end)?;
            *addr = GuestAddress(addr.0.checked_add(u64::from(step))?);
            *length -= step;
            done = end;
        }
        (done == total).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::GuestMemoryMmap;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const AVAIL: GuestAddress = GuestAddress(0x1000);
    const HEADER: u64 = 0x3000;
    const STATUS: u64 = 0x4000;
    const DATA: u64 = 0x5000;
    const UNTOUCHED: u8 = 0xaa;

    /// Serves a chain of (address, length, flags) and returns the status and the used length.
    fn serve_chain(kind: u32, sector: u64, chain: &[(u64, u32, u16)]) -> (u8, u32, Vec<u8>) {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        for (index, (addr, length, flags)) in chain.iter().enumerate() {
            let next = (index + 1) as u16;
            let raw = RawDescriptor::from(Descriptor::new(*addr, *length, *flags, next));
            memory
                .write_obj(raw, GuestAddress(16 * index as u64))
                .unwrap();
        }
        memory.write_obj(1u16, GuestAddress(AVAIL.0 + 2)).unwrap();
        memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        memory.write_slice(&[3; 1024], GuestAddress(DATA)).unwrap();

        let mut queue = Queue::new(16).unwrap();
        queue.try_set_avail_ring_address(AVAIL).unwrap();
        queue.set_ready(true);
        let chain = queue.iter(&memory).unwrap().next().unwrap();
        let disk = RamDisk::new((0..2048u32).map(|i| (i / 512) as u8).collect());
        let written = serve(chain, &memory, &disk);
        let mut data = vec![0; 1024];
        memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data.extend_from_slice(&disk.bytes());
        (
            memory.read_obj(GuestAddress(STATUS)).unwrap(),
            written,
            data,
        )
    }

    #[test]
    fn data_and_header_may_be_split_anywhere() {
        let (status, written, data) = serve_chain(
            VIRTIO_BLK_T_IN,
            1,
            &[
                (HEADER, 3, NEXT),
                (HEADER + 3, 13, NEXT),
                (DATA, 100, NEXT | WRITE),
                (DATA + 100, 924, NEXT | WRITE),
                (STATUS, 1, WRITE),
            ],
        );
        assert_eq!((status, written), (0, 1025));
        assert_eq!(data[..1024], [[1; 512], [2; 512]].concat());

        // The status may be the tail of the data's buffer.
        let (status, written, data) = serve_chain(
            VIRTIO_BLK_T_IN,
            3,
            &[
                (HEADER, 16, NEXT),
                (DATA, 512, NEXT | WRITE),
                (STATUS, 1, WRITE),
            ],
        );
        assert_eq!((status, written), (0, 513));
        assert_eq!(data[..1024], [[3; 512], [3; 512]].concat());

        let (status, written, data) = serve_chain(
            VIRTIO_BLK_T_OUT,
            2,
            &[(HEADER, 16, NEXT), (DATA, 512, NEXT), (STATUS, 1, WRITE)],
        );
        assert_eq!((status, written), (0, 1));
        assert_eq!(data[1024 + 1024..1024 + 1536], [3; 512]);
    }

    #[test]
    fn get_id_answers_twenty_bytes_and_other_requests_are_unsupported() {
        let chain = [
            (HEADER, 16, NEXT),
            (DATA, 20, NEXT | WRITE),
            (STATUS, 1, WRITE),
        ];
        let (status, written, data) = serve_chain(VIRTIO_BLK_T_GET_ID, 0, &chain);
        assert_eq!((status, written), (0, 21));
        assert_eq!(&data[..20], b"guest-memory-shm\0\0\0\0");
        let (status, written, _) = serve_chain(11, 0, &chain);
        assert_eq!((status, written), (2, 1));
    }

    #[test]
    fn malformed_requests_get_an_io_error_and_leave_the_disk_alone() {
        let header = (HEADER, 16, NEXT);
        let status_byte = (STATUS, 1, WRITE);
        let cases: [(&str, u32, u64, Vec<_>); 10] = [
            (
                "short header",
                VIRTIO_BLK_T_OUT,
                0,
                vec![(HEADER, 15, NEXT), status_byte],
            ),
            ("no header", VIRTIO_BLK_T_OUT, 0, vec![status_byte]),
            (
                "half a sector",
                VIRTIO_BLK_T_OUT,
                0,
                vec![header, (DATA, 256, NEXT), status_byte],
            ),
            (
                "beyond the end",
                VIRTIO_BLK_T_OUT,
                4,
                vec![header, (DATA, 512, NEXT), status_byte],
            ),
            (
                "sector overflow",
                VIRTIO_BLK_T_OUT,
                u64::MAX,
                vec![header, (DATA, 512, NEXT), status_byte],
            ),
            (
                "unmapped data",
                VIRTIO_BLK_T_OUT,
                0,
                vec![header, (1 << 40, 512, NEXT), status_byte],
            ),
            (
                "unmapped target",
                VIRTIO_BLK_T_IN,
                0,
                vec![header, (1 << 40, 512, NEXT | WRITE), status_byte],
            ),
            (
                "address overflow",
                VIRTIO_BLK_T_IN,
                0,
                vec![header, (u64::MAX - 5, 512, NEXT | WRITE), status_byte],
            ),
            (
                "id cut short",
                VIRTIO_BLK_T_GET_ID,
                0,
                vec![header, (DATA, 19, NEXT | WRITE), status_byte],
            ),
            (
                "no end",
                VIRTIO_BLK_T_FLUSH,
                0,
                vec![header, (STATUS, 1, WRITE | NEXT), (DATA, 0, 4)],
            ),
        ];
        for (name, kind, sector, chain) in cases {
            let (status, written, data) = serve_chain(kind, sector, &chain);
            assert_eq!((status, written), (1, 1), "{name}");
            assert!(data[1024..1536].iter().all(|byte| *byte == 0), "{name}");
            assert!(data[1024 + 1536..].iter().all(|byte| *byte == 3), "{name}");
        }
    }

    #[test]
    fn a_chain_without_room_for_a_status_is_dropped() {
        for chain in [
            vec![(HEADER, 16, NEXT), (DATA, 512, 0)],
            vec![(HEADER, 16, NEXT), (STATUS, 0, WRITE)],
        ] {
            let (status, written, _) = serve_chain(VIRTIO_BLK_T_OUT, 0, &chain);
            assert_eq!((status, written), (UNTOUCHED, 0));
        }
        // A status that cannot be written is no status either.
        let (status, written, _) = serve_chain(
            VIRTIO_BLK_T_FLUSH,
            0,
            &[(HEADER, 16, NEXT), (1 << 40, 1, WRITE)],
        );
        assert_eq!((status, written), (UNTOUCHED, 0));
    }
}
