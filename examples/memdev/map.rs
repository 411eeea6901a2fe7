//! A picture of what is allocated: each character is a part of the RAM.

use guest_memory_shm::{Error, GuestMemoryShm, GuestRange};
use indicatif::BinaryBytes;
use vm_memory::GuestMemoryBackend;

/// Characters in a line.
const COLUMNS: u64 = 64;
/// Lines for a backend, at most.
const LINES: u64 = 8;
/// From nothing to all of a part.
const SHADES: [char; 6] = ['·', '░', '▒', '▓', '▓', '█'];

/// The picture of all regions, with a heading for each.
pub(crate) fn draw(
    memory: &GuestMemoryShm,
    heading: impl Fn(&GuestRange) -> String,
) -> Result<String, Error> {
    let mut text = String::new();
    for region in memory.iter() {
        let range = region.range();
        let page = region.backing().page_size();
        let cell = (range.size().div_ceil(COLUMNS * LINES)).next_multiple_of(page);
        // Finer than a character, so that a part of it shows; coarse enough to be quick.
        let resolution = (cell / 16).max(page);
        let extents = memory.extents(resolution)?;
        text += &format!(
            "{} (each character {})\n",
            heading(&range),
            BinaryBytes(cell)
        );
        text += &picture(&range, &extents.ranges, cell);
        if extents.unlocated > 0 {
            text += &format!(
                "  and {} at places that the kernel does not report\n",
                BinaryBytes(extents.unlocated)
            );
        }
    }
    text += "(· nothing allocated, ░ ▒ ▓ some, █ all)\n";
    Ok(text)
}

fn picture(range: &GuestRange, allocated: &[GuestRange], cell: u64) -> String {
    let start = range.start_addr().0;
    let shades: Vec<char> = (0..range.size().div_ceil(cell))
        .map(|at| {
            let from = start + at * cell;
            let to = (from + cell).min(start + range.size());
            let inside: u64 = allocated.iter().map(|part| common(part, from, to)).sum();
            SHADES[shade(inside, to - from)]
        })
        .collect();
    let columns = usize::try_from(COLUMNS).unwrap_or(64);
    shades
        .chunks(columns)
        .map(|line| format!("  {}\n", line.iter().collect::<String>()))
        .collect()
}

/// How many bytes of a part lie in `from..to`.
fn common(part: &GuestRange, from: u64, to: u64) -> u64 {
    let start = part.start_addr().0.max(from);
    let end = (part.last_addr().0 + 1).min(to);
    end.saturating_sub(start)
}

/// Nothing and all have shades of their own.
fn shade(inside: u64, size: u64) -> usize {
    match inside {
        0 => 0,
        all if all >= size => SHADES.len() - 1,
        some => 1 + usize::try_from(some * 4 / size).unwrap_or(0).min(3),
    }
}
