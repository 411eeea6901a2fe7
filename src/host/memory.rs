//! How much memory this process can still get, by all that limits it: its control groups, the
//! machine, the NUMA nodes that it may use.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::control_group::{Branch, Left, MemoryGroup};
use super::descriptors::is_none_left;
use super::fields::bytes;
use super::kept::Kept;
use super::mounts::{self, Mount};
use super::nodes;
use crate::host::NodeSet;

/// What is kept back of each limit, in bytes, for what this process and others in its group need
/// besides: stacks, page tables, the chunk that another process is about to take.
const MARGIN: u64 = 4 << 20;

/// The same of the machine and of a node, one byte in so many: all of its processes suffer when
/// nothing is left.
const RESERVE: u64 = 512;

/// The kernel's own need for shared memory, one byte in so many: page tables (1 in 512) and the
/// index of the file (1 in 455), both charged to the group.
const OVERHEAD: u64 = 128;

/// What pages are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    /// Memory of the machine, from these nodes, or from anywhere if they are none.
    Base(NodeSet),
    /// Pages of a pool.
    Huge {
        /// In bytes.
        page_size: u64,
        /// Whether they are not promised to the mapping yet.
        reserving: bool,
    },
}

/// How much is needed of which pages, in bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Demand {
    of: Vec<(Pages, u64)>,
}

impl Demand {
    pub(crate) fn of(pages: Pages, bytes: u64) -> Self {
        let mut demand = Self::default();
        demand.add(pages, bytes);
        demand
    }

    pub(crate) fn add(&mut self, pages: Pages, bytes: u64) {
        match self.of.iter_mut().find(|(known, _)| *known == pages) {
            Some((_, sum)) => *sum = sum.saturating_add(bytes),
            None => self.of.push((pages, bytes)),
        }
    }

    pub(crate) fn take(&mut self, pages: Pages, bytes: u64) {
        if let Some((_, sum)) = self.of.iter_mut().find(|(known, _)| *known == pages) {
            *sum = sum.saturating_sub(bytes);
        }
    }

    /// What of it a limit is about, with what the kernel needs for it.
    pub(crate) fn on(&self, bound: &Bound) -> u64 {
        let concerned = self.of.iter().filter(|(pages, _)| bound.scope.has(*pages));
        let charged = concerned.map(|(pages, bytes)| pages.charged(*bytes));
        charged.fold(0, u64::saturating_add)
    }

    /// Whether nothing is needed.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.of.iter().all(|(_, bytes)| *bytes == 0)
    }

    /// All of it, with what the kernel needs for it.
    pub(crate) fn total(&self) -> u64 {
        let charged = self.of.iter().map(|(pages, bytes)| pages.charged(*bytes));
        charged.fold(0, u64::saturating_add)
    }

    /// What is short of it, most of all.
    pub(crate) fn shortage(&self, bounds: &[Bound]) -> Option<Short> {
        let short = bounds.iter().filter_map(|bound| {
            let needed = self.on(bound);
            (needed > bound.left).then(|| bound.short(needed))
        });
        short.max_by_key(|short| short.needed - short.left)
    }
}

impl Pages {
    /// What is charged for so many bytes.
    pub(crate) fn charged(self, bytes: u64) -> u64 {
        match self {
            Self::Base(_) => bytes.saturating_add(bytes / OVERHEAD),
            Self::Huge { .. } => bytes,
        }
    }
}

/// Memory that is short: what is needed, what is left, and which limit says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Short {
    /// In bytes.
    pub(crate) needed: u64,
    /// In bytes.
    pub(crate) left: u64,
    pub(crate) limit: Limit,
}

/// What limits memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// A control group, in this file.
    ControlGroup { file: PathBuf },
    /// The memory and swap of the machine, in bytes.
    Machine { size: u64 },
    /// The memory of these nodes.
    Nodes { nodes: NodeSet },
}

/// What a limit leaves.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    limit: Limit,
    scope: Scope,
    /// In bytes; at least so many, if it is enough.
    pub(crate) left: u64,
}

