//! Huge pages that cannot be had: refused before anything is created, with what would help.

use std::sync::atomic::{AtomicBool, Ordering};

use guest_memory_shm::{
    BackingError, BackingSource, Error, GuestMemoryShm, GuestRegionShm, OptionsError,
    ResourceLimit, ShmBacking,
};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

use crate::bad_input::{build, huge};
use crate::isolation::{
    HugePool, PAGE, assert_refused, in_own_process, in_own_process_leaving_nothing,
};
use crate::proc::leaves_nothing;
use crate::support::huge_pages_short;

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;

#[test]
fn huge_pages_of_posix_shm_are_refused() {
    in_own_process_leaving_nothing!(|| {
        let options = huge(HUGE).with_backing(BackingSource::PosixShm);
        let text = "hugetlb does not go with POSIX shared memory: it has no huge pages of a pool, \
                    use a memfd backing, or page size transparent (thp=on)";
        assert_refused!(
            build(options.clone(), &[(0, HUGE)]),
            Error::Options(OptionsError::NotOfBacking { .. }),
            text
        );
        assert_refused!(
            ShmBacking::create(&options, HUGE),
            BackingError::Options(OptionsError::NotOfBacking { .. }),
            text
        );
    });
}

#[test]
fn a_huge_page_size_that_the_kernel_does_not_have_is_refused() {
    in_own_process_leaving_nothing!(|| {
        for size in [0, 3 * MIB, u64::MAX] {
            let refused = build(huge(size), &[(0, HUGE)]).unwrap_err();
            let Error::Options(OptionsError::HugePageSize { size: named, .. }) = refused else {
                panic!("{refused:?}");
            };
            assert_eq!(named, size);
        }
        for size in [1, PAGE, 4 * MIB, 1 << 62] {
            let Err(error) = build(huge(size), &[(0, HUGE)]) else {
                panic!("{size} was accepted");
            };
            let Error::Backing(BackingError::NoSuchHugePageSize {
                page_size, offered, ..
            }) = &error
            else {
                panic!("{error:?}");
            };
            assert_eq!(*page_size, size);
            assert!(
                offered.contains(&HUGE) && offered.is_sorted(),
                "{offered:?}"
            );
            let text = error.to_string();
            assert!(text.starts_with("huge pages of "), "{text}");
            assert!(
                text.contains(" are not offered by this kernel, which has "),
                "{text}"
            );
            assert!(text.contains("2 MiB"), "{text}");
        }
    });
}

#[test]
fn an_empty_pool_of_huge_pages_is_an_error_that_says_how_to_fill_it() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 0) else {
            return;
        };
        let free = pool.free();
        leaves_nothing(|| {
            let error = build(huge(HUGE), &[(0, 3 * HUGE)]).unwrap_err();
            assert_eq!(huge_pages_short(&error), Some((3, 0)));
            assert_refused!(
                Err::<(), _>(error),
                Error::Shortage(_),
                format!(
                    "3 more huge pages of 2 MiB are needed, and 0 can be had ({free} unused, \
                     {free} of them reserved by others): raise \
                     /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages by 3, or leave out \
                     hugetlb=on (PageSize::Base)"
                ),
            );
            let region = GuestRegionShm::<()>::new((GuestAddress(0), HUGE), &huge(HUGE));
            assert_eq!(huge_pages_short(&region.unwrap_err().into()), Some((1, 0)));
        });
        assert_eq!(pool.free(), free);
    });
}

#[test]
fn backings_that_only_together_exceed_the_pool_are_refused_before_any_is_created() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 3) else {
            return;
        };
        let before = (pool.free(), pool.reserved());
        let two = |first, second| {
            GuestMemoryShm::<()>::builder()
                .add_ram(huge(HUGE), [(GuestAddress(0), first * HUGE)])
                .add_ram(huge(HUGE), [(GuestAddress(1 << 40), second * HUGE)])
                .build()
        };
        leaves_nothing(|| {
            for (first, second) in [(4, 1), (2, 2), (1, 3)] {
                let refused = two(first, second).unwrap_err().into();
                assert_eq!(huge_pages_short(&refused), Some((first + second, 3)));
            }
            let text = two(2, 2).unwrap_err().to_string();
            assert!(
                text.starts_with("4 more huge pages of 2 MiB are needed, and 3 can be had"),
                "{text}"
            );
            assert!(
                text.contains("nr_hugepages by 1, or leave out hugetlb=on (PageSize::Base)"),
                "{text}"
            );
        });
        assert_eq!((pool.free(), pool.reserved()), before);
        // The control: what fits is accepted, and then nothing is left for others.
        let memory = two(1, 2).unwrap();
        assert_eq!(pool.reserved(), before.1 + 3);
        assert!(two(1, 1).is_err());
        drop(memory);
        assert_eq!((pool.free(), pool.reserved()), before);
    });
}

#[test]
fn a_pool_that_is_found_short_only_when_mapping_gives_the_same_error() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 2) else {
            return;
        };
        let backing = ShmBacking::create(&huge(HUGE), 2 * HUGE).unwrap();
        let rival = GuestRegionShm::<()>::new((GuestAddress(0), 2 * HUGE), &huge(HUGE)).unwrap();
        leaves_nothing(|| {
            let refused = GuestRegionShm::<()>::from_backing(&backing, 0, (GuestAddress(0), HUGE));
            let refused = Error::from(refused.unwrap_err());
            assert_eq!(huge_pages_short(&refused), Some((1, 0)), "{refused:?}");
            let reserved = match refused.shortage().unwrap().limit {
                ResourceLimit::HugePages { reserved, .. } => reserved,
                _ => unreachable!(),
            };
            assert_eq!(reserved, 2);
        });
        drop(rival);
        let place = GuestRegionShm::<()>::from_backing(&backing, 0, (GuestAddress(0), HUGE));
        assert!(place.is_ok());
        drop((place, backing));
        assert_eq!(pool.reserved(), 0);
    });
}

#[test]
fn a_mapping_that_fails_takes_no_memory_of_other_threads_with_it() {
    in_own_process(|| {
        let Some(_pool) = HugePool::with_available(HUGE, 1) else {
            return;
        };
        let backing = ShmBacking::create(&huge(HUGE), HUGE).unwrap();
        let _rival = GuestRegionShm::<()>::new((GuestAddress(0), HUGE), &huge(HUGE)).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Maps the first free place, which is not aligned for a size below that of a huge
            // page, and dies of SIGSEGV if another process unmaps it.
            scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    let others = MmapRegion::<()>::new((HUGE - PAGE) as usize).unwrap();
                    let bytes = others.as_volatile_slice();
                    for at in (0..HUGE as usize).step_by(256 << 10) {
                        bytes.write_obj(at, at).unwrap();
                    }
                    for at in (0..HUGE as usize).step_by(256 << 10) {
                        assert_eq!(bytes.read_obj::<usize>(at).unwrap(), at);
                    }
                }
            });
            for _ in 0..2_000 {
                let place =
                    GuestRegionShm::<()>::from_backing(&backing, 0, (GuestAddress(0), HUGE));
                assert!(huge_pages_short(&place.unwrap_err().into()).is_some());
            }
            done.store(true, Ordering::Release);
        });
    });
}
