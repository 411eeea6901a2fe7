//! Reading options.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;

use super::backend_type::BackendType;
use super::pairs::Pairs;
use super::values;
use crate::host::NodeSet;
use crate::options::error::{OptionsError, Result};
use crate::options::{
    Access, BackingSource, CoreDump, DiscardData, NumaPolicy, OnShortage, PageSize, Populate,
    RamOptions, Reserve, Sealing, Unused,
};

/// Reads what QEMU's `-object` takes: `memory-backend-memfd,size=64M,prealloc=on`.
///
/// The [properties](RamOptions#qemus-syntax) mean what they mean in QEMU 10, with its defaults, so
/// `dump` is on unless written, unlike in typed options.
///
/// ```
/// use guest_memory_shm::{BackingSource, CoreDump, Populate, RamOptions};
///
/// let options: RamOptions = "memory-backend-shm,id=ram0,size=1.5G,prealloc=on".parse()?;
/// assert_eq!(options.backing(), &BackingSource::PosixShm);
/// assert_eq!(options.size(), Some(1536 << 20));
/// assert_eq!(options.populate(), Populate::Prefault);
/// assert_eq!(options.core_dump(), CoreDump::Include);
///
/// let refused = "memory-backend-shm,size=64X".parse::<RamOptions>().unwrap_err();
/// assert!(refused.to_string().starts_with("size=64X: expected a number of bytes"));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
///
/// # Errors
///
/// [`OptionsError`] for what cannot be read, and those of [`RamOptions::check`] for what does not
/// go together.
impl FromStr for RamOptions {
    type Err = OptionsError;

    fn from_str(text: &str) -> Result<Self> {
        const TYPE: &str = "qom-type";
        let pairs = Pairs::read(text, TYPE);
        let name = pairs.last(TYPE).ok_or(OptionsError::MissingType)?;
        let kind = BackendType::from_name(name)?;
        for key in pairs.keys() {
            if key != TYPE && !kind.properties().contains(&key) {
                return Err(OptionsError::UnknownProperty {
                    property: key.into(),
                    of: kind.name(),
                    known: kind.properties(),
                });
            }
        }
        let reader = Reader { pairs, kind };
        let options = reader.options()?;
        options.check()?;
        Ok(options)
    }
}

/// The properties of a backend of a known type, all of them known.
struct Reader<'a> {
    pairs: Pairs<'a>,
    kind: BackendType,
}

