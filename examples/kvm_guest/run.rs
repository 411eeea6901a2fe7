//! What happens, in order, and the report of it.

use std::ffi::CString;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use guest_memory_shm::GuestRange;
use kvm_ioctls::Kvm;
use vm_memory::GuestAddress;

use crate::args::Args;
use crate::failure::{Failure, OrFail, Result};
use crate::guest::{Exit, PAGE, PROGRAM, Pages};
use crate::machine::Machine;
use crate::report::Report;

/// Where RAM is plugged.
const PLUG: u32 = 1 << 30;
const MIB: u32 = 1 << 20;

/// KVM, if its device is there.
pub(crate) fn open(device: &Path) -> Result<Option<Kvm>> {
    let doing = || {
        format!(
            "cannot use {} (it must be readable and writable, often by membership in the group \
             kvm)",
            device.display()
        )
    };
    let path = CString::new(device.as_os_str().as_bytes()).or_fail(doing)?;
    match Kvm::new_with_path(&path) {
        Ok(kvm) => Ok(Some(kvm)),
        Err(error) => match std::io::Error::from(error) {
            missing if missing.kind() == ErrorKind::NotFound => Ok(None),
            error => Err(error).or_fail(doing),
        },
    }
}

/// All of it; gives the report.
pub(crate) fn run(args: &Args, kvm: &Kvm) -> Result<Report> {
    let range = GuestRange::new(GuestAddress(PLUG.into()), u64::from(args.plug * MIB))
        .or_fail(|| "there is no such region")?;
    let pages = choose(args)?;
    let vm = kvm
        .create_vm()
        .or_fail(|| format!("cannot make a VM with {}", args.device.display()))?;
    let mut machine = Machine::new(Arc::new(vm), pages.count)?;
    let mut report = Report::default();

    report.section("The machine");
    report.line(
        "guest",
        format_args!("1 vCPU, {} bytes of code", PROGRAM.len()),
    );
    lines(&mut report, "KVM", machine.slots()?);
    report.line("daemon", "in this process, on a socket without a name");
    report.line("", holds(&machine));
    machine.start_dirty_logging()?;
    report.line("guest writes", miss(&mut machine, pages)?);

    machine.plug(range)?;
    report.section(format_args!("Plugged {range}"));
    lines(&mut report, "KVM", machine.slots()?);
    report.line("daemon", holds(&machine));

    if let Exit::NoRam(addr) = machine.guest_writes(pages)? {
        let problem = "the guest has no RAM in the region that was plugged, at";
        return Err(Failure::new(format!("{problem} {:#x}", addr.0)));
    }
    let wrote = format!("{} pages, without an exit", pages.count);
    report.line("guest writes", wrote);
    lines(
        &mut report,
        "dirty log",
        shortened(check_dirty(&machine, pages)?),
    );

    machine.daemon_writes(pages)?;
    machine.check_disk(pages)?;
    let kib = pages.count * (PAGE / 1024);
    report.line(
        "daemon reads",
        format_args!("{kib} KiB, and writes them to its disk"),
    );
    report.line("verified", "its disk holds what the guest wrote");

    machine.unplug(range)?;
    report.section("Unplugged");
    lines(&mut report, "KVM", machine.slots()?);
    report.line("daemon", holds(&machine));
    report.line("guest writes", miss(&mut machine, pages)?);
    machine.end()?;
    Ok(report)
}

/// Spreads the pages over the region.
fn choose(args: &Args) -> Result<Pages> {
    let there = args.plug * (MIB / PAGE);
    if args.pages > there {
        return Err(Failure::usage(format!(
            "a region of {} MiB has {there} pages and not {}: give fewer with --pages, or more \
             with --plug",
            args.plug, args.pages
        )));
    }
    Ok(Pages {
        first: PLUG,
        stride: there / args.pages * PAGE,
        count: args.pages,
    })
}

/// The guest writes where it must have no RAM; says where that was noticed.
fn miss(machine: &mut Machine, pages: Pages) -> Result<String> {
    match machine.guest_writes(pages)? {
        Exit::NoRam(addr) => Ok(format!(
            "no RAM at {:#x}: it exits to the VMM (MMIO)",
            addr.0
        )),
        Exit::Done => Err(Failure::new(
            "the guest has RAM where none is plugged: the slot is still there",
        )),
    }
}

fn holds(machine: &Machine) -> String {
    let regions = machine.daemon_regions();
    let at: Vec<String> = regions
        .iter()
        .map(|addr| format!("{:#x}", addr.0))
        .collect();
    format!("maps the regions at {}", at.join(" and "))
}

/// Checks that KVM's dirty log names what the guest wrote and nothing else.
fn check_dirty(machine: &Machine, pages: Pages) -> Result<Vec<GuestRange>> {
    let dirty = machine.dirty_log()?;
    let found: Vec<GuestRange> = dirty.iter().flat_map(|region| region.ranges()).collect();
    if found != pages.ranges()? {
        return Err(Failure::new(format!(
            "KVM's dirty log names other pages than those that the guest wrote: {found:?}"
        )));
    }
    Ok(found)
}

/// The first few, and how many more there are.
fn shortened(ranges: Vec<GuestRange>) -> Vec<String> {
    const SHOWN: usize = 8;
    let mut lines: Vec<String> = ranges
        .iter()
        .take(SHOWN)
        .map(GuestRange::to_string)
        .collect();
    if ranges.len() > SHOWN {
        lines.push(format!("and {} more", ranges.len() - SHOWN));
    }
    lines
}

/// Several values of one name.
fn lines(report: &mut Report, name: &str, values: Vec<String>) {
    for (at, value) in values.iter().enumerate() {
        report.line(if at == 0 { name } else { "" }, value);
    }
}
