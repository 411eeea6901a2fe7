//! Code of others that panics: listeners, callbacks, the errors and payloads that they leave.
//!
//! A change of the guest's memory runs such code between its steps, so a panic must become an
//! answer where it is caught, and what it leaves must not panic again when it is dropped.

use std::any::Any;
use std::mem::forget;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Makes a call of code that is not this crate's; a panic becomes its message.
///
/// What the call was given may be half changed after a panic: the caller has to bear that.
pub(crate) fn caught<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| {
        let message = message_of(payload.as_ref());
        discard(payload);
        message
    })
}

/// Drops a value whose drop may panic. The panic's payload is dropped likewise; where that panics,
/// too, the second payload is leaked.
pub(crate) fn discard<T>(value: T) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(value)))
        && let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(payload)))
    {
        forget(second);
    }
}

/// What was given to `panic!`, in one line of log.
fn message_of(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("with a payload that is no text").to_owned()
}

#[cfg(test)]
mod tests {
    use std::panic::panic_any;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    static DROPPED: AtomicUsize = AtomicUsize::new(0);

    /// A payload whose drop panics, with another one as long as there are some left.
    struct Chain(usize);

    impl Drop for Chain {
        fn drop(&mut self) {
            DROPPED.fetch_add(1, Ordering::Relaxed);
            panic_any(Chain(self.0 - 1));
        }
    }

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(caught(|| panic!("as text")), Err::<(), _>("as text".into()));
        let formatted = caught(|| panic!("{}", 7));
        assert_eq!(formatted, Err::<(), _>("7".into()));
        let other = caught(|| panic_any(7)).map(|()| 7).unwrap_err();
        assert!(other.contains("no text"), "{other}");
    }

    #[test]
    fn payloads_that_panic_when_they_are_dropped_end_here() {
        let before = DROPPED.load(Ordering::Relaxed);
        caught(|| panic_any(Chain(9))).unwrap_err();
        // The first and the one that its drop panicked with; the third is leaked.
        assert_eq!(DROPPED.load(Ordering::Relaxed), before + 2);
        discard(Chain(9));
        assert_eq!(DROPPED.load(Ordering::Relaxed), before + 4);
    }
}
