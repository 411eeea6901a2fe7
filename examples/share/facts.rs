//! What a run did with a daemon, and how much of it.

use std::fmt;
use std::time::Duration;

use vhost::vhost_user::VhostUserProtocolFeatures;

use crate::failure::Result;
use crate::report::Report;
use crate::session::{Endpoint, Session};

impl Report {
    /// Lines that are indented as they come.
    pub(crate) fn block(&mut self, block: impl fmt::Display) {
        for line in block.to_string().lines() {
            self.add(&format!("  {line}"), 4);
        }
    }

    /// How many system calls a filter allows, if there is one.
    pub(crate) fn sandbox(&mut self, calls: Option<usize>) {
        if let Some(calls) = calls {
            self.section("Sandbox");
            let value = format!("{calls} are allowed, any other ends this process");
            self.line("system calls", value);
        }
    }

    /// What the daemon is.
    pub(crate) fn daemon(&mut self, endpoint: &Endpoint, session: &Session) -> Result<()> {
        self.section("Daemon");
        match endpoint {
            Endpoint::Socket(path) => self.line("socket", path.display()),
            Endpoint::Local(_) => self.line("socket", "one without a name (in this process)"),
        }
        let (features, protocol) = session.features()?;
        self.line("virtio features", virtio_features(features));
        self.line("protocol features", protocol_features(protocol));
        match session.slots()? {
            Some(slots) => self.line("memory slots", slots),
            None => self.line(
                "memory slots",
                "none: it takes whole tables of up to 8 regions",
            ),
        }
        self.line("capacity", size(session.capacity));
        Ok(())
    }

    /// How much went which way, and how fast.
    pub(crate) fn io(&mut self, name: &str, bytes: u64, time: Duration) {
        let rate = bytes as f64 / f64::from(1 << 20) / time.as_secs_f64().max(1e-9);
        self.line(name, format_args!("{}, {rate:.0} MiB/s", size(bytes)));
    }
}

/// A number of bytes: exactly, and in a unit that a person can read.
pub(crate) fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let exact = units
        .iter()
        .find(|(shift, _)| bytes >= 1 << shift && bytes.is_multiple_of(1 << shift));
    match exact {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

/// The features of virtio and of virtio-blk, by the names of the virtio specification.
fn virtio_features(bits: u64) -> String {
    const NAMES: [(u32, &str); 14] = [
        (1, "SIZE_MAX"),
        (2, "SEG_MAX"),
        (5, "RO"),
        (6, "BLK_SIZE"),
        (9, "FLUSH"),
        (11, "CONFIG_WCE"),
        (12, "MQ"),
        (13, "DISCARD"),
        (14, "WRITE_ZEROES"),
        (28, "INDIRECT_DESC"),
        (29, "EVENT_IDX"),
        (30, "PROTOCOL_FEATURES"),
        (32, "VERSION_1"),
        (34, "RING_PACKED"),
    ];
    let set = (0..u64::BITS).filter(|bit| bits & 1 << bit != 0);
    let names = set.map(|bit| match NAMES.iter().find(|(known, _)| *known == bit) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("bit {bit}"),
    });
    format!("{} ({bits:#x})", names.collect::<Vec<_>>().join(", "))
}

fn protocol_features(features: VhostUserProtocolFeatures) -> String {
    let names: Vec<&str> = features.iter_names().map(|(name, _)| name).collect();
    format!("{} ({:#x})", names.join(", "), features.bits())
}
