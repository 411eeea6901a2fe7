//! The shape of the house: which file of `src` uses which, held against the order of modules that
//! lib.rs' table gives.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use source::{Edge, House, public_names};

mod lines;
mod source;

/// The modules of lib.rs' table, lowest first: `range`, `vhost_user::table`.
fn order() -> Vec<String> {
    let lib = fs::read_to_string(src().join("lib.rs")).unwrap();
    let rows = lib
        .lines()
        .skip_while(|line| *line != "//! | module | owns |");
    let rows = rows.skip(2).map_while(|line| line.strip_prefix("//! | "));
    rows.map(|row| row.split(" |").next().unwrap())
        .flat_map(|names| names.split(", "))
        .map(|name| name.split(']').next().unwrap())
        .map(|name| name.trim_matches(['[', '`']).to_owned())
        .collect()
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../src")
}

/// The place in `order` of the module that a file belongs to.
fn place(order: &[String], file: &str) -> Option<usize> {
    let path = file.trim_end_matches(".rs").replace('/', "::");
    let inside = |name: &String| {
        path.strip_prefix(name.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    };
    order.iter().position(inside)
}

/// The folders with a place of their own for each of their modules, which have a file that only
/// puts these together.
fn is_frame(order: &[String], file: &str) -> bool {
    let folder = file.strip_suffix("/mod.rs").unwrap_or_default();
    order
        .iter()
        .any(|name| name.starts_with(&format!("{folder}::")))
        && !folder.is_empty()
}

#[test]
fn the_table_names_each_module_and_no_other() {
    let order = order();
    assert!(order.len() > 15, "lib.rs' table of modules: {order:?}");
    let house = House::read(&src());
    for file in house.files().filter(|file| *file != "lib.rs") {
        assert!(
            place(&order, file).is_some() || is_frame(&order, file),
            "{file} is in no module of lib.rs' table"
        );
    }
    for name in &order {
        let path = name.replace("::", "/");
        let exists = |end: &str| src().join(format!("{path}{end}")).exists();
        assert!(
            exists(".rs") || exists("/mod.rs"),
            "there is no module {name}"
        );
    }
}

#[test]
fn modules_use_only_those_above_them_in_the_table() {
    let order = order();
    let house = House::read(&src());
    assert!(house.edges().len() > 200, "{}", house.edges().len());
    let up: Vec<String> = house
        .edges()
        .iter()
        .filter_map(|Edge { from, to, name }| {
            let (user, used) = (place(&order, from)?, place(&order, to)?);
            (used > user).then(|| format!("{from} uses {name} of {to}, which comes later"))
        })
        .collect();
    assert!(up.is_empty(), "{}", up.join("\n"));
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let house = House::read(&src());
    let mut uses: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for Edge { from, to, .. } in house.edges() {
        uses.entry(from).or_default().push(to);
    }
    let reached = uses.keys().map(|file| (*file, reached(&uses, file)));
    let reached: BTreeMap<&str, BTreeSet<&str>> = reached.collect();
    let circles: Vec<String> = house
        .edges()
        .iter()
        .filter(|edge| {
            let back = reached.get(edge.to.as_str());
            back.is_some_and(|reached| reached.contains(edge.from.as_str()))
        })
        .map(|Edge { from, to, name }| format!("{from} uses {name} of {to}"))
        .collect();
    assert!(circles.is_empty(), "{}", circles.join("\n"));
}

#[test]
fn the_default_build_has_few_public_names() {
    let names = public_names(&src(), &["kvm", "mock", "serde"]);
    assert!(names.contains(&"GuestMemoryShm".to_owned()), "{names:?}");
    assert!(names.len() <= 90, "{} names: {names:?}", names.len());
}

/// All that a file uses, by itself and through others.
fn reached<'a>(uses: &BTreeMap<&'a str, Vec<&'a str>>, file: &str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut next: Vec<&str> = uses[file].clone();
    while let Some(file) = next.pop() {
        if reached.insert(file) {
            next.extend(uses.get(file).into_iter().flatten());
        }
    }
    reached
}
