//! Regions as they stand in messages: 4 numbers of 64 bits each, in the byte order of the machine
//! (vhost-user specification, "Memory region description").

use vm_memory::GuestAddress;

use super::error::ReceiveError;

/// The bytes of a region in a message.
const REGION: usize = 32;
/// The bytes before the regions, or before the only one: a count and padding, or padding alone.
const HEAD: usize = 8;

/// A region as a frontend describes it: plain numbers, of which nothing is believed.
///
/// ```
/// use guest_memory_shm::receive::ReceivedRegion;
/// use vm_memory::GuestAddress;
///
/// // The payload of ADD_MEM_REG: 8 bytes of padding and the region.
/// let payload: Vec<u8> = [0, 0x10_0000, 0x2000, 0x7f00_0000_0000, 0x1000_u64]
///     .iter()
///     .flat_map(|number| number.to_ne_bytes())
///     .collect();
/// let region = ReceivedRegion::decode(&payload)?;
/// assert_eq!(region.guest_addr, GuestAddress(0x10_0000));
/// assert_eq!(region.size, 0x2000);
/// assert_eq!(region.user_addr, 0x7f00_0000_0000);
/// assert_eq!(region.mmap_offset, 0x1000);
/// assert!(ReceivedRegion::decode(&payload[1..]).is_err());
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceivedRegion {
    /// Where it is in the guest.
    pub guest_addr: GuestAddress,
    /// Its size in bytes.
    pub size: u64,
    /// What the frontend calls its first byte: the addresses of rings are in these terms.
    pub user_addr: u64,
    /// Where it starts in the file whose descriptor comes with it, in bytes.
    pub mmap_offset: u64,
}

impl From<&Self> for ReceivedRegion {
    fn from(region: &Self) -> Self {
        *region
    }
}

impl ReceivedRegion {
    /// Reads the payload of SET_MEM_TABLE: the number of regions as 32 bits, 32 bits of padding,
    /// and the regions.
    ///
    /// The numbers in them can be anything: [`ReceivedTable::set`](super::ReceivedTable::set)
    /// checks them. Padding is not looked at.
    ///
    /// ```
    /// use guest_memory_shm::receive::ReceivedRegion;
    ///
    /// let mut payload = [2_u32, 0].map(u32::to_ne_bytes).concat();
    /// payload.resize(8 + 2 * 32, 0);
    /// assert_eq!(ReceivedRegion::decode_table(&payload)?.len(), 2);
    /// payload.push(0);
    /// assert!(ReceivedRegion::decode_table(&payload).is_err());
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ReceiveError::Payload`] if it is not exactly as long as its regions.
    pub fn decode_table(payload: &[u8]) -> Result<Vec<Self>, ReceiveError> {
        let refused = |expected| ReceiveError::Payload {
            message: "SET_MEM_TABLE",
            len: payload.len(),
            expected,
        };
        let Some((head, regions)) = payload.split_first_chunk::<HEAD>() else {
            return Err(refused(HEAD as u64));
        };
        let [a, b, c, d, ..] = *head;
        let count = u32::from_ne_bytes([a, b, c, d]);
        let expected = HEAD as u64 + u64::from(count) * REGION as u64;
        if payload.len() as u64 != expected {
            return Err(refused(expected));
        }
        let (regions, _) = regions.as_chunks::<REGION>();
        Ok(regions.iter().map(Self::from_bytes).collect())
    }

    /// Reads the payload of ADD_MEM_REG and REM_MEM_REG: 64 bits of padding, which are not looked
    /// at, and one region.
    ///
    /// # Errors
    ///
    /// [`ReceiveError::Payload`] if it has not exactly 40 bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, ReceiveError> {
        let region = payload.get(HEAD..).and_then(|rest| rest.try_into().ok());
        match region {
            Some(region) => Ok(Self::from_bytes(region)),
            None => Err(ReceiveError::Payload {
                message: "ADD_MEM_REG or REM_MEM_REG",
                len: payload.len(),
                expected: (HEAD + REGION) as u64,
            }),
        }
    }

    fn from_bytes(bytes: &[u8; REGION]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let word = |at: usize| u64::from_ne_bytes(words[at]);
        Self {
            guest_addr: GuestAddress(word(0)),
            size: word(1),
            user_addr: word(2),
            mmap_offset: word(3),
        }
    }
}
