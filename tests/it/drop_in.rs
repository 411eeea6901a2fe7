//! Code that was written for vm-memory's `GuestMemoryMmap` and has only its type alias changed.
//!
//! [`vmm!`] holds that code once, and makes two modules of it: one with either alias.

use std::io::Cursor;

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::{Elf, Error as LoaderError, KernelLoader, load_cmdline};
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
};

/// An ELF executable of one segment of `code` at `addr`, which is its entry too.
fn elf(code: &[u8], addr: u64) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    file.extend(1u32.to_le_bytes());
    for word in [addr, 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for word in [1u32, 5] {
        file.extend(word.to_le_bytes()); // PT_LOAD, readable and executable
    }
    let len = code.len() as u64;
    for word in [HEADERS, addr, addr, len, len, 4096] {
        file.extend(word.to_le_bytes());
    }
    assert_eq!(file.len() as u64, HEADERS);
    file.extend(code);
    file
}

/// A request of the toy device: a name is asked for, and a greeting is wanted.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Request {
    magic: u32,
    name_len: u32,
}

// Plain integers without padding.
#[allow(unsafe_code, reason = "ByteValued is an unsafe trait")]
// SAFETY: two u32, one after the other: no padding, and any bytes are a valid value.
unsafe impl ByteValued for Request {}

const MAGIC: u32 = 0x0047_4d53;
const QUEUE_SIZE: u16 = 8;
/// The descriptor table, and the two rings after it.
const RINGS: [u64; 3] = [0x1000, 0x2000, 0x3000];
const BUFFERS: u64 = 0x4000;

/// What a guest's driver writes: a chain of a request, a name and room for the answer.
fn drive(memory: &impl GuestMemoryBackend, name: &[u8], room: (GuestAddress, u32)) {
    let request = Request {
        magic: MAGIC,
        name_len: name.len() as u32,
    };
    let name_at = GuestAddress(BUFFERS + 0x100);
    memory
        .write_obj(request, GuestAddress(BUFFERS))
        .expect("there is RAM");
    memory.write_slice(name, name_at).expect("there is RAM");
    let chain = [
        Descriptor::new(BUFFERS, 8, VRING_DESC_F_NEXT as u16, 1),
        Descriptor::new(name_at.0, name.len() as u32, VRING_DESC_F_NEXT as u16, 2),
        Descriptor::new(room.0.0, room.1, VRING_DESC_F_WRITE as u16, 0),
    ];
    for (at, descriptor) in (RINGS[0]..).step_by(16).zip(chain) {
        memory
            .write_obj(descriptor, GuestAddress(at))
            .expect("there is RAM");
    }
    // The avail ring: flags, index, the head of the chain.
    memory
        .write_obj([0u16, 1, 0], GuestAddress(RINGS[1]))
        .expect("there is RAM");
}

