//! Memfds that grow in place and never become shorter: mappings from before and after are mappings
//! of the same pages, and none of them can fault.

use super::capacity::check_file_size;
use super::error::{BackingError, Result};
use super::kind::BackingKind;
use super::request::Resolved;
use super::seals::Seals;
use super::shm_backing::ShmBacking;
use crate::options::RamOptions;

/// No process can take a page away, or add a seal that would stop it from growing.
const GROWABLE: Seals = Seals::SHRINK.union(Seals::SEAL);

impl ShmBacking {
    /// A memfd of `len` bytes, whole pages, that is sealed against shrinking only.
    ///
    /// Any process that has the descriptor can make it longer. That costs only the one that then
    /// writes there: nothing depends on its end, as long as that is not below `len`.
    pub(crate) fn create_growable(name: &str, len: u64) -> Result<Self> {
        let options = RamOptions::new().with_name(name);
        let request = Resolved::new(&options)?.with_len(len)?;
        request.with_seals(GROWABLE).create_alone()
    }

    /// The same file with `len` bytes, whole pages, no fewer than before.
    pub(crate) fn grow(&self, len: u64) -> Result<Self> {
        let file = self.file();
        let is_there = || Ok(file.metadata()?.len() >= len);
        let failed = |source| BackingError::Resize {
            kind: BackingKind::Memfd,
            len,
            source,
        };
        if !is_there().map_err(failed)? {
            check_file_size(len)?;
            if let Err(source) = file.set_len(len) {
                // Another process may have made it longer than that meanwhile: shrinking is what
                // is refused then.
                if !is_there().map_err(failed)? {
                    return Err(failed(source));
                }
            }
        }
        Ok(self.seen_as(len))
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::backing::seals;
    use crate::host::base_page_size;

    #[test]
    fn it_grows_and_cannot_be_shrunk_or_sealed() {
        let page = base_page_size();
        let short = ShmBacking::create_growable("log", page).unwrap();
        let long = short.grow(3 * page).unwrap();
        assert_eq!((short.end(), long.end()), (page, 3 * page));
        assert_eq!(long, short);
        let file = long.file();
        let refused = file.set_len(2 * page).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::EPERM as i32));
        for seal in [Seals::GROW, Seals::WRITE, Seals::FUTURE_WRITE] {
            let refused = seals::add(file, seal).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::EPERM as i32));
        }
    }

    #[test]
    fn one_that_another_process_made_longer_still_grows() {
        let page = base_page_size();
        let backing = ShmBacking::create_growable("log", page).unwrap();
        backing.file().set_len(100 * page).unwrap();
        assert_eq!(backing.grow(2 * page).unwrap().end(), 2 * page);
        assert_eq!(backing.grow(200 * page).unwrap().end(), 200 * page);
        assert_eq!(backing.file().metadata().unwrap().len(), 200 * page);
    }
}
