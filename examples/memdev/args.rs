//! The command line.

use clap::Parser;

const ABOUT: &str = "\
Builds guest RAM from QEMU's memory backend options and reports what it became.

Each OPTIONS is what QEMU's -object takes: memory-backend-shm, memory-backend-memfd or \
memory-backend-file and its properties (id may be left out; beyond QEMU's there are thp=on for \
transparent huge pages, populate=allocate, and on-shortage=try-anyway to populate although there \
is not enough memory). For each one it prints what QEMU's monitor prints for `info memdev`, then \
facts from the kernel, and which options have no effect here. The RAM is gone when it ends. \
Exit status: 0; 2 where the command line or an option is wrong, 1 after any other error.";

const EXAMPLES: &str = "\
Examples (in the source tree, memdev is: cargo run --release --example memdev --):
  memdev memory-backend-shm,size=512M
  memdev memory-backend-memfd,id=fast,size=1G,hugetlb=on,hugetlbsize=2M
          (fill /proc/sys/vm/nr_hugepages first)
  memdev --populate memory-backend-memfd,size=4G,thp=on,policy=bind,host-nodes=0
  memdev --map memory-backend-shm,size=64M,prealloc=on \\
          memory-backend-memfd,size=64M
  memdev --json memory-backend-file,size=1G,mem-path=/var/tmp,share=on

RUST_LOG=debug shows what happens on the way.";

#[derive(Debug, Parser)]
#[command(name = "memdev", long_about = ABOUT, after_long_help = EXAMPLES, next_line_help = true)]
/// Builds guest RAM from QEMU's memory backend options and reports what it became
pub(crate) struct Args {
    /// Options in the syntax of QEMU's -object
    #[arg(required = true, value_name = "OPTIONS")]
    pub(crate) options: Vec<String>,

    /// Fault in all of the RAM, with a progress bar, unless there is not enough memory
    #[arg(long)]
    pub(crate) populate: bool,

    /// Draw which parts of the RAM are allocated
    #[arg(long, conflicts_with = "json")]
    pub(crate) map: bool,

    /// Print one JSON object instead
    #[arg(long)]
    pub(crate) json: bool,
}
