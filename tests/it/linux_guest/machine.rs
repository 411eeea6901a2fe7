//! QEMU with a Linux guest: its serial console and its monitor.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::initramfs::Boot;
use crate::support::{Process, peer};

/// Emulated, on a busy machine, it may take its time.
const PATIENCE: Duration = Duration::from_secs(300);

pub(super) struct Machine {
    process: Process,
    console: ChildStdin,
    lines: Receiver<String>,
    /// What the console has shown.
    shown: Vec<String>,
    monitor: BufReader<UnixStream>,
}

impl Machine {
    /// Boots a guest with a disk of the daemon at `disk`. `None`: there is no QEMU, and the test
    /// is to be skipped.
    pub(super) fn boot(boot: &Boot, disk: &Path, directory: &Path) -> Option<Self> {
        let program = peer("qemu-system-x86_64")?;
        let socket = directory.join("monitor.sock");
        let mut command = Command::new(program);
        command
            .args(["-machine", "q35,memory-backend=ram0", "-accel", "tcg"])
            .args(["-smp", "2", "-m", "256M,slots=2,maxmem=2G"])
            .args(["-object", "memory-backend-shm,id=ram0,size=256M"])
            .arg("-chardev")
            .arg(format!(
                "socket,id=disk,path={},reconnect-ms=100",
                disk.display()
            ))
            .args(["-device", "vhost-user-blk-pci,chardev=disk"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-serial", "stdio", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-kernel")
            .arg(&boot.kernel)
            .arg("-initrd")
            .arg(&boot.initramfs)
            // Plugged memory is used at once, and before all other for the page cache.
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 memhp_default_state=online_kernel",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(directory.join("qemu.log")).unwrap());
        let mut process = Process(command.spawn().unwrap());
        let console = process.0.stdin.take().unwrap();
        let mut out = BufReader::new(process.0.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            // The firmware's output may be anything.
            let mut line = Vec::new();
            while out.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(text).is_err() {
                    break;
                }
                line.clear();
            }
        });
        let mut shown = Vec::new();
        wait_for(&lines, &mut shown, "@ready");
        let monitor = UnixStream::connect(&socket).unwrap();
        monitor.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut this = Self {
            process,
            console,
            lines,
            shown,
            monitor: BufReader::new(monitor),
        };
        // The monitor greets, and takes commands after this one.
        this.message();
        this.qmp("qmp_capabilities", &json!({}));
        Some(this)
    }

    /// Has the guest carry out a command of its init, and returns what it answers.
    #[track_caller]
    pub(super) fn guest(&mut self, command: &str) -> String {
        writeln!(self.console, "{command}").unwrap();
        let answer = wait_for(&self.lines, &mut self.shown, "@done");
        answer.join(" ")
    }

    /// As [`guest`](Self::guest), for an answer that is a number.
    #[track_caller]
    pub(super) fn number(&mut self, command: &str) -> u64 {
        let answer = self.guest(command);
        answer
            .parse()
            .unwrap_or_else(|_| panic!("{command}: {answer}"))
    }

    /// Plugs RAM of `size` into the running guest.
    pub(super) fn plug(&mut self, size: u64) {
        self.qmp(
            "object-add",
            &json!({ "qom-type": "memory-backend-shm", "id": "ram1", "size": size }),
        );
        self.qmp(
            "device_add",
            &json!({ "driver": "pc-dimm", "id": "dimm1", "memdev": "ram1" }),
        );
    }

    /// Ends the guest, and asserts that it and QEMU end well.
    pub(super) fn end(mut self) {
        writeln!(self.console, "end").unwrap();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => self.shown.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it does not end: {:#?}", self.shown),
            }
        }
        let status = self.process.0.wait().unwrap();
        assert!(status.success(), "{status}: {:#?}", self.shown);
    }

    fn qmp(&mut self, command: &str, arguments: &Value) {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.monitor.get_mut(), "{request}").unwrap();
        let answer = loop {
            let message = self.message();
            if message.get("event").is_none() {
                break message;
            }
        };
        assert!(answer.get("return").is_some(), "{command}: {answer}");
    }

    fn message(&mut self) -> Value {
        let mut line = String::new();
        self.monitor.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }
}

/// Waits for the line that is `last`, and returns the answers before it without their mark.
#[track_caller]
fn wait_for(lines: &Receiver<String>, shown: &mut Vec<String>, last: &str) -> Vec<String> {
    let mut answers = Vec::new();
    loop {
        let line = match lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(error) => panic!("{error} for {last}: {shown:#?}"),
        };
        shown.push(line.clone());
        if line == last {
            return answers;
        }
        assert_ne!(line, "@failed", "{shown:#?}");
        if let Some(answer) = line.strip_prefix('@') {
            answers.push(answer.to_owned());
        }
    }
}
