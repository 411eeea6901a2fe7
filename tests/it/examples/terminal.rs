//! Progress bars on a terminal: they are there while the work is done, and gone afterwards.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};

use crate::support::{Process, example};

const PATIENCE: Duration = Duration::from_secs(60);

const ROWS: u16 = 24;
const COLUMNS: u16 = 80;

/// A screen, as far as progress bars use one.
#[derive(Default)]
struct Screen {
    lines: Vec<Vec<char>>,
    row: usize,
    /// [`COLUMNS`] past the last column: the next character begins the next line.
    column: usize,
}

impl Screen {
    fn show(text: &str) -> String {
        let mut screen = Self::default();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            match c {
                '\r' => screen.column = 0,
                '\n' => screen.row += 1,
                '\x1b' => {
                    assert_eq!(chars.next(), Some('['), "{text:?}");
                    let mut number = String::new();
                    let command = loop {
                        match chars.next().unwrap() {
                            c if c.is_ascii_digit() || c == ';' || c == '?' => number.push(c),
                            c => break c,
                        }
                    };
                    screen.obey(command, &number);
                }
                c => screen.put(c),
            }
        }
        let lines = screen
            .lines
            .iter()
            .map(|line| line.iter().collect::<String>());
        lines.collect::<Vec<_>>().join("\n").trim_end().to_owned()
    }

    fn line(&mut self) -> &mut Vec<char> {
        let row = self.row;
        self.lines
            .resize_with(self.lines.len().max(row + 1), Vec::new);
        &mut self.lines[row]
    }

    fn put(&mut self, c: char) {
        if self.column == usize::from(COLUMNS) {
            (self.row, self.column) = (self.row + 1, 0);
        }
        let column = self.column;
        let line = self.line();
        line.resize(line.len().max(column + 1), ' ');
        line[column] = c;
        self.column += 1;
    }

    /// See console_codes(4).
    fn obey(&mut self, command: char, number: &str) {
        let count = number.parse().unwrap_or(1);
        match command {
            'A' => self.row = self.row.saturating_sub(count),
            'B' => self.row += count,
            'K' if number == "2" => self.line().clear(),
            'K' if number.is_empty() || number == "0" => {
                let column = self.column;
                self.line().truncate(column);
            }
            'm' | 'h' | 'l' => {}
            _ => panic!("ESC [ {number} {command}"),
        }
    }
}

/// An example whose standard error is a terminal.
struct OnTerminal {
    process: Process,
    output: Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl OnTerminal {
    fn start(name: &str, args: &[&str]) -> Self {
        let size = Winsize {
            ws_row: ROWS,
            ws_col: COLUMNS,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).unwrap();
        let child = Command::new(example(name))
            .args(args)
            .env("TERM", "xterm")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(pty.slave)
            .spawn()
            .unwrap();
        let (sender, output) = mpsc::channel();
        let mut master = File::from(pty.master);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The last process that has the other end closes it: an error.
            while let Ok(read @ 1..) = master.read(&mut bytes) {
                let _ = sender.send(bytes[..read].to_vec());
            }
        });
        Self {
            process: Process(child),
            output,
            seen: Vec::new(),
        }
    }

    fn wait_for(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let more = self.output.recv_timeout(PATIENCE);
            self.seen
                .extend(more.unwrap_or_else(|_| panic!("no {text:?}: {:?}", self.seen)));
        }
    }

    /// All that came, and what is on the screen of it.
    fn end(mut self) -> (String, String) {
        while let Ok(more) = self.output.recv_timeout(PATIENCE) {
            self.seen.extend(more);
        }
        self.process.0.wait().unwrap();
        let text = String::from_utf8(std::mem::take(&mut self.seen)).unwrap();
        let screen = Screen::show(&text);
        (text, screen)
    }
}

#[test]
fn bars_are_gone_when_the_work_is_done() {
    let backend = "memory-backend-memfd,size=256M";
    for (name, args, bars) in [
        ("share", &[][..], &["reading", "writing"][..]),
        ("share", &["--sandbox"], &["reading", "writing"]),
        ("memdev", &["--populate", backend], &["populating"]),
    ] {
        let (text, screen) = OnTerminal::start(name, args).end();
        for (at, bar) in bars.iter().enumerate() {
            let first = text.find(bar);
            let first = first.unwrap_or_else(|| panic!("{name} shows no bar: {text:?}"));
            // The one before is gone when this one comes.
            let screen = Screen::show(&text[..first + bar.len()]);
            let before = &bars[..at];
            assert!(!before.iter().any(|bar| screen.contains(bar)), "{screen}");
        }
        assert_eq!(screen, "", "{name}");
    }
}

#[test]
fn a_bar_is_gone_when_a_signal_ends_the_work() {
    let backend = "memory-backend-memfd,size=1G";
    for (name, args, bar) in [
        ("share", &["--disk", "128M"][..], "reading"),
        ("share", &["--disk", "128M", "--sandbox"], "reading"),
        ("memdev", &["--populate", backend], "populating"),
    ] {
        let mut run = OnTerminal::start(name, args);
        run.wait_for(bar);
        kill(run.process.pid(), Signal::SIGINT).unwrap();
        let (_, screen) = run.end();
        assert_eq!(screen, "", "{name}");
    }
}

#[test]
fn the_screen_of_these_tests_is_one() {
    for (text, screen) in [
        ("one\r\ntwo", "one\ntwo"),
        ("bar 1\rbar 2", "bar 2"),
        ("bar 1\r\x1b[2K", ""),
        (
            &format!("{:80}next", "full"),
            &format!("{:80}\nnext", "full"),
        ),
        (&format!("{:80}\rback\x1b[K", "full"), "back"),
        ("one\r\ntwo\x1b[1A\r\x1b[2Kthree", "three\ntwo"),
    ] {
        assert_eq!(Screen::show(text), screen);
    }
}