impl Reader<'_> {
    fn options(&self) -> Result<RamOptions> {
        self.refuse_unsupported()?;
        let size = self
            .size("size")?
            .ok_or(OptionsError::Missing { property: "size" })?;
        let backing = self.backing()?;
        self.check_shared()?;
        let (page_size, unused_hugetlb_size) = self.pages()?;
        Ok(RamOptions {
            // QEMU takes the first id, and the last of everything else.
            name: self.pairs.all("id").next().map(str::to_owned),
            size: Some(size),
            backing,
            page_size,
            sealing: match self.switch("seal")? {
                Some(false) => Sealing::Unsealed,
                _ => Sealing::Sealed,
            },
            reserve: self.switch("reserve")?.map(|on| match on {
                true => Reserve::On,
                false => Reserve::Off,
            }),
            populate: self.populate()?,
            populate_threads: self.threads()?,
            on_shortage: self.on_shortage()?,
            numa: self.numa()?,
            core_dump: match self.switch("dump")? {
                Some(false) => CoreDump::Exclude,
                _ => CoreDump::Include,
            },
            align: self.size("align")?,
            offset: self.size("offset")?.unwrap_or(0),
            access: self.access()?,
            discard_data: match self.switch("discard-data")? {
                Some(true) => DiscardData::OnDrop,
                _ => DiscardData::Keep,
            },
            unused: Unused {
                merge: self.switch("merge")?,
                hugetlb_size: unused_hugetlb_size,
                canonical_path: self.switch("x-use-canonical-path-for-ramblock-id")?,
            },
        })
    }

    /// Refuses what QEMU can do and this crate cannot.
    fn refuse_unsupported(&self) -> Result<()> {
        if self.switch("pmem")? == Some(true) {
            return Err(OptionsError::Unsupported {
                property: "pmem",
                value: "on".into(),
            });
        }
        match self.pairs.last("prealloc-context") {
            None | Some("") => Ok(()),
            Some(context) => Err(OptionsError::Unsupported {
                property: "prealloc-context",
                value: context.into(),
            }),
        }
    }

    fn backing(&self) -> Result<BackingSource> {
        Ok(match self.kind {
            BackendType::Memfd => BackingSource::Memfd,
            BackendType::Shm => BackingSource::PosixShm,
            BackendType::File => {
                let path = self.pairs.last("mem-path").ok_or(OptionsError::Missing {
                    property: "mem-path",
                })?;
                BackingSource::File(PathBuf::from(path))
            }
        })
    }

    fn check_shared(&self) -> Result<()> {
        match (self.switch("share")?, self.kind) {
            (Some(true), _) | (None, BackendType::Memfd | BackendType::Shm) => Ok(()),
            (Some(false), _) => Err(OptionsError::NotShared { by_default: false }),
            (None, BackendType::File) => Err(OptionsError::NotShared { by_default: true }),
        }
    }

    /// The pages, and a `hugetlbsize` without `hugetlb=on`.
    fn pages(&self) -> Result<(PageSize, Option<u64>)> {
        let size = self.size("hugetlbsize")?;
        let hugetlb = self.switch("hugetlb")? == Some(true);
        let transparent = self.switch("thp")? == Some(true);
        match (hugetlb, transparent) {
            (true, true) => Err(OptionsError::Conflict {
                first: "hugetlb=on",
                second: "thp=on",
            }),
            (true, false) => Ok((PageSize::Huge(size), None)),
            (false, true) => Ok((PageSize::Transparent, size)),
            (false, false) => Ok((PageSize::Base, size)),
        }
    }

    fn populate(&self) -> Result<Populate> {
        let asked = match self.pairs.last("populate") {
            None => None,
            Some("lazy") => Some(Populate::Lazy),
            Some("allocate") => Some(Populate::Allocate),
            Some("prefault") => Some(Populate::Prefault),
            Some(value) => {
                return Err(value_error("populate", value));
            }
        };
        let prealloc = self.switch("prealloc")?;
        match (prealloc, asked) {
            (None, None) => Ok(Populate::Lazy),
            (None, Some(asked)) => Ok(asked),
            (Some(true), None | Some(Populate::Prefault)) => Ok(Populate::Prefault),
            (Some(false), None | Some(Populate::Lazy)) => Ok(Populate::Lazy),
            (Some(prealloc), Some(asked)) => Err(OptionsError::Conflict {
                first: if prealloc {
                    "prealloc=on"
                } else {
                    "prealloc=off"
                },
                second: match asked {
                    Populate::Lazy => "populate=lazy",
                    Populate::Allocate => "populate=allocate",
                    Populate::Prefault => "populate=prefault",
                },
            }),
        }
    }

    fn threads(&self) -> Result<Option<NonZeroU32>> {
        self.read("prealloc-threads", |text| {
            u32::try_from(values::number(text)?)
                .ok()
                .and_then(NonZeroU32::new)
        })
    }

    fn on_shortage(&self) -> Result<OnShortage> {
        match self.pairs.last("on-shortage") {
            None | Some("refuse") => Ok(OnShortage::Refuse),
            Some("try-anyway") => Ok(OnShortage::TryAnyway),
            Some(value) => Err(value_error("on-shortage", value)),
        }
    }

    fn numa(&self) -> Result<NumaPolicy> {
        let mut nodes = NodeSet::new();
        for text in self.pairs.all("host-nodes") {
            let refused = || value_error("host-nodes", text);
            let (first, last) = values::range(text).ok_or_else(refused)?;
            let last = u32::try_from(last).map_err(|_| refused())?;
            let first = u32::try_from(first).map_err(|_| refused())?;
            // The first node that does not exist ends the walk, however long the range is.
            for node in first..=last {
                if !nodes.insert(node) {
                    return Err(OptionsError::NodeNumber { node });
                }
            }
        }
        let policy: fn(NodeSet) -> NumaPolicy = match self.pairs.last("policy") {
            None | Some("default") if nodes.is_empty() => |_| NumaPolicy::Default,
            None | Some("default") => {
                return Err(OptionsError::NodesWithoutPolicy { nodes });
            }
            Some("preferred") => NumaPolicy::Preferred,
            Some("bind") => NumaPolicy::Bind,
            Some("interleave") => NumaPolicy::Interleave,
            Some(value) => {
                return Err(value_error("policy", value));
            }
        };
        Ok(policy(nodes))
    }

    fn access(&self) -> Result<Access> {
        let readonly = self.switch("readonly")? == Some(true);
        let rom = match self.pairs.last("rom") {
            None | Some("auto") => None,
            Some("on") => Some(true),
            Some("off") => Some(false),
            Some(value) => return Err(value_error("rom", value)),
        };
        match (readonly, rom) {
            (true, None | Some(true)) => Ok(Access::ReadOnly),
            (false, None | Some(false)) => Ok(Access::ReadWrite),
            (true, Some(false)) => Err(OptionsError::Conflict {
                first: "readonly=on",
                second: "rom=off",
            }),
            (false, Some(true)) => Err(OptionsError::Conflict {
                first: "rom=on",
                second: "readonly=off",
            }),
        }
    }

    fn size(&self, property: &'static str) -> Result<Option<u64>> {
        self.read(property, values::size)
    }

    fn switch(&self, property: &'static str) -> Result<Option<bool>> {
        self.read(property, values::switch)
    }

    /// The value of a property that counts; earlier ones are ignored, as in QEMU.
    fn read<T>(
        &self,
        property: &'static str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(text) = self.pairs.last(property) else {
            return Ok(None);
        };
        match read(text) {
            Some(value) => Ok(Some(value)),
            None => Err(value_error(property, text)),
        }
    }
}

fn value_error(property: &'static str, value: &str) -> OptionsError {
    OptionsError::Value {
        property,
        value: value.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_effect_is_kept_and_written_back() {
        let text = "memory-backend-memfd,size=1M,hugetlbsize=2M,\
                    x-use-canonical-path-for-ramblock-id=off";
        let options: RamOptions = text.parse().unwrap();
        assert_eq!(options.page_size, PageSize::Base);
        assert_eq!(
            options.unused,
            Unused {
                hugetlb_size: Some(2 << 20),
                canonical_path: Some(false),
                merge: None,
            }
        );
        assert_eq!(options.to_string(), text);

        let used: RamOptions = "memory-backend-memfd,size=2M,hugetlbsize=2M,hugetlb"
            .parse()
            .unwrap();
        assert_eq!(used.page_size, PageSize::Huge(Some(2 << 20)));
        assert_eq!(used.unused, Unused::default());
    }

    #[test]
    fn a_wide_range_of_nodes_is_not_walked() {
        let text = "memory-backend-memfd,size=1M,policy=bind,host-nodes=0-4294967295";
        let refused = text.parse::<RamOptions>();
        assert_eq!(refused, Err(OptionsError::NodeNumber { node: 128 }));
    }
}
