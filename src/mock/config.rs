//! The part of virtio-blk's configuration space that the mock fills.

/// Bytes from the start to the end of the field `num_queues`.
const CONFIG_SIZE: usize = 36;

const CAPACITY: usize = 0;
const SEG_MAX: usize = 12;
const BLK_SIZE: usize = 20;
const NUM_QUEUES: usize = 34;

/// The fields in use; all others are zero.
#[derive(Clone, Copy)]
pub(super) struct BlkConfig {
    pub(super) capacity_sectors: u64,
    pub(super) max_segments: u32,
    pub(super) block_size: u32,
    pub(super) queues: u16,
}

impl BlkConfig {
    pub(super) fn to_bytes(self) -> [u8; CONFIG_SIZE] {
        let mut bytes = [0; CONFIG_SIZE];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(CAPACITY, &self.capacity_sectors.to_le_bytes());
        put(SEG_MAX, &self.max_segments.to_le_bytes());
        put(BLK_SIZE, &self.block_size.to_le_bytes());
        put(NUM_QUEUES, &self.queues.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use virtio_bindings::bindings::virtio_blk::virtio_blk_config;

    #[test]
    fn the_fields_lie_where_virtio_puts_them() {
        assert_eq!(CAPACITY, offset_of!(virtio_blk_config, capacity));
        assert_eq!(SEG_MAX, offset_of!(virtio_blk_config, seg_max));
        assert_eq!(BLK_SIZE, offset_of!(virtio_blk_config, blk_size));
        assert_eq!(NUM_QUEUES, offset_of!(virtio_blk_config, num_queues));
        assert_eq!(CONFIG_SIZE, NUM_QUEUES + 2);
    }
}