/// Which pages a limit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Base,
    BaseAndHuge,
    Nodes(NodeSet),
    Huge(u64),
}

impl Scope {
    fn has(self, pages: Pages) -> bool {
        match (self, pages) {
            (Self::Base, Pages::Base(_)) | (Self::BaseAndHuge, _) => true,
            (Self::Nodes(nodes), Pages::Base(of)) => nodes == of,
            (Self::Huge(size), Pages::Huge { page_size, .. }) => size == page_size,
            _ => false,
        }
    }
}

impl Bound {
    pub(crate) fn short(&self, needed: u64) -> Short {
        Short {
            needed,
            left: self.left,
            limit: self.limit.clone(),
        }
    }

    #[cfg(test)]
    pub(crate) fn of_machine(left: u64) -> Self {
        Self {
            limit: Limit::Machine { size: left },
            scope: Scope::Base,
            left,
        }
    }

    fn of_group(left: Left, scope: Scope, margin: u64) -> Self {
        Self {
            limit: Limit::ControlGroup { file: left.file },
            scope,
            left: left.bytes.saturating_sub(margin),
        }
    }
}

/// All that limits the memory of this process, to be looked at as often as needed.
#[derive(Debug, Default)]
pub(crate) struct MemoryLimits {
    groups: Vec<MemoryGroup>,
    /// Whether the memory controller counts huge pages of pools, too.
    accounts_hugetlb: bool,
    hugetlb: Vec<Branch>,
    meminfo: Kept,
    swappiness: Kept,
    nodes: PathBuf,
}

impl MemoryLimits {
    /// Finds them. Where procfs is not mounted there are none.
    ///
    /// # Errors
    ///
    /// `EMFILE` and `ENFILE`: what cannot be opened now cannot be looked at.
    pub(crate) fn of_this_process() -> io::Result<Self> {
        let read = |path: &str| match fs::read_to_string(path) {
            Err(error) if is_none_left(&error) => Err(error),
            answer => Ok(answer.unwrap_or_default()),
        };
        // Memory is charged to the group of the process, huge pages to that of the thread.
        let process = read("/proc/self/cgroup")?;
        let thread = read("/proc/thread-self/cgroup")?;
        let mounts = mounts::parse(&read(mounts::MOUNTINFO)?);
        let proc = Path::new("/proc");
        Self::new(&process, &thread, &mounts, proc, Path::new(nodes::DIR))
    }

    fn new(
        process: &str,
        thread: &str,
        mounts: &[Mount],
        proc: &Path,
        nodes: &Path,
    ) -> io::Result<Self> {
        let memory = Branch::all("memory", process, mounts);
        let this = Self {
            groups: memory.iter().flat_map(Branch::memory).collect(),
            accounts_hugetlb: memory.iter().any(Branch::accounts_hugetlb),
            hugetlb: Branch::all("hugetlb", thread, mounts),
            meminfo: Kept::new(proc.join("meminfo")),
            swappiness: Kept::new(proc.join("sys/vm/swappiness")),
            nodes: nodes.to_owned(),
        };
        this.meminfo.open()?;
        this.swappiness.open()?;
        this.groups.iter().try_for_each(MemoryGroup::open)?;
        Ok(this)
    }

    /// What each limit leaves that is about something in `demand`; where it is `enough` and the
    /// demand, that may be a lower bound.
    pub(crate) fn bounds(&self, demand: &Demand, enough: u64) -> Vec<Bound> {
        let enough = enough.max(demand.total()).saturating_add(MARGIN);
        let mut bounds = Vec::new();
        let base = demand
            .of
            .iter()
            .any(|(pages, _)| matches!(pages, Pages::Base(_)));
        if base || self.accounts_hugetlb {
            let meminfo = self.meminfo.read().unwrap_or_default();
            let swap = bytes(&meminfo, "SwapFree").unwrap_or(0);
            self.add_groups(&mut bounds, swap, enough);
            if base {
                bounds.extend(machine(&meminfo, swap));
            }
            for (pages, _) in &demand.of {
                if let Pages::Base(of) = pages
                    && !of.is_empty()
                {
                    bounds.extend(self.of_nodes(*of, swap));
                }
            }
        }
        for (pages, _) in &demand.of {
            if let Pages::Huge {
                page_size,
                reserving,
            } = *pages
            {
                let branches = self.hugetlb.iter();
                let left = branches.flat_map(|branch| branch.hugetlb(page_size, reserving));
                bounds.extend(left.map(|left| Bound::of_group(left, Scope::Huge(page_size), 0)));
            }
        }
        bounds
    }

