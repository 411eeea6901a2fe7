//! Progress bars, on standard error if that is a terminal, and gone when the work is.

use indicatif::{ProgressBar, ProgressStyle};

use crate::ending;

/// Shows a bar while `work` is done.
pub(crate) fn with_bar<T>(
    doing: &'static str,
    bytes: u64,
    work: impl FnOnce(&ProgressBar) -> T,
) -> T {
    let template =
        "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template);
    let bar = ProgressBar::new(bytes)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(doing);
    let shown = bar.clone();
    let _undo = ending::undo(move || shown.finish_and_clear());
    let done = work(&bar);
    bar.finish_and_clear();
    done
}
