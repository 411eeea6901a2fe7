//! One way of populating RAM, once: what `benches/populate_vs_qemu.sh` runs in turn with QEMU.
//!
//! `cargo bench --bench populate -- --mode prefault --backing shm --size 4096` prints the seconds
//! that building took in this process. The script measures whole processes instead, as it must
//! with QEMU: this one with `--mode lazy` and with another mode. The difference is the time of
//! populating, and of freeing the pages at the end.

use std::num::NonZeroU32;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use guest_memory_shm::{BackingSource, GuestMemoryShm, PageSize, Populate, RamOptions};
use vm_memory::GuestAddress;

const MIB: u64 = 1 << 20;

/// Builds guest RAM, and prints the seconds that took.
#[derive(Parser)]
struct Args {
    /// What backs the RAM
    #[arg(long, value_enum, default_value = "memfd")]
    backing: Kind,
    /// How much of it is allocated when it is built
    #[arg(long, value_enum, default_value = "prefault")]
    mode: Mode,
    /// All RAM, in MiB
    #[arg(long, default_value_t = 64)]
    size: u64,
    /// On how many backings it is, in equal parts
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    backings: u64,
    /// How many threads populate; the crate's default unless given
    #[arg(long)]
    threads: Option<NonZeroU32>,
    /// Cargo says this to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// memfd of base pages
    Memfd,
    /// memfd, transparent huge pages where the system allows them
    Thp,
    /// POSIX shared memory
    Shm,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    Lazy,
    Allocate,
    Prefault,
}

fn main() -> Result<(), guest_memory_shm::Error> {
    let args = Args::parse();
    let mut options = match args.backing {
        Kind::Memfd => RamOptions::new(),
        Kind::Thp => RamOptions::new().with_page_size(PageSize::Transparent),
        Kind::Shm => RamOptions::new().with_backing(BackingSource::PosixShm),
    };
    options = options.with_populate(match args.mode {
        Mode::Lazy => Populate::Lazy,
        Mode::Allocate => Populate::Allocate,
        Mode::Prefault => Populate::Prefault,
    });
    if let Some(threads) = args.threads {
        options = options.with_populate_threads(threads);
    }
    let each = args.size / args.backings * MIB;
    let mut builder = GuestMemoryShm::<()>::builder();
    for at in 0..args.backings {
        builder = builder.add_ram(options.clone(), [(GuestAddress(at * each), each)]);
    }
    let start = Instant::now();
    let memory = builder.build()?;
    println!("{:.6}", start.elapsed().as_secs_f64());
    drop(memory);
    Ok(())
}
