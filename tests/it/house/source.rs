//! Reading which file of a crate uses which, from its `use` lines and paths.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemUse, Meta, UseTree, Visibility};

/// The files of a crate and what they use of each other, tests left out.
pub(crate) struct House {
    files: BTreeMap<Module, Contents>,
    edges: BTreeSet<Edge>,
}

/// One file uses a name that another defines.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Edge {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) name: String,
}

/// The path of a module, without `crate`.
type Module = Vec<String>;

#[derive(Default)]
struct Contents {
    /// Relative to the folder that was read.
    file: String,
    /// What other files may take through this one: the name, and the path that it stands for.
    handed_on: BTreeMap<String, Module>,
    /// All paths in it that begin in this crate.
    paths: BTreeSet<Module>,
}

impl House {
    /// Reads all files below `src`.
    pub(crate) fn read(src: &Path) -> Self {
        let mut files = BTreeMap::new();
        read_folder(src, &[], &mut files);
        let mut house = Self {
            files,
            edges: BTreeSet::new(),
        };
        house.edges = house
            .files
            .iter()
            .filter(|(module, _)| !module.is_empty())
            .flat_map(|(_, contents)| {
                contents.paths.iter().filter_map(|path| {
                    let (to, name) = house.home_of(path)?;
                    let from = contents.file.clone();
                    (from != to).then_some(Edge { from, to, name })
                })
            })
            .collect();
        house
    }

    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        self.files.values().map(|contents| contents.file.as_str())
    }

    pub(crate) fn edges(&self) -> &BTreeSet<Edge> {
        &self.edges
    }

    /// The file that defines what a path names, through all that hand it on, and its name.
    fn home_of(&self, path: &[String]) -> Option<(String, String)> {
        let mut module = Vec::new();
        let mut rest = path.iter();
        for segment in rest.by_ref() {
            module.push(segment.clone());
            if self.files.contains_key(&module) {
                continue;
            }
            module.pop();
            let contents = &self.files[&module];
            if let Some(stands_for) = contents.handed_on.get(segment) {
                let whole: Vec<_> = stands_for.iter().chain(rest).cloned().collect();
                return self.home_of(&whole);
            }
            return Some((contents.file.clone(), segment.clone()));
        }
        // A module as a whole is used by what is named of it elsewhere in the file.
        None
    }
}

/// The names that the root and its public modules hand on, without those of the features `off`.
pub(crate) fn public_names(src: &Path, off: &[&str]) -> Vec<String> {
    let mut names = Vec::new();
    for file in ["lib.rs", "vhost_user/receive/mod.rs"] {
        let tree = syn::parse_file(&fs::read_to_string(src.join(file)).unwrap()).unwrap();
        for item in &tree.items {
            let Item::Use(item) = item else { continue };
            let feature = item
                .attrs
                .iter()
                .find_map(|attribute| match &attribute.meta {
                    Meta::List(list) if list.path.is_ident("cfg") => Some(list.tokens.to_string()),
                    _ => None,
                });
            let is_off =
                |text: &String| off.iter().any(|name| text.contains(&format!("{name:?}")));
            if matches!(item.vis, Visibility::Public(_)) && !feature.as_ref().is_some_and(is_off) {
                let mut leaves = Vec::new();
                flatten(&item.tree, &mut Vec::new(), &mut leaves);
                names.extend(leaves.into_iter().map(|(_, name)| name));
            }
        }
    }
    names
}

fn read_folder(folder: &Path, module: &[String], files: &mut BTreeMap<Module, Contents>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if stem == "tests" || stem.ends_with("_tests") {
            continue;
        }
        let inner = |stem: String| [module, &[stem]].concat();
        if path.is_dir() {
            read_folder(&path, &inner(stem), files);
            continue;
        }
        let own = match stem.as_str() {
            "mod" | "lib" => module.to_vec(),
            _ => inner(stem),
        };
        let tree = syn::parse_file(&fs::read_to_string(&path).unwrap()).unwrap();
        let mut file = own.join("/");
        file = match path.ends_with("mod.rs") || own.is_empty() {
            true if own.is_empty() => "lib.rs".to_owned(),
            true => file + "/mod.rs",
            false => file + ".rs",
        };
        let mut reader = Reader {
            module: own.clone(),
            children: children(&tree.items),
            aliases: BTreeMap::new(),
            contents: Contents {
                file,
                ..Contents::default()
            },
        };
        // First what the file calls modules of others, then the paths that begin so.
        tree.items.iter().for_each(|item| reader.note_uses(item));
        reader.visit_file(&tree);
        files.insert(own, reader.contents);
    }
}

