//! Memfds that grow in place and never become shorter: mappings from before and after are mappings
//! of the same pages, and none of them can fault.

use std::sync::Arc;

use super::create::check_file_size_limit;
use super::error::{BackingError, Result};
use super::{BackingKind, Inner, Seals, ShmBacking, base_page_size, memfd, seals};
use crate::options::RamOptions;

/// No process can take a page away, or add a seal that would stop the growing.
const GROWABLE: Seals = Seals::SHRINK.union(Seals::SEAL);

impl ShmBacking {
    /// A memfd of `len` bytes, whole pages, that is sealed against shrinking only.
    ///
    /// Any process that has the descriptor can make it longer. That costs only the one that then
    /// writes there: nothing depends on where it ends but that this is not before `len`.
    pub(crate) fn create_growable(name: &str, len: u64) -> Result<Self> {
        let options = RamOptions::new().with_name(name);
        check_file_size_limit(len)?;
        let file = memfd::create_sealed(&options, len, None, GROWABLE)?;
        let metadata = file.metadata().map_err(BackingError::inspect)?;
        let seals = seals::read(&file).map_err(BackingError::inspect)?;
        let kind = BackingKind::Memfd;
        let map_options = (&options).into();
        let backing = Self::new(file, base_page_size(), kind, seals, &metadata, map_options);
        Ok(backing.seen_as(len))
    }

    /// The same file with `len` bytes, whole pages, at least as many as there were.
    pub(crate) fn grow(&self, len: u64) -> Result<Self> {
        let file = self.file();
        let is_there = || Ok(file.metadata()?.len() >= len);
        let failed = |source| BackingError::Resize {
            kind: BackingKind::Memfd,
            len,
            source,
        };
        if !is_there().map_err(failed)? {
            check_file_size_limit(len)?;
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

    /// The first `len` bytes, which are there.
    fn seen_as(&self, len: u64) -> Self {
        let inner = &self.inner;
        Self {
            inner: Arc::new(Inner {
                file: Arc::clone(&inner.file),
                start: inner.start,
                end: len,
                page_size: inner.page_size,
                kind: inner.kind,
                seals: inner.seals,
                identity: inner.identity,
                map_options: inner.map_options,
                name: inner.name.clone(),
                notes: inner.notes.clone(),
                file_end: None,
                gate: Arc::clone(&inner.gate),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn it_grows_and_nobody_can_shrink_or_seal_it() {
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
