//! A daemon's end: vhost's handler of requests on `receive`, which checks and maps the memory
//! table of a frontend. That one is in the same process here, so that the example runs by itself.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use guest_memory_shm::receive::{ReceivePolicy, ReceivedTable};
use guest_memory_shm::{AdoptPolicy, GuestMemoryShm, VhostUserShare};
use not_offered::not_offered;
use vhost::vhost_user::{self, BackendReqHandler, VhostUserProtocolFeatures as Features, message};
use vm_memory::GuestAddress;

#[path = "common/not_offered.rs"]
mod not_offered;

struct Daemon(ReceivedTable);

impl vhost_user::VhostUserBackendReqHandlerMut for Daemon {
    fn set_mem_table(
        &mut self,
        regions: &[message::VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> vhost_user::Result<Option<Vec<u64>>> {
        // A refusal changes nothing: the table that was there stays.
        let told = |refusal: &_| println!("  the daemon refuses: {refusal}");
        self.0 = self.0.set(regions, files).inspect_err(told)?;
        Ok(None)
    }

    not_offered!(features, slots, rings, others);
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // A file that the frontend can truncate is not mapped: touching it could be SIGBUS.
    let sealed = AdoptPolicy::new().with_required_seals();
    let table = ReceivedTable::new(ReceivePolicy::new().with_descriptors(sealed));
    let daemon = Arc::new(Mutex::new(Daemon(table)));
    let (ours, theirs) = UnixStream::pair()?;
    let mut requests = BackendReqHandler::from_stream(theirs, Arc::clone(&daemon));
    // A refusal is a hang-up: without REPLY_ACK the frontend takes all else for done. Go on after
    // vhost's ReqHandlerError only if it acknowledged REPLY_ACK (set_protocol_features).
    std::thread::spawn(move || while requests.handle_request().is_ok() {});
    let mut share = VhostUserShare::new(ours, Features::empty())?;
    for backend in ["memory-backend-memfd,size=2M", "memory-backend-shm,size=2M"] {
        let memory = GuestMemoryShm::<()>::builder()
            .add_ram(backend.parse()?, [(GuestAddress(0), 2 << 20)])
            .build()?;
        memory.write_obj(0xcafe_u16, GuestAddress(0x1000))?;
        println!("{backend}:");
        let sent = share.update_memory(&memory);
        _ = sent.inspect_err(|error| println!("  the frontend: {error}"));
        let table = &daemon.lock().map_err(|_| "a handler panicked")?.0;
        let number = table.memory().read_obj::<u16>(GuestAddress(0x1000))?;
        println!("  the daemon reads {number:#x}");
    }
    Ok(())
}
