//! The accesses that devices make most, without vm-memory's iterator of slices.
//!
//! Nearly every access lies in one region, in the one that the index names first. vm-memory's
//! `Bytes` finds that out in a loop over slices, which costs more than the look-up and the copy
//! together. All other accesses go to `Bytes`, so the results are the same.

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::guest_memory::Result as AccessResult;
use vm_memory::{ByteValued, Bytes, GuestAddress, VolatileSlice};

use super::GuestMemoryShm;

/// The same calls as those of vm-memory's `Bytes<GuestAddress>`, with the same results, errors and
/// marks in the bitmaps, several times as fast. Code that names the type has them without a
/// change; code that is generic over the memory goes through the trait.
impl<B: Bitmap> GuestMemoryShm<B> {
    /// Writes an object at `addr`, as `Bytes::write_obj`.
    ///
    /// # Errors
    ///
    /// Those of [`write_slice`](Self::write_slice).
    #[inline]
    pub fn write_obj<T: ByteValued>(&self, val: T, addr: GuestAddress) -> AccessResult<()> {
        self.write_slice(val.as_slice(), addr)
    }

    /// Reads an object at `addr`, as `Bytes::read_obj`.
    ///
    /// # Errors
    ///
    /// Those of [`read_slice`](Self::read_slice).
    #[inline]
    pub fn read_obj<T: ByteValued>(&self, addr: GuestAddress) -> AccessResult<T> {
        let mut val = T::zeroed();
        self.read_slice(val.as_mut_slice(), addr).map(|()| val)
    }

    /// Writes all of `buf` at `addr`, as `Bytes::write_slice`: also across regions that are next
    /// to each other.
    ///
    /// # Errors
    ///
    /// `InvalidGuestAddress` if there is no RAM at `addr`; `PartialBuffer` if it ends before `buf`
    /// does, which is written up to there.
    #[inline]
    pub fn write_slice(&self, buf: &[u8], addr: GuestAddress) -> AccessResult<()> {
        match self.one_slice(addr, buf.len()) {
            Some(slice) => {
                slice.copy_from(buf);
                Ok(())
            }
            None => self.write_slices(buf, addr),
        }
    }

    /// Fills `buf` with what is at `addr`, as `Bytes::read_slice`: also across regions that are
    /// next to each other.
    ///
    /// # Errors
    ///
    /// `InvalidGuestAddress` if there is no RAM at `addr`; `PartialBuffer` if it ends before `buf`
    /// does, which is filled up to there.
    #[inline]
    pub fn read_slice(&self, buf: &mut [u8], addr: GuestAddress) -> AccessResult<()> {
        match self.one_slice(addr, buf.len()) {
            Some(slice) => {
                slice.copy_to(buf);
                Ok(())
            }
            None => self.read_slices(buf, addr),
        }
    }

    /// The `count` bytes at `addr`, if the region that the index names has all of them.
    #[inline]
    fn one_slice(&self, addr: GuestAddress, count: usize) -> Option<VolatileSlice<'_, BS<'_, B>>> {
        let region = self.index.get(addr.0)?;
        region.slice(region.wrapping_offset_of(addr), count)
    }

    #[cold]
    #[inline(never)]
    fn write_slices(&self, buf: &[u8], addr: GuestAddress) -> AccessResult<()> {
        Bytes::write_slice(self, buf, addr)
    }

    #[cold]
    #[inline(never)]
    fn read_slices(&self, buf: &mut [u8], addr: GuestAddress) -> AccessResult<()> {
        Bytes::read_slice(self, buf, addr)
    }
}
