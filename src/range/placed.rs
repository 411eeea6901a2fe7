//! Lists of what has a place in the guest, in ascending order and disjoint, as a memory's regions
//! are, a table's, and a hypervisor's slots.

use std::cmp::Ordering;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::guest_range::GuestRange;

/// Something that has a place in the guest.
pub(crate) trait Placed {
    fn range(&self) -> GuestRange;
}

impl<T: Placed> Placed for &T {
    fn range(&self) -> GuestRange {
        T::range(self)
    }
}

impl<T: Placed> Placed for Arc<T> {
    fn range(&self) -> GuestRange {
        T::range(self)
    }
}

/// The place in a list of what starts at this address, or where it would go.
pub(crate) fn place_of<T: Placed>(list: &[T], start: GuestAddress) -> Result<usize, usize> {
    list.binary_search_by_key(&start, self::start)
}

/// What in a list contains this address.
pub(crate) fn holder<T: Placed>(list: &[T], addr: GuestAddress) -> Option<&T> {
    let past = list.partition_point(|placed| start(placed) <= addr);
    let holder = &list[past.checked_sub(1)?];
    (addr <= holder.range().last_addr()).then_some(holder)
}

/// What turns a list that is held into one that is wanted: all removals, highest address first,
/// then all additions, lowest first.
///
/// That is QEMU's order, which daemons and hypervisors rely on: what shrinks, grows or moves never
/// overlaps its successor on the way, and at no time is more held than the larger of the two.
#[derive(Debug)]
pub(crate) struct Difference<H, W> {
    pub(crate) removals: Vec<H>,
    pub(crate) additions: Vec<W>,
}

impl<H: Placed, W: Placed> Difference<H, W> {
    /// Walks over both lists at once. `is` says whether what is held at the place of what is
    /// wanted is that already.
    pub(crate) fn between(
        held: impl IntoIterator<Item = H>,
        wanted: impl IntoIterator<Item = W>,
        is: impl Fn(&H, &W) -> bool,
    ) -> Self {
        let (mut removals, mut additions) = (Vec::new(), Vec::new());
        let (mut held, mut wanted) = (held.into_iter().peekable(), wanted.into_iter().peekable());
        loop {
            let order = match (held.peek(), wanted.peek()) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(held), Some(wanted)) => start(held).cmp(&start(wanted)),
            };
            let held = held.next_if(|_| order.is_le());
            let wanted = wanted.next_if(|_| order.is_ge());
            match (&held, &wanted) {
                (Some(held), Some(wanted)) if is(held, wanted) => {}
                _ => {
                    removals.extend(held);
                    additions.extend(wanted);
                }
            }
        }
        removals.reverse();
        Self {
            removals,
            additions,
        }
    }
}

fn start(placed: &impl Placed) -> GuestAddress {
    placed.range().start_addr()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A place, and what is there.
    type Thing = (GuestRange, u8);

    impl Placed for Thing {
        fn range(&self) -> GuestRange {
            self.0
        }
    }

    /// Things in a small space, up to its end, of which many are in both of two lists.
    fn things() -> impl Strategy<Value = Vec<Thing>> {
        let gaps = prop::collection::vec((0..2_u64, 1..3_u64, 0..2_u8), 0..12);
        (prop_oneof![Just(0), Just(u64::MAX - 60)], gaps).prop_map(|(mut at, gaps)| {
            gaps.into_iter()
                .map(|(gap, size, id)| {
                    let range = GuestRange::new(GuestAddress(at + gap), size).unwrap();
                    at += gap + size;
                    (range, id)
                })
                .collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn what_is_held_becomes_what_is_wanted_without_an_overlap(
            held in things(), wanted in things(),
        ) {
            let change = Difference::between(&held, &wanted, |held, wanted| held == wanted);
            fn missing<'a>(list: &'a [Thing], of: &[Thing]) -> Vec<&'a Thing> {
                list.iter().filter(|thing| !of.contains(thing)).collect()
            }
            let mut removals = missing(&held, &wanted);
            removals.reverse();
            prop_assert_eq!(&change.removals, &removals);
            prop_assert_eq!(&change.additions, &missing(&wanted, &held));

            let mut now = held.clone();
            now.retain(|thing| !removals.contains(&thing));
            for addition in change.additions {
                prop_assert!(now.iter().all(|there| !there.0.overlaps(&addition.0)));
                now.push(*addition);
            }
            now.sort_unstable();
            prop_assert_eq!(now, wanted);
        }

        #[test]
        fn an_address_is_found_where_it_is(list in things(), offset in 0..64_u64) {
            let first = list.first().map_or(0, |thing| thing.0.start_addr().0);
            let addr = GuestAddress(first.saturating_add(offset));
            let mut holders = list.iter().filter(|thing| thing.0.addrs().contains(&addr.0));
            prop_assert_eq!(holder(&list, addr), holders.next());
            let place = place_of(&list, addr).ok();
            prop_assert_eq!(place, list.iter().position(|thing| thing.0.start_addr() == addr));
        }
    }
}
