//! What the guest boots from: a kernel of this machine, and a shell with the drivers for the disk.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::{peer, skip};

/// In the order in which they are loaded.
const MODULES: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
];

/// The guest's init: it loads the drivers, and carries out commands from the serial console.
///
/// Each command answers with lines that begin with `@`; the last one is `@done`, or `@failed`. The
/// commands read the disk through the page cache, which they empty first, so that all of it comes
/// from the daemon.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc /sys /dev
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
stty -echo -onlcr

for module in $(cat /modules); do insmod "/$module.ko" || echo "@no module $module"; done

forget() { sync && echo 3 > /proc/sys/vm/drop_caches; }

# The checksum of the whole disk.
checksum() { forget && set -- $(sha256sum < /dev/vda) && echo "@$1"; }

# Writes 4 MiB in each of 4 places, side by side; the last one not through the page cache.
write_some() {
    jobs=
    for job in 0 1 2 3; do
        how=notrunc
        [ "$job" = 3 ] && how="notrunc oflag=direct"
        yes "$1 $job" | head -c 4194304 |
            dd of=/dev/vda bs=65536 iflag=fullblock seek=$((job * 160 + 16)) conv=$how &
        jobs="$jobs $!"
    done
    for job in $jobs; do wait "$job" || return; done
}
write_and_flush() { write_some "$1" 2> /dev/null && sync; }

# The same, going on while other commands are carried out.
start() { write_and_flush "$1" & writer=$!; }
finish() { wait "$writer"; }

# Discards bytes from an offset on.
discard() { forget && blkdiscard -o "$1" -l "$2" /dev/vda; }

total() { sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1/p' /proc/meminfo; }
memory() { echo "@$(total)"; }
# Until there is more memory, in KiB, than there was.
more_than() { while [ "$(total)" -le "$1" ]; do sleep 0.1; done; memory; }

# Pages of the disk that are cached in the zone of memory that was plugged while the guest ran: all
# that it booted with is below 4 GiB, in other zones.
cached() {
    pages=$(awk '/^Node/ { zone = $4 } zone == "Normal" && /nr_zone_(in)?active_file / { n += $2 }
        END { print n + 0 }' /proc/zoneinfo)
    echo "@$pages"
}

sectors() { echo "@$(cat /sys/block/vda/size)"; }
serial() { echo "@$(cat /sys/block/vda/serial)"; }
queues() { set -- /sys/block/vda/mq/*; echo "@$#"; }

until [ -b /dev/vda ]; do sleep 0.1; done
# Its pages are forgotten when no process has it open.
exec 3< /dev/vda
echo @ready
while read -r command; do
    case $command in
        end) poweroff -f ;;
        *) if $command; then echo @done; else echo @failed; fi ;;
    esac
done
"#;

/// A kernel, and the initramfs for it.
pub(super) struct Boot {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
}

impl Boot {
    /// Builds the initramfs in `directory`. `None`: something is not installed, and the test is to
    /// be skipped.
    pub(super) fn build(directory: &Path) -> Option<Self> {
        let [busybox, cpio] = [peer("busybox")?, peer("cpio")?];
        let Some((kernel, modules)) = kernel() else {
            skip("there is no kernel in /boot with its modules in /lib/modules");
            return None;
        };
        // In the guest there is no dynamic linker.
        let dynamic = Command::new("ldd").arg(&busybox).output().unwrap();
        if dynamic.status.success() {
            skip("busybox is not linked statically, as that of the package busybox-static is");
            return None;
        }
        let root = directory.join("root");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::copy(busybox, root.join("bin/busybox")).unwrap();
        fs::write(root.join("init"), INIT).unwrap();
        fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
        let mut names = String::new();
        for name in MODULES {
            // What is missing is part of the kernel itself.
            if let Some(file) = find_module(&modules, name) {
                unpack(&file, &root.join(name).with_extension("ko"))?;
                names += &format!("{name} ");
            }
        }
        fs::write(root.join("modules"), names).unwrap();
        let initramfs = directory.join("initramfs");
        archive(&cpio, &root, &initramfs);
        Some(Self { kernel, initramfs })
    }
}

/// A kernel and the directory of its modules.
fn kernel() -> Option<(PathBuf, PathBuf)> {
    let mut kernels: Vec<_> = fs::read_dir("/boot")
        .ok()?
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let version = name.strip_prefix("vmlinuz-")?;
            let kernel = Path::new("/boot").join(&name);
            let modules = Path::new("/lib/modules").join(version).join("kernel");
            let readable = File::open(&kernel).is_ok() && modules.is_dir();
            readable.then_some((kernel, modules))
        })
        .collect();
    kernels.sort();
    kernels.pop()
}

/// The file of a module, which may be compressed.
fn find_module(modules: &Path, name: &str) -> Option<PathBuf> {
    let directories = ["drivers/virtio", "drivers/block"].map(|part| modules.join(part));
    let endings = ["ko", "ko.xz", "ko.zst", "ko.gz"];
    let mut files = directories
        .iter()
        .flat_map(|directory| endings.map(|ending| directory.join(format!("{name}.{ending}"))));
    files.find(|file| file.is_file())
}

fn unpack(file: &Path, target: &Path) -> Option<()> {
    let program = match file.extension().and_then(|ending| ending.to_str()) {
        Some("xz") => peer("xz")?,
        Some("zst") => peer("zstd")?,
        Some("gz") => peer("gzip")?,
        _ => return fs::copy(file, target).map(drop).ok(),
    };
    let to = File::create(target).unwrap();
    let mut command = Command::new(program);
    let status = command.arg("-dc").arg(file).stdout(to).status().unwrap();
    assert!(status.success());
    Some(())
}

/// Packs all files under `root`, which has one level of directories.
fn archive(cpio: &Path, root: &Path, target: &Path) {
    let mut names = vec![OsString::from(".")];
    for entry in fs::read_dir(root).unwrap() {
        names.push(entry.unwrap().file_name());
    }
    names.push("bin/busybox".into());
    let mut child = Command::new(cpio)
        .args(["--create", "--format=newc", "--quiet", "--owner=0:0"])
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(File::create(target).unwrap())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for name in names {
        stdin.write_all(name.as_encoded_bytes()).unwrap();
        stdin.write_all(b"\n").unwrap();
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());
}
