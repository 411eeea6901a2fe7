//! A naive model of tables: what is taken, and how user addresses are translated.

use proptest::prelude::*;

use super::*;
use crate::model::runner;

/// Pages of each file that regions are made of.
const FILE: u64 = 8;

/// Small numbers, so that overlaps, neighbours and good tables all come often; in pages.
#[derive(Clone, Copy, Debug)]
struct Pages {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
}

impl Pages {
    fn region(&self) -> ReceivedRegion {
        region(
            self.guest * PAGE,
            self.size * PAGE,
            USER + self.user * PAGE,
            self.offset * PAGE,
        )
    }

    /// Whether it can be in a table by itself.
    fn fits(&self) -> bool {
        self.size > 0 && self.offset + self.size <= FILE
    }

    /// Whether it can be beside another.
    fn beside(&self, other: &Pages) -> bool {
        let apart = |a: u64, b: u64| {
            (0..self.size).all(|mine| (0..other.size).all(|theirs| a + mine != b + theirs))
        };
        apart(self.guest, other.guest) && apart(self.user, other.user)
    }

    fn can_be_in(&self, table: &[Pages]) -> bool {
        self.fits() && table.iter().all(|other| self.beside(other))
    }
}

fn pages() -> impl Strategy<Value = Pages> {
    let size = prop_oneof![1 => Just(0), 12 => 1..5u64, 1 => 5..10u64];
    (0..40u64, size, 0..40u64, 0..5u64).prop_map(|(guest, size, user, offset)| Pages {
        guest,
        size,
        user,
        offset,
    })
}

#[derive(Clone, Debug)]
enum Step {
    Set(Vec<Pages>),
    Add(Pages),
    Remove(prop::sample::Index, Option<Pages>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => prop::collection::vec(pages(), 0..4).prop_map(Step::Set),
        5 => pages().prop_map(Step::Add),
        2 => (any::<prop::sample::Index>(), prop::option::weighted(0.2, pages()))
            .prop_map(|(which, other)| Step::Remove(which, other)),
    ]
}

/// All user addresses near the edges of pages, against a walk through the model.
fn translations_agree(table: &ReceivedTable, model: &[Pages]) -> Result<(), TestCaseError> {
    for page in 0..52 {
        for inside in [0, 1, PAGE - 1] {
            let user = USER + page * PAGE + inside;
            let holder = model
                .iter()
                .find(|r| (r.user..r.user + r.size).contains(&page));
            let guest = holder.map(|r| (r.guest + page - r.user) * PAGE + inside);
            prop_assert_eq!(table.guest_addr(user), guest.map(GuestAddress));
            let left = holder.map(|r| (r.user + r.size - page) * PAGE - inside);
            for len in [1, PAGE - 6, PAGE, 3 * PAGE] {
                let expected = guest.filter(|_| left.is_some_and(|left| len <= left));
                prop_assert_eq!(table.ring(user, len).ok(), expected.map(GuestAddress));
            }
        }
    }
    Ok(())
}

#[test]
fn tables_and_translations_are_those_of_a_naive_model() {
    let files: Vec<File> = (0..4).map(|_| sealed(FILE * PAGE)).collect();
    let file = || files[0].try_clone().unwrap();
    let taken = std::cell::Cell::new([0; 6]);
    let count = |at: usize, ok: bool| {
        let mut counts = taken.get();
        counts[2 * at + usize::from(ok)] += 1;
        taken.set(counts);
    };
    let run = runner(400).run(&prop::collection::vec(step(), 1..16), |steps| {
        let mut table = ReceivedTable::<()>::new(require_seals());
        let mut model: Vec<Pages> = Vec::new();
        for step in steps {
            let (at, next, expected) = match step {
                Step::Set(all) => {
                    let mut expected = Some(Vec::new());
                    for new in &all {
                        expected = expected.filter(|table: &Vec<_>| new.can_be_in(table));
                        expected.iter_mut().for_each(|table| table.push(*new));
                    }
                    let expected = expected.filter(|table| !table.is_empty());
                    let clones: Vec<File> = all.iter().map(|_| file()).collect();
                    let regions: Vec<_> = all.iter().map(Pages::region).collect();
                    (0, map(&regions, clones), expected)
                }
                Step::Add(new) => {
                    let fits = model.len() < 8 && new.can_be_in(&model);
                    let expected = fits.then(|| [&model[..], &[new]].concat());
                    (1, table.add(new.region(), [file()]), expected)
                }
                Step::Remove(which, other) => {
                    let region = match (other, model.is_empty()) {
                        (Some(other), _) => other,
                        (None, false) => *which.get(&model),
                        (None, true) => continue,
                    };
                    let same = |r: &Pages| {
                        (r.guest, r.size, r.user) == (region.guest, region.size, region.user)
                    };
                    let mut left = model.clone();
                    let place = left.iter().position(same);
                    let expected = place.map(|at| {
                        left.remove(at);
                        left
                    });
                    (2, table.remove(region.region()), expected)
                }
            };
            prop_assert_eq!(next.is_ok(), expected.is_some(), "{:?}", next);
            count(at, next.is_ok());
            if let (Ok(next), Some(expected)) = (next, expected) {
                (table, model) = (next, expected);
            }
            prop_assert_eq!(table.regions().len(), model.len());
            prop_assert_eq!(table.memory().num_regions(), model.len());
            translations_agree(&table, &model)?;
        }
        Ok(())
    });
    run.unwrap();
    // Each of the three was taken and refused often.
    println!(
        "set, add, remove, each refused and taken: {:?}",
        taken.get()
    );
    assert!(
        taken.get().iter().all(|count| *count >= 40),
        "{:?}",
        taken.get()
    );
}
