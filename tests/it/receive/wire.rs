//! Payloads as they come from a socket, for daemons without the vhost crate.

use guest_memory_shm::receive::ReceivedRegion;
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vm_memory::ByteValued;

use super::*;

fn table_payload(count: u32, padding: u32, regions: &[[u64; 4]]) -> Vec<u8> {
    let head = [count, padding].into_iter().flat_map(u32::to_ne_bytes);
    let words = regions.iter().flatten().flat_map(|word| word.to_ne_bytes());
    head.chain(words).collect()
}

const REGIONS: [[u64; 4]; 3] = [
    [0x1000, 0x2000, 0x7f00_0000_0000, 0x3000],
    [0, 0, 0, 0],
    [u64::MAX, u64::MAX - 1, u64::MAX - 2, u64::MAX - 3],
];

#[test]
fn a_table_is_read_as_it_was_written() {
    for count in 0..=3 {
        let regions = &REGIONS[..count];
        let payload = table_payload(count as u32, 0, regions);
        let read = ReceivedRegion::decode_table(&payload).unwrap();
        let expected: Vec<_> = regions
            .iter()
            .map(|[g, s, u, o]| region(*g, *s, *u, *o))
            .collect();
        assert_eq!(read, expected);
    }
    // The specification leaves open what padding holds.
    assert_eq!(
        ReceivedRegion::decode_table(&table_payload(1, !0, &REGIONS[..1]))
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn a_table_of_another_length_than_it_says_is_refused() {
    for (count, there) in [
        (0, 1),
        (1, 0),
        (1, 2),
        (3, 2),
        (0x0800_0001, 1),
        (u32::MAX, 3),
    ] {
        let payload = table_payload(count, 0, &REGIONS[..there]);
        let error = ReceivedRegion::decode_table(&payload).unwrap_err();
        let ReceiveError::Payload {
            message,
            len,
            expected,
            ..
        } = error
        else {
            panic!("{error:?}");
        };
        assert_eq!((message, len), ("SET_MEM_TABLE", 8 + there * 32));
        assert_eq!(expected, 8 + u64::from(count) * 32);
        assert_eq!(error.reply_code(), 22);
    }
    let payload = table_payload(2, 0, &REGIONS[..2]);
    for len in 0..payload.len() {
        assert!(
            ReceivedRegion::decode_table(&payload[..len]).is_err(),
            "{len}"
        );
    }
    let long = [&payload[..], &[0]].concat();
    assert!(ReceivedRegion::decode_table(&long).is_err());
}

#[test]
fn a_single_region_is_read_as_it_was_written_and_at_no_other_length() {
    for words in REGIONS {
        let [g, s, u, o] = words;
        for padding in [0, u64::MAX] {
            let words = [padding, g, s, u, o];
            let payload: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            assert_eq!(
                ReceivedRegion::decode(&payload).unwrap(),
                region(g, s, u, o)
            );
            let long = [&payload[..], &[0]].concat();
            for len in (0..=41).filter(|len| *len != 40) {
                let error = ReceivedRegion::decode(&long[..len]).unwrap_err();
                assert!(
                    matches!(
                        error,
                        ReceiveError::Payload { expected: 40, len: found, .. } if found == len
                    ),
                    "{error:?}"
                );
            }
        }
    }
}

#[test]
fn any_bytes_are_read_or_refused_without_a_panic() {
    use proptest::prelude::*;
    let bytes = prop::collection::vec(prop_oneof![Just(0), Just(1), any::<u8>()], 0..400);
    let mut runner = crate::model::runner(2000);
    let done = runner.run(&bytes, |bytes| {
        if let Ok(regions) = ReceivedRegion::decode_table(&bytes) {
            prop_assert_eq!(bytes.len(), 8 + 32 * regions.len());
        }
        prop_assert_eq!(ReceivedRegion::decode(&bytes).is_ok(), bytes.len() == 40);
        Ok(())
    });
    done.unwrap();
}

#[test]
fn the_vhost_crates_regions_are_the_same_regions() {
    for [g, s, u, o] in REGIONS {
        let expected = region(g, s, u, o);
        let of_table = VhostUserMemoryRegion::new(g, s, u, o);
        assert_eq!(ReceivedRegion::from(&of_table), expected);
        let single = VhostUserSingleMemoryRegion::new(g, s, u, o);
        assert_eq!(ReceivedRegion::from(&single), expected);
        // What that crate puts on the wire, this one reads.
        assert_eq!(ReceivedRegion::decode(single.as_slice()).unwrap(), expected);
        let payload = [&table_payload(1, 0, &[])[..], of_table.as_slice()].concat();
        assert_eq!(ReceivedRegion::decode_table(&payload).unwrap(), [expected]);
    }
}

#[test]
fn a_refusal_becomes_the_vhost_crates_error_and_keeps_its_text() {
    let error = ReceivedTable::<()>::default().ring(5, 1).unwrap_err();
    let text = error.to_string();
    let theirs = vhost::vhost_user::Error::from(error).to_string();
    assert!(theirs.ends_with(&text), "{theirs}");
}