fn children(items: &[Item]) -> BTreeSet<String> {
    let modules = items.iter().filter_map(|item| match item {
        Item::Mod(module) if module.content.is_none() => Some(module.ident.to_string()),
        _ => None,
    });
    modules.collect()
}

struct Reader {
    module: Module,
    children: BTreeSet<String>,
    /// Names that `use` brings into the file, and what they stand for.
    aliases: BTreeMap<String, Module>,
    contents: Contents,
}

impl Reader {
    fn note_uses(&mut self, item: &Item) {
        let Item::Use(item) = item else { return };
        if is_left_out(&item.attrs) {
            return;
        }
        let mut leaves = Vec::new();
        flatten(&item.tree, &mut Vec::new(), &mut leaves);
        for (path, name) in leaves {
            let Some(path) = self.absolute(&path) else {
                continue;
            };
            if !matches!(item.vis, Visibility::Inherited) {
                self.contents.handed_on.insert(name.clone(), path.clone());
            }
            self.aliases.insert(name, path);
        }
    }

    /// The path from the root of this crate, if it begins in it.
    fn absolute(&self, path: &[String]) -> Option<Module> {
        let mut base = match path.first()?.as_str() {
            "crate" => Vec::new(),
            "self" | "super" => self.module.clone(),
            child if self.children.contains(child) => {
                [&self.module[..], &[child.to_owned()]].concat()
            }
            other => self.aliases.get(other)?.clone(),
        };
        let rest = match path[0].as_str() {
            "super" => {
                let ups = path
                    .iter()
                    .take_while(|segment| *segment == "super")
                    .count();
                base.truncate(base.len().checked_sub(ups)?);
                &path[ups..]
            }
            _ => &path[1..],
        };
        base.extend(rest.iter().cloned());
        Some(base)
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_left_out(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        // A re-export is no use: it makes no file depend on another.
        if matches!(item.vis, Visibility::Inherited) {
            let mut leaves = Vec::new();
            flatten(&item.tree, &mut Vec::new(), &mut leaves);
            let paths = leaves.iter().filter_map(|(path, _)| self.absolute(path));
            let paths: Vec<Module> = paths.collect();
            self.contents.paths.extend(paths);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path
            .segments
            .iter()
            .map(|part| part.ident.to_string())
            .collect();
        if segments.len() > 1
            && let Some(path) = self.absolute(&segments)
        {
            self.contents.paths.insert(path);
        }
        visit::visit_path(self, path);
    }
}

/// The paths of a `use`, each with the name that it gives.
fn flatten(tree: &UseTree, before: &mut Module, leaves: &mut Vec<(Module, String)>) {
    match tree {
        UseTree::Path(path) => {
            before.push(path.ident.to_string());
            flatten(&path.tree, before, leaves);
            before.pop();
        }
        UseTree::Name(name) => {
            let name = name.ident.to_string();
            match name.as_str() {
                "self" => leaves.push((before.clone(), before.last().unwrap().clone())),
                _ => leaves.push(([&before[..], std::slice::from_ref(&name)].concat(), name)),
            }
        }
        UseTree::Rename(rename) => {
            let path = [&before[..], &[rename.ident.to_string()]].concat();
            leaves.push((path, rename.rename.to_string()));
        }
        UseTree::Group(group) => {
            for tree in &group.items {
                flatten(tree, before, leaves);
            }
        }
        UseTree::Glob(_) => {}
    }
}

/// Whether an item is there in tests or for the documentation only.
fn is_left_out(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Ident>()
                .is_ok_and(|name| ["test", "doc", "doctest"].iter().any(|word| name == word))
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}
