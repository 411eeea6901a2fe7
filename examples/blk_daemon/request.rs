//! One request, from its descriptor chain to its status byte; see "Device Operation" of the block
//! device in the virtio specification.

use std::io;
use std::ops::Deref;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory};

use crate::buffers::Buffers;
use crate::config::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::image::{Lane, SECTOR};

/// Bytes of the header: type `u32`, reserved `u32`, sector `u64`, all little-endian.
const HEADER_SIZE: usize = 16;

/// Bytes of a range to discard or zero: sector `u64`, sectors `u32`, flags `u32`.
const RANGE_SIZE: usize = 16;

/// Why a request is not carried out.
enum Refusal {
    /// The guest asks for what does not exist, or the image fails.
    Error(String),
    /// The device does not have what is asked for.
    Unsupported(String),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Error(error.to_string())
    }
}

fn error<T>(reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Error(reason.into()))
}

/// Carries out the request of `chain` and returns how many bytes were written to its buffers.
///
/// Everything in the chain is the guest's word. A request that cannot be carried out gets a status
/// that says so where the chain has a place for it, and is dropped where it has none.
pub(crate) fn serve<M>(
    chain: DescriptorChain<M>,
    memory: &M::Target,
    lane: &mut Lane,
    write_through: bool,
) -> u32
where
    M: Deref,
    M::Target: GuestMemory + Sized,
{
    let (mut input, mut output) = (Buffers::default(), Buffers::default());
    // Of a chain that loops, or leaves its table or guest memory, only the start is seen.
    let mut whole = false;
    for descriptor in chain {
        whole = !descriptor.has_next();
        let direction = match descriptor.is_write_only() {
            true => &mut output,
            false => &mut input,
        };
        direction.push(descriptor.addr(), descriptor.len());
    }
    let Some(status_addr) = output.take_last_byte() else {
        log::warn!("dropped a request without room for its status");
        return 0;
    };
    let done = match whole && input.are_in(memory) && output.are_in(memory) {
        true => carry_out(&mut input, output, memory, lane, write_through),
        false => error("its descriptors lead out of guest memory"),
    };
    let (status, written) = match done {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        Err(Refusal::Error(reason)) => {
            log::debug!("a request failed: {reason}");
            (VIRTIO_BLK_S_IOERR, 0)
        }
        Err(Refusal::Unsupported(reason)) => {
            log::debug!("a request is not supported: {reason}");
            (VIRTIO_BLK_S_UNSUPP, 0)
        }
    };
    // The three values of the status fit one byte.
    match memory.write_obj(status.to_le_bytes()[0], status_addr) {
        Ok(()) => written.saturating_add(1),
        Err(error) => {
            log::warn!("cannot write the status at {:#x}: {error}", status_addr.0);
            written
        }
    }
}

/// Bytes written to the driver's buffers.
fn carry_out(
    input: &mut Buffers,
    mut output: Buffers,
    memory: &impl GuestMemory,
    lane: &mut Lane,
    write_through: bool,
) -> Result<u32, Refusal> {
    let mut header = [0; HEADER_SIZE];
    let front = input.take_front(HEADER_SIZE as u64);
    if front.len() < HEADER_SIZE as u64 {
        return error(format!("its header has only {} bytes", front.len()));
    }
    front.read(memory, &mut header)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let writes = [
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
    ]
    .contains(&kind);
    if writes && lane.image().read_only() {
        return error("the image is read-only");
    }

    let written = match kind {
        VIRTIO_BLK_T_IN => {
            let len = output.len();
            let (offset, written) = match (lane.offset(sector, len), u32::try_from(len)) {
                (Some(offset), Ok(written)) => (offset, written),
                _ => return error(format!("no {len} bytes can be read at sector {sector}")),
            };
            lane.read(offset, output, memory)?;
            written
        }
        VIRTIO_BLK_T_OUT => {
            let len = input.len();
            let Some(offset) = lane.offset(sector, len) else {
                return error(format!("no {len} bytes can be written at sector {sector}"));
            };
            lane.write(offset, std::mem::take(input), memory)?;
            0
        }
        VIRTIO_BLK_T_FLUSH => {
            lane.flush()?;
            0
        }
        VIRTIO_BLK_T_GET_ID => {
            let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
            let name = lane.image().name().as_bytes();
            let len = name.len().min(id.len());
            id[..len].copy_from_slice(&name[..len]);
            let target = output.take_front(VIRTIO_BLK_ID_BYTES.into());
            if target.len() < VIRTIO_BLK_ID_BYTES.into() {
                return error(format!("an id does not fit {} bytes", target.len()));
            }
            target.write(memory, &id)?;
            VIRTIO_BLK_ID_BYTES
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let ranges = Range::all(input, memory, kind, lane)?;
            for range in ranges {
                log::trace!("{range:?}");
                match kind {
                    VIRTIO_BLK_T_DISCARD => lane.discard(range.offset, range.len)?,
                    _ => lane.zero(range.offset, range.len, range.unmap)?,
                }
            }
            0
        }
        _ => return Err(Refusal::Unsupported(format!("type {kind}"))),
    };
    if writes && write_through {
        lane.flush()?;
    }
    Ok(written)
}

/// What is to be discarded or zeroed, in bytes.
#[derive(Debug)]
struct Range {
    offset: u64,
    len: u64,
    unmap: bool,
}

impl Range {
    /// The ranges of a request. All are checked before the first is touched.
    fn all(
        input: &mut Buffers,
        memory: &impl GuestMemory,
        kind: u32,
        lane: &Lane,
    ) -> Result<Vec<Range>, Refusal> {
        let len = input.len();
        let max = u64::from(MAX_RANGES) * RANGE_SIZE as u64;
        if len == 0 || len > max || !len.is_multiple_of(RANGE_SIZE as u64) {
            return error(format!("{len} bytes are no list of ranges"));
        }
        let mut ranges = Vec::new();
        while input.len() > 0 {
            let mut bytes = [0; RANGE_SIZE];
            let front = input.take_front(RANGE_SIZE as u64);
            front.read(memory, &mut bytes)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, rest @ ..] = bytes;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let [n0, n1, n2, n3, flags @ ..] = rest;
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            let known = match kind {
                VIRTIO_BLK_T_WRITE_ZEROES => VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
                _ => 0,
            };
            if flags & !known != 0 {
                return Err(Refusal::Unsupported(format!("flags {flags:#x} of a range")));
            }
            let len = u64::from(sectors) * SECTOR;
            let Some(offset) = lane.offset(sector, len) else {
                return error(format!("no {len} bytes at sector {sector}"));
            };
            if sectors > MAX_RANGE_SECTORS {
                return error(format!("{sectors} sectors in one range"));
            }
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            ranges.push(Range { offset, len, unmap });
        }
        Ok(ranges)
    }
}
