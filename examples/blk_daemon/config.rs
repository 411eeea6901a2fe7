//! What the guest is told about the disk: virtio-blk's configuration space, see "Device
//! configuration layout" in the virtio specification.

use vhost::vhost_user::message::VHOST_USER_CONFIG_SIZE;

use crate::image::{Image, SECTOR};

/// Data buffers per request: what is left of a chain of 128 after header and status.
const MAX_SEGMENTS: u32 = 126;

/// Ranges per discard or zeroing.
pub(crate) const MAX_RANGES: u32 = 32;

/// Sectors per range: 2 GiB.
pub(crate) const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// The configuration space, with zeroes after it: a frontend may ask for the fields of features
/// that this device lacks.
pub(crate) fn bytes(image: &Image, queues: u16) -> [u8; VHOST_USER_CONFIG_SIZE as usize] {
    let mut bytes = [0; VHOST_USER_CONFIG_SIZE as usize];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    let sector = u32::try_from(SECTOR).unwrap_or(u32::MAX);
    let alignment = image.block_size() / sector;
    // capacity, seg_max, blk_size, num_queues
    put(0, &image.sectors().to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &sector.to_le_bytes());
    put(34, &queues.to_le_bytes());
    // max_discard_sectors, max_discard_seg, discard_sector_alignment
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &alignment.max(1).to_le_bytes());
    // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]);
    bytes
}
