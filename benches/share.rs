//! Sharing many regions with a daemon: `VhostUserShare` against the bare exchange of messages,
//! that is vhost's `Frontend` driven directly, with the same in-process daemon.
//!
//! `cargo bench --bench share` prints the ratio of the two in this run: the best time of each,
//! measured in turn, because others use the machine too. `SHARE_ROUNDS` sets how often.

mod frontend;

use std::error::Error;
use std::time::{Duration, Instant};

use guest_memory_shm::mock::MockDaemon;
use guest_memory_shm::{GuestMemoryShm, MemoryTable, RamOptions, VhostUserShare};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vm_memory::GuestAddress;

use frontend::connect;

const REGIONS: u64 = 509;
const SIZE: u64 = 2 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    // Cargo runs benches as tests too.
    let test = std::env::args().any(|arg| arg == "--test");
    let rounds = std::env::var("SHARE_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok());
    let rounds = if test { 1 } else { rounds.unwrap_or(20) };

    let mut memory = GuestMemoryShm::<()>::builder();
    for slot in 0..REGIONS {
        // A descriptor for each, as hotplug makes them.
        memory = memory.add_ram(RamOptions::new(), [(GuestAddress(slot * 2 * SIZE), SIZE)]);
    }
    let table = memory.build()?.memory_table();
    let daemon = MockDaemon::builder().start_unnamed()?;

    let (mut bare, mut ours) = (Duration::MAX, Duration::MAX);
    for _ in 0..rounds {
        bare = bare.min(exchange(&daemon, &table)?);
        ours = ours.min(share(&daemon, &table)?);
    }
    println!("{REGIONS} regions, best of {rounds} rounds each");
    println!("bare exchange   {bare:>12.3?}");
    println!("VhostUserShare  {ours:>12.3?}");
    println!(
        "ratio           {:>12.3}",
        ours.as_secs_f64() / bare.as_secs_f64()
    );
    Ok(())
}

fn exchange(daemon: &MockDaemon, table: &MemoryTable) -> Result<Duration, Box<dyn Error>> {
    let (mut frontend, _) = connect(daemon.connect()?)?;
    let infos: Vec<_> = table
        .regions()
        .iter()
        .map(VhostUserMemoryRegionInfo::from)
        .collect();
    let start = Instant::now();
    for info in &infos {
        frontend.add_mem_region(info)?;
    }
    let elapsed = start.elapsed();
    check_and_leave(daemon, frontend)?;
    Ok(elapsed)
}

fn share(daemon: &MockDaemon, table: &MemoryTable) -> Result<Duration, Box<dyn Error>> {
    let (frontend, features) = connect(daemon.connect()?)?;
    let mut share = VhostUserShare::new(&frontend, features)?;
    let start = Instant::now();
    share.update_table(table)?;
    let elapsed = start.elapsed();
    drop(share);
    check_and_leave(daemon, frontend)?;
    Ok(elapsed)
}

fn check_and_leave(daemon: &MockDaemon, frontend: Frontend) -> Result<(), Box<dyn Error>> {
    assert_eq!(daemon.table().len() as u64, REGIONS);
    drop(frontend);
    daemon.wait_disconnected(Duration::from_secs(60))?;
    Ok(())
}
