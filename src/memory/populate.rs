//! Populating the RAM of a memory, all regions together.

use super::GuestMemoryShm;
use crate::populate::{self, Parts, PopulateError, PopulateHandle, PopulateOptions, Populated};
#[cfg(doc)]
use crate::{CancelToken, OnFailure, OnShortage, Populate};

impl<B> GuestMemoryShm<B> {
    /// Populates the RAM, or a part of it, and returns when that is done.
    ///
    /// Pages that exist already are left as they are, so a guest may run meanwhile (then with
    /// [`OnFailure::Keep`]). When it succeeds, no later touch of that RAM is SIGBUS for want of a
    /// page, in any process, until pages are given back or a process truncates an unsealed
    /// backing. [`Populate::Prefault`] fills the page tables of this process only.
    ///
    /// # Errors
    ///
    /// A [`PopulateError`] that names the cause, the range and the way out. If there is not enough
    /// memory, that is [`PopulateError::Shortage`] before the first page, or later, if others take
    /// it meanwhile (unless [`OnShortage::TryAnyway`] is set). All that was done is undone then,
    /// as [`OnFailure`] says, also if the progress callback panics.
    pub fn populate(&self, options: PopulateOptions<'_>) -> Result<Populated, PopulateError> {
        populate::populate(self.parts(&options)?, options)
    }

    /// Populates the RAM, or a part of it, while the caller goes on; the handle tells how far it
    /// has come, and waits for it; a [`CancelToken`] cancels it.
    ///
    /// The RAM stays mapped until it is done, even if this memory and its regions are dropped.
    ///
    /// # Errors
    ///
    /// [`PopulateError::NotRam`] for a bad range, [`PopulateError::Shortage`] if there is not
    /// enough now, [`PopulateError::NoThread`] if no thread can be had. Others come from
    /// [`PopulateHandle::wait`].
    pub fn populate_in_background(
        &self,
        options: PopulateOptions<'static>,
    ) -> Result<PopulateHandle, PopulateError> {
        populate::populate_in_background(self.parts(&options)?, options)
    }

    /// The RAM that the options are about.
    fn parts(&self, options: &PopulateOptions<'_>) -> Result<Parts, PopulateError> {
        let Some(range) = options.range() else {
            let rams = self.regions.iter().map(|region| region.ram());
            return Ok(rams.map(|ram| (ram.clone(), 0..ram.range.size())).collect());
        };
        let pieces = self.pieces(range);
        let pieces = pieces.map_err(|first| PopulateError::NotRam { range, first })?;
        let pieces = pieces.into_iter();
        Ok(pieces.map(|(ram, inside)| (ram.clone(), inside)).collect())
    }
}
