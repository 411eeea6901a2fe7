//! What happens without a file: every byte is compared.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use guest_memory_shm::GuestMemoryShm;
use indicatif::ProgressBar;
use vm_memory::GuestMemoryError;

use crate::daemon::{LocalDaemon, Pattern, check_equal};
use crate::disk::{Buffer, total};
use crate::failure::{Failure, OrFail, Result};
use crate::session::Session;

/// How much of a foreign disk is read twice.
const READ_TWICE: u64 = 64 << 20;

/// The guest reads what the daemon's disk begins with.
pub(crate) fn read_pattern(session: &mut Session, bar: &ProgressBar) -> Result<u64> {
    let len = session.capacity;
    read_and_check(session, len, bar, Pattern::Daemon)?;
    Ok(len)
}

/// The guest fills the disk.
pub(crate) fn write_pattern(session: &mut Session, bar: &ProgressBar) -> Result<u64> {
    let len = session.capacity;
    let Session { disk, ram, .. } = session;
    let mut bytes = Vec::new();
    disk.write(ram, len, bar, |memory, offset, buffers| {
        let mut at = offset;
        for (addr, length) in buffers {
            bytes.resize(*length as usize, 0);
            Pattern::Guest.fill(at, &mut bytes);
            let written = memory.write_slice(&bytes, *addr);
            written.or_fail(|| "the guest cannot write its RAM")?;
            at += u64::from(*length);
        }
        Ok(())
    })?;
    Ok(len)
}

/// Compares the daemon's disk with what the guest wrote, without a virtqueue.
pub(crate) fn check_pattern(session: &Session, daemon: &LocalDaemon) -> Result<()> {
    let len = session.capacity;
    let mut bytes = Vec::new();
    let mut offset = 0;
    while offset < len {
        let part = (len - offset).min(1 << 20);
        bytes.resize(usize::try_from(part).unwrap_or(0), 0);
        Pattern::Guest.fill(offset, &mut bytes);
        daemon.check_disk(offset, &bytes)?;
        offset += part;
    }
    Ok(())
}

/// Reads the first bytes of the disk again, after a change of the guest's RAM.
pub(crate) fn read_again(session: &mut Session, pattern: Pattern) -> Result<u64> {
    let len = session.capacity.min(4 << 20);
    read_and_check(session, len, &ProgressBar::hidden(), pattern)?;
    Ok(len)
}

/// Has the daemon read into RAM that was removed, which a correct one refuses.
pub(crate) fn read_into_removed(session: &mut Session) -> Result<()> {
    let addr = session.ram.plug().range().start_addr();
    match session.disk.refuses_to_read_into(addr)? {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "the daemon still wrote to {:#x}, which was removed",
            addr.0
        ))),
    }
}

/// Reads a foreign disk twice through different buffers; it must be the same twice.
pub(crate) fn read_twice(session: &mut Session, bar: &ProgressBar) -> Result<u64> {
    let len = session.capacity.min(READ_TWICE);
    bar.set_length(len);
    let mut first = Vec::new();
    let Session { disk, ram, .. } = session;
    disk.read(ram, len, bar, |memory, _, buffers| {
        first.push(hash(memory, buffers)?);
        Ok(())
    })?;
    bar.set_position(0);
    let mut first = first.into_iter();
    disk.read(ram, len, bar, |memory, offset, buffers| {
        if first.next() == Some(hash(memory, buffers)?) {
            return Ok(());
        }
        Err(Failure::new(format!(
            "two reads of the disk at byte {offset} differ: another process wrote to it \
             meanwhile, or shared memory is not shared"
        )))
    })?;
    Ok(2 * len)
}

fn read_and_check(
    session: &mut Session,
    len: u64,
    bar: &ProgressBar,
    pattern: Pattern,
) -> Result<()> {
    let Session { disk, ram, .. } = session;
    let mut expected = Vec::new();
    disk.read(ram, len, bar, |memory, offset, buffers| {
        let found = bytes_of(memory, buffers).or_fail(|| "the guest cannot read its RAM")?;
        expected.resize(found.len(), 0);
        pattern.fill(offset, &mut expected);
        check_equal(
            offset,
            &found,
            &expected,
            "what the guest read from the disk",
        )
    })
}

fn hash(memory: &GuestMemoryShm, buffers: &[Buffer]) -> Result<u64> {
    let bytes = bytes_of(memory, buffers).or_fail(|| "the guest cannot read its RAM")?;
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    Ok(hasher.finish())
}

/// A copy of what is in the buffers: no reference to guest RAM exists at any time.
fn bytes_of(
    memory: &GuestMemoryShm,
    buffers: &[Buffer],
) -> std::result::Result<Vec<u8>, GuestMemoryError> {
    let mut bytes = vec![0; usize::try_from(total(buffers)).unwrap_or(0)];
    let mut rest = bytes.as_mut_slice();
    for (addr, length) in buffers {
        let (part, after) = rest.split_at_mut(*length as usize);
        memory.read_slice(part, *addr)?;
        rest = after;
    }
    Ok(bytes)
}
