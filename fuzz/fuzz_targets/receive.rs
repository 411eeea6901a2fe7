//! Any memory table, on a few sealed files: it is taken exactly if a plain reading of the rules
//! says so, and what is taken is translated and mapped as the table says.
//!
//! Input: a byte for the number of files and the form; a byte for the length of each file in
//! pages; then the payload of SET_MEM_TABLE, or 4 bytes for each region of one: guest address,
//! size, user address and offset in pages, and in the upper half of the size what is odd about it.

#![no_main]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use guest_memory_shm::receive::{ReceivePolicy, ReceivedRegion, ReceivedTable};
use guest_memory_shm::{AdoptPolicy, RamOptions, ShmBacking};
use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryBackend};

const PAGE: u64 = 4096;

fuzz_target!(|input: &[u8]| {
    let _ = run(input);
});

fn run(input: &[u8]) -> Option<()> {
    let (form, rest) = input.split_first()?;
    let (lens, rest) = rest.split_at_checked(usize::from(form % 10))?;
    let files: Vec<File> = lens
        .iter()
        .map(|len| file(u64::from(len % 16) + 1))
        .collect();
    let payload = match form {
        128.. => rest.to_vec(),
        _ => table_of(rest),
    };

    let _ = ReceivedRegion::decode(rest);
    let regions = ReceivedRegion::decode_table(&payload).ok()?;
    assert_eq!(payload.len(), 8 + 32 * regions.len());

    let seals = AdoptPolicy::new().with_required_seals();
    let policy = ReceivePolicy::new().with_descriptors(seals);
    let clones: Vec<File> = files.iter().filter_map(|f| f.try_clone().ok()).collect();
    let table = match ReceivedTable::<()>::new(policy.clone()).set(&regions, clones) {
        Ok(table) => table,
        Err(refused) => {
            assert!(!acceptable(&regions, &files), "{refused}: {regions:x?}");
            assert_ne!(refused.reply_code(), 0);
            return None;
        }
    };
    assert!(acceptable(&regions, &files), "{regions:x?}");
    assert_eq!(table.regions().len(), regions.len());
    for (region, file) in regions.iter().zip(&files) {
        is_mapped(&table, region, file);
    }

    // Each is taken away and given back, and the others do not notice.
    for (region, file) in regions.iter().zip(&files) {
        let odd = ReceivedRegion {
            mmap_offset: !region.mmap_offset,
            ..*region
        };
        let less = table.remove(odd).expect("it is there");
        assert_eq!(less.guest_addr(region.user_addr), None);
        assert!(less.remove(region).is_err());
        for (other, file) in regions
            .iter()
            .zip(&files)
            .filter(|(other, _)| *other != region)
        {
            is_mapped(&less, other, file);
        }
        let again = less
            .add(region, [file.try_clone().ok()?])
            .expect("it was there");
        assert_eq!(again.regions(), table.regions());
        is_mapped(&again, region, file);
        assert!(again.add(region, [file.try_clone().ok()?]).is_err());
    }
    Some(())
}

/// A sealed file of so many pages.
fn file(pages: u64) -> File {
    let backing = ShmBacking::create(&RamOptions::new(), pages * PAGE).expect("there is memory");
    let fd = backing.as_fd().try_clone_to_owned();
    fd.expect("there are descriptors").into()
}

/// The payload that the short form stands for.
fn table_of(short: &[u8]) -> Vec<u8> {
    let (regions, _) = short.as_chunks::<4>();
    let mut payload = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
    for [guest, size, user, offset] in regions {
        let pages = |number: u8| u64::from(number) * PAGE;
        let (mut guest, mut user) = (pages(*guest), pages(*user));
        let (mut len, mut offset) = (pages(size % 16), pages(offset % 16));
        match size / 16 {
            10 => guest += 8,
            11 => len += 1,
            12 => offset += 8,
            13 => guest = (PAGE - 1) ^ !guest,
            14 => user = !user,
            15 => offset = (PAGE - 1) ^ !offset,
            _ => {}
        }
        for word in [guest, len, user, offset] {
            payload.extend(word.to_ne_bytes());
        }
    }
    payload
}

/// The rules, as they are written down.
fn acceptable(regions: &[ReceivedRegion], files: &[File]) -> bool {
    let overlap = |a: u64, b: u64, a_size: u64, b_size: u64| {
        let end = |start, size| u128::from(start) + u128::from(size);
        u128::from(a) < end(b, b_size) && u128::from(b) < end(a, a_size)
    };
    let fits = |region: &ReceivedRegion, file: &File| {
        let ReceivedRegion {
            guest_addr,
            size,
            user_addr,
            mmap_offset,
        } = *region;
        let len = file.metadata().expect("it is open").len();
        let end = mmap_offset.checked_add(size);
        size > 0
            && guest_addr.0.checked_add(size).is_some()
            && user_addr.checked_add(size).is_some()
            && end.is_some_and(|end| end <= len)
            && [guest_addr.0, size, mmap_offset]
                .iter()
                .all(|number| number % PAGE == 0)
    };
    let apart = |(at, one): (usize, &ReceivedRegion)| {
        regions[..at].iter().all(|other| {
            !overlap(one.guest_addr.0, other.guest_addr.0, one.size, other.size)
                && !overlap(one.user_addr, other.user_addr, one.size, other.size)
        })
    };
    (1..=8).contains(&regions.len())
        && regions.len() == files.len()
        && regions
            .iter()
            .zip(files)
            .all(|(region, file)| fits(region, file))
        && regions.iter().enumerate().all(apart)
}

/// Both ends of a region are where the table says, in the guest and in the file.
fn is_mapped(table: &ReceivedTable, region: &ReceivedRegion, file: &File) {
    let ReceivedRegion {
        guest_addr,
        size,
        user_addr,
        mmap_offset,
    } = *region;
    assert_eq!(table.ring(user_addr, size).ok(), Some(guest_addr));
    assert!(table.ring(user_addr, size + 1).is_err());
    for at in [0, size - 1] {
        let guest = GuestAddress(guest_addr.0 + at);
        assert_eq!(table.guest_addr(user_addr + at), Some(guest));
        assert!(table.ring(user_addr + at, size - at + 1).is_err());
        let memory = table.memory();
        let old: u8 = memory.read_obj(guest).expect("it is mapped");
        memory
            .write_obj(old.wrapping_add(1), guest)
            .expect("it is mapped");
        let mut byte = [0];
        file.read_exact_at(&mut byte, mmap_offset + at)
            .expect("it is in the file");
        assert_eq!(byte, [old.wrapping_add(1)]);
    }
    let held = table.memory().find_region(guest_addr).expect("it is there");
    assert_eq!(
        (held.range().start_addr(), held.range().size()),
        (guest_addr, size)
    );
    assert!(held.offset() + size <= held.backing().end());
}
