//! Parts of the texts of errors that depend on their values.

use super::SlotLimit;
use crate::units::HumanSize;

pub(crate) fn found_instead(found: Option<u64>) -> String {
    match found {
        Some(size) => format!("one of {} does", HumanSize(size)),
        None => "none does".to_owned(),
    }
}

pub(crate) fn too_many(limit: u64, slots: SlotLimit) -> String {
    match slots {
        SlotLimit::Message => format!(
            "SET_MEM_TABLE carries {limit}: negotiate CONFIGURE_MEM_SLOTS with the daemon or use \
             fewer regions"
        ),
        SlotLimit::Daemon => {
            format!("the daemon has {limit} memory slots: use fewer regions or another daemon")
        }
        SlotLimit::Kernel => format!(
            "in-kernel vhost takes {limit}: load the module vhost with a larger max_mem_regions or \
             use fewer regions"
        ),
    }
}