    /// The limits that are too small for the demand, however much others use now: all of the
    /// machine's memory and swap, and that limit of a group which it exceeds most, the one above
    /// which a group is slowed down (`memory.high`) included.
    pub(crate) fn too_small_for(&self, demand: &Demand) -> Vec<Short> {
        let mut bounds = self.bounds(demand, 0);
        let high = self.groups.iter().filter_map(MemoryGroup::left_to_high);
        bounds.extend(high.map(|left| Bound::of_group(left, self.scope(), 0)));
        let short = |bound: &Bound| {
            let concerned = demand
                .of
                .iter()
                .filter(|(pages, _)| bound.scope.has(*pages));
            let bytes = concerned.map(|(_, bytes)| *bytes);
            Short {
                needed: bytes.fold(0, u64::saturating_add),
                ..bound.short(0)
            }
        };
        let of_machine = bounds.iter().filter_map(|bound| match bound.limit {
            Limit::Machine { size } => Some(short(bound)).filter(|short| short.needed > size),
            _ => None,
        });
        let of_group = bounds.iter().filter(|bound| {
            matches!(bound.limit, Limit::ControlGroup { .. }) && demand.on(bound) > bound.left
        });
        let of_group = of_group.map(short);
        let of_group = of_group.max_by_key(|short| short.needed.saturating_sub(short.left));
        of_machine.chain(of_group).collect()
    }

    fn scope(&self) -> Scope {
        if self.accounts_hugetlb {
            Scope::BaseAndHuge
        } else {
            Scope::Base
        }
    }

    fn add_groups(&self, bounds: &mut Vec<Bound>, swap: u64, enough: u64) {
        // Without it reclaim in a group leaves anonymous and shared memory where it is.
        let swap = match self.swappiness.number() {
            Some(0) => 0,
            _ => swap,
        };
        let limits = self.groups.iter().filter_map(MemoryGroup::swap_left);
        let swap = limits.fold(swap, u64::min);
        let left = self
            .groups
            .iter()
            .flat_map(|group| group.left(swap, enough));
        bounds.extend(left.map(|left| Bound::of_group(left, self.scope(), MARGIN)));
    }

    /// What nodes have: free pages, clean pages of files, and swap space.
    fn of_nodes(&self, nodes: NodeSet, swap: u64) -> Option<Bound> {
        let mut left = 0_u64;
        for node in nodes.iter() {
            let text = fs::read_to_string(self.nodes.join(format!("node{node}/meminfo"))).ok()?;
            let value = |name| bytes(&text, name).unwrap_or(0);
            let cached = value("Active(file)") + value("Inactive(file)");
            let written_first = value("Dirty") + value("Writeback");
            let all = value("MemFree") + cached.saturating_sub(written_first);
            left += all.saturating_sub(reserve(value("MemTotal")));
        }
        Some(Bound {
            limit: Limit::Nodes { nodes },
            scope: Scope::Nodes(nodes),
            left: left.saturating_add(swap),
        })
    }
}

/// What the machine can still give.
fn machine(meminfo: &str, swap: u64) -> Option<Bound> {
    let available = bytes(meminfo, "MemAvailable")?;
    let total = bytes(meminfo, "MemTotal").unwrap_or(0);
    let left = available.saturating_add(swap);
    let swap_total = bytes(meminfo, "SwapTotal").unwrap_or(0);
    Some(Bound {
        limit: Limit::Machine {
            size: total.saturating_add(swap_total),
        },
        scope: Scope::Base,
        left: left.saturating_sub(reserve(total)),
    })
}

fn reserve(total: u64) -> u64 {
    MARGIN.max(total / RESERVE)
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