macro_rules! vmm {
    ($module:ident, $memory:ty) => {
        mod $module {
            use super::*;

            /// The one line that differs.
            type GuestMemory = $memory;

            struct Device {
                memory: GuestMemoryAtomic<GuestMemory>,
                queue: Queue,
            }

            impl Device {
                fn new(memory: GuestMemory) -> Self {
                    let mut queue = Queue::new(QUEUE_SIZE).expect("a power of two");
                    let low = |addr: u64| Some(addr as u32);
                    queue.set_size(QUEUE_SIZE);
                    queue.set_desc_table_address(low(RINGS[0]), Some(0));
                    queue.set_avail_ring_address(low(RINGS[1]), Some(0));
                    queue.set_used_ring_address(low(RINGS[2]), Some(0));
                    queue.set_ready(true);
                    Self {
                        memory: GuestMemoryAtomic::new(memory),
                        queue,
                    }
                }

                /// Serves all requests and gives their number.
                fn serve(&mut self) -> usize {
                    let memory = self.memory.memory();
                    assert!(self.queue.is_valid(&*memory));
                    let chains: Vec<_> = self.queue.iter(memory.clone()).expect("valid").collect();
                    let served = chains.len();
                    for chain in chains {
                        let head = chain.head_index();
                        let mut reader = chain.clone().reader(&*memory).expect("readable");
                        let request: Request = reader.read_obj().expect("a request");
                        assert_eq!(request.magic, MAGIC);
                        let mut name = vec![0; request.name_len as usize];
                        std::io::Read::read_exact(&mut reader, &mut name).expect("a name");
                        let mut writer = chain.writer(&*memory).expect("writable");
                        let greeting = [b"hello, ".as_slice(), &name].concat();
                        std::io::Write::write_all(&mut writer, &greeting).expect("there is room");
                        let written = greeting.len() as u32;
                        self.queue.add_used(&*memory, head, written).expect("valid");
                    }
                    served
                }
            }

            fn boot() -> GuestMemory {
                let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 20), 1 << 20)];
                GuestMemory::from_ranges(&ranges).expect("good ranges")
            }

            #[test]
            fn a_device_serves_its_queue_in_guest_ram() {
                let mut device = Device::new(boot());
                let memory = device.memory.memory().into_inner();
                assert_eq!(device.serve(), 0);
                // The answer crosses from the first region to the second.
                let room = GuestAddress((1 << 20) - 5);
                drive(&*memory, b"guest", (room, 64));
                assert_eq!(device.serve(), 1);
                let mut answer = [0; 13];
                memory.read_slice(&mut answer, room).expect("there is RAM");
                assert_eq!(&answer, b"hello, guest\0");
                // The used ring: flags and index, then head and length of the first.
                let used: [u16; 2] = memory.read_obj(GuestAddress(RINGS[2])).expect("RAM");
                assert_eq!(used, [0, 1]);
                let first: [u32; 2] = memory.read_obj(GuestAddress(RINGS[2] + 4)).expect("RAM");
                assert_eq!(first, [0, 12]);
                assert_eq!(device.serve(), 0);
            }

            #[test]
            fn a_buffer_in_a_hole_is_an_error_of_the_chain() {
                let device = Device::new(boot());
                let memory = device.memory.memory().into_inner();
                drive(&*memory, b"guest", (GuestAddress(3 << 20), 64));
                let mut queue = device.queue;
                let chain = queue.pop_descriptor_chain(memory.clone()).expect("one");
                assert_eq!(chain.clone().count(), 3);
                assert!(chain.clone().reader(&*memory).is_ok());
                assert!(chain.writer(&*memory).is_err());
            }

            #[test]
            fn objects_and_slices_are_accessed_however_the_memory_is_held() {
                // With GuestMemoryShm this is an access of the type's own, not the trait's: the
                // import is then unused, in a file that calls nothing else of it.
                #[allow(unused_imports)]
                use vm_memory::Bytes;

                let at = |n: u64| GuestAddress((1 << 20) - 4 + n);
                let owned = boot();
                let error = |addr| owned.write_obj(1u64, GuestAddress(addr)).unwrap_err();
                let text = "Guest memory error: invalid guest address 2097152";
                assert_eq!(error(2 << 20).to_string(), text);
                let text = "Guest memory error: only used 3 bytes in 8 long buffer";
                assert_eq!(error((2 << 20) - 3).to_string(), text);

                let published = GuestMemoryAtomic::new(owned.clone());
                let guard = published.memory();
                guard
                    .write_obj(0x1122_3344_5566_7788u64, at(0))
                    .expect("RAM");
                let shared: std::sync::Arc<GuestMemory> = guard.into_inner();
                let mut bytes = [0; 8];
                shared.read_slice(&mut bytes, at(0)).expect("RAM");
                assert_eq!(u64::from_ne_bytes(bytes), 0x1122_3344_5566_7788);
                let borrowed = &&owned;
                borrowed.write_slice(b"slice", at(8)).expect("RAM");
                let read: [u8; 5] = borrowed.read_obj(at(8)).expect("RAM");
                assert_eq!(&read, b"slice");
                // The paths that name type or trait.
                let read = GuestMemory::read_obj::<u32>(&owned, at(0)).expect("RAM");
                let by_trait = <GuestMemory as Bytes<_>>::read_obj::<u32>(&owned, at(0));
                assert_eq!(read, by_trait.expect("RAM"));
            }

            #[test]
            fn a_kernel_and_its_command_line_are_loaded() {
                let memory = boot();
                // The code lies across the border of the two regions.
                let code: Vec<u8> = (0..10_000u32).map(|n| (n * 13) as u8).collect();
                let entry = (1 << 20) - 4096;
                let mut image = Cursor::new(elf(&code, entry));
                let loaded = Elf::load(&memory, None, &mut image, None).expect("it fits");
                assert_eq!(loaded.kernel_load, GuestAddress(entry));
                assert_eq!(loaded.kernel_end, entry + 10_000);
                let mut bytes = vec![0; 10_000];
                memory
                    .read_slice(&mut bytes, GuestAddress(entry))
                    .expect("there is RAM");
                assert!(bytes == code);

                let cmdline = Cmdline::try_from("console=ttyS0 panic=1", 256).expect("short");
                load_cmdline(&memory, GuestAddress(0x8000), &cmdline).expect("it fits");
                let mut text = [0xff; 22];
                memory
                    .read_slice(&mut text, GuestAddress(0x8000))
                    .expect("there is RAM");
                assert_eq!(&text, b"console=ttyS0 panic=1\0");
                let past = memory.last_addr();
                let refused = load_cmdline(&memory, past, &cmdline);
                assert_eq!(refused, Err(LoaderError::CommandLineOverflow));
            }

            #[test]
            fn a_kernel_from_a_file_that_does_not_fit_is_refused() {
                let memory = boot();
                let mut file = tempfile::tempfile().expect("a file");
                let image = elf(&[7; 8192], (2 << 20) - 4096);
                std::io::Write::write_all(&mut file, &image).expect("written");
                let refused = Elf::load(&memory, None, &mut file, None);
                let Err(LoaderError::Elf(_)) = refused else {
                    panic!("{refused:?}");
                };
                // From the same file, where there is room.
                let lower = Some(GuestAddress(0));
                let mut file = tempfile::tempfile().expect("a file");
                let image = elf(&[7; 8192], (2 << 20) - 8192);
                std::io::Write::write_all(&mut file, &image).expect("written");
                assert!(Elf::load(&memory, lower, &mut file, None).is_ok());
                let last: u8 = memory.read_obj(memory.last_addr()).expect("there is RAM");
                assert_eq!(last, 7);
            }
        }
    };
}

vmm!(with_vm_memorys_own, vm_memory::GuestMemoryMmap);
vmm!(with_shared_memory, guest_memory_shm::GuestMemoryShm);
vmm!(
    with_vm_memorys_own_and_dirty_bitmap,
    vm_memory::GuestMemoryMmap<AtomicBitmap>
);
vmm!(
    with_shared_memory_and_dirty_bitmap,
    guest_memory_shm::GuestMemoryShm<AtomicBitmap>
);
