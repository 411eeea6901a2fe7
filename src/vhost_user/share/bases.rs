//! The caller's function that is told where a daemon maps regions.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::range::GuestRange;

type Handler = Box<dyn FnMut(GuestRange, u64) + Send>;

/// What the caller gave to be told of bases.
#[derive(Default)]
pub(super) struct BaseHandler {
    /// The lock is never contended: it keeps the share `Sync`, whatever the handler is.
    handler: Option<Mutex<Handler>>,
}

impl BaseHandler {
    pub(super) fn new(handler: impl FnMut(GuestRange, u64) + Send + 'static) -> Self {
        Self {
            handler: Some(Mutex::new(Box::new(handler))),
        }
    }

    pub(super) fn tell(&mut self, range: GuestRange, base: u64) {
        if let Some(handler) = &mut self.handler {
            let handler = handler.get_mut().unwrap_or_else(PoisonError::into_inner);
            handler(range, base);
        }
    }
}

impl fmt::Debug for BaseHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.handler {
            Some(_) => "Some(..)",
            None => "None",
        })
    }
}
