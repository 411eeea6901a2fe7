//! The command line.

use std::path::PathBuf;

use clap::Parser;

const ABOUT: &str = "\
Plugs RAM into a guest that runs under KVM, has it written by the guest's own code and read by a \
vhost-user daemon.

Everything happens in this process: a virtual machine with one vCPU whose memory is an address \
space with two listeners, KVM's memory slots and a vhost-user-blk daemon on a Unix socket. A \
region is plugged into both, the guest's code writes a pattern to some of its pages, KVM's dirty \
log names these, and the daemon writes those pages to its disk out of the descriptor that it \
was sent. What is on the disk is compared with what the guest's code computes. Then the region \
is unplugged, and neither reaches it any more. Exit status: 0, also where there is no KVM (which \
is reported); 2 where the command line is wrong, 1 after any other error.";

const EXAMPLES: &str = "\
Examples (in the source tree, kvm_guest is: cargo run --example kvm_guest --):
  kvm_guest
  kvm_guest --plug 1024 --pages 1000

It needs /dev/kvm, readable and writable (often: membership in the group kvm), on x86-64.

RUST_LOG=debug shows what happens on the way.";

#[derive(Debug, Parser)]
#[command(name = "kvm_guest", next_line_help = true)]
#[command(long_about = ABOUT, after_long_help = EXAMPLES)]
/// Plugs RAM into a guest that runs under KVM, and shares it with a vhost-user daemon
pub(crate) struct Args {
    /// Size of the region that is plugged, in MiB, from 1 to 2048
    #[arg(long, value_name = "MIB", default_value_t = 16,
        value_parser = clap::value_parser!(u32).range(1..=2048))]
    pub(crate) plug: u32,

    /// How many of its pages the guest writes, spread over it
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pages: u32,

    /// KVM's device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    pub(crate) device: PathBuf,
}
