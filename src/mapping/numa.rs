//! Placing RAM on NUMA nodes (mbind(2)).

use std::io;

use nix::errno::Errno;
use nix::libc::{
    MPOL_BIND, MPOL_INTERLEAVE, MPOL_PREFERRED, SYS_mbind, c_int, c_uint, c_ulong, syscall,
};

use super::Mapping;
use super::error::{MapError, Result};
use crate::host::NodeSet;
use crate::options::NumaPolicy;

// From linux/mempolicy.h; since Linux 5.15.
const MPOL_PREFERRED_MANY: c_int = 5;

// From linux/mempolicy.h: existing pages that are elsewhere are moved, and it is an error if one
// cannot be. (Files may have pages already; the kernel ignores STRICT for huge pages.)
const MPOL_MF_STRICT: c_uint = 1;
const MPOL_MF_MOVE: c_uint = 2;

/// The words that [`NodeSet::LIMIT`] bits take.
const WORDS: usize = NodeSet::LIMIT as usize / c_ulong::BITS as usize;

impl Mapping {
    /// Tells the kernel from which nodes the pages of the mapping are to come.
    ///
    /// On shared memory this is a policy of the object: it holds for pages that other processes
    /// touch first, too. It must come before the first page.
    pub(super) fn bind(&self, policy: NumaPolicy) -> Result<()> {
        let answer = match policy {
            NumaPolicy::Default => return Ok(()),
            NumaPolicy::Bind(nodes) => self.mbind(MPOL_BIND, nodes),
            NumaPolicy::Interleave(nodes) => self.mbind(MPOL_INTERLEAVE, nodes),
            // Older kernels know one preferred node only, and take the lowest.
            NumaPolicy::Preferred(nodes) => match self.mbind(MPOL_PREFERRED_MANY, nodes) {
                Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {
                    self.mbind(MPOL_PREFERRED, nodes)
                }
                answer => answer,
            },
        };
        answer.map_err(|source| MapError::Nodes {
            policy,
            present: crate::host::nodes::with_memory(),
            source,
        })
    }

    fn mbind(&self, mode: c_int, nodes: NodeSet) -> io::Result<()> {
        let mut mask: [c_ulong; WORDS] = [0; WORDS];
        for node in nodes.iter() {
            mask[(node / c_ulong::BITS) as usize] |= 1 << (node % c_ulong::BITS);
        }
        // The kernel looks at one bit less than maxnode says.
        let maxnode = c_ulong::from(NodeSet::LIMIT) + 1;
        // SAFETY: mbind(2) reads the mask, which has the words that maxnode needs (128 bits), and
        // writes nothing of ours. The range is a mapping of this module, and only the placement of
        // its pages changes, not what is in them.
        let answer = unsafe {
            syscall(
                SYS_mbind,
                self.ram().start.as_ptr(),
                self.ram().len.get(),
                mode,
                mask.as_ptr(),
                maxnode,
                MPOL_MF_STRICT | MPOL_MF_MOVE,
            )
        };
        if answer == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}
